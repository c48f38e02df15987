# SPDX-License-Identifier: Apache-2.0
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import SIZES
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid

GRID = Grid(rows=2, cols=4, patch=2)
OUTPUTS = 6
DECODER = Decoder(width=16, depth=1, heads=2)
KEEP = np.array([[5, 0, 3], [1, 2, 7]])
DROP = np.array([[1, 7, 2, 4, 6], [0, 3, 4, 5, 6]])


def draw(seed=0):
    """(parameters of which none is neutral, encoder's tokens), in numpy float64."""
    random = np.random.RandomState(seed)
    tokens = random.standard_normal((2, 1 + KEEP.shape[1], 10))
    mask = Mask(jnp.asarray(KEEP, jnp.int32), jnp.asarray(DROP, jnp.int32))
    init = functools.partial(DECODER.init, mask=mask, grid=GRID, outputs=OUTPUTS)
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros(tokens.shape))

    def leaf(like):
        return random.standard_normal(like.shape) / math.sqrt(like.shape[0])

    return jax.tree.map(leaf, like["params"]), tokens


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(decoder, params, tokens, mask, predict):
    return decoder.apply({"params": params}, tokens, mask, GRID, OUTPUTS, predict)


def decode(params, tokens, keep=KEEP, drop=DROP, predict="hidden"):
    with jax.enable_x64(True):
        mask = Mask(jnp.asarray(keep, jnp.int32), jnp.asarray(drop, jnp.int32))
        params = jax.tree.map(jnp.asarray, params)
        decoder = DECODER.clone(dtype="float64")
        return np.asarray(apply(decoder, params, jnp.asarray(tokens), mask, predict))


def moved(actual, expected):
    """Largest change of each token."""
    return np.abs(actual - expected).max(axis=-1)


def test_hidden_predictions_are_those_of_all():
    params, tokens = draw()
    hidden = decode(params, tokens)
    everything = decode(params, tokens, predict="all")
    assert hidden.shape == (2, 5, OUTPUTS)
    assert everything.shape == (2, 8, OUTPUTS)
    np.testing.assert_allclose(everything[:, 3:], hidden, rtol=0, atol=1e-12)


def test_visible_predictions_are_those_of_all():
    params, tokens = draw()
    visible = decode(params, tokens, predict="visible")
    everything = decode(params, tokens, predict="all")
    assert visible.shape == (2, 3, OUTPUTS)
    np.testing.assert_allclose(everything[:, :3], visible, rtol=0, atol=1e-12)


def test_where_nothing_is_hidden_all_patches_are_visible():
    params, _ = draw()
    random = np.random.RandomState(3)
    tokens = random.standard_normal((2, 1 + GRID.size, 10))
    keep = np.argsort(random.uniform(size=(2, GRID.size)), axis=1)
    visible = decode(params, tokens, keep, keep[:, :0], predict="visible")
    assert visible.shape == (2, GRID.size, OUTPUTS)
    hidden = decode(params, tokens, keep, keep[:, :0])
    assert hidden.shape == (2, 0, OUTPUTS)
    # In the order of `keep`: a change of one token moves its own prediction most.
    tokens[:, 1 + 5] *= -1
    change = decode(params, tokens, keep, keep[:, :0], predict="visible") - visible
    assert (np.abs(change).sum(axis=-1).argmax(axis=1) == 5).all()


def test_order_within_visible_and_hidden_does_not_matter():
    params, tokens = draw()
    expected = decode(params, tokens, predict="all")
    first, second = np.array([2, 0, 1]), np.array([4, 2, 0, 1, 3])
    tokens = np.concatenate([tokens[:, :1], tokens[:, 1:][:, first]], axis=1)
    actual = decode(params, tokens, KEEP[:, first], DROP[:, second], predict="all")
    order = np.concatenate([first, 3 + second])
    np.testing.assert_allclose(actual, expected[:, order], rtol=0, atol=1e-12)


def test_visible_tokens_are_told_their_position():
    params, tokens = draw()
    # The same tokens at each other's places: predictions elsewhere change.
    swapped = KEEP[:, [1, 0, 2]]
    assert (moved(decode(params, tokens, swapped), decode(params, tokens)) > 1e-4).all()


def test_hidden_patches_differ_by_their_position_alone():
    params, tokens = draw()
    expected = decode(params, tokens)
    spread = moved(expected[:, :-1], expected[:, 1:])
    assert (spread > 1e-3).all()
    swapped = decode(params, tokens, drop=DROP[:, ::-1])
    np.testing.assert_allclose(swapped, expected[:, ::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_every_token_is_seen_by_every_prediction(place):
    params, tokens = draw()
    expected = decode(params, tokens, predict="all")
    tokens[0, place] += 1  # place 0 is the class token
    change = moved(decode(params, tokens, predict="all"), expected)
    assert (change[0] > 1e-4).all()
    assert (change[1] == 0).all()  # and by no other image's


def test_learned_positions_start_as_the_fixed_ones_and_are_added_to_every_token():
    tokens = jnp.asarray(draw()[1], jnp.float32)
    mask = Mask(jnp.asarray(KEEP, jnp.int32), jnp.asarray(DROP, jnp.int32))
    learned = DECODER.clone(positions="learned")
    made = learned.init(jax.random.key(0), tokens, mask, GRID, OUTPUTS)
    params: Any = dict(made["params"])
    table = params.pop("pos_embed")
    assert table.shape == (1 + GRID.size, 16) and not table[0].any()
    fixed = apply(DECODER, params, tokens, mask, "hidden")

    def with_table(table):
        more = params | {"pos_embed": table}
        return apply(learned, more, tokens, mask, "hidden")

    np.testing.assert_array_equal(with_table(table), fixed)
    for place in (0, 1 + KEEP[0, 0], 1 + DROP[0, 0]):
        moved = with_table(table.at[place, 0].add(1)) - fixed
        assert np.abs(moved[0]).max() > 1e-4, place


def test_initial_parameters():
    decoder = Decoder(width=512, depth=1, heads=16)
    mask = Mask(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 7), jnp.int32))
    init = functools.partial(decoder.init, mask=mask, grid=GRID, outputs=12)
    params = jax.device_get(jax.jit(init)(jax.random.key(0), jnp.zeros((1, 2, 64))))
    params = params["params"]
    assert set(params) == {"embed", "mask_token", "block00", "norm", "predict"}
    assert np.isclose(params["mask_token"].std(), 0.02, rtol=0.15)
    assert params["mask_token"].shape == (1, 1, 512)
    for name, bound in [("embed", 6 / (64 + 512)), ("predict", 6 / (512 + 12))]:
        # Unlike the encoder's embedding this one is a dense layer in the reference.
        assert (params[name]["bias"] == 0).all()
        largest = np.abs(params[name]["kernel"]).max()
        assert 0.95 * math.sqrt(bound) < largest <= math.sqrt(bound)
    assert (params["norm"]["scale"] == 1).all() and (params["norm"]["bias"] == 0).all()


# GFLOP of 8 blocks of 512 over all tokens, by hand from 24 n d^2 + 4 n^2 d.
@pytest.mark.parametrize("name, expected", [("B", "10.55"), ("H", "14.02")])
def test_flops(name, expected):
    patch, width = SIZES[name].get("patch", 16), SIZES[name]["width"]
    grid = Grid(224 // patch, 224 // patch, patch)
    visible, outputs = grid.size // 4, patch * patch * 3
    flops = Decoder().flops(visible, grid, width, outputs)
    # Hidden patches alone are predicted: the reference predicts the visible ones too.
    ends = 2 * (visible + 1) * width * 512 + 2 * (grid.size - visible) * 512 * outputs
    assert f"{(flops - ends) / 1e9:.2f}" == expected


def test_sizes_that_do_not_fit_are_refused():
    DECODER.check_sizes()
    with pytest.raises(ValueError, match="decoder.width=16, decoder.heads=3"):
        DECODER.clone(heads=3).check_sizes()
