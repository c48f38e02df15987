# SPDX-License-Identifier: Apache-2.0
"""A masking with a memory that the trainer refreshes and saves.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=attended \
    --config=configs/mae.py:digits,masking=attended --workdir=runs/attended
"""

import dataclasses

import jax
import jax.numpy as jnp

from mim_jax import config
from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import from_scores
from mim_jax.ops.patches import to_float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended(Masking):
    """Hides most often the places that the class token attends to most.

    The memory is that attention, a running mean over images and heads.

    Attributes:
        ratio: share of patches that is hidden, 0 < ratio < 1.
        refresh_every: steps between refreshes of the memory, >= 1.
        decay: share of the old memory that a refresh leaves.
    """

    ratio: float = 0.75
    refresh_every: int = 50
    decay: float = 0.9

    def __post_init__(self):
        if not 0 < self.ratio < 1 or self.refresh_every < 1:
            raise ValueError(
                f"ratio={self.ratio}, refresh_every={self.refresh_every}: want "
                "0 < ratio < 1 and at least 1 step"
            )

    def visible_count(self, grid):
        visible = int(grid.size * (1 - self.ratio) + 1e-6)
        if not 0 < visible < grid.size:
            raise ValueError(
                f"ratio={self.ratio} leaves {visible} of {grid.size} patches visible: "
                "want at least one visible and one hidden"
            )
        return visible

    def first_memory(self, grid):
        return jnp.full((grid.size,), 1 / grid.size, jnp.float32)

    def refresh(self, memory, objective, params, batch, keys):
        images = to_float(batch["image"])
        _, seen = objective.encode(params, images, taps=("attention",))
        # Of the last block, "b a t t": from the class token to the patches.
        found = seen["attention"][-1][:, :, 0, 1:].mean(axis=(0, 1))
        return self.decay * memory + (1 - self.decay) * found

    def __call__(self, keys, grid, *, memory):
        def noise(key):
            return jax.random.gumbel(key, (grid.size,), jnp.float32)

        # The largest are a draw without replacement, weighted by the memory.
        scores = jnp.log(memory)[None] + jax.vmap(noise)(keys)
        return from_scores(scores, self.visible_count(grid))


config.register("attended", Attended)
