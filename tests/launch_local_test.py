# SPDX-License-Identifier: Apache-2.0
"""launch/local.sh: several processes on this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from stand_ins import HARD, LAUNCH, Fakes


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


def local(fakes, count, program, *words, **env) -> subprocess.Popen:
    script = [LAUNCH / "local.sh", str(count), "--", sys.executable, "-c", program]
    # Where tests run in the background Ctrl-C is ignored, which no script can undo.
    heard = "import os, sys, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heard += "os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", heard, *map(str, script), *words],
        env=fakes.env | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_processes_know_who_they_are(fakes):
    program = (
        "import json, os, sys; found = [os.environ[name] for name in ("
        "'JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS')];"
        # One write for each line: the processes share the pipe.
        "os.write(1, (json.dumps(found + sys.argv[1:]) + chr(10)).encode())"
    )
    out, error = local(fakes, 2, program, *HARD).communicate(timeout=30)
    assert error == ""
    found = sorted(json.loads(line) for line in out.splitlines())
    assert [line[:2] for line in found] == [["0", "2"], ["1", "2"]]
    assert found[0][2] == found[1][2] and found[0][2].startswith("localhost:")
    assert all(line[3:] == HARD for line in found)


MINE = "import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID']); "


@pytest.mark.parametrize("codes", [(0, 0, 0), (0, 7, 9), (9, 7, 0), (75, 75, 75)])
def test_the_exit_code_is_the_first_that_is_not_0(fakes, codes):
    process = local(fakes, 3, MINE + f"time.sleep(me / 2); sys.exit({codes}[me])")
    assert process.wait(30) == next(filter(None, codes), 0)
    process.communicate()


def test_one_that_dies_takes_the_others_along(fakes):
    program = MINE + (
        "os.write(1, b'%d\\n' % os.getpid()); time.sleep(0.3);"
        "me and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    )
    before = time.monotonic()
    process = local(fakes, 3, program, GRACE="0.5")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert time.monotonic() - before < 15
    for pid in map(int, out.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


LEAVING = MINE + (
    "signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep({}), os._exit(75)));"
    "os.write(1, b'here\\n'); time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_all_to_leave(fakes, number):
    process = local(fakes, 2, LEAVING.format(0.2))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(20) == 75
    process.communicate()


def test_a_second_signal_ends_all_at_once(fakes):
    process = local(fakes, 2, LEAVING.format(30))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGKILL
    process.communicate()
