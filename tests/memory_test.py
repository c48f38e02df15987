# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with the process: page faults of a thread that allocates anew."""

import os
import subprocess
import sys

import pytest

# Blocks of 40 MiB, each too large to share a heap of a thread (64 MiB) with the
# others: two are 20,480 pages.
_PROGRAM = """
import ctypes, os, resource, threading
{before}
from mim_jax.run import memory
print(memory.keep_freed())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(40 * 2**20) for _ in range({blocks})]
    for block in blocks:
        ctypes.memset(block, 1, 40 * 2**20)
    for block in blocks:
        libc.free(block)
def steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


_FEW = "os.sched_getaffinity = lambda _: set(range(2))"


def ran(before: str = "", blocks: int = 2, **environment: str) -> tuple[str, int]:
    """What `keep_freed` returned, and the page faults of ten steps."""
    ours = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(before=before, blocks=blocks)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said, int(faults)


pytestmark = pytest.mark.skipif(
    os.confstr_names.get("CS_GNU_LIBC_VERSION") is None, reason="is for glibc"
)


def test_memory_that_a_step_freed_serves_the_next():
    said, faults = ran(_FEW)
    assert said == "True" and faults < 1000  # of 204,800 pages


def test_of_much_memory_that_a_step_freed_most_goes_back():
    said, faults = ran(_FEW, blocks=32)  # 1,280 MiB
    assert said == "True" and faults > 1000


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("os.sched_getaffinity = lambda _: set(range(9))", {}),
        (_FEW, {"MALLOC_TOP_PAD_": "0"}),
        (_FEW, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}),
        (f"{_FEW}; import sys; sys.platform = 'darwin'", {}),
    ],
)
def test_many_cores_and_the_users_own_settings_stay(before, environment):
    assert ran(before, **environment)[0] == "False"


_WATCHED = """
import runpy, sys
from mim_jax.run import memory
def keep_freed():
    print(sorted({"jax", "numpy"} & sys.modules.keys()), flush=True)
memory.keep_freed = keep_freed
sys.argv = ["mim-jax", "--version"]
"""


@pytest.mark.parametrize(
    "start",
    [
        "runpy.run_module('mim_jax.main', run_name='__main__')",
        "runpy.run_module('mim_jax', run_name='__main__')",
        "from mim_jax.__main__ import start; start()",  # mim-jax
    ],
)
def test_the_program_keeps_memory_before_it_imports_jax(start):
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED + start], capture_output=True, text=True
    )
    first, second = done.stdout.splitlines()
    assert first == "[]" and second.startswith("mim_jax "), done.stderr
