# SPDX-License-Identifier: Apache-2.0
"""C-MAE: occlusion-invariant features learned by comparing two masked views."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mim_jax.maskings.base import Masking
from mim_jax.maskings.random import Random
from mim_jax.models.heads import Head, check_heads, init_heads
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Objective,
    Params,
    Stats,
    apply,
    first_mask,
    purpose,
)
from mim_jax.objectives.t2 import second_mask, second_visible_count
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.contrastive import Negatives, cosine_distance, info_nce
from mim_jax.ops.ema import EMA
from mim_jax.ops.masking import Mask, masks_of, unshuffle
from mim_jax.ops.mix import cutmix
from mim_jax.ops.patches import Grid, patchify, to_float
from mim_jax.schema import check_ranges, internal, within


class View(NamedTuple):
    """One view of a batch, as a branch sees it.

    Attributes:
        images: in 0..1, after the view's own augmentation.
        mask: which patches are hidden.
        pasted: True at patches that show another image, or None.
    """

    images: Float[Array, "b h w c"]
    mask: Mask
    pasted: Bool[Array, "b n"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMAE(Objective):
    """Contrastive MAE, Eq. (9) to (11) of arXiv:2208.04164, and its ablations.

    T1 and T2 mask two views of one crop; each view has its own colour jitter. The
    online branch is encoder, projector and predictor. The target branch is a moving
    average of encoder and projector and gets no gradient. The loss compares token q_i
    of one view with token k_i of the other.

    Attributes:
        encoder: the network that is learned.
        projector, predictor: heads, applied to every token.
        masking: T1.
        t2: what T2 hides: the "complement" of what T1 hides, patches that `t2_masking`
            draws ("independent"), or nothing ("identity"). If `masking` hides nothing,
            T2 hides nothing.
        t2_masking: only used by "independent".
        mask_token: True: a learned token replaces hidden patches. False: they are
            dropped, so that the two views share only positions that both see.
        contrast: "infonce", or "byol", which has no negatives (table 4).
        tokens: what is compared: "patch" tokens, the "cls" token, the "avg" of patch
            tokens before the heads (without mask tokens, of the visible patches), or
            "patch+cls" (table 3).
        negatives: keys of the "same_position" in all images of the global batch, of
            all positions in the "same_image", or "all" keys.
        positions: patch tokens that the loss counts: "all", or those that are hidden
            ("online_masked") or visible ("online_visible") in the online view.
        symmetric: True: mean of both directions. False: view 1 is online, as Eq. (11)
            literally says.
        temperature: tau of Eq. (9).
        loss_scale: "2tau" multiplies by twice the temperature, as MoCo v3 does.
        chunk: number of positions compared at a time; memory grows with it.
        color_jitter: "per_view" jitters the colours of each view separately.
        jitter: strength of the jitter.
        cutmix: paste a box of another image into each view (table 5).
        cutmix_tokens: "shared_only" leaves out positions pasted in either view.
        ema: momentum of the target branch.
        stop_grad_patch_embed: keep the patch embedding at its first values.
        mean, std: of the data, per channel, for pixels in 0..1.
        total_steps: steps of the run; `for_run` sets it.
    """

    encoder: Encoder = Encoder(**SIZES["B"])
    projector: Head = Head()
    predictor: Head = Head()
    masking: Masking = Random(ratio=0.75)
    t2: Literal["complement", "independent", "identity"] = "complement"
    t2_masking: Masking = Random(ratio=0.75)
    mask_token: bool = True
    contrast: Literal["infonce", "byol"] = "infonce"
    tokens: Literal["patch", "cls", "avg", "patch+cls"] = "patch"
    negatives: Negatives = "same_position"
    positions: Literal["all", "online_masked", "online_visible"] = "all"
    symmetric: bool = True
    temperature: float = within(0.2, least=1e-4, most=1e4)
    loss_scale: Literal["1", "2tau"] = "1"
    chunk: int = within(14, least=1)
    color_jitter: Literal["per_view", "none"] = "per_view"
    jitter: ColorJitter = ColorJitter()
    cutmix: bool = False
    cutmix_tokens: Literal["all", "shared_only"] = "all"
    ema: EMA = EMA()
    stop_grad_patch_embed: bool = False
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)
    total_steps: int = internal(1)

    def __post_init__(self):
        check_ranges(self)
        by_patch = self.tokens in ("patch", "patch+cls")
        if not self.mask_token and by_patch and self.t2 != "identity":
            raise ValueError(
                f"tokens={self.tokens!r} with mask_token=False and t2={self.t2!r}: the "
                "two views see different patches, so there are no two tokens of one "
                "position to compare; want tokens='avg' or 'cls', or t2='identity', or "
                "mask_token=True"
            )
        if not self.mask_token and by_patch:
            if self.symmetric or self.positions != "online_visible":
                raise ValueError(
                    f"symmetric={self.symmetric}, positions={self.positions!r} with "
                    "mask_token=False: the masked view has tokens only where it sees, "
                    "and only as the online one; want symmetric=False and "
                    "positions='online_visible'"
                )
            if self.tokens != "patch":
                raise ValueError(
                    f"tokens={self.tokens!r} with mask_token=False: want 'patch', "
                    "'avg' or 'cls'"
                )
        if self.tokens != "patch":
            for name, value, plain in (
                ("positions", self.positions, "all"),
                ("cutmix_tokens", self.cutmix_tokens, "all"),
            ):
                if value != plain:
                    raise ValueError(
                        f"{name}={value!r} with tokens={self.tokens!r}: it chooses "
                        f"among patch tokens; want {name}={plain!r}, or tokens='patch'"
                    )
            if self.negatives == "same_image" and self.contrast == "infonce":
                raise ValueError(
                    f"negatives='same_image' with tokens={self.tokens!r}: it compares "
                    "the patches of an image; want tokens='patch', or "
                    "negatives='same_position'"
                )
        if self.cutmix_tokens != "all" and not self.cutmix:
            raise ValueError("cutmix_tokens='shared_only' without cutmix: want 'all'")

    @property
    def batch_coupled(self) -> bool:
        # The batch norm of the heads couples examples even where the loss does not.
        return True

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("encoder/embed",) if self.stop_grad_patch_embed else ()

    @property
    def occlusion(self) -> Literal["drop", "mask_token"]:
        return "mask_token" if self.mask_token else "drop"

    @property
    def feature(self) -> Literal["cls", "avg"]:
        # Unless the loss compares the class token, that token is not trained.
        return "cls" if self.tokens == "cls" else "avg"

    def for_run(self, total_steps: int) -> "CMAE":
        return dataclasses.replace(self, total_steps=total_steps)

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        grid = self.grid(image_shape)
        check_heads(self.projector, self.predictor)
        if self.color_jitter != "none":
            self.jitter.check_channels(image_shape[2])
        visible = [self.masking.visible_count(grid), self._second_visible_count(grid)]
        if (
            self.positions == "online_masked"
            and grid.size in visible[: 1 + self.symmetric]
        ):
            raise ValueError(
                "positions='online_masked' where a view that hides nothing is online: "
                "none of its positions would count; want positions='all', or "
                "symmetric=False if it is the second view"
            )

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        grid = self.grid(batch["image"].shape[1:])
        mask = first_mask(grid, self.masking.visible_count(grid))
        encoder_key, projector_key, predictor_key = jax.random.split(key, 3)
        tokens, encoder = self.init_encoder(encoder_key, batch, mask)
        heads = init_heads(
            self.projector, self.predictor, (projector_key, predictor_key), tokens
        )
        return {"encoder": encoder, **heads}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        views = self.views(batch, keys, state)
        online, target = views
        loss = self._direction(params, state.teacher, online, target)
        if self.symmetric:
            other = self._direction(params, state.teacher, target, online)
            loss = 0.5 * (loss + other)
        if self.loss_scale == "2tau":
            loss = loss * (2 * self.temperature)
        weight = jnp.asarray(keys.shape[0], loss.dtype)
        return loss, Aux(weight=weight, stats={}, metrics={})

    def views(
        self, batch: Batch, keys: Key[Array, " b"], state: Any = None
    ) -> tuple[View, View]:
        """Both views of a batch; `keys` and `state` as for `loss`."""
        images = to_float(batch["image"])
        grid = self.grid(images.shape[1:])
        mask1 = masks_of(self.masking, batch, keys, grid, state)
        mask2 = second_mask(self.t2, self.t2_masking, mask1, batch, keys, grid)
        views = []
        for number, mask in enumerate((mask1, mask2)):
            seen, pasted = images, None
            if self.color_jitter != "none":
                seen = self.jitter(seen, purpose(keys, 10 + number))
            if self.cutmix:
                # Each view has another partner, so that pasted tokens never match.
                seen, box = cutmix(seen, purpose(keys, 20 + number), partner=1 + number)
                pasted = patchify(box[..., None], grid.patch).any(axis=-1)
            views.append(View(seen, mask, pasted))
        return views[0], views[1]

    def _second_visible_count(self, grid: Grid) -> int:
        visible = self.masking.visible_count(grid)
        return second_visible_count(self.t2, self.t2_masking, visible, grid)

    def _direction(
        self, params: Params, teacher: Params, online: View, target: View
    ) -> Float[Array, ""]:
        """Loss with view `online` in the online branch and `target` in the target
        branch."""
        query = self._projected(params, online)
        query = apply(self.predictor, params["predictor"], query)
        key = jax.lax.stop_gradient(self._projected(teacher, target))
        weights = self._weights(online, target)
        if query.shape[1] < key.shape[1]:
            # The query has visible patches only: put each at its place in the grid.
            rest = jnp.zeros((query.shape[0], online.mask.drop.shape[1], key.shape[2]))
            query = jnp.concatenate([query, rest.astype(query.dtype)], axis=1)
            query = unshuffle(query, online.mask)
        if self.contrast == "byol":
            each = cosine_distance(query, key)
        else:
            each = info_nce(query, key, self.temperature, self.negatives, self.chunk)
        if weights is None:
            return each.mean()
        weights = weights.astype(each.dtype)
        return (weights * each).sum() / jnp.maximum(weights.sum(), 1)

    def _projected(self, params: Params, view: View) -> Float[Array, "b m d"]:
        tokens, _ = self.encode_masked(params, view.images, view.mask)
        if self.tokens == "cls":
            tokens = tokens[:, :1]
        elif self.tokens == "avg":
            tokens = tokens[:, 1:].mean(axis=1, keepdims=True)
        elif self.tokens == "patch":
            tokens = tokens[:, 1:]
        return apply(self.projector, params["projector"], tokens)

    def _weights(self, online: View, target: View) -> Bool[Array, "b n"] | None:
        """True at the patch tokens that the loss counts; None: all."""
        weights = None
        if self.positions != "all":
            hidden = online.mask.hidden
            weights = hidden if self.positions == "online_masked" else ~hidden
        if online.pasted is not None and target.pasted is not None:
            if self.cutmix_tokens == "all":
                return weights
            shared = ~(online.pasted | target.pasted)
            weights = shared if weights is None else weights & shared
        return weights

    def teacher(self, old: Params | None, params: Params, step: Array) -> Params:
        new = {name: params[name] for name in ("encoder", "projector")}
        return self.ema.update(old, new, step + 1, self.total_steps)

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        channels, grid = image_shape[2], self.grid(image_shape)
        total = 0.0
        visible, other = (
            self.masking.visible_count(grid),
            self._second_visible_count(grid),
        )
        sizes = (visible, other) if not self.mask_token else (grid.size, grid.size)
        heads = self.projector.flops(self.encoder.width)
        after = self.predictor.flops(self.projector.out)
        for online, target in (sizes, sizes[::-1])[: 1 + self.symmetric]:
            total += 3 * self.encoder.flops(online, channels)
            total += 3 * (heads + after) * self._compared(online)
            total += self.encoder.flops(target, channels)
            total += heads * self._compared(target)
        return total

    def _compared(self, patches: int) -> int:
        """Number of tokens that the heads process for a view of `patches` patches."""
        return {"patch": patches, "patch+cls": patches + 1, "cls": 1, "avg": 1}[
            self.tokens
        ]
