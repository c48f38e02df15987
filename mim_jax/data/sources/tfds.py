# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS prepared as array_record, read without TensorFlow."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mim_jax.data.fields import Fields, FieldSpec
from mim_jax.data.sources.base import Source

PREPARE = "python -m mim_jax.data.prepare"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def find_version(data_dir: str, dataset: str) -> epath.Path | None:
    """Folder of a prepared data set, in the version named or else the newest one.

    Args:
        data_dir: where TFDS prepares: a folder, also one of a bucket (gs://...); "~"
            is expanded.
        dataset: "name", "name/config", either one with ":version".
    Raises:
        ValueError: the bucket that `data_dir` names cannot be read.
    """
    name, _, version = dataset.partition(":")
    folder = epath.Path(data_dir).expanduser() / name
    if data_dir.startswith("gs://"):
        _check_bucket(folder)
    if version:
        found = [folder / version]
    elif folder.is_dir():
        found = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)]
        found.sort(key=lambda path: [int(part) for part in path.name.split(".")])
    else:
        found = []
    found = [path for path in found if (path / "dataset_info.json").exists()]
    return found[-1] if found else None


def _check_bucket(folder: epath.Path) -> None:
    """Raise if a bucket cannot be read: the library would say that nothing is there."""
    try:
        next(iter(folder.iterdir()), None)
    except FileNotFoundError:
        return
    except ImportError as error:
        raise ValueError(
            f"{folder}: want the packages for buckets: pip install -e '.[tpu]' or "
            "'.[cuda]'"
        ) from error
    except Exception as error:  # whatever the library for buckets raises
        raise ValueError(
            f"{folder} cannot be read: want an existing bucket, credentials and the "
            "role Storage Object Viewer (roles/storage.objectViewer) on it ("
            f"{' '.join(str(error).split())})"
        ) from error


def builder_of(folder: epath.PathLike) -> Any:
    """The builder of a prepared data set. This reads metadata: it downloads nothing and
    runs no code of the data set.

    Raises:
        ValueError: a class of features is not of TFDS.
    """
    import tensorflow_datasets as tfds

    with _no_other_features():
        return tfds.builder_from_directory(folder)


@contextlib.contextmanager
def _no_other_features() -> Iterator[None]:
    """Inside this block TFDS imports no module but its own.

    The features.json of a data set names classes, and TFDS imports their modules,
    which may be any that Python finds, in the working directory for example.
    """
    from tensorflow_datasets.core.features import feature

    connector: Any = feature.FeatureConnector
    method = vars(connector)["cls_from_name"]

    def cls_from_name(cls, name: str) -> Any:
        known = name in cls._registered_features  # by tfds, or by a user's own program
        if not known and not name.startswith("tensorflow_datasets."):
            raise ValueError(
                f"features.json names the class {name!r}, whose module is not of TFDS, "
                "and a data set imports nothing; want features of TFDS, or "
                f"--plugins={name.rpartition('.')[0] or name} if you trust this code"
            )
        return method.__func__(cls, name)

    connector.cls_from_name = classmethod(cls_from_name)
    try:
        yield
    finally:
        connector.cls_from_name = method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(Source):
    """A prepared data set, e.g. ImageNet. `mim_jax.data.prepare` prepares one.

    Reading a record reads no other, and leaves its image encoded. A record has all
    features of the data set besides `image` and `label`.
    """

    dataset: str = "imagenet2012"  # "name", "name/config" or "name:version"
    split: str = "train"  # any split of TFDS, e.g. "train[:10%]"
    held_out_split: str = "validation"
    data_dir: str | None = None  # None: $TFDS_DATA_DIR, or ~/tensorflow_datasets
    image_key: str = "image"
    label_key: str = "label"
    # Further features that go into the batches: numbers or arrays of a fixed shape.
    extra_keys: tuple[str, ...] = ()

    def __post_init__(self):
        info = self._builder.info
        if self.image_key not in info.features:
            raise ValueError(
                f"image_key={self.image_key!r} is not a feature of {self.dataset};"
                f" known: {', '.join(sorted(info.features))}"
            )
        try:
            count = info.splits[self.split].num_examples
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"split={self.split!r} is not a split of {self.dataset}; known:"
                f" {', '.join(sorted(info.splits))}, or a part such as 'train[:10%]'"
            ) from error
        if not count:
            raise ValueError(f"split={self.split!r} of {self.dataset} has no record")
        _ = self._extra_fields  # raises if a feature has no fixed shape

    @functools.cached_property
    def _builder(self) -> Any:
        # Slow to import, so only when it is used.
        from tensorflow_datasets.core import constants

        home = self.data_dir or constants.DATA_DIR
        folder = find_version(home, self.dataset)
        if folder is None:
            name = self.dataset.split(":")[0]
            raise FileNotFoundError(
                f"data set {self.dataset!r} is not prepared: looked for"
                f" {home}/{name}/VERSION/dataset_info.json\n"
                "Where it is, set data_dir (--config.data.source.data_dir=...) or"
                " TFDS_DATA_DIR. If it is nowhere:\n"
                f"  {PREPARE} {name} --data_dir={home}\n"
                "    prepares it, once, on any machine; it needs TensorFlow:"
                " pip install -e '.[prepare]'\n"
                f"  {PREPARE} convert --from=VERSION_DIR --to={home}\n"
                "    converts a copy that TFDS prepared as TFRecord, there too\n"
                "  --config=configs/mae.py:photos\n"
                "    trains on photographs that need no download"
            )
        builder = builder_of(folder)
        found = builder.info.file_format
        if found is None or found.value != "array_record":
            raise ValueError(
                f"{folder} holds {found.value if found else 'unknown'} files, which"
                " have no random access; convert them once to array_record, where"
                " TensorFlow is installed (pip install -e '.[prepare]'):\n"
                f"  {PREPARE} convert --from={folder} --to=OTHER_DATA_DIR\n"
                "and set data_dir=OTHER_DATA_DIR (--config.data.source.data_dir=...)"
            )
        for split in builder.info.splits.values():
            for path in split.filepaths:
                if path.parent != epath.Path(folder):
                    raise ValueError(
                        f"{folder}/dataset_info.json names {path}, outside of its "
                        "folder: want a data set whose files lie together"
                    )
        return builder

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        feature = self._builder.info.features[self.image_key]
        encoded = isinstance(feature, tfds.features.Image)
        decoders = {self.image_key: tfds.decode.SkipDecoding()} if encoded else None
        return self._builder.as_data_source(split=self.split, decoders=decoders)

    def __len__(self) -> int:
        return self._builder.info.splits[self.split].num_examples

    def record(self, index: int) -> dict[str, Any]:
        """All features of a record, its image encoded."""
        return self._records[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        label = int(record.get(self.label_key, -1))
        # TFDS gives single numbers as Python's.
        extra = {
            name: np.asarray(record[name], field.dtype)
            for name, field in self._extra_fields.items()
        }
        return {**record, **extra, "image": record[self.image_key], "label": label}

    def fields(self) -> Fields:
        return dict(self._extra_fields)

    @functools.cached_property
    def _extra_fields(self) -> Fields:
        fields = {}
        for key in self.extra_keys:
            features = self._builder.info.features
            if key not in features:
                raise ValueError(
                    f"extra_keys={self.extra_keys}: {key!r} is not a feature of "
                    f"{self.dataset}; known: {', '.join(sorted(features))}"
                )
            feature = features[key]
            shape, kind = feature.shape, getattr(feature, "np_dtype", None)
            # A group of features has a dict of shapes, text the type object.
            fixed = isinstance(shape, tuple) and None not in shape
            if not fixed or np.dtype(kind).kind not in "biuf":
                raise ValueError(
                    f"extra_keys={self.extra_keys}: {key!r} of {self.dataset} is "
                    f"{feature}; want numbers of a fixed shape"
                )
            fields[key] = FieldSpec(shape, np.dtype(kind).type)
        return fields

    @property
    def classes(self) -> tuple[str, ...]:
        features = self._builder.info.features
        if self.label_key not in features:
            return ()
        return tuple(getattr(features[self.label_key], "names", None) or ())

    @property
    def object_classes(self) -> tuple[str, ...]:
        features = self._builder.info.features
        objects = features["objects"] if "objects" in features else {}
        label = objects["label"] if "label" in objects else None
        return tuple(getattr(label, "names", None) or ())

    @property
    def channels(self) -> int:
        return self._builder.info.features[self.image_key].shape[-1] or 3

    def held_out(self) -> "Tfds":
        return dataclasses.replace(self, split=self.held_out_split)

    def fingerprint(self) -> dict[str, Any]:
        info = self._builder.info
        return {
            "name": "tfds",
            "dataset": info.full_name,  # with config and version
            "split": self.split,
            "count": len(self),
        }
