# SPDX-License-Identifier: Apache-2.0
"""The compare page of real, tiny runs: all in one file, every run in its table, also
for an evaluation that the program does not know; and a browser shows it."""

import base64
import dataclasses
import hashlib
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
from mim_jax.compare import losses, origins, table
from mim_jax.evals import EVALS
from mim_jax.evals.base import Eval, Headline, Run
from mim_jax.evals.figures import Panel, gallery
from mim_jax.evals.report import Number, Report, mean_of
from mim_jax.run.loading import Loaded

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
        self.names, self.alts, self.heads, self.rows = set(), [], [], []
        self.scripts, self.policy, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._inside = tag
        self.names.add(values.get("id"))
        if tag == "img":
            self.images.append(values["src"])
            self.alts.append(values.get("alt"))
        if tag == "meta" and "http-equiv" in values:
            self.policy = values["content"]
        if "data-better" in values:
            self.heads.append({"better": values["data-better"], "text": ""})
        if tag == "tr":
            self.rows.append([])
        if self.rows and tag in ("td", "th") and values.get("scope") != "col":
            self.rows[-1].append({"value": values.get("data-value"), "text": ""})
        self.links += [values[key] for key in ("href", "src") if key in values]

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
            self._inside = ""
            return
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1]["text"] += data
        elif self.heads and len(self.rows) == 1:
            self.heads[-1]["text"] += data


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
    for link in page.links:
        inside = link.startswith("#") and link[1:] in page.names
        assert inside or link.startswith("data:image/png;base64,")
    # Two images, as they are, masked, and by two models; neighbours of three runs; CKA,
    # attention, brightness, curves.
    assert len(page.images) == 2 * 4 + 3 + 1 + 1 + 1 + 1
    assert all(page.alts) and len(set(page.alts)) == len(page.alts)
    assert any("filled in by mae, step 2: " in alt for alt in page.alts)
    assert any("CKA (plain), full against masked" in alt for alt in page.alts)
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
    page = Page(table)
    assert [one["text"].strip() for one in page.heads[-2:]] == [
        "mean pixel value, luxlower is better",
        "glareno direction is better",
    ]
    assert [one["better"] for one in page.heads[-2:]] == ["lower", "neither"]
    texts = [row[-1]["text"].strip() for row in page.rows[1:]]
    assert texts == ["25.0%", "–", "25.0%"]
    assert [row[-1]["value"] for row in page.rows[1:]] == ["0.25", None, "0.25"]
    results = json.loads((written / "results.json").read_text())["brightness"]
    assert results.keys() == {"mae, step 2", "random (mae), step 0"}
    number = results["mae, step 2"]["mean_pixel_value"]
    low, high = number["interval"]
    assert f" {low:.3g} to {high:.3g}" in page.rows[1][-2]["text"]
    # To the last digit, so that the script sorts as the values are.
    assert float(page.rows[1][-2]["value"]) == number["value"]
    section = sections.partition("id='brightness'")[2]
    assert "How bright &lt; dark images are." in section
    assert "<b>mean ..., lux</b>: The mean of all pixels. Lower is better." in section
    assert f"n = {number['n']}." in section
    assert "What nobody measured. Higher is better. Not measured here." in section
    assert "of white pixels. No direction is better.<" in section
    assert "supervised, step 2: too smooth" in section


def test_the_best_of_each_column_is_marked_by_a_word(written):
    page = Page(
        (written / "report" / "index.html").read_text().partition("</table>")[0]
    )
    results = json.loads((written / "results.json").read_text())
    (column,) = (i for i, one in enumerate(page.heads) if "PSNR of hid" in one["text"])
    numbers = results["reconstruction"]
    best = max(numbers, key=lambda run: numbers[run]["psnr_model_db"]["value"])
    low = numbers[best]["psnr_model_db"]["interval"][0]
    for row in page.rows[1:]:
        run, text = row[0]["text"], row[column]["text"]
        if run not in numbers:
            assert text == "–"
        elif run == best:
            assert text.endswith("★ best")
        else:
            near = numbers[run]["psnr_model_db"]["interval"][1] >= low
            assert text.endswith("≈ best") == near
    # No direction is better.
    assert not any("best" in row[-1]["text"] for row in page.rows[1:])


def test_marks_of_numbers_that_cannot_be_ordered():
    nan, number = float("nan"), Number(1.0, "dB")
    for better, numbers, want in (
        ("higher", {"a": number, "b": Number(nan, "dB")}, {}),  # nothing to compare
        ("neither", {"a": number, "b": Number(2.0, "dB")}, {}),
        ("lower", {"a": number, "b": Number(2.0, "dB")}, {"a": "★ best"}),
        ("higher", {"a": number, "b": number}, {"a": "★ best", "b": "★ best"}),
        (
            "lower",
            {"a": Number(1.0, "1", 9, (0.5, 1.5)), "b": Number(2.0, "1", 9, (1.6, 2))},
            {"a": "★ best"},
        ),
    ):
        assert table.marks(better, numbers) == want
    assert "data-value='Infinity'" in table.cell(Number(float("inf"), "dB"))
    assert table.cell(Number(nan, "dB")) == table.cell(None) == "<td>–</td>"


def test_the_pages_policy_lets_its_own_script_run_and_no_other(written):
    page = Page((written / "report" / "index.html").read_text())
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy.startswith("default-src 'none'; img-src data:; ")
    assert page.policy.endswith(f"script-src 'sha256-{digest}'")


# A table as the page has it, for its script, and clicks on heads.
CLICKS = """
const given = require("fs").readFileSync(0, "utf8");
const { script, heads, rows, clicks } = JSON.parse(given);
const element = () => ({
  attributes: {}, childNodes: [], clicked: null,
  append(...more) { this.childNodes = more; },
  addEventListener(name, act) { this.clicked = act; },
  getAttribute(name) { return this.attributes[name] ?? null; },
  setAttribute(name, value) { this.attributes[name] = value; },
});
const head = heads.map(({ better }) => ({ ...element(), dataset: { better } }));
const body = { rows: rows.map(cells => ({
  cells: cells.map(({ value, text }) => ({
    textContent: text, dataset: value === null ? {} : { value } })),
})) };
body.append = (...order) => { body.rows = order; };
const table = { tHead: { rows: [{ cells: head }] }, tBodies: [body] };
globalThis.document = { querySelector: () => table, createElement: element };
eval(script);
const found = clicks.map(column => {
  head[column].childNodes[0].clicked();
  return [
    body.rows.map(row => row.cells[0].textContent),
    head.map(one => one.attributes["aria-sort"]),
  ];
});
console.log(JSON.stringify(found));
"""


def clicked(script: str, heads: list, rows: list, clicks: list[int]) -> list:
    """(order of the rows, aria-sort of the heads) after each click on a head."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on the PATH, which runs the page's script")
    given = {"script": script, "heads": heads, "rows": rows, "clicks": clicks}
    done = subprocess.run(
        [node, "-e", CLICKS],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_click_on_a_head_sorts_the_better_way_first(written):
    (script,) = Page((written / "report" / "index.html").read_text()).scripts
    heads = [{"better": better} for better in ("words", "higher", "lower", "neither")]
    values = {"run 10": (0.9, 3, None), "run 9": (1e-5, -1, 2), "x": (None, 20, -7)}
    rows = [
        [{"value": None, "text": run}]
        + [{"value": None if v is None else str(v), "text": "–"} for v in row]
        for run, row in values.items()
    ]
    first = list(values)
    found = clicked(script, heads, rows, [1, 1, 1, 2, 3, 3, 0, 0])
    assert [order for order, _ in found] == [
        ["run 10", "run 9", "x"],  # the missing one last
        ["run 9", "run 10", "x"],  # also the other way round
        first,
        ["run 9", "run 10", "x"],
        ["run 9", "x", "run 10"],
        ["x", "run 9", "run 10"],
        ["run 9", "run 10", "x"],  # 9 before 10
        ["x", "run 10", "run 9"],
    ]
    assert [ways for _, ways in found][:4] == [
        ["none", "descending", "none", "none"],
        ["none", "ascending", "none", "none"],
        ["none"] * 4,
        ["none", "none", "ascending", "none"],
    ]


def test_the_pages_own_table_is_sorted(written):
    text = (written / "report" / "index.html").read_text()
    page = Page(text.partition("</table>")[0])
    heads, rows = page.heads, page.rows[1:]
    (column,) = (i for i, one in enumerate(heads) if "PSNR of hid" in one["text"])
    (found,) = clicked(Page(text).scripts[0], heads, rows, [column])
    there = [row for row in rows if row[column]["value"] is not None]
    assert len({row[column]["value"] for row in there}) == 2
    there.sort(key=lambda row: -float(row[column]["value"]))
    want = [row[0]["text"] for row in there] + ["supervised, step 2"]
    assert found[0] == want


def loaded(folder: pathlib.Path, name: str, values: list, **leaves) -> Loaded:
    """A run of which only config and losses are there."""
    tree = config.read(str(ROOT / f"configs/{name}.py:digits"))
    tree.update_from_flattened_dict(leaves)
    folder.mkdir()
    (folder / "config.json").write_text(config.dumps(tree))
    rows = [{"step": 10 * i, "loss": loss} for i, loss in enumerate(values, 1)]
    lines = [
        json.dumps(row) + "\n" for row in [*rows, {"step": 10, "knn/seconds": 1.0}]
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    training = config.build(tree)
    run = Run(objective=training.objective, params={}, initial={}, step=1, name="")
    return Loaded(folder, run, training)


def test_losses_share_axes_only_where_they_are_the_same_function(tmp_path):
    runs = {
        "a": loaded(tmp_path / "a", "mae", [100.0, 1.0]),
        "wider": loaded(
            tmp_path / "w", "mae", [1.0, 0.9], **{"objective.encoder.width": 8}
        ),
        "half": loaded(
            tmp_path / "h", "mae", [1.0, 0.9], **{"objective.masking.ratio": 0.5}
        ),
        "other": loaded(tmp_path / "o", "supervised", [2.0, 1.9]),
        "silent": loaded(tmp_path / "s", "mae", []),
    }
    lines = {title: losses.logged(one.folder) for title, one in runs.items()}
    figure = losses.curves(runs, lines)
    assert figure is not None
    shown = [
        [text.get_text() for text in axis.get_legend().get_texts()]
        for axis in figure.axes
        if axis.lines
    ]
    assert shown == [["a", "wider"], ["half"], ["other"]]
    scales = [axis.get_yscale() for axis in figure.axes if axis.lines]
    assert scales == ["log", "linear", "linear"]
    assert figure.axes[0].get_ylabel() == "loss, log scale"
    text = losses.section(lines, figure)
    assert "silent: no loss was logged" in text and "other: no loss" not in text
    assert losses.curves({"silent": runs["silent"]}, lines) is None


def test_the_page_names_the_commands_and_shows_them_as_text(tmp_path):
    one = loaded(tmp_path / "a", "mae", [])
    odd = "main --config=x '<script>' \u202e\x1b[2J"
    (one.folder / "summary.txt").write_text(f"command     {odd}\nstarted     now\n")
    text = origins.commands({"a": one, "b": loaded(tmp_path / "b", "mae", [])})
    shown = "main --config=x '<script>' \ufffd\ufffd[2J"
    assert f"<pre>{html.escape(shown)}</pre>" in text
    assert "started" not in text
    assert "names no command" in text.partition("<dt>b</dt>")[2]


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
    text = (written / "report" / "index.html").read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy".*?>', text)
    page.write_text(text.replace(policy[0], "") + MEASURE)  # a script of our own
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
    assert len(found["images"]) == 15
    # Those of the gallery have 8 pixels, the others are pictures.
    drawn = [widths for widths in found["images"] if widths[0] != 8]
    assert len(drawn) == 7 and all(min(widths) > 100 for widths in drawn), drawn
    assert all(one[1] > 60 for one in found["images"] if one[0] == 8)
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
