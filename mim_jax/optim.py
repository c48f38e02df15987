# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules.

Rules for single leaves (weight decay, layer-wise rates, trust ratios) go by path and
rank, and treat stacked blocks like single ones.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from mim_jax.objectives.base import Aux
from mim_jax.ops.lars import trusted
from mim_jax.sharding import path_name

_BLOCK = re.compile(r"block(\d+)")


class Optimiser(abc.ABC):
    """How gradients become updates: a frozen dataclass, whose fields are its config.

    Attributes:
        base_lr: learning rate per 256 images: lr = base_lr * batch_size / 256.
        warmup_epochs: length of the linear rise from 0. The warm-up takes the share
            warmup_epochs / `config.epochs` of the run, also if `config.steps` sets the
            run's length.
        final_lr: learning rate at the end of the cosine; the batch size does not scale
            it.
    """

    base_lr: float
    warmup_epochs: float
    final_lr: float

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
            total: steps of the run; a weight decay that changes needs it.
            frozen: paths of parameters that are never updated. The optimiser has no
                state for them.
        """
        steps = self.steps(schedule, total)
        return _freezing(frozen, steps) if frozen else steps

    @abc.abstractmethod
    def steps(
        self, schedule: Callable[[Any], Any], total: int
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation of `build`, for parameters of which none is
        frozen."""

    def check_rates(self) -> None:
        """ValueError if a learning rate or the warm-up is out of range."""
        if not self.base_lr > 0 or not math.isfinite(self.base_lr):
            raise ValueError(f"base_lr={self.base_lr}: want a number > 0")
        for name in ("warmup_epochs", "final_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: want a number >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimiser):
    """AdamW with a warm-up and a cosine to zero, arXiv:2111.06377, table 8.

    Attributes:
        b1, b2, eps: Adam's constants.
        weight_decay: decoupled weight decay of the parameters that `decay` names.
        final_weight_decay: if set, weight decay goes from `weight_decay` to this value
            along half a cosine (DINO, arXiv:2104.14294).
        decay: which parameters decay. "matrices": kernels and the class, mask and
            position tokens, but not biases and norms. "kernels": only the kernels of
            linear layers, as in fine-tuning. "all": every parameter, as in MoCo v3.
        layer_decay: factor between the learning rates of neighbouring layers,
            arXiv:2106.08254. The head has the full rate, the last block layer_decay
            times that, the embedding layer_decay ** (blocks + 1) times that. None: all
            layers have the same rate.
        clip: upper bound of the gradient's global norm, or None.
    """

    base_lr: float = 1.5e-4
    warmup_epochs: float = 20.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    decay: Literal["matrices", "kernels", "all"] = "matrices"
    layer_decay: float | None = None
    final_lr: float = 0.0
    clip: float | None = None

    def __post_init__(self):
        self.check_rates()
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise ValueError(
                f"b1={self.b1}, b2={self.b2}, eps={self.eps}: want 0 <= b1, b2 < 1 and "
                "eps > 0"
            )
        for name in ("weight_decay", "final_weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: want a number >= 0")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay={self.layer_decay}: want 0 < layer_decay <= 1 (1: off)"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}: want a number > 0, or none")

    def steps(
        self, schedule: Callable[[Any], Any], total: int
    ) -> optax.GradientTransformationExtraArgs:
        decay: Any = self.weight_decay
        if self.final_weight_decay is not None:
            last = self.final_weight_decay
            decay = warmup_cosine(self.weight_decay, 0.0, float(total), last)
        masks = {"matrices": decays, "kernels": kernels, "all": None}
        steps = [
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(decay, mask=masks[self.decay]),
            optax.scale_by_learning_rate(schedule),
        ]
        if self.layer_decay is not None:
            steps.append(_by_layer(self.layer_decay))
        if self.clip is not None:
            steps.insert(0, optax.clip_by_global_norm(self.clip))
        return optax.chain(*steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LARS(Optimiser):
    """LARS as MAE's linear probe runs it, arXiv:1708.03888 and 2111.06377, table 10.

    It differs from `optax.lars` in two points. Momentum sums gradients, not updates, so
    that a change of the learning rate acts on the whole sum at once. Biases and norms
    get plain SGD with momentum, without the trust ratio.

    Attributes:
        momentum: factor of the previous sum of gradients.
        trust: the gradient of a matrix is scaled to the length trust * |parameters|.
        weight_decay: factor of the parameters that are added to gradients of matrices.
    """

    base_lr: float = 0.1
    warmup_epochs: float = 10.0
    momentum: float = 0.9
    trust: float = 0.001
    weight_decay: float = 0.0
    final_lr: float = 0.0

    def __post_init__(self):
        self.check_rates()
        if not 0 <= self.momentum < 1 or not self.trust > 0:
            raise ValueError(
                f"momentum={self.momentum}, trust={self.trust}: want 0 <= momentum < 1 "
                "and trust > 0"
            )
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: want a number >= 0")

    def steps(
        self, schedule: Callable[[Any], Any], total: int
    ) -> optax.GradientTransformationExtraArgs:
        del total
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            _trusted(self.trust),
            optax.trace(self.momentum),
            optax.scale_by_learning_rate(schedule),
        )


OPTIMISERS: dict[str, type[Optimiser]] = {"adamw": AdamW, "lars": LARS}


def accumulated(grad_fn: Callable, micro_batches: int) -> Callable:
    """`grad_fn` for a whole batch, computed on one micro-batch after the other.

    Loss, metrics and gradients are weighted means over the micro-batches, each with its
    `Aux.weight`. If the loss is a weighted mean over examples, the results equal those
    of the whole batch up to rounding, even where the weights differ.

    Args:
        grad_fn: (params, state, batch, keys) -> ((loss, Aux), gradients).
        micro_batches: number of micro-batches; it divides the batch size.
    """

    def split(leaf):
        # Row r goes to micro-batch r % micro_batches, so that no row moves to another
        # device.
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
        # If all weights are 0, the sums are 0: then the means are 0 too, and not NaN.
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
    """Learning rate at each step: a line from 0 to `peak`, then half a cosine to
    `last`.

    Args:
        peak: learning rate after the warm-up.
        warmup: length of the warm-up in steps; may be fractional.
        total: length of the run in steps; may be fractional.
        last: learning rate at `total`.
    """

    def schedule(step):
        # The log asks with a plain number: numpy then answers without the busy device.
        xp = jnp if isinstance(step, jax.Array) else np
        step = xp.asarray(step, xp.float32)
        rise = step / max(warmup, 1e-9)
        progress = (step - warmup) / max(total - warmup, 1e-9)
        fall = 0.5 * (1 + xp.cos(math.pi * xp.clip(progress, 0.0, 1.0)))
        return xp.where(step < warmup, peak * rise, last + (peak - last) * fall)

    return schedule


def layer_scales(params: Any, decay: float) -> Any:
    """Factor of the learning rate of each leaf, decay ** (last layer - its layer).

    Embedding, positions, class and mask token are layer 0; block i of the encoder is
    layer i + 1; everything else is the last layer and has factor 1. A stacked leaf gets
    an array with one factor per block.
    """
    encoder = params.get("encoder", {})  # absent where it is frozen
    stacked = jax.tree.leaves(encoder.get("blocks", {}))
    single = [name for name in encoder if _BLOCK.fullmatch(name)]
    depth = len(stacked[0]) if stacked else len(single)

    def rule(path, leaf):
        top, name, *_ = path_name(path).split("/")
        if top != "encoder" or name == "norm":
            return 1.0
        if name == "blocks":
            shares = decay ** np.arange(depth, 0, -1, dtype=np.float64)
            return shares.astype(np.float32).reshape(-1, *[1] * (leaf.ndim - 1))
        block = _BLOCK.fullmatch(name)
        return decay ** (depth - int(block[1]) if block else depth + 1)

    return jax.tree_util.tree_map_with_path(rule, params)


def _by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies every update by the factor of its layer (`layer_scales`)."""

    def scaled(updates, params):
        del params
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay))

    return optax.stateless(scaled)


def _trusted(coefficient: float) -> optax.GradientTransformation:
    """Scales the gradient of each matrix to the length coefficient * |parameters|."""

    def scaled(updates, params):
        def rule(path, update, param):
            first = int("blocks" in path_name(path).split("/"))  # one ratio per block
            if update.ndim - first <= 1:
                return update
            return trusted(update, param, coefficient, range(first, update.ndim))

        return jax.tree_util.tree_map_with_path(rule, updates, params)

    return optax.stateless(scaled)


def _freezing(
    frozen: tuple[str, ...], steps: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Applies `steps` to the unfrozen leaves; frozen leaves get zero updates and no
    optimiser state.

    `optax.partition` would do the same, but its state has other paths: old checkpoints
    of runs with frozen parameters could no longer be read.
    """

    def init(params):
        return steps.init(_without(frozen, params))

    def update(updates, state, params=None, **extra):
        trained = _without(frozen, updates)
        given = None if params is None else _without(frozen, params)
        trained, state = steps.update(trained, state, given, **extra)
        return _merged(jax.tree.map(jnp.zeros_like, updates), trained), state

    return optax.GradientTransformationExtraArgs(init, update)


def _without(frozen: tuple[str, ...], tree: Any, above: str = "") -> dict[str, Any]:
    """Nested dicts without the leaves at or below the paths in `frozen`."""
    rest = {}
    for name, node in tree.items():
        if above + name in frozen:
            continue
        if isinstance(node, dict):
            node = _without(frozen, node, f"{above}{name}/")
            if not node:
                continue
        rest[name] = node
    return rest


def _merged(tree: Any, part: Any) -> Any:
    """`tree`, with the leaves that `part` has too taken from `part`."""
    return tree | {
        name: _merged(tree[name], node) if isinstance(node, dict) else node
        for name, node in part.items()
    }


def decays(params: Any) -> Any:
    """True at the leaves that weight decay shrinks: those with 2 or more axes.

    Biases and norm scales have 1 axis and do not decay. Class and mask tokens have 3
    and decay, as in MAE. The leading axis of a stacked leaf is not counted.
    """

    def rule(path, leaf):
        stacked = any(step.key == "blocks" for step in path)
        return len(leaf.shape) - stacked > 1

    return jax.tree_util.tree_map_with_path(rule, params)


def kernels(params: Any) -> Any:
    """True at the kernels of linear layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path_name(path).endswith("/kernel"), params
    )
