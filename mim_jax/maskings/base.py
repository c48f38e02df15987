# SPDX-License-Identifier: Apache-2.0
"""What a masking is: a rule by which patches of an image are hidden."""

import abc
from typing import Any, ClassVar

from jaxtyping import Array, Key

from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid


class Masking(abc.ABC):
    """Draws which patches are hidden, each image by its own key.

    A concrete masking is a frozen dataclass whose fields are its configuration. A
    masking may read three things, and says which:

    * nothing but keys: leave the attributes below as they are;
    * fields of the training example (a tree, latents): name them in `reads`, and take
      each as a keyword argument of `__call__`;
    * a memory that the trainer keeps: set `refresh_every`, write `first_memory` and
      `refresh`, and take `memory` as a keyword argument of `__call__`.

    For a mask or noise of your own use `mim_jax.ops.masking` and put the `Mask` into
    the batch under "mask".

    Attributes:
        reads: fields of the training example that `__call__` reads.
        refresh_every: steps between refreshes of the memory; 0: there is none.

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

    @abc.abstractmethod
    def visible_count(self, grid: Grid) -> int:
        """Number of visible patches of every image; static, since shapes are.

        Raises:
            ValueError: this masking does not fit the grid. The plan calls this before
                anything compiles.
        """

    @abc.abstractmethod
    def __call__(self, keys: Key[Array, " b"], grid: Grid) -> Mask:
        """A mask for each key: a pure function of that key and of what is given.

        A masking that reads more takes it as keyword arguments: a field of the batch
        for each name in `reads`, and `memory` where it keeps one.

        Args:
            keys: one per image; the only source of randomness.
            grid: the patches of the images.
        """

    def first_memory(self, grid: Grid) -> Any:
        """The memory before the first step: a pytree of arrays, or None."""
        del grid

    def refresh(
        self, memory: Any, objective: Any, params: Any, batch: dict[str, Any], keys
    ) -> Any:
        """The next memory, like the old one in shapes; pure, and part of the step.

        The trainer calls it after each step whose number is a multiple of
        `refresh_every`, and saves the memory with the checkpoint.

        Args:
            memory: the old one.
            objective: whose `encode(params, images, ...)` gives tokens and attention.
            params: after the step.
            batch: of the step.
            keys: of the step, one per image.
        """
        del objective, params, batch, keys
        return memory
