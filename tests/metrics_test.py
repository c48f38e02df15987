# SPDX-License-Identifier: Apache-2.0
"""What a resumed run writes continues what the killed one wrote."""

import itertools
import json
import math
import os
import resource
import time

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from mim_jax.run.log import Log, MetricsError, Progress, Window, Writer, read_rows


def write(workdir, steps, start=0, **log):
    writer = Writer(workdir, Log(**log), start)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "images_per_second": 8.0})
    writer.close()


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def events(workdir):
    """All TensorBoard events, file after file, by the record format itself."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def shown(workdir):
    """(step, tag) -> value as TensorBoard shows them: a restart purges later steps."""
    found = {}
    for event in events(workdir):
        if event.session_log.status == event_pb2.SessionLog.START:
            found = {key: v for key, v in found.items() if key[0] < event.step}
        for value in event.summary.value:
            assert (event.step, value.tag) not in found
            found[event.step, value.tag] = value.simple_value
    return found


def test_lines_are_objects_with_their_step(tmp_path):
    write(tmp_path, [1, 2])
    assert lines(tmp_path)[1] == {"step": 2, "loss": 0.5, "images_per_second": 8.0}


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0\0\0\n", b"[3]\n", b""])
def test_torn_lines_and_lines_after_the_checkpoint_are_dropped(tmp_path, torn):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    write(tmp_path, [3, 4], start=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


HOSTILE = [
    b"garbage",
    b"\0\0\0",
    b"[3]",
    b"{}",
    b'{"step": "3"}',
    b'{"step": true}',
    b'{"step": 3.0}',
    b'{"step": 3, "loss": "low"}',
    b'{"step": 3, "loss": [1]}',
    b'{"step": 1%s}' % (b"0" * 400),
    b'{"step": 3, "loss": -1.7e308}',
    b'{"step": 3, "loss": 1%s}' % (b"0" * 400),
    b"[" * 100_000,
]


@pytest.mark.parametrize("bad", HOSTILE, ids=lambda bad: repr(bad[:20]))
def test_a_damaged_line_is_told_by_its_number_and_kept_aside(tmp_path, bad, capfd):
    write(tmp_path, [1, 2, 3, 4])
    path = tmp_path / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, bad + b"\n", *rest]))
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    told = f"WARNING: {path}: damaged and left out: line 2\n"
    assert capfd.readouterr().err == told
    write(tmp_path, [4], start=3)
    assert capfd.readouterr().err == told
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == bad + b"\n"
    read_rows(path)
    assert capfd.readouterr().err == ""


def test_all_damaged_lines_are_numbered_or_counted(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_bytes(b"x\n" * 20 + b'{"step": 1}\n{"st')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert capfd.readouterr().err.endswith("line 1, 2, 3, 4, 5, 6, 7, 8 and others\n")


@pytest.mark.parametrize(
    "logged, told", [(3, ""), (4, "no row after step 3, and step 4")]
)
def test_rows_that_are_lost_are_told(tmp_path, logged, told, capfd):
    write(tmp_path, [1, 2, 3])
    Writer(tmp_path, Log(tensorboard=False), 4, logged).close()
    assert told in capfd.readouterr().err and bool(told) == (logged == 4)
    (tmp_path / "metrics.jsonl").write_text("")
    Writer(tmp_path, Log(tensorboard=False), 4, logged).close()
    expected = f"has no row after step 0, and step {logged} was logged: rows are lost"
    assert expected in capfd.readouterr().err


def test_a_torn_line_that_lacks_only_its_end_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [3], start=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("start", [0, 2])
def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path, start):
    write(tmp_path, [1, 2, 3])
    time.sleep(1.1)  # event files are named by the second
    write(tmp_path, range(start + 1, 5), start=start)
    steps = [step for step, tag in shown(tmp_path) if tag == "loss"]
    assert sorted(steps) == [1, 2, 3, 4]
    assert shown(tmp_path)[4, "loss"] == pytest.approx(0.25)


def test_a_line_that_the_disk_does_not_take_is_told(tmp_path):
    writer = Writer(tmp_path, Log(tensorboard=False), 0)
    writer.write(1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(MetricsError, match="step 2: .*metrics.jsonl could not be"):
            writer.write(2, {"loss": 1.0, "text": "x" * 64})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write(tmp_path, [2], start=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_full_disk_ends_tensorboard_too_by_one_error(tmp_path):
    writer = Writer(tmp_path, Log(), 0)
    writer.write(1, {"loss": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # More numbers than any queue would hold: nothing may wait for ever, either.
    many = {f"x{number}": 1.0 for number in range(200)}
    limit = file.stat().st_size + 100
    writer._file.close()
    writer._file = open(os.devnull, "ab")  # the rows themselves would fit
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(MetricsError, match="step 2: .*tfevents.* could not be wri"):
            writer.write(2, many)
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_processes_of_one_second_share_no_events(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write(tmp_path, [1, 2])
    write(tmp_path, [3], start=2)
    assert sorted(step for step, _ in shown(tmp_path)) == [1, 1, 2, 2, 3, 3]


def test_without_tensorboard_there_is_no_folder(tmp_path):
    write(tmp_path, [1], tensorboard=False)
    assert not (tmp_path / "tensorboard").exists()


def test_window_means_survive_a_save_exactly():
    values = [0.1, 0.2, 0.3, 1e-9, 7.0]
    straight, first = Window(), Window()
    for value in values:
        straight.add({"loss": value})
    for value in values[:2]:
        first.add({"loss": value})
    second = Window(json.loads(json.dumps(first.saved())))
    for value in values[2:]:
        second.add({"loss": value})
    assert second.take() == straight.take() == {"loss": sum(values) / 5}
    second.add({"loss": 4.0})
    assert second.take() == {"loss": 4.0}


def test_a_name_that_an_old_window_lacks_waits_for_the_next_one():
    window = Window({"sums": {"loss": 3.0}, "steps": 2})  # saved by an older program
    window.add({"loss": 3.0, "grad_norm": 8.0})
    assert window.take() == {"loss": 2.0}
    window.add({"loss": 1.0, "grad_norm": 8.0})
    assert window.take() == {"loss": 1.0, "grad_norm": 8.0}


def test_what_is_not_finite_is_null_and_no_scalar(tmp_path):
    writer = Writer(tmp_path, Log(), 0)
    writer.write(1, {"a/psnr": math.inf, "a/ssim": math.nan, "a/mse": 0.5})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = lines(tmp_path)
    assert line == {"step": 1, "a/psnr": None, "a/ssim": None, "a/mse": 0.5}
    assert shown(tmp_path) == {(1, "a/mse"): 0.5}


@pytest.mark.parametrize("mode, stream", [("lines", 0), ("bar", 0), ("none", None)])
def test_a_line_of_text_is_shown_where_progress_is(capfd, mode, stream):
    progress = Progress(mode, 0, 10)
    progress.say("step 4/10  knn, 1.0 s: 91.2%")
    progress.close()
    told = capfd.readouterr()
    assert ("91.2%" in told.out) == (stream == 0)
    assert "91.2%" not in told.err


def test_plain_lines_name_step_loss_and_speed(capsys):
    progress = Progress("auto", 2, 10)  # pytest's output is no terminal
    progress.advance(3)
    progress.show(3, {"loss": math.pi, "images_per_second": 12.3})
    progress.close()
    line = capsys.readouterr().out
    assert line.startswith("step 3/10  loss 3.1416  12 images/s  ")
    assert line.endswith(" left\n") and line.count("\n") == 1


def test_the_time_left_does_not_count_the_compiler(capsys, monkeypatch):
    clock = itertools.chain([0.0], [100.0] * 2, [101.0], [109.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress("lines", 0, 110)
    for step in (1, 2, 10):
        progress.advance(step)
        progress.show(step, {"loss": 1.0, "images_per_second": 1.0})
    lefts = [line.split()[-2] for line in capsys.readouterr().out.splitlines()]
    assert lefts == ["3:01:40", "01:48", "01:40"]  # 109 x 100 s; then 1 s a step


def test_none_shows_nothing(capfd):
    progress = Progress("none", 0, 10)
    progress.advance(1)
    progress.show(1, {"loss": 1.0, "images_per_second": 1.0})
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_bar_starts_at_the_resumed_step(capfd):
    progress = Progress("bar", 4, 10)
    progress.advance(5)
    progress.show(5, {"loss": 0.5, "images_per_second": 8.0})
    progress.close()
    out, err = capfd.readouterr()
    assert (
        out == "" and "| 4/10 [" in err and "| 5/10 [" in err and "loss 0.5000" in err
    )


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="every=0"):
        Log(every=0)
    with pytest.raises(ValueError, match="known: auto, bar, lines, none"):
        Log(progress="loud")
