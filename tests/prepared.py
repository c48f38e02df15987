# SPDX-License-Identifier: Apache-2.0
"""Writes small data sets as TFDS prepares them, without TensorFlow."""

import io
import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_generated_pb2 as example_pb2
from tensorflow_datasets.proto import tf_feature_generated_pb2 as feature_pb2


def encoded(value: int, size: tuple[int, int] = (6, 4), form: str = "PNG") -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, form)
    return file.getvalue()


def write(
    data_dir: pathlib.Path,
    name: str,
    split: str,
    names: tuple[str, ...],
    records: list[dict],
) -> None:
    """A data set with one shard.

    Args:
        name: "name" or "name/config".
        names: of the classes.
        records: encoded images under "image", and labels under other keys: whole
            numbers, or lists of them for a sequence.
    """
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    features = {"image": tfds.features.Image()}
    for key, value in records[0].items():
        if key != "image":
            label = tfds.features.ClassLabel(names=list(names))
            one = not isinstance(value, list)
            features[key] = label if one else tfds.features.Sequence(label)
    tfds.features.FeaturesDict(features).save_config(folder)
    short = name.partition("/")[0]
    about = {
        "name": short,
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(records))],
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(about))
    shard = folder / f"{short}-{split}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for record in records:
        writer.write(_example(record).SerializeToString())
    writer.close()


def _example(record: dict) -> example_pb2.Example:
    found = {}
    for key, value in record.items():
        if isinstance(value, bytes):
            kind = feature_pb2.BytesList(value=[value])
            found[key] = feature_pb2.Feature(bytes_list=kind)
        else:
            kind = feature_pb2.Int64List(
                value=np.atleast_1d(value).astype(int).tolist()
            )
            found[key] = feature_pb2.Feature(int64_list=kind)
    return example_pb2.Example(features=feature_pb2.Features(feature=found))
