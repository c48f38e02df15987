# SPDX-License-Identifier: Apache-2.0
"""The interface of a tokenizer: a fixed map from patches of images to integers."""

import abc

from jaxtyping import Array, Float, Int

from mim_jax.ops.patches import Grid


class Tokenizer(abc.ABC):
    """Gives each patch one token of a vocabulary.

    A concrete tokenizer is a frozen dataclass whose fields are its configuration. It is
    not learned, and no gradient flows through it.
    """

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens: they are 0 to vocabulary - 1."""

    @abc.abstractmethod
    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        """Checks images of (rows, columns, channels), and loads the tokenizer's files
        so that the loss need not.

        Raises:
            ValueError: this tokenizer cannot tokenize such images.
        """

    @abc.abstractmethod
    def __call__(
        self, images: Float[Array, "b h w c"], grid: Grid
    ) -> Int[Array, "b {grid.size}"]:
        """The token of each patch, for images in 0..1: pure and jittable."""
