# SPDX-License-Identifier: Apache-2.0
"""Modules from outside that add plug-ins, imported by name.

Only the user's command line or program imports such a module. A run directory records
which modules its run had, and never imports them: it may come from somebody else.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any

from mim_jax.schema import ConfigError


def load_plugins(names: Iterable[str]) -> tuple[str, ...]:
    """Imports modules, which add rows by `mim_jax.config.register`.

    The flag `--plugins=my_module,my_package.other` calls this before it reads --config.
    Your own program writes the result into the tree, so that config.json records it:

        tree.plugins = config.load_plugins(["my_module"])

    Args:
        names: of modules that Python finds: with `python -m mim_jax.main` in the
            working directory, or in PYTHONPATH.
    Returns:
        The names, each once.
    Raises:
        ConfigError: there is no such module, or importing it fails.
    """
    if isinstance(names, str):
        raise ConfigError(f"load_plugins({names!r}): want a list, [{names!r}]")
    names = tuple(dict.fromkeys(names))
    for name in names:
        _import(name)
    return names


def check_imported(names: tuple[str, ...], path: str) -> None:
    """Checks that the modules which a config records are imported.

    Args:
        path: of the group that has the leaf `plugins`, for messages.
    Raises:
        ConfigError: one is not; names the flag that imports all of them.
    """
    for name in names:
        if not _is_module_name(name):
            raise ConfigError(f"{path}.plugins={names}: {name!r} is no module's name")
    missing = [name for name in names if name not in sys.modules]
    if missing:
        raise ConfigError(
            f"{path}.plugins={names}: {', '.join(missing)} is not imported, and a "
            f"config imports nothing itself; want --plugins={','.join(names)} on the "
            "command line if you trust this code, or config.load_plugins in a program"
        )


def _import(name: str) -> None:
    if name.endswith(".py") or not _is_module_name(name):
        module = name.removesuffix(".py").rsplit("/", 1)[-1]
        module = module if module.isidentifier() else "my_module"
        raise ConfigError(
            f"--plugins={name}: want the name of a module: --plugins={module} imports "
            f"{module}.py from the working directory or a folder of PYTHONPATH"
        )
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise ConfigError(_failure(name, error)) from error
        here = os.getcwd()
        does = "searches" if {"", here} & set(sys.path) else "does not search"
        raise ConfigError(
            f"--plugins={name}: there is no module {missing!r}; Python {does} the "
            f"working directory, {here}; PYTHONPATH adds other folders"
        ) from error
    except Exception as error:
        raise ConfigError(_failure(name, error)) from error


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and all(map(str.isidentifier, name.split(".")))


def _failure(name: str, error: Exception) -> str:
    """What went wrong while a module was imported, and at which line; one line."""
    if isinstance(error, ConfigError):
        return f"--plugins={name}: {error}"  # of `register`, which names the class
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{one.filename}:{one.lineno}" for one in frames if one.name == "<module>"]
    where = f" at {lines[-1]}" if lines else ""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return f"--plugins={name}: importing it fails{where}: {why}"
