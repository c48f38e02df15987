# SPDX-License-Identifier: Apache-2.0
"""The table of evaluation sets: the name a config uses and what builds the set."""

import functools
from collections.abc import Callable

from mim_jax.data.sets import conflicts, imagenet, objectnet, shifts
from mim_jax.data.sets.base import EvaluationSet

# Each is called with (name, folder or "", source of the run).
SETS: dict[str, Callable[..., EvaluationSet]] = {
    "imagenet_v2": functools.partial(
        imagenet.build, dataset="imagenet_v2/matched-frequency", numbered=True
    ),
    "imagenet_r": functools.partial(imagenet.build, dataset="imagenet_r", some=True),
    "imagenet_a": functools.partial(imagenet.build, dataset="imagenet_a", some=True),
    "imagenet_sketch": functools.partial(imagenet.build, dataset="imagenet_sketch"),
    "imagenet_real": imagenet.real,
    "objectnet": objectnet.objectnet,
    "cue_conflict": conflicts.cue_conflict,
    "cues": conflicts.drawn,
}
for _group, _build in {"shift": shifts.build, "digits": shifts.of_digits}.items():
    for _shift in ("blur", "noise", "rotation", "contrast", "inversion"):
        SETS[f"{_group}_{_shift}"] = functools.partial(_build, shift=_shift)
