# SPDX-License-Identifier: Apache-2.0
"""The program: python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae."""

import gc
import os
import pathlib
import signal
import time

if __name__ == "__main__":
    # Until there is a run to save, Ctrl-C just ends it: no traceback from an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import jax
from absl import app, flags, logging

from mim_jax import compare, evaluate, train
from mim_jax import config as configs
from mim_jax.run.checkpoint import CheckpointError, MismatchError
from mim_jax.run.commandline import CONFIG, EXIT_CONFIG, leave, parse
from mim_jax.run.interrupt import EXIT_INTERRUPTED, Interrupted
from mim_jax.run.log import MetricsError
from mim_jax.run.storage import wait_for_all

JOBS = {"train": train.run, "eval": evaluate.run, "compare": compare.run}

EXIT_NON_FINITE, EXIT_CHECKPOINT = 3, 4

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, made if absent.", required=True
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process of several: call jax.distributed.initialize."
)
_REPORT = 24 * 3600  # seconds that the other hosts wait for the first one's report


def main(argv: list[str]) -> None:
    """Run the job that the config names; exit codes are listed in README."""
    del argv  # `parse` left nothing in it
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries tell of every file closed
    if _DISTRIBUTED.value:
        _join()
    config = CONFIG.value
    why = None
    try:
        if config.job not in JOBS:
            configs.build(config)  # says which jobs there are
        if config.job == "train" or jax.process_index() == 0:  # others need one host
            JOBS[config.job](config, pathlib.Path(str(_WORKDIR.value)))
    except (configs.ConfigError, MismatchError) as error:
        why = f"error: {error}", EXIT_CONFIG
    except FloatingPointError as error:
        why = f"error: {error}", EXIT_NON_FINITE
    except (CheckpointError, MetricsError) as error:
        why = f"error: {error}", EXIT_CHECKPOINT
    except Interrupted:
        why = "saved; the same command goes on from here", EXIT_INTERRUPTED
    # Batches lie in shared memory, which Grain frees in a thread, the last ones once
    # the error that held them is gone: what is left at the end is told of as leaks.
    gc.collect()
    time.sleep(0.1)
    if why is None and _DISTRIBUTED.value:
        # The first host may still draw, and JAX's own patience at the end is 5 minutes.
        wait_for_all("done", _REPORT)
    if why is not None:
        if why[1] in (EXIT_NON_FINITE, EXIT_INTERRUPTED):
            # All hosts leave with these: none may go first, and take the others along.
            jax.distributed.shutdown()
        leave(*why)


def _join() -> None:
    """Become one process of several: a cluster that JAX knows says which one, or the
    environment does, as launch/local.sh sets it."""
    settings = {}
    if "JAX_NUM_PROCESSES" in os.environ:  # of all three JAX reads the address only
        settings = {
            "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
            "process_id": int(os.environ["JAX_PROCESS_ID"]),
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**settings)
    except (KeyError, ValueError) as error:
        leave(
            f"error: --distributed: {error} JAX knows hosts of a TPU, tasks of Slurm "
            "and pods of GKE; on one machine start processes by launch/local.sh",
            EXIT_CONFIG,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
