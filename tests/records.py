# SPDX-License-Identifier: Apache-2.0
"""A source whose images tell which record they are, and what tests do with batches."""

import dataclasses

import numpy as np

from mim_jax.data.sources.base import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(Source):
    """Record i is a grey square of value i mod 256; those of `bad` are no image."""

    count: int = 10
    bad: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        square = np.full((5, 6, 1), index % 256, np.uint8)
        return {"image": b"bad" if index in self.bad else square, "label": index % 3}

    @property
    def classes(self):
        return ("a", "b", "c")

    @property
    def channels(self):
        return 1

    def held_out(self):
        return dataclasses.replace(self, count=self.count // 2)

    def fingerprint(self):
        return {"name": "numbered"}


def join(batches):
    batches = list(batches)
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
