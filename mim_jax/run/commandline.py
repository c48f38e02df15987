# SPDX-License-Identifier: Apache-2.0
"""The command line that all programs share: --plugins and --config.

`parse` checks both before absl does, since absl reports mistakes as tracebacks.
"""

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


def _define_plugins(values: flags.FlagValues) -> flags.FlagHolder[list[str]]:
    about = "Modules to import before --config is read: they add plug-ins of yours."
    return flags.DEFINE_list("plugins", [], about, flag_values=values)


_PLUGINS = _define_plugins(flags.FLAGS)


def parse(argv: list[str]) -> list[str]:
    """Imports --plugins and parses all flags; a mistake ends the process with one line
    on stderr."""
    try:
        _import_plugins(argv)
        _check_config(argv)
        rest = flags.FLAGS(argv)
    except (configs.ConfigError, flags.Error) as error:
        leave(f"error: {error}", EXIT_CONFIG)
    if len(rest) > 1:
        leave(
            f"error: unexpected arguments {rest[1:]}: want flags only, --NAME=VALUE",
            EXIT_CONFIG,
        )
    tree = CONFIG.value
    if "plugins" in tree:
        # The config file may have loaded plug-ins of its own.
        tree.plugins = tuple(dict.fromkeys([*tree.plugins, *_PLUGINS.value]))
    return rest


def leave(message: str, code: int) -> NoReturn:
    """Prints the message on stderr and ends the process with this exit code."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # sys.exit would wait for threads that may still compile.
    os._exit(code)


def _import_plugins(argv: list[str]) -> None:
    """Imports the modules of --plugins; the config file may use what they register."""
    values = flags.FlagValues()
    plugins = _define_plugins(values)
    values(argv, known_only=True)
    configs.load_plugins(plugins.value)


def _check_config(argv: list[str]) -> None:
    """Checks that --config can be read and that every --config.LEAF exists in it."""
    line = "\n".join(argv[1:]) + "\n"
    found = re.search(r"^--?config[=\n](.*)$", line, re.MULTILINE)
    if found is None:
        return  # absl reports that it is required
    tree = configs.read(found[1])
    for leaf in re.findall(r"^--?(?:no)?config\.([^=\n]+)", line, re.MULTILINE):
        if leaf == "plugins":
            raise configs.ConfigError(
                "config.plugins records what --plugins=MODULE imports: want that flag"
            )
        configs.check_path(tree, leaf)
