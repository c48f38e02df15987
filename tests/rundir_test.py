# SPDX-License-Identifier: Apache-2.0
"""One process per directory, and one configuration."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent import futures

import jax
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.run import digests, hosts, rundir, storage
from mim_jax.run.files import DiskError


def hold(workdir, held):
    with rundir.claim(workdir):
        held.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that has claimed `tmp_path`."""
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_by_host_and_pid(tmp_path, holder):
    with pytest.raises(configs.ConfigError) as error:
        with rundir.claim(tmp_path):
            pass
    assert f"in use by {socket.gethostname()} pid {holder.pid}:" in str(error.value)
    holder.kill()  # SIGKILL: nobody tidies the lock file
    holder.join()
    with rundir.claim(tmp_path):
        mine = f"{socket.gethostname()} pid {os.getpid()}\n"
        assert (tmp_path / "lock").read_text() == mine
    with rundir.claim(tmp_path):
        pass


def test_only_the_first_of_several_processes_claims(tmp_path, monkeypatch):
    with rundir.claim(tmp_path):
        monkeypatch.setattr(rundir.jax, "process_index", lambda: 1)
        with rundir.claim(tmp_path):
            pass
        rundir.write_config(tmp_path, configs.experiment("train"))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


JOBS = {
    "train": "a training run",
    "eval": "an evaluation",
    "compare": "a comparison",
    "explore": "a page to explore",
    "study": "a study",
}


@pytest.mark.parametrize("there", JOBS)
@pytest.mark.parametrize("job", JOBS)
def test_no_job_writes_where_another_job_wrote(tmp_path, there, job):
    rundir.write_config(tmp_path, configs.experiment(there))
    before = (tmp_path / "config.json").read_bytes()
    if job == there:
        with rundir.claim(tmp_path, job):
            return
    with pytest.raises(configs.ConfigError) as error:
        with rundir.claim(tmp_path, job):
            pass
    assert f" holds {JOBS[there]}, and this job is {JOBS[job]}: " in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_lost_its_config_is_still_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(configs.ConfigError, match="holds a training run, and this job"):
        with rundir.claim(tmp_path, "eval"):
            pass
    with rundir.claim(tmp_path, "train"):
        pass


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"name": "my web page"}',
            "config.json is no config of mim_jax: want another",
        ),
        ("[]", "config.json is no config of mim_jax: want another"),
        ('{"job": ["train"]}', " holds ['train'], and this job is "),
        ("no JSON", "config.json is not JSON: "),
    ],
)
@pytest.mark.parametrize("job", JOBS)
def test_somebody_elses_config_is_not_overwritten(tmp_path, text, message, job):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(configs.ConfigError, match=re.escape(message)):
        with rundir.claim(tmp_path, job):
            pass
    assert (tmp_path / "config.json").read_text() == text


def test_a_directory_that_moved_is_no_longer_ours(tmp_path):
    workdir, away = tmp_path / "run", tmp_path / "away"
    with rundir.claim(workdir, "train") as claim:
        claim.check()
        workdir.rename(away)
        with pytest.raises(DiskError, match="is no longer there: it was moved or del"):
            claim.check()
        assert not workdir.exists()
        workdir.mkdir()
        (workdir / "lock").write_text("elsewhere pid 1\n")  # another run took the place
        with pytest.raises(DiskError, match="belongs to elsewhere pid 1: it was moved"):
            claim.check()
        shutil.rmtree(workdir)
        away.rename(workdir)
        claim.check()


def test_a_lock_that_is_another_file_too_is_not_written(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "run").mkdir()
    os.link(theirs, tmp_path / "run" / "lock")
    with pytest.raises(configs.ConfigError, match="lock is another file, too"):
        with rundir.claim(tmp_path / "run", "train"):
            pass
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize("name", ["a\\b", "a*", "a?", "[a]", "a\udcff"])
def test_names_that_checkpoints_cannot_have_are_refused(tmp_path, name):
    for workdir in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(
            configs.ConfigError, match="library that writes checkpoints"
        ):
            with rundir.claim(workdir, "train"):
                pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "ü", "　", "a%20b#", "{a}$1$", "'\"", "a\n"])
def test_other_names_are_fine(tmp_path, name):
    save(tmp_path / name, 4, config=plain(changed()))
    with rundir.claim(tmp_path / name, "train"):
        assert rundir.read_config(tmp_path / name, "run").seed == 0


@pytest.mark.parametrize("workdir", ["gs:/bucket/run", "s3:/bucket/run"])
def test_urls_without_a_slash_and_files_are_no_directories(tmp_path, workdir):
    with pytest.raises(configs.ConfigError, match="want a directory, or gs://BUCKET/"):
        with rundir.claim(rundir.pathlib.Path(workdir)):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(configs.ConfigError, match="want a directory to write to"):
        with rundir.claim(tmp_path / "file"):
            pass


def changed(**leaves):
    tree = configs.experiment("train", source="digits")
    with tree.unlocked():
        tree.update_from_flattened_dict(
            {name.replace("__", "."): value for name, value in leaves.items()}
        )
    return tree


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    assert rundir.check_config(tmp_path, changed()) == []
    rundir.write_config(tmp_path, changed())
    assert rundir.check_config(tmp_path, changed()) == []
    other = dict(optim__base_lr=0.5, objective__encoder__width=96)
    with pytest.raises(configs.ConfigError) as error:
        rundir.check_config(tmp_path, changed(**other))
    assert "config.optim.base_lr: 0.00015 -> 0.5" in str(error.value)
    assert "config.objective.encoder.width: 768 -> 96" in str(error.value)
    assert "--config.on_change=accept" in str(error.value)
    accepted = changed(on_change="accept", **other)
    assert len(rundir.check_config(tmp_path, accepted)) == 2
    # Checking alone writes nothing: a later refusal must not leave a wrong config.
    assert rundir.check_config(tmp_path, changed()) == []


FREE = dict(
    stop_after=3,
    log__every=7,
    checkpoint__keep=9,
    checkpoint__every=5,
    compile_cache=False,
    profile="2:3",
    data__workers=0,
    data__threads=1,
    data__prefetch=5,
    on_change="accept",
)


@pytest.mark.parametrize("name", FREE)
def test_free_leaves_do_not_count(tmp_path, name):
    rundir.write_config(tmp_path, changed())
    assert rundir.check_config(tmp_path, changed(**{name: FREE[name]})) == []


def save(workdir, step, **extra):
    """A checkpoint with nothing but the record beside its arrays."""
    about = workdir / "checkpoints" / str(step) / "about"
    about.mkdir(parents=True)
    record = digests.seal({"step": step, "extra": extra, "leaves": {}})
    (about / "metadata").write_text(json.dumps(record))


def plain(tree):
    return json.loads(configs.dumps(tree))


def test_a_lost_config_comes_back_from_the_newest_whole_checkpoint(tmp_path):
    save(tmp_path, 2, config=plain(changed(seed=1)))
    save(tmp_path, 4, config=plain(changed(seed=2)))
    save(tmp_path, 10, config=plain(changed(seed=3)))
    (tmp_path / "checkpoints" / "10" / "about" / "metadata").write_text("{}")
    assert rundir.check_config(tmp_path, changed(seed=2)) == []
    with pytest.raises(configs.ConfigError, match="config.seed: 2 -> 1"):
        rundir.check_config(tmp_path, changed(seed=1))
    assert rundir.read_config(tmp_path, "run='x'").seed == 2
    # What lies there counts, if something does: a run may have been changed.
    rundir.write_config(tmp_path, changed(seed=5))
    assert rundir.check_config(tmp_path, changed(seed=5)) == []


def test_a_config_that_is_lost_for_good_is_told(tmp_path):
    save(tmp_path, 4, data={})  # by an older version
    for read in (
        lambda: rundir.check_config(tmp_path, changed()),
        lambda: rundir.read_config(tmp_path, "run='x'"),
    ):
        with pytest.raises(configs.ConfigError) as error:
            read()
        assert "config.json is missing, and the checkpoint of step 4" in str(
            error.value
        )
        assert "want that file put back" in str(error.value)


@pytest.mark.parametrize(
    "leaves",
    [
        *(7, {"a": 7}, {"a": ["f", 3, 4]}, {"a": []}),
        *({"a": [kind, [], 4]} for kind in ("nonsense", "object", "U5", "")),
        *({"a": ["float32", [side], 4]} for side in ("b", -1, None, 1.0, True)),
        {"a/b": ["float32", [], 4], "a/b/c": ["float32", [], 4]},
    ],
)
def test_a_seal_around_something_else_is_damage(tmp_path, leaves):
    save(tmp_path, 4)
    path = tmp_path / "checkpoints" / "4" / "about" / "metadata"
    record = {"step": 4, "extra": {}, "leaves": leaves}
    path.write_text(json.dumps(digests.seal(record)))
    with pytest.raises(digests.DamageError):
        storage.read_record(tmp_path / "checkpoints", 4)


def test_an_unreadable_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text("")
    with pytest.raises(configs.ConfigError, match="config.json is not JSON"):
        rundir.check_config(tmp_path, changed())


# Several hosts.


def on_hosts(monkeypatch, count, work):
    """What `work(host)` returned or raised on each of so many hosts: threads here."""
    host, meet = threading.local(), threading.Barrier(count, timeout=20)
    told: list = [None] * count

    def gathered(row, what):
        told[host.number] = np.asarray(row)
        meet.wait()
        found = np.stack(told)
        meet.wait()
        return found

    def one(number):
        host.number = number
        try:
            return work(number)
        except Exception as error:
            return error

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: host.number)
    monkeypatch.setattr(hosts, "_gathered", gathered)
    with futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_hosts_that_share_a_directory_go_on(tmp_path, monkeypatch):
    (tmp_path / "hosts-7.token").write_text("of a start that was killed")
    assert (
        on_hosts(monkeypatch, 3, lambda _: rundir.check_shared(tmp_path)) == [None] * 3
    )
    assert list(tmp_path.iterdir()) == []


def test_hosts_with_directories_of_their_own_are_refused_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "_SOON", 0.1)
    places = [tmp_path / name for name in ("shared", "shared", "bär")]
    places[0].mkdir()
    places[2].mkdir()
    work = lambda number: rundir.check_shared(places[number])  # noqa: E731
    errors = on_hosts(monkeypatch, 3, work)
    assert [type(error) for error in errors] == [rundir.NotSharedError] * 3
    name = socket.gethostname()
    for error in errors:
        assert str(error).startswith(
            f"--workdir: host 0 writes to {name}:{places[0]}, and host 2 does not see "
            f"that in {name}:{places[2]}: want one directory"
        )
    assert list(tmp_path.rglob("*.token")) == []


def test_no_host_waits_for_ever(monkeypatch, capfd):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", left.append)
    with hosts.deadline("step 7", seconds=60):
        pass
    with hosts.deadline("step 8", seconds=0.05):
        time.sleep(0.5)
    assert left == [hosts.EXIT_LOST]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: host 0 of 2 waited 0.05 s for step 8: ")
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with hosts.deadline("nobody", seconds=0.01):  # alone there is nobody to wait for
        time.sleep(0.1)
    assert left == [hosts.EXIT_LOST]
