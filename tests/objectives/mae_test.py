# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import matmul_flops
from ops.boundary_test import by_patch, distances

from mim_jax.maskings.none import Nothing
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives import mae as mae_module
from mim_jax.objectives.mae import MAE
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.masking import Mask, take
from mim_jax.ops.patches import Grid, normalise_patches, patchify
from mim_jax.state import stack_blocks, unstack_blocks

# Nothing square, nothing a default: 20 x 36 pixels of five channels, patches of 4.
SHAPE = (20, 36, 5)
GRID = Grid(rows=5, cols=9, patch=4)
MAE_ODD = MAE(
    encoder=Encoder(patch=4, width=16, depth=1, heads=2),
    decoder=Decoder(width=12, depth=1, heads=3),
    masking=Random(ratio=0.8),
    mean=(0.5, 0.4, 0.3, 0.2, 0.6),
    std=(0.2, 0.3, 0.1, 0.4, 0.5),
)
DEEP = dataclasses.replace(MAE_ODD, encoder=MAE_ODD.encoder.clone(depth=2))


@functools.cache
def params_of(mae):
    """Parameters of which none is neutral."""
    params, stats = jax.eval_shape(mae.init, jax.random.key(0), draw_batch(1))
    assert stats == {}
    random = np.random.RandomState(0)

    def leaf(like):
        scale = 1 / math.sqrt(like.shape[0])
        return jnp.asarray(scale * random.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, params)


def draw_batch(count=3, seed=0):
    images = np.random.RandomState(seed).randint(0, 256, (count, *SHAPE))
    return {"image": jnp.asarray(images, jnp.uint8)}


def keys(count=3, seed=1):
    return jax.random.split(jax.random.key(seed), count)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(mae, params, batch, keys):
    loss, aux = mae.loss(params, None, batch, keys)
    return loss, aux.weight


@functools.cache
def gradients(scan):
    """(loss, gradients) with the blocks one by one or as one loop."""
    params = stack_blocks(params_of(DEEP)) if scan else params_of(DEEP)
    grad = jax.jit(jax.value_and_grad(lambda *args: DEEP.loss(*args)[0]))
    return grad(params, None, draw_batch(), keys())


def numpy_patches(images=None):
    """Standardised patches of the batch, by loops, in float64."""
    if images is None:
        images = np.asarray(draw_batch()["image"], np.float64) / 255
    images = (images - np.array(MAE_ODD.mean)) / np.array(MAE_ODD.std)
    cut = [
        images[:, row : row + 4, col : col + 4].reshape(3, -1)
        for row in range(0, 20, 4)
        for col in range(0, 36, 4)
    ]
    return np.stack(cut, axis=1)


@pytest.mark.parametrize("normalise_target", [True, False])
def test_loss_by_hand(normalise_target):
    mae = dataclasses.replace(MAE_ODD, normalise_target=normalise_target)
    params, batch = params_of(MAE_ODD), draw_batch()
    mask = mae.mask(batch, keys())
    assert mask.keep.shape == (3, 9) and mask.drop.shape == (3, 36)
    assert len({tuple(row) for row in np.sort(mask.keep, axis=1).tolist()}) == 3

    @jax.jit
    def compute(params, patches):
        tokens, _ = mae.encoder.apply(
            {"params": params["encoder"]}, patches, GRID, mask.keep
        )
        variables = {"params": params["decoder"]}
        prediction = mae.decoder.apply(variables, tokens, mask, GRID, 80)
        return prediction, mae.loss(params, None, batch, keys())

    patches = numpy_patches()
    prediction, (loss, aux) = compute(params, jnp.asarray(patches, jnp.float32))
    prediction = np.asarray(prediction)
    errors = []
    for row in range(3):
        for patch, guess in zip(
            np.asarray(mask.drop)[row], prediction[row], strict=True
        ):
            target = patches[row, patch]
            if normalise_target:  # the sample variance, n - 1
                variance = ((target - target.mean()) ** 2).sum() / (target.size - 1)
                target = (target - target.mean()) / math.sqrt(variance + 1e-6)
            errors.append(((guess - target) ** 2).mean())
    assert math.isclose(loss, np.mean(errors), rel_tol=2e-6)
    assert aux.weight == len(errors)
    assert aux.stats == {} and aux.metrics == {}


def test_keys_decide_masks_and_images_do_not_mix():
    params, batch = params_of(MAE_ODD), draw_batch()
    whole, weight = loss_of(MAE_ODD, params, batch, keys())
    single = []
    for row in range(3):
        part = {"image": batch["image"][row : row + 1]}
        loss, share = loss_of(MAE_ODD, params, part, keys()[row : row + 1])
        assert share * 3 == weight
        single.append(loss)
    assert math.isclose(whole, np.mean(single), rel_tol=1e-6)
    assert loss_of(MAE_ODD, params, batch, keys(seed=2))[0] != whole


def test_the_batch_may_bring_its_own_mask():
    params, batch = params_of(MAE_ODD), draw_batch()
    mask = MAE_ODD.mask(batch, keys(seed=5))
    with_mask = batch | {"mask": mask}
    assert MAE_ODD.mask(with_mask, keys()) is mask
    drawn, _ = loss_of(MAE_ODD, params, batch, keys(seed=5))
    brought, _ = loss_of(MAE_ODD, params, with_mask, keys(seed=6))
    assert math.isclose(brought, drawn, rel_tol=1e-6)
    # The order of patches within visible and hidden is free.
    turned = Mask(keep=mask.keep[:, ::-1], drop=jnp.roll(mask.drop, 5, axis=1))
    other, _ = loss_of(MAE_ODD, params, batch | {"mask": turned}, keys())
    assert math.isclose(other, drawn, rel_tol=1e-6)


def test_every_parameter_learns():
    loss, grads = gradients(scan=False)
    assert jnp.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert jnp.abs(leaf).max() > 1e-6, path
    # A key's bias adds the same to every logit of a query, so it has no gradient.
    q, k, v = jnp.split(grads["encoder"]["block00"]["attn"]["qkv"]["bias"], 3)
    assert jnp.abs(k).max() < 1e-6 < min(jnp.abs(q).max(), jnp.abs(v).max())


def test_a_loop_over_blocks_is_the_same_network():
    params = params_of(DEEP)
    back = unstack_blocks(stack_blocks(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for one, other in zip(*map(jax.tree.leaves, (back, params)), strict=True):
        np.testing.assert_array_equal(one, other)
    (loss, grads), (looped, loop_grads) = gradients(scan=False), gradients(scan=True)
    assert set(loop_grads["encoder"]) == {"blocks", "cls_token", "embed", "norm"}
    assert math.isclose(looped, loss, rel_tol=1e-6)
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for one, other in zip(
        *map(jax.tree.leaves, (unstack_blocks(loop_grads), grads)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)


class Perfect(Decoder):
    """Predicts the target exactly."""

    target: Any = None

    def apply(self, variables, tokens, mask, grid, outputs, predict="hidden"):
        keep = mask.keep if predict == "all" else mask.keep[:, :0]
        return take(self.target, jnp.concatenate([keep, mask.drop], axis=1))


@pytest.mark.parametrize("normalise_target", [True, False])
def test_true_targets_restore_the_image(normalise_target):
    batch = draw_batch()
    target = jnp.asarray(numpy_patches(), jnp.float32)
    if normalise_target:
        target = normalise_patches(target)
        np.testing.assert_allclose(target.std(axis=-1, ddof=1), 1, atol=1e-5)
    mae = dataclasses.replace(
        MAE_ODD, decoder=Perfect(target=target), normalise_target=normalise_target
    )
    mask, params = mae.mask(batch, keys()), params_of(MAE_ODD)
    image = jax.jit(mae.reconstruct)(params, batch, mask)
    np.testing.assert_allclose(image, batch["image"] / 255, atol=1e-5)
    loss, _ = jax.jit(mae.loss)(params, None, batch, keys())
    assert loss < 1e-10


def test_reconstruction_is_the_prediction_scaled_back_patch_by_patch():
    params, batch = params_of(MAE_ODD), draw_batch()
    mask = MAE_ODD.mask(batch, keys())
    image = jax.jit(MAE_ODD.reconstruct)(params, batch, mask)
    assert image.shape == (3, *SHAPE)
    # The loss can be read off the picture: errors over the true patch's deviation.
    picture = (image - jnp.asarray(MAE_ODD.mean)[None, None, None]) / jnp.asarray(
        MAE_ODD.std
    )[None, None, None]
    truth = numpy_patches()
    errors = (np.asarray(patchify(picture, 4)) - truth) / truth.std(
        axis=-1, ddof=1, keepdims=True
    )
    hidden = np.asarray(mask.hidden)
    loss, _ = loss_of(MAE_ODD, params, batch, keys())
    assert math.isclose((errors[hidden] ** 2).mean(), loss, rel_tol=1e-4)


class Negative(ColorJitter):
    """Colours that need no chance."""

    def __call__(self, images, keys):
        return 1 - images


def paste(images, keys):
    """A box of the next image: rows 3 .. 8 and columns 10 .. 16 of the middle one, one
    pixel of the last one, and nothing of the first."""
    pasted = np.zeros(images.shape[:3], bool)
    pasted[1, 3:9, 10:17] = True
    pasted[2, 19, 35] = True
    others = jnp.roll(images, -1, axis=0)
    return jnp.where(jnp.asarray(pasted)[..., None], others, images), jnp.asarray(
        pasted
    )


TOUCHED = np.zeros((3, 5, 9), bool)
TOUCHED[1, 0:3, 2:5] = True
TOUCHED[2, 4, 8] = True


@pytest.mark.parametrize(
    "masking, color_jitter, cutmix",
    [
        (True, "whole", False),
        (True, "input_only", False),
        (True, "none", True),
        (True, "input_only", True),
        (False, "none", False),
        (False, "none", True),
        (False, "whole", True),
        (False, "input_only", True),
    ],
)
def test_what_is_seen_and_what_is_wanted(masking, color_jitter, cutmix, monkeypatch):
    """Tables 4 and 5 of arXiv:2208.04164: the target is clean, or is jittered whole."""
    monkeypatch.setattr(mae_module, "cutmix", paste)
    mae = dataclasses.replace(
        MAE_ODD, color_jitter=color_jitter, jitter=Negative(), cutmix=cutmix
    )
    mae = mae if masking else dataclasses.replace(mae, masking=Nothing())
    assert mae.batch_coupled == cutmix
    params, batch = params_of(MAE_ODD), draw_batch()
    images = np.asarray(batch["image"], np.float64) / 255
    seen = images if color_jitter == "none" else 1 - images
    target = seen if color_jitter == "whole" else images
    if cutmix:
        seen = np.array(seen)
        seen[1, 3:9, 10:17] = seen[2, 3:9, 10:17]
        seen[2, 19, 35] = (images if color_jitter == "none" else 1 - images)[0, 19, 35]
    seen, target = numpy_patches(seen), numpy_patches(target)
    hidden = np.asarray(MAE_ODD.mask(batch, keys()).hidden)
    prediction = predictions(hidden if masking else None, seen.astype(np.float32))
    centred = target - target.mean(axis=-1, keepdims=True)
    variance = (centred**2).sum(axis=-1, keepdims=True) / (target.shape[-1] - 1)
    errors = ((prediction - centred / np.sqrt(variance + 1e-6)) ** 2).mean(axis=-1)
    counts = np.ones((3, 45), bool)
    if masking:
        counts = hidden
    elif cutmix and color_jitter == "none":
        counts = TOUCHED.reshape(3, 45)
    # Step by step: compiled once per operation, not once per case.
    loss, aux = mae.loss(params, None, batch, keys())
    assert math.isclose(loss, errors[counts].mean(), rel_tol=5e-6)
    assert aux.weight == int(counts.sum())


def predictions(hidden, patches):
    """The decoder's, in grid order; `hidden` None: of the whole image."""
    params = params_of(MAE_ODD)
    count = 0 if hidden is None else int(hidden[0].sum())
    order = np.tile(np.arange(45), (3, 1)) if hidden is None else np.argsort(hidden)
    order = np.asarray(order, np.int32)
    mask = Mask(
        jnp.asarray(order[:, : 45 - count]), jnp.asarray(order[:, 45 - count :])
    )

    tokens, _ = MAE_ODD.encoder.apply(
        {"params": params["encoder"]}, jnp.asarray(patches), GRID, mask.keep
    )
    out = MAE_ODD.decoder.apply(
        {"params": params["decoder"]}, tokens, mask, GRID, 80, "all"
    )
    grid = np.empty(out.shape)
    grid[np.arange(3)[:, None], order] = out
    return grid


def test_a_paste_that_touches_nothing_is_no_loss(monkeypatch):
    def nothing(images, keys):
        return images, jnp.zeros(images.shape[:3], bool)

    monkeypatch.setattr(mae_module, "cutmix", nothing)
    mae = dataclasses.replace(MAE_ODD, masking=Nothing(), cutmix=True)
    loss, aux = mae.loss(params_of(MAE_ODD), None, draw_batch(), keys())
    assert loss == aux.weight == 0


@pytest.mark.parametrize("boundary", ["hard", "soft"])
def test_pixels_near_the_boundary_count_less_or_not(boundary):
    mae = dataclasses.replace(MAE_ODD, ignore_boundary=1, boundary=boundary)
    params, batch = params_of(MAE_ODD), draw_batch()
    mask = mae.mask(batch, keys())

    @jax.jit
    def outputs(params, batch):
        patches, grid = mae.patches(batch["image"].astype(jnp.float32) / 255)
        return mae.predict(params, patches, grid, mask)[0]

    prediction = np.asarray(outputs(params, batch), np.float64)
    total = weights = 0.0
    for row, (hidden, drop) in enumerate(zip(mask.hidden, mask.drop, strict=True)):
        distance = by_patch(distances(np.asarray(hidden), GRID), drop, GRID)
        counts = distance > 1
        if boundary == "soft":
            counts = np.minimum(distance, 2) / 2
        target = numpy_patches()[row, np.asarray(drop)]
        target -= target.mean(axis=1, keepdims=True)  # normalised over whole patches
        target /= np.sqrt(target.var(axis=1, keepdims=True, ddof=1) + 1e-6)
        errors = ((prediction[row] - target) ** 2).reshape(36, 16, 5).mean(axis=2)
        total, weights = total + (counts * errors).sum(), weights + counts.sum()
    loss, weight = loss_of(mae, params, batch, keys())
    assert loss == pytest.approx(total / weights, rel=1e-5)
    assert weight == pytest.approx(weights)
    assert 0 < weights < 3 * 36 * 16


def test_a_boundary_that_leaves_nothing_is_refused():
    deep = dataclasses.replace(MAE_ODD, ignore_boundary=2)
    with pytest.raises(ValueError, match="ignore_boundary=2 of masks made of squares"):
        deep.check_shape(SHAPE)
    dataclasses.replace(deep, boundary="soft").check_shape(SHAPE)
    units = dataclasses.replace(deep, masking=Random(ratio=0.5, unit=8))
    units.check_shape((16, 24, 5))
    split = dataclasses.replace(units.masking, partial_units="allow")
    with pytest.raises(ValueError, match="squares of 4 pixels: want less than 2"):
        dataclasses.replace(units, masking=split).check_shape((16, 24, 5))
    shown = dataclasses.replace(deep, masking=Nothing())
    with pytest.raises(ValueError, match="ignore_boundary=2 with a masking that hides"):
        shown.check_shape(SHAPE)


def test_initial_parameters_follow_the_key():
    mae = dataclasses.replace(MAE_ODD, decoder=Decoder(width=16, depth=1, heads=2))
    init = jax.jit(lambda key: mae.init(key, draw_batch(1))[0])
    one, other = init(jax.random.key(0)), init(jax.random.key(1))
    kernels = [
        params[part]["block00"]["fc1"]["kernel"]
        for params in (one, other)
        for part in ("encoder", "decoder")
    ]
    # Of one shape, yet all different: the networks do not share a key.
    assert len({kernel[0, 0].item() for kernel in kernels}) == 4
    for mine, theirs in zip(
        *map(jax.tree.leaves, (one, init(jax.random.key(0)))), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_mae_has_no_teacher():
    params = params_of(MAE_ODD)
    assert MAE_ODD.teacher(None, params, jnp.zeros((), jnp.int32)) is None


def test_check():
    MAE_ODD.check_shape(SHAPE)
    with pytest.raises(ValueError, match="21x36"):
        MAE_ODD.check_shape((21, 36, 5))
    with pytest.raises(ValueError, match="3 channel"):
        MAE_ODD.check_shape((20, 36, 3))
    with pytest.raises(ValueError, match="std"):
        dataclasses.replace(MAE_ODD, std=(1.0, 1.0, 1.0, 1.0, 0.0)).check_shape(SHAPE)
    with pytest.raises(ValueError, match="ratio=0.99"):
        dataclasses.replace(MAE_ODD, masking=Random(ratio=0.99)).check_shape(SHAPE)
    with pytest.raises(ValueError, match="decoder.width"):
        dataclasses.replace(MAE_ODD, decoder=Decoder(width=14)).check_shape(SHAPE)
    with pytest.raises(ValueError, match="5 channels"):
        dataclasses.replace(MAE_ODD, color_jitter="whole").check_shape(SHAPE)


@pytest.mark.parametrize(
    "name, published", [("B", 111_907_840), ("L", 329_541_888), ("H", 657_074_508)]
)
def test_parameter_counts(name, published):
    """The released models', which count both position tables."""
    mae = MAE(encoder=Encoder(**SIZES[name]))
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)}
    params, _ = jax.eval_shape(mae.init, jax.random.key(0), batch)
    tokens = (224 // mae.encoder.patch) ** 2 + 1
    tables = tokens * (mae.encoder.width + mae.decoder.width)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count + tables == published


# GFLOP per image of training where, as in the reference, visible patches are predicted
# as well: 3 x (blocks + embedding of visible patches + both decoder projections).
@pytest.mark.parametrize(
    "name, expected", [("S", 38.8), ("B", 58.2), ("L", 123.8), ("H", 290.5)]
)
def test_flops(name, expected):
    mae = MAE(encoder=Encoder(**SIZES[name]))
    visible = (224 // mae.encoder.patch) ** 2 // 4
    spared = 3 * 2 * visible * 512 * mae.encoder.patch**2 * 3
    assert round((mae.flops((224, 224, 3)) + spared) / 1e9, 1) == expected


def test_flops_where_nothing_is_hidden():
    mae = dataclasses.replace(MAE_ODD, masking=Nothing())
    batch, params = draw_batch(1), params_of(MAE_ODD)
    program = jax.make_jaxpr(lambda params: mae.loss(params, None, batch, keys(1))[0])
    assert 3 * matmul_flops(program(params).jaxpr) == mae.flops(SHAPE)


def test_flops_are_those_of_the_program():
    mae = dataclasses.replace(
        MAE_ODD,
        encoder=Encoder(patch=4, width=256, depth=1, heads=2),
        decoder=Decoder(width=128, depth=2, heads=2),
    )
    batch, key = draw_batch(1), keys(1)
    params, _ = jax.eval_shape(mae.init, jax.random.key(0), batch)

    def loss(params):
        return mae.loss(params, None, batch, key)[0]

    forward = matmul_flops(jax.make_jaxpr(loss)(params).jaxpr)
    training = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert 3 * forward == mae.flops(SHAPE)
    # No gradient goes into the pixels: by custom that product is counted all the same.
    assert training == mae.flops(SHAPE) - 2 * 9 * 80 * 256
    # XLA counts what is not a matrix product as well, some percent here.
    counted = jax.jit(loss).lower(params).cost_analysis()["flops"]
    assert 1 < counted / forward < 1.1
