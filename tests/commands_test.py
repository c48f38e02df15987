# SPDX-License-Identifier: Apache-2.0
"""Commands that pages show are understood: config file, variant, flags, leaves and the
types of their values. Nothing is run."""

import copy
import importlib.util
import pathlib
import re
import shlex
import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from mim_jax import config, main
from mim_jax.aot.step import plan_on
from mim_jax.run import commandline

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
_EMBEDDED = "mnist|photos|digits|cues|hierarchy|scenes"
# But for those with plug-ins that the page only speaks of.
_INLINE = r"`(--config=(?![^`]*(?:rank|checkerboard))[^`]+)`"
_PROGRAM = r"(?:\S*python3? -m mim_jax\.main|mim-jax)"


def blocks(text: str) -> list[str]:
    """Lines of indented code, each with those that a backslash continues."""
    joined = re.sub(r"\\\n\s+", "", text)
    return re.findall(r"^    (\S.*)$", joined, re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of each command of the main program on a page: those in blocks,
    and flags inside of sentences that begin with the config file."""
    found = []
    for path in PAGES:
        text = path.read_text()
        rests = [f"{one} --workdir=x" for one in re.findall(_INLINE, text)]
        for line in blocks(text):
            rests += re.findall(rf"{_PROGRAM}( --.*)$", line)
        for rest in rests:
            rest = rest.partition(" #")[0].partition(" && ")[0]
            if not any(word in rest for word in ("...", "NAME", "FILE")):
                found.append((path.name, rest.strip()))
    return found


COMMANDS = commands()


def parsed(arguments: str) -> config.Tree:
    """The config tree of a command, with the values that it sets."""
    words = shlex.split(arguments)
    argv = commandline._with_path(["main", *words])
    commandline._check_config(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for name, known in flags.FLAGS.flags_by_module_dict().items():
        if name in (main.__name__, commandline.__name__):
            for flag in known:
                if flag.name not in values:
                    values[flag.name] = copy.deepcopy(
                        flag
                    )  # the program's keeps its value
    rest = values(argv)
    assert rest == ["main"], f"not understood: {rest[1:]}"
    return values["config"].value


@pytest.mark.parametrize(
    "page, arguments",
    COMMANDS,
    ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)],
)
def test_a_command_of_a_page_is_understood(page, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "plugins"), *sys.path])
    if "--plugins" in arguments:
        # worked_examples_test.py runs those.
        return
    tree = parsed(arguments)
    assert tree.job in config.JOBS, page


def trainings() -> list[str]:
    """Arguments of each command that trains on data that the packages bring, and whose
    network no other run decides."""
    return list(
        {
            re.sub(r"--workdir=\S+", "--workdir=x", arguments): None
            for _, arguments in COMMANDS
            if re.search(rf"configs?[=/]\w+(\.py)?:({_EMBEDDED})", arguments)
            and not re.search("init_from|--plugins|study", arguments)
        }
    )


@pytest.mark.parametrize("arguments", trainings())
def test_a_training_of_a_page_can_be(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    tree = parsed(arguments)
    if tree.job == "train":
        plan, _ = plan_on(tree, jax.devices()[:1])
        assert plan.total > 0


def test_pages_have_commands_and_mistakes_are_seen():
    assert len(COMMANDS) > 30
    for mistake, error in (
        ("--config=configs/mae.py:mnits", config.ConfigError),
        ("--config=configs/mea.py", config.ConfigError),
        ("--config=configs/mae.py --config.stesp=3", config.ConfigError),
        ("--config=configs/mae.py --config.steps=many", Exception),
        ("--config=configs/mae.py --workdri=x", flags.Error),
    ):
        with pytest.raises(error):
            parsed(mistake)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_other_programs_that_a_page_runs_are_there(path):
    for line in blocks(path.read_text()):
        for name in re.findall(r"python3? -m ([\w.]+)", line):
            assert importlib.util.find_spec(name), f"{path.name}: {name}"
        for name in re.findall(r"\b((?:benchmarks|docs|launch)/\w+\.(?:py|sh))", line):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
