# SPDX-License-Identifier: Apache-2.0
"""The program: python -m mim_jax.main --config=configs/mae.py --workdir=runs/mae."""

import gc
import os
import pathlib
import re
import signal
import sys
import time
from typing import NoReturn

if __name__ == "__main__":
    # Until there is a run to save, Ctrl-C just ends it: no traceback from an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import app, flags, logging
from ml_collections import config_flags

from mim_jax import config as configs
from mim_jax import evaluate, train
from mim_jax.checkpoint import CheckpointError, MismatchError
from mim_jax.interrupt import EXIT_INTERRUPTED, Interrupted
from mim_jax.metrics import MetricsError

JOBS = {"train": train.run, "eval": evaluate.run}

EXIT_CONFIG, EXIT_NON_FINITE, EXIT_CHECKPOINT = 2, 3, 4

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/FILE.py[:variant]; any leaf: --config.LEAF=VALUE"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, made if absent.", required=True
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process of several: call jax.distributed.initialize."
)
flags.mark_flag_as_required("config")


def parse(argv: list[str]) -> list[str]:
    """Reads the command line; says in one line what is wrong with it, and leaves."""
    try:
        _check_config(argv)
        return flags.FLAGS(argv)
    except (configs.ConfigError, flags.Error) as error:
        _leave(f"error: {error}", EXIT_CONFIG)


def main(argv: list[str]) -> None:
    """Run the job that the config names; exit codes are listed in README."""
    if len(argv) > 1:
        _leave(
            f"error: unexpected arguments {argv[1:]}: want --config and --workdir",
            EXIT_CONFIG,
        )
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # libraries tell of every file closed
    if _DISTRIBUTED.value:
        import jax

        jax.distributed.initialize()
    config = _CONFIG.value
    why = None
    try:
        if config.job not in JOBS:
            configs.build(config)  # says which jobs there are
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
    if why is not None:
        _leave(*why)


def _check_config(argv: list[str]) -> None:
    """Holds --config and every --config.LEAF against the file, before absl reads them:
    its own errors are tracebacks."""
    line = "\n".join(argv[1:]) + "\n"
    found = re.search(r"^--?config[=\n](.*)$", line, re.MULTILINE)
    if found is None:
        return  # absl says that it is required
    tree = configs.read(found[1])
    for leaf in re.findall(r"^--?(?:no)?config\.([^=\n]+)", line, re.MULTILINE):
        configs.check_path(tree, leaf)


def _leave(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # A compilation may still hold a thread, and has nothing left to give.
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
