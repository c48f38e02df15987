# SPDX-License-Identifier: Apache-2.0
"""The program: python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae."""

import functools
import gc
import os
import signal
import time

from mim_jax.run import memory

if __name__ == "__main__":
    # Ctrl-C during the imports ends the process without a traceback: there is no run
    # to save yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    memory.keep_freed()

import jax
from absl import app, flags, logging

from mim_jax import compare, evaluate, train
from mim_jax import config as configs
from mim_jax.aot import doctor
from mim_jax.data.fields import DataError, ExampleError
from mim_jax.explore import job as explore
from mim_jax.run import files
from mim_jax.run.checkpoint import CheckpointError, MismatchError
from mim_jax.run.commandline import (
    CONFIG,
    EXIT_CONFIG,
    given,
    leave,
    outlive_pipes,
    parse,
)
from mim_jax.run.hosts import REPORT
from mim_jax.run.interrupt import EXIT_INTERRUPTED, Interrupted
from mim_jax.run.rundir import NotSharedError
from mim_jax.run.storage import wait_for_all
from mim_jax.run.warmstart import check_given
from mim_jax.schema import DiskError
from mim_jax.studies import job as study

JOBS = {
    "train": train.run,
    "eval": evaluate.run,
    "compare": compare.run,
    "explore": explore.run,
    "study": study.run,
}

EXIT_FAILED, EXIT_NON_FINITE, EXIT_CHECKPOINT, EXIT_DATA = 1, 3, 4, 5

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, made if absent; or gs://BUCKET/FOLDER.",
    required=True,
)
_DOCTOR = flags.DEFINE_bool(
    "doctor", False, "Try what the command needs, say what it takes, start nothing."
)
_PRICE = flags.DEFINE_float("price", None, "With --doctor: of an hour of all devices.")
_CHECK = flags.DEFINE_integer(
    "check", None, "Check the command as for so many devices; start nothing."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process of several: call jax.distributed.initialize."
)


def main(argv: list[str]) -> None:
    """Run the job that the config names; exit codes are listed in README."""
    del argv  # `parse` left nothing in it
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at INFO libraries log every file
    if _DISTRIBUTED.value:
        _join()
    config = CONFIG.value
    why, together = None, False
    try:
        if config.job not in JOBS:
            configs.build(config)  # raises an error that lists the jobs
        if config.job == "study" and not config.only:
            # The processes of its cells need the devices: this one leaves them alone.
            jax.config.update("jax_platforms", "cpu")
        if _CHECK.value is not None:
            if config.job == "study":
                where = files.place(str(_WORKDIR.value))
                config = study.on_other_machines(config, where)
            doctor.check(config, _CHECK.value)
            return
        workdir = files.place(str(_WORKDIR.value))
        if config.job == "train":
            check_given(config, given(), workdir)
        job = JOBS[config.job]
        if _DOCTOR.value:
            job = functools.partial(doctor.examine, price=_PRICE.value)
        # The other jobs need one host.
        if config.job in ("train", "study") or jax.process_index() == 0:
            job(config, workdir)
    except (configs.ConfigError, MismatchError, ExampleError) as error:
        why = f"error: {error}", EXIT_CONFIG
        together = isinstance(error, NotSharedError)
    except FloatingPointError as error:
        why, together = (f"error: {error}", EXIT_NON_FINITE), True
    except (CheckpointError, DiskError) as error:
        why = f"error: {error}", EXIT_CHECKPOINT
    except DataError as error:
        why, together = (f"error: {error}", EXIT_DATA), error.everywhere
    except study.FailedCellsError as error:
        why = f"error: {error}", EXIT_FAILED
    except Interrupted:
        said = "saved; the same command goes on from here"
        why, together = (said, EXIT_INTERRUPTED), True
    # Batches lie in shared memory, which a thread of Grain frees. The exception above
    # may have kept the last batches alive: collect it, and give the thread time, or
    # Python reports the memory as leaked.
    gc.collect()
    time.sleep(0.1)
    if why is None and _DISTRIBUTED.value:
        # The first host may still draw its report; JAX itself waits only 5 minutes.
        wait_for_all("done", REPORT)
    if why is not None:
        if together:
            # All hosts end with this code. One that ended first would make JAX abort
            # the others, so they shut down together.
            jax.distributed.shutdown()
        leave(*why)


def _join() -> None:
    """Join the other processes. Which one this is, JAX learns from the cluster, or from
    the environment that launch/local.sh sets."""
    settings = {}
    if "JAX_NUM_PROCESSES" in os.environ:  # JAX itself reads only the address
        settings = {
            "num_processes": _from_environment("JAX_NUM_PROCESSES"),
            "process_id": _from_environment("JAX_PROCESS_ID"),
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


def _from_environment(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not (value.isascii() and value.isdigit() and len(value) < 10):
        said = "is not set" if value is None else f"is {value[:40]!r}"
        leave(
            f"error: --distributed: {name} in the environment {said}: want a number, "
            "as launch/local.sh sets it",
            EXIT_CONFIG,
        )
    return int(value)


def start() -> None:
    """What `mim-jax`, `python -m mim_jax` and `python -m mim_jax.main` run."""
    outlive_pipes()
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    start()
