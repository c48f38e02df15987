# SPDX-License-Identifier: Apache-2.0
"""A run whose records cannot be read counts and names them, and gives up so that it can
go on."""

import numpy as np
import pytest
import spikes_test
from records import Numbered
from spikes_test import ROWS, SEED, STEPS, Noise, found, rows, run, trained

from mim_jax import config
from mim_jax.data.fields import DataError, ExampleError
from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.run.replaced import Replaced

# Runs of a small objective, whose step is compiled once.
tables, quick = spikes_test.tables, spikes_test.quick


# Counting and naming.


def counter(workdir, limit=0.01, extra=None, count=100, bad=()) -> Replaced:
    source = Numbered(count=count, bad=tuple(bad))
    data = Input(source=source, image_size=(4, 4), max_replaced=limit)
    return Replaced(workdir, data, extra or {})


def note(counter: Replaced, *indices: int, fine: int = 0) -> None:
    flags = [True] * len(indices) + [False] * fine
    numbers = [*indices, *range(50, 50 + fine)]
    counter.note(np.array(numbers, np.int32), np.array(flags, bool))


def test_each_record_is_named_once_with_the_reason_and_counted_each_time(
    tmp_path, capfd
):
    seen = counter(tmp_path, bad=(3, 7))
    note(seen, 3, 7, fine=2)
    note(seen, 3, fine=3)
    assert seen.total() == 3
    written = (tmp_path / "unreadable-host0.txt").read_text()
    assert written == "3\tNumbered[3]\n7\tNumbered[7]\n"
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith(
        "WARNING: another image replaces Numbered[3] ("
    )
    # A process that goes on counts on, and does not repeat the names.
    again = counter(tmp_path, extra=seen.saved(), bad=(3, 7))
    note(again, 3, 9)
    assert again.total() == 5
    written = (tmp_path / "unreadable-host0.txt").read_text()
    assert [line.split("\t")[0] for line in written.splitlines()] == ["3", "7", "9"]
    assert "Numbered[9] (it can be read again)" in capfd.readouterr().err


def test_lines_of_somebody_else_are_no_numbers(tmp_path):
    path = tmp_path / "unreadable-host0.txt"
    path.write_text("9" * 5000 + "\tendless\n\n\t\n-3\tx\n")
    note(counter(tmp_path, bad=(3,)), 3)
    assert path.read_text().endswith("-3\tx\n3\tNumbered[3]\n")


def test_the_screen_shows_eight_and_the_file_all(tmp_path, capfd):
    seen = counter(tmp_path, bad=range(20))
    note(seen, *range(20))
    assert capfd.readouterr().err.count("WARNING") == 8
    lines = (tmp_path / "unreadable-host0.txt").read_text().splitlines()
    assert len(lines) == 20


@pytest.mark.parametrize(
    "replaced, images, limit, ends",
    [
        (0, 0, 0.0, False),
        (1, 8, 0.01, False),  # one of the 100 of an epoch, though of 8 images
        (2, 8, 0.01, True),
        (3, 300, 0.01, False),
        (4, 300, 0.01, True),
        (1, 10**6, 0.0, True),
        (100, 100, 1.0, False),
    ],
)
def test_the_limit_is_a_share_of_the_images_seen_or_of_an_epoch(
    tmp_path, replaced, images, limit, ends
):
    assert (counter(tmp_path, limit).check(replaced, images) is not None) == ends


def test_the_message_names_files_bound_and_remedy(tmp_path):
    seen = counter(tmp_path, bad=(3, 7))
    note(seen, 3, 7)
    error = seen.check(2, 100)
    assert isinstance(error, DataError) and error.everywhere
    said = str(error)
    assert said.startswith(
        "2 of 100 images (2.00%) could not be read, more than config.data.max_replaced="
        "1.00%: Numbered[3] ("
    )
    assert "Numbered[7] (" in said and "unreadable-host*.txt" in said


def test_a_run_that_gave_up_counts_from_there(tmp_path):
    seen = counter(tmp_path)
    assert seen.check(2, 100) is not None
    again = counter(tmp_path, extra={**seen.saved(), "replaced": 2})
    assert again.check(3, 200) is None  # 1 of 100
    assert again.check(4, 200) is not None


# Runs.


@pytest.fixture
def broken(monkeypatch):
    """A set of records that cannot be read."""
    records: set[int] = set()
    read = Noise.__getitem__

    def fails(self, index):
        if index in records and self.split == "train":
            raise FileNotFoundError(2, "No such file", f"{index}.png")
        return read(self, index)

    monkeypatch.setattr(Noise, "__getitem__", fails)
    return records


def order() -> list[int]:
    data = config.build(spikes_test.tree_of("log")).data
    with train_batches(data, seed=SEED, batch_size=ROWS, stop=STEPS) as batches:
        return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_too_many_replaced_records_end_a_run_that_can_go_on(tmp_path, broken, capfd):
    wanted = order()
    broken |= {wanted[2 * ROWS], wanted[5 * ROWS]}  # in batches 2 and 5
    limit = dict(data__max_replaced=1 / 80)  # one of an epoch
    with pytest.raises(DataError, match="2 of 80 images") as caught:
        run(tmp_path / "run", "log", **limit)
    assert caught.value.everywhere
    for index in broken:
        assert f"Noise[{index}] (FileNotFoundError: " in str(caught.value)
    # Step 6 was known to be too much when step 7 ran: that one is saved.
    _, extra = found(tmp_path / "run", 7)
    assert extra["replaced"] == 2
    # The same command goes on; it would give up after as many again.
    run(tmp_path / "run", "log", **limit, stop_after=9)
    broken.clear()
    run(tmp_path / "run", "log", **limit)
    assert found(tmp_path / "run")[1]["replaced"] == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(1, STEPS + 1)]
    assert [row["replaced"] for row in rows(tmp_path / "run")][:6] == [0, 0, 1, 1, 1, 2]


def test_a_raised_limit_is_no_other_config(tmp_path, broken):
    wanted = order()
    broken |= {next(index for index in wanted if wanted.count(index) == 2)}
    with pytest.raises(DataError):
        run(tmp_path / "run", "log", data__max_replaced=0.0)
    run(tmp_path / "run", "log", data__max_replaced=0.5)
    assert found(tmp_path / "run")[1]["replaced"] == 2  # once in each epoch


@pytest.mark.parametrize("fault", [FileNotFoundError(2, "gone"), KeyError("label")])
def test_a_batch_that_cannot_be_read_costs_nothing(tmp_path, monkeypatch, fault):
    """All records are gone from some point on; or a source's own code fails."""
    calls, read = [0], Noise.__getitem__

    def fails(self, index):
        calls[0] += self.split == "train"
        if calls[0] > 1 + 6 * ROWS and self.split == "train":  # the trial reads one
            raise fault
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "__getitem__", fails)
        kind = DataError if isinstance(fault, OSError) else ExampleError
        with pytest.raises(kind) as caught:
            run(tmp_path / "run", "log", checkpoint__every=99)
    if kind is DataError:
        assert "Noise[" in str(caught.value) and "gone" in str(caught.value)
        assert not caught.value.everywhere
    # Grain may tell of it before it gives the batches that were read.
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 1 <= step <= 6
    assert found(tmp_path / "run", step)[0] == trained(range(step), stop=step)
    run(tmp_path / "run", "log", checkpoint__every=99)
    assert found(tmp_path / "run")[0] == trained(range(STEPS))


def test_another_data_set_is_read_only_if_that_is_accepted(tmp_path, monkeypatch):
    run(tmp_path / "run", "log", stop_after=2)
    mark = {"split": "train", "files": 79}
    monkeypatch.setattr(Noise, "fingerprint", lambda self: mark | {"of": self.split})
    with pytest.raises(config.ConfigError, match="or --config.on_change=accept to go"):
        run(tmp_path / "run", "log")
    run(tmp_path / "run", "log", on_change="accept")
    assert found(tmp_path / "run")[1]["data"]["files"] == 79
