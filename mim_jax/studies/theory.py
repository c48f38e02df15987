# SPDX-License-Identifier: Apache-2.0
"""The theorems and the proposals of arXiv:2306.04898, for which the paper has no table:
what MAE learns of a hierarchy that is known, and what the proposals change.
"""

from mim_jax.studies import runs
from mim_jax.studies.facts import P2
from mim_jax.studies.grid import (
    Claim,
    Column,
    Lines,
    Row,
    Study,
    Times,
    Training,
)
from mim_jax.studies.p2 import (
    BY_UNIT,
    HELD_OUT,
    NEIGHBOURS,
    PSNR,
    RATIOS,
    SSIM,
    above,
    by_ratio,
    mae,
)
from mim_jax.studies.runs import probe


def _latents(title: str, key: str, digits: int = 2, note: str = "") -> Column:
    return Column(
        title=title,
        run="pretrain",
        measure=runs.LATENTS,
        keys=(key,),
        scale=1.0,
        digits=digits,
        note=note,
    )


_R2 = {
    level: _latents(f"R2, level {level}", f"r2_model_level_{level}")
    for level in (1, 2, 3)
}
_CENTROID = _latents(
    "centroid",
    "level_centroid",
    note="mean level of what the encoder tells beyond an untrained one.",
)
_OF_C = _latents(
    "c, frontier",
    "level_of_c_frontier",
    note="mean level of Theorem 1's c for these masks (docs/theory.md).",
)
_ERROR = _latents("error", "error_hidden", 3, "of hidden pixels, held-out images.")
_THEORY = {
    (ratio, unit): mae(ratio, unit)
    for ratio, unit in (
        *((ratio, 1) for ratio in RATIOS),
        *((ratio, unit) for unit in (2, 4) for ratio in (0.5, 0.75)),
    )
}
THEOREM2 = Study(
    name="p2_theorem2",
    title="Which level of a known hierarchy MAE learns",
    paper=P2,
    small="hierarchy",
    full=False,
    columns=(
        *_R2.values(),
        _CENTROID,
        _OF_C,
        _latents("c, invertible", "level_of_c_invertible"),
        _ERROR,
        _latents("optimum", "error_optimum", 3, "no model errs less on these masks."),
        _latents("floor", "error_floor", 3, "the error of a model that sees nothing."),
    ),
    rows=(
        *by_ratio(_THEORY, (), name=BY_UNIT),
        Row(
            name="untrained",
            runs={"pretrain": _THEORY[0.75, 1]},
            weights="initial",
            note="the encoder before training.",
        ),
        Row(
            name="supervised",
            runs={"pretrain": runs.SCRATCH},
            note="the root is the label.",
        ),
    ),
    claims=(
        Claim(
            text="Ratios in the middle identify higher latents than the extremes do: "
            "the level is an inverted U in the ratio.",
            where="section 2.3",
            compares=tuple(
                one
                for middle in ("ratio 0.5, unit 1", "ratio 0.75, unit 1")
                for one in above(
                    middle,
                    ("ratio 0.1, unit 1", "ratio 0.9, unit 1"),
                    _CENTROID.title,
                )
            ),
        ),
        Claim(
            text="Larger mask units identify higher latents.",
            where="section 2.3",
            compares=tuple(
                one
                for ratio in (0.5, 0.75)
                for one in (
                    *above(
                        f"ratio {ratio}, unit 2",
                        (f"ratio {ratio}, unit 1",),
                        _CENTROID.title,
                    ),
                    *above(
                        f"ratio {ratio}, unit 4",
                        (f"ratio {ratio}, unit 2",),
                        _CENTROID.title,
                    ),
                )
            ),
        ),
        Claim(
            text="What MAE learns is more than its encoder tells before training.",
            where="ours",
            compares=tuple(
                one
                for column in _R2.values()
                for one in above("ratio 0.75, unit 1", ("untrained",), column.title)
            ),
        ),
    ),
    figures=(
        Lines(
            x="ratio",
            columns=tuple(c.title for c in (*_R2.values(), _CENTROID, _OF_C, _ERROR)),
            by="unit",
        ),
    ),
    notes=(
        "A probe of a run whose error is at its floor measures what it began with: "
        "read error, optimum and floor first.",
        "The centroid says where the gain lies, not how large it is: a run that "
        "learned little of every level can have a high one.",
        "Theorem 2 speaks of one mask and of a decoder that draws noise; MAE trains "
        "one encoder on all masks with a squared error. A level that is read here is "
        "what MAE learns, not what the theorem promises.",
    ),
)

# Section 3.6: proposals without numbers. Tokens of `hierarchy` and of `mnist` have a
# side of 4 pixels, of which a hard boundary may ignore one.
_HARD = {"objective.ignore_boundary": 1}
_SOFT = {"objective.ignore_boundary": 3, "objective.boundary": "soft"}
_PLAIN, _PLAIN_4 = _THEORY[0.75, 1], _THEORY[0.75, 4]


def _shifted(training: Training) -> Training:
    """The same on images that are shifted, which moves the squares of the hierarchy
    away from those of the grid. These take longer to learn. A quarter of the batch
    and four times the steps, at the same rate, cost the same; with units of one token
    they end with an error of 0.69 instead of 0.81."""
    return training.but(
        leaves={"data.source.shift": True},
        small={
            "batch_size": Times(0.25),
            "steps": Times(4.0),
            "optim.base_lr": Times(4.0),
            "optim.warmup_epochs": 0.5,
        },
    )


# What the claims compare: each row with others.
_BOUNDARY = {
    "hard boundary": ("MAE",),
    "soft boundary": ("MAE",),
    "unit 4, hard boundary": ("unit 4",),
}
_AFFINITY = {"affinity": ("MAE",)}
_ALONG = {"shifted, subtrees": ("shifted", "shifted, unit 4")}
_MEAN_LEVEL = "the mean level of what training adds"
_OF_ROOT = "how much is learned of the root"
PROPOSALS = Study(
    name="p2_proposals",
    title="Two proposals: ignore the boundary, mask along the structure",
    paper=P2,
    small="hierarchy",
    full=False,
    columns=THEOREM2.columns,
    rows=tuple(
        Row(name=name, runs={"pretrain": training}, note=note)
        for name, training, note in (
            (
                "MAE",
                _PLAIN,
                "ratio 0.75 in all rows, units of one token where no other is named.",
            ),
            ("hard boundary", _PLAIN.but(leaves=_HARD), "1 pixel of 4 is ignored."),
            ("soft boundary", _PLAIN.but(leaves=_SOFT), "weights 1/4 to 1."),
            ("unit 4", _PLAIN_4, "squares of 4 x 4 tokens."),
            (
                "unit 4, hard boundary",
                _PLAIN_4.but(leaves={"objective.ignore_boundary": 4}),
                "hidden tokens next to a visible square are ignored.",
            ),
            (
                "affinity",
                _PLAIN.but(choices="masking=affinity"),
                "hides groups of positions whose tokens change together.",
            ),
            (
                "shifted",
                _shifted(_PLAIN),
                "images are shifted by whole tokens; batches of 32, 12,000 steps; the "
                "optimum is that of a model which is told the shift.",
            ),
            ("shifted, unit 4", _shifted(_PLAIN_4), "trained as shifted."),
            (
                "shifted, subtrees",
                _shifted(
                    Training(
                        recipe="mae",
                        leaves={"objective.masking.level": 2},
                        choices="masking=subtrees",
                    )
                ),
                "hides what lies below latents of level 2: 4 x 4 tokens of the image's "
                "own hierarchy.",
            ),
        )
    ),
    claims=tuple(
        Claim(
            text=f"{what} {asked}.",
            where="section 3.6, as a proposal",
            compares=tuple(
                one
                for first, others in rows.items()
                for one in above(first, others, column.title)
            ),
        )
        for what, asked, column, rows in (
            ("Ignoring the boundary raises", _MEAN_LEVEL, _CENTROID, _BOUNDARY),
            ("Ignoring the boundary raises", _OF_ROOT, _R2[3], _BOUNDARY),
            ("Masking by affinity raises", _MEAN_LEVEL, _CENTROID, _AFFINITY),
            ("Masking by affinity raises", _OF_ROOT, _R2[3], _AFFINITY),
            # No centroid: where training adds next to nothing, its mean level is noise.
            ("Masking along the hierarchy raises", _OF_ROOT, _R2[3], _ALONG),
        )
    ),
    notes=THEOREM2.notes,
)


def _proposed(**changes) -> dict[str, Training]:
    pretrain = mae(0.75).but(**changes)
    return {
        "pretrain": pretrain,
        "probe": probe(pretrain),
        "10pct": runs.finetune_tenth(pretrain),
    }


_TENTH = Column(
    title="10 % of the labels, %",
    run="10pct",
    measure=runs.ACCURACY,
    keys=("accuracy_held_out",),
)
PROPOSALS_LABELS = Study(
    name="p2_proposals_labels",
    title="Two proposals: what they do to accuracy",
    paper=P2,
    columns=(HELD_OUT, NEIGHBOURS, _TENTH, SSIM, PSNR),
    rows=(
        Row(name="MAE", runs=_proposed()),
        Row(
            name="hard boundary",
            runs=_proposed(full={"objective.ignore_boundary": 4}, small=_HARD),
            note="a quarter of a patch's side is ignored.",
        ),
        Row(
            name="soft boundary",
            runs=_proposed(
                full={"objective.ignore_boundary": 15, "objective.boundary": "soft"},
                small=_SOFT,
            ),
        ),
        Row(
            name="regions",
            runs=_proposed(
                choices="masking=subtrees,examples=regions",
                full={"data.examples.patch": 16},
                small={"data.examples.patch": 4},
            ),
            note="hides groups of neighbouring patches that look alike.",
        ),
        Row(
            name="affinity",
            runs=_proposed(choices="masking=affinity"),
            note="hides positions whose tokens change together.",
        ),
    ),
    claims=tuple(
        Claim(
            text=f"{what} raises the accuracy.",
            where="section 3.6, as a proposal",
            compares=tuple(
                one
                for name in names
                for title in (HELD_OUT.title, NEIGHBOURS.title, _TENTH.title)
                for one in above(name, ("MAE",), title)
            ),
        )
        for what, names in (
            ("Ignoring the boundary", ("hard boundary", "soft boundary")),
            ("Masking along the structure of images", ("regions", "affinity")),
        )
    ),
    notes=(
        "SSIM and PSNR are figure 5's: the network sees the whole image, and never "
        "learned to predict patches that it sees.",
    ),
)

STUDIES = (THEOREM2, PROPOSALS, PROPOSALS_LABELS)
