# SPDX-License-Identifier: Apache-2.0
"""The curves of a run are those of its metrics.jsonl, whatever befell the file."""

import json

from PIL import Image

from mim_jax.run import curves
from mim_jax.run.log import Log, Writer, read_rows


def write(workdir, steps, start=0):
    """Rows of training at some steps, each with one of evaluations behind it."""
    writer = Writer(workdir, Log(tensorboard=False), start)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "epoch": step / 9, "replaced": 0})
        accuracy = {"model": step * 0.1, "untrained": step * 0.05}
        values = {f"knn/accuracy_{name}_k10": v for name, v in accuracy.items()}
        writer.write(step, {"evaluation_seconds": 2.5, "knn/images": 355} | values)
    writer.close()
    return workdir / "metrics.jsonl"


def drawn(path):
    """(title, label) -> points, read from the axes of the picture."""
    axes = curves.grouped(curves.lines_of(read_rows(path)))
    return {
        (axis.get_title(), line.get_label()): line.get_xydata().tolist()
        for axis in curves.draw(axes).axes
        for line in axis.lines
    }


def test_names_with_dollars_are_no_formulas(tmp_path):
    row = {"step": 1, "$x^$": 1.0, "knn/a_$x^$_k1": 1.0, "knn/a_$y^$_k1": 1.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row) + "\n")
    curves.write(path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 100


def test_a_resumed_run_shows_all_of_it_and_damaged_lines_are_left_out(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    path = write(tmp_path, [3, 4, 5], start=2)  # killed after step 2 was saved
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [b'{"step": 9, "lo\n', b"\0\0\n", b"[9]\n", b'{"loss": 7}\n', b"\xff\n"]
    path.write_bytes(b"".join([*damaged, *lines, b'{"step": 9, "loss": 1}']))
    found = drawn(path)
    loss = [points for (title, _), points in found.items() if title == "loss"]
    assert loss == [[[s, 1 / s] for s in (1, 2, 3, 4, 5)]]
    for label, factor in (("model", 0.1), ("untrained", 0.05)):
        points = found["knn: accuracy k10", label]
        assert points == [[s, s * factor] for s in (1, 2, 3, 4, 5)]
    # An epoch is the step again, and these counts never change.
    titles = [title for title, _ in found]
    accuracies = 2 * ["knn: accuracy k10"]
    assert titles == ["loss", "evaluation_seconds", *accuracies]


def test_of_a_step_that_stands_twice_the_later_row_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(4, 1.0), (2, 3.0), (4, 2.0), (6, float("nan")), (8, None)]
    lines = [json.dumps({"step": s, "loss": v}) + "\n" for s, v in rows]
    path.write_text("".join(lines))
    (points,) = drawn(path).values()
    assert points == [[2, 3.0], [4, 2.0]]


def test_the_picture_is_a_png_and_an_empty_log_has_none(tmp_path):
    picture = tmp_path / "curves.png"
    curves.write(tmp_path / "metrics.jsonl", picture)
    (tmp_path / "metrics.jsonl").write_text("torn")
    curves.write(tmp_path / "metrics.jsonl", picture)
    assert not picture.exists()
    curves.write(write(tmp_path, [1, 2]), picture)
    with Image.open(picture) as found:
        assert found.format == "PNG" and min(found.size) > 100
