# SPDX-License-Identifier: Apache-2.0
"""How well hidden patches are filled in, in dB and as pictures."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from skimage.restoration import inpaint_biharmonic

from mim_jax.evals.base import Batch, Eval, Passes, Report, Run
from mim_jax.objectives.base import Objective, PixelObjective
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid, patchify, unpatchify
from mim_jax.ops.similarity import psnr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(Eval):
    """PSNR over hidden pixels on held-out images, and what it is worth.

    Beside the model stand, on the same images and masks: the model before training,
    every hidden pixel set to the image's visible mean, and biharmonic inpainting
    (scikit-image). Where targets are normalised per patch, predictions are scaled by
    the true statistics of the patch, so the fair baseline is the zero prediction: each
    hidden patch set to its true mean.

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

    def check(self, objective: Objective) -> None:
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
        values, panels, seen = {}, [], 0
        for batch in batches:
            wanted = np.flatnonzero(batch["valid"])[: self.images - seen]
            if not len(wanted):
                break
            images = jnp.asarray(batch["image"])
            grid = objective.grid(images.shape[1:])
            pixels = images.astype(jnp.float32) / 255
            for number in range(self.draws):
                base = jax.random.fold_in(
                    jax.random.key(self.seed, impl="threefry2x32"), number
                )
                keys = jax.vmap(jax.random.fold_in, (None, 0))(
                    base, jnp.asarray(batch["index"], jnp.uint32)
                )
                mask = draw(images, keys)
                filled = {
                    "model": fill(run.params, images, mask),
                    "untrained": fill(run.initial, images, mask),
                    "visible_mean": visible_mean(pixels, mask, grid),
                }
                if objective.normalise_target:
                    filled["patch_mean"] = patch_means(pixels, grid)
                region = hidden_pixels(mask, grid)
                scores = {k: psnr(v, pixels, region) for k, v in filled.items()}
                for name, score in scores.items():
                    values.setdefault(name, []).extend(np.asarray(score)[wanted])
                if number:
                    continue
                for i in wanted:
                    original, hidden = np.asarray(pixels[i]), np.asarray(region[i])
                    if seen < self.inpainted:
                        smooth = inpaint(original, hidden)
                        score = psnr(
                            jnp.asarray(smooth)[None], pixels[i][None], region[i][None]
                        )
                        values.setdefault("biharmonic", []).append(float(score[0]))
                        same = float(scores["model"][i])
                        values.setdefault("model_where_inpainted", []).append(same)
                    if seen < self.rows:
                        model = np.asarray(filled["model"][i])
                        panels.append((original, hidden, model, scores["model"][i]))
                    seen += 1
        if not seen:
            raise ValueError("reconstruction: the held-out split has no images")
        scalars = {f"psnr_{k}_db": float(np.mean(v)) for k, v in values.items()}
        return Report(
            scalars={"images": seen, "masks_per_image": self.draws, **scalars},
            pictures={"reconstruction": _picture(panels, run, scalars)},
            arrays={f"psnr_{name}_db": np.asarray(v) for name, v in values.items()},
        )


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


def _picture(panels: list, run: Run, scalars: dict[str, float]) -> Figure:
    titles = ("original", "masked", "reconstruction", "with visible patches")
    figure = Figure(figsize=(2 * len(titles), 2.25 * len(panels) + 0.9), dpi=110)
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for row, (original, hidden, model, score) in zip(axes, panels, strict=True):
        hole = hidden[..., None]
        shown = (original, np.where(hole, 0.5, original), model)
        pasted = np.where(hole, model, original)
        for axis, image in zip(row, (*shown, pasted), strict=True):
            if image.shape[-1] == 1:
                image = image[..., 0]
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[-1].set_xlabel(f"hidden pixels {float(score):.2f} dB", fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    caption = ", ".join(
        f"{name.removeprefix('psnr_').removesuffix('_db').replace('_', ' ')} {v:.2f}"
        for name, v in scalars.items()
        if name != "psnr_model_where_inpainted_db"
    )
    figure.suptitle(
        f"{run.name}, step {run.step}: held-out images\nPSNR of hidden pixels in dB: "
        f"{caption}",
        fontsize=8,
    )
    figure.tight_layout()
    return figure
