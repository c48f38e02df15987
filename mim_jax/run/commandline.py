# SPDX-License-Identifier: Apache-2.0
"""The command line that all programs share: --plugins and --config.

`parse` checks both before absl does, since absl reports mistakes as tracebacks. It also
answers --help and --version itself, since absl's end with exit code 1.
"""

import os
import re
import sys
from typing import Any, NoReturn, TextIO, cast

import jax
from absl import flags
from ml_collections import config_flags

import mim_jax
from mim_jax import config as configs
from mim_jax.run import shipped
from mim_jax.trees import VariantError

EXIT_CONFIG = 2
_EXAMPLE = "    python -m mim_jax.main --config=mae:mnist --workdir=runs/mnist"

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "NAME or FILE.py, [:variant]; any leaf: --config.LEAF=VALUE"
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
        words = {word.lstrip("-") for word in argv[1:] if word.startswith("-")}
        if words & {"help", "helpfull", "helpshort", "h", "version"}:
            answer = versions() if "version" in words else overview()
            print(answer, flush=True)
            sys.exit(0)
        if len(argv) < 2:
            raise configs.ConfigError(f"no --config: want for example\n{_EXAMPLE}")
        argv = _with_path(argv)
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
    prefer(tree, given())
    return rest


def given() -> list[str]:
    """Paths of the leaves that the command line sets, such as "objective.pool"."""
    return sorted(config_flags.get_override_values(flags.FLAGS[CONFIG.name]))


def versions() -> str:
    """One line: the version of this package, and of JAX and Python."""
    python = sys.version.split()[0]
    return f"mim_jax {mim_jax.__version__}, jax {jax.__version__}, Python {python}"


def overview() -> str:
    """What --help prints: jobs, config files with their variants, plug-ins, flags."""
    lines = [versions(), "", "example", _EXAMPLE, "", "config files, by job"]
    by_job: dict[str, list[str]] = {}
    for name in shipped.names():
        module = shipped.load(shipped.find(name))
        (about, *_) = (module.__doc__ or name).splitlines()
        tree, variants = module.get_config(), ""
        try:
            module.get_config("?")
        except VariantError as error:
            variants = "".join(f" :{known}" for known in error.known)
        by_job.setdefault(tree.job, []).append(f"    {name:18s} {about}{variants}")
    for job, files in by_job.items():
        lines += [f"  {job}", *files]
    lines += ["", "plug-ins, as in --config=mae:cues,masking=grid"]
    for word, table in configs.KINDS.values():
        lines.append(f"    {word:18s} {', '.join(table)}")
    lines += ["", "flags of this program"]
    for where, own in flags.FLAGS.flags_by_module_dict().items():
        # A program's own flags have its path.
        if where.startswith("mim_jax.") or where == sys.argv[0]:
            lines += [f"    --{flag.name:16s} {flag.help}" for flag in own]
    return "\n".join(lines)


def leave(message: str, code: int) -> NoReturn:
    """Prints the message on stderr and ends the process with this exit code."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    # sys.exit would wait for threads that may still compile.
    os._exit(code)


def outlive_pipes() -> None:
    """Lets the program go on in silence when nobody reads its output any more, as after
    `| head -3`. What matters is in the files of the run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None:  # closed from the start
            setattr(sys, name, cast(TextIO, _Outliving(stream)))


class _Outliving:
    """A text stream that falls silent when its pipe is closed at the other end."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        # Below Python, since what its buffer still holds is flushed at the end, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def prefer(tree: configs.Tree, leaves: list[str]) -> None:
    """Lets neither another run nor the source decide these leaves, which a user set."""
    if "init_from" not in tree:
        return
    tree.init_from.data = tuple(
        part
        for part in tree.init_from.data
        if not any(f"{leaf}.".startswith(f"data.{part}.") for leaf in leaves)
    )
    if "objective.classes" in leaves:
        tree.count_classes = False


def _import_plugins(argv: list[str]) -> None:
    """Imports the modules of --plugins; the config file may use what they register."""
    values = flags.FlagValues()
    plugins = _define_plugins(values)
    values(argv, known_only=True)
    configs.load_plugins(plugins.value)


def _with_path(argv: list[str]) -> list[str]:
    """The arguments, with the path of the config file that --config names."""
    for place, word in enumerate(argv[1:], 1):
        found = re.fullmatch(r"(--?config)(?:=(.*))?", word, re.DOTALL)
        if found is None or (found[2] is None and place + 1 == len(argv)):
            continue
        own = found[2] is not None
        name, *variant = (found[2] if own else argv[place + 1]).split(":", 1)
        value = ":".join([str(shipped.find(name)), *variant])
        changed = [f"{found[1]}={value}"] if own else [word, value]
        return [*argv[:place], *changed, *argv[place + len(changed) :]]
    return argv


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
