# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is: a fixed map from the patches of images to whole numbers."""

import abc

from jaxtyping import Array, Float, Int

from mim_jax.ops.patches import Grid


class Tokenizer(abc.ABC):
    """Names what each patch shows: one token of a vocabulary per patch.

    A concrete tokenizer is a frozen dataclass whose fields are its configuration. It is
    not learned, and no gradient flows through it.
    """

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens: they are 0 to vocabulary - 1."""

    @abc.abstractmethod
    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        """Opens what it reads, so that no loss has to.

        Raises:
            ValueError: images of (rows, columns, channels) have no tokens.
        """

    @abc.abstractmethod
    def __call__(
        self, images: Float[Array, "b h w c"], grid: Grid
    ) -> Int[Array, "b {grid.size}"]:
        """The token of each patch, for images in 0..1: pure and jittable."""
