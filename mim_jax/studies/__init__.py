# SPDX-License-Identifier: Apache-2.0
"""The table of studies: the name of each and what it declares.

A module of your own, named by --plugins, adds a study of your own:
`STUDIES[study.name] = study`.
"""

from mim_jax.studies import p1, p2, theory
from mim_jax.studies.grid import Study

STUDIES: dict[str, Study] = {
    one.name: one for one in (*p1.STUDIES, *p2.STUDIES, *theory.STUDIES)
}
