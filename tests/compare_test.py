# SPDX-License-Identifier: Apache-2.0
"""The compare page of real, tiny runs: all in one file, every run in its table, also
for an evaluation that the program does not know; and a browser shows it."""

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from mim_jax import compare, config, train
from mim_jax.evals import EVALS
from mim_jax.evals.base import Eval, Headline
from mim_jax.evals.figures import Panel, gallery
from mim_jax.evals.report import Number, Report, mean_of

ROOT = pathlib.Path(__file__).parents[1]


def trained(name: str, folder: pathlib.Path, **leaves) -> pathlib.Path:
    tree = config.read(str(ROOT / f"configs/{name}.py:digits"))
    tree.steps, tree.batch_size, tree.compile_cache = 2, 8, False
    tree.log.update(dict(every=1, tensorboard=False, progress="none"))
    tree.objective.encoder.update(dict(width=8, depth=2, heads=2))
    if "decoder" in tree.objective:
        tree.objective.decoder.update(dict(width=8, depth=1, heads=2))
        tree.report.update(dict(images=2, draws=1, inpainted=0, rows=1))
    tree.update(leaves)
    workdir = folder / name
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, workdir)
    return workdir


class Page(html.parser.HTMLParser):
    """What a page shows and what it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.links, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_data(self, data):
        self.texts.append(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Eval):
    """An evaluation from elsewhere."""

    description = "How bright < dark images are."
    headlines = (
        Headline("mean_*", "mean {}", "lux", "lower", "The mean of all pixels."),
        Headline("share", "glare", "share", "neither", "Share of white pixels."),
        Headline("gone", "gone", "1", "higher", "What nobody measured."),
    )

    def check_objective(self, objective):
        if hasattr(objective, "smoothing"):
            raise ValueError("too smooth")

    def measure(self, run, data):
        with data.held_out() as batches:
            batch = next(batches)
        numbers = {
            "mean_pixel_value": mean_of(batch["image"].mean(axis=(1, 2, 3)), "lux"),
            "share": Number(0.25, "share"),
        }
        return Report(numbers=numbers, arrays={"first": batch["image"][0].copy()})

    def draw(self, found):
        panels = [Panel(report.arrays["first"]) for report in found.values()]
        return {"brightness": gallery(panels, 3)}


@pytest.fixture(scope="module", autouse=True)
def elsewhere():
    """The evaluation has a row, and no other line of the program knows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EVALS, "brightness", Brightness)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [trained("mae", folder), trained("supervised", folder)]


def tree_of(runs):
    tree = config.read(str(ROOT / "configs/compare.py"))
    tree.runs = tuple(map(str, runs))
    tree.reconstruction.update(dict(images=2, rows=2))
    tree.cka.update(dict(images=20, ratios=(0.5,)))
    tree.attention.update(dict(rows=2, images=20))
    tree.skip, tree.also = ("tsne",), ("brightness",)
    return tree


@pytest.fixture(scope="module")
def written(runs, elsewhere, tmp_path_factory):
    """The work directory of a comparison."""
    workdir = tmp_path_factory.mktemp("compare")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        compare.run(tree_of(runs), workdir)
    return workdir


def test_one_page_with_everything_in_it(written):
    text = (written / "report" / "index.html").read_text()
    assert "<!--" not in text
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    # Reconstruction, a gallery for each of three, CKA, attention, brightness, curves.
    assert len(page.images) == 1 + 3 + 1 + 1 + 1 + 1
    text = " ".join(page.texts)
    for title in ("mae, step 2", "supervised, step 2", "random (mae), step 0"):
        assert title in text
    assert "reconstruction of a Supervised run: want an objective that" in text
    assert "objective.smoothing" in text  # differs: one has it
    assert "objective.encoder.width" not in text  # the same in both
    results = json.loads((written / "results.json").read_text())
    assert results["knn"]["mae, step 2"]["images"]["value"] == 355
    shown = results["knn"]["mae, step 2"]["accuracy_model_k10"]["value"]
    assert f"{shown:.1%}" in text
    for number in ("psnr_model_db", "psnr_untrained_db", "mse_model"):
        assert number in results["reconstruction"]["mae, step 2"]
    with np.load(written / "report" / "cka.npz", allow_pickle=False) as arrays:
        assert arrays["mae, step 2/cka"].shape == (1, 2)
        # A supervised encoder has no mask token.
        assert arrays["supervised, step 2/occlusion"].item() == "drop"


def test_an_evaluation_says_all_that_the_page_shows_of_it(written):
    text = (written / "report" / "index.html").read_text()
    table, _, sections = text.partition("</table>")
    heads = re.findall("<th>([^<]*)<small>([^<]*)</small></th>", table)
    assert heads[-2:] == [
        ("mean pixel value, lux", "lower is better"),
        ("glare", "no direction is better"),
    ]
    cells = re.findall("<tr><td>(.*)</td></tr>", table)
    assert [row.rsplit("</td><td>", 1)[1] for row in cells] == ["25.0%", "–", "25.0%"]
    results = json.loads((written / "results.json").read_text())["brightness"]
    assert results.keys() == {"mae, step 2", "random (mae), step 0"}
    low, high = results["mae, step 2"]["mean_pixel_value"]["interval"]
    assert f"<small>{low:.3g} to {high:.3g}</small>" in cells[0]
    section = sections.partition("id='brightness'")[2]
    assert "How bright &lt; dark images are." in section
    assert "<b>mean ..., lux</b>: The mean of all pixels. Lower is better." in section
    assert "What nobody measured. Higher is better. Not measured here." in section
    assert "of white pixels. No direction is better.<" in section
    assert "supervised, step 2: too smooth" in section


def test_an_evaluation_that_explains_nothing_is_an_error():
    with pytest.raises(
        TypeError, match="evaluation Silent has no class attribute 'des"
    ):

        class Silent(Eval):
            headlines = ()


# Runs in the page, and leaves what it saw where `--dump-dom` prints it.
MEASURE = """<script>
addEventListener("load", () => {
  const page = document.documentElement;
  const rows = [...document.querySelector("table").rows].slice(1);
  const place = document.createElement("pre");
  const found = {
    title: document.title,
    images: [...document.images].map(one => [one.naturalWidth, one.clientWidth]),
    rows: rows.map(row => row.cells[0].textContent),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    width: page.clientWidth,
    needed: page.scrollWidth,
  };
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    return found[0]


def test_a_browser_shows_the_page_without_a_network(written, browser, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text((written / "report" / "index.html").read_text() + MEASURE)
    done = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",  # does not work as root; the page is our own
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1280,4000",
            f"--screenshot={picture}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    dumped = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr
    found = json.loads(html.unescape(dumped[1]))
    assert found["title"] == "mae, supervised, random (mae)"
    titles = ["mae, step 2", "supervised, step 2", "random (mae), step 0"]
    assert found["rows"] == titles
    assert len(found["images"]) == 8
    assert all(min(widths) > 100 for widths in found["images"]), found["images"]
    assert [one for one in found["fetched"] if not one.startswith("data:")] == []
    assert found["width"] == 1280 and found["needed"] <= 1280
    with Image.open(picture) as shown:
        assert shown.width == 1280
        pixels = np.asarray(shown.convert("RGB"), int)
    # Text is grey, but the classes of wrong neighbours are red.
    assert (np.ptp(pixels, axis=-1) > 100).mean() > 1e-4


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(config.ConfigError, match="folders with different names"):
        compare.run(tree_of([runs[0], runs[0]]), tmp_path)
    with pytest.raises(config.ConfigError, match="runs is empty"):
        compare.run(tree_of([]), tmp_path)
    tree = tree_of(runs)
    tree.skip = ("tsn",)
    with pytest.raises(config.ConfigError, match="skip='tsn' is unknown"):
        compare.run(tree, tmp_path)
    for name, why in (("brightnes", " is unknown; known: "), ("knn", ": the page has")):
        tree = tree_of(runs)
        tree.also = (name,)
        with pytest.raises(config.ConfigError, match=f"also='{name}'{why}"):
            compare.run(tree, tmp_path)
    other = shutil.copytree(runs[1], tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    values["data"]["image_size"] = [10, 10]
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(config.ConfigError, match=r"as \(10, 10, 1\), another run"):
        compare.run(tree_of([runs[0], other]), tmp_path)
    assert not (tmp_path / "report").exists()
