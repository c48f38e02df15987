# SPDX-License-Identifier: Apache-2.0
"""A few images of another source, for training on nothing else."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

import numpy as np

from mim_jax.data.fields import Fields
from mim_jax.data.sources.base import Source
from mim_jax.schema import check_ranges, to_json, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Few(Source):
    """Images chosen once from `source`: arXiv:2208.04164, section 4, tables 6 to 8, and
    fine-tuning on a part of the labels.

    The choice is a pure function of the seed and the source's fingerprint, the same on
    any machine. With one seed and one sampling, a choice of 10 images is part of the
    choice of 100; with "one_class", as long as the class of the 10 has 100 images.

    "random" reads no record. The other samplings need the label of every record.
    `digits` and `folder` know them. `tfds` stores labels beside the images, so each
    process of a run reads the whole data set once when it starts (ImageNet: 140 GB).
    To avoid that, set `ids` to those that an earlier run wrote to its images.json.

    The held-out split is that of `source`.

    Attributes:
        source: to choose from.
        images: how many.
        share: if set, how many as a share 0..1 of the source, rounded; 0.1 for the
            10 % of semi-supervised fine-tuning.
        sampling: "random": uniform over all images; "one_class": all from one class,
            drawn among those that are large enough; "one_per_class": no two from the
            same class; "stratified": from each class in proportion to its size, to
            within one image.
        seed: of the choice, >= 0.
        ids: positions in the source. If set, they are the choice, and `images`,
            `share`, `sampling` and `seed` have no effect.
    """

    source: Source
    images: int = within(1, least=1)
    share: float | None = within(None, above=0, most=1)
    sampling: Literal["random", "one_class", "one_per_class", "stratified"] = "random"
    seed: int = within(0, least=0, most=2**31 - 1)
    ids: tuple[int, ...] = within((), least=0)

    def __post_init__(self):
        check_ranges(self)
        count = len(self.source)
        if self.ids:
            if max(self.ids) >= count:
                raise ValueError(
                    f"ids={_short(self.ids)}: want 0 <= id < {count}, the number of "
                    "images of the source"
                )
            if len(set(self.ids)) < len(self.ids):
                raise ValueError(f"ids={_short(self.ids)}: want each one once")
            return
        if self.share is not None and self.share < 0.5 / count:
            raise ValueError(
                f"share={self.share}: want 1/{count} <= share <= 1, so that there is "
                "an image"
            )
        if self.images > count:
            raise ValueError(
                f"images={self.images}: want 1 <= images <= {count}, the number of "
                "images of the source"
            )
        if self.sampling == "random":
            return
        classes = len(self.source.classes)
        if not classes:
            raise ValueError(
                f"sampling={self.sampling!r} of a source without labels: want "
                "sampling='random', or a source with classes"
            )
        if self.sampling == "one_per_class" and self._count > classes:
            raise ValueError(
                f"images={self._count}, sampling='one_per_class': want at most "
                f"{classes} images, one of each class"
            )

    def chosen(self) -> tuple[int, ...]:
        """Positions in `source` of these images, record by record.

        Raises:
            ValueError: the classes have too few images for this sampling.
        """
        return self._chosen

    @functools.cached_property
    def _chosen(self) -> tuple[int, ...]:
        return self.ids or tuple(self._choose().tolist())

    def _choose(self) -> np.ndarray:
        # Raw bits of a named generator are the same in every version of NumPy; its
        # shuffles and choices are not.
        known = to_json(self.source.fingerprint(), sort_keys=True)
        digest = hashlib.sha256(known.encode()).digest()
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, *digest]))
        order = np.argsort(bits.random_raw(len(self.source)), kind="stable")
        if self.sampling == "random":
            return order[: self._count]
        labels = self.source.labels()[order]
        classes = np.argsort(bits.random_raw(len(self.source.classes)), kind="stable")
        counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        if self.sampling == "one_class":
            large = classes[counts[classes] >= self._count]
            if not len(large):
                raise ValueError(
                    f"images={self._count}, sampling='one_class': want at most "
                    f"{counts.max()}, the images of the largest class"
                )
            return order[labels == large[0]][: self._count]
        if self.sampling == "stratified":
            return self._stratified(order, labels, classes, counts)
        found = classes[counts[classes] > 0]
        if len(found) < self._count:
            raise ValueError(
                f"images={self._count}, sampling='one_per_class': want at most "
                f"{len(found)}, the classes that have an image"
            )
        return np.array([order[labels == one][0] for one in found[: self._count]])

    def _stratified(self, order, labels, classes, counts) -> np.ndarray:
        """By largest remainders: each class gets its share of the choice, rounded down.
        The images still missing come one each from the classes with the largest
        remainders; ties are in random order."""
        known = int(counts.sum())
        if self._count > known:
            raise ValueError(
                f"images={self._count}, sampling='stratified': want at most {known}, "
                "the images with a label"
            )
        whole, rest = np.divmod(counts * self._count, known)
        missing = self._count - int(whole.sum())
        whole[classes[np.argsort(-rest[classes], kind="stable")][:missing]] += 1
        chosen = [order[labels == one][:n] for one, n in enumerate(whole)]
        return np.sort(np.concatenate(chosen))

    @property
    def _count(self) -> int:
        if self.share is None:
            return self.images
        return round(self.share * len(self.source))

    def __len__(self) -> int:
        return len(self.ids) or self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self._chosen[index]]

    def name_of(self, index: int) -> str:
        return self.source.name_of(self._chosen[index])

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def channels(self) -> int:
        return self.source.channels

    def fields(self) -> Fields:
        return self.source.fields()

    def held_out(self) -> Source:
        return self.source.held_out()

    def keep(self) -> None:
        self.source.keep()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": "few",
            "count": len(self),
            "ids": hashlib.sha256(to_json(self._chosen).encode()).hexdigest(),
            "source": self.source.fingerprint(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # The choice travels too, or a worker would read all labels again to make it.
        return {**super().__getstate__(), "_chosen": self._chosen}


def _short(ids: tuple[int, ...]) -> str:
    return str(ids) if len(ids) < 8 else f"({', '.join(map(str, ids[:5]))}, ...)"
