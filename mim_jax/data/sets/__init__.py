# SPDX-License-Identifier: Apache-2.0
"""The table of evaluation sets: the name a config uses and what builds the set."""

import functools
from collections.abc import Callable

from mim_jax.data.sets import conflicts, digits, imagenet, objectnet
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
    "digits_blur": functools.partial(digits.build, shift="blur"),
    "digits_noise": functools.partial(digits.build, shift="noise"),
    "digits_rotation": functools.partial(digits.build, shift="rotation"),
    "digits_contrast": functools.partial(digits.build, shift="contrast"),
    "digits_inversion": functools.partial(digits.build, shift="inversion"),
}
