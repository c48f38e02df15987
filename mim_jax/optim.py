# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules.

Rules for single leaves (weight decay, layer-wise rates, trust ratios) go by path and
rank, and treat stacked blocks like single ones.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mim_jax.objectives.base import Aux
from mim_jax.ops.lars import trusted
from mim_jax.schema import check_ranges, within
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
        late: Mapping[str, int] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a learning rate per step.

        Args:
            schedule: learning rate at each step.
            total: steps of the run; a weight decay that changes needs it.
            frozen: paths of parameters that are never updated. The optimiser has no
                state for them.
            late: paths of parameters that are not updated before a step, with that step
                (`Objective.late`).
        Raises:
            ValueError: this optimiser cannot begin with some parameters late.
        """
        if late:
            steps = self.late_steps(schedule, total, late)
        else:
            steps = self.steps(schedule, total)
        return _freezing(frozen, steps) if frozen else steps

    @abc.abstractmethod
    def steps(
        self, schedule: Callable[[Any], Any], total: int
    ) -> optax.GradientTransformationExtraArgs:
        """The optax transformation of `build`, for parameters of which none is
        frozen."""

    def late_steps(
        self, schedule: Callable[[Any], Any], total: int, late: Mapping[str, int]
    ) -> optax.GradientTransformationExtraArgs:
        """`steps`, for an objective some of whose parameters begin to learn late.

        Until its step such a parameter is not updated and does not decay, and its
        moments begin there: as if the optimiser had first seen it then.

        Args:
            late: the steps, by paths; the gradient of each is zero before its step.
        Raises:
            ValueError: this optimiser cannot do that.
        """
        del schedule, total
        raise ValueError(
            f"the objective's parameters {', '.join(late)} begin to learn after some "
            f"steps, which the optimiser {type(self).__name__} cannot do; want "
            "optim=adamw"
        )

    def check_rates(self) -> None:
        """ValueError if a learning rate or the warm-up is not finite or out of range,
        for optimisers whose fields do not declare theirs."""
        if not 0 < self.base_lr < math.inf:
            raise ValueError(f"base_lr={self.base_lr}: want more than 0, and finite")
        for name in ("warmup_epochs", "final_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)}: want at least 0, and finite"
                )


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
        drops: shares of the run after which the learning rate falls to a tenth, in
            place of the cosine; () takes the cosine. Then `final_lr` does nothing.
    """

    base_lr: float = within(1.5e-4, above=0, most=1e38)
    warmup_epochs: float = within(20.0, least=0, most=1e6)
    b1: float = within(0.9, least=0, below=1)
    b2: float = within(0.95, least=0, below=1)
    eps: float = within(1e-8, least=1e-30, most=1)
    weight_decay: float = within(0.05, least=0, most=1e3)
    final_weight_decay: float | None = within(None, least=0, most=1e3)
    decay: Literal["matrices", "kernels", "all"] = "matrices"
    layer_decay: float | None = within(None, above=0, most=1)
    final_lr: float = within(0.0, least=0, most=1e38)
    clip: float | None = within(None, above=0, most=1e6)
    drops: tuple[float, ...] = within((), above=0, below=1)

    def __post_init__(self):
        check_ranges(self)

    def schedule(
        self, batch_size: int, epochs: float, total: int
    ) -> Callable[[Any], Any]:
        cosine = super().schedule(batch_size, epochs, total)
        if not self.drops:
            return cosine
        warmup = self.warmup_epochs / epochs * total
        peak = self.base_lr * batch_size / 256
        return warmup_drops(peak, warmup, [share * total for share in self.drops])

    def steps(
        self, schedule: Callable[[Any], Any], total: int
    ) -> optax.GradientTransformationExtraArgs:
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return self._chain(adam, optax.scale_by_learning_rate(schedule), total)

    def late_steps(
        self, schedule: Callable[[Any], Any], total: int, late: Mapping[str, int]
    ) -> optax.GradientTransformationExtraArgs:
        adam = _late_adam(self.b1, self.b2, self.eps, late)
        return self._chain(adam, _late_rate(schedule, late), total)

    def _chain(
        self,
        adam: optax.GradientTransformation,
        rate: optax.GradientTransformation,
        total: int,
    ) -> optax.GradientTransformationExtraArgs:
        decay: Any = self.weight_decay
        if self.final_weight_decay is not None:
            last = self.final_weight_decay
            decay = warmup_cosine(self.weight_decay, 0.0, float(total), last)
        masks = {"matrices": decays, "kernels": kernels, "all": None}
        steps = [adam, optax.add_decayed_weights(decay, mask=masks[self.decay]), rate]
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

    base_lr: float = within(0.1, above=0, most=1e38)
    warmup_epochs: float = within(10.0, least=0, most=1e6)
    momentum: float = within(0.9, least=0, below=1)
    trust: float = within(0.001, above=0, most=1e9)
    weight_decay: float = within(0.0, least=0, most=1e3)
    final_lr: float = within(0.0, least=0, most=1e38)

    def __post_init__(self):
        check_ranges(self)

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

    def late_steps(
        self, schedule: Callable[[Any], Any], total: int, late: Mapping[str, int]
    ) -> optax.GradientTransformationExtraArgs:
        if self.weight_decay > 0:
            raise ValueError(
                f"optim.weight_decay={self.weight_decay}: LARS would let "
                f"{', '.join(late)} decay, which begin to learn after some steps; want "
                "0, or optim=adamw"
            )
        # Without decay a gradient of zero moves nothing and leaves no momentum.
        return self.steps(schedule, total)


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


def norms(grad: Array, update: Array, params: Any, teacher: Any) -> dict[str, Array]:
    """What a step logs of the sizes of its trees: L2 norms over all their leaves.

    Frozen parameters count with the others.

    Args:
        grad: norm of the gradients, before the optimiser clips them.
        update: norm of what the step added to the parameters.
        params: parameters after the step.
        teacher: the teacher after the step, a tree like (part of) params, or None.
    Returns:
        Scalars: `grad_norm`, `param_norm`, `update_ratio` (of the update's norm to that
        of the parameters) and, with a teacher, `teacher_distance`.
    """
    length = optax.tree.norm(params)
    found = {"grad_norm": grad, "param_norm": length, "update_ratio": update / length}
    return found if teacher is None else found | _distance(params, teacher)


def _distance(params: Any, teacher: Any) -> dict[str, Array]:
    """Norm of the difference between the teacher and the parameters that it follows,
    divided by the norm of the teacher."""

    def gap(ours, theirs):
        if not isinstance(theirs, dict):
            return ours - theirs
        return {name: gap(ours[name], node) for name, node in theirs.items()}

    apart = optax.tree.norm(gap(params, teacher))
    return {"teacher_distance": apart / optax.tree.norm(teacher)}


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


def warmup_drops(
    peak: float, warmup: float, drops: Sequence[float]
) -> Callable[[Any], Any]:
    """Learning rate at each step: a line from 0 to `peak`, and a tenth of it, of that
    again, ... from each of the steps `drops` on.

    Args:
        peak, warmup: as for `warmup_cosine`.
        drops: steps; may be fractional.

    Example:
        >>> rate = warmup_drops(1.0, 2.0, [8.0])
        >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 7, 8)]
        [0.0, 0.5, 1.0, 1.0, 0.1]
    """

    def schedule(step):
        xp = jnp if isinstance(step, jax.Array) else np
        step = xp.asarray(step, xp.float32)
        rate = peak * xp.minimum(step / max(warmup, 1e-9), 1.0)
        for drop in drops:
            rate = xp.where(step < drop, rate, 0.1 * rate)
        return rate

    return schedule


def layer_scales(params: Any, decay: float) -> Any:
    """Factor of the learning rate of each leaf, decay ** (last layer - its layer).

    Embedding, positions, class and mask token are layer 0; block i of the encoder is
    layer i + 1; everything else is the last layer and has factor 1. A stacked leaf, and
    that of all blocks' relative positions, gets an array with one factor per block.
    """
    encoder = params.get("encoder", {})  # absent where it is frozen
    stacked = jax.tree.leaves(encoder.get("blocks", {}))
    single = [name for name in encoder if _BLOCK.fullmatch(name)]
    depth = len(stacked[0]) if stacked else len(single)

    def rule(path, leaf):
        top, name, *_ = path_name(path).split("/")
        if top != "encoder" or name == "norm":
            return 1.0
        if name in ("blocks", "relative_positions"):
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


def _late_adam(
    b1: float, b2: float, eps: float, late: Mapping[str, int]
) -> optax.GradientTransformation:
    """Adam that counts the steps of late parameters from their own first step.

    Its state is that of `optax.scale_by_adam`, whose moments of a late parameter are
    zero until then, since its gradient is.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates, state, params=None):
        found: tuple[Any, Any] = adam.update(updates, state, params)
        updates, state = found

        def rule(path, update, mean, square):
            first = late.get(path_name(path))
            if first is None:
                return update
            count = jnp.maximum(state.count - first, 1).astype(update.dtype)
            mean, square = mean / (1 - b1**count), square / (1 - b2**count)
            return mean / (jnp.sqrt(square) + eps)

        moments = (state.mu, state.nu)
        return jax.tree_util.tree_map_with_path(rule, updates, *moments), state

    return optax.GradientTransformation(adam.init, update)


def _late_rate(
    schedule: Callable[[Any], Any], late: Mapping[str, int]
) -> optax.GradientTransformation:
    """Updates scaled by the learning rate, which is 0 for a parameter that is late."""
    rate = optax.scale_by_learning_rate(schedule)

    def update(updates, state, params=None):
        def rule(path, update):
            first = late.get(path_name(path))
            if first is None:
                return update
            return jnp.where(state.count < first, jnp.zeros_like(update), update)

        updates = jax.tree_util.tree_map_with_path(rule, updates)
        return rate.update(updates, state, params)

    return optax.GradientTransformation(rate.init, update)


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
