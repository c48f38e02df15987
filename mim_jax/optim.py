# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules, decided from the names and ranks of single blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from mim_jax.objectives.base import Aux
from mim_jax.sharding import path_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with a warm-up and a cosine to zero, arXiv:2111.06377, table 8.

    Attributes:
        base_lr: learning rate per 256 images: lr = base_lr * batch_size / 256.
        warmup_epochs: of a linear rise from 0, on the scale of `config.epochs`; with
            `config.steps` it keeps its share of the run.
        b1, b2, eps: of Adam.
        weight_decay: decoupled, on kernels and on class and mask tokens; biases and
            norms are spared.
        final_weight_decay: if set, weight decay goes there from `weight_decay` as half
            a cosine (DINO, arXiv:2104.14294).
        decay: what decays: "matrices" as above, or "all" parameters (MoCo v3).
        final_lr: learning rate at the end of the cosine, not scaled by the batch.
        clip: largest global norm of the gradient, or None.
    """

    base_lr: float = 1.5e-4
    warmup_epochs: float = 20.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    decay: Literal["matrices", "all"] = "matrices"
    final_lr: float = 0.0
    clip: float | None = None

    def __post_init__(self):
        if not self.base_lr > 0 or not math.isfinite(self.base_lr):
            raise ValueError(f"base_lr={self.base_lr}: want a number > 0")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise ValueError(
                f"b1={self.b1}, b2={self.b2}, eps={self.eps}: want 0 <= b1, b2 < 1 and "
                "eps > 0"
            )
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"weight_decay={self.weight_decay}, warmup_epochs={self.warmup_epochs}:"
                " want numbers >= 0"
            )
        if self.final_lr < 0 or (self.final_weight_decay or 0) < 0:
            raise ValueError(
                f"final_lr={self.final_lr}, final_weight_decay="
                f"{self.final_weight_decay}: want numbers >= 0"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: want a number > 0, or none")

    def schedule(
        self, batch_size: int, epochs: float, total: int
    ) -> Callable[[Any], Any]:
        """Learning rate at each step of a run of `total` steps in `epochs` epochs.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        if self.warmup_epochs >= epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.warmup_epochs}: want less than the run's "
                f"epochs={epochs}"
            )
        peak = self.base_lr * batch_size / 256
        warmup = self.warmup_epochs / epochs * total
        return warmup_cosine(peak, warmup, float(total), self.final_lr)

    def build(
        self,
        schedule: Callable[[Any], Any],
        total: int = 1,
        frozen: tuple[str, ...] = (),
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a learning rate per step.

        Args:
            schedule: learning rate at each step.
            total: steps of the run, for weight decay that changes.
            frozen: paths of parameters that are never updated.
        """
        decay: Any = self.weight_decay
        if self.final_weight_decay is not None:
            last = self.final_weight_decay
            decay = warmup_cosine(self.weight_decay, 0.0, float(total), last)
        steps = [
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(
                decay, mask=decays if self.decay == "matrices" else None
            ),
            optax.scale_by_learning_rate(schedule),
        ]
        if self.clip is not None:
            steps.insert(0, optax.clip_by_global_norm(self.clip))
        if frozen:
            still = functools.partial(_under, frozen)
            steps.append(optax.masked(optax.set_to_zero(), still))
        return optax.chain(*steps)


def accumulated(grad_fn: Callable, micro_batches: int) -> Callable:
    """`grad_fn` of a whole batch, computed over micro-batches one after the other.

    Losses and gradients are summed with each micro-batch's weight and divided by the
    sum of weights: for a loss that is a weighted mean over examples this is the whole
    batch's, to rounding, even where weights differ.

    Args:
        grad_fn: (params, state, batch, keys) -> ((loss, Aux), gradients).
        micro_batches: divides the batch size.
    """
    if micro_batches == 1:
        return grad_fn

    def split(leaf):
        # Row r goes to micro-batch r % micro_batches: no row changes its device.
        return jnp.moveaxis(leaf.reshape(-1, micro_batches, *leaf.shape[1:]), 1, 0)

    def whole(params, state, batch, keys):
        def one(part):
            (loss, aux), grads = grad_fn(params, state, *part)
            sums = (loss, aux.metrics, grads)
            sums = jax.tree.map(lambda x: x * aux.weight.astype(x.dtype), sums)
            return (aux.weight, sums), aux.stats

        def add(total, part):
            weighted, stats = one(part)
            return jax.tree.map(jnp.add, total, weighted), stats

        parts = jax.tree.map(split, (batch, keys))
        shapes, _ = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (weight, sums), stats = jax.lax.scan(add, zeros, parts)
        stats = jax.tree.map(lambda leaf: leaf[-1], stats)
        # Without any weight the sums are 0, and so are the means: no update, no NaN.
        safe = jnp.where(weight > 0, weight, jnp.ones_like(weight))
        means = jax.tree.map(lambda x: x / safe.astype(x.dtype), sums)
        loss, metrics, grads = means
        return (loss, Aux(weight=weight, stats=stats, metrics=metrics)), grads

    return whole


def all_finite(tree: Any) -> Bool[Array, ""]:
    """True if no number of a tree is NaN or infinite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def warmup_cosine(
    peak: float, warmup: float, total: float, last: float = 0.0
) -> Callable[[Any], Any]:
    """Learning rate at each step: linear from 0 to `peak`, half a cosine to `last`.

    Args:
        peak: learning rate after the warm-up.
        warmup, total: in the unit of the argument (steps), not necessarily whole.
        last: learning rate at `total`.
    """

    def schedule(step):
        # Plain numbers stay on the host: the log asks too, while the device is busy.
        xp = jnp if isinstance(step, jax.Array) else np
        step = xp.asarray(step, xp.float32)
        rise = step / max(warmup, 1e-9)
        progress = (step - warmup) / max(total - warmup, 1e-9)
        fall = 0.5 * (1 + xp.cos(math.pi * xp.clip(progress, 0.0, 1.0)))
        return xp.where(step < warmup, peak * rise, last + (peak - last) * fall)

    return schedule


def _under(paths: tuple[str, ...], params: Any) -> Any:
    """True at the leaves at or below the paths."""

    def rule(path, leaf):
        name = path_name(path)
        return any(name == one or name.startswith(one + "/") for one in paths)

    return jax.tree_util.tree_map_with_path(rule, params)


def decays(params: Any) -> Any:
    """True at the leaves that weight decay shrinks: all but biases and 1-D leaves.

    Class and mask tokens are 3-D and decay, as in MAE. A stacked leaf counts without
    its leading axis.
    """

    def rule(path, leaf):
        rank = len(leaf.shape) - ("blocks" in path_name(path).split("/"))
        return rank > 1

    return jax.tree_util.tree_map_with_path(rule, params)
