# SPDX-License-Identifier: Apache-2.0
"""The table of data sources: the name a config uses and its class."""

from mim_jax.data.sources.base import Source
from mim_jax.data.sources.cues import Cues
from mim_jax.data.sources.digits import Digits
from mim_jax.data.sources.few import Few
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.photos import Photos
from mim_jax.data.sources.tfds import Tfds

SOURCES: dict[str, type[Source]] = {
    "photos": Photos,
    "digits": Digits,
    "cues": Cues,
    "tfds": Tfds,
    "folder": Folder,
    "few": Few,
}
