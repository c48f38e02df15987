# SPDX-License-Identifier: Apache-2.0
"""A study of three steps on digits, one row of which fails, for --plugins."""

from mim_jax.studies import STUDIES, runs
from mim_jax.studies.facts import P1
from mim_jax.studies.grid import (
    Claim,
    Column,
    Difference,
    Measure,
    Row,
    Study,
    Training,
)

_NETWORKS = {
    "objective.encoder.width": 16,
    "objective.encoder.depth": 1,
    "objective.encoder.heads": 2,
}
_DECODER = {
    "objective.decoder.width": 16,
    "objective.decoder.depth": 1,
    "objective.decoder.heads": 2,
}
STEPS = 3
_SHORT = {"steps": STEPS, "batch_size": 16, "checkpoint.every": 1, "log.every": 1}
MAE = Training(recipe="mae", called="short", leaves=_NETWORKS | _DECODER | _SHORT)
TUNED = Training(
    recipe="finetune", called="finetune", leaves=_NETWORKS | _SHORT, parent=MAE
)
# Its first update is so large that the second loss is not finite.
BROKEN = MAE.but(
    called="broken", leaves={"optim.base_lr": 1e38, "optim.warmup_epochs": 0.0}
)
BROKEN_TUNED = TUNED.but(parent=BROKEN)

ABSENT = Measure(name="absent", eval="not_here")
NEIGHBOURS = Column(
    title="10-NN, %", run="pretrain", measure=runs.KNN, keys=("accuracy_model_k10",)
)
TUNING = Column(
    title="fine-tuned, %",
    run="finetune",
    measure=runs.ACCURACY,
    keys=("accuracy_held_out",),
    metric="FT Acc (%)",
)
STUDY = Study(
    name="tiny",
    title="Three steps",
    paper=P1,
    table="1",
    small="digits",
    columns=(
        NEIGHBOURS,
        TUNING,
        Column(title="new", run="pretrain", measure=ABSENT, keys=("new",)),
    ),
    rows=(
        Row(
            name="broken",
            runs={"pretrain": BROKEN, "finetune": BROKEN_TUNED},
            paper="R-MAE",
        ),
        Row(
            name="short",
            runs={"pretrain": MAE, "finetune": TUNED},
            paper="MAE (our impl.)",
        ),
        Row(name="CAE", paper="CAE", missing="it is not part of this program"),
    ),
    claims=(
        Claim(
            text="Three steps are better than none.",
            where="nowhere",
            compares=(
                Difference(first="short", second="broken", column=NEIGHBOURS.title),
            ),
        ),
    ),
)
STUDIES[STUDY.name] = STUDY
