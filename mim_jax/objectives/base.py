# SPDX-License-Identifier: Apache-2.0
"""What an objective is: what is learned, as pure functions of pytrees."""

import abc
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Float, Key, Shaped

from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid

Params = Any
Stats = Any
Batch = dict[str, Any]


def apply(network: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """What a Flax network makes of its inputs with these parameters."""
    return network.apply({"params": params}, *args, **kwargs)


class Aux(NamedTuple):
    """What a loss returns besides its value.

    Attributes:
        weight: the loss is a weighted mean over examples, and this is the sum of its
            weights over the batch; parameters have no influence on it. Gradient
            accumulation weighs the micro-batches by it.
        stats: new running statistics, {} without BatchNorm.
        metrics: further scalars to log, each a mean with that same weight.
    """

    weight: Float[Array, ""]
    stats: Stats
    metrics: dict[str, Float[Array, ""]]


class Objective(abc.ABC):
    """What is learned: a frozen dataclass, whose fields are its config.

    Attributes:
        batch_coupled: True where an example's loss depends on the other examples, as in
            contrastive losses: then a sum over micro-batches is another loss.
    """

    batch_coupled: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Host-side validation for images of (rows, columns, channels).

        Raises:
            ValueError: naming the field, its value and what would fit.
        """

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        """New parameters (per block) and statistics for batches shaped like `batch`."""

    @abc.abstractmethod
    def loss(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch. Pure; differentiated in params alone.

        Args:
            state: the TrainState, for its teacher and stats.
            batch: "image" (uint8 "b h w c") and whatever else the objective names.
            keys: one key per example, the only source of randomness: an example's
                masks depend neither on its neighbours nor on the number of devices.
        """

    @abc.abstractmethod
    def teacher(self, old: Params | None, params: Params, step: Array) -> Params | None:
        """The next teacher; `old` is None for the first one. None: no teacher."""

    @abc.abstractmethod
    def flops(self, image_shape: tuple[int, int, int]) -> float:
        """FLOPs of one training step per image; recomputation is not counted."""


class PixelObjective(Objective):
    """An objective that can fill in the pixels of hidden patches.

    Attributes:
        normalise_target: patches are predicted with their own mean and deviation
            removed.
    """

    normalise_target: bool

    @abc.abstractmethod
    def grid(self, image_shape: tuple[int, ...]) -> Grid:
        """The patches of images of (rows, columns, channels)."""

    @abc.abstractmethod
    def mask(self, batch: Batch, keys: Key[Array, " b"]) -> Mask:
        """The masks of a batch: its own under "mask" if there is one, else drawn."""

    @abc.abstractmethod
    def reconstruct(
        self, params: Params, batch: Batch, mask: Mask
    ) -> Shaped[Array, "b h w c"]:
        """Every patch as the decoder predicts it: images in 0..1, not clipped.

        Nothing is pasted in. Where targets are normalised per patch, the prediction is
        scaled back by the TRUE patch's mean and deviation, which no prediction knows.
        """
