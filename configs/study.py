# SPDX-License-Identifier: Apache-2.0
"""Any study by its name, such as one that a module of yours declares.

python -m mim_jax.main --plugins=my_module --config=configs/study.py:digits \
    --config.study=mine --workdir=studies/mine

docs/studies.md says how a study is declared. Variants are its sizes: `:mnist`, `:cues`,
`:digits`, `:hierarchy`, `:scenes`, or none for the paper's.
"""

from mim_jax import config


def get_config(variant: str = "") -> config.Tree:
    size, _ = config.variant(
        variant, presets=("mnist", "cues", "digits", "hierarchy", "scenes")
    )
    c = config.experiment("study")
    c.size = size or "full"
    return c
