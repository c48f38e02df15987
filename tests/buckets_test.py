# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket do what runs in a directory do, and what may go wrong with a bucket
is said in a line. The server is one of this machine (`bucket_server`)."""

import gc
import itertools
import logging
import os
import pathlib
import pickle
import re
import socket
import struct
import threading
import time

import bucket_server
import during_test
import fsspec
import jax
import numpy as np
import pytest
import tiny
from during_test import STEPS, compiled, split, state_of, tree_of  # noqa: F401
from main_test import left
from safetensors.numpy import load_file
from tensorboardX.proto import event_pb2

from mim_jax import compare, config, evaluate, load_encoder
from mim_jax.aot import doctor
from mim_jax.data.sources.folder import Folder
from mim_jax.data.sources.tfds import Tfds
from mim_jax.interop import native
from mim_jax.run import buckets, files, lease, rundir, storage
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.log import read_rows
from mim_jax.run.parts import read_parts
from mim_jax.schema import ConfigError, DiskError

JPEGS = pathlib.Path(__file__).parent / "data" / "jpegs"
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server():
    for name in ("gcp_storage_emulator", "api.object", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with bucket_server.Server() as found, pytest.MonkeyPatch.context() as patch:
        found.make("runs")
        patch.setenv("STORAGE_EMULATOR_HOST", found.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", found.url)
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", found.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # of tensorstore
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        buckets.client.cache_clear()
        patch.setattr(buckets, "LATER", 5.0)
        yield found
        assert found.errors == []
        buckets.client().close()
        buckets.client.cache_clear()


@pytest.fixture
def folder(server):
    """A folder of its own for each test."""
    yield files.place(f"gs://runs/{next(NUMBERS)}")
    server.fault = lambda method, path: None


def test_files_are_those_of_a_directory(folder, tmp_path):
    for here in (folder, tmp_path / "run"):
        files.make(here, parents=True)
        assert not files.exists(here / "a") and files.names(here / "a") == []
        with pytest.raises(FileNotFoundError):
            files.read(here / "a")
        files.write(here / "a", "1\r\n\0\xff")
        files.write(here / "a", b"2\r\n\0\xff\n")
        assert files.read(here / "a") == b"2\r\n\0\xff\n"
        for name in ("b/a", "b/seal", "b/c/a", "bb"):
            files.make((here / name).parent, parents=True)
            files.write(here / name, name)
        assert sorted(files.names(here)) == ["a", "b", "bb"]
        assert sorted(files.names(here / "b")) == ["a", "c", "seal"]
        assert files.exists(here / "b") and files.exists(here / "b" / "c" / "a")
        assert not files.exists(here / "b" / "c" / "a" / "x")
        for _ in range(2):  # the second time instead of what lies there
            files.make(here / "b" / "c", parents=True)
            files.write(here / "b" / "c" / "a", "new")
            files.move(here / "b", here / "aside" / "b", "seal")
            assert sorted(files.names(here)) == ["a", "aside", "bb"]
            assert files.read(here / "aside" / "b" / "c" / "a") == b"new"
        assert files.names(here / "aside" / "b") == ["c"]
        files.remove(here / "aside", "seal")
        assert sorted(files.names(here)) == ["a", "bb"]
        for text in (b"x\n", b"y\n"):
            with files.append(here / "log") as file:
                file.write(text)
                file.seek(0)
                assert file.read().endswith(text)
                file.write(b"z\n")
        assert files.read(here / "log") == b"x\nz\ny\nz\n"


def test_a_name_that_is_no_place_is_refused(monkeypatch):
    for name in ("gs://", "gs://runs", "gs://runs/"):
        with pytest.raises(
            ConfigError, match="want a folder in a bucket, gs://BUCKET/"
        ):
            files.place(name)
    for name in ("s3://runs/a", "http://runs/a"):
        with pytest.raises(
            ConfigError, match="want a directory, or gs://BUCKET/FOLDER"
        ):
            files.place(name)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    assert files.place("runs/a") == files.pathlib.Path("runs/a")
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        files.place("gs://runs/a")


def test_the_program_says_so_in_a_line(monkeypatch, capfd):
    assert left(monkeypatch, ["--workdir=gs://runs"], [ValueError()]) == 2
    assert capfd.readouterr().err == (
        "error: gs://runs: want a folder in a bucket, gs://BUCKET/FOLDER\n"
    )


# A file that grows.


def test_a_file_that_grows_is_written_when_that_is_due(folder, monkeypatch):
    now = 100.0
    monkeypatch.setattr(buckets.time, "monotonic", lambda: now)
    with files.append(folder / "log") as file:
        for minute, there in ((0, b"0"), (0.9, b"0"), (1, b"00.91"), (1.5, b"00.91")):
            now = 100 + 60 * minute
            file.write(str(minute).encode())
            files.flush(file)
            assert files.read(folder / "log") == there
        files.sync(file)
        assert files.read(folder / "log") == b"00.911.5"
        file.write(bytes(3 * 2**20))  # a large one less often
        files.sync(file)
        file.write(b"end")
        now += 179
        files.flush(file)
        assert not files.read(folder / "log").endswith(b"end")
        now += 2
        files.flush(file)
        assert files.read(folder / "log").endswith(b"end")


def test_what_another_process_wrote_is_not_overwritten(folder):
    ours = files.append(folder / "log")
    ours.write(b"ours")
    files.sync(ours)
    files.write(folder / "log", b"theirs")
    ours.write(b"more")
    for end in (ours.sync, ours.close):
        with pytest.raises(DiskError, match="log: another process has written it mean"):
            end()
    assert files.read(folder / "log") == b"theirs" and ours.closed


# The lock.


def locked_by(folder, owner: str, about: str) -> None:
    files.write(folder / "lock", f"{owner}\n{about}\n")


def test_a_run_in_use_is_refused_and_free_afterwards(folder, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED", 0.1)
    monkeypatch.setattr(lease, "_EXPIRED", 60.0)
    with rundir.claim(folder, "train") as claim:
        claim.check()
        with pytest.raises(rundir.InUseError) as caught, rundir.claim(folder, "train"):
            pass
        me = f"{socket.gethostname()} pid {os.getpid()}"
        assert str(caught.value) == (
            f"workdir='{folder}' is in use by {me}: want one run per directory"
        )
        claim.check()  # which the other one did not touch
    assert not files.exists(folder / "lock")
    with rundir.claim(folder, "train"):
        pass


def test_of_several_that_start_at_once_one_has_the_lock(folder, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED", 0.1)
    monkeypatch.setattr(lease, "_EXPIRED", 60.0)
    start, done, told = threading.Barrier(4), threading.Event(), []

    def one():
        start.wait()
        try:
            with lease.lease(folder / "lock"):
                told.append("mine")
                done.wait(60)
        except lease.HeldError:
            told.append("held")
        if len(told) == 4:
            done.set()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(told) < 4 and any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["held", "held", "held", "mine"]


def test_the_lock_of_a_killed_process_of_this_machine_is_free(folder, capfd):
    here, pid = lease._processes(), 2**22 + 1  # more than Linux gives
    locked_by(folder, f"here pid {pid}", f"{here} 0")
    with rundir.claim(folder, "train"):
        assert f"pid {pid}" not in files.read(folder / "lock").decode()
    assert capfd.readouterr().err == (
        f"here pid {pid} had the lock of this directory; looking if it still has\n"
    )


def test_a_process_of_another_user_has_not_ended(monkeypatch):
    """Though /proc may hide it, as on machines that many share."""

    def kill(pid, number):
        assert (pid, number) == (2**22 + 1, 0)
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not lease._has_ended(f"here pid {2**22 + 1}\n{lease._processes()} 0")


@pytest.mark.parametrize("about", ["another-machine/pid:[1] 0", ""])
def test_the_lock_of_another_machine_is_free_after_a_while(folder, monkeypatch, about):
    monkeypatch.setattr(lease, "_RENEWED", 0.1)
    monkeypatch.setattr(lease, "_EXPIRED", 0.5)
    locked_by(folder, f"there pid {os.getpid()}", about)
    begun = time.monotonic()
    with rundir.claim(folder, "train"):
        assert time.monotonic() - begun > 0.5


def test_a_run_that_lost_its_lock_saves_nothing_more(folder, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED", 0.05)
    with rundir.claim(folder, "train") as claim:
        locked_by(folder, "there pid 1", "another-machine/pid:[1] 0")
        time.sleep(0.2)  # in which it would be renewed
        with pytest.raises(
            DiskError, match="belongs to there pid 1: it was moved or d"
        ):
            claim.check()
    assert files.read(folder / "lock").startswith(b"there pid 1\n")


def test_a_write_whose_answer_was_lost_counts(folder):
    blob = buckets.blob_of(folder / "lock", buckets.client())
    assert buckets.put(blob, b"mine", 0) == buckets.put(blob, b"mine", 0)
    with pytest.raises(buckets.ChangedError):
        buckets.put(blob, b"other", 0)


# Faults of a bucket.


@pytest.mark.parametrize(
    "status, told",
    [
        (401, "no credentials that are valid; want a service account of this machine"),
        (403, "not allowed; want the role Storage Object User"),
        (404, "not there; want an existing bucket: is it 'runs'?"),
    ],
)
def test_what_a_user_has_to_mend_is_said_before_anything_is_made(
    folder, server, status, told
):
    server.fault = lambda method, path: status
    for use in (
        lambda: files.check(folder),
        lambda: rundir.read_config(folder, "run"),
        lambda: rundir.claim(folder, "train").__enter__(),
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(caught.value).startswith(f"{folder}: {told}")
        assert "\n" not in str(caught.value)


def test_a_bucket_that_may_only_be_read_is_refused(folder, server):
    server.fault = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(
        ConfigError, match="lock: not allowed; want the role Storage Ob"
    ):
        with rundir.claim(folder, "train"):
            pass


def test_a_bucket_that_does_not_exist_is_not_made(server):
    there = files.place("gs://runns/a")
    with pytest.raises(ConfigError, match="want an existing bucket: is it 'runns'?"):
        with rundir.claim(there, "train"):
            pass
    assert server.storage.get_bucket("runns") is None


def test_without_credentials_it_says_where_they_come_from(folder, monkeypatch):
    from google.auth import exceptions
    from google.cloud import storage as google

    def refuse():
        raise exceptions.DefaultCredentialsError("none were found.")

    monkeypatch.setattr(google, "Client", refuse)
    buckets.client.cache_clear()
    with pytest.raises(ConfigError, match="no credentials that .*(none were found.)"):
        files.check(folder)


# The library leaves the connection of a download that was refused to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket_that_does_not_answer_is_another_error(folder, server, monkeypatch):
    files.write(folder / "a", b"")
    monkeypatch.setattr(buckets, "FIRST", 0.01)
    monkeypatch.setattr(buckets, "LATER", 0.01)
    server.fault = lambda method, path: 503
    told = "does not answer as it should"
    for use in (
        lambda: files.check(folder),
        lambda: files.read(folder / "a"),
        lambda: files.exists(folder / "a"),
        lambda: files.names(folder),
        lambda: files.write(folder / "a", b"b"),
        lambda: files.append(folder / "a"),
        lambda: files.remove(folder, "a"),
        lambda: files.move(folder, folder / "b", "a"),
        lambda: rundir.claim(folder, "train").__enter__(),
        lambda: storage.read_record(folder, 1),
    ):
        with pytest.raises(DiskError, match=told):
            use()
    gc.collect()


# Checkpoints.


def test_a_number_without_a_seal_is_no_checkpoint(folder, tmp_path):
    for name in ("2", "4"):
        files.write(folder / name / "state" / "d", b"")
        (tmp_path / name).mkdir()  # of an older Orbax, which wrote no seal there
    files.write(folder / "2" / "commit_success.txt", b"")
    assert storage.steps_on_disk(folder) == [2]
    assert storage.steps_on_disk(tmp_path) == [2, 4]
    for here, kept in ((folder, ["2"]), (tmp_path, ["2", "4"])):
        storage.remove_unfinished(here)
        assert sorted(files.names(here)) == kept
    assert storage.steps_on_disk(folder / "none") == []


@pytest.mark.parametrize("end", [storage.delete, storage.move])
def test_a_checkpoint_that_goes_loses_its_seal_first(folder, server, end):
    for name in ("a", "commit_success.txt", "z"):
        files.write(folder / "2" / name, b"")
    gone = []

    def fault(method, path):
        if method == "DELETE":
            gone.append(path.partition("?")[0].rpartition("%2F")[2])

    server.fault = fault
    end(folder, 2, *([folder / "aside" / "2"] if end is storage.move else []))
    assert gone[0] == "commit_success.txt" and sorted(gone[1:]) == ["a", "z"]
    assert files.names(folder / "2") == []
    aside = ["a", "commit_success.txt", "z"] if end is storage.move else []
    assert files.names(folder / "aside" / "2") == aside


# Whole runs.


@pytest.fixture(scope="module")
def twin(compiled, tmp_path_factory):  # noqa: F811
    """A run in a directory, in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "twin"
    during_test.run(workdir)
    return workdir


@pytest.fixture(scope="module")
def whole(server, compiled, twin):  # noqa: F811
    """The same run in a bucket, killed in the save of step 6 and started again, and the
    last row that was in the bucket when a checkpoint began, by its step."""
    workdir, rows = files.place("gs://runs/whole/a"), {}
    save = Checkpointer.save

    def looking(self, step, *rest):
        rows[step] = read_rows(workdir / "metrics.jsonl")[-1]["step"]
        save(self, step, *rest)

    # The role that docs/pods.md names may not ask for the bucket itself.
    server.fault = lambda method, path: 403 if path.endswith("/b/runs") else None
    tree = tree_of(stop_after=4)
    tree.log.tensorboard, tree.profile = True, "2:1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", looking)
        during_test.run(workdir, tree)
    checkpoints = workdir / "checkpoints"
    buckets.copy(checkpoints / "4", checkpoints / "6")
    files.remove(checkpoints / "6" / "about", "")
    buckets.blob_of(checkpoints / "6" / "commit_success.txt", buckets.client()).delete()
    locked_by(workdir, f"here pid {2**22 + 1}", f"{lease._processes()} 0")
    row = b'{"step": 5, "loss": 1.0}\n'
    files.write(workdir / "metrics.jsonl", files.read(workdir / "metrics.jsonl") + row)
    tree = tree_of()
    tree.log.tensorboard = True
    during_test.run(workdir, tree)
    server.fault = lambda method, path: None
    return workdir, rows


@pytest.fixture(scope="module")
def resumed(whole):
    return whole[0]


def test_rows_are_there_before_the_checkpoint_is(whole):
    assert whole[1] == {2: 2, 4: 4}


def test_a_resumed_run_is_the_run_in_a_directory_to_the_bit(resumed, twin):
    assert state_of(resumed) == state_of(twin) and split(resumed) == split(twin)
    assert storage.steps_on_disk(resumed / "checkpoints") == [2, 4, 6]


def test_it_has_the_same_files(resumed, twin, server):
    prefix = "whole/a/"
    ours = [name.removeprefix(prefix) for name in server.names("runs", prefix)]
    theirs = [str(p.relative_to(twin)) for p in twin.rglob("*") if p.is_file()]
    apart = ("checkpoints/", "tensorboard/", "profile/")
    ours, extra = [
        {name for name in ours if name.startswith(apart) == there}
        for there in (False, True)
    ]
    assert ours | {"lock"} == {n for n in theirs if not n.startswith(apart)}
    assert any(name.endswith(".xplane.pb") for name in extra)


def test_tensorboard_sees_the_numbers(resumed):
    found = {}
    for name in files.names(resumed / "tensorboard"):
        data = files.read(resumed / "tensorboard" / name)
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {
                (value.tag, event.step): value.simple_value
                for value in event.summary.value
            }
    (rows, _) = split(resumed)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert found["loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)


def test_another_config_is_refused(resumed):
    tree = tree_of()
    tree.seed = 7
    with pytest.raises(ConfigError, match="config.seed: 0 -> 7"):
        during_test.run(resumed, tree)


def measured(tree, workdir) -> dict:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        {"eval": evaluate, "compare": compare}[tree.job].run(tree, workdir)
    return files.read_json(workdir / "results.json")


def test_it_is_evaluated_like_one_in_a_directory(resumed, twin, folder):
    tree = config.read("configs/knn.py")
    tree.run, tree.also = str(resumed), (str(twin),)
    tree.eval.update(dict(k=(10,), rows=1, neighbours=1))
    found = measured(tree, folder)["runs"]
    ours, theirs = (dict(found[f"{name}, step 6"]) for name in ("a", "twin"))
    assert ours.pop("run") == "gs://runs/whole/a" and theirs.pop("run") == str(twin)
    assert ours == theirs
    pictures = [n for n in files.names(folder / "report") if n.endswith(".png")]
    for name in pictures:
        assert files.read(folder / "report" / name).startswith(b"\x89PNG")
    assert pictures


def test_it_is_shown_on_a_page_of_comparisons(resumed, folder):
    tree = config.read("configs/compare.py")
    tree.runs, tree.random = (str(resumed),), False
    tree.skip = ("reconstruction", "knn", "cka", "attention", "tsne")
    assert measured(tree, folder) == {}
    page = files.read(folder / "report" / "index.html").decode()
    assert "a, step 6" in page and "training loss" in page


def test_its_weights_are_read_and_brought_back(resumed, twin, folder, tmp_path):
    ours, theirs = (load_encoder(run) for run in (str(resumed), twin))
    images = np.zeros((2, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(ours.features(images), theirs.features(images))
    native.export(str(resumed), tmp_path / "a.safetensors")
    native.export(twin, tmp_path / "twin.safetensors")
    ours, theirs = (load_file(tmp_path / f"{n}.safetensors") for n in ("a", "twin"))
    assert {k: v.tobytes() for k, v in ours.items()} == {
        k: v.tobytes() for k, v in theirs.items()
    }
    assert native.to_run(tmp_path / "a.safetensors", str(folder)) == STEPS
    _, again = read_parts(str(folder))
    _, before = read_parts(twin)
    assert tiny.bits(again["params"]) == tiny.bits(before["params"])


def test_a_bucket_that_does_not_answer_is_no_damage(resumed, server, monkeypatch):
    """Else a good checkpoint would be set aside."""
    monkeypatch.setattr(buckets, "LATER", 0.01)

    def refuse(*arguments, **options):
        server.fault = lambda method, path: 503
        raise OSError("gone")

    monkeypatch.setattr(storage.ocp.Checkpointer, "restore", refuse)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"step": jax.ShapeDtypeStruct((), "int32", sharding=one)}
    with pytest.raises(DiskError, match="does not answer as it should"):
        storage.read_tree(resumed / "checkpoints", 6, like)
    server.fault = lambda method, path: None


# What libraries write that know no buckets.


def test_what_is_written_elsewhere_is_delivered(folder, tmp_path):
    assert files.scratch(tmp_path) == tmp_path
    files.deliver(tmp_path, tmp_path)
    assert tmp_path.exists()
    written = files.scratch(folder)
    (written / "a").mkdir()
    (written / "a" / "b").write_bytes(b"trace")
    assert files.here(tmp_path / "x", written) == tmp_path / "x"
    files.deliver(written, folder)
    assert not written.exists() and files.read(folder / "a" / "b") == b"trace"
    assert files.here(folder / "a" / "b", tmp_path).read_bytes() == b"trace"


def test_a_doctor_tries_the_bucket_and_leaves_nothing(folder, capfd):
    with doctor._left_as_it_was(folder), rundir.claim(folder, "train"):
        doctor._try_disk(folder, 2**60)  # a bucket has room
    assert re.search(
        r"bucket +\d+ MiB written in .* s and read back in .* s\n",
        capfd.readouterr().out,
    )
    assert files.names(folder) == []


# Data.


@pytest.fixture(scope="module")
def data_dir(server):
    server.make("data")
    for path in filter(pathlib.Path.is_file, JPEGS.rglob("*")):
        files.write(
            files.place(f"gs://data/tfds/{path.relative_to(JPEGS)}"), path.read_bytes()
        )
    return "gs://data/tfds"


def test_a_data_set_in_a_bucket_has_the_same_records(data_dir):
    ours = Tfds(dataset="small_jpegs", data_dir=data_dir)
    theirs = Tfds(dataset="small_jpegs", data_dir=str(JPEGS))
    assert len(ours) == len(theirs) > 0
    assert ours.fingerprint() == theirs.fingerprint()
    ours = pickle.loads(pickle.dumps(ours))  # as a worker gets it
    for index in range(len(theirs)):
        mine, other = ours[index], theirs[index]
        assert mine["image"] == other["image"] and mine["label"] == other["label"]


def test_data_that_cannot_be_read_are_not_called_absent(data_dir, folder, server):
    with pytest.raises(FileNotFoundError, match="looked for gs://data/tfds/none/VERSI"):
        Tfds(dataset="none", data_dir=data_dir)
    with pytest.raises(ValueError, match="path='gs://data/x': want a folder of a file"):
        Folder(path="gs://data/x")
    server.fault = lambda method, path: 403
    told = "gs://data/tfds/small_jpegs cannot be read: want an existing bucket, cred"
    with pytest.raises(ValueError, match=told):
        Tfds(dataset="small_jpegs", data_dir=data_dir)
