# SPDX-License-Identifier: Apache-2.0
"""How much features change when patches are hidden, block by block."""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mim_jax.evals.base import Eval, Headline, Passes, Run
from mim_jax.evals.images import keys_of, valid_images
from mim_jax.evals.occluded import IN_WORDS, Choice, encode_occluded, resolved
from mim_jax.evals.report import Number, Report
from mim_jax.maskings.random import Random
from mim_jax.objectives.base import Objective
from mim_jax.ops.attention import accurate
from mim_jax.ops.cka import Moments
from mim_jax.ops.masking import Mask, take
from mim_jax.ops.patches import to_float
from mim_jax.schema import check_ranges, within

_ACROSS = 5  # panels in a row, so that a page can show them at a size to read


@dataclasses.dataclass(frozen=True, kw_only=True)
class CKA(Eval):
    """Linear CKA between features of full and of masked images, after every block.

    Figure 1 of arXiv:2208.04164: 1 means that hiding patches does not change the
    features, up to rotation and scale. Measured on held-out images, with one random
    mask per image and ratio.

    Attributes:
        ratios: shares of hidden patches.
        feature: the features of an image: "mean" of the patch tokens that are present,
            or the "cls" token; or "visible_tokens", where every visible patch of every
            image is an example, compared with the same patch of the full image.
        occlusion: how patches are hidden. "drop" leaves them out, "mask_token" puts the
            learned token in their place, "zero" paints them with the data's mean;
            "model" does what the encoder saw in training (`Objective.occlusion`), as a
            model may fail on inputs of a kind that it never saw.
        estimator: "plain", or "debiased", which does not grow when images are few.
        images: number of images at most, of all classes alike if records are sorted by
            class. The paper does not state its number; the plain estimate needs many
            more images than the encoder is wide.
        seed: of the masks.
    """

    description: ClassVar[str] = (
        "How similar the features of an image stay, block by block, when a share of "
        "its patches is hidden: 1 means unchanged. Each title says how patches were "
        "hidden."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "cka_ratio0.5_last_block",
            "CKA, half hidden, last block",
            "1",
            "neither",
            "How similar the last block's features of an image and of the same image "
            "with half of its patches hidden are: 1 means the same up to rotation and "
            "scale. Features that hardly differ between images are similar, too.",
        ),
    )

    ratios: tuple[float, ...] = within(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), above=0, below=1
    )
    feature: Literal["mean", "cls", "visible_tokens"] = "mean"
    occlusion: Choice = "drop"
    estimator: Literal["plain", "debiased"] = "plain"
    images: int = within(5000, least=4)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has an encoder; only its parameters show a mask token

    def measure(self, run: Run, data: Passes) -> Report:
        objective = run.objective
        occlusion = resolved(self.occlusion, run)
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
                _, part = encode_occluded(objective, occlusion, params, pixels, mask)
                pairs.append(
                    self._pair(full["blocks"], part["blocks"], mask, occlusion)
                )
            return pairs

        seen = 0
        with data.held_out(spread=True) as batches:
            for batch, rows in valid_images(batches, "cka", self.images):
                images = jnp.asarray(batch["image"])
                pairs = features(run.params, images, keys_of(batch, self.seed))
                for moments, pair in zip(found, jax.device_get(pairs), strict=True):
                    f, g = (x[:, rows].reshape(depth, -1, width) for x in pair)
                    moments.add(f, g)
                seen += len(rows)
        curves = np.stack([getattr(one, self.estimator)() for one in found])
        numbers = {"images": Number(seen, "images")}
        for ratio, curve in zip(self.ratios, curves, strict=True):
            numbers[f"cka_ratio{ratio:g}_mean_over_blocks"] = Number(
                float(curve.mean()), "1", seen
            )
            numbers[f"cka_ratio{ratio:g}_last_block"] = Number(
                float(curve[-1]), "1", seen
            )
        arrays = {
            "cka": curves,
            "ratios": np.asarray(self.ratios),
            "occlusion": np.array(occlusion),
        }
        return Report(numbers=numbers, arrays=arrays)

    def _pair(
        self, full: jax.Array, part: jax.Array, mask: Mask, occlusion: str
    ) -> tuple[jax.Array, jax.Array]:
        """Features of full and masked images, "l b s d" with s examples per image."""
        if self.feature == "cls":
            return full[:, :, :1], part[:, :, :1]
        full, part = full[:, :, 1:], part[:, :, 1:]
        if self.feature == "mean":
            full, part = (one.astype(accurate(one.dtype)) for one in (full, part))
            return full.mean(axis=2, keepdims=True), part.mean(axis=2, keepdims=True)

        def visible(tokens):
            return jax.vmap(lambda layer: take(layer, mask.keep))(tokens)

        return visible(full), part if occlusion == "drop" else visible(part)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        across = min(len(found), _ACROSS)
        down = math.ceil(len(found) / across)
        figure = Figure(figsize=(4.2 * across + 0.8, 3.6 * down), dpi=110)
        panels = figure.subplots(down, across, squeeze=False, sharey=True)
        axes, unused = np.split(panels.ravel(), [len(found)])
        for axis in unused:
            axis.remove()
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
            how = IN_WORDS[report.arrays["occlusion"].item()]
            axis.set_title(f"{name}\npatches {how}", fontsize=9)
            axis.set_xlabel("block")
            axis.set_xticks(blocks)
            axis.set_ylim(min(0.0, float(curves.min())), 1.02)
        for axis in panels[:, 0]:
            axis.set_ylabel(
                f"CKA ({self.estimator}), full against masked\n"
                "(1: unchanged by hiding)",
                fontsize=8,
            )
        panels[0, -1].legend(
            title="share hidden",
            fontsize=7,
            title_fontsize=8,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        figure.tight_layout()
        return {"cka": figure}
