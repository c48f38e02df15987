# SPDX-License-Identifier: Apache-2.0
"""Files of a bucket of Google Cloud Storage, named gs://BUCKET/FOLDER/FILE.

A bucket has whole files under long names, and no more: a folder is what names begin
with, and nothing can be appended to or renamed. What a run needs of that is made here,
for `mim_jax.run.files`, and its lock in `mim_jax.run.lease`.
"""

import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from etils import epath

from mim_jax.schema import ConfigError, DiskError

# Seconds for which a request that fails is made again: at the start of a run, later.
FIRST, LATER = 30.0, 300.0
_PERIOD = 60.0  # seconds between two writes of a file that grows, for each MiB of it
_THREADS = 8
_LOGIN = "a service account of this machine, or `gcloud auth application-default login`"
_ROLE = "the role Storage Object User (roles/storage.objectUser) on the bucket"


class ChangedError(Exception):
    """A file is of another generation: somebody else wrote or deleted it."""


def check(folder: epath.Path) -> None:
    """Refuse a folder whose bucket cannot be read.

    Raises:
        ConfigError: there is no such bucket, no permission or no credentials.
        DiskError: it does not answer.
    """
    with refusing(folder):
        next(iter(_listed(folder, FIRST, max_results=1)), None)


def read(file: epath.Path) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        DiskError: it cannot be read.
    """
    with _errors(file):
        return blob_of(file, client()).download_as_bytes(retry=retry(LATER))


def write(file: epath.Path, data: bytes) -> None:
    """Replace a file, whole or not at all.

    Raises:
        DiskError: it cannot be written.
    """
    with _errors(file):
        put(blob_of(file, client()), data)


def exists(path: epath.Path) -> bool:
    """Whether there is a file or a folder of this name.

    Raises:
        DiskError: the bucket does not answer.
    """
    with _errors(path):
        below = next(iter(_listed(path, LATER, max_results=1)), None)
        file = blob_of(path, client())
        return below is not None or file.exists(retry=retry(LATER))


def names(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder; none if there is no such folder.

    Raises:
        DiskError: the bucket does not answer.
    """
    with _errors(folder):
        found = _listed(folder, LATER, delimiter="/")
        inside = {file.name for file in found}
        inside |= found.prefixes  # filled by then
    return sorted(name.rstrip("/").rpartition("/")[2] for name in inside)


def remove_file(file: epath.Path) -> None:
    """Delete a file; none is all right.

    Raises:
        DiskError: it cannot be deleted.
    """
    with contextlib.suppress(FileNotFoundError), _errors(file):
        blob_of(file, client()).delete(retry=retry(LATER))


def remove(folder: epath.Path, seal: str) -> None:
    """Delete a folder; none is all right.

    Args:
        seal: the file in it that goes before all others.
    Raises:
        DiskError: it cannot be deleted.
    """
    with _errors(folder):
        found = {file.name: file for file in _listed(folder, LATER)}
        first = found.pop(_key(folder / seal), None)
        for part in ([first] if first else [], found.values()):
            _each(lambda file: file.delete(retry=retry(LATER)), part)


def copy(folder: epath.Path, where: epath.Path) -> None:
    """Copy the files of a folder to another one of the same bucket.

    Raises:
        DiskError: they cannot be copied.
    """

    def copy_one(file: Any) -> None:
        below, token = file.name.removeprefix(_key(folder)), ""
        to = file.bucket.blob(_key(where) + below)
        while token is not None:  # a large file takes several requests
            token, *_ = to.rewrite(file, token=token or None, retry=retry(LATER))

    with _errors(folder):
        _each(copy_one, list(_listed(folder, LATER)))


class Growing(io.BytesIO):
    """A file of a bucket, open for bytes at its end.

    This process has it whole, and the bucket gets it whole: after `sync`, and after
    `flush` if the last time is a minute ago, or a minute for each MiB of a large file.

    Raises:
        DiskError: it cannot be read. From its methods: it cannot be written, or another
            process has written it meanwhile.
    """

    def __init__(self, file: epath.Path):
        self._file, self._due, self._generation = file, 0.0, 0
        data = b""
        with contextlib.suppress(FileNotFoundError), _errors(file):
            data, self._generation = content(blob_of(file, client()))
        super().__init__(data)
        self._saved = self.seek(0, io.SEEK_END)

    def flush(self) -> None:
        """Write what is new, if that is due."""
        if time.monotonic() >= self._due:
            self.sync()

    def sync(self) -> None:
        """Write what is new."""
        size = self.getbuffer().nbytes
        if size == self._saved:
            return
        with _errors(self._file):
            blob = blob_of(self._file, client())
            self._generation = put(blob, self.getvalue(), self._generation)
        self._saved = size
        # A bucket may keep each version for days, and bill it.
        self._due = time.monotonic() + _PERIOD * max(1.0, size / 2**20)

    def close(self) -> None:
        """Write what is new, and close."""
        try:
            if not self.closed:
                self.sync()
        finally:
            super().close()


def put(file: Any, data: bytes, generation: int | None = None) -> int:
    """Write a file; returns its generation.

    Args:
        file: a blob of the client.
        generation: which one it must be of, 0 if it must be new; None: any.
    Raises:
        ChangedError: it is of another one.
    """
    errors = _exceptions()
    try:
        file.upload_from_string(
            data,
            content_type="application/octet-stream",
            if_generation_match=generation,
            retry=retry(LATER),
        )
    except errors.PreconditionFailed as error:
        # Perhaps by this very request, whose first answer was lost.
        with contextlib.suppress(errors.NotFound):
            found, generation = content(file)
            if found == data:
                return generation
        raise ChangedError from error
    return file.generation


def content(file: Any) -> tuple[bytes, int]:
    """What the file of this name holds now, and its generation."""
    now = file.bucket.blob(file.name)  # `file` itself asks for the generation it knows
    now.reload(retry=retry(LATER))
    generation = now.generation
    return now.download_as_bytes(retry=retry(LATER)), generation


def new_client() -> Any:
    """A client of the library."""
    from google.cloud import storage  # slow to import, and only some have it

    return storage.Client()


client = functools.cache(new_client)


def blob_of(file: epath.Path, client: Any) -> Any:
    """The file as the library has it."""
    return client.bucket(_bucket(file)).blob(_key(file))


def retry(seconds: float) -> Any:
    """How the library makes a request again that failed: for so many seconds."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(seconds)


@contextlib.contextmanager
def refusing(path: epath.Path) -> Iterator[None]:
    """Raise, as a ConfigError, what a user has to mend; other failures as DiskError."""
    errors = _exceptions()
    try:
        yield
    except (*_auth_errors(), errors.ClientError) as error:
        raise ConfigError(f"{path}: {_why(error, path)}") from error
    except _failures() as error:
        raise DiskError(f"{path}: {_why(error, path)}") from error


@contextlib.contextmanager
def _errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except _exceptions().NotFound as error:
        raise FileNotFoundError(f"{path}: {_why(error, path)}") from error
    except ChangedError as error:
        raise DiskError(f"{path}: another process has written it meanwhile") from error
    except _failures() as error:
        raise DiskError(f"{path}: {_why(error, path)}") from error


def _why(error: Exception, path: epath.Path) -> str:
    errors = _exceptions()
    said = " ".join(str(error).split())
    if isinstance(error, errors.NotFound):
        return f"not there; want an existing bucket: is it {_bucket(path)!r}? ({said})"
    if isinstance(error, errors.Forbidden):
        return f"not allowed; want {_ROLE} ({said})"
    if isinstance(error, (*_auth_errors(), errors.Unauthorized)):
        return f"no credentials that are valid; want {_LOGIN} ({said})"
    return f"the bucket does not answer as it should ({said})"


def _failures() -> tuple[type[Exception], ...]:
    import requests

    errors = _exceptions()
    return (errors.GoogleAPIError, requests.RequestException, *_auth_errors())


def _auth_errors() -> tuple[type[Exception], ...]:
    from google.auth import exceptions

    return (exceptions.GoogleAuthError,)


def _exceptions() -> Any:
    from google.api_core import exceptions

    return exceptions


def _listed(folder: epath.Path, seconds: float, **options: Any) -> Any:
    """The files below a folder."""
    prefix = f"{_key(folder)}/"
    return client().list_blobs(
        _bucket(folder), prefix=prefix, retry=retry(seconds), **options
    )


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call `work` on each item, several at a time."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, items))


def _bucket(path: epath.Path) -> str:
    return path.parts[2]


def _key(path: epath.Path) -> str:
    return "/".join(path.parts[3:])
