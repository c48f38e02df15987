# SPDX-License-Identifier: Apache-2.0
"""The page of all claims: each claim of the papers, the study that asks it, the answer
with its intervals, and its limits."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from mim_jax.run import files
from mim_jax.studies.grid import Claim, Difference, Study
from mim_jax.studies.page import comparison
from mim_jax.studies.results import FAILS, HOLDS, MISSING, UNKNOWN, Estimate

PAPERS = {
    "2208.04164": "P1: masked image modelling learns occlusion-invariant features",
    "2306.04898": "P2: MAE identifies the latent variables of a hierarchical model",
}
_INTRODUCTION = """\
# Claims

What the papers say, and what our studies found. `python -m mim_jax.main` with a study's
config writes this page anew from the `results.json` of every study that is there.

A claim holds if the 95 % interval of every paired difference over seeds lies on the
claimed side; it does not hold if one lies wholly on the other; else it cannot be told
at this scale ([studies.md](studies.md)). With one seed, or where only figures can
decide, it cannot be told either. It is not measured while a comparison has no number,
unless another one shows that it does not hold. The intervals are not corrected for the
number of comparisons: of a hundred that compare equals, about five miss 0 by chance.
The embedded studies have small networks and small images of digits, drawn shapes,
scenes or a known hierarchy: their answers are of that size, not of ImageNet.
"""


def write(studies: Iterable[Study], folder: pathlib.Path, page: pathlib.Path) -> None:
    """Write the page of the claims of all studies.

    Args:
        studies: those whose claims are shown, in this order.
        folder: in which each study that has run has a folder with results.json.
        page: the file; it may lie above `folder`.
    """
    files.write(page, "\n".join(_lines(list(studies), folder, page.parent)) + "\n")


def _lines(
    studies: list[Study], folder: pathlib.Path, home: pathlib.Path
) -> Iterator[str]:
    found = {study.name: _results(study, folder) for study in studies}
    yield _INTRODUCTION
    yield from _summary(studies, found)
    papers = dict.fromkeys([*PAPERS, *(study.paper for study in studies)])
    for paper in papers:
        own = [study for study in studies if study.paper == paper and study.claims]
        if not own:
            continue
        yield ""
        yield f"## {PAPERS.get(paper, '')} ([arXiv:{paper}](https://arxiv.org/abs/{paper}))"
        for study in own:
            yield ""
            yield f"### {study.title}"
            if not found[study.name]:
                yield ""
                yield f"`configs/study_{study.name}.py` has no page yet."
                yield ""
                for claim in study.claims:
                    yield f"* **{MISSING.capitalize()}**: {claim.text} ({claim.where})"
            for path, results in found[study.name]:
                yield ""
                yield from _study(study, results, path.parent.relative_to(home))


def _results(
    study: Study, folder: pathlib.Path
) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """What a study found, at each size at which it has run, its own embedded one
    first."""
    paths = [folder / study.name / "results.json"]
    paths += sorted(folder.glob(f"{study.name}-*/results.json"))
    return [(path, files.read_json(path)) for path in paths if path.exists()]


def _summary(studies: list[Study], found: dict[str, list]) -> Iterator[str]:
    """How many claims have which answer."""
    told = [
        claim["answer"]
        for study in studies
        for _, results in found[study.name][:1]
        for claim in results["claims"]
    ]
    declared = sum(len(study.claims) for study in studies)
    counts = [f"{one} {told.count(one)}" for one in (HOLDS, FAILS, UNKNOWN)]
    waiting = declared - sum(told.count(one) for one in (HOLDS, FAILS, UNKNOWN))
    yield f"Answers to {declared} claims: {', '.join(counts)}, {MISSING} {waiting}."


def _study(
    study: Study, results: dict[str, Any], folder: pathlib.Path
) -> Iterator[str]:
    told = ""
    if cells := results.get("cells"):  # files of earlier versions do not count them
        told = f": {cells['finished']} of {cells['wanted']} cells finished"
    yield (
        f"[Table and figures]({folder.as_posix()}/README.md) at size "
        f"`{results['size']}`{told}."
    )
    yield ""
    for saved in results["claims"]:
        claim = Claim(
            text=saved["claim"],
            where=saved["where"],
            compares=tuple(_asked(one) for one in saved["compares"]),
        )
        yield f"* **{saved['answer'].capitalize()}**: {claim.text} ({claim.where})"
        if not claim.compares:
            yield "    * no number decides it: see the figures"
        for asked, one in zip(claim.compares, saved["compares"], strict=True):
            difference = one["difference"] and Estimate(**one["difference"])
            yield f"    * {comparison(study, asked, difference, one['answer'])}"
    if study.notes:
        yield ""
        yield f"Limits: {' '.join(study.notes)}"


def _asked(saved: dict[str, Any]) -> Difference:
    """A comparison, from results.json."""
    return Difference(**{key: saved[key] for key in Difference.__dataclass_fields__})
