# SPDX-License-Identifier: Apache-2.0
"""What the explore page asks of a run: fill in, look, find neighbours."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from mim_jax.evals.attention import last_attention
from mim_jax.evals.base import Run, caption
from mim_jax.evals.features import Features, extract, l2_normalised
from mim_jax.evals.reconstruction import patch_means, visible_mean, whole_image_scores
from mim_jax.maskings.random import Random
from mim_jax.objectives.base import PixelObjective
from mim_jax.ops import similarity
from mim_jax.ops.masking import Mask, from_hidden
from mim_jax.ops.patches import Grid
from mim_jax.run.loading import Loaded

Image = UInt8[np.ndarray, "h w c"]


class Score(NamedTuple):
    """A number beside a reconstruction.

    Attributes:
        title, unit: what it is; the unit "1" has no name.
        value: None where it is not finite.
        better: "higher" or "lower" is better.
        meaning: for a reader who does not know the papers.
    """

    title: str
    unit: str
    value: float | None
    better: str
    meaning: str


class Filled(NamedTuple):
    """Attributes:
    image: visible patches as they were, hidden ones as the model fills them in.
    scores: the model's, then those of simple ways to fill in the same patches.
    """

    image: Image
    scores: list[Score]


class Near(NamedTuple):
    """A training image near to the one that was asked about.

    Attributes:
        image: its centre crop.
        label: of its class; "" if unknown.
        similarity: cosine of the two feature vectors, -1..1.
    """

    image: Image
    label: str
    similarity: float


def drawn(grid: Grid, hidden: int, unit: int, seed: int) -> Bool[np.ndarray, " n"]:
    """A random mask that hides exactly so many patches.

    Args:
        grid: the patches of an image.
        hidden: number of hidden patches, 0 < hidden < grid.size.
        unit: side in patches of the squares that are hidden together. One of them may
            be hidden in part, and squares may reach over the border.
        seed: of the draw.
    Raises:
        ValueError: the unit is no positive number of patches, or covers the image; or
            nothing is hidden, or everything.
    """
    if not 0 < hidden < grid.size:
        raise ValueError(
            f"{hidden} of {grid.size} patches are hidden: want at least one hidden and "
            "one visible"
        )
    masking = Random(
        ratio=hidden / grid.size, unit=unit * grid.patch, partial_units="allow"
    )
    masking.visible_count(grid)  # raises if the unit does not fit
    keys = jax.random.key(seed, impl="threefry2x32")[None]
    return np.asarray(masking(keys, grid).hidden)[0]


class Model:
    """One run. A number of hidden patches that is new compiles a program.

    Args:
        one: the run, and where its images are.
        bank: neighbours are looked for among so many training images at most.
    Raises:
        ValueError: the training images cannot be read.
    """

    def __init__(self, one: Loaded, bank: int):
        self.run: Run = one.run
        self.title = caption(one.run)
        self.grid = one.run.objective.grid(one.training.data.image_shape)
        self._passes = one.passes
        with self._passes.train(spread=True) as batches:
            self._bank = extract(
                self.run.objective.features, self.run.params, batches, bank
            )
        self._directions = l2_normalised(self._bank.vectors)

    @property
    def bank(self) -> Features:
        """Features of the training images that neighbours are looked for among."""
        return self._bank

    @property
    def predicts_pixels(self) -> bool:
        """Whether `fill` works."""
        return isinstance(self.run.objective, PixelObjective)

    def fill(self, image: Image, hidden: Bool[np.ndarray, " n"]) -> Filled:
        """Fills in the hidden patches of an image.

        Args:
            image: of the run's size.
            hidden: True at the patches to hide, in grid order.
        Raises:
            ValueError: nothing is hidden, or everything; or the run predicts no pixels.
        """
        if not self.predicts_pixels:
            raise ValueError(
                f"{type(self.run.objective).__name__} predicts no pixels: want a run "
                "of a method with a decoder, such as MAE's"
            )
        mask = from_hidden(hidden[None])
        model, untrained = (
            self._predict(params, image[None], mask)
            for params in (self.run.params, self.run.initial)
        )
        side = self.grid.patch
        region = hidden.reshape(self.grid.rows, self.grid.cols)
        region = region.repeat(side, axis=0).repeat(side, axis=1)[None]
        pasted, found = self._score(model, untrained, image[None], region)
        pixels = np.asarray(pasted)[0] * 255
        scores = [
            Score(title, unit, _finite(found[key]), better, meaning)
            for key, (title, unit, better, meaning) in _SCORES.items()
            if key in found
        ]
        return Filled(np.round(pixels).astype(np.uint8), scores)

    def attention(self, image: Image, patch: int | None) -> Float[np.ndarray, " n"]:
        """How much attention each patch of the whole image gets in the last block.

        Args:
            image: of the run's size.
            patch: from which patch, in grid order; None: from the class token.
        Returns:
            The mean over heads; what is missing to 1 goes to the class token.
        Raises:
            IndexError: there is no such patch.
        """
        if patch is not None and not 0 <= patch < self.grid.size:
            raise IndexError(f"patch {patch}: want one of 0 to {self.grid.size - 1}")
        rows = self._look(self.run.params, image[None])
        return np.asarray(rows, np.float32)[0, 0 if patch is None else 1 + patch, 1:]

    def neighbours(self, image: Image, count: int) -> list[Near]:
        """The training images with the most similar features, the nearest first.

        Args:
            image: of the run's size.
            count: how many, at most.
        """
        vector = self._features(self.run.params, image[None])
        (similar,) = l2_normalised(np.asarray(vector, np.float32)) @ self._directions.T
        order = np.argsort(-similar, kind="stable")[:count]
        indices = [int(i) for i in self._bank.indices[order]]
        near = self._passes.train_examples(indices)
        names = (*self._passes.classes, "")  # -1, unknown, is the last
        return [
            Near(image, names[label], float(value))
            for image, label, value in zip(
                near["image"], near["label"], similar[order], strict=True
            )
        ]

    @functools.cached_property
    def _features(self):
        return jax.jit(self.run.objective.features)

    @functools.cached_property
    def _look(self):
        return jax.jit(functools.partial(last_attention, self.run.objective))

    @functools.cached_property
    def _predict(self):
        objective = self.run.objective
        assert isinstance(objective, PixelObjective)

        def predict(params, images, mask: Mask):
            found = objective.reconstruct(params, {"image": images}, mask)
            return jnp.clip(jnp.asarray(found, jnp.float32), 0, 1)

        return jax.jit(predict)

    @functools.cached_property
    def _score(self):
        """Compiles once: its shapes do not depend on how many patches are hidden."""
        objective, grid = self.run.objective, self.grid
        assert isinstance(objective, PixelObjective)

        def score(model, untrained, images, region: Bool[Array, "1 h w"]):
            original = jnp.asarray(images, jnp.float32) / 255
            ways = {
                "model": model,
                "untrained": untrained,
                "visible_mean": visible_mean(original, region),
            }
            if objective.normalise_target:
                ways["patch_mean"] = patch_means(original, grid)
            found = {
                f"psnr_{name}": similarity.psnr(filled, original, region)
                for name, filled in ways.items()
            }
            found["mse_hidden"] = similarity.mse(model, original, region)
            pasted = jnp.where(region[..., None], model, original)
            return pasted, found | whole_image_scores(pasted, original)

        return jax.jit(score)


_PSNR = "PSNR of hidden pixels"
_DB = "10 dB more is a tenth of the squared error."
# Of each score that `Model.fill` may find: title, unit, better, meaning.
_SCORES = {
    "psnr_model": (_PSNR, "dB", "higher", f"How close the model comes. {_DB}"),
    "psnr_untrained": (
        "... before training",
        "dB",
        "higher",
        "The same network with its first, random parameters.",
    ),
    "psnr_visible_mean": (
        "... of the visible mean",
        "dB",
        "higher",
        "Every hidden pixel set to the mean of the visible ones.",
    ),
    "psnr_patch_mean": (
        "... of each patch's true mean",
        "dB",
        "higher",
        "This method is told mean and contrast of each hidden patch; so is this way to "
        "fill in.",
    ),
    "mse_hidden": (
        "squared error of hidden pixels",
        "1",
        "lower",
        "Mean, of values in 0..1.",
    ),
    "ssim": (
        "SSIM",
        "1",
        "higher",
        "Similarity of structure to the original, visible patches too: 1 is equal.",
    ),
    "fsim": (
        "FSIM",
        "1",
        "higher",
        "Similarity of features to the original, visible patches too: 1 is equal.",
    ),
    "fsimc": ("FSIMc", "1", "higher", "FSIM that compares colours, too."),
}


def _finite(values: Array) -> float | None:
    value = float(values[0])
    return value if math.isfinite(value) else None
