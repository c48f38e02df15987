# SPDX-License-Identifier: Apache-2.0
"""Which of the latents that an image was made from a frozen encoder tells."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8
from matplotlib.figure import Figure

from mim_jax.evals.base import Batch, Eval, Headline, Passes, Run
from mim_jax.evals.features import check_finite
from mim_jax.evals.images import (
    example_fields,
    hidden_pixels,
    keys_of,
    valid_images,
)
from mim_jax.evals.report import Number, Report, share_of
from mim_jax.objectives.base import Objective, PixelObjective
from mim_jax.ops.patches import Grid, grid_of, patchify, to_float
from mim_jax.schema import check_ranges, within

Tokens = Float[np.ndarray, "b n d"]
_LEVEL = re.compile(r"level_(\d+)$")
_PENALTIES = tuple(10.0**power for power in range(-4, 5))  # of standardised features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(Eval):
    """Ridge regression from a frozen encoder's tokens to the latents of each level.

    The test of Theorem 2 of arXiv:2306.04898 that training allows: which level of a
    known hierarchy the encoder holds. Images are whole. A latent that stands for a part
    of the image is predicted from the mean of that part's tokens: a symbol as an
    indicator for each of its values, a vector as it is. One regression serves all
    places of a level; its penalty is the one with the least leave-one-out error.
    Beside the model stand its encoder before training ("untrained") and the mean pixels
    of the part ("raw").

    R2 is 1 - squared error / variance, over all outputs together; at 0 the prediction
    is no better than the mean. The centroid is the mean of levels 1, 2, ..., each
    weighted by how far the model's R2 is above the untrained encoder's (at least 0).

    For pixel objectives on a source that knows them, the error of hidden pixels stands
    beside an error that no model goes below ("optimum") and that of a model which looks
    at nothing ("floor"), for the same masks, in units of the loss. The mean level of
    Theorem 1's c for these masks is given by two readings (docs/theory.md).

    Attributes:
        fields: of the examples, that are predicted; () takes `level_0`, `level_1`, ...
            A field has one value for the image, or rows and columns of them.
        images, held_out: training and held-out images at most.
        masks: held-out images whose hidden pixels are predicted.
        seed: of their masks.
    """

    description: ClassVar[str] = (
        "Which of the latents that images were made from can be read off the frozen "
        "encoder, level by level."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "r2_model_*",
            "R2 of {}",
            "1",
            "higher",
            "How well a linear function of the encoder's tokens predicts the latents "
            "of this level: 1 is exactly, 0 no better than their mean.",
        ),
    )

    fields: tuple[str, ...] = ()
    images: int = within(3500, least=10)
    held_out: int = within(1500, least=10)
    masks: int = within(500, least=1)
    seed: int = within(0, least=0, most=2**31 - 1)

    def __post_init__(self):
        check_ranges(self)

    def check_objective(self, objective: Objective) -> None:
        pass  # every objective has tokens

    def check_data(self, objective: Objective, data: Passes) -> None:
        with data.held_out() as batches:
            batch = next(iter(batches))
        self._check_fields(objective, batch)

    def _check_fields(self, objective: Objective, batch: Batch) -> list[str]:
        """The fields to predict.

        Raises:
            ValueError: one is missing, or has no places that fit the tokens.
        """
        fields = self.fields or tuple(sorted(filter(_LEVEL.match, batch)))
        grid = objective.grid(batch["image"].shape[1:])
        if not fields or not set(fields) <= batch.keys():
            raise ValueError(
                f"fields={self.fields}: the examples have {', '.join(sorted(batch))}; "
                "want fields with latents, as source hierarchy has them"
            )
        for name in fields:
            rows, cols = _places(batch[name])
            if grid.rows % rows or grid.cols % cols:
                raise ValueError(
                    f"field {name!r} has {rows} x {cols} places, and the encoder "
                    f"{grid.rows} x {grid.cols} tokens: want a multiple of them, by "
                    "another config.objective.encoder.patch"
                )
        return list(fields)

    def measure(self, run: Run, data: Passes) -> Report:
        with data.held_out() as batches:
            fields = self._check_fields(run.objective, next(iter(batches)))
        encode = jax.jit(functools.partial(_tokens, run.objective))
        patch = run.objective.encoder.patch
        readers: dict[str, Callable[[Any], Any]] = {
            "model": functools.partial(encode, run.params),
            "untrained": functools.partial(encode, run.initial),
            "raw": jax.jit(functools.partial(_raw, patch)),
        }
        with data.train(spread=True) as batches:
            train = _gathered(readers, fields, batches, self.images, patch)
        with data.held_out() as batches:
            test = _gathered(readers, fields, batches, self.held_out, patch)
        numbers: dict[str, Number] = {
            "images": Number(len(train[1][fields[0]]), "images"),
            "held_out_images": Number(len(test[1][fields[0]]), "images"),
        }
        scores: dict[str, list[float]] = {name: [] for name in readers}
        for field in fields:
            for name in readers:
                rows = (
                    *_rows(train[0][name][field], train[1][field]),
                    *_rows(test[0][name][field], test[1][field]),
                )
                try:
                    found = _predicted(*rows)
                except ValueError as error:
                    raise ValueError(f"field {field!r}: {error}") from error
                scores[name].append(found.pop("r2"))
                key = f"{name}_{field}"
                numbers[f"r2_{key}"] = Number(scores[name][-1], "1")
                if "right" in found:
                    numbers[f"accuracy_{key}"] = share_of(found["right"])
        gains = {
            int(level[1]): max(0.0, model - untrained)
            for level, model, untrained in zip(
                map(_LEVEL.match, fields),
                scores["model"],
                scores["untrained"],
                strict=True,
            )
            if level is not None and int(level[1])
        }
        if any(gains.values()):
            weighted = sum(level * gain for level, gain in gains.items())
            numbers["level_centroid"] = Number(weighted / sum(gains.values()), "1")
        numbers |= self._errors(run, data)
        arrays = {"fields": np.array(fields)}
        arrays |= {f"r2_{name}": np.array(value) for name, value in scores.items()}
        return Report(numbers=numbers, arrays=arrays)

    def _errors(self, run: Run, data: Passes) -> dict[str, Number]:
        """Error of hidden pixels, and what is known about it; {} if nothing is."""
        objective = run.objective
        if not isinstance(objective, PixelObjective) or objective.normalise_target:
            return {}

        def predicted(params, batch, keys):
            mask = objective.mask(batch, keys, run)
            images = to_float(batch["image"])
            error = objective.reconstruct(params, batch, mask) - images
            hidden = hidden_pixels(mask, objective.grid(images.shape[1:]))
            squared = (error**2).mean(-1) * hidden.astype(error.dtype)
            count = jnp.maximum(hidden.sum((1, 2)), 1)
            return squared.sum((1, 2)) / count.astype(error.dtype), mask.hidden

        errors, masks, jitted = [], [], jax.jit(predicted)
        with data.held_out() as batches:
            for batch, rows in valid_images(batches, "errors", self.masks):
                keys = keys_of(batch, self.seed)
                one = jitted(run.params, example_fields(batch), keys)
                for part, values in zip((errors, masks), one, strict=True):
                    part.append(np.asarray(values)[rows])
        known = data.known(np.concatenate(masks))
        if not known:
            return {}
        error = float(np.concatenate(errors).mean())
        variance = float(np.mean(np.square(objective.std)))
        return {
            name: Number(value / variance if "error" in name else value, "1")
            for name, value in {"error_hidden": error, **known}.items()
        }

    def draw(self, found: dict[str, Report]) -> dict[str, Figure]:
        figure = Figure(figsize=(5.2, 3.6), dpi=110, layout="constrained")
        axis = figure.subplots()
        first = next(iter(found.values())).arrays
        places = np.arange(len(first["fields"]))
        for number, (title, report) in enumerate(found.items()):
            colour = f"C{number}"
            axis.plot(
                places, report.arrays["r2_model"], "o-", color=colour, label=title
            )
            axis.plot(places, report.arrays["r2_untrained"], ":", color=colour)
        axis.plot([], [], ":", color="grey", label="before training")
        axis.plot(places, first["r2_raw"], "--", color="grey", label="pixels")
        axis.set_xticks(
            places, [str(name).replace("_", " ") for name in first["fields"]]
        )
        axis.set_ylabel(
            "R2 of a linear probe, held-out images\n(1: exactly; 0: no better than the "
            "mean)",
            fontsize=8,
        )
        axis.legend(fontsize=7)
        return {"latents": figure}


def _places(values: Shaped[np.ndarray, "b ..."]) -> tuple[int, int]:
    """Rows and columns of a field; one of each if it has one value for the image."""
    return values.shape[1:3] if values.ndim >= 3 else (1, 1)


def _tokens(objective: Objective, params: Any, images: UInt8[Array, "b h w c"]) -> Any:
    """The encoder's patch tokens of whole images."""
    tokens, _ = objective.encode(params, to_float(images))
    return tokens[:, 1:]


def _raw(patch: int, images: UInt8[Array, "b h w c"]) -> Any:
    """The pixels of each patch."""
    return patchify(to_float(images), patch)


def _pooled(
    tokens: Tokens, grid: Grid, places: tuple[int, int], order: Any
) -> Float[np.ndarray, "b p d"]:
    """The mean token of each place, row by row.

    Args:
        places: rows and columns of places.
        order: "b n", the place of each token; None if places are squares of a grid.
    """
    count = places[0] * places[1]
    if order is None:
        row, col = np.divmod(np.arange(grid.size), grid.cols)
        row, col = row * places[0] // grid.rows, col * places[1] // grid.cols
        order = np.broadcast_to(row * places[1] + col, tokens.shape[:2])
    within_place = np.eye(count, dtype=tokens.dtype)[order]
    share = within_place / within_place.sum(axis=1, keepdims=True)
    return np.einsum("bnp,bnd->bpd", share, tokens)


def _gathered(
    readers: dict[str, Callable[[Any], Any]],
    fields: list[str],
    batches: Iterable[Batch],
    most: int,
    patch: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({reader: {field: mean tokens "b p d"}}, {field: values "b p ..."})."""
    means: dict[str, dict[str, list]] = {
        name: {field: [] for field in fields} for name in readers
    }
    values: dict[str, list] = {field: [] for field in fields}
    for batch, rows in valid_images(batches, "latents", most):
        _, height, width, _ = batch["image"].shape
        grid = grid_of(height, width, patch)
        for name, reader in readers.items():
            tokens = np.asarray(reader(batch["image"]), np.float32)
            check_finite(tokens[rows], "tokens")
            for field in fields:
                pooled = _pooled(
                    tokens, grid, _places(batch[field]), _order(batch, field)
                )
                means[name][field].append(pooled[rows])
        for field in fields:
            count = math.prod(_places(batch[field]))
            flat = batch[field].reshape(len(batch[field]), count, -1)
            values[field].append(flat[rows])
    joined = {
        name: {field: np.concatenate(part) for field, part in parts.items()}
        for name, parts in means.items()
    }
    return joined, {field: np.concatenate(part) for field, part in values.items()}


def _order(batch: Batch, field: str) -> Int[np.ndarray, "b n"] | None:
    """The latent above each token, where the examples have a tree."""
    level = _LEVEL.match(field)
    if level is None or "tree" not in batch or not int(level[1]):
        return None
    tree = batch["tree"]
    return tree[:, int(level[1]) - 1].reshape(len(tree), -1)


def _rows(
    means: Float[np.ndarray, "b p d"], values: Shaped[np.ndarray, "b p k"]
) -> tuple[np.ndarray, np.ndarray]:
    """One row for each place of each image."""
    return means.reshape(-1, means.shape[-1]), values.reshape(-1, values.shape[-1])


def _predicted(
    x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> dict[str, Any]:
    """R2 on the test rows; for symbols also which rows are right ("right")."""
    from sklearn.linear_model import RidgeCV  # slow to import

    symbols = y.dtype.kind in "iub"
    if symbols:  # -1 is unknown
        x, y = x[y[:, 0] >= 0], y[y[:, 0] >= 0]
        x_test, y_test = x_test[y_test[:, 0] >= 0], y_test[y_test[:, 0] >= 0]
    known = np.unique(y) if symbols else np.array([])
    if symbols:
        target, wanted = (one == known for one in (y, y_test))
    else:
        target, wanted = y, y_test
    target, wanted = target.astype(np.float64), wanted.astype(np.float64)
    variance = ((wanted - wanted.mean(axis=0)) ** 2).sum() if len(wanted) else 0
    if not len(target) or not variance:
        raise ValueError(
            "it has the same value everywhere, or none that is known: want latents "
            "that differ"
        )
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 1e-8, spread, 1.0)
    x, x_test = (((one - centre) / spread).astype(np.float64) for one in (x, x_test))
    penalties = [len(x) * penalty for penalty in _PENALTIES]
    probe = RidgeCV(alphas=penalties).fit(x, target)
    guess = probe.predict(x_test).reshape(wanted.shape)
    squared = ((guess - wanted) ** 2).sum()
    found: dict[str, Any] = {"r2": float(1 - squared / variance)}
    if symbols:
        found["right"] = known[guess.argmax(axis=1)] == y_test[:, 0]
    return found
