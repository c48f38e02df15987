# SPDX-License-Identifier: Apache-2.0
"""One process per directory, and one configuration."""

import multiprocessing
import os
import signal
import socket

import pytest

from mim_jax import config as configs
from mim_jax.run import rundir


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


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "gs:/bucket/run"])
def test_buckets_and_files_are_no_directories(tmp_path, workdir):
    with pytest.raises(configs.ConfigError, match="gcsfuse"):
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


def test_an_unreadable_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text("")
    with pytest.raises(configs.ConfigError, match="config.json is not JSON"):
        rundir.check_config(tmp_path, changed())
