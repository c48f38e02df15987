# SPDX-License-Identifier: Apache-2.0
"""DINO: its loss pair by pair, its centre, its temperatures and its prototypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch_for, leaves, place, plan_of, tree_of

from mim_jax import config
from mim_jax.models.heads import Prototypes
from mim_jax.objectives.base import apply
from mim_jax.objectives.dino import DINO
from mim_jax.ops.augment import ColorJitter
from mim_jax.optim import Optimiser
from mim_jax.plan import Plan
from mim_jax.train import example_keys

SHAPE = (8, 8, 1)
STILL = ColorJitter(saturation=0.0, hue=0.0, gray_p=0.0, p=0.0)


def tiny(**fields) -> DINO:
    """Without augmentation, so that a test knows what the networks see."""
    still = dict(view1=STILL, view2=STILL, local=STILL)
    plain = dict(centre_momentum=0.9, teacher_temperature=(0.04, 0.07), total_steps=100)
    objective = plan_of("dino").settings.objective
    return dataclasses.replace(objective, **(still | plain | fields))


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def by_pairs(student, teacher, centre, student_temperature, teacher_temperature):
    """Algorithm 1 of arXiv:2104.14294 with several crops, in float64."""
    student, teacher, centre = (
        np.asarray(x, np.float64) for x in (student, teacher, centre)
    )
    pairs = []
    for g, taught in enumerate(teacher):
        wanted = softmax((taught - centre) / teacher_temperature)
        for v, view in enumerate(student):
            if v == g:  # a view is not taught by itself
                continue
            found = np.log(softmax(view / student_temperature))
            pairs.append(-(wanted * found).sum(axis=-1).mean())
    return np.mean(pairs)


def outputs(views: int, seed: int):
    return np.random.default_rng(seed).normal(size=(views, 3, 5)).astype(np.float32)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_the_loss_is_the_mean_over_pairs(views):
    student, teacher = outputs(views, 0), outputs(2, 1)
    centre = np.linspace(-1, 1, 5, dtype=np.float32)
    objective = tiny(student_temperature=0.3, teacher_temperature=(0.5, 0.7))
    got = objective.distillation(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(centre), 0
    )
    want = by_pairs(student, teacher, centre, 0.3, 0.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    later = objective.distillation(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(centre), 99
    )
    want = by_pairs(student, teacher, centre, 0.3, 0.7)
    np.testing.assert_allclose(later, want, rtol=1e-5)


def test_the_centre_takes_out_what_all_outputs_share():
    student, teacher = jnp.asarray(outputs(4, 0)), jnp.asarray(outputs(2, 1))
    centre, shift = jnp.linspace(-1, 1, 5), jnp.asarray([5.0, -3.0, 0.5, 0.0, 1.0])
    objective, shifted = tiny(), teacher + shift[None, None]
    want = objective.distillation(student, teacher, centre, 0)
    got = objective.distillation(student, shifted, centre + shift, 0)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    not_yet = objective.distillation(student, shifted, centre, 0)
    assert abs(float(not_yet - want)) > 0.1


# The teacher's temperature.


def test_the_temperature_rises_on_a_line_and_stays():
    objective = tiny(
        total_steps=200, teacher_warmup=0.25, teacher_temperature=(0.04, 0.08)
    )
    for step, want in ((0, 0.04), (10, 0.048), (25, 0.06), (50, 0.08), (199, 0.08)):
        np.testing.assert_allclose(objective.temperature_at(step), want, rtol=1e-6)
        traced = objective.temperature_at(jnp.int32(step))
        np.testing.assert_allclose(traced, want, rtol=1e-6)


def test_without_a_warm_up_there_is_only_the_last_temperature():
    objective = tiny(teacher_warmup=0.0, teacher_temperature=(0.04, 0.08))
    for step in (0, 1, 99):
        np.testing.assert_allclose(objective.temperature_at(step), 0.08, rtol=1e-6)


# The networks.


@functools.cache
def first():
    """(objective, state, batch); prototypes are frozen for 10 of 100 steps."""
    plan = plan_of("dino")
    state = place("dino", plan)
    teacher = jax.tree.map(lambda leaf: leaf * 1.1 + 0.01, state.teacher)
    stats = {"centre": jnp.linspace(-0.2, 0.3, 16)}
    state = dataclasses.replace(state, teacher=teacher, stats=stats)
    return tiny(freeze_prototypes=0.1), state, batch_for("dino", plan)


@functools.cache
def _graded():
    objective, state, batch = first()
    keys = example_keys(state, len(batch["image"]))

    def loss(params, state):
        return objective.loss(params, state, batch, keys)

    fast = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return fast.lower(state.params, state).compile()


def graded(params=None, step: int = 0):
    """(loss, statistics, gradients) at a step, of the first parameters or others."""
    _, state, _ = first()
    state = dataclasses.replace(state, step=jnp.int32(step))
    params = state.params if params is None else params
    (loss, aux), grads = _graded()(params, state)
    return float(loss), aux.stats, grads


@functools.cache
def features():
    """(student views, teacher views) that the networks make of the batch."""
    objective, state, batch = first()

    @functools.partial(jax.jit)
    def output(params, images):
        tokens, _ = objective.encode(params, images.astype(jnp.float32) / 255)
        return apply(objective.head, params["head"], tokens[:, 0])

    whole = [batch["image"], batch["image2"]]
    local = [batch["local"][:, i] for i in range(2)]
    student = [output(state.params, view) for view in (*whole, *local)]
    return np.stack(student), np.stack([output(state.teacher, view) for view in whole])


def test_global_and_local_crops_are_in_their_places():
    _, state, _ = first()
    student, teacher = features()
    want = by_pairs(student, teacher, state.stats["centre"], 0.1, 0.04)
    np.testing.assert_allclose(graded()[0], want, rtol=1e-5)
    # Each crop is another one.
    swapped = by_pairs(student[::-1], teacher, state.stats["centre"], 0.1, 0.04)
    assert abs(swapped - want) > 1e-4


def test_each_crop_has_its_own_augmentation_and_random_numbers():
    seen = []

    class Spy(ColorJitter):
        def __call__(self, images, keys):
            seen.append(
                (self.p, images.shape[:2], np.asarray(jax.random.key_data(keys)))
            )
            return images

    views = {
        name: Spy(saturation=0.0, hue=0.0, gray_p=0.0, p=p)
        for name, p in (("view1", 0.1), ("view2", 0.2), ("local", 0.3))
    }
    _, state, batch = first()
    keys = example_keys(state, len(batch["image"]))
    tiny(**views).loss(state.params, state, batch, keys)
    assert [p for p, _, _ in seen] == [0.1, 0.2, 0.3]
    drawn = np.concatenate([one for _, _, one in seen])
    assert len(drawn) == 4 * len(batch["image"])  # two whole crops and two local ones
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_the_centre_follows_the_mean_of_the_teacher():
    _, state, _ = first()
    _, teacher = features()
    want = 0.9 * state.stats["centre"] + 0.1 * teacher.mean(axis=(0, 1))
    np.testing.assert_allclose(graded()[1]["centre"], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step, frozen", [(0, True), (9, True), (10, False)])
def test_prototypes_are_frozen_for_the_first_share_of_the_run(step, frozen):
    _, _, grads = graded(step=step)
    assert bool((grads["head"]["prototypes"] == 0).all()) == frozen
    others = leaves(grads)
    others.pop("head/prototypes")
    assert all(np.abs(leaf).max() > 0 for leaf in others.values())


@pytest.mark.parametrize(
    "share, total, first", [(0.0075, 400, 3), (0.07, 100, 7), (0.07, 101, 8)]
)
def test_the_optimiser_begins_where_the_gradient_does(share, total, first):
    objective = tiny(freeze_prototypes=share, total_steps=total)
    assert objective.late == {"head/prototypes": first}
    assert tiny(freeze_prototypes=0.0, total_steps=total).late == {}


def test_a_run_of_dino_spares_its_prototypes_while_they_are_frozen():
    plan = plan_of("dino", objective__freeze_prototypes=0.05, optim__weight_decay=0.5)
    assert plan.objective.late == {"head/prototypes": 2}  # of 40 steps
    params = place("dino", plan).params
    opt_state, update = plan.tx.init(params), jax.jit(plan.tx.update)
    moved = []
    for _ in range(3):
        still = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = update(still, opt_state, params)
        moved.append({path: leaf.any() for path, leaf in leaves(updates).items()})
    # Without a gradient, decay alone moves a parameter.
    assert [step["head/prototypes"] for step in moved] == [False, False, True]
    assert all(step["head/mlp/fc1/kernel"] for step in moved)


def test_an_optimiser_that_lets_frozen_prototypes_decay_is_refused():
    tree = tree_of("dino", objective__freeze_prototypes=0.05)
    tree.optim = config.choose(Optimiser, "lars", weight_decay=0.1)
    with pytest.raises(config.ConfigError, match="would let head/prototypes decay"):
        Plan.of(tree, jax.devices()[:1])
    tree.optim.weight_decay = 0.0
    assert Plan.of(tree, jax.devices()[:1]).total == 40


def test_freezing_changes_no_value():
    # At the same temperature.
    loss, *_ = graded(step=0)
    student, teacher = features()
    objective, state, _ = first()
    for step in (9, 10, 50):
        temperature = float(objective.temperature_at(step))
        want = by_pairs(student, teacher, state.stats["centre"], 0.1, temperature)
        np.testing.assert_allclose(graded(step=step)[0], want, rtol=1e-5)
    assert loss != graded(step=50)[0]


def test_the_length_of_prototypes_does_not_matter():
    _, state, _ = first()
    lengths = jnp.linspace(0.2, 5.0, 16)[None]
    head = state.params["head"]
    longer = head | {"prototypes": head["prototypes"] * lengths}
    loss, _, grads = graded(state.params | {"head": longer}, step=50)
    np.testing.assert_allclose(loss, graded(step=50)[0], rtol=1e-5)
    # So no gradient goes along a prototype.
    kernel, grad = (np.asarray(x["prototypes"]) for x in (longer, grads["head"]))
    along = (kernel * grad).sum(axis=0)
    size = np.linalg.norm(kernel, axis=0) * np.linalg.norm(grad, axis=0)
    assert (np.abs(along) < 1e-4 * size).all()


def test_similarities_are_cosines():
    _, state, _ = first()
    student, teacher = features()
    assert np.abs(student).max() <= 1 + 1e-6 and np.abs(teacher).max() <= 1 + 1e-6
    head, x = Prototypes(hidden=8, bottleneck=4, out=6), jnp.ones((3, 5))
    params = head.init(jax.random.key(0), x)["params"]
    kernel = np.asarray(params["prototypes"], np.float64)
    got = np.asarray(head.apply({"params": params}, x))
    # Rank of a product of unit vectors: each row is unit @ (unit columns).
    unit = kernel / np.linalg.norm(kernel, axis=0)
    inside, *_ = np.linalg.lstsq(unit.T, got[0], rcond=None)
    np.testing.assert_allclose(np.linalg.norm(inside), 1, rtol=1e-4)
    np.testing.assert_allclose(inside @ unit, got[0], atol=1e-5)


# Errors.


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(student_temperature=0.0), "student_temperature=0.0: want 0.0001 <= "),
        (
            dict(teacher_temperature=(0.04, 0.0)),
            "want 0.0001 <= each",
        ),
        (dict(teacher_warmup=1.5), "teacher_warmup=1.5: want 0 <= teacher_warmup <= 1"),
        (dict(centre_momentum=-0.1), "centre_momentum=-0.1: want 0 <= centre_moment"),
        (dict(freeze_prototypes=2.0), "freeze_prototypes=2.0: want 0 <= freeze_protot"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        DINO(**fields)


@pytest.mark.parametrize("view", ["view1", "view2", "local"])
def test_colours_of_grey_images_are_refused(view):
    with pytest.raises(ValueError, match="for grey images: want 0 for all three"):
        tiny(**{view: ColorJitter()}).check_shape(SHAPE)
    tiny().check_shape(SHAPE)


@pytest.mark.parametrize("field", ["layers", "hidden", "bottleneck", "out"])
def test_a_head_without_size_is_refused(field):
    head = dataclasses.replace(tiny().head, **{field: 0})
    with pytest.raises(ValueError, match=f"head.{field}=0: want 1 <= {field} <= "):
        tiny(head=head).check_shape(SHAPE)


def test_local_crops_must_be_whole_patches():
    with pytest.raises(ValueError, match="patch"):
        tiny().check_shape((5, 5, 1))
