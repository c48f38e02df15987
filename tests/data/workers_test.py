# SPDX-License-Identifier: Apache-2.0
"""Worker processes end when they should, survive signals and take no accelerator."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mim_jax.data.input import Input
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources.digits import Digits

ROOT = pathlib.Path(__file__).parents[2]


def digits(workers):
    return Input(source=Digits(), image_size=(4, 4), workers=workers, threads=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_stops_the_workers(workers):
    data = digits(workers)
    batches = train_batches(data, seed=0, batch_size=4)
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    batches.close()
    batches.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_forgotten_batches_stop_their_workers():
    data = digits(1)
    batches = train_batches(data, seed=0, batch_size=4)
    next(batches)
    assert multiprocessing.active_children()
    del batches
    assert multiprocessing.active_children() == []
    with train_batches(digits(0), seed=0, batch_size=4) as batches:
        next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    assert multiprocessing.active_children() == []


TRAINER = """
    import multiprocessing, os, signal, time
    from mim_jax.data.input import Input
    from mim_jax.data.pipeline import train_batches
    from mim_jax.data.sources.digits import Digits

    if __name__ == "__main__":
        data = Input(source=Digits(), image_size=(8, 8), workers=2)
        batches = train_batches(data, seed=0, batch_size=4)
        next(batches)
        workers = [child.pid for child in multiprocessing.active_children()]
        for pid in workers:  # Ctrl-C and schedulers signal the whole group
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        for _ in range(30):
            next(batches)
        print(*workers, flush=True)
        time.sleep(60)
"""


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"  # a zombie runs no more


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_workers_ignore_signals_and_die_with_the_trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        trainer.kill()
        deadline = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [pid for pid in workers if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []


def test_batches_left_open_end_quietly_with_python(tmp_path):
    script = textwrap.dedent(TRAINER).replace("time.sleep(60)", "pass")
    (tmp_path / "trainer.py").write_text(script)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(tmp_path / "trainer.py")]
    done = subprocess.run(command, env=env, capture_output=True, timeout=100)
    assert done.returncode == 0 and done.stderr == b""


def test_workers_take_no_accelerator():
    code = """
import os, jax
from mim_jax.data import workers
workers._follow_parent = lambda: None  # the test is no worker process
assert jax.config.jax_platforms == "tpu"
workers._start_worker(0, 1)
assert os.environ["JAX_PLATFORMS"] == jax.config.jax_platforms == "cpu"
assert not jax._src.xla_bridge._backends
"""
    env = os.environ | {"JAX_PLATFORMS": "tpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
