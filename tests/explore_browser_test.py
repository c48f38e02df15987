# SPDX-License-Identifier: Apache-2.0
"""A person at the explore page, in a real browser: nothing but what they see and do."""

import functools
import http.server
import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
import webdriver
from PIL import Image

from mim_jax.run import loading

server = pytest.importorskip(
    "mim_jax.explore.server", reason="the extra explore is not installed"
)
pytestmark = [
    pytest.mark.skipif(bool(webdriver.missing()), reason=webdriver.missing()),
    pytest.mark.slow,
    pytest.mark.every_change,
]

OLD = pathlib.Path(__file__).parent / "fixtures" / "old_runs"
MOST = 30_000  # bytes of an upload
FILLED = "document.querySelector('#message').textContent.startsWith('Filled in')"
SAID = "document.querySelector('#message').textContent"


class Recorder:
    """The application, and (path, status) of each answer."""

    def __init__(self, app):
        self._app, self.answers = app, []

    async def __call__(self, scope, receive, send):
        async def noted(message):
            if message["type"] == "http.response.start":
                self.answers.append((scope["path"], message["status"]))
            await send(message)

        await self._app(scope, receive, noted)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [shutil.copytree(OLD / name / "run", folder / name) for name in NAMES]
    loaded = loading.load_all(map(str, runs))
    return Recorder(server.App(loaded, 200, 4, upload_bytes=MOST).asgi)


NAMES = ("mae", "mocov3")  # the second predicts no pixels


@pytest.fixture(scope="module")
def address(recorder):
    with server.serving(recorder, 0) as found:
        yield found


@pytest.fixture(scope="module")
def driver():
    with webdriver.driver() as found:
        yield found


@pytest.fixture
def page(driver, address):
    """The page, with its first answers."""
    browser = webdriver.Browser(driver)
    browser.open(address)
    browser.until(FILLED)
    browser.until("document.querySelectorAll('.near img').length === 8")
    browser.until("document.querySelector('.looks').textContent")
    yield browser
    # An error of the script, or a thing that the page's own policy forbids.
    assert [one for one in browser.log() if "the server responded" not in one] == []
    browser.close()


def picture(page, selector):
    """What an image or a canvas shows, as text."""
    return page.run(
        f"const one = document.querySelector('{selector}');"
        "return one.src ?? one.toDataURL();"
    )


def hidden(page):
    """What the slider says: share, count, and whether by hand."""
    return page.run("return document.querySelector('#count_said').textContent")


def test_pick_and_compare(page, address):
    titles = page.run(
        "return [...document.querySelectorAll('.run h2')].map(x => x.textContent)"
    )
    assert titles == ["mae, step 10", "mocov3, step 10"]
    text = page.run("return document.querySelector('#run1').textContent")
    assert "This method predicts no pixels." in text
    rows = page.run("return document.querySelectorAll('#run0 tr').length")
    assert rows == 5 and " dB" in page.run(
        "return document.querySelector('td').textContent"
    )
    whole = [".filled", "#original", "#run0 .near img", "#run1 canvas", "#run0 canvas"]
    before = [picture(page, one) for one in whole]
    page.click("#held_out button:nth-child(3)")
    page.until(f"document.querySelector('.filled').src !== {json.dumps(before[0])}")
    page.until(
        f"document.querySelector('#run0 .near img').src !== {json.dumps(before[2])}"
    )
    after = [picture(page, one) for one in whole]
    assert all(x != y for x, y in zip(before, after, strict=True))
    pressed = (
        "return [...document.querySelectorAll('#held_out button')]"
        ".map(x => x.ariaPressed)"
    )
    assert page.run(pressed).index("true") == 2
    page.click("#others")
    assert set(page.run(pressed)) == {"false"}
    # Nothing came from elsewhere, and nothing is wider than the window.
    fetched = page.run(
        "return performance.getEntriesByType('resource').map(x => x.name)"
    )
    assert fetched and all(one.startswith((address, "data:")) for one in fetched)
    assert page.run("return document.documentElement.scrollWidth") <= 1280


def test_drag_ratio_and_unit(page):
    assert hidden(page) == "75 %, 12 of 16"
    before = picture(page, ".filled")
    page.drag("#count", (0.75, 0.5), (0.5, 0.5), (0.2, 0.5))
    count = int(hidden(page).split()[2])
    assert count in (3, 4, 5)
    page.until(f"{SAID}.startsWith('Filled in: {count} of 16')")
    assert picture(page, ".filled") != before
    before = picture(page, "#mask")
    page.drag("#unit", (0.03, 0.5), (0.3, 0.5), (0.5, 0.5))
    said = "return document.querySelector('#unit_said').textContent"
    assert page.run(said) == "4 x 4 pixels"
    page.until(f"document.querySelector('#mask').toDataURL() !== {json.dumps(before)}")
    before = picture(page, "#mask")
    for _ in range(5):  # one of four units may be drawn again
        page.click("#again")
    page.until(f"document.querySelector('#mask').toDataURL() !== {json.dumps(before)}")


def test_paint(page):
    # The first patch of a stroke decides whether it hides or shows.
    states = "return [0, 1, 2, 3].map(x => state.hidden.has(x))"
    first = page.run(states)[0]
    count = page.run("return state.hidden.size")
    change = sum(one == first for one in page.run(states))
    row = [(x, 0.1) for x in (0.1, 0.3, 0.4, 0.6, 0.9)]
    page.drag("#mask", *row)
    assert page.run(states) == [not first] * 4
    count += -change if first else change
    assert hidden(page) == f"{100 * count / 16:.0f} %, {count} of 16, painted"
    page.until(f"{SAID}.startsWith('Filled in: {count} of 16')")
    # A stroke back.
    page.drag("#mask", *row)
    assert page.run(states) == [first] * 4
    # Nothing is left visible: the page says so, and asks nothing.
    strokes = [(x, y) for y in (0.1, 0.4, 0.6, 0.9) for x in (0.1, 0.4, 0.6, 0.9)]
    page.run("state.hidden.clear();")
    page.drag("#mask", *strokes)
    page.until(f"{SAID}.includes('leave at least one visible')")
    assert hidden(page) == "100 %, 16 of 16, painted"


def test_click_a_patch(page):
    said = "document.querySelector('#run0 .looks').textContent"
    assert page.run(f"return {said}").startswith(
        "From the class token, mean over heads"
    )
    before = [picture(page, f"#run{i} canvas") for i in (0, 1)]
    page.drag("#original", (0.6, 0.3))
    page.until(f"{said}.startsWith('From the patch in row 2, column 3')")
    after = [picture(page, f"#run{i} canvas") for i in (0, 1)]
    assert all(x != y for x, y in zip(before, after, strict=True))
    page.click("#class_token")
    page.until(f"{said}.startsWith('From the class token')")
    assert [picture(page, f"#run{i} canvas") for i in (0, 1)] == before


def test_upload_a_wrong_file_and_a_huge_one(page, tmp_path, recorder):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    before = picture(page, "#original")
    page.send("#file", str(tmp_path / "mine.png"))
    page.until(
        f"document.querySelector('#original').toDataURL() !== {json.dumps(before)}"
    )
    page.until(FILLED)
    mine = picture(page, "#original")
    (tmp_path / "wrong.png").write_text("<script>alert(1)</script>")
    page.send("#file", str(tmp_path / "wrong.png"))
    page.until(
        f"{SAID} === 'wrong.png: ' + {SAID}.slice(11) && {SAID}.includes('no image')"
    )
    (tmp_path / "huge.png").write_bytes(b"x" * (MOST + 1))
    asked = len(recorder.answers)
    page.send("#file", str(tmp_path / "huge.png"))
    page.until(f"{SAID}.startsWith('huge.png has 30,001 bytes: want at most 30,000')")
    assert len(recorder.answers) == asked  # it was not even sent
    assert page.run("return document.querySelector('#message').className") == "error"
    # The image before is still there, and can be worked with.
    assert picture(page, "#original") == mine
    page.click("#again")
    page.until(FILLED)


def test_two_people_at_once(page, driver, address):
    other = webdriver.Browser(driver)
    other.open(address)
    other.until(FILLED)
    page.click("#held_out button:nth-child(2)")
    other.click("#held_out button:nth-child(5)")
    for one in (page, other):
        one.drag("#count", (0.75, 0.5), (0.5, 0.5))
    for one in (page, other):
        one.until(f"{FILLED} && !document.querySelector('.stale')")
    images = [one.run("return state.image") for one in (page, other)]
    assert images[0] != images[1]
    # Each sees what somebody alone would: the visible patches of their own image.
    for one in (page, other):
        found = one.run(
            "const filled = document.querySelector('.filled');"
            "const read = picture => { const c = document.createElement('canvas');"
            "c.width = c.height = 8; const d = c.getContext('2d');"
            "d.drawImage(picture, 0, 0);"
            "return [...d.getImageData(0, 0, 8, 8).data]; };"
            "return [read(filled), read(state.picture), [...state.hidden]];"
        )
        filled, original = (np.reshape(x, (8, 8, 4)) for x in found[:2])
        gone = np.isin(np.arange(16), found[2]).reshape(4, 4).repeat(2, 0).repeat(2, 1)
        assert (filled[~gone] == original[~gone]).all()
        assert (filled[gone] != original[gone]).any()
    other.close()


ATTACK = """<!doctype html><meta charset="utf-8"><body><script>
const there = TARGET, found = {};
async function tried(name, work) {
  try { found[name] = "" + await work(); } catch (error) { found[name] = "refused"; }
}
window.over = (async () => {
  await tried("read", async () => (await fetch(there + "about")).text());
  const post = {method: "POST", body: "{}"};
  await tried("post", async () => (await fetch(there + "image", post)).text());
  await tried("blind", () => fetch(there + "near", {mode: "no-cors", ...post}));
  await tried("script", () => new Promise((good, bad) => {
    const one = document.createElement("script");
    Object.assign(one, {src: there + "page.js", onload: good, onerror: bad});
    document.body.append(one);
  }));
  await tried("frame", () => new Promise(good => {
    const one = document.createElement("iframe");
    Object.assign(one, {src: there, onload: good});
    document.body.append(one);
  }));
  return found;
})();
</script>"""


def test_a_page_of_another_origin_reads_nothing(driver, address, recorder, tmp_path):
    text = ATTACK.replace("TARGET", json.dumps(address))
    (tmp_path / "index.html").write_text(text)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        browser, asked = webdriver.Browser(driver), len(recorder.answers)
        browser.open(f"http://127.0.0.1:{elsewhere.server_port}/")
        found = browser.run("return await window.over;")
        browser.close()
        elsewhere.shutdown()
    assert {found[name] for name in ("read", "post", "script")} == {"refused"}
    answers = recorder.answers[asked:]
    paths = {path for path, _ in answers}
    assert {"/about", "/image", "/near", "/page.js", "/"} <= paths
    assert {status for _, status in answers} == {403}, answers


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
