# SPDX-License-Identifier: Apache-2.0
"""Several hosts: real processes of one run, joined by JAX, train as one does."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import environments
import jax
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import sharding
from mim_jax.data.pipeline import train_batches
from mim_jax.run import hosts
from mim_jax.run.interrupt import Interrupts
from mim_jax.run.parts import read_parts

ROOT = pathlib.Path(__file__).parents[1]
STEPS, BATCH = 6, 16
TINY = {
    "steps": STEPS,
    "batch_size": BATCH,
    "objective.encoder.depth": 1,
    "objective.encoder.width": 16,
    "objective.encoder.heads": 2,
    "objective.decoder.width": 16,
    "objective.decoder.heads": 2,
    "data.workers": 0,
    "checkpoint.every": 2,
    "log.every": 1,
    "report.images": 1,
    "report.draws": 1,
    "report.inpainted": 0,
    "report.rows": 1,
}
# Of sums in another order.
RTOL = 1e-5


class Hosts:
    """`count` processes of a tiny run, `devices` CPU devices each."""

    def __init__(
        self,
        workdir,
        count,
        leaves=None,
        *,
        devices=1,
        config=None,
        within=(),
        flags=(),
        **env,
    ):
        self.workdir = workdir
        self.out = workdir.parent / f"{workdir.name}.out"
        leaves = TINY | (leaves or {}) if config is None else leaves or {}
        command = [*within, sys.executable, "tests/one_host.py", "--distributed"]
        command += [f"--config={config or 'configs/mae.py:digits'}"]
        command += [f"--workdir={workdir}", *flags]
        command += [f"--config.{name}={value}" for name, value in leaves.items()]
        environment = environments.small(
            devices,
            PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            PYTHON=sys.executable,
        )
        with self.out.open("w") as out:
            self._popen = subprocess.Popen(
                ["launch/local.sh", str(count), "--", *command],
                cwd=ROOT,
                env=environment | env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout: float = 600) -> int:
        try:
            return self._popen.wait(timeout)
        finally:
            while self._popen.poll() is None:  # the second time, local.sh kills
                self._popen.terminate()
                time.sleep(1)

    def until(self, text: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while text not in self.told:
            assert self._popen.poll() is None and time.monotonic() < end, self.told
            time.sleep(0.01)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    @property
    def told(self) -> str:
        return self.out.read_text()


def run(workdir, count, leaves=None, *, code=0, **options) -> str:
    hosts = Hosts(workdir, count, leaves, **options)
    assert hosts.wait() == code, hosts.told
    return hosts.told


def metrics(workdir) -> list[dict]:
    """The rows of training, without times; those of evaluations have no loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timing = ("images_per_second", "input_wait_share")
    return [
        {name: v for name, v in row.items() if name not in timing}
        for row in map(json.loads, lines)
        if "loss" in row
    ]


def checkpoints(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_same_lines(workdir, other, rtol=RTOL) -> None:
    ours, theirs = metrics(workdir), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, err_msg=name)


def assert_same_run(workdir, other, rtol=RTOL) -> None:
    assert_same_lines(workdir, other, rtol)
    (step, a), (last, b) = read_parts(workdir), read_parts(other)
    assert step == last
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * rtol, atol=rtol), a, b
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process with two devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(workdir, 1, devices=2)
    return workdir


def records(steps: int) -> np.ndarray:
    """The record of each (step, row), as one process reads them."""
    tree = configs.experiment("train", source="digits")
    data = configs.build(tree).data
    data = type(data)(**{**vars(data), "image_size": (8, 8), "workers": 0})
    with train_batches(data, seed=tree.seed, batch_size=BATCH, stop=steps) as batches:
        return np.stack([batch["index"] for batch in batches])


def test_two_hosts_train_as_one_does_and_each_reads_its_part(one, tmp_path):
    reads = tmp_path / "reads"
    reads.mkdir()
    told = run(tmp_path / "run", 2, READS=str(reads))
    assert told.count("2 host(s)") == told.count("step 6/6") == 1
    assert told.count("report in") == 1 and "rror" not in told
    assert_same_run(tmp_path / "run", one)
    assert checkpoints(tmp_path / "run") == checkpoints(one) == [4, 6]

    ahead = 8  # steps that may be read before they are wanted
    wanted = records(STEPS + ahead)
    for host, part in enumerate(np.split(wanted, 2, axis=1)):
        # The first record is the one that each host tries before it compiles.
        tried, *read = map(int, (reads / str(host)).read_text().split())
        assert tried == host
        assert set(part[:STEPS].flat) <= set(read) <= set(part.flat)
        assert len(read) == len(set(read))


# Pieces, in this process


def test_rows_of_all_devices_are_all_rows():
    mesh = sharding.Mesh(fsdp=2).build()
    assert sharding.rows_here(mesh, 16) == list(range(16))


@pytest.mark.parametrize("numbers", [[], [2, 4]])
def test_alone_there_is_nothing_to_agree_on(numbers):
    assert hosts.from_first_host(numbers) == numbers
    assert hosts.from_hosts(3) == [3]


def test_hosts_count_their_steps_from_this_start(monkeypatch):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "mim_jax.run.interrupt.multihost_utils.reached_preemption_sync_point",
        lambda step: told.append(step) or step == 3,
    )
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGTERM) is before  # it is JAX's
        assert [interrupts.asked(step) for step in (51, 52, 53)] == [False, False, True]
    assert told == [1, 2, 3]


# Real processes, at night


SCRAMBLED = """
import jax, numpy as np
from jax.sharding import AxisType
jax.distributed.initialize(
    num_processes=2, process_id=int(__import__("os").environ["JAX_PROCESS_ID"])
)
from mim_jax import sharding
from mim_jax.run import hosts
# As a TPU may have it: the devices of a host do not lie side by side.
order = np.array(jax.devices())[[0, 4, 1, 5, 6, 2, 7, 3]].reshape(4, 2, 1)
names = ("data", "fsdp", "tensor")
mesh = jax.sharding.Mesh(order, names, axis_types=(AxisType.Auto,) * 3)
rows = sharding.rows_here(mesh, 16)
assert rows != list(range(16)) and len(rows) == 8, rows
batch = sharding.to_devices({"row": np.array(rows, np.int32)}, mesh)["row"]
for shard in batch.addressable_shards:
    (part,) = shard.index
    assert shard.data.tolist() == list(range(part.start, part.stop))
assert hosts.from_hosts(7 + jax.process_index()) == [7, 8]
assert hosts.from_first_host([2, 4] if jax.process_index() == 0 else [9]) == [2, 4]
assert hosts.from_first_host([] if jax.process_index() == 0 else [9]) == []
print("fine", flush=True)
"""


@pytest.mark.slow
def test_rows_are_found_however_devices_are_ordered():
    environment = environments.small(4, PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [ROOT / "launch/local.sh", "2", "--", sys.executable, "-c", SCRAMBLED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.count("fine")) == (0, 2), done.stderr


@pytest.fixture
def namespaces():
    """Network namespaces of four hosts, joined by a bridge; the start of their names.

    They share no loopback: what is said to `localhost`, or to the address of another
    host's own network, is not heard.
    """
    name = f"mim{os.getpid()}h"
    bridge = [f"link add {name} type bridge", f"link set {name} up"]
    commands = []
    for i in range(4):
        host = f"{name}{i}"  # the namespace, and its card on the bridge
        inside = f"netns exec {host} ip"
        commands += [
            f"netns add {host}",
            f"link add {host} type veth peer name eth0 netns {host}",
            f"link set {host} master {name} up",
            f"{inside} addr add 10.77.0.{i + 1}/24 dev eth0",
            f"{inside} link set eth0 up",
            f"{inside} link set lo up",
        ]
    try:
        for command in bridge:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no networks can be made here: {error}")
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield name
    finally:
        for i in range(4):
            subprocess.run(["ip", "netns", "del", f"{name}{i}"])
        subprocess.run(["ip", "link", "del", name])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_in_networks_of_their_own_train_as_one_does(tmp_path, namespaces, count):
    leaves = {"mesh.fsdp": 2}
    run(tmp_path / "one", 1, leaves, devices=count)
    within = ["tests/namespace.sh"]
    told = run(tmp_path / "hosts", count, leaves, within=within, NAMESPACES=namespaces)
    assert f"{count} host(s)" in told
    assert_same_run(tmp_path / "hosts", tmp_path / "one")
    # Each sent at least the gradients of its part, by its own card.
    sizes = jax.tree.leaves(read_parts(tmp_path / "one")[1]["params"])
    part = sum(leaf.nbytes for leaf in sizes) // 2
    for i in range(count):
        card = pathlib.Path(f"/sys/class/net/{namespaces}{i}")
        assert int((card / "statistics/rx_bytes").read_text()) > STEPS * part


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_four_hosts_with_shared_parameters_train_as_one_does(tmp_path, scan):
    leaves = {"mesh.fsdp": 2, "scan": scan, "objective.encoder.depth": 2}
    leaves["data.workers"] = int(scan)
    run(tmp_path / "one", 1, leaves, devices=4)
    run(tmp_path / "four", 4, leaves)
    assert_same_run(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_hosts(one, tmp_path):
    workdir = tmp_path / "run"
    run(workdir, 2, {"stop_after": 2, "mesh.fsdp": 2})
    accept = {"on_change": "accept"}
    told = run(workdir, 1, {"stop_after": 3} | accept)
    assert "resumed from step 2" in told
    told = run(workdir, 4, {"stop_after": 5} | accept)
    assert "resumed from step 3" in told
    told = run(workdir, 2, accept)
    assert "resumed from step 5" in told
    # Not parameters: biases of keys have no gradient, and Adam walks by its noise.
    assert_same_lines(workdir, one)


@pytest.mark.slow
def test_stopped_and_gone_on_two_hosts_give_the_same_bits(tmp_path):
    run(tmp_path / "straight", 2)
    run(tmp_path / "run", 2, {"stop_after": 3})
    run(tmp_path / "run", 2)
    assert_same_run(tmp_path / "run", tmp_path / "straight", rtol=0)


@pytest.mark.slow
def test_masks_are_the_same_bits_on_any_number_of_devices_and_hosts(tmp_path):
    """One process to two, two to one, on 1 to 16 devices."""
    for count in (1, 2):
        run(tmp_path / f"of-{count}", count, {"stop_after": 2})
    script = [sys.executable, "tests/elastic.py"]
    ways = (1, 16, (1, 2, 4, 8, 16)), (2, 8, (16,)), (2, 1, (2,))
    for processes, devices, counts in ways:
        out = tmp_path / f"{processes}-{devices}"
        out.mkdir()
        words = [*script, tmp_path / f"of-{3 - processes}", out, *map(str, counts)]
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["launch/local.sh", str(processes), "--", *words],
            cwd=ROOT,
            env=environments.small(devices, **environment),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    first, *others = sorted(tmp_path.glob("?-*/*.npz"), key=lambda path: path.stem)
    assert [path.stem for path in (first, *others)] == [
        *("1x1", "1x16", "1x2", "1x4", "1x8", "2x16", "2x2")
    ]
    with np.load(first) as wanted:
        assert len(wanted) == 3 * 3 * 2 and len(np.unique(wanted["random 2 keep"])) > 2
        assert (wanted["random 2 keep"] != wanted["random 3 keep"]).any()
        for path in others:
            with np.load(path) as found:
                for name in wanted:
                    assert found[name].tobytes() == wanted[name].tobytes(), (path, name)


@pytest.mark.slow
def test_two_hosts_try_what_a_command_needs(tmp_path):
    flags = ["--doctor", "--price=2"]
    told = run(tmp_path / "run", 2, devices=2, flags=flags)
    assert told.count("nothing stands in the way") == told.count("\nstep  ") == 1
    assert "4 x cpu, 2 host(s)" in told and "6 steps, " in told
    assert not (tmp_path / "run").exists()
    own = ["--doctor"]
    told = run(tmp_path / "run-HOST", 2, code=2, flags=own, SOON="1", GRACE="60")
    assert told.count("error: --workdir: host 0 writes to ") == 2
    assert not list(tmp_path.glob("run-?"))


LONG = {"steps": 100_000, "checkpoint.every": 10**6, "log.every": 10}


@pytest.mark.slow
def test_hosts_with_directories_of_their_own_are_refused(tmp_path):
    told = run(tmp_path / "run-HOST", 2, code=2, SOON="1", GRACE="60")
    line = f"host 1 does not see that in {socket.gethostname()}:{tmp_path}/run-1: want"
    assert told.count(line) == 2 and told.count("error: ") == 2, told
    assert (
        told.count(f"host 0 writes to {socket.gethostname()}:{tmp_path}/run-0, ") == 2
    )
    assert not (tmp_path / "run-1").exists()


@pytest.mark.slow
def test_all_hosts_save_the_same_step_and_leave(tmp_path):
    workdir = tmp_path / "run"
    hosts = Hosts(workdir, 2, LONG)
    hosts.until("step 20/")
    hosts.send(signal.SIGTERM)
    assert hosts.wait(60) == 75, hosts.told
    assert hosts.told.count("saved; the same command goes on from here") == 2
    assert "Traceback" not in hosts.told
    (first,) = checkpoints(workdir)
    assert first >= 20

    hosts = Hosts(workdir, 2, LONG)  # told before its first step
    hosts.until("length  ")
    hosts.send(signal.SIGINT)
    assert hosts.wait(60) == 75, hosts.told
    assert checkpoints(workdir) == [first, first + 1]


@pytest.mark.slow
def test_one_host_that_is_told_takes_all_along(tmp_path):
    workdir = tmp_path / "run"
    hosts = Hosts(workdir, 2, LONG)
    hosts.until("step 10/")
    (second,) = [
        int(path.parent.name)
        for path in pathlib.Path("/proc").glob("[0-9]*/environ")
        if of(path, "JAX_PROCESS_ID=1") and str(workdir).encode() in command(path)
    ]
    os.kill(second, signal.SIGTERM)
    assert hosts.wait(60) == 75, hosts.told
    assert len(checkpoints(workdir)) == 1


def of(path, text) -> bool:
    try:
        return text.encode() in path.read_bytes().split(b"\0")
    except OSError:
        return False


def command(path) -> bytes:
    try:
        return path.with_name("cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_a_host_that_dies_ends_the_run_which_goes_on(one, tmp_path):
    workdir = tmp_path / "run"
    hosts = Hosts(workdir, 2, {"steps": 100_000}, GRACE="1")
    hosts.until("step 5/")
    (second,) = [
        int(path.parent.name)
        for path in pathlib.Path("/proc").glob("[0-9]*/environ")
        if of(path, "JAX_PROCESS_ID=1") and str(workdir).encode() in command(path)
    ]
    os.kill(second, signal.SIGKILL)
    assert hosts.wait(60) == 128 + signal.SIGKILL
    told = run(workdir, 2, {"stop_after": 8, "steps": 100_000})
    assert "resumed from step" in told


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_what_one_host_cannot_read_none_goes_on_from(one, tmp_path, host):
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    told = run(workdir, 2, UNREADABLE=f"{host}:6")
    assert told.count("WARNING: the checkpoint of step 6 is damaged") == 1
    assert "resumed from step 4" in told
    assert_same_run(workdir, one)


@pytest.mark.slow
def test_replaced_images_of_all_hosts_are_counted(tmp_path):
    first, second = np.split(records(2), 2, axis=1)
    bad = f"{first[0, 0]},{second[0, 1]},{second[1, 2]}"
    leaves = {"stop_after": 3, "data.max_replaced": 1.0}
    run(tmp_path / "run", 2, leaves, UNDECODABLE=bad)
    assert [line["replaced"] for line in metrics(tmp_path / "run")] == [2, 3, 3]
    run(tmp_path / "run", 2, leaves | {"stop_after": 4})
    assert metrics(tmp_path / "run")[-1]["replaced"] == 3
    # Too many of both together: both give up after the same step, saved.
    leaves["data.max_replaced"] = 2 / 1442
    told = run(tmp_path / "strict", 2, leaves, code=5, UNDECODABLE=bad)
    assert told.count("error: 3 of 1442 images (0.21%) could not be read") == 2
    (saved,) = checkpoints(tmp_path / "strict")
    assert saved in (2, 3)
    for host, names in enumerate((first[:1, 0], (second[0, 1], second[1, 2]))):
        path = tmp_path / "strict" / f"unreadable-host{host}.txt"
        written = {int(line.split("\t")[0]) for line in path.read_text().splitlines()}
        assert written == set(map(int, names))
    run(tmp_path / "strict", 2, leaves | {"stop_after": 4})


@pytest.mark.slow
def test_several_hosts_begin_with_a_run_and_evaluate_it(one, tmp_path):
    leaves = {"init_from.run": one, "steps": 2, "batch_size": 16, "data.workers": 0}
    leaves |= {"on_change": "accept"}
    config = "configs/finetune.py:digits"
    told = run(tmp_path / "tuned", 2, leaves, config=config)
    assert told.count(f"began with  {one}, step 6") == 1
    run(tmp_path / "alone", 1, leaves, config=config, devices=2)
    assert_same_run(tmp_path / "tuned", tmp_path / "alone")
    told = run(tmp_path / "knn", 2, {"run": one}, config="configs/knn.py")
    assert told.count("report in") == 1
    assert (tmp_path / "knn" / "results.json").exists()


@pytest.mark.slow
def test_alone_distributed_names_the_way_out(tmp_path):
    words = ["--distributed", "--config=configs/mae.py:digits", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "mim_jax.main", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "launch/local.sh" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_refusals_have_their_exit_codes(one, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    told = run(workdir, 2, {"optim.base_lr": 0.5}, code=2)
    assert "config.optim.base_lr: 0.004 -> 0.5" in told
    leaves = {"optim.base_lr": 1e30, "optim.warmup_epochs": 0}
    leaves |= {"spikes.policy": "rollback", "spikes.most": 1}
    told = run(tmp_path / "wild", 2, leaves, code=3)
    assert told.count("going back to step 0") == 1  # both did; the first one says so
    assert told.count("is not finite; the update was not made") == 2
    assert len(list((tmp_path / "wild").glob("nonfinite-step*-host[01].json"))) == 2

    hosts = Hosts(tmp_path / "busy", 2, LONG)
    hosts.until("step 10/")
    shutil.copy(hosts.out, tmp_path / "first.out")
    told = run(tmp_path / "busy", 2, LONG, code=2, GRACE="1")
    assert "is in use by" in told
    hosts.send(signal.SIGTERM)
    assert hosts.wait(60) == 75


@pytest.mark.slow
def test_the_first_host_measures_while_the_others_wait(one, tmp_path):
    workdir = tmp_path / "run"
    leaves = {"evaluate_every": 3, "evaluate_with": '("knn",)'}
    told = run(workdir, 2, leaves)
    assert told.count("evaluated in") == 2 and "rror" not in told
    assert_same_run(workdir, one)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" not in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert 0 < rows[0]["knn/accuracy_model_k10"] < 1
    assert (workdir / "report" / "step-3" / "knn.png").exists()


@pytest.mark.slow
def test_a_slow_report_is_waited_for(one, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one, workdir)
    shutil.rmtree(workdir / "report")
    run(workdir, 2, DRAWING="310")  # JAX's own patience is 300 s
    assert (workdir / "report").exists()
