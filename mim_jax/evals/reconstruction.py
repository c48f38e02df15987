# SPDX-License-Identifier: Apache-2.0
"""How well patches are filled in: numbers beside baselines, and pictures."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from skimage.restoration import inpaint_biharmonic

from mim_jax.evals.base import (
    Batch,
    Eval,
    Number,
    Passes,
    Report,
    Run,
    keys_of,
    mean_of,
    show,
    watched,
)
from mim_jax.objectives.base import Objective, PixelObjective
from mim_jax.ops import similarity
from mim_jax.ops.masking import Mask, no_mask
from mim_jax.ops.patches import Grid, patchify, unpatchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Eval):
    """Reconstructed held-out images against the originals, clipped to 0..1.

    PSNR and MSE over hidden pixels, and beside the model, on the same images and masks:
    the model before training, every hidden pixel set to the image's visible mean, and
    biharmonic inpainting (scikit-image). Where targets are normalised per patch,
    predictions are scaled by the true statistics of the patch, so the fair baseline is
    the zero prediction: each hidden patch set to its true mean.

    Then MSE, PSNR, SSIM, FSIM and (colour) FSIMc of whole images, all patches being
    predicted: "full_" from the unmasked image as in figure 5 of arXiv:2306.04898,
    "masked_" from the masked one; "pasted_" with visible patches pasted in, as the PSNR
    column of arXiv:2208.04164, table 1, is read.

    Attributes:
        images: how many held-out images to measure at most.
        draws: masks drawn per image.
        inpainted: images (one mask each) that get biharmonic inpainting, which is slow.
        rows: images in the picture.
        seed: of the masks.
    """

    images: int = 64
    draws: int = 4
    inpainted: int = 8
    rows: int = 6
    seed: int = 0

    def __post_init__(self):
        for name in ("images", "draws", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: want at least 1")
        if self.inpainted < 0:
            raise ValueError(f"inpainted={self.inpainted}: want at least 0")

    def check_objective(self, objective: Objective) -> None:
        if not isinstance(objective, PixelObjective):
            raise ValueError(
                f"reconstruction of a {type(objective).__name__} run: want an "
                "objective that predicts pixels"
            )

    def measure(self, run: Run, data: Passes) -> Report:
        with data.held_out() as batches:
            return self._measure(run, batches)

    def _measure(self, run: Run, batches: Iterable[Batch]) -> Report:
        objective = run.objective
        assert isinstance(objective, PixelObjective)  # by `check`
        draw = jax.jit(lambda images, keys: objective.mask({"image": images}, keys))
        fill = jax.jit(
            lambda params, images, mask: jnp.clip(
                objective.reconstruct(params, {"image": images}, mask), 0, 1
            )
        )
        compare = jax.jit(_compare)
        values: dict[str, list] = {}
        panels: list[tuple] = []
        seen = 0

        def note(name, array, wanted):
            values.setdefault(name, []).extend(np.asarray(array)[wanted].tolist())

        for batch in watched(batches, "reconstruction", self.images):
            wanted = np.flatnonzero(batch["valid"])[: self.images - seen]
            if not len(wanted):
                break
            images = jnp.asarray(batch["image"])
            grid = objective.grid(images.shape[1:])
            pixels = images.astype(jnp.float32) / 255
            whole = fill(run.params, images, no_mask(len(images), grid))
            for name, score in compare(whole, pixels).items():
                note(f"full_{name}", score, wanted)
            for number in range(self.draws):
                mask = draw(images, keys_of(batch, self.seed, number))
                filled = {
                    "model": fill(run.params, images, mask),
                    "untrained": fill(run.initial, images, mask),
                    "visible_mean": visible_mean(pixels, mask, grid),
                }
                if objective.normalise_target:
                    filled["patch_mean"] = patch_means(pixels, grid)
                region = hidden_pixels(mask, grid)
                for name, image in filled.items():
                    note(
                        f"psnr_{name}_db",
                        similarity.psnr(image, pixels, region),
                        wanted,
                    )
                model = filled["model"]
                note("mse_model", similarity.mse(model, pixels, region), wanted)
                pasted = jnp.where(region[..., None], model, pixels)
                for kind, image in (("masked", model), ("pasted", pasted)):
                    for name, score in compare(image, pixels).items():
                        note(f"{kind}_{name}", score, wanted)
                if number:
                    continue
                scores = np.asarray(similarity.psnr(model, pixels, region))
                for i in wanted:
                    original, hidden = np.asarray(pixels[i]), np.asarray(region[i])
                    if seen < self.inpainted:
                        smooth = inpaint(original, hidden)
                        score = similarity.psnr(
                            jnp.asarray(smooth)[None], pixels[i][None], region[i][None]
                        )
                        note("psnr_biharmonic_db", score, [0])
                        note("psnr_model_where_inpainted_db", scores, [i])
                    if seen < self.rows:
                        panels.append(
                            (original, hidden, np.asarray(model[i]), scores[i])
                        )
                    seen += 1
        if not seen:
            raise ValueError("reconstruction: the held-out split has no images")
        numbers = {
            "images": Number(seen, "images"),
            "masks_per_image": Number(self.draws, "masks"),
        }
        for name, sample in values.items():
            unit = "dB" if name.endswith("_db") else "1"
            numbers[name] = mean_of(sample, unit)
        pooled = np.asarray(values["full_mse"]).mean()
        numbers["full_psnr_of_mean_mse_db"] = Number(
            float(-10 * np.log10(pooled)), "dB", seen
        )
        arrays = {name: np.asarray(sample) for name, sample in values.items()}
        shown = ("original", "hidden", "model", "psnr")
        for name, column in zip(shown, zip(*panels, strict=True), strict=True):
            arrays[f"panel_{name}"] = np.stack(column)
        return Report(numbers=numbers, arrays=arrays)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        if len(found) > 1:
            return {"reconstruction": _side_by_side(found)}
        return {"reconstruction": _picture(*next(iter(found.items())))}


def hidden_pixels(mask: Mask, grid: Grid) -> jax.Array:
    """True at the pixels of hidden patches: "b h w"."""
    per_pixel = jnp.repeat(mask.hidden[:, :, None], grid.patch**2, axis=2)
    return unpatchify(per_pixel, grid)[..., 0]


def visible_mean(images: jax.Array, mask: Mask, grid: Grid) -> jax.Array:
    """Images whose every pixel is the mean of the visible ones, channel by channel."""
    weight = (~hidden_pixels(mask, grid))[..., None].astype(images.dtype)
    mean = (images * weight).sum(axis=(1, 2), keepdims=True) / weight.sum(
        axis=(1, 2), keepdims=True
    )
    return jnp.broadcast_to(mean, images.shape)


def patch_means(images: jax.Array, grid: Grid) -> jax.Array:
    """Images whose every patch is its own mean, all channels together."""
    patches = patchify(images, grid.patch)
    mean = patches.mean(axis=-1, keepdims=True)
    return unpatchify(jnp.broadcast_to(mean, patches.shape), grid)


def inpaint(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Biharmonic inpainting of the hidden pixels, by scikit-image."""
    known = np.where(hidden[..., None], 0, image)
    filled = inpaint_biharmonic(known, np.array(hidden), channel_axis=-1)
    return np.clip(filled, 0, 1).astype(image.dtype)


def _compare(images: jax.Array, pixels: jax.Array) -> dict[str, jax.Array]:
    """Every measure that images of this size and number of channels have."""
    scores = {
        "mse": similarity.mse(images, pixels),
        "psnr_db": similarity.psnr(images, pixels),
    }
    height, width, channels = pixels.shape[1:]
    if min(height, width) >= 11:
        scores["ssim"] = similarity.ssim(images, pixels)
    # Its largest filters are 48 pixels long.
    if channels in (1, 3) and min(height, width) >= 32:
        scores["fsim"] = similarity.fsim(images, pixels)
    if channels == 3 and "fsim" in scores:
        scores["fsimc"] = similarity.fsim(images, pixels, chromatic=True)
    return scores


def _masked(original: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    return np.where(hidden[..., None], np.float32(0.5), original)


def _picture(name: str, report: Report) -> Figure:
    titles = ("original", "masked", "reconstruction", "with visible patches")
    columns = [report.arrays[f"panel_{x}"] for x in ("original", "hidden", "model")]
    rows = len(columns[0])
    figure = Figure(figsize=(2 * len(titles), 2.25 * rows + 0.9), dpi=110)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    scores = report.arrays["panel_psnr"]
    for row, original, hidden, model, score in zip(axes, *columns, scores, strict=True):
        pasted = np.where(hidden[..., None], model, original)
        shown = (original, _masked(original, hidden), model, pasted)
        for axis, image in zip(row, shown, strict=True):
            show(axis, image)
        row[-1].set_xlabel(f"hidden pixels {float(score):.2f} dB", fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    values = {
        key.removeprefix("psnr_").removesuffix("_db").replace("_", " "): value
        for key, value in report.scalars.items()
        if key.startswith("psnr_") and "where" not in key
    }
    numbers = ", ".join(f"{key} {value:.2f}" for key, value in values.items())
    figure.suptitle(
        f"{name}: held-out images\nPSNR of hidden pixels in dB: {numbers}", fontsize=8
    )
    figure.tight_layout()
    return figure


def _side_by_side(found: dict[str, Report]) -> Figure:
    """The same images as each run fills them in, visible patches pasted."""
    first = next(iter(found.values())).arrays
    rows = len(first["panel_original"])
    columns = 2 + len(found)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows + 0.4), dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i in range(rows):
        original, hidden = first["panel_original"][i], first["panel_hidden"][i]
        show(axes[i, 0], original, "original" if i == 0 else "")
        show(axes[i, 1], _masked(original, hidden), "masked" if i == 0 else "")
        for axis, (name, report) in zip(axes[i, 2:], found.items(), strict=True):
            own, hole = report.arrays["panel_model"][i], report.arrays["panel_hidden"]
            pasted = np.where(hole[i][..., None], own, original)
            show(axis, pasted, name if i == 0 else "")
            axis.set_xlabel(f"{report.arrays['panel_psnr'][i]:.2f} dB", fontsize=8)
    figure.tight_layout()
    return figure
