# SPDX-License-Identifier: Apache-2.0
"""The tables and the figure of arXiv:2208.04164."""

from collections.abc import Mapping

from mim_jax.studies import runs
from mim_jax.studies.facts import P1
from mim_jax.studies.grid import (
    Claim,
    Column,
    Difference,
    Drawn,
    Row,
    Study,
    Times,
    Training,
)
from mim_jax.studies.runs import finetune, finetune_tenth, probe

_FT, _LINEAR, _TENTH, _NN = (
    "fine-tuned, %",
    "linear, %",
    "10 % of labels, %",
    "10-NN, %",
)
_NEAR = 1.0  # points: "comparable"; the papers call 0.4 slightly lower

_FINETUNED = Column(
    title=_FT,
    run="finetune",
    measure=runs.ACCURACY,
    keys=("accuracy_held_out",),
    metric="FT Acc (%)",
)
_PROBED = Column(
    title=_LINEAR,
    run="probe",
    measure=runs.ROBUSTNESS,
    keys=("accuracy_held_out",),
    metric="Lin. Prob Acc (%)",
)
_TENTHS = Column(
    title=_TENTH,
    run="10pct",
    measure=runs.ACCURACY,
    keys=("accuracy_held_out",),
    metric="10% FT Acc (%)",
)
_NEIGHBOURS = Column(
    title=_NN,
    run="pretrain",
    measure=runs.KNN,
    keys=("accuracy_model_k10",),
    note="ours alone: nearest neighbours of the frozen features, which are the mean "
    "patch token for C-MAE, BEiT and models that learned from labels, and the class "
    "token for others.",
)
_PSNR = Column(
    title="PSNR, dB",
    run="pretrain",
    measure=runs.RECONSTRUCTION,
    keys=("pasted_psnr_db",),
    scale=1.0,
    metric="PSNR (dB)",
    digits=2,
    note="of the image with the visible patches pasted in, and true patch statistics "
    "where the target is normalised (docs/deviations.md).",
)
_CAE = (
    "CAE is not part of this program; --config.given='(\"CAE=RUNDIR\",)' measures a "
    "run of its released weights"
)


def _more(first: str, second: str, column: str = _FT) -> Difference:
    return Difference(first=first, second=second, column=column)


def _near(first: str, second: str, column: str = _FT) -> Difference:
    return Difference(first=first, second=second, column=column, within=_NEAR)


def _tuned(pretrain: Training, *words: str) -> dict[str, Training]:
    """A run and what is trained from it."""
    made = {"finetune": finetune, "10pct": finetune_tenth, "probe": probe}
    return {"pretrain": pretrain, **{word: made[word](pretrain) for word in words}}


# Each run that is fine-tuned in several tables, with all that is trained from it.
_ALL = ("finetune", "10pct", "probe")
_MAE, _CMAE = _tuned(runs.MAE, *_ALL), _tuned(runs.CMAE, *_ALL)
_MAE_400 = _tuned(runs.MAE_400, "finetune")
_MAE_1600 = _tuned(runs.MAE_1600, "finetune")
_RMAE, _MOCO = _tuned(runs.RMAE, "finetune", "10pct"), _tuned(runs.MOCO, *_ALL[:2])
_DINO = _tuned(runs.DINO, "finetune")
_SCRATCH = {"finetune": runs.SCRATCH}
_SCRATCH_300 = {"finetune": runs.SCRATCH_300}
_MAE_IMPL, _RANDOM = "MAE (our impl.)", "Random Init"


def _row(
    name: str, trained: Mapping[str, Training], paper="", setting="", **more
) -> Row:
    return Row(name=name, runs=trained, paper=paper or name, setting=setting, **more)


TABLE1 = Study(
    name="p1_table1",
    title="R-MAE beside MAE and other methods",
    paper=P1,
    table="1",
    columns=(_FINETUNED, _PSNR, _NEIGHBOURS),
    rows=(
        _row("Random Init, 100", _SCRATCH, _RANDOM, "epochs=100"),
        _row("Random Init, 300", _SCRATCH_300, _RANDOM, "epochs=300"),
        _row("MoCo v3", _MOCO),
        _row("DINO", _DINO),
        _row("BEiT", _tuned(runs.BEIT, "finetune")),
        _row("MAE, 1600", _MAE_1600, "MAE [29]"),
        _row("CAE", {}, missing=_CAE),
        _row("MAE", _MAE, _MAE_IMPL),
        _row("R-MAE", _RMAE),
        _row("R-MAE dagger", _tuned(runs.RMAE_DAGGER, "finetune"), "R-MAE-dagger"),
        _row(
            "R-MAE double dagger",
            _tuned(runs.RMAE_DOUBLE_DAGGER, "finetune"),
            "R-MAE-ddagger",
        ),
    ),
    claims=(
        Claim(
            text="Fine-tuning after MAE beats training from scratch.",
            where="section 2",
            compares=(_more("MAE", "Random Init, 100"),),
        ),
        Claim(
            text="R-MAE roughly maintains the benefit of MAE: it is within "
            f"{_NEAR:g} point of MAE, and beats training from scratch.",
            where="section 2",
            compares=(_near("R-MAE", "MAE"), _more("R-MAE", "Random Init, 100")),
        ),
        Claim(
            text="R-MAE reconstructs better than MAE.",
            where="section 2",
            compares=(_more("R-MAE", "MAE", _PSNR.title),),
        ),
        Claim(
            text="The two transformations need not be complementary: R-MAE dagger and "
            f"double dagger are within {_NEAR:g} point of R-MAE.",
            where="section 2",
            compares=(
                _near("R-MAE dagger", "R-MAE"),
                _near("R-MAE double dagger", "R-MAE"),
            ),
        ),
    ),
)

TABLE2 = Study(
    name="p1_table2",
    title="C-MAE beside MAE and other methods",
    paper=P1,
    table="2",
    columns=(_FINETUNED, _NEIGHBOURS),
    rows=(
        _row(_RANDOM, _SCRATCH),
        _row("MoCo v3", _MOCO),
        _row("DINO", _DINO),
        _row("MAE, 1600", _MAE_1600, "MAE [29]"),
        _row("MAE", _MAE, _MAE_IMPL, "epochs=100"),
        _row("C-MAE", _CMAE, "C-MAE", "epochs=100"),
        _row("MAE, 400", _MAE_400, _MAE_IMPL, "epochs=400"),
        _row("C-MAE, 400", _tuned(runs.CMAE_400, "finetune"), "C-MAE", "epochs=400"),
    ),
    claims=(
        Claim(
            text="C-MAE is comparable with MAE: a contrastive loss can take the place "
            f"of the decoder. They are within {_NEAR:g} point.",
            where="section 3",
            compares=(_near("C-MAE", "MAE"), _near("C-MAE, 400", "MAE, 400")),
        ),
        Claim(
            text="Fine-tuning after C-MAE beats training from scratch.",
            where="section 3",
            compares=(_more("C-MAE", _RANDOM),),
        ),
        Claim(
            text="C-MAE gains from longer training.",
            where="section 5",
            compares=(_more("C-MAE, 400", "C-MAE"),),
        ),
    ),
)

TABLE3 = Study(
    name="p1_table3",
    title="Tokens that the loss of C-MAE compares",
    paper=P1,
    table="3",
    columns=(_FINETUNED, _NEIGHBOURS),
    rows=(
        _row(
            "class token",
            _tuned(runs.CMAE_CLASS, "finetune"),
            "C-MAE instance-wise",
            "class_token=yes",
        ),
        _row(
            "average",
            _tuned(runs.CMAE_AVERAGE, "finetune"),
            "C-MAE instance-wise",
            "class_token=no",
        ),
        _row("patch tokens", _CMAE, "C-MAE token-wise", "class_token=no"),
        _row(
            "patch and class tokens",
            _tuned(runs.CMAE_BOTH, "finetune"),
            "C-MAE token-wise",
            "class_token=yes",
        ),
    ),
    claims=(
        Claim(
            text="Comparing tokens is better than comparing images.",
            where="section 3",
            compares=(
                _more("patch tokens", "class token"),
                _more("patch tokens", "average"),
            ),
        ),
        Claim(
            text=f"Adding the class token changes less than {_NEAR:g} point.",
            where="section 3",
            compares=(_near("patch and class tokens", "patch tokens"),),
        ),
    ),
)

_DROPPED = _tuned(runs.CMAE_DROPPED, *_ALL)
TABLE4 = Study(
    name="p1_table4",
    title="Colour jitter for MAE, mask tokens and BYOL for C-MAE",
    paper=P1,
    table="4",
    columns=(_PROBED, _FINETUNED, _TENTHS, _NEIGHBOURS),
    rows=(
        _row("MAE", _MAE),
        _row(
            "MAE, jittered",
            _tuned(runs.MAE_JITTERED, *_ALL),
            "MAE w/ color jitter (whole image)",
        ),
        _row(
            "MAE, input jittered",
            _tuned(runs.MAE_INPUT_JITTERED, *_ALL),
            "MAE w/ color jitter (unmasked only)",
        ),
        _row("C-MAE", _CMAE),
        _row("C-MAE w/o mask token", _DROPPED),
        _row("C-MAE, BYOL", _tuned(runs.CMAE_BYOL, *_ALL), "C-MAE (BYOL loss)"),
        _row(
            "C-MAE w/o mask token, BYOL",
            _tuned(runs.CMAE_DROPPED_BYOL, *_ALL),
            "C-MAE w/o mask token (BYOL loss)",
        ),
        Row(
            name="C-MAE, full view",
            runs=_tuned(runs.CMAE_FULL_VIEW, *_ALL),
            note="ours: one of the two views hides nothing.",
        ),
        Row(
            name="C-MAE, overlap",
            runs=_tuned(runs.CMAE_OVERLAP, *_ALL),
            note="ours: one view hides .75, the other .25, each drawn by itself.",
        ),
    ),
    claims=(
        Claim(
            text="C-MAE is worse than MAE in linear probing and with 10 % of the "
            "labels.",
            where="section 3",
            compares=(_more("MAE", "C-MAE", _LINEAR), _more("MAE", "C-MAE", _TENTH)),
        ),
        Claim(
            text="That is mainly due to mask tokens: without them both recover.",
            where="section 3",
            compares=(
                _more("C-MAE w/o mask token", "C-MAE", _LINEAR),
                _more("C-MAE w/o mask token", "C-MAE", _TENTH),
            ),
        ),
        Claim(
            text="With BYOL's loss the trend is the same: without mask tokens linear "
            "probing and 10 % of the labels recover.",
            where="section 3",
            compares=tuple(
                _more("C-MAE w/o mask token, BYOL", "C-MAE, BYOL", column)
                for column in (_LINEAR, _TENTH)
            ),
        ),
        Claim(
            text="BYOL's loss is less accurate than InfoNCE.",
            where="section 3",
            compares=(
                _more("C-MAE", "C-MAE, BYOL"),
                _more("C-MAE w/o mask token", "C-MAE w/o mask token, BYOL"),
            ),
        ),
        Claim(
            text="With mask tokens C-MAE gains too, if its views share visible "
            "patches.",
            where="ours, asked after the runs of seed 0 had shown it",
            compares=tuple(
                _more(first, "C-MAE", column)
                for first in ("C-MAE, full view", "C-MAE, overlap")
                for column in (_LINEAR, _TENTH)
            ),
        ),
        Claim(
            text="Neither kind of colour jitter makes MAE better: both are within "
            f"{_NEAR:g} point.",
            where="section 3",
            compares=(
                _near("MAE, jittered", "MAE"),
                _near("MAE, input jittered", "MAE"),
            ),
        ),
    ),
    notes=("On grey images colour jitter changes brightness and contrast alone.",),
)

# Table 5: ViT-S on ImageNet-100, whose list of classes makes a data set of one's own.
_SMALL_VIT = {
    "objective.encoder.width": 384,
    "objective.encoder.heads": 6,
    "data.source.dataset": "imagenet100",
}
_HALF = {"steps": Times(0.5)}
_HUNDRED = {"objective.classes": 100, "data.source.dataset": "imagenet100"}
_AUGMENTED = {
    "none": (),
    "masking": ("masking",),
    "cutmix": ("cutmix",),
    "color": ("color",),
    "masking, cutmix": ("masking", "cutmix"),
    "masking, color": ("masking", "color"),
    "cutmix, color": ("cutmix", "color"),
    "masking, cutmix, color": ("masking", "cutmix", "color"),
}


def _augmented(method: str, words: tuple[str, ...]) -> dict[str, Training]:
    """MAE or C-MAE by some of the three augmentations, and its fine-tuning."""
    base = {"MAE": runs.MAE, "C-MAE": runs.CMAE}[method]
    leaves: dict[str, object] = {"objective.cutmix": True} if "cutmix" in words else {}
    if method == "MAE" and "color" in words:
        leaves["objective.color_jitter"] = "input_only"  # it predicts clean images
    if method == "C-MAE" and "color" not in words:
        leaves["objective.color_jitter"] = "none"
    made = base.but(
        leaves=leaves,
        choices="" if "masking" in words else "masking=none",
        full=_SMALL_VIT,
        small=_HALF,
    )
    return {"pretrain": made, "finetune": finetune(made).but(full=_HUNDRED)}


_SUPERVISED_200 = runs.SCRATCH.but(
    full={**_SMALL_VIT, **_HUNDRED, "epochs": 200.0}, small={"steps": Times(2.0)}
)


def _setting5(words: tuple[str, ...]) -> str:
    joined = "+".join("patch masking" if w == "masking" else w for w in words)
    return f"aug={joined or 'none'}"


def _rows5(method: str) -> tuple[Row, ...]:
    return tuple(
        _row(
            f"{method}, {name}",
            _augmented(method, words),
            method,
            _setting5(words),
        )
        for name, words in _AUGMENTED.items()
    )


TABLE5 = Study(
    name="p1_table5",
    title="Patch masking, cutmix and colour, alone and together",
    paper=P1,
    table="5",
    columns=(
        Column(
            title=_FT,
            run="finetune",
            measure=runs.ACCURACY,
            keys=("accuracy_held_out",),
            metric="Acc (%)",
        ),
        _NEIGHBOURS,
    ),
    rows=(
        _row("supervised, 200", {"finetune": _SUPERVISED_200}, "Sup"),
        *_rows5("MAE"),
        *_rows5("C-MAE"),
    ),
    claims=(
        Claim(
            text="Both methods lose much without patch masking.",
            where="section 3",
            compares=tuple(
                _more(f"{method}, masking{more}", f"{method}, {less}")
                for method in ("MAE", "C-MAE")
                for more, less in (
                    ("", "none"),
                    (", cutmix", "cutmix"),
                    (", color", "color"),
                    (", cutmix, color", "cutmix, color"),
                )
            ),
        ),
        Claim(
            text="C-MAE gains from cutmix and colour beside masking.",
            where="section 3",
            compares=(_more("C-MAE, masking, cutmix, color", "C-MAE, masking"),),
        ),
        Claim(
            text="MAE does not: masking alone is better than all three.",
            where="section 3",
            compares=(_more("MAE, masking", "MAE, masking, cutmix, color"),),
        ),
    ),
    notes=(
        "At embedded sizes runs have half of the usual steps, as the paper's own have "
        "a smaller network and a smaller data set.",
        "The paper's header lost its colours: which column is which is partly a guess.",
        "On grey images colour means brightness and contrast alone.",
    ),
)

# Few images. An epoch is as many draws as ImageNet has images.
_EPOCH = {"epoch_images": 1281167}
_STRONGER = {"data.crop_scale": (0.08, 1.0), "objective.color_jitter": "whole"}
_ONE_EACH = dict(
    few=dict(images=1000, sampling="one_per_class"),
    few_small=dict(images=10, sampling="one_per_class"),
)


def _few(images: int, epochs: int, stronger: bool = True) -> dict[str, Training]:
    """MAE on some images, stopped after some epochs of 100."""
    full, small, leaves = dict(_EPOCH), {}, {}
    if stronger:
        leaves, full = _STRONGER, full | {"objective.jitter.blur_p": 0.5}
    if epochs < 100:
        full = full | {"stop_after": -(-epochs * 1281167 // 1024)}
        small = {"stop_after": 50 * epochs}
    made = runs.MAE.but(leaves=leaves, full=full, small=small, few=dict(images=images))
    stopped = "" if epochs == 100 else f"-{epochs}epochs"
    made = made.but(called=f"mae-few{images}{'-stronger' * stronger}{stopped}")
    return _tuned(made, "finetune")


TABLE6 = Study(
    name="p1_table6",
    title="MAE on 1 to 1,000 images",
    paper=P1,
    table="6",
    columns=(_FINETUNED,),
    rows=(
        _row("1 image", _few(1, 5)),
        _row("10 images", _few(10, 5)),
        _row("100 images", _few(100, 10)),
        _row("1000 images", _few(1000, 10)),
        _row(
            "1000 images, 100 epochs, stronger",
            _few(1000, 100),
            "1000 images (row 5)",
        ),
        _row(
            "1000 images, 100 epochs",
            _few(1000, 100, stronger=False),
            "1000 images (row 6)",
        ),
        _row("Random Init, 100", _SCRATCH, _RANDOM, "ft_epochs=100"),
        _row("Random Init, 300", _SCRATCH_300, _RANDOM, "ft_epochs=300"),
    ),
    claims=(
        Claim(
            text="MAE on one image is a better start than none.",
            where="section 4",
            compares=(_more("1 image", "Random Init, 100"),),
        ),
        Claim(
            text="It is on a par with three times as much training from scratch: "
            f"within {_NEAR:g} point.",
            where="section 4",
            compares=(_near("1 image", "Random Init, 300"),),
        ),
        Claim(
            text=f"1,000 images are no better than one: within {_NEAR:g} point.",
            where="section 4",
            compares=(_near("1000 images", "1 image"),),
        ),
    ),
    notes=(
        "At embedded sizes 5 epochs are a quarter of the usual steps and 10 are half, "
        "so that the warm-up ends; 1,000 images are a quarter of the training images.",
    ),
)


def _sampled(sampling: str) -> dict[str, Training]:
    few = dict(images=1000, sampling=sampling)
    return _tuned(
        runs.MAE.but(full=_EPOCH, few=few, few_small={**few, "images": 10}), "finetune"
    )


_MAE_ONE_EACH = _tuned(runs.MAE.but(full=_EPOCH, **_ONE_EACH), *_ALL)
TABLE7 = Study(
    name="p1_table7",
    title="How the images are chosen",
    paper=P1,
    table="7",
    columns=(_FINETUNED,),
    rows=(
        _row("in one class", _sampled("one_class")),
        _row("random", _sampled("random")),
        _row("one per class", _MAE_ONE_EACH),
    ),
    claims=(
        Claim(
            text=f"The choice of images does not matter: all are within {_NEAR:g} "
            "point.",
            where="section 4",
            compares=(
                _near("in one class", "random"),
                _near("one per class", "random"),
            ),
        ),
    ),
    notes=("At embedded sizes 10 images take the place of 1,000.",),
)


def _one_each(
    pretrain: Training, small: dict[str, int] | None = None, **full: float
) -> dict[str, Training]:
    small = {**pretrain.small, **(small or {})}
    pretrain = pretrain.but(full=_EPOCH | full, small=small, **_ONE_EACH)
    return _tuned(pretrain, *_ALL)


TABLE8 = Study(
    name="p1_table8",
    title="Methods on one image of each class",
    paper=P1,
    table="8",
    columns=(_PROBED, _FINETUNED, _TENTHS, _NEIGHBOURS),
    rows=(
        _row(
            _RANDOM,
            {
                "finetune": runs.SCRATCH,
                "10pct": runs.SCRATCH_TENTH,
                "probe": runs.RANDOM_PROBE,
            },
        ),
        # As many steps as the other methods have.
        _row("Supervised", _one_each(runs.SCRATCH, small={"steps": 1000})),
        _row("MoCo v3", _one_each(runs.MOCO, epochs=100.0)),
        _row("MAE", _MAE_ONE_EACH),
        _row("R-MAE", _one_each(runs.RMAE)),
        _row("C-MAE", _one_each(runs.CMAE)),
    ),
    claims=(
        Claim(
            text="MAE's features of few images are less semantic: supervised features "
            "are better in linear probing.",
            where="section 4",
            compares=(_more("Supervised", "MAE", _LINEAR),),
        ),
        Claim(
            text="Fine-tuned, MAE, R-MAE and C-MAE beat supervised training and MoCo "
            "v3 on the same images.",
            where="section 4",
            compares=tuple(
                _more(first, second)
                for first in ("MAE", "R-MAE", "C-MAE")
                for second in ("Supervised", "MoCo v3")
            ),
        ),
        Claim(
            text="The same with 10 % of the labels.",
            where="section 4",
            compares=tuple(
                _more(first, second, _TENTH)
                for first in ("MAE", "R-MAE", "C-MAE")
                for second in ("Supervised", "MoCo v3")
            ),
        ),
    ),
    notes=(
        "At embedded sizes 10 images, one of each class, take the place of 1,000.",
        "Neighbours are searched among the images of pre-training alone, so 10-NN is "
        "comparable within this table only.",
    ),
)

_FULL_VIEW_NOTE = (
    "C-MAE, full view, is ours: one of the two views hides nothing (docs/cmae.md)."
)
_SUPERVISED_NOTE = (
    "The supervised model trains for as long as fine-tuning does, as the paper has it "
    "(section 5): 100 epochs on ImageNet. On embedded data that is 300 steps, and "
    "pre-training has 1,000."
)
_FEATURES = {
    "MAE": runs.MAE,
    "R-MAE": runs.RMAE,
    "C-MAE": runs.CMAE,
    "C-MAE, full view": runs.CMAE_FULL_VIEW,
    "MoCo v3": runs.MOCO,
    "supervised": runs.SCRATCH,
    "MAE, fine-tuned": _MAE["finetune"],
    "R-MAE, fine-tuned": _RMAE["finetune"],
}


def _cka(ratio: str, measure=runs.CKA, last: bool = False) -> Column:
    where = "last_block" if last else "mean_over_blocks"
    words = "last block" if last else "mean of blocks"
    how = "" if measure is runs.CKA else ", as trained"
    return Column(
        title=f"CKA, {ratio} hidden{how}, {words}",
        run="features",
        measure=measure,
        keys=(f"cka_ratio{ratio}_{where}",),
        scale=1.0,
        digits=3,
    )


_HALF_HIDDEN, _MOST_HIDDEN = _cka("0.5"), _cka("0.7")
FIGURE1 = Study(
    name="p1_figure1",
    title="CKA of full and masked images, block by block",
    paper=P1,
    columns=(
        _HALF_HIDDEN,
        _MOST_HIDDEN,
        _cka("0.7", last=True),
        _cka("0.9"),
        _cka("0.7", runs.CKA_AS_TRAINED),
    ),
    rows=(
        *(Row(name=name, runs={"features": one}) for name, one in _FEATURES.items()),
        Row(name="random", runs={"features": runs.MAE}, weights="initial"),
        Row(
            name="random, C-MAE's",
            runs={"features": runs.CMAE},
            weights="initial",
            note="where 'as trained' means mask tokens.",
        ),
    ),
    claims=(
        Claim(
            text="MAE, R-MAE and C-MAE change less than a supervised model and MoCo v3 "
            "when much is hidden.",
            where="section 2",
            compares=tuple(
                _more(first, second, _MOST_HIDDEN.title)
                for first in ("MAE", "R-MAE", "C-MAE")
                for second in ("supervised", "MoCo v3")
            ),
        ),
        Claim(
            text="Fine-tuning lowers the CKA of MAE and R-MAE, but it stays above that "
            "of a model trained from scratch.",
            where="section 2",
            compares=(
                _more("MAE", "MAE, fine-tuned", _MOST_HIDDEN.title),
                _more("R-MAE", "R-MAE, fine-tuned", _MOST_HIDDEN.title),
                _more("MAE, fine-tuned", "supervised", _MOST_HIDDEN.title),
                _more("R-MAE, fine-tuned", "supervised", _MOST_HIDDEN.title),
            ),
        ),
    ),
    figures=(Drawn(run="features", measure=runs.CKA),),
    notes=(
        "The paper's figure has no numbers. Hidden patches are dropped; 'as trained' "
        "hides them as the method does, with mask tokens for C-MAE.",
        _FULL_VIEW_NOTE,
        _SUPERVISED_NOTE,
    ),
)

FEW_LABELS = Study(
    name="p1_few_labels",
    title="Fine-tuning on a tenth of the labels, and less",
    paper=P1,
    table="4",
    columns=(
        _TENTHS,
        Column(
            title="ridge, 10 labels a class, %",
            run="pretrain",
            measure=runs.RIDGE,
            keys=("accuracy_10_shot",),
        ),
        Column(
            title="ridge, 1 label a class, %",
            run="pretrain",
            measure=runs.RIDGE,
            keys=("accuracy_1_shot",),
        ),
    ),
    rows=(
        Row(name="from scratch", runs={"10pct": runs.SCRATCH_TENTH}),
        Row(name="random features", runs={"pretrain": runs.MAE}, weights="initial"),
        _row("MAE", _MAE),
        Row(name="R-MAE", runs=_RMAE),
        Row(name="MoCo v3", runs=_MOCO),
        _row("C-MAE", _CMAE),
        _row("C-MAE w/o mask token", _DROPPED),
    ),
    claims=(
        Claim(
            text="With 10 % of the labels, pre-training beats training from scratch.",
            where="after table 8, which has it for 1,000 images",
            compares=tuple(
                _more(first, "from scratch", _TENTH)
                for first in ("MAE", "R-MAE", "C-MAE")
            ),
        ),
    ),
)


def _occluded(title: str, key: str) -> Column:
    percent = title.endswith("%")
    return Column(
        title=title,
        run="features",
        measure=runs.OCCLUSION,
        keys=(key,),
        scale=100.0 if percent else 1.0,
        digits=1 if percent else 3,
    )


_FOUND = _occluded("own image nearest, 0.7 hidden, %", "retrieval_model_ratio0.7")
_LEFT = _occluded("probe, 0.7 hidden, %", "accuracy_model_ratio0.7")
OCCLUSION = Study(
    name="occlusion",
    title="What hiding patches does to features",
    paper=P1,
    columns=(
        _occluded("cosine, 0.7 hidden", "cosine_model_ratio0.7"),
        _occluded("cosine to others", "cosine_others_model_ratio0.7"),
        _occluded("CKA, 0.7 hidden", "cka_model_ratio0.7"),
        _FOUND,
        _occluded("probe, full images, %", "accuracy_model_full"),
        _LEFT,
        _occluded("probe, 0.7 hidden, untrained, %", "accuracy_untrained_ratio0.7"),
    ),
    rows=tuple(row for row in FIGURE1.rows if row.weights == "trained"),
    claims=(
        Claim(
            text="Masked images of MAE, R-MAE and C-MAE stay nearer to their own full "
            "images than those of a supervised model and MoCo v3.",
            where="the question of the title; ours",
            compares=tuple(
                _more(first, second, _FOUND.title)
                for first in ("MAE", "R-MAE", "C-MAE")
                for second in ("supervised", "MoCo v3")
            ),
        ),
        Claim(
            text="Contrastive features are better than those of MAE in linear probing.",
            where="arXiv:2306.04898, section 2.3",
            compares=(_more("MoCo v3", "MAE", "probe, full images, %"),),
        ),
    ),
    figures=(Drawn(run="features", measure=runs.OCCLUSION, names=("occlusion",)),),
    notes=(
        "Neither paper has these numbers: they ask the question of P1's title.",
        "Patches are hidden as the method hides them: by mask tokens for C-MAE, else "
        "dropped. The feature is the mean patch token for C-MAE and for models that "
        "learned from labels, and the class token for others.",
        _FULL_VIEW_NOTE,
        _SUPERVISED_NOTE,
    ),
)

STUDIES = (
    *(TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, TABLE7, TABLE8),
    *(FIGURE1, FEW_LABELS, OCCLUSION),
)
