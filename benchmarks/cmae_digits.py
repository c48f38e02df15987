# SPDX-License-Identifier: Apache-2.0
"""What decides how well C-MAE transfers on small digits: a study to load as a plug-in.

python -m mim_jax.main --plugins=benchmarks.cmae_digits \
    --config=configs/study.py:mnist --config.study=cmae_digits "--config.seeds=(0,)" \
    --workdir=runs/cmae-digits/study --config.results=runs/cmae-digits/results

Rows change one thing of C-MAE each, at the size of the embedded studies; docs/cmae.md
says what was found. A row that pre-trains C-MAE takes 14 to 25 minutes of a CPU core.
"""

import dataclasses

from jaxtyping import Array, Bool

from mim_jax.objectives import OBJECTIVES
from mim_jax.objectives.cmae import CMAE, View
from mim_jax.ops.patches import patchify
from mim_jax.studies import STUDIES, runs
from mim_jax.studies.facts import P1
from mim_jax.studies.grid import Column, Row, Study, Times, Training
from mim_jax.studies.p2 import NEIGHBOURS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inked(CMAE):
    """C-MAE whose loss counts only positions where the query's image, after its jitter,
    has ink. At the others most images have the same patch: a token that told only its
    own patch could not be told from its negatives.

    Attributes:
        ink: a patch has ink if a pixel is above this value, in 0..1.
    """

    ink: float = 0.2

    def _weights(self, online: View, target: View) -> Bool[Array, "b n"] | None:
        inked = patchify(online.images, self.encoder.patch).max(axis=-1) > self.ink
        others = super()._weights(online, target)
        return inked if others is None else inked & others


OBJECTIVES["cmae_ink"] = Inked


def _of(pretrain: Training, **changes) -> dict[str, Training]:
    return {
        "pretrain": pretrain,
        "finetune": runs.finetune(pretrain).but(**changes),
        "10pct": runs.finetune_tenth(pretrain).but(**changes),
    }


def _changed(leaves: dict[str, object]) -> dict[str, Training]:
    return _of(runs.CMAE.but(leaves=leaves))


def _accuracy(title: str, run: str) -> Column:
    return Column(
        title=title, run=run, measure=runs.ACCURACY, keys=("accuracy_held_out",)
    )


_SAME_RATE = {"optim.layer_decay": 1.0}
_LONGER = {"steps": Times(3.0)}
_FROM_SCRATCH = {"finetune": runs.SCRATCH, "10pct": runs.SCRATCH_TENTH}
STUDIES["cmae_digits"] = Study(
    name="cmae_digits",
    title="C-MAE on digits, one change at a time",
    paper=P1,
    full=False,
    columns=(
        _accuracy("fine-tuned, %", "finetune"),
        _accuracy("10 % of labels, %", "10pct"),
        dataclasses.replace(
            NEIGHBOURS,
            note="of the mean patch token for C-MAE, of the class token for MAE.",
        ),
    ),
    rows=(
        Row(name="from scratch", runs=_FROM_SCRATCH),
        Row(
            name="from scratch, longer",
            runs={"finetune": runs.SCRATCH_300},
            note="three times the steps.",
        ),
        Row(name="MAE", runs=_of(runs.MAE)),
        Row(
            name="MAE, one rate for all layers",
            runs=_of(runs.MAE, leaves=_SAME_RATE),
            note="in fine-tuning, as from scratch.",
        ),
        Row(name="C-MAE", runs=_of(runs.CMAE)),
        Row(
            name="C-MAE, one rate for all layers",
            runs=_of(runs.CMAE, leaves=_SAME_RATE),
            note="in fine-tuning, as from scratch.",
        ),
        Row(
            name="C-MAE, longer",
            runs={"finetune": runs.finetune(runs.CMAE).but(small=_LONGER)},
            note="three times the steps of fine-tuning.",
        ),
        Row(
            name="full view",
            runs=_of(runs.CMAE_FULL_VIEW),
            note="one of the two views hides nothing.",
        ),
        Row(
            name="overlap",
            runs=_of(runs.CMAE_OVERLAP),
            note="one view hides .75, the other .25, each drawn by itself.",
        ),
        Row(name="without mask tokens", runs=_of(runs.CMAE_DROPPED)),
        Row(name="BYOL", runs=_of(runs.CMAE_BYOL)),
        Row(
            name="ink",
            runs=_of(runs.CMAE.but(choices="objective=cmae_ink")),
            note="the loss leaves out empty patches.",
        ),
        Row(
            name="last norm",
            runs=_changed(
                {
                    "objective.projector.last_norm": True,
                    "objective.predictor.last_norm": True,
                }
            ),
            note="both heads end with MoCo v3's batch norm.",
        ),
        Row(name="no colours", runs=_changed({"objective.color_jitter": "none"})),
        Row(name="momentum .9", runs=_changed({"objective.ema.base": 0.9})),
        Row(name="temperature .1", runs=_changed({"objective.temperature": 0.1})),
    ),
)
