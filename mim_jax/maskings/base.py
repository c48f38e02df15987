# SPDX-License-Identifier: Apache-2.0
"""The interface of a masking: a rule that says which patches of an image are hidden."""

import abc
from typing import Any, ClassVar

from jaxtyping import Array, Key

from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid


class Masking(abc.ABC):
    """Draws the hidden patches of each image by the image's own key.

    A concrete masking is a frozen dataclass whose fields are its configuration. A
    masking may read, besides keys:

    * nothing: leave the attributes below as they are;
    * fields of the training example (a tree, latents): name them in `reads`, and take
      each as a keyword argument of `__call__`;
    * a memory that the trainer updates: set `refresh_every`, write `first_memory` and
      `refresh`, and take `memory` as a keyword argument of `__call__`.

    To use masks or noise of your own, make a `Mask` with `mim_jax.ops.masking` and put
    it into the batch under "mask".

    Attributes:
        reads: fields of the training example that `__call__` reads.
        refresh_every: steps between refreshes of the memory; 0: no memory.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp
        >>> from mim_jax.ops.masking import from_scores
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class BrightFirst(Masking):
        ...     reads = ("image",)
        ...     ratio: float = 0.5
        ...     def visible_count(self, grid):
        ...         return round(grid.size * (1 - self.ratio))
        ...     def __call__(self, keys, grid, *, image):
        ...         side = grid.patch
        ...         shape = (len(keys), grid.rows, side, grid.cols, side, -1)
        ...         blocks = image.reshape(shape)
        ...         scores = blocks.astype(jnp.float32).mean(axis=(2, 4, 5))
        ...         scores = scores.reshape(len(keys), grid.size)
        ...         return from_scores(scores, keep=self.visible_count(grid))
        >>> image = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[:, :2].set(255)
        >>> keys = jax.random.split(jax.random.key(0), 1)
        >>> BrightFirst()(keys, Grid(2, 2, 2), image=image).hidden.tolist()
        [[True, True, False, False]]
    """

    reads: ClassVar[tuple[str, ...]] = ()
    refresh_every: int = 0

    @property
    def distinct(self) -> int | None:
        """Number of different masks that an image can get; None: too many to count."""
        return None

    def whole_side(self, grid: Grid) -> int | None:
        """Side, in pixels, of squares of which each is hidden as a whole or not at all;
        None if there is no such rule."""
        del grid
        return None

    @abc.abstractmethod
    def visible_count(self, grid: Grid) -> int:
        """Number of visible patches, the same for every image since shapes are static.

        Raises:
            ValueError: this masking does not fit the grid. The plan calls this before
                anything compiles.
        """

    @abc.abstractmethod
    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        """A mask for each key: a pure function of that key and the other arguments.

        A masking takes further arguments by keyword: the batch's field for each name in
        `reads`, and `memory` if it has one.

        Args:
            keys: one per image; the only source of randomness.
            grid: the patches of the images.
        """

    def first_memory(self, grid: Grid) -> Any:
        """The memory before the first step: an array or nested dicts of arrays."""
        del grid

    def refresh(
        self, memory: Any, objective: Any, params: Any, batch: dict[str, Any], keys
    ) -> Any:
        """The next memory, with the shapes of the old one; pure, and part of the step.

        The trainer calls it after each step whose number is a multiple of
        `refresh_every`, and saves the memory with the checkpoint.

        Args:
            memory: the old memory.
            objective: its `encode(params, images, ...)` gives tokens and attention.
            params: parameters after the step.
            batch: batch of the step.
            keys: keys of the step, one per image.
        """
        del objective, params, batch, keys
        return memory


def visible_patches(ratio: float, grid: Grid) -> int:
    """How many patches a masking leaves visible that hides this share of them, rounded
    down.

    Raises:
        ValueError: it is none or all.
    """
    visible = int(grid.size * (1 - ratio) + 1e-6)
    if not 0 < visible < grid.size:
        raise ValueError(
            f"ratio={ratio} leaves {visible} of {grid.size} patches visible: want at "
            "least one visible and one hidden"
        )
    return visible
