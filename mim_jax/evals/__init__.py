# SPDX-License-Identifier: Apache-2.0
"""Evaluations by name."""

from mim_jax.evals.attention import Attention
from mim_jax.evals.base import Eval
from mim_jax.evals.cka import CKA
from mim_jax.evals.detection import DetectionAP
from mim_jax.evals.knn import KNN
from mim_jax.evals.latents import Latents
from mim_jax.evals.linear import Linear
from mim_jax.evals.occlusion import Occlusion
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.ridge import Ridge
from mim_jax.evals.robustness import Robustness
from mim_jax.evals.shape_bias import ShapeBias
from mim_jax.evals.tsne import TSNE

EVALS: dict[str, type[Eval]] = {
    "reconstruction": Reconstruction,
    "knn": KNN,
    "linear": Linear,
    "ridge": Ridge,
    "cka": CKA,
    "occlusion": Occlusion,
    "attention": Attention,
    "tsne": TSNE,
    "robustness": Robustness,
    "shape_bias": ShapeBias,
    "latents": Latents,
    "detection": DetectionAP,
}
