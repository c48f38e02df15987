# SPDX-License-Identifier: Apache-2.0
"""Prepares a data set as array_record, once. Nothing else needs TensorFlow.

    python -m mim_jax.data.prepare NAME [--data_dir=...] [--manual_dir=...]
    python -m mim_jax.data.prepare convert --from=VERSION_DIR --to=DATA_DIR
    python -m mim_jax.data.prepare folder --path=DIR --name=NAME [--data_dir=...]

NAME is a data set of TensorFlow Datasets, e.g. imagenet2012, which expects its archives
in manual_dir. `convert` rewrites a copy that was prepared as TFRecord. `folder` takes
DIR/train/CLASS/*.jpg and, if there is one, DIR/val/CLASS/*.jpg.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mim_jax.data.sources.base import Source
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.tfds import builder_of
from mim_jax.schema import to_json

_FORMAT = "array_record"


def dataset(
    name: str, data_dir: str | None = None, manual_dir: str | None = None
) -> pathlib.Path:
    """Downloads and prepares a data set of TFDS; returns its folder."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format=_FORMAT)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config, file_format=_FORMAT)
    return pathlib.Path(builder.data_dir)


def convert(version_dir: str, data_dir: str) -> pathlib.Path:
    """Rewrites a prepared TFRecord data set as array_record under `data_dir`.

    Args:
        version_dir: folder with the old dataset_info.json; it is not changed.
        data_dir: the copy goes to data_dir/name/version, where TFDS looks for it.
    Returns:
        The folder written.
    Raises:
        FileNotFoundError: version_dir holds no data set.
        ValueError: the folder to write exists already, or the old one is damaged.
    """
    source = pathlib.Path(version_dir).expanduser()
    if not (source / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"no dataset_info.json in {version_dir!r}: name the folder of one version,"
            " e.g. ~/tensorflow_datasets/imagenet2012/5.1.0"
        )
    info = builder_of(source).info
    out = pathlib.Path(data_dir).expanduser() / info.full_name
    if out.exists():
        raise ValueError(f"{out} exists already: name another --to, or remove it first")
    if info.file_format is None or info.file_format.value != "tfrecord":
        raise ValueError(f"{version_dir!r} holds no TFRecord files: nothing to convert")
    partial = out.with_name(out.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)  # an earlier attempt may have left it
    partial.mkdir(parents=True)
    for split in info.splits.values():
        shards = list(zip(split.filepaths, split.shard_lengths, strict=True))
        for number, (shard, count) in enumerate(shards):
            place = f"{number:05}-of-{len(shards):05}"
            copy = partial / f"{info.name}-{split.name}.{_FORMAT}-{place}"
            if _copy_records(str(shard), str(copy)) != count:
                raise ValueError(
                    f"{shard} does not hold its {count} records; want a complete copy"
                )
            print(copy.name, count, flush=True)
    for path in source.iterdir():
        if path.is_file() and ".tfrecord" not in path.name:
            shutil.copyfile(path, partial / path.name)
    metadata = json.loads((source / "dataset_info.json").read_text())
    metadata["fileFormat"] = _FORMAT
    for split in metadata["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (partial / "dataset_info.json").write_text(to_json(metadata, indent=2))
    partial.rename(out)  # at once, so that `out` is complete if it exists
    return out


def _copy_records(shard: str, copy: str) -> int:
    """Copies the records of one TFRecord file unchanged; returns their number."""
    # convert_format of TFDS needs apache-beam even for one process.
    import tensorflow as tf  # pyright: ignore  (extra `prepare`)
    from array_record.python import array_record_module  # pyright: ignore  (compiled)

    count = 0
    # One record per group, as TFDS writes, so that each can be read alone.
    writer = array_record_module.ArrayRecordWriter(copy, "group_size:1")
    for record in tf.data.TFRecordDataset(shard).as_numpy_iterator():
        writer.write(record)
        count += 1
    writer.close()
    return count


def folder(
    path: str, name: str, data_dir: str | None = None, version: str = "1.0.0"
) -> pathlib.Path:
    """Prepares a folder of class sub-folders; the bytes of its images do not change.

    Args:
        path: folder in the layout of the `folder` source; `train` becomes the split
            "train", `val` the split "validation". TFDS shuffles the records in the same
            way each time, so that a split such as "train[:10%]" has every class.
        name: of the data set, in lower case with underscores.
        data_dir: the data set goes to data_dir/name/version; None: TFDS decides.
    Returns:
        The folder written.
    Raises:
        FileNotFoundError, ValueError: the folder is empty or has another layout.
    """
    import tensorflow_datasets as tfds

    train = Folder(path=path)
    sources: dict[str, Source] = {"train": train}
    if (pathlib.Path(path) / train.held_out_folder).is_dir():
        sources["validation"] = train.held_out()
    features: dict[str, Any] = {"image": tfds.features.Image()}
    if train.classes:
        features["label"] = tfds.features.ClassLabel(names=list(train.classes))
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        data_dir=data_dir,
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: _examples(source, tuple(features))
            for split, source in sources.items()
        },
        description="A folder of images, prepared by mim_jax.data.prepare.",
        file_format=_FORMAT,
    )
    return pathlib.Path(builder.data_dir)


def _examples(source: Source, keys: Sequence[str]) -> Iterator[tuple[int, dict]]:
    for index in range(len(source)):
        record = source[index]
        yield index, {key: record[key] for key in keys}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in ("dataset", "convert", "folder", "-h", "--help"):
        given.insert(0, "dataset")
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("dataset", help="the default: a data set of TFDS")
    command.add_argument("name")
    command.add_argument("--data_dir", help="default: where TFDS looks")
    command.add_argument("--manual_dir", help="folder of archives fetched by hand")
    command = commands.add_parser("convert", help="a TFRecord copy to array_record")
    command.add_argument("--from", dest="version_dir", required=True)
    command.add_argument("--to", dest="data_dir", required=True)
    command = commands.add_parser("folder", help="a folder of class sub-folders")
    command.add_argument("--path", required=True)
    command.add_argument("--name", required=True)
    command.add_argument("--version", default="1.0.0")
    command.add_argument("--data_dir", help="default: where TFDS looks")
    options = vars(parser.parse_args(given))
    if importlib.util.find_spec("tensorflow") is None:
        parser.error(
            "preparing data needs TensorFlow (reading does not):"
            " pip install -e '.[prepare]'"
        )
    run = {"dataset": dataset, "convert": convert, "folder": folder}
    print(run[options.pop("command")](**options))


if __name__ == "__main__":
    main()
