# SPDX-License-Identifier: Apache-2.0
"""R-MAE: masked autoencoding as learning features that occlusion does not change."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.maskings.base import Masking
from mim_jax.maskings.random import Random
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    AutoEncoder,
    Aux,
    Batch,
    Params,
    Stats,
    apply,
    check_boundary,
)
from mim_jax.objectives.t2 import second_mask, second_visible_count
from mim_jax.ops.boundary import interior, interior_errors
from mim_jax.ops.masking import take, unshuffle
from mim_jax.ops.patches import normalise_patches, patch_mse, to_float
from mim_jax.schema import check_ranges, within


class Branches(NamedTuple):
    """Predictions of both branches, and what the two terms of the loss need besides.

    Attributes:
        first, second: predictions by each branch, at the patches that T1 hides.
        target: the true patches there.
        weights: 1 where T2 sees the patch, else 0.
        constrained: predictions of the second branch that the constraint term reads.
        constraint_target: the target of the constraint term.
        interior: weights of the pixels that T1 hides; None: all count alike.
    """

    first: Float[Array, "b m p"]
    second: Float[Array, "b m p"]
    target: Float[Array, "b m p"]
    weights: Float[Array, "b m"]
    constrained: Float[Array, "b c p"]
    constraint_target: Float[Array, "b c p"]
    interior: Float[Array, "b m q"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMAE(AutoEncoder):
    """Relaxed MAE, Eq. (8) of arXiv:2208.04164, its three variants and their readings.

    T1 and T2 mask the image, and one encoder encodes both results. Let u1 and u2 be the
    decoders' outputs, t the target and w the patches hidden in T1 and visible in T2:
    loss = <(u1 - u2)^2>_w + lam <(u2 - t)^2>_w, where <>_w is the mean over pixels,
    then over the patches w of the batch.

    Attributes:
        encoder, decoder: the two networks.
        masking: T1; the loss compares the patches that it hides.
        t2: what T2 hides: "complement": what T1 shows (R-MAE); "independent": patches
            that `t2_masking` draws (R-MAE dagger); "identity": nothing (double dagger).
        t2_masking: only used by "independent".
        lam: weight of the second term, lambda of Eq. (8), >= 0.
        stop_grad: gradients that are stopped in branch 2. "none": no gradient.
            "distance_t2": the first term's. "t2": both terms' gradients to the encoder;
            the decoder still learns from them.
        share_decoder: one decoder for both branches, phi' = phi.
        constraint_region: patches that the second term counts: "t1_masked": the same
            as the first term; "all": all patches (not with an independent T2).
        ignore_boundary, boundary: as for MAE, in both terms, by the distance from the
            pixels that T1 shows.
        normalise_target: predict patches with their own mean and deviation removed.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    decoder: Decoder = Decoder()
    masking: Masking = Random(ratio=0.75)
    t2: Literal["complement", "independent", "identity"] = "complement"
    t2_masking: Masking = Random(ratio=0.25)
    lam: float = within(1.0, least=0, most=1e6)
    stop_grad: Literal["none", "distance_t2", "t2"] = "none"
    share_decoder: bool = True
    constraint_region: Literal["t1_masked", "all"] = "t1_masked"
    normalise_target: bool = True
    ignore_boundary: int = within(0, least=0, most=2**13)
    boundary: Literal["hard", "soft"] = "hard"
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    def __post_init__(self):
        check_ranges(self)
        if self.t2 == "independent" and self.constraint_region == "all":
            raise ValueError(
                "constraint_region='all' with t2='independent': the two terms would "
                "count different patches in every image; want 't1_masked', or another "
                "t2"
            )
        if self.ignore_boundary and self.constraint_region == "all":
            raise ValueError(
                f"ignore_boundary={self.ignore_boundary} with constraint_region='all', "
                "which also counts patches that T1 shows: want 't1_masked', or "
                "ignore_boundary=0"
            )

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_networks(image_shape)
        grid = self.grid(image_shape)
        if self.masking.visible_count(grid) == grid.size:
            raise ValueError("masking='none' hides nothing: R-MAE needs hidden patches")
        soft = self.boundary == "soft"
        check_boundary(self.masking, grid, self.ignore_boundary, soft)
        if self.t2 == "independent":
            self.t2_masking.visible_count(grid)

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        params = self.init_networks(key, batch)
        if not self.share_decoder:
            other = self.init_networks(jax.random.fold_in(key, 2), batch)
            params["decoder2"] = other["decoder"]
        return params, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        branches = self.branches(params, batch, keys, state)
        distance, constraint = self.terms(branches)
        # With an independent T2, an image may have no patch that is hidden in T1 and
        # visible in T2; a whole batch without one is very unlikely.
        weight = _weight(branches)
        metrics = {"distance": distance, "constraint": constraint}
        loss = distance + self.lam * constraint
        return loss, Aux(weight=weight, stats={}, metrics=metrics)

    def branches(
        self,
        params: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        state: Any = None,
    ) -> Branches:
        """Both branches on a batch; `keys` and `state` as for `loss`."""
        patches, grid = self.patches(to_float(batch["image"]))
        mask1 = self.mask(batch, keys, state)
        mask2 = second_mask(self.t2, self.t2_masking, mask1, batch, keys, grid)
        tokens1, _ = apply(self.encoder, params["encoder"], patches, grid, mask1.keep)
        tokens2, _ = apply(self.encoder, params["encoder"], patches, grid, mask2.keep)
        if self.stop_grad == "t2":
            tokens2 = jax.lax.stop_gradient(tokens2)
        outputs = patches.shape[-1]
        first = apply(
            self.decoder, params["decoder"], tokens1, mask1, grid, outputs
        ).astype(patches.dtype)
        direct = self._direct
        second = apply(
            self.decoder,
            params["decoder" if self.share_decoder else "decoder2"],
            tokens2,
            mask2,
            grid,
            outputs,
            predict="visible" if direct else "all",
        ).astype(patches.dtype)
        target = take(patches, mask1.drop)
        if self.normalise_target:
            target = normalise_patches(target)
        weights = jnp.ones(first.shape[:2], patches.dtype)
        inner = None
        if self.ignore_boundary:
            soft = self.boundary == "soft"
            inner = interior(mask1, grid, self.ignore_boundary, soft)
        if direct:
            return Branches(first, second, target, weights, second, target, inner)
        everywhere = unshuffle(second, mask2)
        second = take(everywhere, mask1.drop)
        if self.t2 == "independent":
            seen = jnp.take_along_axis(~mask2.hidden, mask1.drop, axis=1)
            weights = seen.astype(patches.dtype)
        if self.constraint_region == "all":
            if self.normalise_target:
                patches = normalise_patches(patches)
            return Branches(first, second, target, weights, everywhere, patches)
        return Branches(first, second, target, weights, second, target, inner)

    def terms(self, branches: Branches) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Distance and constraint, the two terms of Eq. (8) without lambda."""
        second = branches.second
        if self.stop_grad == "distance_t2":
            second = jax.lax.stop_gradient(second)
        distance = _mean_error(branches.first, second, branches)
        constraint = branches.constrained, branches.constraint_target
        if self.constraint_region == "all":
            return distance, patch_mse(*constraint).mean()
        return distance, _mean_error(*constraint, branches)

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        grid = self.grid(image_shape)
        visible = self.masking.visible_count(grid)
        other = second_visible_count(self.t2, self.t2_masking, visible, grid)
        channels = image_shape[2]
        encoders = self.encoder.flops(visible, channels)
        encoders += self.encoder.flops(other, channels)
        predicted = grid.size - visible if self._direct else grid.size
        decoders = self.decoder_flops(visible, image_shape)
        decoders += self.decoder_flops(other, image_shape, predicted)
        return 3 * (encoders + decoders)

    @property
    def _direct(self) -> bool:
        """Whether branch 2 predicts only the patches that it sees.

        With complementary masks `mask2.keep` is `mask1.drop`: the same patches in the
        same order.
        """
        return self.t2 == "complement" and self.constraint_region != "all"


def _mean_error(prediction, target, branches: Branches) -> Float[Array, ""]:
    """Weighted mean of the squared error over the patches that both terms count."""
    if branches.interior is None:
        errors = patch_mse(prediction, target)
    else:
        errors, _ = interior_errors(prediction, target, branches.interior)
    return (branches.weights * errors).sum() / jnp.maximum(_weight(branches), 1)


def _weight(branches: Branches) -> Float[Array, ""]:
    """Sum of the weights of patches, or of their pixels if these have weights."""
    if branches.interior is None:
        return branches.weights.sum()
    by_patch = branches.interior.astype(branches.weights.dtype).sum(axis=-1)
    return (branches.weights * by_patch).sum()
