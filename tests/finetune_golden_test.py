# SPDX-License-Identifier: Apache-2.0
"""The pieces of fine-tuning equal timm's and torch's, from stored arrays."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from skimage import data
from tiny import leaves

from mim_jax import state as states
from mim_jax.data.randaugment import OPERATIONS, operate
from mim_jax.models.vit import Encoder, drop_path
from mim_jax.objectives.supervised import Supervised
from mim_jax.ops.posembed import resized
from mim_jax.optim import LARS, AdamW, kernels, layer_scales
from mim_jax.sharding import path_name

STORED = np.load(pathlib.Path(__file__).parent / "golden" / "finetune.npz")
ABOUT = json.loads(str(STORED["about"]))


def our_name(theirs: str) -> str:
    """Path of a parameter of timm's VisionTransformer in our tree."""
    name = theirs.replace("attn.proj", "attn.out").replace(".", "/")
    name = re.sub(r"blocks/(\d+)", lambda m: f"encoder/block{int(m[1]):02d}", name)
    for old, new in {
        "patch_embed/proj": "encoder/embed",
        "fc_norm": "encoder/norm",
        "head": "head/linear",
        "norm1": "ln1",
        "norm2": "ln2",
        "mlp/": "",
        "pos_embed": "encoder/pos_embed",
        "cls_token": "encoder/cls_token",
    }.items():
        name = name.replace(old, new)
    norm = re.search(r"(ln\d|norm)/weight$", name)
    return re.sub(r"weight$", "scale" if norm else "kernel", name)


def model(dtype: str, **fields) -> Supervised:
    encoder = Encoder(
        patch=8,
        width=16,
        depth=3,
        heads=2,
        positions="learned",
        norm="pooled",
        dtype=dtype,
        **fields,
    )
    standard = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
    return Supervised(encoder=encoder, classes=5, **standard)


def first_params(scan: bool = False):
    batch = {"image": jnp.zeros((1, 16, 24, 3), jnp.uint8)}
    params, _ = jax.jit(model("float32").init)(jax.random.key(0), batch)
    return states.stack_blocks(params) if scan else params


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """As `make_finetune.draw`."""
    found = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        value = 0.3 * np.random.RandomState([7, i]).standard_normal(shape)
        found[name] = value + (1 if "norm" in name and name.endswith("weight") else 0)
    return found


def their_shape(theirs: str, ours: np.ndarray) -> tuple[int, ...]:
    if theirs == "patch_embed.proj.weight":
        return (16, 3, 8, 8)
    if theirs == "pos_embed":
        return (1, *ours.shape)
    return ours.shape[::-1] if ours.ndim == 2 else ours.shape


def to_ours(theirs: str, value: np.ndarray) -> np.ndarray:
    if theirs == "patch_embed.proj.weight":
        return value.transpose(2, 3, 1, 0).reshape(-1, 16)
    if theirs == "pos_embed":
        return value[0]
    return value.T if value.ndim == 2 else value


def test_logits_are_timms_in_double_precision():
    ours = leaves(first_params())
    names = {theirs: our_name(theirs) for theirs in ABOUT["layers"]}
    assert sorted(names.values()) == sorted(ours)
    shapes = {theirs: their_shape(theirs, ours[name]) for theirs, name in names.items()}
    with jax.enable_x64(True):
        tree: dict = {}
        for theirs, value in drawn(shapes).items():
            *above, last = names[theirs].split("/")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = jnp.asarray(to_ours(theirs, value))
        pixels = np.random.RandomState(8).standard_normal((3, 3, 16, 24))
        images = jnp.asarray(pixels.transpose(0, 2, 3, 1))
        for params in (tree, states.stack_blocks(tree)):
            got = model("float64").logits(params, {}, images)
            np.testing.assert_allclose(got, STORED["logits"], rtol=1e-10)


@pytest.mark.parametrize("scan", [False, True])
def test_layers_have_timms_learning_rates_and_decay(scan):
    params = first_params(scan)
    scales = layer_scales(params, 0.65)
    scales = jax.tree.map(
        lambda scale, leaf: jnp.broadcast_to(jnp.asarray(scale), leaf.shape),
        scales,
        params,
    )
    scales, decay = leaves(states.unstack_blocks(scales)), kernels(params)
    decay = {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(decay)}
    for theirs, (share, decays) in ABOUT["layers"].items():
        name = our_name(theirs)
        np.testing.assert_allclose(scales[name], share, rtol=1e-6, err_msg=name)
        stacked = re.sub(r"block\d+", "blocks", name) if scan else name
        assert decay[stacked] == decays, name


@pytest.mark.parametrize("scan", [False, True])
def test_an_update_has_the_rate_and_the_decay_of_its_layer(scan):
    params = first_params(scan)
    settings = AdamW(weight_decay=0.05, decay="kernels", layer_decay=0.65)
    tx = settings.build(lambda step: 0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    after = leaves(states.unstack_blocks(optax.apply_updates(params, updates)))
    before = leaves(states.unstack_blocks(params))
    for theirs, (share, decays) in ABOUT["layers"].items():
        name = our_name(theirs)
        rate = 0.1 * share  # Adam's first step has length 1
        want = before[name] - rate * (1 + (0.05 * before[name] if decays else 0))
        np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_lars_makes_timms_steps(stacked):
    random = np.random.RandomState(9)
    kernel, bias = random.standard_normal((4, 3)), random.standard_normal(3)
    rates = (6.4, 3.2, 0.5)

    def tree(kernel, bias):
        one = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        if not stacked:
            return one
        # Beside a block of another size, whose lengths must not enter.
        return {"blocks": jax.tree.map(lambda x: jnp.stack([x, 100 * x]), one)}

    with jax.enable_x64(True):
        params = tree(kernel, bias)
        tx = LARS().build(lambda step: jnp.asarray(rates)[step])
        opt_state = tx.init(params)
        for i in range(3):
            grads = tree(random.standard_normal((4, 3)), random.standard_normal(3))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            one = params
            if stacked:
                one = jax.tree.map(lambda x: x[0], params["blocks"])
            for offset, name in enumerate(("kernel", "bias")):
                want = STORED[f"lars {2 * i + offset}"]
                np.testing.assert_allclose(one[name], want, rtol=1e-10)


def test_lars_takes_a_plain_step_where_a_length_is_zero():
    params = {"kernel": jnp.zeros((2, 2))}
    tx = LARS().build(lambda step: 0.5)
    grads = {"kernel": jnp.ones((2, 2))}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * np.ones((2, 2)))
    params = {"kernel": jnp.ones((2, 2))}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, grads), tx.init(params), params)
    assert (updates["kernel"] == 0).all()


def test_drop_path_has_timms_rates():
    keys = jax.random.split(jax.random.key(0), 20000)
    factors = np.asarray(jax.jit(drop_path, static_argnums=(1, 2))(keys, 12, 0.1))
    assert factors.shape == (12, 2, 20000)
    for layer, rate in enumerate(ABOUT["drop_path"]):
        kept = factors[layer][factors[layer] > 0]
        np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-5)
        for branch in factors[layer]:
            share = (branch == 0).mean()
            assert abs(share - rate) <= 5 * (rate * (1 - rate) / 20000) ** 0.5
    # Branches and images are left out independently of each other.
    out = factors[-1] == 0
    assert abs((out[0] & out[1]).mean() - 0.01) < 5 * (0.01 / 20000) ** 0.5


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_randaugment_are_timms(name):
    image, seen = data.astronaut()[100:124, 180:212], 0
    for key in STORED.files:
        if not key.startswith(f"randaugment {name} "):
            continue
        share, sign = key.split()[-2:]
        got = operate(image, name, float(share), int(sign), (124, 116, 104))
        difference = np.abs(got.astype(int) - STORED[key].astype(int))
        assert difference.max() <= 1, key
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("size", [(5, 6), (2, 4), (6, 3)])
def test_positions_are_resized_as_torch_resizes(size):
    table = STORED["positions table"]
    got = resized(table.reshape(12, 8), (3, 4), size)
    want = STORED[f"positions {size[0]}x{size[1]}"].reshape(-1, 8)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="want 15"):
        resized(table.reshape(12, 8), (3, 5), size)
