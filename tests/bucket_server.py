# SPDX-License-Identifier: Apache-2.0
"""Buckets on this machine: gcp-storage-emulator, with what it leaves out of the real
service: conditions on generations, and errors."""

import functools
import json
import threading
from collections.abc import Callable
from http import server
from typing import Any
from urllib import parse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage


class Server:
    """A server; it runs inside a `with` block.

    Attributes:
        url: where it listens.
        fault: of the method and path of a request, the HTTP status that refuses it, or
            None. A test may replace it.
        errors: what went wrong inside of it.
    """

    def __init__(self):
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.errors: list[str] = []
        self.storage = _Storage(use_memory_fs=True, data_dir="/")
        # One request at a time, so that nobody comes between a condition and a write.
        self.lock = threading.RLock()
        handler = functools.partial(_Handler, self)
        self._http = server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def make(self, bucket: str) -> None:
        """Make a bucket."""
        with self.lock:
            buckets.create_bucket(bucket, self.storage)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of the objects that begin with the prefix."""
        with self.lock:
            objects, _ = self.storage.get_file_list(bucket, prefix)
            return sorted(one["name"] for one in objects)

    def read(self, bucket: str, name: str) -> bytes:
        """The content of an object."""
        with self.lock:
            return self.storage.get_file(bucket, name)


class _Refused(Exception):
    """The request sets a condition that does not hold; has the HTTP status."""


class _Storage(Storage):
    """Holds to the conditions of the request under way.

    Attributes:
        match, differ: the generation that the object must have, or must not have.
        given: the generation of the object that the answer holds.
    """

    match: int | None = None
    differ: int | None = None
    given: int | None = None

    def create_file(self, bucket_name, file_name, *rest, **named):
        self._check(bucket_name, file_name)
        return super().create_file(bucket_name, file_name, *rest, **named)

    def delete_file(self, bucket_name, file_name, *rest, **named):
        self._check(bucket_name, file_name)
        return super().delete_file(bucket_name, file_name, *rest, **named)

    def get_file(self, bucket_name, file_name, *rest, **named):
        found = super().get_file(bucket_name, file_name, *rest, **named)
        self.given = self._check(bucket_name, file_name)
        return found

    def _check(self, bucket: str, name: str) -> int:
        try:
            there = int(self.get_file_obj(bucket, name)["generation"])
        except NotFound:
            there = 0
        if self.match is not None and there != self.match:
            raise _Refused(412)
        if there == self.differ:
            raise _Refused(304)
        return there


class _Handler(RequestHandler):
    def __init__(self, place: Server, *arguments: Any):
        self._place = place
        super().__init__(place.storage, *arguments)

    def _answer(self) -> None:
        query = dict(parse.parse_qsl(parse.urlparse(self.path).query))
        match, differ = (
            int(query[name]) if name in query else None
            for name in ("ifGenerationMatch", "ifGenerationNotMatch")
        )
        with self._place.lock:
            self.storage.given = None
            status = self._place.fault(self.command, self.path)
            if status is not None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return self._refuse(status)
            self.storage.match, self.storage.differ = match, differ
            try:
                Router(self).handle(self.command)
            except _Refused as refused:
                self._refuse(refused.args[0])
            except ConnectionError:  # gcsfs drops what it need not know any more
                self.close_connection = True
            except Exception as error:  # of the emulator: no client would tell
                self._place.errors.append(f"{self.command} {self.path}: {error!r}")
                self._refuse(501)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _answer

    def end_headers(self) -> None:
        if self.storage.given is not None:
            self.send_header("x-goog-generation", str(self.storage.given))
        super().end_headers()

    def _refuse(self, status: int) -> None:
        about = {"error": {"code": status, "message": f"refused with {status}"}}
        data = b"" if status == 304 else json.dumps(about).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
