# SPDX-License-Identifier: Apache-2.0
"""The command line that all programs share: --config, checked before absl reads it."""

import os
import re
import sys
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from mim_jax import config as configs

EXIT_CONFIG = 2

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/FILE.py[:variant]; any leaf: --config.LEAF=VALUE"
)
flags.mark_flag_as_required("config")


def parse(argv: list[str]) -> list[str]:
    """Reads the command line; says in one line what is wrong with it, and leaves."""
    try:
        _check_config(argv)
        rest = flags.FLAGS(argv)
    except (configs.ConfigError, flags.Error) as error:
        leave(f"error: {error}", EXIT_CONFIG)
    if len(rest) > 1:
        leave(
            f"error: unexpected arguments {rest[1:]}: want flags only, --NAME=VALUE",
            EXIT_CONFIG,
        )
    return rest


def leave(message: str, code: int) -> NoReturn:
    """Ends the process with a line on stderr."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # A compilation may still hold a thread, and has nothing left to give.
    os._exit(code)


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
