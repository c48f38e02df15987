# SPDX-License-Identifier: Apache-2.0
"""Pages, config headers and scripts name leaves, files and sections that are there."""

import dataclasses
import functools
import pathlib
import re

import pytest

import mim_jax
from mim_jax import config, schema
from mim_jax.data.input import Input
from mim_jax.objectives.base import Objective

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TEXTS = [*PAGES, *ROOT.glob("configs/*.py"), *ROOT.glob("launch/*.sh")]
_GROUPS = "checkpoint|data|eval|init_from|mesh|objective|optim|report"
# A leaf on the command line; a leaf in backticks, as `objective.masking.ratio=.5`.
_FLAG = re.compile(r"--config\.([a-z][\w.]*\w)")
_LEAF = re.compile(rf"`((?:{_GROUPS})\.[a-z_0-9.]*[a-z0-9])[`=]")

named = functools.partial(pytest.mark.parametrize, ids=lambda path: path.name)


def leaves(cls: type, depth: int = 5) -> set[str]:
    """Paths of all groups and leaves below a class, whichever plug-ins are chosen."""
    found = set()
    for field in schema.leaf_fields(cls):
        found.add(field.name)
        kind: type = field.type  # pyright: ignore[reportAssignmentType]
        below = [kind] if dataclasses.is_dataclass(kind) else []
        if kind in config.KINDS:
            below = config.KINDS[kind][1].values()
        for one in below if depth else []:
            found |= {f"{field.name}.{name}" for name in leaves(one, depth - 1)}
    return found


@functools.cache
def known() -> set[str]:
    return set().union(*(leaves(job) for job in config.JOBS.values()))


@named("path", TEXTS)
def test_leaves_that_a_text_names_are_there(path):
    text = path.read_text()
    for leaf in {*_FLAG.findall(text), *_LEAF.findall(text)}:
        *_, last = leaf.split(".")
        method = hasattr(Objective, last) or hasattr(Input, last)
        if last not in ("md", "py") and not method:
            assert leaf in known(), f"{path.name}: there is no config.{leaf}"


def anchor(title: str) -> str:
    """The name that GitHub gives a section."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@named("path", PAGES)
def test_links_of_a_page_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        file, _, section = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), f"{path.name}: {link}"
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert section in map(anchor, titles), f"{path.name}: {link}"


@named("path", PAGES)
def test_files_of_the_package_that_a_page_names_are_there(path):
    for name in re.findall(
        r"`((?:mim_jax|benchmarks|configs|launch|tests)/[\w./]+)`", path.read_text()
    ):
        if "NAME" not in name and "simmim" not in name:  # those are yours
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_modules_that_a_page_names_are_there():
    for path in PAGES:
        if path.name == "CHANGELOG.md":  # which names those of before, too
            continue
        for name in re.findall(r"`(mim_jax(?:\.\w+)+)`", path.read_text()):
            parts = name.split(".")
            places = [ROOT.joinpath(*parts[:n]) for n in range(len(parts), 0, -1)]
            assert (
                any(
                    place.is_dir() or place.with_suffix(".py").exists()
                    for place in places[:-1]
                )
                or parts[1] in mim_jax.__all__
            ), f"{path.name}: {name}"
