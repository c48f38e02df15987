# SPDX-License-Identifier: Apache-2.0
"""The trainings and measures that several studies share.

Lengths: at embedded sizes a run that the papers train for 100 epochs has 1,000 steps.
Those of 400 epochs have twice as many, since C-MAE is slow, and MAE of 1,600 epochs
four times. MoCo v3, DINO and BEiT, which the papers train for 300 to 800 epochs, have
1,000. Fine-tuning on a tenth of the labels has half of the steps of all labels.
"""

from mim_jax.studies.grid import Measure, Shifts, Times, Training

MAE = Training(recipe="mae")
MAE_400 = MAE.but(full={"epochs": 400.0}, small={"steps": Times(2.0)})
MAE_1600 = MAE.but(
    full={"epochs": 1600.0, "batch_size": 4096, "optim.warmup_epochs": 40.0},
    small={"steps": Times(4.0)},
)
MAE_JITTERED = MAE.but(leaves={"objective.color_jitter": "whole"})
MAE_INPUT_JITTERED = MAE.but(leaves={"objective.color_jitter": "input_only"})

RMAE = Training(recipe="rmae")
RMAE_DAGGER = RMAE.but(leaves={"objective.t2": "independent"})
RMAE_DOUBLE_DAGGER = RMAE.but(leaves={"objective.t2": "identity"})

CMAE = Training(recipe="cmae")
CMAE_400 = CMAE.but(full={"epochs": 400.0}, small={"steps": Times(2.0)})
CMAE_CLASS = CMAE.but(leaves={"objective.tokens": "cls"})
CMAE_AVERAGE = CMAE.but(leaves={"objective.tokens": "avg"})
CMAE_BOTH = CMAE.but(leaves={"objective.tokens": "patch+cls"})
CMAE_FULL_VIEW = CMAE.but(leaves={"objective.t2": "identity"})
CMAE_OVERLAP = CMAE.but(
    leaves={"objective.t2": "independent", "objective.t2_masking.ratio": 0.25}
)
CMAE_BYOL = CMAE.but(leaves={"objective.contrast": "byol"})
CMAE_DROPPED = CMAE_AVERAGE.but(leaves={"objective.mask_token": False})
CMAE_DROPPED_BYOL = CMAE_DROPPED.but(leaves={"objective.contrast": "byol"})

MOCO = Training(recipe="mocov3")
# The first 50 epochs warm the teacher up, and 3 freeze the prototypes, as they do in a
# run of 400 epochs.
DINO = Training(
    recipe="dino",
    full={
        "epochs": 800.0,
        "objective.teacher_warmup": 50 / 800,
        "objective.freeze_prototypes": 3 / 800,
    },
)
BEIT = Training(recipe="beit", full={"epochs": 300.0})

# From scratch, on all labels and on a tenth of them.
SCRATCH = Training(recipe="supervised")
SCRATCH_300 = SCRATCH.but(full={"epochs": 300.0}, small={"steps": Times(3.0)})
_TENTH = Training(
    recipe="finetune",
    variant="10pct",
    few_small=dict(share=0.1, sampling="stratified"),
    small={"steps": Times(0.5)},
)
SCRATCH_TENTH = _TENTH.but(leaves={"optim.layer_decay": 1.0}, called="supervised-10pct")
# Where no run is named, the probe's features are those of a random encoder.
RANDOM_PROBE = Training(recipe="linear_probe")


def finetune(parent: Training) -> Training:
    """Fine-tuning a run on all labels."""
    return Training(recipe="finetune", parent=parent)


def finetune_tenth(parent: Training) -> Training:
    """Fine-tuning a run on a tenth of the labels."""
    return _TENTH.but(parent=parent, called="finetune-10pct")


def probe(parent: Training) -> Training:
    """A linear classifier on the frozen features of a run."""
    return Training(recipe="linear_probe", parent=parent)


def detect(parent: Training) -> Training:
    """Finding objects, from a run."""
    return Training(recipe="detect", parent=parent)


# All layers of an encoder that was not pre-trained learn at the same rate.
SCRATCH_DETECT = Training(
    recipe="detect", leaves={"optim.layer_decay": 1.0}, called="detect-scratch"
)


ACCURACY = Measure(name="accuracy", eval="robustness", settings=dict(mistakes=0))
ROBUSTNESS = Measure(
    name="robustness",
    eval="robustness",
    settings=dict(sets=Shifts(), mistakes=0),
    full=dict(skip_absent=True),
)
RECONSTRUCTION = Measure(
    name="reconstruction",
    eval="reconstruction",
    settings=dict(images=256, draws=1, inpainted=8, rows=1),
    full=dict(images=5000, inpainted=64),
)
KNN = Measure(
    name="knn",
    eval="knn",
    settings=dict(k=(10,), rows=1, neighbours=1),
    full=dict(untrained=False),
)
RIDGE = Measure(name="ridge", eval="ridge")
CKA = Measure(name="cka", eval="cka", keep=("cka", "ratios", "occlusion"))
CKA_AS_TRAINED = Measure(
    name="cka_as_trained",
    eval="cka",
    settings=dict(occlusion="model"),
    keep=("cka", "ratios", "occlusion"),
)
ATTENTION = Measure(
    name="attention",
    eval="attention",
    settings=dict(rows=4),
    keep=("images", "place", "class_token", "chosen_token"),
)
TSNE = Measure(name="tsne", eval="tsne", keep=("plane", "labels", "names", "chosen"))
SHAPE_BIAS = Measure(
    name="shape_bias",
    eval="shape_bias",
    settings=dict(set="cues", examples=0),
    full=dict(set="cue_conflict"),
)
DETECTION = Measure(
    name="detection",
    eval="detection",
    settings=dict(shown=1),
    keep=("class_names", "ap_box_by_class", "ap_mask_by_class"),
)
LATENTS = Measure(
    name="latents",
    eval="latents",
    keep=("fields", "r2_model", "r2_untrained", "r2_raw"),
)
OCCLUSION = Measure(
    name="occlusion",
    eval="occlusion",
    settings=dict(draws=1),
    keep=(
        *("ratios", "hidden_share", "occlusion", "feature"),
        *("cosine_model", "cka_model", "retrieval_model"),
        *("cosine_untrained", "cka_untrained", "retrieval_untrained"),
    ),
)
