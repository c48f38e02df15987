# SPDX-License-Identifier: Apache-2.0
"""The tables of plug-ins, for tests that add rows."""

import contextlib
from collections.abc import Iterator

from mim_jax import config


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Rows that are added inside are gone outside."""
    before = {kind: dict(table) for kind, (_, table) in config.KINDS.items()}
    try:
        yield
    finally:
        for kind, (_, table) in config.KINDS.items():
            table.clear()
            table.update(before[kind])
