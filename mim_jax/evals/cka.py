# SPDX-License-Identifier: Apache-2.0
"""How much features change when patches are hidden, block by block."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Number, Passes, Report, Run, keys_of, watched
from mim_jax.maskings.random import Random
from mim_jax.objectives.base import Objective
from mim_jax.ops.cka import Moments
from mim_jax.ops.masking import Mask, take
from mim_jax.ops.patches import to_float, unpatchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class CKA(Eval):
    """Linear CKA between features of full and of masked images, after every block.

    Figure 1 of arXiv:2208.04164: 1 means that hiding patches does not change the
    features, up to rotation and scale. Held-out images; one random mask per image and
    ratio.

    Attributes:
        ratios: shares of hidden patches.
        feature: of an image: "mean" of the patch tokens that are present, or the "cls"
            token; or "visible_tokens", where every visible patch of every image is an
            example, compared with the same patch of the full image.
        occlusion: what hiding means: to "drop" patches, to put the learned
            "mask_token" in their place, or to paint them with the data's mean ("zero").
        estimator: "plain", or "debiased", which does not grow when images are few.
        images: how many images at most; the paper's number is not stated, and the plain
            estimate needs many more than the encoder is wide.
        seed: of the masks.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    feature: Literal["mean", "cls", "visible_tokens"] = "mean"
    occlusion: Literal["drop", "mask_token", "zero"] = "drop"
    estimator: Literal["plain", "debiased"] = "plain"
    images: int = 5000
    seed: int = 0

    def __post_init__(self):
        if not self.ratios or not 0 < min(self.ratios) <= max(self.ratios) < 1:
            raise ValueError(f"ratios={self.ratios}: want numbers 0 < ratio < 1")
        if self.images < 4:
            raise ValueError(f"images={self.images}: want at least 4")

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has an encoder; a missing mask token is found in measure

    def measure(self, run: Run, data: Passes) -> Report:
        objective = run.objective
        if self.occlusion == "mask_token" and "mask_token" not in run.params["encoder"]:
            raise ValueError(
                f"occlusion='mask_token': the encoder of {run.name} has no mask token; "
                "want 'drop' or 'zero'"
            )
        maskings = [Random(ratio=ratio) for ratio in self.ratios]
        depth, width = objective.encoder.depth, objective.encoder.width
        found = [Moments(depth, width) for _ in maskings]

        @jax.jit
        def features(params, images, keys):
            pixels = to_float(images)
            grid = objective.grid(pixels.shape[1:])
            _, full = objective.encode(params, pixels, taps=("blocks",))
            pairs = []
            for number, masking in enumerate(maskings):
                own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
                mask = masking(own, grid)
                _, part = self._occluded(objective, params, pixels, mask)
                pairs.append(self._pair(full["blocks"], part["blocks"], mask))
            return pairs

        seen = 0
        with data.held_out() as batches:
            for batch in watched(batches, "cka", self.images):
                wanted = np.flatnonzero(batch["valid"])[: self.images - seen]
                if not len(wanted):
                    break
                images = jnp.asarray(batch["image"])
                pairs = features(run.params, images, keys_of(batch, self.seed))
                for moments, pair in zip(found, jax.device_get(pairs), strict=True):
                    f, g = (x[:, wanted].reshape(depth, -1, width) for x in pair)
                    moments.add(f, g)
                seen += len(wanted)
        curves = np.stack([getattr(one, self.estimator)() for one in found])
        numbers = {"images": Number(seen, "images")}
        for ratio, curve in zip(self.ratios, curves, strict=True):
            numbers[f"cka_ratio{ratio:g}_mean_over_blocks"] = Number(
                float(curve.mean()), "1", seen
            )
            numbers[f"cka_ratio{ratio:g}_last_block"] = Number(
                float(curve[-1]), "1", seen
            )
        arrays = {"cka": curves, "ratios": np.asarray(self.ratios)}
        return Report(numbers=numbers, arrays=arrays)

    def _occluded(self, objective: Objective, params, pixels, mask: Mask):
        taps = ("blocks",)
        if self.occlusion == "drop":
            return objective.encode(params, pixels, keep=mask.keep, taps=taps)
        if self.occlusion == "mask_token":
            return objective.encode(params, pixels, hidden=mask.hidden, taps=taps)
        grid = objective.grid(pixels.shape[1:])
        hidden = jnp.repeat(mask.hidden[:, :, None], grid.patch**2, axis=2)
        mean = jnp.asarray(objective.mean, pixels.dtype)[None, None, None]
        painted = jnp.where(unpatchify(hidden, grid), mean, pixels)
        return objective.encode(params, painted, taps=taps)

    def _pair(self, full: jax.Array, part: jax.Array, mask: Mask) -> tuple:
        """Features of full and of occluded images, "l b s d" with s examples each."""
        if self.feature == "cls":
            return full[:, :, :1], part[:, :, :1]
        full, part = full[:, :, 1:], part[:, :, 1:]
        if self.feature == "mean":
            return full.mean(axis=2, keepdims=True), part.mean(axis=2, keepdims=True)

        def visible(tokens):
            return jax.vmap(lambda layer: take(layer, mask.keep))(tokens)

        return visible(full), part if self.occlusion == "drop" else visible(part)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figure = Figure(figsize=(4.2 * len(found) + 0.8, 3.6), dpi=110)
        axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axis, (name, report) in zip(axes, found.items(), strict=True):
            ratios, curves = report.arrays["ratios"], report.arrays["cka"]
            blocks = np.arange(1, curves.shape[1] + 1)
            for number, (ratio, curve) in enumerate(zip(ratios, curves, strict=True)):
                shade = (number + 0.5) / len(ratios)
                axis.plot(
                    blocks,
                    curve,
                    marker=".",
                    label=f"{ratio:g}",
                    color=(0.9 * shade, 0.25, 0.9 * (1 - shade)),
                )
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("block")
            axis.set_xticks(blocks)
            axis.set_ylim(min(0.0, float(curves.min())), 1.02)
        axes[0].set_ylabel(f"CKA ({self.estimator}), full against masked")
        axes[-1].legend(title="hidden", fontsize=7, title_fontsize=8)
        figure.tight_layout()
        return {"cka": figure}
