# SPDX-License-Identifier: Apache-2.0
"""Theorem 2 of arXiv:2306.04898, tested for one mask at a time.

python benchmarks/identify.py --out=runs/identify --seeds=3

The theorem says that a masked autoencoder of one mask, whose code has the dimension of
c, holds c: all of it, and nothing else of the visible part. So images of source
`hierarchy`, kind "cascade", are hidden in one box, an MAE is trained through a code of
as many numbers as c has, and kernel ridge regression asks, on held-out images:

* "c from code": R2 of c, predicted from the code;
* "code from c": R2 of the code, predicted from c;
* "c from visible": R2 of c, predicted from all visible latents. The pixels do not
  determine c here, since children are noisy, so that this is what can be known;
* "rest from code": R2 of the visible tokens' latents less what c predicts of them, from
  the code: what the code holds besides c. It is near 0 if the theorem holds;
* "c from untrained code": the same as the first, before training.

Each run is a run directory, so that the command goes on where it was stopped. It prints
a table of mean and standard deviation over seeds, and writes results.json.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV

from mim_jax import config, train
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Dense
from mim_jax.objectives.base import Params
from mim_jax.objectives.mae import MAE
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid, to_float
from mim_jax.run import loading
from mim_jax.schema import within
from mim_jax.studies.sizes import quiet
from mim_jax.theory import Tree

ROOT = pathlib.Path(__file__).parents[1]
LEVELS, DIMENSION = 2, 4  # of the quadtree above 4 x 4 tokens, and of its latents
# What is hidden: rows and columns of tokens from the top left, and the level of c.
BOXES = {"one token": (1, 1, 1), "one square": (2, 2, 2)}
TRAINING, HELD_OUT = 2000, 1000


class CodeDecoder(Decoder):
    """The decoder of MAE, which sees the encoder's tokens through a code alone.

    The class token becomes `code` numbers, and these the same vector at the class
    token and at every visible patch.

    Attributes:
        code: numbers between encoder and decoder.
    """

    code: int = within(4, least=1, most=2**14)

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b t d"],
        mask: Mask,
        grid: Grid,
        outputs: int,
        predict: Literal["hidden", "visible", "all"] = "hidden",
    ) -> Float[Array, "b m {outputs}"]:
        code = Dense(self.code, self.dtype, name="squeeze")(tokens[:, 0])
        self.sow("codes", "code", code)
        seen = Dense(tokens.shape[-1], self.dtype, name="widen")(code)
        seen = jnp.broadcast_to(seen[:, None], tokens.shape)
        return super().__call__(seen, mask, grid, outputs, predict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeMAE(MAE):
    """MAE through a code: Theorem 2 of arXiv:2306.04898 is about such a model, with one
    mask and a code of the dimension of c."""

    decoder: CodeDecoder = CodeDecoder()

    def codes(
        self, params: Params, images: Float[Array, "b h w c"], mask: Mask
    ) -> Float[Array, "b k"]:
        """The codes of images in 0..1, from their visible patches."""
        patches, grid = self.patches(images)
        tokens, _ = self.encode(params, images, keep=mask.keep)
        given = (tokens, mask, grid, patches.shape[-1])
        _, found = self.decoder.apply(
            {"params": params["decoder"]}, *given, mutable=["codes"]
        )
        return found["codes"]["code"][0]


def tree_of(box: str, seed: int, steps: int) -> config.Tree:
    """The config of one run."""
    rows, cols, _ = BOXES[box]
    variant = "hierarchy,objective=code,masking=box"
    tree = config.read(f"{ROOT}/configs/mae.py:{variant}")
    tree.seed, tree.steps, tree.compile_cache = seed, steps, False
    tree.data.source.update(dict(kind="cascade", levels=LEVELS))
    tree.data.image_size = (4 * 2**LEVELS,) * 2
    tree.objective.decoder.code = DIMENSION
    tree.objective.masking.update(dict(rows=rows, cols=cols))
    quiet(tree, "hierarchy")
    return tree


def latents(source: Hierarchy, count: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(images uint8, {level: latents (images, rows, columns, dimension)})."""
    records = [source[index] for index in range(count)]
    images = np.stack([record["image"] for record in records])
    levels = range(source.levels + 1)
    return images, {
        level: np.stack([record[f"level_{level}"] for record in records])
        for level in levels
    }


def shared(hidden: np.ndarray) -> list[tuple[int, int, int]]:
    """(level, row, column) of each latent in c of a mask of 4 x 4 tokens."""
    tree = Tree.quadtree(LEVELS)
    places = [
        (level, row, col)
        for level in range(LEVELS, -1, -1)
        for row in range(2 ** (LEVELS - level))
        for col in range(2 ** (LEVELS - level))
    ]
    assert [tree.levels[node] for node in range(len(places))] == [p[0] for p in places]
    (found,) = tree.locate(hidden.reshape(1, -1))
    return [places[node] for node in np.flatnonzero(found)]


def r2(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray):
    """(R2 on the test rows, predictions of both): kernel ridge regression with a
    Gaussian kernel, whose width and penalty cross-validation chooses."""
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-8
    x, x_test = (x - centre) / spread, (x_test - centre) / spread
    middle, scale = y.mean(axis=0), y.std() + 1e-12
    grid = {"gamma": [g / x.shape[1] for g in (0.02, 0.1, 0.5)]}
    grid["alpha"] = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    probe = GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=3, scoring="r2")
    probe.fit(x, (y - middle) / scale)
    guess, guess_test = (probe.predict(one) * scale + middle for one in (x, x_test))
    rest = ((y_test - guess_test) ** 2).sum()
    spread = ((y_test - y_test.mean(axis=0)) ** 2).sum()
    return float(1 - rest / spread), guess, guess_test


def measured(folder: pathlib.Path, box: str) -> dict[str, float]:
    """The numbers of one run."""
    run, _ = loading.load(folder)
    grid = Grid(2**LEVELS, 2**LEVELS, 4)
    masking = run.objective.masking

    @jax.jit
    def encoded(params, images):
        mask = masking(jax.random.split(jax.random.key(0), len(images)), grid)
        return run.objective.codes(params, to_float(images), mask), mask.hidden

    parts = []
    for split, count in (("train", TRAINING), ("held_out", HELD_OUT)):
        source = Hierarchy(kind="cascade", levels=LEVELS, split=split)
        images, values = latents(source, count)
        code, hidden = encoded(run.params, images)
        blank, _ = encoded(run.initial, images)
        hidden = np.asarray(hidden[0])
        places = shared(hidden)
        assert [place[0] for place in places] == [BOXES[box][2]], places
        c = np.concatenate([values[level][:, r, q] for level, r, q in places], axis=1)
        visible = values[0].reshape(count, -1, DIMENSION)[:, ~hidden].reshape(count, -1)
        parts.append([np.asarray(code), c, visible, np.asarray(blank)])
    (code, c, visible, blank), (code_, c_, visible_, blank_) = parts
    _, part, part_ = r2(c, visible, c_, visible_)
    return {
        "c from code": r2(code, c, code_, c_)[0],
        "code from c": r2(c, code, c_, code_)[0],
        "c from visible": r2(visible, c, visible_, c_)[0],
        "rest from code": r2(code, visible - part, code_, visible_ - part_)[0],
        "c from untrained code": r2(blank, c, blank_, c_)[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    config.register("code", CodeMAE)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for box in BOXES:
            folder = options.out / f"{box.replace(' ', '-')}-s{seed}"
            tree = tree_of(box, seed, options.steps)
            train.run(tree, folder)
            found.setdefault(box, []).append(measured(folder, box))
            print(box, seed, json.dumps(found[box][-1]), flush=True)
    text = json.dumps({"processor": platform.processor(), "runs": found}, indent=1)
    (options.out / "results.json").write_text(text + "\n")
    names = list(next(iter(found.values()))[0])
    print("| hidden | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for box, rows in found.items():
        cells = [[row[name] for row in rows] for name in names]
        shown = [f"{np.mean(one):.3f} ± {np.std(one, ddof=1):.3f}" for one in cells]
        print(f"| {box} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
