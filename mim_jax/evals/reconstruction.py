# SPDX-License-Identifier: Apache-2.0
"""How well a model fills in hidden patches: numbers beside baselines, and pictures."""

import dataclasses
import textwrap
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from matplotlib.figure import Figure

from mim_jax.evals.base import Batch, Eval, Headline, Passes, Run
from mim_jax.evals.figures import Panel, gallery
from mim_jax.evals.images import example_fields, hidden_pixels, keys_of, valid_images
from mim_jax.evals.report import Number, Report, mean_of
from mim_jax.objectives.base import Objective, PixelObjective
from mim_jax.ops import similarity
from mim_jax.ops.masking import Mask, no_mask
from mim_jax.ops.patches import Grid, patchify, unpatchify
from mim_jax.schema import check_ranges, within

Pixels = Float[Array, "b h w c"]
_MODEL = "psnr_model_db"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Eval):
    """Reconstructed held-out images against the originals, clipped to 0..1.

    PSNR and MSE are taken over hidden pixels. Baselines on the same images and masks
    stand beside the model: the model before training ("untrained"), every hidden pixel
    set to the image's visible mean ("visible_mean"), and biharmonic inpainting by
    scikit-image ("biharmonic"). Where targets are normalised per patch, predictions are
    scaled by the true statistics of each patch; a fair baseline knows them too: each
    hidden patch set to its true mean, channel by channel ("patch_mean").

    MSE, PSNR, SSIM, FSIM and (colour) FSIMc of whole images follow, with every patch
    predicted: "full_" from the unmasked image, as in figure 5 of arXiv:2306.04898,
    "masked_" from the masked image, "pasted_" with the visible patches pasted in, as
    the PSNR column of arXiv:2208.04164, table 1, is read.

    An objective is measured through the methods of `PixelObjective` alone: `mask`,
    `reconstruct` and `normalise_target`. The first two get every field of the examples.

    Attributes:
        images: number of held-out images at most, of all classes alike if records are
            sorted by class.
        draws: masks per image.
        inpainted: images (one mask each) that get biharmonic inpainting, which is slow.
        rows: images in the picture.
        seed: of the masks.
    """

    description: ClassVar[str] = (
        "Held-out images with some patches hidden, and what each model fills in. "
        "Visible patches are pasted into the result."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "psnr_model_db",
            "PSNR of hidden pixels",
            "dB",
            "higher",
            "How close hidden pixels come to the true ones: 10 dB more is a tenth of "
            "the squared error. Models that predict patches with mean and contrast "
            "removed are helped by the true values of these two. Each model hides what "
            "it hid in training.",
        ),
        Headline(
            "psnr_visible_mean_db",
            "PSNR, one colour",
            "dB",
            "neither",
            "What no learning gives, on the same images and masks: every hidden pixel "
            "gets the mean colour of the visible pixels of its image. A model that "
            "learned something is above it.",
        ),
        Headline(
            "psnr_patch_mean_db",
            "PSNR, true patch means",
            "dB",
            "neither",
            "The fair baseline of models that are helped by the true mean and contrast "
            "of each hidden patch: every hidden patch gets its true mean colour.",
        ),
        Headline(
            "full_ssim",
            "SSIM, nothing hidden",
            "1",
            "higher",
            "Similarity of structure between an image and its reconstruction when the "
            "model sees all of it: 1 means equal.",
        ),
    )

    images: int = within(64, least=1)
    draws: int = within(4, least=1, most=1000)
    inpainted: int = within(8, least=0)
    rows: int = within(6, least=1, most=1000)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        if not isinstance(objective, PixelObjective):
            raise ValueError(
                f"reconstruction of a {type(objective).__name__} run: want an "
                "objective that predicts pixels, a PixelObjective"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        scorer = _Scorer(run)
        samples: dict[str, list[float]] = {}
        panels: list[list] = []
        seen = 0

        def note(scores, rows):
            for name, values in scores.items():
                found = np.asarray(values)[rows].tolist()
                samples.setdefault(name, []).extend(found)

        with data.held_out(spread=True) as batches:
            for batch, rows in valid_images(batches, "reconstruction", self.images):
                note(scorer.unmasked(batch), rows)
                first = scorer.masked(batch, keys_of(batch, self.seed))
                note(first.scores, rows)
                for number in range(1, self.draws):
                    another = scorer.masked(batch, keys_of(batch, self.seed, number))
                    note(another.scores, rows)
                for i in rows[: max(0, self.inpainted - seen)]:
                    note(_inpainted(first.original[i], first.hidden[i]), [0])
                    score = {"psnr_model_where_inpainted_db": first.scores[_MODEL]}
                    note(score, [i])
                shown = rows[: max(0, self.rows - seen)]
                score = np.asarray(first.scores[_MODEL])
                columns = (
                    *(batch["index"], first.original, first.hidden, first.model),
                    score,
                )
                panels.append([column[shown] for column in columns])
                seen += len(rows)
        numbers = {
            "images": Number(seen, "images"),
            "masks_per_image": Number(self.draws, "masks"),
        }
        for name, sample in samples.items():
            unit = "dB" if name.endswith("_db") else "1"
            numbers[name] = mean_of(sample, unit)
        pooled = np.asarray(samples["full_mse"]).mean()
        numbers["full_psnr_of_mean_mse_db"] = Number(
            float(-10 * np.log10(pooled)), "dB", seen
        )
        arrays = {name: np.asarray(sample) for name, sample in samples.items()}
        index, *shown = map(np.concatenate, zip(*panels, strict=True))
        names = ("original", "hidden", "model", "psnr")
        for name, column in zip(names, shown, strict=True):
            arrays[f"panel_{name}"] = column[np.argsort(index, kind="stable")]
        return Report(numbers=numbers, arrays=arrays)

    def sentence(self, report: Report) -> str:
        values = report.scalars
        others = {"untrained": "untrained", "visible_mean": "visible mean"}
        model = _MODEL
        if "psnr_biharmonic_db" in values:  # the model's score on the same images
            others = {"biharmonic": "biharmonic inpainting"} | others
            model = "psnr_model_where_inpainted_db"
        beside = ", ".join(
            f"{word} {values[f'psnr_{name}_db']:.1f}" for name, word in others.items()
        )
        # The model was given them: without this number its own would say too much.
        if "psnr_patch_mean_db" in values:
            helped = values["psnr_patch_mean_db"]
            beside += (
                f"; with the true mean and contrast of patches, mean alone {helped:.1f}"
            )
        return f"hidden pixels at {values[model]:.1f} dB ({beside})"

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        """A column for each image: what the model sees, what it fills in, the truth."""
        one = len(found) == 1
        first = next(iter(found.values())).arrays
        original, hidden = first["panel_original"], first["panel_hidden"]
        masks = [report.arrays["panel_hidden"] for report in found.values()]
        alike = all(np.array_equal(mask, hidden) for mask in masks)
        rows, scores = {}, {}
        for name, report in found.items():
            title, arrays = "filled in" if one else name, report.arrays
            gaps, images = arrays["panel_hidden"][..., None], arrays["panel_original"]
            if not rows or not alike:  # a row for each masking
                seen = "seen" if alike else f"seen by\n{name}"
                rows[seen] = np.where(gaps, np.float32(0.5), images)
            rows[title] = np.where(gaps, arrays["panel_model"], images)
            scores[title] = arrays["panel_psnr"]
        rows["original"] = original
        if one:
            rows["model alone"] = first["panel_model"]
        panels = [
            Panel(
                image,
                below=f"{scores[title][column]:.1f} dB" if title in scores else "",
                left=title if column == 0 else "",
            )
            for title, images in rows.items()
            for column, image in enumerate(images)
        ]
        title = "Held-out images. Below: PSNR of hidden pixels in dB, higher is better"
        if one:
            ((name, report),) = found.items()
            psnr = f"PSNR of hidden pixels in dB, higher is better: {_summary(report)}"
            letters = max(80, 22 * len(hidden))  # that fit beside each other
            lines = [textwrap.fill(one, letters) for one in (psnr, _explained(report))]
            title = "\n".join([f"{name}: held-out images", *lines])
        return {"reconstruction": gallery(panels, len(hidden), (1.3, 1.55), title)}


class _Filled(NamedTuple):
    """A batch that a model filled in.

    Attributes:
        scores: by name, one per image.
        original, model: images in 0..1, as they are and as the model predicts them.
        hidden: True at hidden pixels.
    """

    scores: dict[str, Any]
    original: Float[np.ndarray, "b h w c"]
    hidden: Bool[np.ndarray, "b h w"]
    model: Float[np.ndarray, "b h w c"]


class _Scorer:
    """Fills in images by one run and scores them; each program compiles once."""

    def __init__(self, run: Run):
        objective = run.objective
        assert isinstance(objective, PixelObjective)  # by `check_objective`
        self._run, self._objective = run, objective
        self._fill = jax.jit(
            lambda params, fields, mask: jnp.clip(
                objective.reconstruct(params, fields, mask), 0, 1
            )
        )
        self._draw = jax.jit(self._mask)
        self._compare = jax.jit(whole_image_scores)
        self._on_hidden = jax.jit(self._score_hidden)

    def _mask(self, memory: Any, fields: Any, keys: Key[Array, " b"]) -> Mask:
        state = dataclasses.replace(self._run, memory=memory)
        return self._objective.mask(fields, keys, state)

    def unmasked(self, batch: Batch) -> dict[str, Float[Array, " b"]]:
        """Scores of reconstructions from whole images."""
        original, fields = _pixels(batch), example_fields(batch)
        mask = no_mask(len(original), self._objective.grid(original.shape[1:]))
        filled = self._fill(self._run.params, fields, mask)
        scores = self._compare(filled, original)
        return {f"full_{name}": values for name, values in scores.items()}

    def masked(self, batch: Batch, keys: Key[Array, " b"]) -> _Filled:
        """Reconstructions from masked images, one mask per key."""
        original, fields = _pixels(batch), example_fields(batch)
        mask = self._draw(self._run.memory, fields, keys)
        model = self._fill(self._run.params, fields, mask)
        untrained = self._fill(self._run.initial, fields, mask)
        found, pasted, hidden = self._on_hidden(model, untrained, original, mask)
        scores = dict(zip(self._names, found, strict=True))
        for kind, images in (("masked", model), ("pasted", pasted)):
            for name, values in self._compare(images, original).items():
                scores[f"{kind}_{name}"] = values
        return _Filled(scores, original, np.asarray(hidden), np.asarray(model))

    @property
    def _names(self) -> list[str]:
        """Names of what `_score_hidden` returns."""
        baselines = ["untrained", "visible_mean"]
        baselines += ["patch_mean"] * self._objective.normalise_target
        return [_MODEL, *(f"psnr_{name}_db" for name in baselines), "mse_model"]

    def _score_hidden(
        self, model: Pixels, untrained: Pixels, original: Pixels, mask: Mask
    ) -> tuple[list[Float[Array, " b"]], Pixels, Bool[Array, "b h w"]]:
        """Scores over hidden pixels, the model's images with the visible pixels pasted
        in, and where pixels are hidden."""
        grid = self._objective.grid(original.shape[1:])
        region = hidden_pixels(mask, grid)
        filled = [model, untrained, visible_mean(original, region)]
        if self._objective.normalise_target:
            filled.append(patch_means(original, grid))
        scores = [similarity.psnr(images, original, region) for images in filled]
        scores.append(similarity.mse(model, original, region))
        return scores, jnp.where(region[..., None], model, original), region


def _pixels(batch: Batch) -> Float[np.ndarray, "b h w c"]:
    """A copy of the images in 0..1."""
    return np.asarray(batch["image"]).astype(np.float32) / 255


def visible_mean(images: Pixels, hidden: Bool[Array, "b h w"]) -> Pixels:
    """Images of one colour each, the mean of the visible pixels, channel by channel."""
    weight = (~hidden)[..., None].astype(images.dtype)
    mean = (images * weight).sum(axis=(1, 2), keepdims=True) / weight.sum(
        axis=(1, 2), keepdims=True
    )
    return jnp.broadcast_to(mean, images.shape)


def patch_means(images: Pixels, grid: Grid) -> Pixels:
    """Images whose patches are each of one colour, their mean, channel by channel."""
    patches = patchify(images, grid.patch)
    colours = patches.reshape(*patches.shape[:2], grid.patch**2, images.shape[-1])
    mean = jnp.broadcast_to(colours.mean(axis=2, keepdims=True), colours.shape)
    return unpatchify(mean.reshape(patches.shape), grid)


def inpaint(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Biharmonic inpainting of the hidden pixels, by scikit-image."""
    from skimage.restoration import inpaint_biharmonic  # slow to import

    known = np.where(hidden[..., None], 0, image)
    filled = inpaint_biharmonic(known, np.array(hidden), channel_axis=-1)
    return np.clip(filled, 0, 1).astype(image.dtype)


def whole_image_scores(
    images: Pixels, original: Pixels
) -> dict[str, Float[Array, " b"]]:
    """Scores per image by every measure that fits their size and channels."""
    scores = {
        "mse": similarity.mse(images, original),
        "psnr_db": similarity.psnr(images, original),
    }
    height, width, channels = original.shape[1:]
    if min(height, width) >= 11:
        scores["ssim"] = similarity.ssim(images, original)
    # FSIM's largest filters are 48 pixels long.
    if channels in (1, 3) and min(height, width) >= 32:
        scores["fsim"] = similarity.fsim(images, original)
    if channels == 3 and "fsim" in scores:
        scores["fsimc"] = similarity.fsim(images, original, chromatic=True)
    return scores


def _inpainted(original: np.ndarray, hidden: np.ndarray) -> dict[str, Array]:
    """The score of biharmonic inpainting of one image."""
    images = (inpaint(original, hidden), original, hidden)
    score = similarity.psnr(*(jnp.asarray(one)[None] for one in images))
    return {"psnr_biharmonic_db": score}


_WAYS = {
    "untrained": "the network before training",
    "visible_mean": "one colour, the mean of the visible pixels",
    "patch_mean": "the true mean of each patch",
    "biharmonic": "smooth inpainting",
}


def _summary(report: Report) -> str:
    """The PSNR of hidden pixels by each way to fill them in."""
    values = report.scalars
    shown = [
        f"{name.replace('_', ' ')} {values[f'psnr_{name}_db']:.2f}"
        for name in ("model", *_WAYS)
        if f"psnr_{name}_db" in values
    ]
    there = "psnr_model_where_inpainted_db"
    if there in values:  # inpainting is slow, and of some images only
        count = report.numbers[there].n
        shown[-1] += f" (of {count} images: model there {values[there]:.2f})"
    return ", ".join(shown)


def _explained(report: Report) -> str:
    """What the names of `_summary` mean."""
    ways = [
        f"{name.replace('_', ' ')}: {words}"
        for name, words in _WAYS.items()
        if f"psnr_{name}_db" in report.scalars
    ]
    return "; ".join(ways)
