# SPDX-License-Identifier: Apache-2.0
"""Objectives by name."""

from mim_jax.objectives.base import Objective
from mim_jax.objectives.beit import BEiT
from mim_jax.objectives.cmae import CMAE
from mim_jax.objectives.detection import Detection
from mim_jax.objectives.dino import DINO
from mim_jax.objectives.encoder import EncoderOnly
from mim_jax.objectives.mae import MAE
from mim_jax.objectives.mocov3 import MoCoV3
from mim_jax.objectives.probe import Probe
from mim_jax.objectives.rmae import RMAE
from mim_jax.objectives.supervised import Supervised

OBJECTIVES: dict[str, type[Objective]] = {
    "mae": MAE,
    "rmae": RMAE,
    "cmae": CMAE,
    "mocov3": MoCoV3,
    "dino": DINO,
    "beit": BEiT,
    "supervised": Supervised,
    "probe": Probe,
    "encoder": EncoderOnly,
    "detection": Detection,
}
