# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: `configs/` ships inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mim_jax*"]), "mim_jax.configs"],
    package_dir={"mim_jax.configs": "configs"},
)
