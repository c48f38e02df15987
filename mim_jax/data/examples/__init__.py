# SPDX-License-Identifier: Apache-2.0
"""The table of ways to make examples: the name a config uses and its class."""

from mim_jax.data.examples.base import Examples
from mim_jax.data.examples.crops import Crops
from mim_jax.data.examples.instances import Instances
from mim_jax.data.examples.regions import Regions

EXAMPLES: dict[str, type[Examples]] = {
    "crops": Crops,
    "instances": Instances,
    "regions": Regions,
}
