# SPDX-License-Identifier: Apache-2.0
"""The declared tables against the papers' own numbers and settings, and the kept pages
against the kept cells."""

import functools
import json
import pathlib
import re

import pytest

from mim_jax import config
from mim_jax.evals.base import Eval
from mim_jax.studies import STUDIES, cells, results
from mim_jax.studies.cells import Cells

ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "docs" / "studies"
EVALS = config.KINDS[Eval][1]
PAPERS = [study for study in STUDIES.values() if re.match(r"p[12]_", study.name)]
# The run of which a metric of the papers' tables is.
RUNS = {
    "FT Acc (%)": "finetune",
    "Lin. Prob Acc (%)": "probe",
    "10% FT Acc (%)": "10pct",
    "PSNR (dB)": "pretrain",
    "shape bias": "probe",
    "AP": "detect",
    "Acc (%)": "finetune",
    "linear probe acc (%)": "probe",
}


@functools.cache
def declared(name, size, seeds=(0,)):
    settings = config.RunStudy(
        study=name, size=size, seeds=seeds, recipes=str(ROOT / "configs")
    )
    return Cells([STUDIES[name]], settings, pathlib.Path("nowhere"))


def facts():
    """(study, row, column, fact) of every number of a full study."""
    for study in PAPERS:
        for row in study.rows:
            for column in study.columns:
                fact = study.fact(row, column)
                if fact is not None and study.full:
                    yield study, row, column, fact


@pytest.mark.parametrize("name", ["p1_table1", "p1_table4", "p2_table1"])
def test_a_kept_page_says_what_the_kept_cells_say(name):
    saved = json.loads((KEPT / name / "results.json").read_text())
    study, size = STUDIES[name], saved["size"]
    found = declared(study.name, size, tuple(saved["seeds"]))
    read = {
        cell.key: cells.read(KEPT / "cells", cell, size)
        for cell in found.of_study(study)
    }
    finished = {key: one for key, one in read.items() if one}
    told = results.gather(study, found, finished, {}, EVALS)
    values = 0
    for row in saved["rows"]:  # one way: cells may be newer than a page
        for title, number in row["numbers"].items():
            own = told.entries[row["row"], title].values
            for seed, value in number["values"].items():
                assert own.get(int(seed)) == pytest.approx(value), (row["row"], title)
                values += 1
    assert values > 50


def test_rows_train_as_many_epochs_as_the_paper_states():
    counted = 0
    for study, row, column, fact in facts():
        stated = re.search(
            r"(?:^|;)(?:pretrain=)?(\d+)ep\b|(?:^|;)(?:train_)?epochs=(\d+)",
            fact.setting,
        )
        # The epochs of a probe on an untrained encoder are the probe's own.
        untrained = column.run == "probe" and "pretrain" not in row.runs
        if not stated or untrained or column.run not in row.runs:
            continue
        training = row.runs.get("pretrain", row.runs[column.run])
        tree = declared(study.name, "full").of(training, 0).tree
        epochs = tree.epochs
        if tree.stop_after is not None:
            epochs = round(tree.stop_after * tree.batch_size / tree.epoch_images)
        assert epochs == int(stated[1] or stated[2]), (study.name, row.name)
        counted += 1
    assert counted > 80


def test_a_metric_of_the_paper_belongs_to_its_run():
    for study in PAPERS:
        for column in study.columns:
            if column.metric:
                known = (
                    run for one, run in RUNS.items() if column.metric.startswith(one)
                )
                assert column.run == next(known), (study.name, column.title)


def test_the_papers_own_numbers_lie_on_the_side_that_a_claim_asks():
    counted = 0
    for study in PAPERS:
        rows = {row.name: row for row in study.rows}
        columns = {column.title: column for column in study.columns}
        for one in (asked for claim in study.claims for asked in claim.compares):
            first, second = (
                study.fact(rows[name], columns[one.column])
                for name in (one.first, one.second)
            )
            if first and second:
                more = first.value - second.value
                holds = more > 0 if one.within is None else abs(more) <= one.within
                assert holds, (study.name, one)
                counted += 1
    assert counted > 50


def test_rows_of_methods_have_the_leaves_of_their_names():
    """Names are those of the papers' tables; what they mean is in their captions."""
    wanted = {
        ("p1_table1", "R-MAE"): {"t2": "complement"},
        ("p1_table1", "R-MAE dagger"): {"t2": "independent"},
        ("p1_table1", "R-MAE double dagger"): {"t2": "identity"},
        ("p1_table3", "class token"): {"tokens": "cls"},
        ("p1_table3", "average"): {"tokens": "avg"},
        ("p1_table3", "patch tokens"): {"tokens": "patch"},
        ("p1_table3", "patch and class tokens"): {"tokens": "patch+cls"},
        ("p1_table4", "MAE"): {"color_jitter": "none"},
        ("p1_table4", "MAE, jittered"): {"color_jitter": "whole"},
        ("p1_table4", "MAE, input jittered"): {"color_jitter": "input_only"},
        ("p1_table4", "C-MAE"): {"mask_token": True, "contrast": "infonce"},
        ("p1_table4", "C-MAE w/o mask token"): {"mask_token": False},
        ("p1_table4", "C-MAE, BYOL"): {"mask_token": True, "contrast": "byol"},
    }
    for (name, row), leaves in wanted.items():
        study = STUDIES[name]
        (found,) = (one for one in study.rows if one.name == row)
        pretrain = found.runs["finetune"].parent
        for size in ("full", study.small):
            objective = declared(study.name, size).of(pretrain, 0).tree.objective
            for leaf, value in leaves.items():
                assert objective[leaf] == value, (name, row, leaf)


def test_rows_of_table_5_have_the_augmentations_of_the_paper():
    counted = 0
    for study, row, column, fact in facts():
        stated = re.search(r"aug=([^;]*)", fact.setting)
        if study.name != "p1_table5" or not stated:
            continue
        words = set(stated[1].split("+"))
        pretrain = row.runs[column.run].parent
        if pretrain is None:
            continue
        for size in ("full", study.small):
            objective = declared(study.name, size).of(pretrain, 0).tree.objective
            where = (row.name, stated[1])
            assert (objective.masking.name != "none") == ("patch masking" in words), (
                where
            )
            assert objective.cutmix == ("cutmix" in words), where
            assert (objective.color_jitter != "none") == ("color" in words), where
        counted += 1
    assert counted == 16


@pytest.mark.parametrize("name", ["p1_table4", "p1_table8"])
def test_each_seed_draws_its_own_few_images(name):
    study = STUDIES[name]
    found = declared(study.name, study.small, (0, 1))
    few = [
        cell.tree.data.source
        for cell in found.of_study(study)
        if cell.tree.data.source.name == "few"
    ]
    assert {source.seed for source in few} == {0, 1}
    for cell in found.of_study(study):
        if cell.tree.data.source.name == "few":
            assert cell.tree.data.source.seed == cell.seed
