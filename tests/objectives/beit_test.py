# SPDX-License-Identifier: Apache-2.0
"""BEiT predicts the tokens of hidden patches, and from visible pixels alone."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.maskings.block import Block
from mim_jax.maskings.none import Nothing
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import masks_of
from mim_jax.objectives.beit import BEiT
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.patches import Grid
from mim_jax.tokenizers.base import Tokenizer

# Nothing square: 12 x 20 pixels, 15 patches of which 6 are hidden.
SHAPE = (12, 20, 3)
GRID = Grid(rows=3, cols=5, patch=4)
BEIT = BEiT(
    encoder=Encoder(patch=4, width=16, depth=1, heads=2),
    masking=Block(ratio=0.4, least=2),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.1),
)
KEYS = jax.random.split(jax.random.key(1), 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Tokenizer):
    """Tokens that a test chooses, and the images that they were asked of."""

    tokens: Any
    vocabulary: int = 7  # pyright: ignore
    seen: list = dataclasses.field(default_factory=list)

    def check_shape(self, image_shape):
        pass

    def __call__(self, images, grid):
        self.seen.append(images)
        return jnp.asarray(self.tokens, jnp.int32)


def images_of(seed=0):
    return np.random.RandomState(seed).randint(0, 256, (3, *SHAPE)).astype(np.uint8)


def with_patches_of(other, images, chosen):
    """`images`, with the patches where `chosen` is True taken from `other`."""
    pixels = np.repeat(np.asarray(chosen).reshape(3, 3, 5), 4, axis=1)
    return np.where(np.repeat(pixels, 4, axis=2)[..., None], other, images)


@functools.cache
def params():
    """Parameters of which none is neutral."""
    shapes, stats = jax.eval_shape(BEIT.init, jax.random.key(0), {"image": images_of()})
    assert stats == {}
    random = np.random.RandomState(0)

    def leaf(like):
        return jnp.asarray(random.standard_normal(like.shape) / 4, like.dtype)

    return jax.tree.map(leaf, shapes)


@jax.jit
def everything(params, images):
    batch, keys = {"image": images}, KEYS
    mask = masks_of(BEIT.masking, batch, keys, GRID)
    floats = images.astype(jnp.float32) / 255
    logits = BEIT.logits(params, floats, mask)
    tokens, _ = BEIT.encode(params, floats, hidden=mask.hidden)
    found = jax.value_and_grad(BEIT.loss, has_aux=True)(params, None, batch, keys)
    return mask, logits, tokens, BEIT.tokenizer(floats, GRID), found


def test_loss_by_hand():
    mask, logits, tokens, names, ((loss, aux), _) = everything(params(), images_of())
    assert mask.drop.shape == (3, 6)
    assert len({tuple(sorted(row)) for row in mask.drop.tolist()}) > 1
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params()["head"])
    errors, right = [], []
    for image in range(3):
        for place, patch in enumerate(mask.drop[image].tolist()):
            token = np.asarray(tokens, np.float64)[image, 1 + patch]  # after class
            scores = token @ head["linear"]["kernel"] + head["linear"]["bias"]
            np.testing.assert_allclose(logits[image, place], scores, atol=2e-5)
            wanted = int(names[image, patch])
            errors.append(np.log(np.exp(scores).sum()) - scores[wanted])
            right.append(scores.argmax() == wanted)
    assert math.isclose(loss, np.mean(errors), rel_tol=1e-5)
    assert math.isclose(aux.metrics["accuracy"], np.mean(right), abs_tol=1e-6)
    assert aux.weight == 18 and aux.stats == {}


def test_hidden_pixels_do_not_influence_logits():
    images = images_of()
    mask, logits, *_ = everything(params(), images)
    hidden = np.asarray(mask.hidden)
    changed = with_patches_of(images_of(seed=9), images, hidden)
    assert (changed != images).mean() > 0.3
    np.testing.assert_array_equal(everything(params(), changed)[1], logits)
    first = np.zeros_like(hidden)
    first[:, np.flatnonzero(~hidden.any(axis=0))[0]] = True  # visible in all images
    changed = with_patches_of(images_of(seed=9), images, first)
    assert (everything(params(), changed)[1] != logits).any(axis=(1, 2)).all()


@pytest.fixture
def given_loss(monkeypatch):
    """(loss, accuracy) of tokens and of logits of the six hidden patches."""
    monkeypatch.setattr(BEiT, "logits", lambda _, params, images, mask: params)

    @jax.jit
    def compute(tokens, logits):
        beit = dataclasses.replace(BEIT, tokenizer=Given(tokens))
        loss, aux = beit.loss(logits, None, {"image": jnp.asarray(images_of())}, KEYS)
        return loss, aux.metrics["accuracy"]

    def call(tokens, logits):
        loss, accuracy = compute(np.int32(tokens), np.float32(logits))
        return float(loss), float(accuracy)

    return call


def test_visible_patches_carry_no_loss(given_loss):
    hidden = np.asarray(BEIT.masking(KEYS, GRID).hidden)
    tokens = np.random.RandomState(0).randint(7, size=(3, 15))
    logits = np.random.RandomState(1).standard_normal((3, 6, 7))
    before = given_loss(tokens, logits)
    assert given_loss(np.where(hidden, tokens, 0), logits) == before
    for image, patch in np.argwhere(hidden):
        other = tokens.copy()
        other[image, patch] = (other[image, patch] + 1) % 7
        assert given_loss(other, logits)[0] != before[0]


def test_loss_of_ignorance_and_of_knowledge(given_loss):
    drop = np.asarray(BEIT.masking(KEYS, GRID).drop)
    tokens = np.random.RandomState(0).randint(1, 7, size=(3, 15))
    loss, accuracy = given_loss(tokens, np.zeros((3, 6, 7)))
    assert math.isclose(loss, math.log(7), rel_tol=1e-6) and accuracy == 0  # 0 is first
    sure = np.eye(7)[np.take_along_axis(tokens, drop, axis=1)] * 50
    loss, accuracy = given_loss(tokens, sure)
    assert 0 <= loss < 1e-6 and accuracy == 1


def test_jittered_images_are_seen_and_named(monkeypatch):
    seen = []
    monkeypatch.setattr(ColorJitter, "__call__", lambda _, images, keys: 1 - images)
    monkeypatch.setattr(
        BEiT, "logits", lambda _, p, images, m: seen.append(images) or p
    )
    beit = dataclasses.replace(
        BEIT,
        tokenizer=Given(np.zeros((3, 15))),
        color_jitter="whole",
    )
    images = jnp.asarray(images_of())
    beit.loss(jnp.zeros((3, 6, 7)), None, {"image": images}, KEYS)
    want = 1 - np.asarray(images) / 255
    np.testing.assert_allclose(seen[0], want, atol=1e-6)
    np.testing.assert_array_equal(beit.tokenizer.seen[0], seen[0])


def test_every_parameter_learns():
    *_, (_, grads) = everything(params(), images_of())
    assert "mask_token" in grads["encoder"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(grads)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path


def test_features_are_the_mean_of_patches():
    assert BEIT.feature == "avg"
    assert BEIT.teacher(None, params(), jnp.zeros((), jnp.int32)) is None


def matmul_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if isinstance(inside, jax.extend.core.Jaxpr):
                total += matmul_flops(inside)
    return total


def test_flops_are_those_of_the_program():
    beit = dataclasses.replace(BEIT, tokenizer=Given(np.zeros((1, 15))))
    batch = {"image": jnp.zeros((1, *SHAPE), jnp.uint8)}
    shapes, _ = jax.eval_shape(beit.init, jax.random.key(0), batch)
    loss = lambda params: beit.loss(params, None, batch, KEYS[:1])[0]  # noqa: E731
    forward = matmul_flops(jax.make_jaxpr(loss)(shapes).jaxpr)
    assert 3 * forward == beit.flops(SHAPE)


def test_parameter_count():
    # ViT-B/16 as published, without its classifier and its learned position table; a
    # mask token; a linear layer to 512 tokens.
    batch = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)}
    shapes, _ = jax.eval_shape(BEiT().init, jax.random.key(0), batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    vit = 86_567_656 - 1000 * 769 - 197 * 768
    assert count == vit + 768 + 769 * 512


def test_check():
    BEIT.check_shape(SHAPE)
    with pytest.raises(ValueError, match="hides nothing.*'block'"):
        dataclasses.replace(BEIT, masking=Nothing()).check_shape(SHAPE)
    with pytest.raises(ValueError, match="least=16: want at most the 6 patches"):
        dataclasses.replace(BEIT, masking=Block()).check_shape(SHAPE)
    with pytest.raises(ValueError, match="images of 1 channel"):
        BEIT.check_shape((12, 20, 1))
    with pytest.raises(ValueError, match="13x20"):
        BEIT.check_shape((13, 20, 3))
    grey = dataclasses.replace(BEIT, mean=(0.5,), std=(0.2,), color_jitter="whole")
    with pytest.raises(ValueError, match="jitter.saturation=0.4"):
        grey.check_shape((12, 20, 1))
    odd = dataclasses.replace(BEIT, mean=(0.5,) * 5, std=(0.2,) * 5)
    with pytest.raises(ValueError, match="images of 5 channels"):
        odd.check_shape((12, 20, 5))
