# SPDX-License-Identifier: Apache-2.0
"""The networks behind the encoder of a Mask R-CNN, and attention within windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from mim_jax.models.detection import BoxHead, Conv, MaskHead, Proposer, Pyramid, Up
from mim_jax.models.vit import Encoder, Windows
from mim_jax.ops.patches import Grid

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_a_convolution_is_scipys():
    x, net = drawn(1, 5, 7, 2), Conv(3, 3, "float32")
    params = net.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), params)
    kernel, bias = (np.asarray(params["params"][k]) for k in ("kernel", "bias"))
    found = net.apply(params, x)
    for out in range(3):
        want = sum(
            correlate2d(x[0, ..., i], kernel[..., i, out], "same") for i in range(2)
        )
        np.testing.assert_allclose(found[0, ..., out], want + bias[out], atol=1e-5)


def test_a_transposed_convolution_is_that_of_jax():
    x, net = drawn(2, 3, 4, 5), Up(6, "float32")
    params = net.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), params)
    kernel = params["params"]["kernel"]
    # JAX correlates with the kernel, which a transposed convolution stamps.
    want = jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID")
    want = want + params["params"]["bias"][None, None, None]
    np.testing.assert_allclose(net.apply(params, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fpn", "simple"])
def test_a_pyramid_has_four_scales(kind):
    x, net = drawn(2, 4, 6, 16), Pyramid(kind=kind, width=8)
    maps, params = jax.jit(net.init_with_output)(jax.random.key(0), x)
    assert [one.shape for one in maps] == [
        (2, 16, 24, 8),
        (2, 8, 12, 8),
        (2, 4, 6, 8),
        (2, 2, 3, 8),
    ]
    # The coarsest map pools: it reads the largest of each four patches. In a feature
    # pyramid network, and there alone, it reaches the finest map.
    other = x.at[0, 0, 0].add(-100.0)
    again = jax.jit(net.apply)(params, other)
    np.testing.assert_array_equal(again[3][0, -1, -1], maps[3][0, -1, -1])
    far = np.abs(np.asarray(again[0] - maps[0]))[0, 5:8, 5:8].max()
    assert (far > 1e-6) == (kind == "fpn")
    np.testing.assert_array_equal(again[0][1], maps[0][1])


def test_heads_have_an_output_for_each_class():
    regions = drawn(5, 7, 7, 8)
    (logits, offsets), _ = BoxHead(convs=1, hidden=16).init_with_output(
        jax.random.key(0), regions, 3
    )
    assert logits.shape == (5, 4) and offsets.shape == (5, 3, 4)
    masks, _ = MaskHead(convs=1).init_with_output(jax.random.key(0), regions, 3)
    assert masks.shape == (5, 14, 14, 3)
    maps = [drawn(2, 4, 6, 8), drawn(2, 2, 3, 8)]
    found, params = Proposer(convs=1).init_with_output(jax.random.key(0), maps, 3)
    assert [(a.shape, b.shape) for a, b in found] == [
        ((2, 72), (2, 72, 4)),
        ((2, 18), (2, 18, 4)),
    ]
    # Anchors of a place follow each other: only those of one place read one pixel.
    net = Proposer(convs=1)
    params = jax.tree.map(lambda leaf: drawn(*leaf.shape), params)
    one = net.apply(params, [maps[0]], 3)[0][0]
    other = net.apply(params, [maps[0].at[0, 3, 5].add(1.0)], 3)[0][0]
    changed = np.flatnonzero(np.asarray(one != other)[0])
    assert set(changed // 3) == {16, 17, 22, 23}  # of 3 x 3 around row 3, column 5


# Windows.

GRID = Grid(4, 6, 2)
NET = Encoder(patch=2, width=8, depth=2, heads=2, positions="learned")
PATCHES = drawn(2, 24, 4)
PARAMS = NET.init(jax.random.key(0), PATCHES, GRID)


def tokens(patches, windows=None, **more):
    if windows is not None:
        more["through"] = windows.run_blocks
    return NET.apply(PARAMS, patches, GRID, **more)[0]


def test_windows_are_squares_of_the_grid():
    x = jnp.arange(24, dtype=jnp.float32).reshape(1, 24, 1)
    windows = Windows(2, (), GRID)
    split = windows.split(x)
    assert split[..., 0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    np.testing.assert_array_equal(windows.join(split), x)
    np.testing.assert_array_equal(windows.join(windows.split(PATCHES)), PATCHES)


def test_a_patch_reaches_its_own_window_alone_unless_a_block_is_whole():
    other = PATCHES.at[0, 0].add(1.0)

    def reached(whole):
        windows = Windows(2, whole, GRID)
        apart = tokens(other, windows) != tokens(PATCHES, windows)
        return np.flatnonzero(np.asarray(apart).any(axis=2)[0]).tolist()

    assert reached(()) == [1, 2, 7, 8]  # the class token is 0
    assert reached((1,)) == list(range(25))


def test_whole_blocks_are_those_of_the_encoder():
    windows = Windows(2, (0, 1), GRID)
    np.testing.assert_allclose(tokens(PATCHES, windows), tokens(PATCHES), atol=1e-6)
    assert (
        np.abs(tokens(PATCHES, Windows(2, (1,), GRID)) - tokens(PATCHES)).max() > 1e-3
    )


def test_a_window_is_an_image_of_its_own():
    """Without positions, the blocks see the patches of a window as they would see a
    small image, but for the class token."""
    windows = Windows(2, (), GRID)
    seen = NET.apply(
        PARAMS, PATCHES, GRID, taps=("blocks",), through=windows.run_blocks
    )[1]
    moved = jnp.roll(PATCHES, 1, axis=0)
    again = NET.apply(
        PARAMS, moved, GRID, taps=("blocks",), through=windows.run_blocks
    )[1]
    rolled = jnp.roll(seen["blocks"], 1, axis=1)
    np.testing.assert_allclose(again["blocks"], rolled, atol=1e-6)


def test_windows_refuse_what_they_cannot_do():
    windows = Windows(2, (), GRID)
    with pytest.raises(ValueError, match="want config.scan=False and no tap"):
        tokens(PATCHES, windows, taps=("attention",))
    net = Encoder(patch=2, width=8, depth=1, heads=2, relative_positions=True)
    params = net.init(jax.random.key(0), PATCHES, GRID)
    with pytest.raises(ValueError, match="want relative_positions=False"):
        net.apply(params, PATCHES, GRID, through=windows.run_blocks)
