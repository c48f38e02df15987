# SPDX-License-Identifier: Apache-2.0
"""The compare page of real, tiny runs: all in one file, and every run in its table."""

import html.parser
import json
import pathlib

import jax
import pytest

from mim_jax import compare, config, train

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
    tree.skip = ("tsne",)
    return tree


def test_one_page_with_everything_in_it(runs, tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        compare.run(tree_of(runs), tmp_path)
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    # Reconstruction, a gallery for each of three, CKA, attention, curves.
    assert len(page.images) == 1 + 3 + 1 + 1 + 1
    text = " ".join(page.texts)
    for title in ("mae, step 2", "supervised, step 2", "random (mae), step 0"):
        assert title in text
    assert "reconstruction of a Supervised run: want an objective that" in text
    assert "objective.smoothing" in text  # differs: one has it
    assert "objective.encoder.width" not in text  # the same in both
    assert "<!--" not in (tmp_path / "report" / "index.html").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["knn"]["mae, step 2"]["images"]["value"] == 355
    shown = results["knn"]["mae, step 2"]["accuracy_model_k10"]["value"]
    assert f"{shown:.1%}" in text


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(config.ConfigError, match="folders with different names"):
        compare.run(tree_of([runs[0], runs[0]]), tmp_path)
    with pytest.raises(config.ConfigError, match="runs is empty"):
        compare.run(tree_of([]), tmp_path)
    tree = tree_of(runs)
    tree.skip = ("tsn",)
    with pytest.raises(config.ConfigError, match="skip='tsn' is unknown"):
        compare.run(tree, tmp_path)
    other = json.loads((runs[1] / "config.json").read_text())
    other["data"]["image_size"] = [10, 10]
    (runs[1] / "config.json").write_text(json.dumps(other))
    with pytest.raises(config.ConfigError, match=r"as \(10, 10, 1\), another run"):
        compare.run(tree_of(runs), tmp_path)
    assert not (tmp_path / "report").exists()
