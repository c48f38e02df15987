# SPDX-License-Identifier: Apache-2.0
"""The table of data sources: the name a config uses and its class."""

from mim_jax.data.sources.base import Source
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.cues import Cues
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.hierarchy import Hierarchy
from mim_jax.data.sources.mnist import Mnist
from mim_jax.data.sources.of_classes import OfClasses
from mim_jax.data.sources.photos import Photos
from mim_jax.data.sources.scenes import Scenes
from mim_jax.data.sources.tfds import Tfds

SOURCES: dict[str, type[Source]] = {
    "photos": Photos,
    "mnist": Mnist,
    "digits": Digits,
    "cues": Cues,
    "hierarchy": Hierarchy,
    "scenes": Scenes,
    "coco": Coco,
    "tfds": Tfds,
    "folder": Folder,
    "few": Few,
    "classes": OfClasses,
}
