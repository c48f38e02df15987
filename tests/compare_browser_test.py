# SPDX-License-Identifier: Apache-2.0
"""A page of comparisons in a real browser: what a person sees and clicks."""

import pathlib
import shutil

import pytest
import webdriver

from mim_jax import compare, config

pytestmark = [
    pytest.mark.skipif(bool(webdriver.missing()), reason=webdriver.missing()),
    pytest.mark.slow,
    pytest.mark.every_change,
]

ROOT = pathlib.Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "old_runs"
ROWS = (
    "return [...document.querySelectorAll('table')[0].tBodies[0].rows]"
    ".map(row => row.cells[0].textContent.trim());"
)
COLUMN = 3  # a measurement: PSNR of hidden pixels


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = [shutil.copytree(OLD / name / "run", folder / name) for name in NAMES]
    tree = config.read(str(ROOT / "configs/compare.py"))
    tree.runs = tuple(map(str, runs))
    tree.reconstruction.update(dict(images=4, rows=2))
    tree.skip = ("tsne", "cka", "attention")
    compare.run(tree, folder / "compare")
    return (folder / "compare" / "report" / "index.html").as_uri()


NAMES = ("mae", "mocov3")


@pytest.fixture
def page(address):
    with webdriver.driver() as driver:
        browser = webdriver.Browser(driver, 1000, 900)
        browser.open(address)
        yield browser
        # An error of the script, or a thing that the page's own policy forbids.
        assert browser.log() == []
        browser.close()


def test_a_click_sorts_and_the_third_restores(page):
    first = page.run(ROWS)
    assert len(first) == 3 and first[0].startswith("mae")
    head = f"thead th:nth-child({COLUMN})"
    orders = []
    for _ in range(3):
        page.click(f"{head} button")
        said = page.run(f"return document.querySelector('{head}').ariaSort")
        orders.append((said, page.run(ROWS)))
    # Rows without a value are last.
    values = (
        "return [...document.querySelectorAll('table')[0].tBodies[0].rows]"
        f".map(row => parseFloat(row.cells[{COLUMN - 1}].textContent));"
    )
    numbers = dict(zip(page.run(ROWS), page.run(values), strict=True))
    known = [row for row in first if numbers[row] is not None]
    down = sorted(known, key=lambda row: -numbers[row])
    lost = [row for row in first if numbers[row] is None]
    assert orders[0] == ("descending", [*down, *lost])
    assert orders[1] == ("ascending", [*down[::-1], *lost])
    assert orders[2][1] == first


def test_it_fits_a_narrow_window_and_a_dark_screen(page):
    width = "return [document.documentElement.scrollWidth, innerWidth];"
    colour = "return getComputedStyle(document.body).backgroundColor;"
    light = page.run(colour)
    emulated = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.devtools("Emulation.setEmulatedMedia", emulated)
    assert light == "rgb(255, 255, 255)" and page.run(colour) != light
    size = dict(width=500, height=900, deviceScaleFactor=1, mobile=False)
    page.devtools("Emulation.setDeviceMetricsOverride", size)
    assert page.run(width) == [500, 500]


def test_every_picture_is_there(page):
    sizes = page.run(
        "return [...document.images].map(one => [one.complete, one.naturalWidth]);"
    )
    assert len(sizes) > 8 and all(done and wide for done, wide in sizes)
