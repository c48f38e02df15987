# SPDX-License-Identifier: Apache-2.0
"""The program: python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae."""

import gc
import os
import pathlib
import signal
import time

if __name__ == "__main__":
    # Ctrl-C during the imports ends the process without a traceback: there is no run
    # to save yet.
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
        logging.set_verbosity(logging.WARNING)  # at INFO libraries log every file
    if _DISTRIBUTED.value:
        _join()
    config = CONFIG.value
    why = None
    try:
        if config.job not in JOBS:
            configs.build(config)  # raises an error that lists the jobs
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
    # Batches lie in shared memory, which a thread of Grain frees. The exception above
    # may have kept the last batches alive: collect it, and give the thread time, or
    # Python reports the memory as leaked.
    gc.collect()
    time.sleep(0.1)
    if why is None and _DISTRIBUTED.value:
        # The first host may still draw its report; JAX itself waits only 5 minutes.
        wait_for_all("done", _REPORT)
    if why is not None:
        if why[1] in (EXIT_NON_FINITE, EXIT_INTERRUPTED):
            # All hosts end with these codes. One that ended first would make JAX abort
            # the others, so they shut down together.
            jax.distributed.shutdown()
        leave(*why)


def _join() -> None:
    """Join the other processes. Which one this is, JAX learns from the cluster, or from
    the environment that launch/local.sh sets."""
    settings = {}
    if "JAX_NUM_PROCESSES" in os.environ:  # JAX itself reads only the address
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
