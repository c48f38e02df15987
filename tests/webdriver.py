# SPDX-License-Identifier: Apache-2.0
"""A browser that tests drive, by the W3C's WebDriver protocol: chromedriver alone is
needed, and no package."""

import base64
import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str:
    """Why there is no browser to drive; "" if there is one."""
    if not shutil.which("chromedriver"):
        return "no chromedriver on the PATH"
    if not any(map(shutil.which, _BROWSERS)):
        return f"no browser: none of {', '.join(_BROWSERS)} is on the PATH"
    return ""


class Browser:
    """A window of its own, with a profile of its own.

    Args:
        driver: address of a running chromedriver.
    """

    def __init__(self, driver: str, width: int = 1280, height: int = 1500):
        (binary,) = [path for path in map(shutil.which, _BROWSERS) if path][:1]
        options = {
            "binary": binary,
            "args": [
                "--headless=new",
                "--no-sandbox",  # does not work as root; the pages are our own
                "--disable-gpu",
                "--hide-scrollbars",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--window-size={width},{height}",
            ],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._at = driver
        found = self._call(
            "POST", "/session", {"capabilities": {"alwaysMatch": wanted}}
        )
        self._at = f"{driver}/session/{found['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._at + path,
            None if body is None else json.dumps(body).encode(),
            {"content-type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise AssertionError(f"{value['error']}: {value['message']}") from None

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *given: Any) -> Any:
        """What a script returns, as the body of a function or of an async one."""
        wrapped = (
            "const done = arguments[arguments.length - 1], given = [...arguments];"
            f"(async () => {{ {script} }})().then(done, error => done('' + error));"
        )
        body = {"script": wrapped, "args": list(given)}
        return self._call("POST", "/execute/async", body)

    def until(self, condition: str, seconds: float = 60) -> Any:
        """Waits for an expression to be true, and returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition};")):
            said = self.run("return document.querySelector('#message')?.textContent")
            assert time.monotonic() < end, (
                f"not in time: {condition}; page says: {said}"
            )
            time.sleep(0.05)
        return value

    def element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        return self._call("POST", "/element", body)[_ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.element(selector)}/click", {})

    def send(self, selector: str, text: str) -> None:
        """Types, or names the file of a file input."""
        where = f"/element/{self.element(selector)}/value"
        self._call("POST", where, {"text": text})

    def drag(self, selector: str, *shares: tuple[float, float]) -> None:
        """Presses at the first place, moves over the others, lets go.

        Args:
            shares: places, as shares 0..1 of the element's width and height.
        """
        self.run(f"document.querySelector('{selector}').scrollIntoView()")
        left, top, width, height = self.run(
            f"const box = document.querySelector('{selector}').getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height];"
        )
        moves = [
            {
                "type": "pointerMove",
                "duration": 30,
                "x": round(left + x * width),
                "y": round(top + y * height),
            }
            for x, y in shares
        ]
        down, up = ({"type": f"pointer{one}", "button": 0} for one in ("Down", "Up"))
        mouse = {
            "type": "pointer",
            "id": "mouse",
            "actions": [moves[0], down, *moves[1:], up],
        }
        self._call("POST", "/actions", {"actions": [mouse]})

    def devtools(self, command: str, parameters: dict[str, Any]) -> None:
        """Sends a command of Chromium's own protocol."""
        body = {"cmd": command, "params": parameters}
        self._call("POST", "/goog/cdp/execute", body)

    def log(self) -> list[str]:
        """What the console says since the last call: errors, and what is forbidden."""
        rows = self._call("POST", "/se/log", {"type": "browser"})
        return [row["message"] for row in rows if row["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")


@contextlib.contextmanager
def driver():
    """A chromedriver while the block runs; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    where = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{where}/status", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < end, "chromedriver does not answer"
                time.sleep(0.05)
        yield where
    finally:
        process.terminate()
        process.wait(20)
