# SPDX-License-Identifier: Apache-2.0
"""How the C library hands out memory on machines of few cores."""

import ctypes
import os
import sys

FEW_CORES = 8
# Parameters of mallopt, as glibc's malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# Free memory at the end of the heap that is kept, in bytes. Small models need less
# between two steps; large ones, which gain nothing, would double what they hold.
_KEPT = 2**30


def keep_freed() -> bool:
    """Let glibc keep freed memory for the next step; returns whether it will.

    XLA's CPU runtime allocates the buffers of each step anew. glibc gives large ones
    back to the kernel, which clears each page before it hands it out again; small
    models spend a sixth of their time on that (docs/performance.md). With this call
    up to 1 GiB stays, and all threads share one heap. Many threads would wait for it:
    processes that may use more than `FEW_CORES` cores stay as they are. So do those
    whose environment holds MALLOC_... or GLIBC_TUNABLES, and other C libraries.

    Call it before NumPy or JAX is imported: their threads keep the heap that they
    begin with.
    """
    mine = any(
        name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ
    )
    if mine or sys.platform != "linux" or len(os.sched_getaffinity(0)) > FEW_CORES:
        return False
    try:
        set_ = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT))
    return all([set_(parameter, value) == 1 for parameter, value in wanted])
