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

from mim_jax.maskings.base import Masking
from mim_jax.maskings.none import Nothing
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.rmae import RMAE, Branches
from mim_jax.objectives.t2 import second_mask
from mim_jax.ops.masking import Mask, from_hidden, take
from mim_jax.ops.patches import Grid

# Nothing square, nothing a default: 6 x 8 pixels of two channels, patches of 2.
SHAPE = (6, 8, 2)
GRID = Grid(rows=3, cols=4, patch=2)
IMAGES = 3
MEAN, STD = (0.5, 0.4), (0.2, 0.3)
NETWORKS = dict(
    encoder=Encoder(patch=2, width=16, depth=1, heads=2),
    decoder=Decoder(width=12, depth=1, heads=3),
    mean=MEAN,
    std=STD,
)
COMPLEMENT = RMAE(**NETWORKS)
DAGGER = dataclasses.replace(COMPLEMENT, t2="independent")
IDENTITY = dataclasses.replace(COMPLEMENT, t2="identity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed(Masking):
    """Hides the patches it is told to."""

    hidden: tuple[tuple[int, ...], ...]

    def visible_count(self, grid):
        return grid.size - len(self.hidden[0])

    def __call__(self, keys, grid):
        return from_hidden(flags(self.hidden))


def flags(hidden):
    rows = np.zeros((len(hidden), GRID.size), bool)
    for row, patches in zip(rows, hidden, strict=True):
        row[list(patches)] = True
    return rows


# What T1 hides (9 of 12) and what an independent T2 hides (3): of one image T2 sees all
# that T1 hides, of one all but one, of one all but three.
T1 = tuple(
    tuple(i for i in range(12) if i not in v)
    for v in [(0, 5, 7), (1, 2, 11), (6, 8, 9)]
)
T2 = ((0, 5, 7), (2, 4, 11), (0, 1, 10))
H1, H2 = flags(T1), flags(T2)
SHARED = [9, 8, 6]
FIXED = dataclasses.replace(DAGGER, t2_masking=Fixed(hidden=T2))


def draw_batch(count=IMAGES, seed=0):
    images = np.random.RandomState(seed).randint(0, 256, (count, *SHAPE))
    return {"image": jnp.asarray(images, jnp.uint8)}


def given(**changes):
    """A batch with T1's mask, in an order of its own."""
    mask = from_hidden(H1)
    mask = Mask(keep=mask.keep[:, ::-1], drop=jnp.roll(mask.drop, 4, axis=1))
    return draw_batch() | {"mask": mask} | changes


def keys(count=IMAGES, seed=1):
    return jax.random.split(jax.random.key(seed), count)


@functools.cache
def params_of(share_decoder=True, seed=0, scale=1.0):
    """Parameters of which none is neutral."""
    rmae = dataclasses.replace(COMPLEMENT, share_decoder=share_decoder)
    params, stats = jax.eval_shape(rmae.init, jax.random.key(0), draw_batch(1))
    assert stats == {}
    random = np.random.RandomState(seed)

    def leaf(like):
        spread = scale / math.sqrt(like.shape[0])
        return jnp.asarray(spread * random.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, params)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(objective, params, batch, keys):
    loss, aux = objective.loss(params, None, batch, keys)
    return loss, (aux.weight, aux.metrics)


@functools.partial(jax.jit, static_argnums=0)
def gradient_of(objective, params, batch, keys):
    return jax.grad(lambda params: objective.loss(params, None, batch, keys)[0])(params)


def numpy_patches(batch):
    """Standardised patches, by loops, in float64."""
    images = np.asarray(batch["image"], np.float64) / 255
    images = (images - np.array(MEAN)) / np.array(STD)
    cut = [
        images[:, row : row + 2, col : col + 2].reshape(len(images), -1)
        for row in range(0, 6, 2)
        for col in range(0, 8, 2)
    ]
    return np.stack(cut, axis=1)


def targets(patches, normalise_target=True):
    if not normalise_target:
        return patches
    centred = patches - patches.mean(axis=-1, keepdims=True)
    variance = (centred**2).sum(axis=-1, keepdims=True) / (patches.shape[-1] - 1)
    return centred / np.sqrt(variance + 1e-6)


def decode(encoder, decoder, patches, hidden):
    """u in grid order: the decoding of what is left when `hidden` is hidden."""
    count = int(hidden[0].sum())
    order = jnp.asarray(np.argsort(hidden, axis=1, kind="stable"), jnp.int32)
    mask = Mask(order[:, : 12 - count], order[:, 12 - count :])
    tokens, _ = NETWORKS["encoder"].apply({"params": encoder}, patches, GRID, mask.keep)
    out = NETWORKS["decoder"].apply(
        {"params": decoder}, tokens, mask, GRID, patches.shape[-1], "all"
    )
    rows = jnp.arange(len(hidden))[:, None]
    return jnp.zeros_like(out).at[rows, order].set(out)


@functools.cache
def decodings(hidden, second=False):
    """`decode` of the batch, in numpy."""
    params = params_of(share_decoder=False)
    patches = jnp.asarray(numpy_patches(draw_batch()), jnp.float32)
    out = jax.jit(
        lambda params, patches: decode(
            params["encoder"],
            params["decoder2" if second else "decoder"],
            patches,
            flags(hidden),
        )
    )(params, patches)
    return np.asarray(out, np.float64)


NOTHING = ((),) * IMAGES
BY_T2 = {
    "complement": tuple(tuple(np.flatnonzero(~row).tolist()) for row in H1),
    "independent": T2,
    "identity": NOTHING,
}


@pytest.mark.parametrize(
    "changes",
    [
        dict(t2="complement"),
        dict(t2="independent", lam=0.3),
        dict(t2="identity"),
        dict(t2="complement", constraint_region="all", lam=2.0),
        dict(t2="identity", constraint_region="all"),
        dict(t2="complement", share_decoder=False),
        dict(t2="independent", share_decoder=False, normalise_target=False),
    ],
)
def test_loss_by_loops(changes):
    rmae = dataclasses.replace(FIXED, **changes)
    first = decodings(T1)
    second = decodings(BY_T2[rmae.t2], second=not rmae.share_decoder)
    target = targets(numpy_patches(draw_batch()), rmae.normalise_target)
    hidden2 = flags(BY_T2[rmae.t2])
    distances, constraints = [], []
    for b in range(IMAGES):
        for i in range(GRID.size):
            counts = H1[b, i] and not hidden2[b, i]
            if counts:
                distances.append(np.mean((first[b, i] - second[b, i]) ** 2))
            if counts or rmae.constraint_region == "all":
                constraints.append(np.mean((second[b, i] - target[b, i]) ** 2))
    assert len(distances) == (sum(SHARED) if rmae.t2 == "independent" else 27)
    params = params_of(share_decoder=False)
    loss, (weight, metrics) = loss_of(rmae, params, given(), keys())
    distance, constraint = np.mean(distances), np.mean(constraints)
    assert math.isclose(loss, distance + rmae.lam * constraint, rel_tol=1e-5)
    assert math.isclose(metrics["distance"], distance, rel_tol=1e-5)
    assert math.isclose(metrics["constraint"], constraint, rel_tol=1e-5)
    assert weight == len(distances)


class Perfect(Decoder):
    """Predicts the target exactly."""

    target: Any = None

    def apply(self, variables, tokens, mask, grid, outputs, predict="hidden"):
        index = dict(hidden=mask.drop, visible=mask.keep)
        index["all"] = jnp.concatenate([mask.keep, mask.drop], axis=1)
        return take(self.target, index[predict])


@pytest.mark.parametrize("t2", BY_T2)
@pytest.mark.parametrize("constraint_region", ["t1_masked", "all"])
def test_two_true_branches_have_no_loss(t2, constraint_region):
    if (t2, constraint_region) == ("independent", "all"):
        return
    target = jnp.asarray(targets(numpy_patches(draw_batch())), jnp.float32)
    changes = dict(t2=t2, constraint_region=constraint_region)
    rmae = dataclasses.replace(FIXED, decoder=Perfect(target=target), **changes)
    loss, _ = jax.jit(rmae.loss)(params_of(), None, given(), keys())
    assert loss < 1e-10


@pytest.mark.parametrize("t2", BY_T2)
def test_mae_is_the_second_branch_replaced_by_the_target(t2):
    rmae = dataclasses.replace(FIXED, t2=t2, lam=0.0)
    mae = MAE(**NETWORKS)

    @jax.jit
    def compute(params, batch):
        branches = rmae.branches(params, batch, keys())
        distance, constraint = rmae.terms(branches._replace(second=branches.target))
        mae_loss, _ = mae.loss(params, None, batch, keys())
        terms = rmae.terms(branches)
        return (
            branches,
            distance,
            terms,
            mae_loss,
            rmae.loss(params, None, batch, keys()),
        )

    # By its own mask, drawn from the same keys, unless T2 leaves something out.
    batch = given() if t2 == "independent" else draw_batch()
    for seed, scale in enumerate([1.0, 0.03, 10.0]):
        params = params_of(seed=seed, scale=scale)
        branches, distance, terms, mae_loss, (loss, _) = compute(params, batch)
        if t2 == "independent":  # MAE's loss on the patches that count
            errors = np.asarray((branches.first - branches.target) ** 2).mean(axis=-1)
            mae_loss = np.average(errors, weights=branches.weights)
        assert math.isclose(distance, mae_loss, rel_tol=1e-6)
        assert math.isclose(loss, terms[0], rel_tol=1e-6)  # lambda is 0
        # (a + b)^2 <= 2 (a^2 + b^2)
        assert 0 < mae_loss <= 2 * sum(terms)


def test_the_bound_is_met_half_way():
    random = np.random.RandomState(0)
    first, target = (
        jnp.asarray(random.standard_normal((3, 9, 8)), jnp.float32) for _ in range(2)
    )
    weights = jnp.asarray(random.uniform(size=(3, 9)) < 0.7, jnp.float32)
    middle = (first + target) / 2
    distance, constraint = COMPLEMENT.terms(
        Branches(first, middle, target, weights, middle, target)
    )
    mae = ((first - target) ** 2).mean(axis=-1)
    mae = (weights * mae).sum() / weights.sum()
    assert math.isclose(2 * (distance + constraint), mae, rel_tol=1e-5)


@functools.cache
def branch_gradients():
    """Gradients of both terms by each branch's own copy of the parameters.

    Keys: ("distance", 1), ("distance", 2), ("constraint", 2).
    """
    patches = jnp.asarray(numpy_patches(draw_batch()), jnp.float32)
    target = jnp.asarray(targets(numpy_patches(draw_batch())), jnp.float32)

    def mean(error):
        return (error**2).mean(axis=-1)[np.nonzero(H1)].mean()

    def terms(one, other):
        first = decode(one["encoder"], one["decoder"], patches, H1)
        second = decode(other["encoder"], other["decoder"], patches, ~H1)
        return mean(first - second), mean(second - target)

    @jax.jit
    def compute(params):
        _, pull = jax.vjp(terms, params, params)
        distance, constraint = pull((1.0, 0.0)), pull((0.0, 1.0))
        return {
            ("distance", 1): distance[0],
            ("distance", 2): distance[1],
            ("constraint", 2): constraint[1],
        }

    return compute(params_of())


LAM = 0.7


@functools.cache
def total_gradient(**changes):
    changes = dict(lam=LAM) | changes
    rmae = dataclasses.replace(COMPLEMENT, **changes)
    params = params_of()
    if not rmae.share_decoder:
        params = params | {"decoder2": params["decoder"]}
    return gradient_of(rmae, params, given(), keys())


def add(*scaled):
    """The sum of trees, each with its factor."""
    return jax.tree.map(
        lambda *leaves: sum(
            factor * np.asarray(leaf, np.float64)
            for (factor, _), leaf in zip(scaled, leaves, strict=True)
        ),
        *(tree for _, tree in scaled),
    )


def assert_trees_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            mine, theirs, rtol=0, atol=tolerance * largest, err_msg=str(path)
        )


def largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def test_both_branches_learn_and_lambda_weighs_the_second_term():
    parts = branch_gradients()
    for part in parts.values():
        assert largest(part["encoder"]) > 1e-3 and largest(part["decoder"]) > 1e-2
    expected = add(
        (1, parts["distance", 1]),
        (1, parts["distance", 2]),
        (LAM, parts["constraint", 2]),
    )
    assert_trees_close(total_gradient(), expected)


def test_the_distance_can_spare_the_second_branch():
    parts = branch_gradients()
    expected = add((1, parts["distance", 1]), (LAM, parts["constraint", 2]))
    assert_trees_close(total_gradient(stop_grad="distance_t2"), expected)


def test_the_second_branch_can_leave_the_encoder_alone():
    parts = branch_gradients()
    actual = total_gradient(stop_grad="t2")
    assert_trees_close(actual["encoder"], parts["distance", 1]["encoder"])
    assert_trees_close(actual["decoder"], total_gradient()["decoder"])


def test_a_decoder_of_its_own_learns_from_the_second_branch_alone():
    parts = branch_gradients()
    actual = total_gradient(share_decoder=False)
    second = add((1, parts["distance", 2]), (LAM, parts["constraint", 2]))
    assert_trees_close(actual["decoder2"], second["decoder"])
    assert_trees_close(actual["decoder"], parts["distance", 1]["decoder"])
    assert_trees_close(actual["encoder"], total_gradient()["encoder"])


def test_forced_masks_turn_dagger_into_its_sisters():
    params, batch = params_of(share_decoder=False), given()
    for t2, masking in [
        ("complement", Fixed(hidden=BY_T2["complement"])),
        ("identity", Nothing()),
    ]:
        sister = dataclasses.replace(FIXED, t2=t2)
        forced = dataclasses.replace(DAGGER, t2_masking=masking)
        expected, (weight, _) = loss_of(sister, params, batch, keys())
        loss, (same, _) = loss_of(forced, params, batch, keys())
        assert math.isclose(loss, expected, rel_tol=1e-6), t2
        assert weight == same == 27


def test_images_of_unequal_counts_add_up():
    """The mean over a batch is that of its images, each with its own weight."""
    params, batch = params_of(), draw_batch(4)
    whole, (total, metrics) = loss_of(DAGGER, params, batch, keys(4))
    shares, losses, distances = [], [], []
    for i in range(4):
        part = {"image": batch["image"][i : i + 1]}
        loss, (weight, own) = loss_of(DAGGER, params, part, keys(4)[i : i + 1])
        losses.append(float(loss))
        shares.append(float(weight))
        distances.append(float(own["distance"]))
    assert len(set(shares)) > 1 and all(6 <= share <= 9 for share in shares)
    assert sum(shares) == total
    assert math.isclose(whole, np.average(losses, weights=shares), rel_tol=1e-6)
    mean = np.average(distances, weights=shares)
    assert math.isclose(metrics["distance"], mean, rel_tol=1e-6)


def test_independent_masks_share_what_chance_lets_them():
    """A hypergeometric count: 110.25 of 196 on average, deviation 2.63."""
    rmae = dataclasses.replace(DAGGER, encoder=Encoder(patch=1))
    batch, chain = {"image": jnp.zeros((1000, 14, 14, 2), jnp.uint8)}, keys(1000)
    mask = rmae.mask(batch, chain)
    other = second_mask(rmae.t2, rmae.t2_masking, mask, batch, chain, Grid(14, 14, 1))
    shared = np.sum(np.asarray(mask.hidden & ~other.hidden), axis=1)
    assert mask.drop.shape[1] == 147 and other.drop.shape[1] == 49
    assert shared.min() >= 98 and shared.max() <= 147
    assert abs(shared.mean() - 110.25) < 5 * 2.63 / math.sqrt(1000)
    assert abs(shared.std() - 2.63) < 5 * 2.63 / math.sqrt(2000)


def test_pixels_that_neither_branch_sees_do_not_count():
    params, batch = params_of(), given()
    loss, _ = loss_of(FIXED, params, batch, keys())

    def change(image, patch):
        row, col = divmod(patch, GRID.cols)
        images = np.array(batch["image"])
        images[image, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] ^= 255
        changed = given(image=jnp.asarray(images))
        return loss_of(FIXED, params, changed, keys())[0] != loss

    kinds = {}
    for image in range(IMAGES):
        for patch in range(GRID.size):
            kind = bool(H1[image, patch]), bool(H2[image, patch])
            kinds.setdefault(kind, []).append(change(image, patch))
    assert {kind: len(seen) for kind, seen in kinds.items()} == {
        (True, True): 4,
        (True, False): 23,
        (False, True): 5,
        (False, False): 4,
    }
    assert not any(kinds.pop((True, True)))
    assert all(map(all, kinds.values()))


def test_decoders_of_their_own_start_apart():
    assert set(params_of()) == {"encoder", "decoder"}
    assert set(params_of(share_decoder=False)) == {"encoder", "decoder", "decoder2"}
    rmae = dataclasses.replace(COMPLEMENT, share_decoder=False)

    @jax.jit
    def kernels(key):
        params, _ = rmae.init(key, draw_batch(1))
        return [params[name]["predict"]["kernel"] for name in ("decoder", "decoder2")]

    one, other = kernels(jax.random.key(0))
    assert one.shape == other.shape and (one != other).all()


@pytest.mark.parametrize(
    "changes",
    [
        dict(t2="complement"),
        dict(t2="complement", constraint_region="all"),
        dict(t2="identity"),
        dict(t2="independent"),
    ],
)
def test_flops_are_those_of_the_program(changes):
    deep = COMPLEMENT.encoder.clone(depth=2)
    rmae = dataclasses.replace(DAGGER, encoder=deep, **changes)
    params, _ = jax.eval_shape(rmae.init, jax.random.key(0), draw_batch(1))

    def loss(params, batch, keys):
        return rmae.loss(params, None, batch, keys)[0]

    program = jax.make_jaxpr(loss)(params, draw_batch(1), keys(1))
    assert 3 * matmul_flops(program.jaxpr) == rmae.flops(SHAPE)


def test_rmae_has_no_teacher():
    step = jnp.zeros((), jnp.int32)
    assert COMPLEMENT.teacher(None, params_of(), step) is None


def test_what_cannot_be_is_refused():
    COMPLEMENT.check_shape(SHAPE)
    for lam in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"lam={lam}: want 0 <= lam"):
            RMAE(lam=lam)
    with pytest.raises(ValueError, match="constraint_region='all'"):
        RMAE(t2="independent", constraint_region="all")
    with pytest.raises(ValueError, match="masking='none' hides nothing"):
        dataclasses.replace(COMPLEMENT, masking=Nothing()).check_shape(SHAPE)
    coarse = Random(ratio=0.25, unit=6)
    dataclasses.replace(COMPLEMENT, t2_masking=coarse).check_shape(SHAPE)
    with pytest.raises(ValueError, match="unit=6"):
        dataclasses.replace(DAGGER, t2_masking=coarse).check_shape(SHAPE)
    with pytest.raises(ValueError, match="7x8"):
        COMPLEMENT.check_shape((7, 8, 2))
    with pytest.raises(ValueError, match="decoder.width"):
        dataclasses.replace(COMPLEMENT, decoder=Decoder(width=14)).check_shape(SHAPE)


@pytest.mark.parametrize("rmae", [COMPLEMENT, FIXED], ids=["complement", "dagger"])
def test_pixels_near_the_boundary_count_less_in_both_terms(rmae):
    rmae = dataclasses.replace(rmae, ignore_boundary=1, boundary="soft")
    params = params_of()

    @jax.jit
    def parts(params):
        return rmae.branches(params, given(), keys()), rmae.loss(
            params, None, given(), keys()
        )

    branches, (loss, aux) = parts(params)
    first, second, target = (
        np.asarray(one, np.float64).reshape(IMAGES, 9, 4, 2)
        for one in (branches.first, branches.second, branches.target)
    )
    sums = np.zeros(3)
    for row, drop in enumerate(np.asarray(given()["mask"].drop)):
        near = np.minimum(by_patch(distances(H1[row], GRID), drop, GRID), 2) / 2
        if rmae.t2 == "independent":
            near = near * ~H2[row][drop][:, None]
        for i, pair in enumerate(((first, second), (second, target))):
            errors = (pair[0][row] - pair[1][row]) ** 2
            sums[i] += (near * errors.mean(axis=2)).sum()
        sums[2] += near.sum()
    assert aux.weight == pytest.approx(sums[2])
    assert aux.metrics["distance"] == pytest.approx(sums[0] / sums[2], rel=1e-5)
    assert aux.metrics["constraint"] == pytest.approx(sums[1] / sums[2], rel=1e-5)
    assert loss == pytest.approx((sums[0] + sums[1]) / sums[2], rel=1e-5)


def test_a_boundary_is_one_of_hidden_patches():
    with pytest.raises(ValueError, match="ignore_boundary=1 with constraint_region"):
        dataclasses.replace(COMPLEMENT, ignore_boundary=1, constraint_region="all")
    deep = dataclasses.replace(COMPLEMENT, ignore_boundary=1)
    with pytest.raises(ValueError, match="ignore_boundary=1 of masks made of squares"):
        deep.check_shape(SHAPE)
