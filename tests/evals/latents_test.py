# SPDX-License-Identifier: Apache-2.0
"""Probing latents: against scikit-learn, loops, and encoders whose tokens are known."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from mim_jax import config
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.evals import latents
from mim_jax.evals.base import Run, measured
from mim_jax.evals.latents import Latents
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import Objective
from mim_jax.objectives.mae import MAE
from mim_jax.ops.patches import Grid

SMALL = Latents(images=300, held_out=200, masks=40)


class Told(MAE):
    """An MAE whose tokens are what `params` says: a function of the images' patches."""

    def encode(self, params, images, keep=None, hidden=None, taps=(), keys=None):
        patches, _ = self.patches(images)
        tokens = params["project"] @ jnp.swapaxes(patches, 1, 2)
        tokens = jnp.swapaxes(tokens, 1, 2) + params["shift"]
        return jnp.concatenate([tokens[:, :1] * 0, tokens], axis=1), {}

    def reconstruct(self, params, batch, mask):
        return jnp.zeros(batch["image"].shape) + params["grey"]


def run(source, project, grey=0.5, initial=None):
    encoder = Encoder(patch=source.token, width=8, depth=1, heads=1)
    objective = Told(
        encoder=encoder, mean=(0.5,) * 3, std=(0.125,) * 3, normalise_target=False
    )
    params = {
        "project": jnp.asarray(project),
        "shift": jnp.zeros(()),
        "grey": jnp.asarray(grey),
    }
    blank = params | {"project": jnp.zeros_like(params["project"])}
    return Run(objective=objective, params=params, initial=blank, step=1, name="told")


def passes(source):
    side = source.token * 2**source.levels
    return EvalPasses(
        Input(
            source=source, image_size=(side, side), workers=0, eval_crop_fraction=1.0
        ),
        batch_size=50,
    )


@pytest.fixture(scope="module")
def source():
    return Hierarchy(levels=2, symbols=4, token=2, images=300, held_out_images=200)


def test_tokens_that_tell_the_symbols_tell_all_that_is_linear_in_them(source):
    source = dataclasses.replace(source, noise=0.0)
    project = np.linalg.pinv(source.textures).T.astype(np.float32)  # to indicators
    found = measured(SMALL, run(source, project), passes(source)).numbers
    assert found["accuracy_model_level_0"].value > 0.99
    assert found["r2_model_level_0"].value > 0.9
    assert found["r2_untrained_level_0"].value == pytest.approx(0, abs=0.02)
    # What four children tell of their parent, by their mean alone: with scikit-learn,
    # from the source's own latents.
    rows = []
    for part, count in ((source, 300), (source.held_out(), 200)):
        x, y = [], []
        for index in range(count):
            middle, tokens = part[index]["level_1"], part[index]["level_0"]
            four = np.eye(4)[tokens].reshape(2, 2, 2, 2, 4).mean((1, 3))
            x.append(four.reshape(4, 4))
            y.append(np.eye(4)[middle].reshape(4, 4))
        rows.append([np.concatenate(one) for one in (x, y)])
    (x, y), (x_test, y_test) = rows
    guess = Ridge(alpha=1e-6).fit(x, y).predict(x_test)
    want = r2_score(y_test, guess, multioutput="variance_weighted")
    assert found["r2_model_level_1"].value == pytest.approx(want, abs=0.03)
    right = (guess.argmax(1) == y_test.argmax(1)).mean()
    assert found["accuracy_model_level_1"].value == pytest.approx(right, abs=0.03)
    gains = {
        level: found[f"r2_model_level_{level}"].value
        - found[f"r2_untrained_level_{level}"].value
        for level in (1, 2)
    }
    assert found["level_centroid"].value == pytest.approx(
        (gains[1] + 2 * gains[2]) / (gains[1] + gains[2])
    )


def test_errors_are_those_of_the_loss(source):
    """A model that fills in the middle grey errs by the mean square of the pixels; the
    optimum is less and the floor, of a model that knows each place's mean, is, too."""
    found = measured(SMALL, run(source, np.ones((2, 12), np.float32)), passes(source))
    numbers = found.numbers
    images = np.stack([source.held_out()[i]["image"] for i in range(40)])
    values = (images / 255 - 0.5) / 0.125
    assert numbers["error_hidden"].value == pytest.approx((values**2).mean(), rel=0.1)
    error, optimum, floor = (
        numbers[f"error_{name}"].value for name in ("hidden", "optimum", "floor")
    )
    assert 0.3**2 < optimum < floor < error
    # Scattered masks of a quarter: a block of hidden and visible tokens is the rule.
    assert 1 <= numbers["level_of_c_invertible"].value < 1.2
    assert numbers["level_of_c_frontier"].value >= 1


def test_shifted_images_are_read_along_their_tree(source):
    """The same images, moved: nothing but the place of each latent differs."""
    project = np.linalg.pinv(source.textures).T.astype(np.float32)
    moved = dataclasses.replace(source, shift=True)
    at_rest, found = (
        measured(SMALL, run(one, project), passes(one)).numbers
        for one in (source, moved)
    )
    for level in (1, 2):
        key = f"r2_model_level_{level}"
        assert found[key].value == pytest.approx(at_rest[key].value, abs=0.05)
    assert "level_of_c_frontier" not in found  # its masks are not aligned


def test_a_vector_is_predicted_as_it_is():
    source = Hierarchy(
        kind="cascade",
        levels=1,
        token=2,
        dimension=2,
        noise=0.01,
        images=300,
        held_out_images=200,
    )
    found = measured(SMALL, run(source, np.eye(12, dtype=np.float32)), passes(source))
    numbers = found.numbers
    assert numbers["r2_model_level_0"].value > 0.95  # pixels are linear in it
    assert 0.2 < numbers["r2_model_level_1"].value < 0.95
    assert "accuracy_model_level_0" not in numbers and "error_floor" not in numbers
    assert numbers["r2_raw_level_0"].value > 0.95


@pytest.mark.parametrize("tree", [False, True])
def test_a_latent_gets_the_mean_of_its_tokens(tree):
    grid, places = Grid(4, 6, 1), (2, 3)
    tokens = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
    order = None
    if tree:
        order = np.random.default_rng(1).permuted(
            np.arange(48).reshape(2, 24) % 6, axis=1
        )
    found = latents._pooled(tokens, grid, places, order)
    for image, row, col in itertools.product(range(2), range(2), range(3)):
        if order is None:
            mine = [
                6 * r + c
                for r in range(4)
                for c in range(6)
                if (r // 2, c // 2) == (row, col)
            ]
        else:
            mine = np.flatnonzero(order[image] == 3 * row + col)
        want = tokens[image, mine].mean(axis=0)
        assert np.allclose(found[image, 3 * row + col], want, atol=1e-6)


def test_examples_without_latents_are_refused_with_what_there_is():
    batch = {
        "image": np.zeros((1, 4, 4, 3), np.uint8),
        "label": np.zeros(1, np.int32),
        "odd": np.zeros((1, 3, 3), np.int32),
        "index": np.zeros(1, np.int32),
        "valid": np.ones(1, bool),
    }
    objective: Objective = MAE(encoder=Encoder(patch=2, width=8, depth=1, heads=1))
    with pytest.raises(ValueError, match="fields=.*image, index, label.*hierarchy"):
        Latents().check_data(objective, Given([batch]))
    with pytest.raises(ValueError, match="'odd' has 3 x 3 places.*2 x 2 tokens"):
        Latents(fields=("odd",)).check_data(objective, Given([batch]))
    Latents(fields=("label",)).check_data(objective, Given([batch]))


def test_a_label_is_a_latent_of_the_whole_image():
    tree = config.read("configs/mae.py:digits")
    settings = config.build(tree)
    eye = np.eye(8, 4, dtype=np.float32)
    objective = Told(encoder=settings.objective.encoder, mean=(0.5,), std=(0.25,))
    params = {
        "project": jnp.asarray(eye),
        "shift": jnp.zeros(()),
        "grey": jnp.asarray(0.5),
    }
    digits = Run(objective=objective, params=params, initial=params, step=1, name="d")
    passes = EvalPasses(settings.data)
    found = Latents(fields=("label",), images=800).measure(digits, passes).numbers
    assert found["accuracy_raw_label"].value > 0.14  # ten classes, by mean patches
    assert "level_centroid" not in found and "error_hidden" not in found
