# SPDX-License-Identifier: Apache-2.0
"""What a masking is: a rule by which patches of an image are hidden."""

import abc

from jaxtyping import Array, Key

from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid


class Masking(abc.ABC):
    """Draws which patches are hidden, each image by its own key.

    A concrete masking is a frozen dataclass whose fields are its configuration. For a
    mask or noise of your own use `mim_jax.ops.masking` and put the `Mask` into the
    batch under "mask".
    """

    @abc.abstractmethod
    def visible_count(self, grid: Grid) -> int:
        """Number of visible patches of every image.

        Raises:
            ValueError: this masking does not fit the grid; called before any compile.
        """

    @abc.abstractmethod
    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        """A mask for each key: a pure function of that key alone."""
