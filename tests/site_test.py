# SPDX-License-Identifier: Apache-2.0
"""The documentation site builds without a warning and without a network; no link of it
is dead, and it fetches nothing from elsewhere."""

import html.parser
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import urllib.parse

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MISSING = [
    name
    for name in ("sphinx", "myst_parser", "furo")
    if importlib.util.find_spec(name) is None
]
needs_extra = pytest.mark.skipif(
    bool(MISSING), reason=f"the extra docs is not installed: no {', '.join(MISSING)}"
)
site = runpy.run_path(str(ROOT / "docs" / "make_site.py"))
# Runs a program that cannot reach any network.
CUT_OFF = """
import runpy, socket, sys
def connect(self, address):
    raise OSError(f"the site wants the network: {address}")
socket.socket.connect = connect
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Page(html.parser.HTMLParser):
    """The names of a page's places, where its links lead, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.names, self.links, self.loaded, self.text = set(), [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(values["href"])
        if tag in ("img", "script", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, ROOT / "docs" / "make_site.py", folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return {
        path.relative_to(folder).as_posix(): Page(path)
        for path in folder.rglob("*.html")
    }, folder


@needs_extra
@pytest.mark.slow
@pytest.mark.every_change
def test_no_link_of_the_site_is_dead(built):
    pages, folder = built
    assert len(pages) > 30
    checked = 0
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link in page.links, f"{name} loads {link}"
                continue
            path = (folder / name).parent / urllib.parse.unquote(parts.path)
            path = path.resolve() if parts.path else folder / name
            assert path.is_file(), f"{name}: {link}"
            if parts.fragment and path.suffix == ".html":
                target = pages[path.relative_to(folder.resolve()).as_posix()]
                # Search highlights are made by a script.
                assert parts.fragment in target.names, f"{name}: {link}"
            checked += 1
    assert checked > 1000


@needs_extra
@pytest.mark.slow
@pytest.mark.every_change
def test_five_questions_are_answered_within_one_click(built):
    pages, _ = built
    start = (ROOT / "docs" / "index.md").read_text().split("\n\n")
    for question, target, answer in (
        ("What is it?", "concepts", "masked autoencoder"),
        ("Does it run here?", "README", "--doctor"),
        ("Does it run here?", "gpu", "training, evaluation and studies on a GPU"),
        ("Does it run here?", "colab", "After a disconnect"),
        ("Does it run here?", "limits", "anything on a TPU"),
        ("What did it find out about the papers?", "claims", "A claim holds if"),
        ("What did it find out about the papers?", "limits", "training on ImageNet"),
        ("How do I use it on mine?", "data", "source=folder"),
        ("How fast, and how big does it go?", "performance", "images a second"),
    ):
        (text,) = (one for one in start if one.startswith(f"**{question}**"))
        assert f"{target}.md" in text
        assert answer in pages[f"{target.lower()}.html"].text
        assert question in pages["index.html"].text


# The scripts of the search page, in the order in which it loads them, with what they
# want of a browser; then a search, as the page makes one.
SEARCH = """
const [folder, protocol, query, ...scripts] = process.argv.slice(1);
const fs = require("fs"), path = require("path"), vm = require("vm");
const nothing = { addEventListener() {}, documentElement: { dataset: {} } };
const context = vm.createContext({
  ...nothing,
  document: { ...nothing, readyState: "loading", getElementById: () => null },
  location: { protocol, search: "" }, localStorage: { setItem() {}, getItem() {} },
  URLSearchParams, console,
});
context.window = context;
for (const one of scripts) {
  const inline = one.startsWith("\\n");
  const text = inline ? one : fs.readFileSync(path.join(folder, one), "utf8");
  vm.runInContext(text, context);
}
context.query = query;
const found = vm.runInContext(`
  const [asked, words, excluded, highlights, objects] = Search._parseQuery(query);
  const hits = Search._performSearch(asked, words, excluded, highlights, objects);
  ({
    pages: hits.map(hit => hit[0]),
    excerpts: DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY,
  })`, context);
console.log(JSON.stringify(found));
"""


@needs_extra
@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.parametrize("protocol, excerpts", [("file:", False), ("https:", True)])
def test_the_search_works_from_disk(built, protocol, excerpts):
    """No script of it reads a page there, which browsers do not allow."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on the PATH, which runs the search")
    _, folder = built
    text = (folder / "search.html").read_text()
    tags = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    scripts = []
    for attributes, body in tags:
        source = re.search(r'src="([^"?]*)', attributes)
        if source and "furo.js" not in source[1]:  # colours and scrolling
            scripts.append(source[1])
        elif "DOCUMENTATION_OPTIONS" in body:
            scripts.append("\n" + body)
    assert "searchindex.js" in scripts
    done = subprocess.run(
        [node, "-e", SEARCH, folder, protocol, "checkpoint lost", *scripts],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "reliability" in found["pages"] and found["excerpts"] is excerpts


@needs_extra
@pytest.mark.slow
@pytest.mark.every_change
def test_the_reference_has_the_docstrings(built):
    pages, _ = built
    text = pages["reference/use_a_model.html"].text
    assert "Hides patches of images at random, and fills them in." in text
    assert "psnr" in pages["reference/functions_of_arrays.html"].text


def test_every_page_stands_in_the_contents_once():
    names = site["PAGES"]
    assert len(names) == len(set(names))
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    pages |= {name.removesuffix(".md") for name in site["AT_ROOT"].values()}
    pages |= {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(names) == pages | {"reference"}


def test_the_map_of_the_papers_has_every_study():
    text = (ROOT / "docs" / "papers.md").read_text()
    for path in (ROOT / "configs").glob("study_*.py"):
        assert f"`configs/{path.name}`" in text, path.name


@needs_extra
@pytest.mark.slow
@pytest.mark.every_change
def test_notebooks_show_what_they_printed_and_drew(built):
    pages, folder = built
    page = pages["notebooks/quickstart.html"]
    assert "the same keys, the same masks: True" in page.text
    pictures = [one for one in page.loaded if "_images/" in one]
    assert len(pictures) == 5
    for one in pictures:
        data = (folder / "notebooks" / one).read_bytes()
        assert data.startswith(b"\x89PNG")


def test_modules_of_the_reference_are_there():
    for names in site["REFERENCE"].values():
        for name in names:
            assert ROOT.joinpath(*name.split(".")).with_suffix(".py").exists(), name


def test_links_lead_to_pages_of_the_site():
    moved = site["_moved"]
    for source, text, want in (
        ("docs/mnist.md", "[a](../README.md#use-it)", "[a](readme.md#use-it)"),
        ("README.md", "[a](docs/data.md)", "[a](data.md)"),
        ("README.md", "[a](configs/mae.py)", "[a](source/configs/mae.py.md)"),
        (
            "docs/index.md",
            "[a](../notebooks/quickstart.ipynb)",
            "[a](notebooks/quickstart.md)",
        ),
        (
            "notebooks/quickstart.ipynb",
            "[a](occlusion.ipynb) [b](../docs/data.md#x)",
            "[a](occlusion.md) [b](../data.md#x)",
        ),
        ("README.md", "[a](https://x.example/b)", "[a](https://x.example/b)"),
        ("README.md", "[a](nowhere.md)", "[a](nowhere.md)"),  # a warning, an error
    ):
        assert moved(source, site["_name"](source), text) == want
    text = "[a](../claims.md)"
    assert moved("docs/studies/x.md", "studies/x.md", text) == text
