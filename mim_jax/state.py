# SPDX-License-Identifier: Apache-2.0
"""What training carries from step to step, and the two layouts of its blocks."""

import dataclasses
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

_INIT = 2**32 - 1  # folded into the key for parameters; steps fold in their number
_BLOCK = re.compile(r"block(\d\d+)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a run needs to go on.

    The same tree also holds shapes or shardings in the place of arrays.

    Attributes:
        step: optimiser steps done, int32.
        params: trained parameters.
        teacher: a second tree like (part of) params, or None.
        stats: running statistics, {} without BatchNorm.
        opt_state: the optimiser's.
        key: base key of the run; never advanced, steps fold their number into it.
        memory: what the trainer keeps for a masking, or None.
    """

    step: Any
    params: Any
    teacher: Any
    stats: Any
    opt_state: Any
    key: Any
    memory: Any = None


def create(
    objective, tx, *, seed: int, image_shape: tuple[int, int, int], scan: bool
) -> TrainState:
    """The state before step 0; jit it with out_shardings, so that it is born sharded.

    Args:
        objective: gives parameters per block, whatever `scan` says.
        tx: optax transformation.
        seed: of the run; the only source of its randomness besides the data's.
        image_shape: rows, columns, channels.
        scan: keep the blocks stacked, so that networks run them as one loop.
    """
    step = jnp.zeros((), jnp.int32)
    params, stats = initial(objective, seed=seed, image_shape=image_shape)
    params, stats = layout(params, scan), layout(stats, scan)
    return TrainState(
        step=step,
        params=params,
        teacher=objective.teacher(None, params, step),
        stats=stats,
        opt_state=tx.init(params),
        key=run_key(seed),
        memory=objective.first_memory(image_shape),
    )


def initial(objective, *, seed: int, image_shape: tuple[int, int, int]) -> tuple:
    """(parameters per block, statistics) that a run with that seed starts from."""
    batch = {"image": jnp.zeros((1, *image_shape), jnp.uint8)}
    return objective.init(jax.random.fold_in(run_key(seed), _INIT), batch)


def layout(tree: Any, scan: bool) -> Any:
    """A tree given per block, stacked if networks are to run their blocks as a loop."""
    return stack_blocks(tree) if scan else tree


def run_key(seed: int) -> Key[Array, ""]:
    """The base key of a run."""
    # Named: the default generator may differ by platform and by number of devices.
    return jax.random.key(seed, impl="threefry2x32")


def stack_blocks(tree: Any) -> Any:
    """`block00`, `block01`, ... of every dict as one `blocks` with a leading axis.

    Works on any pytree that holds such dicts, optimiser states included.
    """
    return _on_dicts(tree, _stack)


def unstack_blocks(tree: Any) -> Any:
    """Inverse of `stack_blocks`: the layout of checkpoints and of evaluation."""
    return _on_dicts(tree, _unstack)


def _on_dicts(tree, change):
    """`change` applied to every outermost dict of a pytree."""

    def visit(node):
        return change(node) if isinstance(node, dict) else node

    return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _stack(tree):
    if not isinstance(tree, dict):
        return tree
    blocks = sorted(name for name in tree if _BLOCK.fullmatch(name))
    rest = {name: _stack(tree[name]) for name in tree if name not in blocks}
    if blocks:
        rest["blocks"] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(tree[name] for name in blocks)
        )
    return rest


def _unstack(tree):
    if not isinstance(tree, dict):
        return tree
    rest = {name: _unstack(tree[name]) for name in tree if name != "blocks"}
    if "blocks" in tree:
        depth = jax.tree.leaves(tree["blocks"])[0].shape[0]
        for i in range(depth):
            block = jax.tree.map(operator.itemgetter(i), tree["blocks"])
            rest[f"block{i:02d}"] = block
    return rest
