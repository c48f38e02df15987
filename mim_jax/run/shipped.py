# SPDX-License-Identifier: Apache-2.0
"""The config files: those of the folder in which a job starts, and those that the
package ships."""

import importlib.util
import pathlib
from typing import Any

from mim_jax.schema import ConfigError, closest

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
    """Where the shipped config files lie: inside the package, or in a checkout beside
    it."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Names of the shipped config files, as `mae`."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem[0] != "_")


def find(name: str) -> pathlib.Path:
    """The config file of a name or a path.

    Args:
        name: a path; or the name of a shipped file, as `mae`. `configs/mae.py` is the
            shipped file, too, if there is no such path.
    Raises:
        ConfigError: there is none; says what there is, and where it looked.
    """
    path = pathlib.Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    by_name = path.suffix in ("", ".py") and str(path.parent) in (".", "configs")
    shipped = folder() / f"{path.stem}.py"
    if by_name and shipped.is_file():
        return shipped
    beside = path.parent if path.parent.is_dir() else pathlib.Path("configs")
    known = sorted({*(one.stem for one in beside.glob("*.py")), *names()})
    raise ConfigError(
        f"config file {name!r} is unknown{closest(path.stem, known)}; looked in "
        f"{path.parent.resolve()} and {folder()}; known: {', '.join(known)}"
    )


def load(path: pathlib.Path) -> Any:
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
