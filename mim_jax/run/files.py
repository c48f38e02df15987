# SPDX-License-Identifier: Apache-2.0
"""Files of a run directory: how they are read, replaced and appended to.

A run directory is a folder of a file system or of a bucket, and the functions here are
for both (`mim_jax.run.buckets` has those of a bucket).

It may come from somebody else, or be moved or damaged while a run uses it. So it is
checked before anything of it is used (`check`), a file is replaced whole (`write`), and
nothing is written through a link. Orbax, the profiler and Weights & Biases write their
own files, to the folders that `check` has looked through.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, BinaryIO

from etils import epath

from mim_jax.run import buckets
from mim_jax.schema import ConfigError, DiskError

# What lies in a run directory; anything else there is the user's own.
_FILES = (
    *("config.json", "images.json", "lock", "metrics.jsonl", "metrics-damaged.jsonl"),
    *("parameters.txt", "results.json", "summary.txt", "trained", "wandb.json"),
)
_FOLDERS = (
    *("checkpoints", "damaged-checkpoints", "profile", "report", "tensorboard"),
    "wandb",
)
_LINKS_OF_ITS_OWN = ("wandb",)  # that package links its logs to its own cache
_WORD = {False: "a file", True: "a folder"}
GOING = ".deleting"  # ends the name of a folder that is being deleted

# A file or folder: of a file system, or of a bucket.
Place = pathlib.Path | epath.Path


def place(name: str | Place) -> Place:
    """The file or folder of this name; one of a bucket is called gs://BUCKET/FOLDER.

    Raises:
        ConfigError: it is a URL of another kind, or the packages for buckets are not
            installed.
    """
    text = str(name)
    if not text.startswith("gs://"):
        if "://" in text:
            raise ConfigError(f"{text}: want a directory, or gs://BUCKET/FOLDER")
        return pathlib.Path(text)
    if not text.removeprefix("gs://").strip("/").partition("/")[2]:
        raise ConfigError(f"{text}: want a folder in a bucket, gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(
            f"{text}: want the packages for buckets: pip install -e '.[tpu]' or "
            "'.[cuda]', or gcsfs and google-cloud-storage"
        )
    from fsspec import config

    # Else gcsfs asks, with each request, which kind of bucket this is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Files come and go by other processes and libraries: a remembered list would lie.
    config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def in_bucket(place: Place) -> bool:
    """Whether it is in a bucket."""
    return not isinstance(place, pathlib.Path)


def absolute(place: Place) -> Place:
    """The same place by its full name, without links."""
    return place.resolve() if isinstance(place, pathlib.Path) else place


def check(folder: Place) -> None:
    """Refuse a run directory that could not be used, or only by leaving it.

    It looks at every entry that a run writes or reads, and follows no link. A folder
    that does not exist is all right. In a bucket, where no links are, it asks whether
    the bucket can be read.

    Raises:
        ConfigError: an entry is a link that leads out of the directory, or neither a
            file nor a folder, or a folder where a file belongs, or the reverse; or
            there is no such bucket, no permission or no credentials.
    """
    if not isinstance(folder, pathlib.Path):
        return buckets.check(folder)
    root = os.path.realpath(folder)
    try:
        for entry in _entries(root):
            if entry.name not in (*_FILES, *_FOLDERS):
                continue
            _check_entry(entry, root)
            belongs = entry.name in _FOLDERS
            if entry.is_dir() != belongs:
                raise ConfigError(
                    f"{entry.path} is {_WORD[not belongs]}, where {_WORD[belongs]} "
                    "belongs: want it moved away"
                )
            if entry.name not in _LINKS_OF_ITS_OWN:
                _check_below(entry, root)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error


def _check_below(folder: os.DirEntry, root: str) -> None:
    if folder.is_dir(follow_symlinks=False):
        for entry in _entries(folder.path):
            _check_entry(entry, root)
            _check_below(entry, root)


def _check_entry(entry: os.DirEntry, root: str) -> None:
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if os.path.commonpath([target, root]) != root:
            raise ConfigError(
                f"{entry.path} is a link to {target}, out of the run directory: want "
                "what it leads to in its place, or one link to the whole directory"
            )
    elif not entry.is_dir() and not entry.is_file():
        raise ConfigError(
            f"{entry.path} is neither a file nor a folder: want it removed"
        )


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):  # or another host deleted it
        return []


def exists(place: Place) -> bool:
    """Whether there is a file or folder of this name."""
    return place.exists() if isinstance(place, pathlib.Path) else buckets.exists(place)


def names(folder: Place) -> list[str]:
    """Names of what lies in a folder; none if there is no such folder."""
    if isinstance(folder, pathlib.Path):
        return [path.name for path in folder.glob("*")]
    return buckets.names(folder)


def read(path: Place) -> bytes:
    """The content of a file.

    Raises:
        OSError: it is missing, or the file system cannot read it.
        DiskError: the bucket does not answer.
    """
    return path.read_bytes() if isinstance(path, pathlib.Path) else buckets.read(path)


def read_json(path: Place) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it is missing, cannot be read or is no JSON.
    """
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def write(path: Place, content: str | bytes) -> None:
    """Replace a file, whole or not at all; a link of that name is replaced itself.

    Raises:
        DiskError: the disk is full, for example, or the folder is gone.
    """
    data = content.encode() if isinstance(content, str) else content
    if not isinstance(path, pathlib.Path):
        return buckets.write(path, data)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        with partial.open("xb") as file:  # which follows no link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise DiskError(f"{path} could not be written: {error}") from error


def append(path: Place) -> BinaryIO | buckets.Growing:
    """The file, made if absent, open for bytes at its end; it may also be read.

    Raises:
        OSError: it cannot be opened, or is a link.
        DiskError: the bucket does not answer.
    """
    if not isinstance(path, pathlib.Path):
        return buckets.Growing(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return open(path, "a+b", opener=lambda name, _: os.open(name, flags, 0o666))


def flush(file: BinaryIO | buckets.Growing) -> None:
    """Bring what was written to an open file to the disk, or to a bucket if that is
    due: `buckets.Growing` says when.

    Raises:
        OSError, DiskError: it cannot be written.
    """
    file.flush()
    if not isinstance(file, buckets.Growing):
        os.fsync(file.fileno())


def sync(file: BinaryIO | buckets.Growing) -> None:
    """Bring what was written to an open file to the disk or the bucket now; errors are
    those of `flush`."""
    file.sync() if isinstance(file, buckets.Growing) else flush(file)


def make(folder: Place, parents: bool = False) -> None:
    """Make a folder in one that exists. A bucket needs none.

    Args:
        parents: make that one, too.
    Raises:
        DiskError: the other one does not exist, or cannot be written.
    """
    if in_bucket(folder):
        return
    try:
        folder.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder} could not be made: {error}") from error


def remove_file(path: Place) -> None:
    """Delete a file; none is all right."""
    if isinstance(path, pathlib.Path):
        path.unlink(missing_ok=True)
    else:
        buckets.remove_file(path)


def remove(folder: Place, seal: str = "") -> None:
    """Delete a folder, as far as that is allowed.

    Args:
        seal: the file that makes it whole; if given, what is left of the folder looks
            whole at no time.
    """
    if not isinstance(folder, pathlib.Path):
        return buckets.remove(folder, seal)
    if seal:
        folder = folder.rename(folder.with_name(folder.name + GOING))
    shutil.rmtree(folder, ignore_errors=True)


def move(folder: Place, where: Place, seal: str) -> None:
    """Move a folder to `where`, in the same file system or bucket, instead of what lies
    there; `seal` is as for `remove`."""
    if isinstance(folder, pathlib.Path):
        where.parent.mkdir(exist_ok=True)
        if where.exists():
            shutil.rmtree(where)
        folder.rename(where)
    else:
        where = epath.Path(where)
        buckets.remove(where, seal)
        buckets.copy(folder, where)
        buckets.remove(folder, seal)


def scratch(folder: Place) -> pathlib.Path:
    """Where a library that knows no buckets may write what belongs to a folder: to the
    folder itself, or to a new one, from where `deliver` brings it."""
    if isinstance(folder, pathlib.Path):
        return folder
    return pathlib.Path(tempfile.mkdtemp(prefix="mim_jax-"))


def here(path: Place, scratch: pathlib.Path) -> pathlib.Path:
    """The file itself, or a copy of one of a bucket in the folder `scratch`."""
    if isinstance(path, pathlib.Path):
        return path
    copied = scratch / path.name
    copied.write_bytes(buckets.read(path))
    return copied


def deliver(written: pathlib.Path, folder: Place) -> None:
    """Bring what was written to `scratch(folder)` to the folder.

    Raises:
        DiskError: the bucket does not take it.
    """
    if not isinstance(folder, pathlib.Path):
        for path in filter(pathlib.Path.is_file, written.rglob("*")):
            buckets.write(folder / path.relative_to(written), path.read_bytes())
        shutil.rmtree(written)
