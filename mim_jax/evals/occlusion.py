# SPDX-License-Identifier: Apache-2.0
"""What of an image its features still tell when patches are hidden."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mim_jax.evals.base import Batch, Eval, Headline, Passes, Run
from mim_jax.evals.features import extract, l2_normalised
from mim_jax.evals.figures import one_per_run
from mim_jax.evals.images import keys_of, valid_images
from mim_jax.evals.occluded import IN_WORDS, Choice, encode_occluded, resolved
from mim_jax.evals.report import Number, Report, mean_of, mean_share, share_of
from mim_jax.maskings.random import Random
from mim_jax.objectives.base import Objective
from mim_jax.ops.cka import Moments
from mim_jax.ops.masking import Mask, take
from mim_jax.ops.patches import to_float
from mim_jax.ops.ridge import fit
from mim_jax.schema import check_ranges, within

# Cosines closer than float32 tells them apart count as equal.
_TIE = 1e-6
_WHO = ("model", "untrained")
_SIMILARITIES = ("cosine", "cka", "retrieval")
_TITLES = {
    "cosine": "cosine, image and its masked version",
    "cka": "CKA, images and masked versions",
    "retrieval": "nearest full image is its own",
    "accuracy": "accuracy, probe fitted to full images",
}
# What is written into a panel of curves.
_NOTES = {
    "cosine": "1: same direction\n0: as to other images",
    "retrieval": "dotted: by chance",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occlusion(Eval):
    """How invariant features are to occlusion: the claim of arXiv:2208.04164, measured
    on held-out images.

    Features of an image are compared with those of the same image with a share of its
    patches hidden at random:

    * "cosine": their cosine, and beside it "cosine_others", the mean cosine to the full
      versions of all other images: features that hardly differ between images have a
      large cosine too;
    * "cka": linear CKA over all images;
    * "retrieval": how often the full version most similar to the masked one is its own,
      by cosine among all images measured. Images that are equally similar share the
      hit, so features without information stay at the chance level, 1 / images;
    * "accuracy": of a linear classifier that never saw a masked image. It is fitted by
      ridge regression to full training images, whose features are scaled to length 1.
      Left out if the source has no labels.

    Each is given for the trained model and for the untrained encoder. The numbers are
    about the features that represent an image (`Objective.feature`: the class token, or
    the mean of all patch tokens that the encoder returns). The arrays also have every
    block, there with the mean over VISIBLE patch tokens, of which a full image has all.

    Intervals are over images. The masks of the first draw are those of `cka` with the
    same ratios and seed.

    Attributes:
        ratios: shares of hidden patches. Each is rounded to whole patches; the array
            "hidden_share" has the result.
        occlusion: how patches are hidden, as for `cka`. "model" does what the encoder
            saw in training (`Objective.occlusion`); "drop" leaves them out,
            "mask_token" puts the learned token in their place, "zero" paints them with
            the data's mean.
        images: number of held-out images at most, of all classes alike if records are
            sorted by class. Pixels and features of all of them are held in memory.
        draws: masks per image and ratio.
        training_images: number of training images at most that the classifier is fitted
            to, of all classes alike as above; their features are held in memory.
        penalties: of the ridge regression, as for `ridge`; the one with the least error
            on each training image when it is left out is taken.
        seed: of the masks.
    """

    description: ClassVar[str] = (
        "Features of held-out images against those of the same images with a share of "
        "their patches hidden: how similar they are, how often the masked image is "
        "nearest to its own full version among all images, and how well a classifier "
        "that was fitted to full images still works."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "retrieval_model_ratio0.5",
            "own image found, half hidden",
            "share",
            "higher",
            "How often the features of an image with half of its patches hidden are "
            "nearer to those of the same full image than to those of any other.",
        ),
        Headline(
            "cosine_model_ratio0.5",
            "cosine, half hidden",
            "1",
            "neither",
            "Cosine between the features of an image and of the same image with half "
            "of its patches hidden: 1 means the same direction. Features that hardly "
            "differ between images have a large cosine, too.",
        ),
        Headline(
            "accuracy_model_ratio0.5",
            "probe accuracy, half hidden",
            "share",
            "higher",
            "Share of held-out images with half of their patches hidden whose class a "
            "linear classifier finds that was fitted to the features of full images.",
        ),
    )

    ratios: tuple[float, ...] = within(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), above=0, below=1
    )
    occlusion: Choice = "model"
    images: int = within(1000, least=4)
    draws: int = within(2, least=1, most=1000)
    training_images: int = within(10000, least=1)
    penalties: tuple[float, ...] = within(
        tuple(10.0**i for i in range(-4, 4)), least=1e-12, most=1e12
    )
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has an encoder; only its parameters show a mask token

    def measure(self, run: Run, data: Passes) -> Report:
        how = resolved(self.occlusion, run)
        with data.held_out(spread=True) as batches:
            held_out = _kept(batches, self.images)
        labels = np.concatenate([one["label"][one["valid"]] for one in held_out])
        shape = held_out[0]["image"].shape[1:]
        encoder = _Encoder(run.objective, how, self.ratios, shape)
        if len(labels) < 4:
            raise ValueError(
                f"{len(labels)} held-out images: want at least 4, since each is told "
                "from the others"
            )
        numbers = {
            "images": Number(len(labels), "images"),
            "masks_per_image": Number(self.draws, "masks"),
            "retrieval_chance": Number(1 / len(labels), "share"),
        }
        arrays: dict[str, Any] = {
            "ratios": np.asarray(self.ratios),
            "hidden_share": encoder.hidden_share,
            "occlusion": np.array(how),
            "feature": np.array(run.objective.feature),
        }
        for who, params in zip(_WHO, (run.params, run.initial), strict=True):
            probe = None
            if data.classes and (labels >= 0).any():
                probe = self._probe(run.objective, params, data)
            full = encoder.full(params, held_out)
            if probe is not None:
                known = labels >= 0
                right = (probe(full[-1]) == labels)[known]
                numbers[f"accuracy_{who}_full"] = share_of(right)
            found = [
                self._at(encoder, number, params, held_out, full, labels, probe)
                for number in range(len(self.ratios))
            ]
            for ratio, one in zip(self.ratios, found, strict=True):
                for name, number in one.numbers.items():
                    numbers[f"{name}_{who}_ratio{ratio:g}"] = number
            for name in found[0].arrays:
                arrays[f"{name}_{who}"] = np.stack([one.arrays[name] for one in found])
        return Report(numbers=numbers, arrays=arrays)

    def _probe(
        self, objective: Objective, params: Any, data: Passes
    ) -> Callable[[Float[np.ndarray, "n d"]], Int[np.ndarray, " n"]] | None:
        """From features to classes, fitted to full training images; None if none of
        them has a label."""
        with data.train(spread=True) as batches:
            train = extract(objective.features, params, batches, self.training_images)
        known = train.labels >= 0
        if not known.any():
            return None
        (weights, biases), _ = fit(
            l2_normalised(train.vectors[known].astype(np.float64)),
            train.labels[known],
            len(data.classes),
            self.penalties,
        )
        return lambda features: (
            l2_normalised(features.astype(np.float64)) @ weights + biases
        ).argmax(axis=1)

    def _at(
        self,
        encoder: "_Encoder",
        number: int,
        params: Any,
        held_out: list[Batch],
        full: Float[np.ndarray, "l n d"],
        labels: Int[np.ndarray, " n"],
        probe: Callable | None,
    ) -> Report:
        """Numbers and arrays at one ratio.

        Args:
            number: of the ratio.
            full: features of the full images; the last layer represents the image.
        """
        layers, count, width = full.shape
        moments = Moments(layers, width)
        bank = _unit(full)
        cosine, others, hits = np.zeros((3, layers, count))
        right = np.zeros(count)
        for draw in range(self.draws):
            seen = 0
            title = f"occlusion, {self.ratios[number]:g} hidden"
            for batch, rows in valid_images(held_out, title):
                keys = keys_of(batch, self.seed, draw)
                part = encoder.masked(number, params, batch, keys)[:, rows]
                own = np.arange(seen, seen + len(rows))
                moments.add(full[:, own], part)
                told = compared(_unit(part), bank, own)
                cosine[:, own] += told.cosine
                others[:, own] += told.others
                hits[:, own] += told.hits
                if probe is not None:
                    right[own] += probe(part[-1]) == labels[own]
                seen += len(rows)
        cosine, others, hits, right = (
            total / self.draws for total in (cosine, others, hits, right)
        )
        cka = moments.plain()
        numbers = {
            "cosine": mean_of(cosine[-1], "1"),
            "cosine_others": mean_of(others[-1], "1"),
            "cka": Number(float(cka[-1]), "1", count),
            "retrieval": mean_share(hits[-1]),
        }
        arrays = {
            "cosine": cosine.mean(axis=1),
            "cosine_others": others.mean(axis=1),
            "cka": cka,
            "retrieval": hits.mean(axis=1),
            "cosine_of_images": cosine[-1],
            "retrieval_of_images": hits[-1],
        }
        if probe is not None:
            known = labels >= 0
            numbers["accuracy"] = mean_share(right[known])
            arrays["accuracy_of_images"] = right[known]
        return Report(numbers=numbers, arrays=arrays)

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        return {"occlusion": _curves(found)} | one_per_run(
            "occlusion_blocks", found, _maps
        )


class Compared(NamedTuple):
    """Masked images against the full images of a bank, "l r" each.

    Attributes:
        cosine: to the own full image.
        others: mean cosine to all other images of the bank.
        hits: 1 where no other image is as similar as the own; 1 / k where k images,
            the own among them, are the most similar; 0 elsewhere.
    """

    cosine: Float[np.ndarray, "l r"]
    others: Float[np.ndarray, "l r"]
    hits: Float[np.ndarray, "l r"]


def compared(
    queries: Float[np.ndarray, "l r d"],
    bank: Float[np.ndarray, "l n d"],
    own: Int[np.ndarray, " r"],
) -> Compared:
    """Compare features of length 1, layer by layer.

    Args:
        queries: of r masked images.
        bank: of n >= 2 full images.
        own: the place of each query's full image in the bank.

    Example:
        >>> bank = np.eye(3)[None]
        >>> compared(bank[:, 1:2], bank, np.array([1])).hits.tolist()
        [[1.0]]
        >>> compared(bank[:, 1:2], bank, np.array([0])).cosine.tolist()
        [[0.0]]
    """
    similar = queries @ bank.transpose(0, 2, 1)
    cosine = similar[:, np.arange(len(own)), own]
    others = (similar.sum(axis=2) - cosine) / (bank.shape[1] - 1)
    first = cosine >= similar.max(axis=2) - _TIE
    equals = (similar >= cosine[..., None] - _TIE).sum(axis=2)
    return Compared(cosine, others, np.where(first, 1 / equals, 0.0))


class _Encoder:
    """Features of images and of their masked versions, by one objective.

    Features are "l b d": the mean of visible patch tokens after each block, and last
    what represents an image. Each program compiles once for all parameters.
    """

    def __init__(
        self,
        objective: Objective,
        how: str,
        ratios: tuple[float, ...],
        image_shape: tuple[int, ...],
    ):
        self._objective, self._how = objective, how
        self._maskings = [Random(ratio=ratio) for ratio in ratios]
        self._whole = jax.jit(self._of_whole)
        self._part = jax.jit(self._of_masked, static_argnums=0)
        grid = objective.grid(image_shape)
        visible = [masking.visible_count(grid) for masking in self._maskings]
        self.hidden_share = 1 - np.array(visible) / grid.size

    def full(self, params: Any, batches: list[Batch]) -> Float[np.ndarray, "l n d"]:
        """Features of all valid images, in float32."""
        parts = [
            np.asarray(self._whole(params, batch["image"]))[:, rows]
            for batch, rows in valid_images(batches, "occlusion, nothing hidden")
        ]
        return np.concatenate(parts, axis=1)

    def masked(
        self, number: int, params: Any, batch: Batch, keys: Any
    ) -> Float[np.ndarray, "l b d"]:
        """Features of a batch at the ratio of that number, in float32."""
        return np.asarray(self._part(number, params, batch["image"], keys))

    def _of_whole(self, params, images):
        pixels = to_float(images)
        encoded = self._objective.encode(params, pixels, taps=("blocks",))
        return self._layers(*encoded, visible=None)

    def _of_masked(self, number, params, images, keys):
        pixels = to_float(images)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        mask = self._maskings[number](own, self._objective.grid(pixels.shape[1:]))
        encoded = encode_occluded(self._objective, self._how, params, pixels, mask)
        return self._layers(*encoded, visible=None if self._how == "drop" else mask)

    def _layers(
        self, tokens: Array, seen: dict[str, Array], visible: Mask | None
    ) -> Float[Array, "l b d"]:
        """The features, from what the encoder returns.

        Args:
            visible: which of the patch tokens are visible; None: all of them.
        """
        patches = seen["blocks"][:, :, 1:]
        if visible is not None:
            patches = jax.vmap(take, (0, None))(patches, visible.keep)
        means = patches.astype(jnp.float32).mean(axis=2)
        last = self._objective.pooled(tokens, seen).astype(jnp.float32)
        return jnp.concatenate([means, last[None]])


def _kept(batches: Any, most: int) -> list[Batch]:
    """Copies of a pass, as far as `most` valid images; "valid" marks these."""
    kept = []
    for batch, rows in valid_images(batches, "occlusion", most):
        valid = np.isin(np.arange(len(batch["valid"])), rows)
        copies = {name: np.array(batch[name]) for name in ("image", "label", "index")}
        kept.append(copies | {"valid": valid})
    return kept


def _unit(features: Float[np.ndarray, "l n d"]) -> Float[np.ndarray, "l n d"]:
    return np.stack([l2_normalised(layer) for layer in features])


def _curves(found: dict[str, Report]) -> Figure:
    """Every quantity by ratio; runs in colours, the untrained encoder dashed."""
    labelled = any("accuracy_model_full" in one.numbers for one in found.values())
    shown = [*_SIMILARITIES, *["accuracy"] * labelled]
    figure = Figure(figsize=(3.3 * len(shown), 4.1), dpi=110)
    axes = figure.subplots(1, len(shown), squeeze=False, sharex=True)[0]
    for axis, quantity in zip(axes, shown, strict=True):
        for number, report in enumerate(found.values()):
            for who, line in zip(_WHO, ("-", "--"), strict=True):
                _curve(axis, report, quantity, who, line, f"C{number}")
        scaled = ", scaled" if quantity == "cosine" else ""
        axis.set_title(_TITLES[quantity] + scaled, fontsize=9)
        axis.set_xlabel("share of patches hidden", fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_ylim(min(-0.03, axis.dataLim.y0), 1.03)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if quantity in _NOTES:
            where = dict(ha="right", va="top", transform=axis.transAxes)
            axis.text(0.97, 0.97, _NOTES[quantity], fontsize=8, **where)
    handles = [
        Line2D([], [], color=f"C{number}", label=f"{name} ({_feature(report)})")
        for number, (name, report) in enumerate(found.items())
    ]
    handles += [
        Line2D([], [], color="grey", label="trained"),
        Line2D([], [], color="grey", ls="--", label="before training"),
    ]
    columns = min(len(handles), 4 if len(found) < 3 else 3)
    rows = -(-len(handles) // columns)
    figure.suptitle(
        "Features of held-out images with patches hidden, against those of the same "
        "full images",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.03 + 0.05 * rows, 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=8)
    return figure


def _curve(
    axis: Any, report: Report, quantity: str, who: str, line: str, colour: str
) -> None:
    """One quantity of one encoder, with its intervals. Cosines are scaled, so that 0 is
    the cosine to other images."""
    shares = report.arrays["hidden_share"]
    names = [f"{who}_ratio{ratio:g}" for ratio in report.arrays["ratios"]]
    points = [
        (share, report.numbers[f"{quantity}_{name}"])
        for share, name in zip(shares, names, strict=True)
        if f"{quantity}_{name}" in report.numbers
    ]
    if not points:
        return
    if quantity == "accuracy":  # of full images; the others are 1 there by definition
        points.insert(0, (0.0, report.numbers[f"accuracy_{who}_full"]))
    at = np.array([share for share, _ in points])
    # Without an interval, a curve has no width.
    lines = np.array([(n.value, *(n.interval or 2 * [n.value])) for _, n in points])
    if quantity == "cosine":
        # Raw cosines are near 1 for all images alike, above all before training.
        keys = [f"cosine_others_{name}" for name in names]
        others = np.array([[report.numbers[key].value] for key in keys])
        lines = (lines - others) / np.maximum(1 - others, 1e-6)
    axis.plot(at, lines[:, 0], line, color=colour, marker=".")
    axis.fill_between(at, lines[:, 1], lines[:, 2], color=colour, alpha=0.15, lw=0)
    if quantity == "retrieval":
        axis.axhline(report.numbers["retrieval_chance"].value, color="grey", ls=":")


def _maps(name: str, report: Report) -> Figure:
    """Every similarity of blocks and ratios, of the trained and untrained encoder."""
    figure = Figure(figsize=(10.5, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(len(_WHO), len(_SIMILARITIES), squeeze=False)
    shares = report.arrays["hidden_share"]
    for line, who in zip(axes, _WHO, strict=True):
        for axis, quantity in zip(line, _SIMILARITIES, strict=True):
            values = report.arrays[f"{quantity}_{who}"].T  # blocks, ratios
            axis.imshow(
                values, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis"
            )
            depth = len(values) - 1
            axis.set_yticks(
                range(depth + 1), [*map(str, range(1, depth + 1)), "feature"]
            )
            axis.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
            axis.tick_params(labelsize=7)
            for (row, column), value in np.ndenumerate(values):
                shade = "white" if value < 0.6 else "black"
                text = f"{value:.2f}"
                axis.text(
                    column, row, text, ha="center", va="center", color=shade, fontsize=6
                )
            title = "trained" if who == "model" else "before training"
            axis.set_title(f"{title}: {_TITLES[quantity]}", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("block", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("share of patches hidden", fontsize=8)
    figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), ax=axes, shrink=0.6)
    figure.suptitle(
        f"{name}: masked images against full ones. Blocks: mean visible patch token; "
        f"feature: {_feature(report)}",
        fontsize=9,
    )
    return figure


def _feature(report: Report) -> str:
    """What represents an image, and how patches are hidden from it."""
    kind = {"cls": "class token", "avg": "mean patch token"}
    how = IN_WORDS[report.arrays["occlusion"].item()]
    return f"{kind[report.arrays['feature'].item()]}, patches {how}"
