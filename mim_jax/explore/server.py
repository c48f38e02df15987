# SPDX-License-Identifier: Apache-2.0
"""The explore page as a web application: loopback alone, and nothing is kept.

The browser keeps the image and sends it with every question, so that two people at once
do not meet. Answers are computed one after the other.
"""

import asyncio
import base64
import contextlib
import functools
import importlib.resources
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import uvicorn
from jaxtyping import UInt8
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_jax.data.decoding import decode
from mim_jax.explore.models import Model, drawn
from mim_jax.run.loading import Loaded
from mim_jax.schema import ConfigError

# What a browser calls this machine, with any port: a tunnel may have another one.
_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_HEADERS = {
    # No other address is asked for anything, and no other page shows this one.
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_SHOWN = 12  # held-out images that are offered at once


class App:
    """The application; `asgi` is what a server runs.

    Args:
        runs: by caption; all read the same images.
        bank: training images that neighbours are looked for among.
        neighbours: training images shown.
        upload_bytes: an image file may have at most.
    Raises:
        ConfigError: the runs have patches of different sizes.
        ValueError: the images cannot be read.
    """

    def __init__(
        self, runs: dict[str, Loaded], bank: int, neighbours: int, upload_bytes: int
    ):
        self._models = [Model(one, bank) for one in runs.values()]
        first = next(iter(runs.values()))
        self._grid, self._data = self._models[0].grid, first.training.data
        for model in self._models:
            if model.grid != self._grid:
                raise ConfigError(
                    f"{self._models[0].title} has patches of {self._grid.patch} "
                    f"pixels, {model.title} of {model.grid.patch}: want the same, so "
                    "that one mask fits both"
                )
        self._neighbours, self._most = neighbours, upload_bytes
        with first.passes.held_out(spread=True) as batches:
            self._held_out = _some(batches, first.passes.classes)
        # One question at a time: programs of JAX use all cores anyway.
        self._turn = asyncio.Lock()

    @property
    def asgi(self) -> ASGIApp:
        """Answers a request, or refuses it."""
        routes = [
            Route("/about", self._get(self._about)),
            Route("/held_out", self._get(self._offered)),
            Route("/image", self._image, methods=["POST"]),
            Route("/fill", self._post(self._fill), methods=["POST"]),
            Route("/look", self._post(self._look), methods=["POST"]),
            Route("/near", self._post(self._near), methods=["POST"]),
            *(Route(path, _file(*what)) for path, what in _FILES.items()),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _told})
        return _Guard(app)

    # Answers. Each gets what the browser sent, and returns what is sent back.

    def _about(self) -> dict[str, Any]:
        grid, (rows, cols) = self._grid, self._data.image_size
        return {
            "rows": grid.rows,
            "cols": grid.cols,
            "patch": grid.patch,
            "image": [rows, cols],
            "upload_bytes": self._most,
            "units": max(1, max(grid.rows, grid.cols) - 1),
            "runs": [
                {
                    "title": model.title,
                    "method": type(model.run.objective).__name__,
                    "fills": model.predicts_pixels,
                    "bank": len(model.bank.labels),
                }
                for model in self._models
            ],
        }

    def _offered(self) -> list[dict[str, str]]:
        return self._held_out

    def _fill(self, asked: dict) -> dict[str, Any]:
        image = self._pixels(asked)
        if "hidden" in asked:
            hidden = np.zeros(self._grid.size, bool)
            for one in asked["hidden"]:
                hidden[self._number(asked, "hidden", one)] = True
            if hidden.all() or not hidden.any():
                raise ValueError(
                    f"{hidden.sum()} of {hidden.size} patches are hidden: want at "
                    "least one hidden and one visible"
                )
        else:
            numbers = (_whole(asked, name) for name in ("count", "unit", "seed"))
            hidden = drawn(self._grid, *numbers)
        found = []
        for model in self._models:
            if not model.predicts_pixels:
                found.append(None)
                continue
            filled = model.fill(image, hidden)
            scores = [score._asdict() for score in filled.scores]
            found.append({"image": _png(filled.image), "scores": scores})
        return {"hidden": np.flatnonzero(hidden).tolist(), "runs": found}

    def _look(self, asked: dict) -> dict[str, Any]:
        image, patch = self._pixels(asked), asked.get("patch")
        if patch is not None:
            patch = self._number(asked, "patch", patch)
        maps = [model.attention(image, patch) for model in self._models]
        return {"runs": [[round(float(x), 6) for x in one] for one in maps]}

    def _near(self, asked: dict) -> dict[str, Any]:
        image = self._pixels(asked)
        return {
            "runs": [
                [
                    {
                        "image": _png(one.image),
                        "label": one.label,
                        "similarity": one.similarity,
                    }
                    for one in model.neighbours(image, self._neighbours)
                ]
                for model in self._models
            ]
        }

    def _cropped(self, content: bytes) -> dict[str, Any]:
        """An uploaded file at the size of the runs, cropped as evaluations do."""
        pixels = decode(content, self._data.source.channels)
        shown = self._data.centre_view(pixels.shape[:2]).image(pixels)
        return {"image": _png(shown), "was": list(pixels.shape[:2])}

    # What the browser sent.

    def _pixels(self, asked: dict) -> UInt8[np.ndarray, "h w c"]:
        """The image of a question."""
        sent = asked.get("image")
        if not isinstance(sent, str):
            raise ValueError("want the image as base64 of a PNG, as the page sends it")
        pixels = decode(
            base64.b64decode(sent, validate=True), self._data.source.channels
        )
        if pixels.shape != self._data.image_shape:
            raise ValueError(
                f"image of {list(pixels.shape)}: want {list(self._data.image_shape)}; "
                "POST /image crops a file to that"
            )
        return pixels

    def _number(self, asked: dict, name: str, value: Any) -> int:
        """The number of a patch."""
        if type(value) is not int or not 0 <= value < self._grid.size:
            raise ValueError(
                f"{name} has {str(value)[:40]!r}: want patches of 0 to "
                f"{self._grid.size - 1}"
            )
        return value

    # How answers travel.

    def _get(self, answer: Callable[[], Any]) -> Callable:
        async def endpoint(request: Request) -> Response:
            del request
            return JSONResponse(answer())

        return endpoint

    def _post(self, answer: Callable[[dict], Any]) -> Callable:
        # An image of noise makes a PNG a little larger than its pixels, and base64
        # takes four bytes for three.
        most = 2 * int(np.prod(self._data.image_shape)) + 2**18

        async def endpoint(request: Request) -> Response:
            body = await _body(request, most)
            return await self._computed(lambda: answer(_parsed(body)))

        return endpoint

    async def _image(self, request: Request) -> Response:
        body = await _body(request, self._most)
        return await self._computed(lambda: self._cropped(body))

    async def _computed(self, answer: Callable[[], Any]) -> Response:
        """What `answer` returns, computed in a thread when its turn has come."""
        async with self._turn:
            start = time.perf_counter()
            try:
                found = await asyncio.to_thread(answer)
            except (ValueError, IndexError, TypeError, RecursionError) as error:
                raise HTTPException(400, str(error)) from error
            found["seconds"] = round(time.perf_counter() - start, 3)
        return JSONResponse(found)


class _Guard:
    """Refuses requests that do not come from the page itself."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        app = self._app
        if scope["type"] == "http" and (why := _foreign(scope["headers"])):
            app = JSONResponse({"error": why}, status_code=403)
        await app(scope, receive, guarded)


def _foreign(headers: list[tuple[bytes, bytes]]) -> str:
    """Why a request with these headers is refused; "" if it is not."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    hosts = found.get("host", [])
    # Of a name that somebody else's server gave the address of this machine, a browser
    # thinks that it is that server.
    if len(hosts) != 1 or not _HOSTS.fullmatch(hosts[0]):
        return (
            f"Host is {', '.join(hosts)[:80]!r}: want 127.0.0.1 or localhost, in the "
            "address that the program printed"
        )
    origins = found.get("origin", [])
    if any(origin != f"http://{hosts[0]}" for origin in origins):
        return f"Origin is {', '.join(origins)[:80]!r}: want the page itself"
    sites = found.get("sec-fetch-site", [])
    if any(site not in ("same-origin", "none") for site in sites):
        return "another page asks: want the address typed or pasted"
    return ""


def _file(name: str, kind: str) -> Callable:
    content = (importlib.resources.files("mim_jax.explore") / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        del request
        return Response(content, media_type=kind)

    return endpoint


async def _told(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _body(request: Request, most: int) -> bytes:
    """What was sent; refused, unread, beyond so many bytes."""
    said = request.headers.get("content-length", "0")
    parts, size = [], int(said) if said.isascii() and said.isdigit() else 0
    try:
        if size <= most:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > most:
                    break
                parts.append(part)
    except ClientDisconnect as error:
        raise HTTPException(400, "the connection ended") from error
    if size > most:
        raise HTTPException(413, f"more than {most:,} bytes: want at most that many")
    return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise ValueError("want a JSON object")
    return found


def _whole(asked: dict, name: str) -> int:
    value = asked.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(
            f"{name} is {str(value)[:40]!r}: want a number of 0 to 2^31 - 1"
        )
    return value


def _png(image: UInt8[np.ndarray, "h w c"]) -> str:
    """An image of 1 or 3 channels as base64 of a PNG."""
    if image.shape[2] not in (1, 3):
        raise ConfigError(
            f"images of {image.shape[2]} channels: a browser shows those of 1 or 3"
        )
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(
        content, "PNG"
    )
    return base64.b64encode(content.getvalue()).decode()


def _some(batches: Any, classes: tuple[str, ...]) -> list[dict[str, str]]:
    """The first images of a pass, for people to choose from."""
    found, names = [], (*classes, "")
    for batch in batches:
        for row in np.flatnonzero(batch["valid"]):
            image, label = batch["image"][row], names[batch["label"][row]]
            found.append({"image": _png(np.asarray(image)), "label": label})
            if len(found) == 4 * _SHOWN:
                return found
    return found


@contextlib.contextmanager
def serving(app: ASGIApp, port: int) -> Iterator[str]:
    """Serves in a thread, on loopback alone, while the block runs; yields the address.

    Args:
        app: the application.
        port: of the address; 0 takes a free one.
    Raises:
        ConfigError: the port is not to be had.
    """
    listener = socket.socket()
    # As servers do: a port whose last connections are ending is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # who asks before the thread is ready waits
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port={port}: {error.strerror}; want another, or 0 for any that is free"
        ) from error
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=32,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(
        target=functools.partial(server.run, sockets=[listener]), daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
