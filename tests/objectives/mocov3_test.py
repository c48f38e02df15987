# SPDX-License-Identifier: Apache-2.0
"""MoCo v3: its loss by hand, its beginning, and its order of updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch_for, first_state, leaves, place, plan_of, step_of

from mim_jax.models.heads import Head
from mim_jax.objectives.base import apply
from mim_jax.objectives.mocov3 import MoCoV3
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.ema import EMA
from mim_jax.train import example_keys

SHAPE = (8, 8, 1)
STILL = ColorJitter(saturation=0.0, hue=0.0, gray_p=0.0, p=0.0)


def tiny(**fields) -> MoCoV3:
    """Without augmentation, so that a test knows what the networks see."""
    plan = plan_of("mocov3")
    return dataclasses.replace(
        plan.settings.objective, **(dict(view1=STILL, view2=STILL) | fields)
    )


def contrast(query, key, temperature: float) -> float:
    """Mean cross-entropy of each query to its own key, in float64."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    query = query / np.linalg.norm(query, axis=1, keepdims=True)
    key = key / np.linalg.norm(key, axis=1, keepdims=True)
    logits = query @ key.T / temperature
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_loss_is_that_of_the_features(temperature):
    objective, plan = tiny(temperature=temperature), plan_of("mocov3")
    state, batch = place("mocov3", plan), batch_for("mocov3", plan)
    # Another teacher than the student, so that each must be in its place.
    teacher = jax.tree.map(lambda leaf: leaf * 1.5 + 0.1, state.teacher)
    state = dataclasses.replace(state, teacher=teacher)
    keys = example_keys(state, len(batch["image"]))

    def parts(params, state):
        def projected(params, images):
            images = images.astype(jnp.float32) / 255
            tokens, _ = objective.encode(params, images)
            return apply(objective.projector, params["projector"], tokens[:, 0])

        views = batch["image"], batch["image2"]
        online = [projected(params, view) for view in views]
        predictor, trained = objective.predictor, params["predictor"]
        queries = [apply(predictor, trained, x) for x in online]
        targets = [projected(state.teacher, view) for view in views]
        return objective.loss(params, state, batch, keys)[0], queries, targets

    fast = jax.jit(parts)
    loss, (q1, q2), (k1, k2) = fast(state.params, state)
    want = contrast(q1, k2, temperature) + contrast(q2, k1, temperature)
    np.testing.assert_allclose(loss, 2 * temperature * want, rtol=1e-5)
    # Not symmetric by accident: the views and the branches differ.
    assert abs(contrast(q1, k2, temperature) - contrast(q2, k1, temperature)) > 1e-4
    assert abs(contrast(q1, k1, temperature) - contrast(q1, k2, temperature)) > 1e-4


def test_each_view_has_its_own_augmentation_and_random_numbers():
    """Else colour would be a shortcut from one view to the other."""
    seen = []

    class Spy(ColorJitter):
        def __call__(self, images, keys):
            drawn = np.asarray(jax.random.key_data(keys))
            seen.append((self.solarize_p, np.asarray(images), drawn))
            return images

    grey = dict(saturation=0.0, hue=0.0, gray_p=0.0)
    objective = tiny(view1=Spy(**grey), view2=Spy(**grey, solarize_p=0.2))
    plan = plan_of("mocov3")
    state, batch = place("mocov3", plan), batch_for("mocov3", plan)
    objective.loss(state.params, state, batch, example_keys(state, len(batch["image"])))
    (first, image, keys), (second, image2, keys2) = seen
    assert (first, second) == (0, 0.2) and (keys != keys2).any(axis=-1).all()
    np.testing.assert_allclose(image, batch["image"] / 255, atol=1e-6)
    np.testing.assert_allclose(image2, batch["image2"] / 255, atol=1e-6)


# The beginning.


def test_attention_starts_as_three_square_matrices():
    params = first_state("mocov3").params
    width = 16
    bound = (6 / (2 * width)) ** 0.5
    for block in ("block00", "block01"):
        kernel = params["encoder"][block]["attn"]["qkv"]["kernel"]
        for part in np.split(kernel, 3, axis=1):
            assert 0.9 * bound < np.abs(part).max() <= bound
        out = params["encoder"][block]["attn"]["out"]["kernel"]
        assert 0.9 * bound < np.abs(out).max() <= bound


def test_tokens_and_patches_start_as_in_the_released_code():
    encoder = first_state("mocov3").params["encoder"]
    assert 3e-7 < np.std(encoder["cls_token"]) < 3e-6
    assert (encoder["embed"]["bias"] == 0).all()
    bound = (6 / (4 + 16)) ** 0.5  # 4 pixels to 16 numbers
    assert 0.8 * bound < np.abs(encoder["embed"]["kernel"]).max() <= bound


def test_heads_have_the_layers_of_the_paper():
    # No bias anywhere, batch norm between layers, and none with a scale at the end.
    params = first_state("mocov3").params
    norm = ["bias", "scale"]
    one = {name: sorted(leaf) for name, leaf in params["predictor"].items()}
    assert one == {"fc1": ["kernel"], "norm1": norm, "fc2": ["kernel"]}
    three = {name: sorted(leaf) for name, leaf in params["projector"].items()}
    assert three == one | {"norm2": norm, "fc3": ["kernel"]}
    defaults = MoCoV3()
    assert defaults.projector == Head(
        layers=3, hidden=4096, out=256, activation="relu", last_norm=True
    )
    assert defaults.predictor == dataclasses.replace(defaults.projector, layers=2)
    assert defaults.frozen == ("encoder/embed",) and defaults.batch_coupled
    assert defaults.ema == EMA(base=0.99, schedule="cosine")


def test_the_teacher_has_no_predictor():
    teacher = first_state("mocov3").teacher
    assert sorted(teacher) == ["encoder", "projector"]


# The order of updates.


def test_the_teacher_of_a_step_is_moco_s_own():
    # Theirs: in step t the average takes in the parameters, with m(t), and gives the
    # keys; then the optimiser moves. Ours is made at the end of the step before.
    total, rng = 6, np.random.default_rng(0)
    objective = tiny(total_steps=total)
    student = [rng.normal(size=(3, 2)) for _ in range(total)]

    def tree(x):
        leaf = jnp.asarray(x, jnp.float32)
        return {"encoder": {"w": leaf}, "projector": {"w": -leaf}, "predictor": {}}

    ours = objective.teacher(None, tree(student[0]), jnp.int32(0))
    theirs = student[0]
    for t in range(total):
        m = 1 - 0.5 * (1 + np.cos(np.pi * t / total)) * (1 - 0.99)
        theirs = m * theirs + (1 - m) * student[t]
        np.testing.assert_allclose(ours["encoder"]["w"], theirs, rtol=1e-6)
        np.testing.assert_allclose(ours["projector"]["w"], -theirs, rtol=1e-6)
        if t + 1 < total:  # the optimiser has moved
            ours = objective.teacher(ours, tree(student[t + 1]), jnp.int32(t))


def test_the_training_step_keeps_that_order():
    plan = plan_of("mocov3")
    objective, batch = plan.settings.objective, batch_for("mocov3", plan)
    assert objective.total_steps == plan.total
    state = place("mocov3", plan)
    for step in range(3):
        before = jax.device_get(state.teacher)
        state, _ = step_of(plan)(state, batch)
        want = leaves(objective.teacher(before, state.params, jnp.int32(step)))
        for path, leaf in leaves(state.teacher).items():
            np.testing.assert_allclose(leaf, want[path], rtol=1e-6, atol=1e-9)
        old, new = before["projector"], jax.device_get(state.teacher)["projector"]
        assert (old["fc1"]["kernel"] != new["fc1"]["kernel"]).all()


# Errors.


@pytest.mark.parametrize("temperature", [0.0, -0.2, float("nan")])
def test_a_temperature_that_cannot_be(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}: want 0.0001 <= "):
        MoCoV3(temperature=temperature)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(predictor=Head(hidden=8, out=8)),
            "predictor.out=8, projector.out=16: want the same",
        ),
        (dict(projector=Head(layers=0)), "projector.layers=0"),
        (dict(predictor=Head(hidden=0)), "predictor.hidden=0"),
        (dict(view1=ColorJitter()), "for grey images: want 0 for all three"),
        (dict(view2=ColorJitter()), "for grey images: want 0 for all three"),
        (dict(mean=(0.5, 0.5, 0.5)), "for images of 1 channel"),
    ],
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields).check_shape(SHAPE)
    tiny().check_shape(SHAPE)
