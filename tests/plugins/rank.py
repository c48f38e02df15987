# SPDX-License-Identifier: Apache-2.0
"""An evaluation from outside the package: the effective rank of features.

PYTHONPATH=tests/plugins python -m mim_jax.main --plugins=rank \
    --config=configs/knn.py:eval=rank --config.run=runs/mae --workdir=runs/mae-rank
"""

import dataclasses
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from mim_jax import config
from mim_jax.evals.base import Eval, Headline
from mim_jax.evals.features import extract
from mim_jax.evals.report import Number, Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank(Eval):
    """RankMe, arXiv:2210.02885: how many directions the features of images use.

    The rank is exp of the entropy of the singular values of the features "n d", scaled
    to sum 1: between 1 and d. It needs no labels.

    Attributes:
        shown: singular values in the figure, >= 1.
    """

    description: ClassVar[str] = (
        "How many directions the features of held-out images use. A model whose "
        "features lie in few directions has collapsed."
    )
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline(
            "rank_model",
            "effective rank",
            "1",
            "higher",
            "Number of equally strong directions with the same entropy.",
        ),
    )

    shown: int = 64

    def __post_init__(self):
        if self.shown < 1:
            raise ValueError(f"shown={self.shown}: want at least 1")

    def check_objective(self, objective):
        pass  # every objective has features

    def measure(self, run, data):
        numbers, arrays = {}, {}
        for name, params in {"model": run.params, "untrained": run.initial}.items():
            with data.held_out() as batches:
                features = extract(run.objective.features, params, batches).vectors
            values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
            numbers[f"rank_{name}"] = Number(effective_rank(values), "1")
            numbers["images"] = Number(len(features), "images")
            arrays[f"singular_values_{name}"] = values
        return Report(numbers=numbers, arrays=arrays)

    def draw(self, found):
        figure = Figure(figsize=(5, 3.4), dpi=110)
        axis = figure.subplots()
        for run, report in found.items():
            axis.plot(report.arrays["singular_values_model"][: self.shown], label=run)
        axis.set_yscale("log")
        axis.set_xlabel("direction")
        axis.set_ylabel("singular value")
        axis.legend(fontsize=7)
        figure.tight_layout()
        return {"rank": figure}


def effective_rank(values):
    """exp of the entropy of non-negative numbers scaled to sum 1."""
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares + 1e-12)).sum()))


config.register("rank", Rank)
