# SPDX-License-Identifier: Apache-2.0
"""What every method learns on scanned digits: frozen features, three seeds each.

python benchmarks/digits_table.py --out=runs/digits-table --jobs=2

Runs go side by side, one process per job: programs this small do not fill two cores.

Trains each method's `:digits` variant, then measures the frozen encoder on the 355
held-out digits: weighted 10-nearest-neighbours, and logistic regression (scikit-learn)
on the training digits' features. "random" is the encoder before training, its features
being the class token or the mean of the patch tokens, as the method's are. Prints one
Markdown table of mean and standard deviation over seeds, and writes table.json. It
shows that the methods run and learn, not which is better: images have 64 pixels, and
no method was tuned here beyond its learning rate.
"""

import argparse
import json
import multiprocessing
import pathlib
import platform
import time
import warnings
from concurrent import futures

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mim_jax import config, evaluate, train
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval
from mim_jax.evals.features import extract
from mim_jax.evals.knn import classify

ROOT = pathlib.Path(__file__).parents[1]
# Name: config file, leaves of config.objective.
METHODS: dict[str, tuple[str, dict]] = {
    "supervised": ("supervised", {}),
    "MAE": ("mae", {}),
    "R-MAE": ("rmae", {}),
    "R-MAE dagger": ("rmae", {"t2": "independent"}),
    "R-MAE double dagger": ("rmae", {"t2": "identity"}),
    "C-MAE (InfoNCE)": ("cmae", {}),
    "C-MAE (BYOL)": ("cmae", {"contrast": "byol"}),
    "C-MAE without mask token": ("cmae", {"mask_token": False, "tokens": "avg"}),
    "MoCo v3": ("mocov3", {}),
    "DINO": ("dino", {}),
    "BEiT": ("beit", {}),
}
# The encoder before training, by the token that represents an image.
RANDOM = {"MAE": "random, class token", "C-MAE (InfoNCE)": "random, patch mean"}


def tree_of(method: str, seed: int, steps: int | None) -> config.Tree:
    """The config of one run."""
    file, leaves = METHODS[method]
    tree = config.read(str(ROOT / f"configs/{file}.py:digits"))
    tree.objective.update(leaves)
    tree.report = config.choose(Eval, "knn")
    tree.seed = seed
    tree.compile_cache = False  # one cache for all runs, set in `main`
    tree.log.progress = "none"
    if steps:
        tree.steps = steps
    return tree


def measure(workdir: pathlib.Path, trained: bool) -> dict[str, float]:
    """Accuracies of a run's frozen features, or of those that it started from."""
    run, training = evaluate.load(workdir)
    passes = EvalPasses(training.data)
    params = run.params if trained else run.initial
    encode = run.objective.features
    with passes.train() as batches:
        bank = extract(encode, params, batches)
    with passes.held_out() as batches:
        queries = extract(encode, params, batches)
    found = classify(bank, queries, [10], temperature=0.07)[0]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a probe that did not converge is no result
        probe.fit(bank.vectors, bank.labels)
    return {
        "knn": float((found == queries.labels).mean()),
        "linear": float(probe.score(queries.vectors, queries.labels)),
    }


def one(
    method: str, seed: int, steps: int | None, out: pathlib.Path
) -> tuple[dict[str, dict[str, float]], float]:
    """({row: accuracies}, seconds) of one run, and of what it started from."""
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    start = time.monotonic()
    workdir = out / f"{method.replace(' ', '-')}-{seed}"
    train.run(tree_of(method, seed, steps), workdir)
    found = {method: measure(workdir, trained=True)}
    if method in RANDOM:
        found[RANDOM[method]] = measure(workdir, trained=False)
    return found, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default="runs/digits-table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found: dict[str, list[dict[str, float]]] = {}
    with futures.ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn")
    ) as pool:
        # The first seed of each method compiles, and the others find that in the cache.
        waiting = {
            (method, seed): pool.submit(
                one, method, seed, arguments.steps, arguments.out
            )
            for seed in range(arguments.seeds)
            for method in arguments.methods
        }
        for (method, seed), future in waiting.items():
            rows, seconds = future.result()
            for row, values in rows.items():
                found.setdefault(row, []).append(values)
            print(f"{method}, seed {seed}: {rows[method]}, {seconds:.0f} s", flush=True)
    print("\n| method | 10-NN | linear | seeds |\n|---|---|---|---|")
    for method, runs in found.items():
        cells = []
        for name in ("knn", "linear"):
            values = 100 * np.array([run[name] for run in runs])
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.1f} ± {spread:.1f}")
        print(f"| {method} | {' | '.join(cells)} | {len(runs)} |")
    result = {
        "accuracy": found,
        "minutes": (time.monotonic() - began) / 60,
        "jax": jax.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    (arguments.out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['minutes']:.1f} minutes; {arguments.out / 'table.json'}")


if __name__ == "__main__":
    main()
