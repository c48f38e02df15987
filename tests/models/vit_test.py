# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.models.vit import SIZES, Encoder, drop_path, layer_flops
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.state import stack_blocks

GRID = Grid(rows=3, cols=4, patch=2)
PIXELS = 2 * 2 * 5  # of a patch: two by two, five channels
SMALL = dict(patch=2, width=16, depth=2, heads=2)
ONE = SMALL | dict(depth=1)
# Classifiers with 1000 classes and one learned position per token at 224 pixels, as
# timm and the ViT papers count them (H with patches of 14).
CLASSIFIERS = {
    "Ti": 5_717_416,
    "S": 22_050_664,
    "B": 86_567_656,
    "L": 304_326_632,
    "H": 632_045_800,
}


def shapes(encoder, grid, pixels):
    patches = jax.ShapeDtypeStruct((1, grid.size, pixels), jnp.float32)
    init = functools.partial(encoder.init, grid=grid)
    return jax.eval_shape(init, jax.random.key(0), patches)["params"]


def perturbed(encoder, seed=0):
    """Parameters in which no bias, gain or token is neutral, in numpy float64."""
    random = np.random.RandomState(seed)

    def draw(path, leaf):
        value = 0.1 * random.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            value += random.standard_normal(leaf.shape) / math.sqrt(leaf.shape[0])
        return value + (path[-1].key == "scale")

    like = shapes(encoder.clone(dtype="float32"), GRID, PIXELS)
    return jax.tree_util.tree_map_with_path(draw, like)


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(encoder, params, patches, keep, taps, hidden=None):
    return encoder.apply({"params": params}, patches, GRID, keep, taps, hidden)


def encode(encoder, params, patches, keep=None, taps=(), hidden=None):
    """Tokens and taps; patches and parameters cast to the encoder's precision."""
    with jax.enable_x64(encoder.dtype == "float64"):
        dtype = "float64" if encoder.dtype == "float64" else "float32"
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        keep = None if keep is None else jnp.asarray(keep, jnp.int32)
        hidden = None if hidden is None else jnp.asarray(hidden)
        patches = jnp.asarray(patches, dtype)
        tokens, seen = apply(encoder, params, patches, keep, taps, hidden)
        assert tokens.dtype == encoder.dtype
        return np.asarray(tokens), {name: np.asarray(x) for name, x in seen.items()}


def plain_vit(params, patches, heads, hidden=None):
    """A ViT over all patches, in numpy: arXiv:2010.11929 with fixed positions.

    Where `hidden` is True a mask token stands in for the embedded pixels.
    """

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def norm(x, layer):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    table = sincos_2d(GRID, params["cls_token"].shape[-1]).astype(np.float32)
    x = dense(patches, params["embed"])
    if hidden is not None:
        x[hidden] = params["mask_token"][0, 0]
    x = x + table
    cls = np.broadcast_to(params["cls_token"], (len(x), 1, x.shape[-1]))
    x = np.concatenate([cls, x], axis=1)
    maps, after = [], []
    for name in sorted(name for name in params if name.startswith("block")):
        block = params[name]
        # q, k and v lie side by side, inside each the heads.
        y = dense(norm(x, block["ln1"]), block["attn"]["qkv"])
        q, k, v = (
            np.stack(np.split(part, heads, axis=-1), axis=1)
            for part in np.split(y, 3, axis=-1)
        )
        logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.concatenate(list((weights @ v).swapaxes(0, 1)), axis=-1)
        x = x + dense(mixed, block["attn"]["out"])
        y = gelu(dense(norm(x, block["ln2"]), block["fc1"]))
        x = x + dense(y, block["fc2"])
        maps.append(weights)
        after.append(x)
    return norm(x, params["norm"]), np.stack(after), np.stack(maps)


def draw_patches(seed=1, batch=2):
    return np.random.RandomState(seed).randn(batch, GRID.size, PIXELS)


def test_without_a_mask_it_is_a_plain_vit():
    encoder, patches = Encoder(dtype="float64", **SMALL), draw_patches()
    params = perturbed(encoder)
    tokens, taps = encode(encoder, params, patches, taps=("blocks", "attention"))
    expected, blocks, attention = plain_vit(params, patches, heads=2)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(taps["blocks"], blocks, rtol=0, atol=1e-10)
    np.testing.assert_allclose(taps["attention"], attention, rtol=0, atol=1e-10)
    everything = np.tile(np.arange(GRID.size), (2, 1))
    chosen, _ = encode(encoder, params, patches, keep=everything)
    np.testing.assert_allclose(chosen, tokens, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scan", [False, True])
def test_taps(scan):
    encoder, patches = Encoder(**SMALL), draw_patches()
    params = perturbed(encoder)
    keep = np.array([[7, 2, 11, 5], [0, 1, 2, 3]])
    layout = stack_blocks(params) if scan else params
    tokens, taps = encode(encoder, layout, patches, keep, ("blocks", "attention"))
    assert set(taps) == {"blocks", "attention"}
    assert tokens.shape == (2, 5, 16)
    assert taps["blocks"].shape == (2, 2, 5, 16)
    assert taps["attention"].shape == (2, 2, 2, 5, 5)
    np.testing.assert_allclose(taps["attention"].sum(axis=-1), 1, atol=1e-6)
    assert taps["attention"].min() > 0
    # Tokens are the last block's, normalised.
    last = taps["blocks"][-1].astype(np.float64)
    last = last - last.mean(axis=-1, keepdims=True)
    last = last / np.sqrt((last**2).mean(axis=-1, keepdims=True) + 1e-6)
    last = last * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(tokens, last, atol=1e-5)
    # Looking changes nothing, and one tap can be had without the other.
    alone, nothing = encode(encoder, layout, patches, keep)
    np.testing.assert_allclose(alone, tokens, atol=1e-5)
    assert nothing == {}


def test_a_hidden_pixel_cannot_change_a_token():
    encoder, patches = Encoder(**ONE), draw_patches()
    params = perturbed(encoder)
    keep = np.array([[7, 2, 11], [0, 1, 2]])
    tokens, _ = encode(encoder, params, patches, keep)
    other = draw_patches(seed=2)
    for row, visible in enumerate(keep):
        other[row, visible] = patches[row, visible]
    np.testing.assert_array_equal(encode(encoder, params, other, keep)[0], tokens)
    # While one visible pixel changes every token of its image, and of no other.
    other[0, 2, 0] += 1
    moved = np.abs(encode(encoder, params, other, keep)[0] - tokens).max(axis=-1)
    assert (moved[0] > 1e-4).all()
    assert (moved[1] == 0).all()


HIDDEN = np.zeros((2, GRID.size), bool)
HIDDEN[0, [0, 3, 4, 10]] = True  # and of the second image, nothing


def with_mask_token(encoder):
    """`perturbed`, and a mask token."""
    token = np.random.RandomState(3).standard_normal((1, 1, encoder.width))
    return perturbed(encoder) | {"mask_token": token}


def test_mask_tokens_stand_in_for_hidden_patches():
    encoder, patches = Encoder(dtype="float64", **ONE), draw_patches()
    params = with_mask_token(encoder)
    tokens, _ = encode(encoder, params, patches, hidden=HIDDEN)
    expected, _, _ = plain_vit(params, patches, 2, HIDDEN)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="want one"):
        encode(encoder, params, patches, keep=np.zeros((2, 1)), hidden=HIDDEN)


def test_a_pixel_behind_a_mask_token_cannot_change_a_token():
    encoder, patches = Encoder(**ONE), draw_patches()
    params = with_mask_token(encoder)
    tokens, _ = encode(encoder, params, patches, hidden=HIDDEN)
    patches[HIDDEN] = 7.0
    np.testing.assert_array_equal(
        encode(encoder, params, patches, hidden=HIDDEN)[0], tokens
    )
    # The same pixels of the image that hides nothing change all of its tokens.
    patches[1, 3] += 1
    moved = np.abs(encode(encoder, params, patches, hidden=HIDDEN)[0] - tokens)
    assert (moved[0] == 0).all() and (moved[1].max(axis=-1) > 1e-4).all()


def test_a_mask_token_exists_where_it_is_used():
    encoder, hidden = Encoder(**ONE), jnp.zeros((1, GRID.size), bool)
    patches = jnp.zeros((1, GRID.size, PIXELS))
    init = functools.partial(encoder.init, grid=GRID, hidden=hidden)
    params = jax.eval_shape(init, jax.random.key(0), patches)["params"]
    assert params["mask_token"].shape == (1, 1, 16)
    del params["mask_token"]
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: a.shape == b.shape, params, shapes(encoder, GRID, PIXELS)
        )
    )


def test_the_order_of_visible_patches_is_the_order_of_tokens():
    encoder, patches = Encoder(dtype="float64", **ONE), draw_patches()
    params = perturbed(encoder)
    keep, order = np.array([[7, 2, 11], [0, 1, 2]]), np.array([2, 0, 1])
    tokens, _ = encode(encoder, params, patches, keep)
    moved, _ = encode(encoder, params, patches, keep[:, order])
    np.testing.assert_allclose(moved[:, 0], tokens[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        moved[:, 1:], tokens[:, 1:][:, order], rtol=0, atol=1e-12
    )


def test_positions_are_sines_of_the_column_then_of_the_row():
    # Without blocks and with a blank embedding a token is its normalised position.
    encoder = Encoder(**SMALL | dict(width=8, depth=0))
    params = perturbed(encoder)
    params["embed"] = jax.tree.map(np.zeros_like, params["embed"])
    params["norm"] = {"scale": np.ones(8), "bias": np.zeros(8)}
    keep = np.array([[6, 3, 8]])  # (row, column): (1, 2), (0, 3), (2, 0)
    tokens, _ = encode(encoder, params, draw_patches(batch=1), keep)
    # Two frequencies in each half of 8 channels, 1 and 1/100: sines, then cosines.
    positions = np.array(
        [
            [0.909297, 0.0199987, -0.416147, 0.9998]
            + [0.841471, 0.00999983, 0.540302, 0.99995],
            [0.14112, 0.0299955, -0.989992, 0.99955] + [0.0, 0.0, 1.0, 1.0],
            [0.0, 0.0, 1.0, 1.0] + [0.909297, 0.0199987, -0.416147, 0.9998],
        ]
    )
    positions -= positions.mean(axis=-1, keepdims=True)
    positions /= positions.std(axis=-1, keepdims=True)
    np.testing.assert_allclose(tokens[0, 1:], positions, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_but_sums_in_float32():
    encoder, patches = Encoder(dtype="bfloat16", **ONE), draw_patches()
    fine = Encoder(**ONE)
    params = perturbed(encoder)
    # Logits of a hundred: softmax in bfloat16 would be wrong by a factor.
    params["block00"]["attn"]["qkv"]["kernel"] *= 3
    tokens, taps = encode(encoder, params, patches, taps=("attention",))
    exact, _ = encode(fine, params, patches)
    assert taps["attention"].dtype == "float32"
    np.testing.assert_allclose(taps["attention"].sum(axis=-1), 1, atol=1e-6)
    error = np.sqrt(np.mean((tokens.astype(np.float32) - exact) ** 2))
    assert 1e-4 < error < 0.05  # tokens have unit variance


def test_initial_parameters():
    width = 256
    encoder = Encoder(patch=4, width=width, depth=2, heads=4)
    patches, key = jnp.zeros((1, 4, 4 * 4 * 3)), jax.random.key(0)
    init = jax.jit(encoder.init, static_argnums=2)
    params = jax.device_get(init(key, patches, Grid(2, 2, 4))["params"])

    def fills(values, bound):
        """Uniform over plus and minus the bound, to the accuracy of the sample."""
        assert 0.95 * bound < np.abs(values).max() <= bound
        assert np.isclose(values.std(), bound / math.sqrt(3), rtol=0.15)
        assert abs(values.mean()) < 0.15 * bound

    for name in ("block00", "block01"):
        block = params[name]
        # One matrix for q, k and v: sqrt(1/2) of the bound of three.
        for part in np.split(block["attn"]["qkv"]["kernel"], 3, axis=1):
            fills(part, math.sqrt(6 / (4 * width)))
        fills(block["attn"]["out"]["kernel"], math.sqrt(6 / (2 * width)))
        fills(block["fc1"]["kernel"], math.sqrt(6 / (5 * width)))
        fills(block["fc2"]["kernel"], math.sqrt(6 / (5 * width)))
        for layer in (*block["attn"].values(), block["fc1"], block["fc2"]):
            assert (layer["bias"] == 0).all()
    for norm in (params["norm"], params["block00"]["ln1"], params["block01"]["ln2"]):
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    first, second = (params[f"block0{i}"]["fc1"]["kernel"] for i in range(2))
    assert not np.array_equal(first, second)
    # The patch embedding is a convolution in the reference; its bias is not zero.
    fills(params["embed"]["kernel"], math.sqrt(6 / (48 + width)))
    fills(params["embed"]["bias"], 1 / math.sqrt(48))
    assert np.isclose(params["cls_token"].std(), 0.02, rtol=0.15)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_parameter_counts():
    assert set(CLASSIFIERS) == set(SIZES)
    for name, classifier in CLASSIFIERS.items():
        encoder = Encoder(**SIZES[name])
        side = 224 // encoder.patch
        pixels = encoder.patch**2 * 3
        params = shapes(encoder, Grid(side, side, encoder.patch), pixels)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        learned_positions = (side**2 + 1) * encoder.width
        head = (encoder.width + 1) * 1000
        assert count + learned_positions + head == classifier, name


# GFLOP of the blocks alone: a quarter of the patches, by hand from the formula
# 24 n d^2 + 4 n^2 d per block.
@pytest.mark.parametrize(
    "name, expected", [("S", 2.17), ("B", 8.59), ("L", 30.4), ("H", 82.5)]
)
def test_flops(name, expected):
    encoder = Encoder(**SIZES[name])
    visible = (224 // encoder.patch) ** 2 // 4
    blocks = encoder.depth * layer_flops(visible + 1, encoder.width, 4.0)
    assert float(f"{blocks / 1e9:.3g}") == expected
    embed = 2 * visible * encoder.patch**2 * 3 * encoder.width
    assert encoder.flops(visible, channels=3) == blocks + embed


@pytest.mark.parametrize(
    "wrong", [dict(width=18), dict(heads=3), dict(heads=0), dict(width=0)]
)
def test_sizes_that_do_not_fit_are_refused(wrong):
    Encoder(**SMALL).check_sizes()
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"encoder.{name}={value}"):
        Encoder(**SMALL | wrong).check_sizes()


# Options of other people's encoders; foreign_test.py compares whole networks.
OPTIONS = dict(positions="none", relative_positions=True, layer_scale=0.5, epsilon=0.01)


def test_options_are_off_and_then_have_no_parameters():
    plain, other = (
        shapes(Encoder(**SMALL, **more), GRID, PIXELS) for more in ({}, OPTIONS)
    )
    assert plain.keys() == {"block00", "block01", "cls_token", "embed", "norm"}
    assert other.keys() == plain.keys() | {"relative_positions"}
    assert other["block00"].keys() == plain["block00"].keys() | {"scale1", "scale2"}
    assert other["relative_positions"].shape == (2, 5 * 7 + 3, 2)


def by_hand(params, patches, epsilon):
    """An encoder of one block and one head with all options, in numpy loops."""

    def norm(x, layer):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
        return x * layer["scale"] + layer["bias"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def bias(i, j):
        table = params["relative_positions"][0, :, 0]
        if not (i and j):  # the class token is one of them
            return table[{(False, True): -3, (True, False): -2}.get((i > 0, j > 0), -1)]
        (row, col), (other, along) = divmod(i - 1, GRID.cols), divmod(j - 1, GRID.cols)
        down, across = row - other + GRID.rows - 1, col - along + GRID.cols - 1
        return table[down * (2 * GRID.cols - 1) + across]

    found, block = [], params["block00"]
    for image in patches:
        x = np.concatenate([params["cls_token"][0], dense(image, params["embed"])])
        q, k, v = np.split(
            dense(norm(x, block["ln1"]), block["attn"]["qkv"]), 3, axis=1
        )
        logits = q @ k.T / math.sqrt(q.shape[1])
        count = len(x)
        logits += [[bias(i, j) for j in range(count)] for i in range(count)]
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        x = x + dense(weights @ v, block["attn"]["out"]) * block["scale1"]
        y = dense(norm(x, block["ln2"]), block["fc1"])
        y = y * [[0.5 * (1 + math.erf(z / math.sqrt(2))) for z in row] for row in y]
        x = x + dense(y, block["fc2"]) * block["scale2"]
        found.append(norm(x, params["norm"]))
    return np.stack(found)


def test_the_options_are_their_formulas():
    encoder = Encoder(**ONE | dict(heads=1), **OPTIONS, dtype="float64")
    params, patches = perturbed(encoder), draw_patches()
    tokens, _ = encode(encoder, params, patches)
    np.testing.assert_allclose(tokens, by_hand(params, patches, 0.01), atol=1e-12)


@pytest.mark.parametrize("scan", [False, True])
def test_a_patch_has_its_relative_positions_wherever_it_stands(scan):
    encoder = Encoder(**SMALL, **OPTIONS)
    params, patches = perturbed(encoder), draw_patches()
    params = stack_blocks(params) if scan else params
    order = np.stack([np.random.RandomState(i).permutation(12) for i in range(2)])
    whole, _ = encode(encoder, params, patches)
    found, seen = encode(encoder, params, patches, order, ("attention",))
    wanted = np.take_along_axis(whole[:, 1:], order[:, :, None], axis=1)
    np.testing.assert_allclose(found[:, 1:], wanted, atol=1e-5)
    np.testing.assert_allclose(seen["attention"].sum(axis=-1), 1, atol=1e-5)
    alone, _ = encode(encoder, params, patches, order[:, :5])
    assert alone.shape == (2, 6, 16) and np.isfinite(alone).all()


def test_drop_path_and_layer_scale_multiply():
    encoder = Encoder(**ONE | dict(depth=2), layer_scale=0.5, drop_path=0.9)
    params, patches = perturbed(encoder), jnp.asarray(draw_patches(), jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), params)
    keys = jax.random.split(jax.random.key(0), 2)

    def tokens(params):
        given = {"params": params}, patches, GRID
        return encoder.apply(*given, taps=("blocks",), keys=keys)[1]["blocks"]

    def with_gains(factor):
        block = params["block01"]
        gains = {f"scale{i}": factor * block[f"scale{i}"] for i in (1, 2)}
        return params | {"block01": block | gains}

    # Without its gains the last block adds nothing, whatever is dropped.
    first, last = tokens(with_gains(0))
    np.testing.assert_array_equal(first, last)
    _, moved = tokens(with_gains(1))
    alone = encoder.apply({"params": params}, patches, GRID, taps=("blocks",))
    kept = np.abs(moved - first).max(axis=(1, 2)) > 0
    assert np.abs(alone[1]["blocks"][1] - alone[1]["blocks"][0]).max() > 0
    scales = drop_path(keys, 2, 0.9)[1]
    np.testing.assert_array_equal(kept, np.asarray(scales).max(axis=0) > 0)


@pytest.mark.oracle
def test_live_against_timm():
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    encoder, patches = Encoder(dtype="float64", **SMALL), draw_patches()
    params = perturbed(encoder)
    theirs = timm.models.VisionTransformer(
        img_size=(6, 8), patch_size=2, in_chans=5, embed_dim=16, depth=2, num_heads=2
    )
    theirs = theirs.double().eval()

    def torched(values):
        return torch.from_numpy(np.ascontiguousarray(values))

    state = {
        "cls_token": torched(params["cls_token"]),
        "patch_embed.proj.weight": torched(
            params["embed"]["kernel"].reshape(2, 2, 5, 16).transpose(3, 2, 0, 1)
        ),
        "patch_embed.proj.bias": torched(params["embed"]["bias"]),
        "pos_embed": torch.zeros(1, 13, 16),
    }
    state["pos_embed"][0, 1:] = torched(sincos_2d(GRID, 16))
    layers = {"norm": params["norm"]}
    for i in range(2):
        block = params[f"block{i:02d}"]
        layers |= {
            f"blocks.{i}.norm1": block["ln1"],
            f"blocks.{i}.attn.qkv": block["attn"]["qkv"],
            f"blocks.{i}.attn.proj": block["attn"]["out"],
            f"blocks.{i}.norm2": block["ln2"],
            f"blocks.{i}.mlp.fc1": block["fc1"],
            f"blocks.{i}.mlp.fc2": block["fc2"],
        }
    for name, layer in layers.items():
        weight = layer["scale"] if "scale" in layer else layer["kernel"].T
        state[f"{name}.weight"] = torched(weight)
        state[f"{name}.bias"] = torched(layer["bias"])
    state |= {x: v for x, v in theirs.state_dict().items() if x.startswith("head.")}
    theirs.load_state_dict(state, strict=True)
    images = patches.reshape(2, 3, 4, 2, 2, 5).transpose(0, 5, 1, 3, 2, 4)
    with torch.no_grad():
        expected = theirs.forward_features(torched(images.reshape(2, 5, 6, 8))).numpy()
    tokens, _ = encode(encoder, params, patches)
    print(f"timm: {np.abs(tokens - expected).max():.1e}")
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-10)
