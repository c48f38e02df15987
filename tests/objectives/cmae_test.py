# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
from types import SimpleNamespace

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import matmul_flops

from mim_jax.maskings.base import Masking
from mim_jax.maskings.none import Nothing
from mim_jax.maskings.random import Random
from mim_jax.models.heads import Head
from mim_jax.models.vit import Encoder
from mim_jax.objectives.cmae import CMAE, View
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.ema import EMA
from mim_jax.ops.masking import from_hidden
from mim_jax.ops.patches import Grid

SHAPE = (4, 8, 3)
GRID = Grid(rows=2, cols=4, patch=2)
IMAGES = 4
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def flags(hidden):
    rows = np.zeros((len(hidden), GRID.size), bool)
    for row, patches in zip(rows, hidden, strict=True):
        row[list(patches)] = True
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Masking):
    """Hides the patches it is told to."""

    hidden: tuple[tuple[int, ...], ...]

    def visible_count(self, grid):
        return grid.size - len(self.hidden[0])

    def __call__(self, keys, grid):
        return from_hidden(flags(self.hidden)[: len(keys)])


T1 = tuple(tuple(set(range(8)) - set(v)) for v in [(0, 5), (1, 2), (6, 3), (7, 0)])
T2 = ((0, 1, 2), (2, 5, 7), (3, 4, 5), (0, 3, 6))
CMAE_TINY = CMAE(
    encoder=Encoder(patch=2, width=16, depth=1, heads=2),
    projector=Head(hidden=10, out=6),
    predictor=Head(hidden=12, out=6),
    masking=Fixed(hidden=T1),
    t2_masking=Fixed(hidden=T2),
    chunk=3,
    color_jitter="none",
    mean=MEAN,
    std=STD,
)
# Tokens of visible patches alone: only T1's view is masked, and online.
DROPPED = dict(
    mask_token=False, t2="identity", symmetric=False, positions="online_visible"
)


def variant(**changes):
    return dataclasses.replace(CMAE_TINY, **changes)


def draw_batch(count=IMAGES, seed=0):
    images = np.random.RandomState(seed).randint(0, 256, (count, *SHAPE))
    return {"image": jnp.asarray(images, jnp.uint8)}


def keys(count=IMAGES, seed=1):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def params_of(seed=0):
    """Parameters of which none is neutral."""
    params, stats = jax.eval_shape(CMAE_TINY.init, jax.random.key(0), draw_batch(1))
    assert stats == {}
    random = np.random.RandomState(seed)

    def leaf(like):
        scale = 1 / math.sqrt(like.shape[0])
        return jnp.asarray(scale * random.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, params)


def teacher_of(seed=1):
    return {name: params_of(seed)[name] for name in ("encoder", "projector")}


def loss_of(cmae, batch=None, chain=None):
    """Step by step: shapes are so small that compiling would take longer."""
    state = SimpleNamespace(teacher=teacher_of())
    chain = keys() if chain is None else chain
    return cmae.loss(params_of(), state, batch or draw_batch(), chain)


@jax.jit
def encode(params, patches, hidden=None, keep=None):
    tokens, _ = CMAE_TINY.encoder.apply(
        {"params": params}, patches, GRID, keep=keep, hidden=hidden
    )
    return tokens


def features(cmae, params, view):
    """(q or k in unit rows [b, n, d], NaN where there is no token), in float64."""
    images = (np.asarray(view.images, np.float64) - MEAN) / STD
    patches = [
        images[:, row : row + 2, col : col + 2].reshape(IMAGES, -1)
        for row in (0, 2)
        for col in (0, 2, 4, 6)
    ]
    patches = jnp.asarray(np.stack(patches, axis=1), jnp.float32)
    hidden = np.asarray(view.mask.hidden)
    if cmae.mask_token:
        tokens = encode(params["encoder"], patches, hidden=hidden)
    else:
        keep = np.stack([np.flatnonzero(~row) for row in hidden]).astype(np.int32)
        tokens = encode(params["encoder"], patches, keep=keep)
    tokens = np.asarray(tokens, np.float64)
    chosen = {
        "patch": tokens[:, 1:],
        "cls": tokens[:, :1],
        "avg": tokens[:, 1:].mean(axis=1, keepdims=True),
        "patch+cls": tokens,
    }[cmae.tokens]
    out = by_hand.head(params["projector"], chosen)
    if "predictor" in params:
        out = by_hand.head(params["predictor"], out)
    out = by_hand.unit(out)
    if cmae.mask_token or cmae.tokens != "patch":
        return out
    placed = np.full((IMAGES, GRID.size, out.shape[-1]), np.nan)
    placed[~hidden] = out.reshape(-1, out.shape[-1])
    return placed


def direction(cmae, online, target):
    """Eq. (11) for one view online, token by token."""
    query = features(cmae, params_of(), online)
    key = features(cmae, teacher_of(), target)
    if cmae.contrast == "byol":
        each = ((query - key) ** 2).sum(axis=-1)
    else:
        each = by_hand.info_nce(query, key, cmae.negatives, cmae.temperature)
    losses = []
    for b in range(IMAGES):
        for i in range(each.shape[1]):
            if cmae.tokens == "patch":
                hidden = online.mask.hidden[b, i]
                pasted = cmae.cutmix and (online.pasted[b, i] or target.pasted[b, i])
                if (
                    (cmae.positions == "online_masked" and not hidden)
                    or (cmae.positions == "online_visible" and hidden)
                    or (cmae.cutmix_tokens == "shared_only" and pasted)
                ):
                    continue
            losses.append(each[b, i])
    return np.mean(losses), len(losses)


VARIANTS = [
    (dict(), 32),
    (dict(symmetric=False, negatives="same_image"), 32),
    (dict(negatives="all", positions="online_masked", temperature=0.5), 24),
    (dict(positions="online_visible", t2="independent"), 8),
    (dict(positions="online_masked", t2="identity", symmetric=False), 24),
    (dict(masking=Nothing()), 32),
    (dict(tokens="cls"), 4),
    (dict(tokens="avg", negatives="all"), 4),
    (dict(tokens="patch+cls", loss_scale="2tau", temperature=0.3), 36),
    (dict(contrast="byol", symmetric=False), 32),
    (dict(contrast="byol", mask_token=False, tokens="avg"), 4),
    (dict(mask_token=False, tokens="avg"), 4),
    (dict(mask_token=False, tokens="cls", t2="independent"), 4),
    (DROPPED, 8),
    (DROPPED | dict(negatives="all"), 8),
    (dict(cutmix=True), 32),
    (dict(cutmix=True, cutmix_tokens="shared_only", positions="online_masked"), None),
]


@pytest.mark.parametrize("changes, count", VARIANTS)
def test_loss_by_loops(changes, count):
    cmae = variant(**changes)
    one, two = cmae.views(draw_batch(), keys())
    np.testing.assert_array_equal(
        one.mask.hidden, 0 if changes.get("masking") else flags(T1)
    )
    expected, counted = direction(cmae, one, two)
    if cmae.symmetric:
        other, _ = direction(cmae, two, one)
        expected = (expected + other) / 2
    if cmae.loss_scale == "2tau":
        expected *= 2 * cmae.temperature
    assert counted == count or (count is None and 3 < counted < 24)
    loss, aux = loss_of(cmae)
    assert math.isclose(loss, expected, rel_tol=1e-5)
    assert aux.weight == IMAGES and aux.stats == {} and aux.metrics == {}


@pytest.mark.parametrize(
    "t2, hidden",
    [
        ("complement", ~flags(T1)),
        ("independent", flags(T2)),
        ("identity", np.zeros((IMAGES, GRID.size), bool)),
    ],
)
def test_the_second_view_hides_what_it_should(t2, hidden):
    one, two = variant(t2=t2).views(draw_batch(), keys())
    np.testing.assert_array_equal(one.mask.hidden, flags(T1))
    np.testing.assert_array_equal(two.mask.hidden, hidden)
    np.testing.assert_array_equal(one.images, draw_batch()["image"] / 255)
    np.testing.assert_array_equal(two.images, one.images)
    assert one.pasted is two.pasted is None
    # Where T1 hides nothing, neither does T2.
    one, two = variant(t2=t2, masking=Nothing()).views(draw_batch(), keys())
    assert not one.mask.hidden.any() and not two.mask.hidden.any()
    brought = from_hidden(flags(T2))
    one, _ = variant(t2=t2).views(draw_batch() | {"mask": brought}, keys())
    assert one.mask is brought


def test_each_view_has_its_own_colours_and_its_own_paste():
    jitter = ColorJitter(p=1.0)
    batch = draw_batch()
    cmae = variant(color_jitter="per_view", jitter=jitter)
    one, two = jax.jit(cmae.views)(batch, keys())
    images = [batch["image"] / 255, one.images, two.images]
    for i in range(IMAGES):
        assert len({np.asarray(image[i]).tobytes() for image in images}) == 3
    one, two = variant(cutmix=True).views(batch, keys())
    images = np.asarray(batch["image"], np.float32) / np.float32(255)
    for view, partner in ((one, 1), (two, 2)):
        changed = np.asarray(abs(view.images - images) > 1e-3).any(axis=-1)
        patches = changed.reshape(IMAGES, 2, 2, 4, 2).any(axis=(2, 4))
        np.testing.assert_array_equal(view.pasted, patches.reshape(IMAGES, -1))
        assert 0 < view.pasted.mean() < 1
        others = np.roll(images, -partner, axis=0)
        np.testing.assert_allclose(view.images[changed], others[changed], atol=1e-6)
    assert (one.pasted != two.pasted).any()


def test_a_view_is_masked_and_coloured_by_separate_keys():
    """Whatever the masking does with a key: a split of it is no purpose of it."""
    seen = []

    class Spy(Random):
        def __call__(self, keys, grid):
            seen.extend([keys, *jax.random.split(keys[0], 64)[:, None]])
            return super().__call__(keys, grid)

    cmae = variant(masking=Spy(ratio=0.75), t2_masking=Spy(ratio=0.5), t2="independent")
    cmae.views(draw_batch(), keys())
    first = np.concatenate([np.asarray(jax.random.key_data(key)) for key in seen])
    assert len(np.unique(first, axis=0)) == len(first)


class Turned(CMAE):
    """Its second view shows the images in another order."""

    def views(self, batch, keys, state=None):
        one, two = super().views(batch, keys, state)
        return one, View(two.images[::-1], two.mask, None)


def test_images_are_told_apart_by_who_they_are_not_where_they_stand():
    loss, _ = loss_of(CMAE_TINY)
    order = np.array([2, 0, 3, 1])
    batch = {"image": draw_batch()["image"][order]}
    mask = from_hidden(flags(T1)[order])
    both, _ = loss_of(CMAE_TINY, batch | {"mask": mask}, keys()[order])
    assert math.isclose(both, loss, rel_tol=1e-6)
    fields = {f.name: getattr(CMAE_TINY, f.name) for f in dataclasses.fields(CMAE)}
    one, _ = loss_of(Turned(**fields))
    assert abs(one - loss) > 1e-3


@pytest.mark.parametrize(
    "how", [dict(), dict(mask_token=False, tokens="avg"), dict(tokens="cls")]
)
def test_pixels_hidden_in_both_views_do_not_count(how):
    cmae = variant(t2="independent", t2_masking=Fixed(hidden=T1), **how)
    batch = draw_batch()
    hidden = flags(T1).reshape(IMAGES, 2, 4).repeat(2, axis=1).repeat(2, axis=2)
    images = np.array(batch["image"])
    images[hidden] ^= 255
    loss, _ = loss_of(cmae, batch)
    assert loss_of(cmae, {"image": jnp.asarray(images)})[0] == loss
    images[0, 0, 0] ^= 255  # a pixel that is seen
    assert loss_of(cmae, {"image": jnp.asarray(images)})[0] != loss


@functools.cache
def gradients():
    """Of the loss, in the online parameters and in the teacher's."""

    def loss(params, teacher):
        state = SimpleNamespace(teacher=teacher)
        return CMAE_TINY.loss(params, state, draw_batch(), keys())[0]

    value = jax.jit(loss)
    return value, jax.jit(jax.grad(loss, argnums=(0, 1)))(params_of(), teacher_of())


def test_the_teacher_gets_no_gradient():
    value, (_, grads) = gradients()
    assert set(grads) == {"encoder", "projector"}
    for leaf in jax.tree.leaves(grads):
        assert (leaf == 0).all()
    # Though it decides the loss.
    assert (
        abs(value(params_of(), teacher_of(2)) - value(params_of(), teacher_of())) > 1e-3
    )


def test_everything_else_learns():
    value, (grads, _) = gradients()
    assert set(grads) == {"encoder", "projector", "predictor"}
    # Constants that a batch norm takes away again.
    idle = {"['encoder']['norm']['bias']", "['projector']['fc2']['bias']"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if jax.tree_util.keystr(path) not in idle:
            assert jnp.abs(leaf).max() > 1e-5, path
    # A difference quotient uphill: the gradient is whole.
    steepness = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))

    def along(step):
        return value(
            jax.tree.map(lambda p, g: p + step / steepness * g, params_of(), grads),
            teacher_of(),
        )

    assert math.isclose((along(0.01) - along(-0.01)) / 0.02, steepness, rel_tol=0.01)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_teacher_follows_the_encoder_and_the_projector(schedule):
    steps, base = 50, 0.9
    cmae = variant(ema=EMA(base=base, schedule=schedule), total_steps=steps)
    random = np.random.RandomState(0)
    walk = np.cumsum(random.standard_normal((steps + 1, 2, 3)), axis=0)

    def student(step):
        encoder, projector = jnp.asarray(walk[step], jnp.float32)
        inner = {"embed": {"kernel": encoder}, "mask_token": 2 * encoder}
        return {"encoder": inner, "projector": projector, "predictor": projector}

    teacher = cmae.teacher(None, student(0), jnp.zeros((), jnp.int32))
    follow, expected = jax.jit(cmae.teacher), walk[0]
    for step in range(steps):  # update s comes after step s of S, s = 1 .. S
        teacher = follow(teacher, student(step + 1), jnp.asarray(step, jnp.int32))
        share = 1 - base
        if schedule == "cosine":
            share *= (1 + math.cos(math.pi * (step + 1) / steps)) / 2
        expected = (1 - share) * expected + share * walk[step + 1]
    assert set(teacher) == {"encoder", "projector"}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(teacher["encoder"]["embed"]["kernel"], expected[0])
    close(teacher["encoder"]["mask_token"], 2 * expected[0])
    close(teacher["projector"], expected[1])


def test_mask_tokens_are_learned_where_they_are_used():
    def names(cmae):
        params, _ = jax.eval_shape(cmae.init, jax.random.key(0), draw_batch(1))
        return params

    params = names(CMAE_TINY)
    assert set(params) == {"encoder", "projector", "predictor"}
    assert params["encoder"]["mask_token"].shape == (1, 1, 16)
    assert params["predictor"]["fc2"]["kernel"].shape == (12, 6)
    dropped = variant(mask_token=False, tokens="avg")
    assert "mask_token" not in names(dropped)["encoder"]
    # Two networks of one shape do not share a key.
    twins = variant(
        projector=Head(hidden=10, out=16), predictor=Head(hidden=10, out=16)
    )

    @jax.jit
    def kernels(key):
        params, _ = twins.init(key, draw_batch(1))
        return [params[name]["fc1"]["kernel"] for name in ("projector", "predictor")]

    one, other = kernels(jax.random.key(0))
    assert one.shape == other.shape and (one != other).all()


@pytest.mark.parametrize(
    "changes, seen",
    [
        (dict(), 16),
        (dict(symmetric=False, t2="independent"), 8),
        (dict(tokens="avg", mask_token=False), 8),
        (dict(tokens="cls", mask_token=False, t2="independent"), 7),
        (dict(tokens="patch+cls"), 16),
        (dict(masking=Nothing(), tokens="avg", mask_token=False), 16),
        (DROPPED, 2),
    ],
)
def test_flops_are_those_of_the_program(changes, seen):
    cmae = variant(contrast="byol", **changes)  # products of tokens are not counted

    def loss(params):
        state = SimpleNamespace(teacher=teacher_of())
        return cmae.loss(params, state, draw_batch(), keys())[0]

    training = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params_of()).jaxpr)
    # No gradient goes into the pixels: by custom that product is counted all the same.
    pixels = 2 * seen * 12 * 16  # of the patches of the views that are online
    assert training / IMAGES == cmae.flops(SHAPE) - pixels


def test_what_represents_an_image():
    params, images = params_of(), draw_batch()["image"]
    view = View(images / 255, Nothing()(keys(), GRID), None)
    tokens = np.asarray(
        encode(params["encoder"], CMAE_TINY.patches(view.images)[0]), np.float64
    )
    for name, feature in [
        ("patch", tokens[:, 1:].mean(axis=1)),
        ("avg", tokens[:, 1:].mean(axis=1)),
        ("patch+cls", tokens[:, 1:].mean(axis=1)),
        ("cls", tokens[:, 0]),
    ]:
        cmae = variant(tokens=name)
        np.testing.assert_allclose(cmae.features(params, images), feature, atol=1e-5)
    assert CMAE_TINY.batch_coupled
    assert CMAE_TINY.frozen == ()
    assert variant(stop_grad_patch_embed=True).frozen == ("encoder/embed",)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(temperature=0.0), "temperature=0.0: want 0.0001 <= temperature"),
        (dict(chunk=0), "chunk=0: want at least 1"),
        (dict(mask_token=False), "see different patches"),
        (dict(mask_token=False, t2="independent"), "see different patches"),
        (DROPPED | dict(symmetric=True), "want symmetric=False"),
        (DROPPED | dict(positions="all"), "positions='online_visible'"),
        (DROPPED | dict(positions="online_masked"), "positions='online_visible'"),
        (DROPPED | dict(tokens="patch+cls"), "want 'patch', 'avg' or 'cls'"),
        (dict(tokens="cls", positions="online_masked"), "want positions='all'"),
        (dict(tokens="patch+cls", positions="online_visible"), "want positions='all'"),
        (
            dict(tokens="avg", cutmix=True, cutmix_tokens="shared_only"),
            "want cutmix_tokens='all'",
        ),
        (
            dict(tokens="avg", negatives="same_image"),
            "compares the patches of an image",
        ),
        (dict(cutmix_tokens="shared_only"), "without cutmix"),
    ],
)
def test_what_cannot_be_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        variant(**changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(predictor=Head(hidden=12, out=7)), "predictor.out=7, projector.out=6"),
        (dict(projector=Head(hidden=0)), "projector.hidden=0"),
        (dict(masking=Random(ratio=0.99)), "ratio=0.99"),
        (dict(t2="independent", t2_masking=Random(ratio=0.99)), "ratio=0.99"),
        (dict(positions="online_masked", masking=Nothing()), "hides nothing is online"),
        (dict(positions="online_masked", t2="identity"), "hides nothing is online"),
        (
            dict(positions="online_masked", t2="independent", t2_masking=Nothing()),
            "hides nothing is online",
        ),
        (dict(encoder=Encoder(patch=3)), "4x8"),
        (dict(mean=(0.5,), std=(0.2,)), "3 channel"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(changes, reason):
    CMAE_TINY.check_shape(SHAPE)
    variant(positions="online_masked", t2="identity", symmetric=False).check_shape(
        SHAPE
    )
    with pytest.raises(ValueError, match=reason):
        variant(**changes).check_shape(SHAPE)


def test_colours_are_refused_for_images_without():
    grey = variant(mean=(0.5,), std=(0.2,))
    grey.check_shape((4, 8, 1))
    with pytest.raises(ValueError, match="jitter.hue"):
        dataclasses.replace(grey, color_jitter="per_view").check_shape((4, 8, 1))
