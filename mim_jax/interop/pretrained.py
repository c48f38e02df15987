# SPDX-License-Identifier: Apache-2.0
"""A model of images, of a run or of weights, for programs that use the package as a
library."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Bool, Float

from mim_jax import config as configs
from mim_jax import state as states
from mim_jax.data import transforms
from mim_jax.interop import foreign, native, reading
from mim_jax.maskings.random import Random
from mim_jax.objectives.base import Objective, PixelObjective
from mim_jax.ops.masking import masks_of
from mim_jax.ops.patches import patchify, to_float, unpatchify
from mim_jax.plan import for_evaluation
from mim_jax.run import files, rundir
from mim_jax.run.loading import initial_params, read_trained

_WEIGHTS = ("trained", "teacher", "initial")


class Filled(NamedTuple):
    """What `Pretrained.reconstruct` returns.

    Attributes:
        images: within 0..1: visible patches as they were, hidden ones as predicted.
        hidden: True where the patch at this row and column of the grid was hidden.
    """

    images: Float[np.ndarray, "b h w c"]
    hidden: Bool[np.ndarray, "b rows cols"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A trained model of images; `load` and `load_encoder` make one.

    Attributes:
        objective: what it learned, built from its config. Inside your own jitted
            function call `objective.features(params, images)`.
        params: parameters as the run trained them: the blocks of a network are stacked
            if the run has scan=true.
        step: optimiser steps that made them; 0 for initial ones, and where the weights
            are of another program.
        image_size: rows and columns of the images that it reads.
        crop_fraction: share of an image that evaluation keeps, within (0, 1].
    """

    objective: Objective
    params: Any = dataclasses.field(repr=False)
    step: int
    image_size: tuple[int, int]
    crop_fraction: float

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.objective.mean)

    @property
    def width(self) -> int:
        """Numbers in the features of an image."""
        return self.objective.encoder.width

    def features(self, images: Any, batch_size: int = 64) -> Float[np.ndarray, "b d"]:
        """One vector per image, of the whole image, as evaluations see it.

        The class token or the mean of the patch tokens: `objective.feature` says which.

        Args:
            images: NumPy or JAX array [b, h, w, c], uint8 in 0..255 or floats in 0..1.
                Images of the run's size are taken whole. uint8 images of another size
                are resized and cropped as evaluation does; floats are not.
            batch_size: images that go through the network at once. It bounds the
                memory and changes the result by rounding only. The last, smaller batch
                is padded to a power of two, so that few sizes have to be compiled.
        Raises:
            TypeError: images are neither uint8 nor floats.
            ValueError: the shape does not fit, the array is empty, or a float is not
                within 0..1.
        """
        return self._batched(self._features, images, batch_size)

    def attention(
        self, images: Any, block: int = -1, batch_size: int = 64
    ) -> Float[np.ndarray, "b a rows cols"]:
        """How much of its attention the class token gives to each patch, by head.

        What is missing to 1 goes to the class token itself.

        Args:
            images, batch_size: as for `features`.
            block: which block, as an index: -1 is the last.
        Raises:
            IndexError: there is no such block.
            TypeError, ValueError: as for `features`.
        """
        depth = self.objective.encoder.depth
        if not -depth <= block < depth:
            raise IndexError(f"block={block}: want one of {-depth} to {depth - 1}")
        maps = self._batched(self._attention, images, batch_size)[:, block]
        grid = self.objective.grid((*self.image_size, self.channels))
        return maps.reshape(*maps.shape[:2], grid.rows, grid.cols)

    def reconstruct(
        self,
        images: Any,
        ratio: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Filled:
        """Hides patches of images at random, and fills them in.

        A model that predicts normalised patches (`objective.normalise_target`) is told
        the mean and deviation of each hidden patch, to scale its prediction back.

        Args:
            images, batch_size: as for `features`.
            ratio: share of patches to hide, 0 < ratio < 1; None: as in training.
            seed: of what is hidden. Image i of the array has the same mask whatever
                the other images are.
        Raises:
            ValueError: the model predicts no pixels, or as for `features`.
            TypeError: as for `features`.
        """
        if not isinstance(self.objective, PixelObjective):
            raise ValueError(
                f"{type(self.objective).__name__} predicts no pixels: want a model "
                "with a decoder, such as MAE's"
            )
        masking = self.objective.maskings["masking"]
        if ratio is not None:
            masking = Random(ratio=ratio)
        elif masking.refresh_every or masking.reads:
            raise ValueError(
                f"{type(masking).__name__} hides patches by more than the image: want "
                "ratio=R, which hides a share R of the patches at random"
            )
        key, rows = jax.random.key(seed, impl="threefry2x32"), np.arange(len(images))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(rows))
        fill, drawn = functools.partial(self._fill, masking), jax.random.key_data(keys)
        filled, hidden = self._batched(fill, images, batch_size, np.asarray(drawn))
        grid = self.objective.grid((*self.image_size, self.channels))
        return Filled(filled, hidden.reshape(-1, grid.rows, grid.cols))

    def _batched(
        self, run: Any, images: Any, batch_size: int, *rows: np.ndarray
    ) -> Any:
        """What `run` returns of (params, images, rows), for all images.

        Args:
            rows: further arrays with a row for each image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: want at least 1")
        images = np.asarray(images)
        self._check_images(images)
        found = []
        for start in range(0, len(images), batch_size):
            batch = [self._sized(images[start : start + batch_size])]
            batch += [one[start : start + batch_size] for one in rows]
            count = len(batch[0])
            size = min(batch_size, 1 << (count - 1).bit_length())
            outputs = run(self.params, *(_padded(one, size) for one in batch))
            found.append(jax.tree.map(lambda x, n=count: _plain(x)[:n], outputs))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    @functools.cached_property
    def _features(self) -> Any:
        return jax.jit(self.objective.features)

    @functools.cached_property
    def _attention(self) -> Any:
        def maps(params, images):
            taps = ("attention",)
            _, seen = self.objective.encode(params, to_float(images), taps=taps)
            # "l b a t t": of the class token, to the patches
            return jnp.moveaxis(seen["attention"][:, :, :, 0, 1:], 0, 1)

        return jax.jit(maps)

    @functools.cached_property
    def _fill(self) -> Any:
        objective: Any = self.objective  # whoever calls this has checked what it is

        def fill(masking, params, images, keys):
            keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
            batch, grid = {"image": images}, objective.grid(images.shape[1:])
            mask = masks_of(masking, batch, keys, grid)
            predicted = objective.reconstruct(params, batch, mask)
            side = objective.encoder.patch
            drawn, given = (
                patchify(jnp.asarray(one, jnp.float32), side)
                for one in (predicted, to_float(images))
            )
            filled = jnp.where(mask.hidden[:, :, None], jnp.clip(drawn, 0, 1), given)
            return unpatchify(filled, grid), mask.hidden

        return jax.jit(fill, static_argnums=0)

    def _check_images(self, images: np.ndarray) -> None:
        floats = jnp.issubdtype(images.dtype, jnp.floating)
        if images.dtype != np.uint8 and not floats:
            raise TypeError(
                f"images are {images.dtype}: want uint8 in 0..255, or floats in 0..1"
            )
        if images.ndim != 4 or images.shape[-1] != self.channels:
            first = images.ndim == 4 and images.shape[1] == self.channels
            fix = "; np.moveaxis(images, 1, -1) puts channels last" if first else ""
            if images.ndim == 3 and images.shape[-1] == self.channels:
                fix = "; images[None] is a batch of one image"
            raise ValueError(
                f"images have the shape {list(images.shape)}: want [images, rows, "
                f"columns, {self.channels}]{fix}"
            )
        if not images.size:
            raise ValueError(
                f"images have the shape {list(images.shape)}: want at least one image "
                "of at least one pixel"
            )
        if floats:
            self._check_floats(images)

    def _check_floats(self, images: np.ndarray) -> None:
        size = (images.shape[1], images.shape[2])
        if size != self.image_size:
            raise ValueError(
                f"float images are {size[0]} x {size[1]}: want the run's "
                f"{self.image_size[0]} x {self.image_size[1]}, or uint8 images, which "
                "are resized as in evaluation"
            )
        for number, image in enumerate(images):  # one by one: bounds the memory
            bad = ~((image >= 0) & (image <= 1))  # also True for NaN
            if bad.any():
                raise ValueError(
                    f"image {number} has the value {image[bad][0]!s}: want floats in "
                    "0..1; divide values of 0..255 by 255, and clip what resizing "
                    "overshot by np.clip(images, 0, 1)"
                )

    def _sized(self, batch: np.ndarray) -> np.ndarray:
        """The batch at the run's size: uint8, or float32."""
        if batch.dtype != np.uint8:
            return batch.astype(np.float32)
        if batch.shape[1:3] == self.image_size:
            return batch
        crop = transforms.centre_crop
        return np.stack([crop(x, self.image_size, self.crop_fraction) for x in batch])


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.pad(rows, [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def _plain(values: Any) -> np.ndarray:
    """An array of NumPy; numbers that are none of its own become float32."""
    values = np.asarray(values)
    return values if values.dtype == bool else values.astype(np.float32)


def load(
    source: str | files.Place,
    step: int | None = None,
    weights: str = "trained",
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Pretrained:
    """A trained model of images, of a run or of weights. No data need be there.

    Example:
        >>> import mim_jax, numpy
        >>> model = mim_jax.load("runs/mae")
        >>> images = numpy.zeros((5, *model.image_size, model.channels), "uint8")
        >>> model.features(images).shape == (5, model.width)
        True
        >>> model.reconstruct(images, ratio=0.5).images.shape == images.shape
        True

    Args:
        source: run directory; a file that `python -m mim_jax.weights export` wrote; or
            weights of another program, as `python -m mim_jax.weights import` reads
            them.
        step: which checkpoint of a run directory; None is the newest.
        weights: "trained"; "teacher", the averaged ones of methods that have them; or
            "initial", new ones by the run's seed: the random baseline.
        heads, decoder_heads: number of attention heads of encoder and decoder, where
            weights of another program do not tell.
    Raises:
        ConfigError: (a ValueError) nothing there can be read, no such checkpoint,
            unknown weights, or there is no teacher.
        CheckpointError: the checkpoint is damaged.
    """
    if weights not in _WEIGHTS:
        raise configs.ConfigError(
            f"weights={weights!r} is unknown; known: {', '.join(_WEIGHTS)}"
        )
    path = files.place(source)
    read: Any = _read_run
    if isinstance(path, pathlib.Path) and (path.is_file() or reading.is_folder(path)):
        if step is not None:
            raise configs.ConfigError(
                f"step={step}: {path} has one set of weights; want None"
            )
        read = _read_file
    config, objective, found, params = read(path, step, weights, heads, decoder_heads)
    if weights == "initial":
        found, params = 0, initial_params(config, objective)
    rows, cols = config.data.image_size
    shape = (rows, cols, len(objective.mean))
    objective, _ = for_evaluation(objective, config.attention, shape)
    return Pretrained(
        objective=objective,
        params=params,
        step=found,
        image_size=(rows, cols),
        crop_fraction=config.data.eval_crop_fraction,
    )


def load_encoder(
    source: str | files.Place, step: int | None = None, weights: str = "trained"
) -> Pretrained:
    """As `load`, for those who need features alone.

    Example:
        >>> import mim_jax, numpy
        >>> encoder = mim_jax.load_encoder("runs/mae")
        >>> images = numpy.zeros((5, *encoder.image_size, encoder.channels), "uint8")
        >>> encoder.features(images).shape == (5, encoder.width)
        True
    """
    return load(source, step, weights)


def _read_run(
    path: files.Place,
    step: int | None,
    weights: str,
    heads: int | None,
    decoder_heads: int | None,
) -> tuple[configs.Tree, Objective, int, Any]:
    """(config, objective, step, parameters) of a run directory."""
    del heads, decoder_heads  # a run knows them
    config = rundir.read_config(path, f"run={str(path)!r}")
    objective = configs.build_objective(config)
    # Even where no parameters are read, the run must have the checkpoint.
    parts = () if weights == "initial" else ("params",)
    step, found = read_trained(path, config, step, parts, weights == "teacher")
    return config, objective, step, found.get("params")


def _read_file(
    path: pathlib.Path,
    step: int | None,
    weights: str,
    heads: int | None,
    decoder_heads: int | None,
) -> tuple[configs.Tree, Objective, int, Any]:
    """(config, objective, step, parameters) of a file or folder of weights."""
    del step  # a file has one
    if native.is_ours(path):
        about, found = native.read(path)
        config, number = configs.filled(about["config"], str(path)), about["step"]
    else:
        converted = foreign.convert(
            reading.read(path), foreign.Said(heads=heads, decoder_heads=decoder_heads)
        )
        config, number = converted.config, 0
        found = {"params": traverse_util.unflatten_dict(converted.params, sep="/")}
    if weights == "teacher":
        if "teacher" not in found:
            raise configs.ConfigError(
                f"weights='teacher': {str(path)!r} has none; want 'trained'"
            )
        found["params"] |= found["teacher"]
    params = jax.tree.map(jnp.asarray, states.layout(found["params"], config.scan))
    return config, configs.build_objective(config), number, params
