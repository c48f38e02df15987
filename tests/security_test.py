# SPDX-License-Identifier: Apache-2.0
"""What docs/security.md says is tested; and nobody's run leads a reader elsewhere."""

import ast
import html
import html.parser
import json
import os
import pathlib
import re
import shutil

import audit
import numpy as np
import pytest

import mim_jax
from mim_jax import compare, config, evaluate, train
from mim_jax.compare import losses, origins, sections, table
from mim_jax.evals.base import Run
from mim_jax.evals.knn import KNN
from mim_jax.evals.report import Number, Report
from mim_jax.evals.side_by_side import Shown
from mim_jax.interop import native
from mim_jax.run import loading, warmstart
from mim_jax.run.loading import Loaded

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"
OLD = ROOT / "tests" / "fixtures" / "old_runs" / "mae" / "run"


def test_the_page_names_tests_that_are_there():
    text = PAGE.read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for path, name in named:
        body = ast.parse((ROOT / path).read_text()).body
        assert name in {getattr(one, "name", "") for one in body}, f"{path}::{name}"
    # Each line of a table that says what cannot be done names one.
    _, *sections = text.partition("## What is not trusted")[2].split("| it cannot |")
    lines = [line for part in sections for line in part.splitlines() if line[:1] == "|"]
    lines = [line for line in lines if line not in ("| test |", "|---|---|")]
    assert len(lines) > 25
    for line in lines:
        assert re.search(r"\| `tests/\S+::test_\w+` \|$", line), line


def evaluated(run, out):
    tree = config.read(str(ROOT / "configs/knn.py"))
    tree.run = str(run)
    evaluate.run(tree, out)


def compared(run, out):
    tree = config.read(str(ROOT / "configs/compare.py"))
    tree.runs = (str(run),)
    compare.run(tree, out)


def begun_with(run, out):
    tree = config.read(str(ROOT / "configs/linear_probe.py:digits"))
    tree.init_from.run = str(run)
    train.run(tree, out)


def begun_in(run, out):
    begun_with(OLD, run)


def resumed(run, out):
    tree = config.load(OLD / "config.json")
    tree.compile_cache, tree.batch_size = False, 8
    train.run(tree, run)


READERS = {
    "evaluate": evaluated,
    "compare": compared,
    "begin with": begun_with,
    "begin in": begun_in,
    "resume": resumed,
    "load": lambda run, out: loading.load(run),
    "load_encoder": lambda run, out: mim_jax.load_encoder(run),
    "export": lambda run, out: native.export(run, out / "x.safetensors"),
    "adopt": lambda run, out: warmstart.rundir.read_config(run, "init_from"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["config.json", "checkpoints", "report", "lock"])
def test_no_reader_follows_a_link_out_of_a_run(tmp_path, reader, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(OLD, run)
    outside.mkdir()
    if (run / name).exists():
        (run / name).rename(outside / name)
    else:
        (outside / name).write_text("theirs")
    (run / name).symlink_to(outside / name)
    before = audit.content(tmp_path)
    with pytest.raises(config.ConfigError, match=f"run/{name} is a link to .*, out of"):
        READERS[reader](run, tmp_path / "out")
    assert audit.content(tmp_path) == before


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_at_a_pipe(tmp_path, reader):
    run = shutil.copytree(OLD, tmp_path / "run")
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    with pytest.raises(config.ConfigError, match="is neither a file nor a folder"):
        READERS[reader](run, tmp_path / "out")


def test_the_audit_sees_what_is_written_and_run(tmp_path):
    for name in ("run", "out", "outside"):
        (tmp_path / name).mkdir()
    run, out, outside = (tmp_path / name for name in ("run", "out", "outside"))
    with audit.only_reads(run, out):
        (out / "file").write_text("x")
        (tmp_path / "run").exists()
    for act in (
        lambda: (outside / "file").write_text("x"),
        lambda: (outside / "folder").mkdir(),
        lambda: (outside / "file").rename(out / "moved"),
        lambda: (run / "file").write_text("x"),
        lambda: exec(compile("1", str(run / "x.py"), "exec")),
    ):
        with pytest.raises(AssertionError):
            with audit.only_reads(run, out):
                act()


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found |= {tag, *(name for name, _ in attributes)}


def shown(odd: str) -> Shown:
    """A gallery in which every text is somebody else's."""
    images = np.zeros((1, 8, 8, 1), np.float32)
    return Shown(
        masked_as=odd,
        original=images,
        hidden=np.ones((1, 8, 8), bool),
        records=np.array([3]),
        classes=(odd,),
        filled={odd: images},
        psnr={odd: np.array([1.0])},
        helped=(odd,),
        reasons={odd: odd},
    )


def test_a_name_is_no_tag_of_the_compare_page(tmp_path):
    odd = "<script>x</script><img src=x onerror='x'>&\"'<!--TABLE-->"
    (tmp_path / "config.json").write_text(json.dumps({"job": "train", odd: odd}))
    (tmp_path / "summary.txt").write_text(f"command     {odd}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"job": "train"}))
    training = config.build(config.read(str(ROOT / "configs/mae.py:digits")))
    run = Run(objective=training.objective, params={}, initial={}, step=1, name=odd)
    one = Loaded(tmp_path, run, training)
    other = Loaded(tmp_path / "other", run, training)
    report = Report(numbers={"accuracy_model_k10": Number(0.5, odd)})
    lines = {odd: losses.logged(tmp_path)}
    parts = [
        table.table({odd: one}, {"knn": KNN()}, {"knn": {odd: report}}),
        sections.section("knn", KNN(), {odd: report}, {}, {odd: odd}),
        origins.differences({odd: one, "b": other}),
        losses.section(lines, losses.curves({odd: one}, lines)),
        origins.commands({odd: one}),
        sections.gallery(shown(odd), alike=False),
    ]
    assert all(html.escape(odd) in part for part in parts)
    text = "\n".join(parts)
    usual = {"thead", "tbody", "tr", "th", "td", "small", "p", "ul", "li", "b", "div"}
    usual |= {"table", "h2", "h3", "dl", "dt", "dd", "pre", "img", "alt", "src"}
    usual |= {"id", "class", "scope", "data-better", "data-value"}
    usual |= {"tabindex", "role", "aria-label"}
    assert Tags(text).found <= usual and "<!--" not in text
