# SPDX-License-Identifier: Apache-2.0
"""The encoder of a run, for programs that use the package as a library."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mim_jax import config as configs
from mim_jax.data import transforms
from mim_jax.objectives.base import Objective
from mim_jax.plan import for_evaluation
from mim_jax.run import rundir
from mim_jax.run.loading import initial_params, read_trained

_WEIGHTS = ("trained", "teacher", "initial")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PretrainedEncoder:
    """Features of images by the encoder of a run; `load_encoder` makes one.

    Attributes:
        objective: what the run learned, built from its config. Inside your own jitted
            function call `objective.features(params, images)`.
        params: parameters as the run trained them: the blocks of a network are stacked
            if the run has scan=true.
        step: optimiser steps that made them; 0 for initial ones.
        image_size: rows and columns of the images that the run reads.
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
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: want at least 1")
        images = np.asarray(images)
        self._check_images(images)
        found = []
        for start in range(0, len(images), batch_size):
            batch = self._sized(images[start : start + batch_size])
            rows = len(batch)
            size = min(batch_size, 1 << (rows - 1).bit_length())
            padding = [(0, size - rows), (0, 0), (0, 0), (0, 0)]
            vectors = self._network(self.params, np.pad(batch, padding))
            found.append(np.asarray(vectors, np.float32)[:rows])
        return np.concatenate(found)

    @functools.cached_property
    def _network(self) -> Any:
        return jax.jit(self.objective.features)

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


def load_encoder(
    run: str | pathlib.Path, step: int | None = None, weights: str = "trained"
) -> PretrainedEncoder:
    """The encoder of a training run. The data of the run need not be on this machine.

    Example:
        >>> import mim_jax, numpy
        >>> encoder = mim_jax.load_encoder("runs/mae")
        >>> images = numpy.zeros((5, *encoder.image_size, encoder.channels), "uint8")
        >>> encoder.features(images).shape == (5, encoder.width)
        True

    Args:
        run: run directory.
        step: which checkpoint; None is the newest.
        weights: "trained"; "teacher", the averaged ones of methods that have them; or
            "initial", new ones by the run's seed: the random baseline.
    Raises:
        ConfigError: (a ValueError) no training run there, no such checkpoint, unknown
            weights, or the run has no teacher.
        CheckpointError: the checkpoint is damaged.
    """
    if weights not in _WEIGHTS:
        raise configs.ConfigError(
            f"weights={weights!r} is unknown; known: {', '.join(_WEIGHTS)}"
        )
    folder = pathlib.Path(run)
    config = rundir.read_config(folder, f"run={str(run)!r}")
    objective = configs.build_objective(config)
    step, found = read_trained(
        folder,
        config,
        step,
        # Even where no parameters are read, the run must have the checkpoint.
        parts=() if weights == "initial" else ("params",),
        teacher=weights == "teacher",
    )
    if weights == "initial":
        step, params = 0, initial_params(config, objective)
    else:
        params = found["params"]
    rows, cols = config.data.image_size
    shape = (rows, cols, len(objective.mean))
    objective, _ = for_evaluation(objective, config.attention, shape)
    return PretrainedEncoder(
        objective=objective,
        params=params,
        step=step,
        image_size=(rows, cols),
        crop_fraction=config.data.eval_crop_fraction,
    )
