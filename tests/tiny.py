# SPDX-License-Identifier: Apache-2.0
"""Every objective at its smallest, on 8 x 8 digits; what is compiled is kept."""

import dataclasses
import functools
import types
from typing import Any

import jax
import numpy as np
import optax

from mim_jax import config, sharding, train
from mim_jax import state as states
from mim_jax.data.pipeline import train_batches
from mim_jax.evals.base import Eval
from mim_jax.plan import Plan
from mim_jax.sharding import path_name

ROWS = 16
STEPS = 40
SPREAD = dict(mesh__data=4, mesh__fsdp=2, scan=True, remat="full")
_ENCODER = dict(patch=2, width=16, depth=2, heads=2)
_DECODER = dict(width=16, depth=1, heads=2)
_HEAD = dict(hidden=32, out=16)
_GREY = dict(saturation=0.0, hue=0.0, gray_p=0.0, blur_sigma=(0.1, 0.5))
_NORM = "the batch norm of the head takes out what all examples share"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """An objective's row of the contract.

    Attributes:
        objective: leaves of its config, groups as dicts; encoder and data's mean and
            deviation are the same for all.
        data: leaves of config.data.
        plugins: source and examples by name, in place of digits and their crops.
        optimiser: by its name.
        base_lr: with which the loss falls in STEPS steps.
        falls: to less than this share of what it was.
        rounding: how far gradients in bfloat16 may be from those in float32, as a
            share of their length.
        still: leaves that get no gradient though they are not frozen, and why.
        draws: whether the loss is a function of the keys.
    """

    objective: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    plugins: dict[str, str] = dataclasses.field(default_factory=dict)
    optimiser: str = "adamw"
    base_lr: float = 0.1
    falls: float = 0.88
    rounding: float = 0.15
    still: dict[str, str] = dataclasses.field(default_factory=dict)
    draws: bool = True


TINY: dict[str, Tiny] = {
    "mae": Tiny(
        objective=dict(decoder=_DECODER, jitter=_GREY, color_jitter="input_only"),
        falls=0.6,
    ),
    "rmae": Tiny(objective=dict(decoder=_DECODER), falls=0.4),
    "cmae": Tiny(
        objective=dict(projector=_HEAD, predictor=_HEAD, jitter=_GREY),
        still={"encoder/norm/bias": _NORM, "projector/fc2/bias": _NORM},
    ),
    "mocov3": Tiny(
        objective=dict(projector=_HEAD, predictor=_HEAD, view1=_GREY, view2=_GREY),
        data=dict(crops=2),
        # The class token starts at almost nothing, and norms blow up its rounding.
        rounding=0.95,
        still={"encoder/norm/bias": _NORM},
    ),
    "dino": Tiny(
        objective=dict(
            # Else the prototypes have no gradient in the first step.
            freeze_prototypes=0.0,
            # While the centre moves, so does the target: any student's loss rises.
            centre_momentum=0.0,
            teacher_temperature=(0.01, 0.01),
            head=dict(hidden=32, bottleneck=16, out=16),
            view1=_GREY,
            view2=_GREY,
            local=_GREY,
        ),
        data=dict(crops=2, local_crops=2, local_size=(4, 4)),
        base_lr=0.03,
        falls=0.8,
    ),
    "beit": Tiny(
        objective=dict(masking=dict(least=2), color_jitter="whole", jitter=_GREY),
    ),
    "supervised": Tiny(
        objective=dict(
            classes=10,
            encoder=_ENCODER | dict(drop_path=0.1),
            color_jitter="whole",
            jitter=_GREY,
            erasing=dict(p=0.25),
            mix=dict(mixup=0.8, cutmix=1.0, group=2),
        ),
        base_lr=0.3,
        falls=0.95,
    ),
    "detection": Tiny(
        objective=dict(
            encoder=_ENCODER | dict(drop_path=0.1, positions="learned"),
            classes=14,
            pyramid=dict(width=8),
            proposer=dict(convs=1),
            box_head=dict(convs=1, hidden=16),
            mask_head=dict(convs=1),
            proposals=dict(samples=32, before=20, before_eval=20, after=20, side=4.0),
            regions=dict(samples=16),
            answers=dict(candidates=20, most=5),
        ),
        data=dict(
            source=dict(images=32, held_out_images=8, side=16, channels=1),
            image_size=(12, 12),
            examples=dict(most=4, mask_side=14, jitter=(0.8, 1.25)),
        ),
        plugins=dict(source="scenes", examples="instances"),
        base_lr=0.05,
        falls=0.7,
        rounding=0.95,  # which regions are sampled goes by the scores
    ),
    "probe": Tiny(
        objective=dict(classes=10),
        optimiser="lars",
        base_lr=50.0,
        falls=0.9,
        draws=False,
    ),
}


def tree_of(name: str, **changes) -> config.Tree:
    """The config of a tiny objective; `changes` has paths as `mesh__fsdp=2`."""
    row = TINY[name]
    plugins = dict(source="digits", objective=name, optimiser=row.optimiser)
    tree = config.experiment("train", **(plugins | row.plugins))
    tree.steps, tree.batch_size, tree.dtype, tree.remat = STEPS, ROWS, "float32", "none"
    tree.scan = False
    tree.data.update(dict(image_size=(8, 8), workers=0, threads=1) | row.data)
    fields = dict(encoder=_ENCODER, mean=(0.5,), std=(0.25,)) | row.objective
    tree.objective.update(fields)
    # The first step has the full rate and shrinks all that is not frozen.
    tree.optim.update(dict(warmup_epochs=0.0, base_lr=row.base_lr))
    if row.optimiser == "adamw":
        tree.optim.decay = "all"
    tree.compile_cache = False
    tree.report = config.choose(Eval, "knn", k=(5,), rows=1, neighbours=1)
    for path, value in changes.items():
        *above, leaf = path.split("__")
        node = functools.reduce(lambda node, part: node[part], above, tree)
        node[leaf] = value
    return tree


@functools.cache
def plan_of(name: str, devices: int = 1, **changes) -> Plan:
    return Plan.of(tree_of(name, **changes), jax.devices()[:devices])


def spread_plan(name: str) -> Plan:
    """Eight devices, in both axes of the mesh, with scanned and recomputed blocks."""
    return plan_of(name, 8, **SPREAD)


@functools.cache
def step_of(plan: Plan):
    """The plan's training step, compiled; it donates the state."""
    return train.lowered(plan).compile()


def share(patch, plan: Plan) -> None:
    """While `patch` holds, runs have the plan's step and first state, so that they
    compile neither again."""
    step = step_of(plan)
    lowered = types.SimpleNamespace(compile=lambda: step)
    patch.setattr(train, "lowered", lambda _: lowered)
    share_first_state(patch, plan)


def share_first_state(patch, plan: Plan) -> None:
    """As `share`, without the step."""
    first, initial = plan.first_state, plan.initial
    patch.setattr(Plan, "first_state", lambda _: first())
    patch.setattr(Plan, "initial", property(lambda _: initial))


@functools.cache
def first_state(name: str):
    """Per block and on the host, so that donating a copy of it spoils nothing."""
    state = spread_plan(name).first_state()
    return states.unstack_blocks(jax.device_get(state))


def place(name: str, plan: Plan, state=None):
    """The first state, or another from the host, laid out as the plan wants it."""
    # Keys never come to the host: a new one, since this state will be donated.
    key = states.run_key(plan.settings.seed)
    state = dataclasses.replace(state or first_state(name), key=key)
    if plan.settings.scan:
        state = jax.jit(states.stack_blocks)(state)
    placed = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract_state())
    return jax.tree.map(
        lambda leaf, where: jax.device_put(leaf, where, may_alias=False), state, placed
    )


@functools.cache
def images_of(name: str) -> dict[str, np.ndarray]:
    """What the objective reads of the first training batch."""
    settings = plan_of(name).settings
    with train_batches(settings.data, seed=0, batch_size=ROWS, stop=1) as batches:
        batch = next(batches)
    return {key: np.array(batch[key]) for key in settings.objective.reads}


def batch_for(name: str, plan: Plan) -> dict:
    return jax.device_put(images_of(name), sharding.by_row(plan.mesh))


def one_step(name: str, plan: Plan):
    """(state, metrics) on the host, blocks unstacked, after the first step."""
    state, metrics = step_of(plan)(place(name, plan), batch_for(name, plan))
    return states.unstack_blocks(jax.device_get(state)), jax.device_get(metrics)


def leaves(tree) -> dict[str, np.ndarray]:
    """Leaves by path, on the host; keys as their data."""

    def plain(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    found = jax.tree.leaves_with_path(tree)
    return {path_name(path): plain(leaf) for path, leaf in found}


def bits(tree) -> dict[str, bytes]:
    return {name: leaf.tobytes() for name, leaf in leaves(tree).items()}


def gradients(state) -> dict[str, np.ndarray]:
    """Of what is not frozen. After one step from zero Adam's first moment is 0.1 times
    the gradient, and LARS's momentum is the gradient at another length."""
    kinds = (optax.ScaleByAdamState, optax.TraceState)

    def of(part):
        return isinstance(part, kinds)

    (found,) = filter(of, jax.tree.leaves(state.opt_state, is_leaf=of))
    if isinstance(found, optax.TraceState):
        return leaves(found.trace)
    return {name: leaf * np.float32(10) for name, leaf in leaves(found.mu).items()}


def below(path: str, paths) -> bool:
    return any(path == one or path.startswith(one + "/") for one in paths)
