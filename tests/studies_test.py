# SPDX-License-Identifier: Apache-2.0
"""Studies: what they declare, which cells are the same, what their numbers say."""

import base64
import copy
import dataclasses
import functools
import json
import pathlib
import statistics
import tracemalloc
import zlib

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from mim_jax import config
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.tfds import Tfds
from mim_jax.evals.base import Eval
from mim_jax.evals.report import Number
from mim_jax.maskings.base import Masking
from mim_jax.plan import Plan
from mim_jax.studies import (
    STUDIES,
    cells,
    claims,
    facts,
    job,
    packing,
    page,
    results,
    runs,
    work,
)
from mim_jax.studies.cells import Cells, Finished, Measured
from mim_jax.studies.grid import (
    Claim,
    Column,
    Difference,
    Drawn,
    Lines,
    Measure,
    Row,
    Study,
    Training,
)
from mim_jax.trees import Trees

ROOT = pathlib.Path(__file__).parents[1]
EVALS = config.KINDS[Eval][1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings(size="digits", study="p1_table1", **leaves) -> config.RunStudy:
    return config.RunStudy(**{"study": study, "size": size, "seeds": (0,), **leaves})


def cells_of(*studies) -> Cells:
    return Cells(studies, settings("digits"), pathlib.Path("nowhere"))


@functools.cache
def all_cells(size: str) -> Cells:
    own = [one for one in STUDIES.values() if one.small == size]
    own = own or [one for one in STUDIES.values() if one.full]
    return Cells(own, settings(size), pathlib.Path("nowhere"))


def distinct(size: str) -> list[cells.Cell]:
    """Cells whose configs differ in more than the run that they begin with."""
    found = all_cells(size).by_key.values()
    return list({repr(cells.decisive(one.tree)): one for one in found}.values())


# The papers' numbers.


def test_every_number_of_the_papers_stands_beside_a_row():
    cited = {
        study.fact(row, column)
        for study in STUDIES.values()
        for row in study.rows
        for column in study.columns
    } - {None}
    assert len(facts.facts()) == 158
    assert cited == set(facts.facts())


def test_a_number_that_is_not_printed_is_told_from_one_that_is_misspelt():
    where = (facts.P1, "1")
    assert facts.find(*where, "R-MAE", "", "PSNR (dB)").value == 23.7
    assert facts.find(*where, "DINO", "", "PSNR (dB)") is None  # a dash there
    for asked, message in (
        (("R-MEA", "", "PSNR (dB)"), "no row 'R-MEA'"),
        (("R-MAE", "", "PSNR"), None),  # "PSNR (dB)" begins with that word
        (("R-MAE", "", "SSIM"), "no metric 'SSIM'"),
        (("Random Init", "", "FT Acc (%)"), "2 numbers of 'Random Init'"),
        (("Random Init", "epochs=3", "FT Acc (%)"), "no row 'Random Init'"),
    ):
        if message is None:
            assert facts.find(*where, *asked).value == 23.7
            continue
        with pytest.raises(LookupError, match=message.replace("(", r"\(")):
            facts.find(*where, *asked)


# What is declared.


# All cells are slow; each change tries one in forty.
some_cells = pytest.mark.parametrize(
    "step", [40, pytest.param(1, marks=pytest.mark.slow)]
)


@some_cells
@pytest.mark.parametrize("size", ["mnist", "cues", "hierarchy", "scenes"])
def test_every_cell_of_every_study_has_a_plan(size, step):
    """Or is not defined, which only units that are too few can cause."""
    for cell in [*distinct(size)][::step]:
        if cell.undefined:
            assert "unit" in cell.undefined, cell.name
            continue
        plan = Plan.of(cell.tree, jax.devices()[:1])
        assert plan.stop <= plan.total <= 4000, cell.name
        assert plan.settings.seed == cell.seed


@some_cells
def test_every_cell_has_a_plan_at_the_size_of_the_paper(monkeypatch, step):
    # Stands for a prepared ImageNet: its length, channels and labels, and no image.
    monkeypatch.setattr(Tfds, "__post_init__", lambda self: None)
    monkeypatch.setattr(Tfds, "__len__", lambda self: 1281167)
    monkeypatch.setattr(Tfds, "channels", 3)
    monkeypatch.setattr(Tfds, "classes", tuple(map(str, range(1000))))
    monkeypatch.setattr(Tfds, "fingerprint", lambda self: {"dataset": self.dataset})
    labels = np.arange(1281167) % 1000
    monkeypatch.setattr(Tfds, "labels", lambda self: labels)
    monkeypatch.setattr(Coco, "__post_init__", lambda self: None)
    monkeypatch.setattr(Coco, "__len__", lambda self: 117266)
    monkeypatch.setattr(Coco, "object_classes", tuple(map(str, range(80))))
    assert len(all_cells("full").by_key) > 100
    for cell in [*distinct("full")][::step]:
        assert not cell.undefined, cell.name
        plan = Plan.of(cell.tree, jax.devices()[:1], stand_in=True)
        side = 1024 if "detect" in cell.name else 224
        assert plan.settings.data.image_size == (side, side), cell.name


def test_an_mae_that_many_studies_name_is_one_cell():
    found = all_cells("mnist")
    by_study = {
        study.name: {cell.key for cell in found.of_study(study)}
        for study in found.studies
    }
    (mae,) = {found.of(runs.MAE, 0).key}
    sharing = {name for name, keys in by_study.items() if mae in keys}
    assert {"p1_table1", "p1_table4", "p1_figure1", "p2_table1", "p2_grid"} <= sharing
    measures = found.by_key[mae].measures
    assert {"knn", "cka", "cka_untrained", "reconstruction", "tsne"} <= set(measures)


@pytest.mark.parametrize("size", ["full", "small"])
def test_neighbours_are_searched_among_the_same_images_for_all_rows(size):
    # The bank of the neighbours is what the run was trained on: ten images and a
    # thousand give shares that say nothing beside each other.
    for study in STUDIES.values():
        for column in study.columns:
            if column.measure.eval == "knn":
                trained = [row.runs.get(column.run) for row in study.rows]
                banks = {repr(one.few_at(size)) for one in trained if one}
                assert len(banks) == 1, (study.name, column.title, banks)


def test_each_study_has_a_file_that_names_it_at_its_sizes():
    files = {path.stem for path in (ROOT / "configs").glob("study_*.py")}
    assert files == {f"study_{name}" for name in STUDIES}
    assert len(files) >= 15
    for name, study in STUDIES.items():
        sizes = ("full", study.small) if study.full else (study.small,)
        if study.full and study.small == "mnist":
            sizes = (*sizes, "digits")
        for size in sizes:
            variant = "" if size == "full" else f":{size}"
            built = config.build(config.read(f"configs/study_{name}.py{variant}"))
            assert (built.study, built.size) == (name, size)


def test_cells_that_are_kept_are_those_of_the_present_configs():
    """A leaf that is new, and changes nothing that is learned, keeps their names."""
    kept = {path.stem for path in (ROOT / "docs/studies/cells").glob("*-s0-*.json")}
    known = {
        cell.name
        for size in ("mnist", "cues", "hierarchy", "scenes")
        for cell in all_cells(size).by_key.values()
    }
    assert kept and kept <= known


def test_a_study_of_one_size_refuses_others(tmp_path):
    tree = config.read("configs/study_p2_theorem2.py")
    assert tree.size == "hierarchy"
    tree.size = "mnist"
    with pytest.raises(config.ConfigError, match="p2_theorem2 has size 'hierarchy'"):
        job.run(tree, tmp_path / "studies" / "one")
    assert not list(tmp_path.iterdir())


def test_a_cell_says_what_its_masks_really_hide():
    found = all_cells("mnist")
    grid = STUDIES["p2_grid"]
    rows = {(row.at["ratio"], row.at["unit"]): row for row in grid.rows}

    def hidden(ratio, unit):
        return found.of(rows[ratio, unit].runs["pretrain"], 0)

    # 8 x 8 patches, in 64, 16 and 4 units; the visible ones are rounded down.
    assert hidden(0.1, 1).hidden_share == pytest.approx(7 / 64)
    assert hidden(0.9, 1).hidden_share == pytest.approx(58 / 64)
    assert hidden(0.9, 2).hidden_share == pytest.approx(15 / 16)
    assert hidden(0.1, 4).hidden_share == pytest.approx(1 / 4)
    assert "leaves 0 of 4 units visible" in hidden(0.9, 4).undefined
    probe = found.of(rows[0.9, 4].runs["probe"], 0)
    assert probe.undefined == hidden(0.9, 4).undefined  # it has no run to begin with


def test_a_study_that_contradicts_itself_is_refused():
    column = Column(title="a", run="pretrain", measure=runs.KNN, keys=("x",))
    row = Row(name="r", runs={"pretrain": runs.MAE})
    good = dict(name="n", title="t", paper="p", columns=(column,), rows=(row,))
    Study(**good)
    claim = Claim(
        text="", where="", compares=(Difference(first="r", second="s", column="a"),)
    )
    wrong = dataclasses.replace(column, title="b", run="pretrian")
    for changes, message in (
        (dict(rows=(row, row)), "row 'r' stands twice"),
        (dict(claims=(claim,)), "a claim compares 's'"),
        (dict(columns=(column, wrong)), "measures run 'pretrian'"),
    ):
        with pytest.raises(ValueError, match=message):
            Study(**(good | changes))
    other = dataclasses.replace(runs.KNN, settings=dict(k=(3,)))
    clash = dataclasses.replace(column, measure=other)
    with pytest.raises(config.ConfigError, match="measure 'knn' of .* other settings"):
        cells_of(Study(**good), Study(**(good | dict(columns=(clash,)))))


# Keys.


def mae_cell(**leaves):
    training = Training(recipe="mae", leaves=leaves)
    return cells_of().of(training, 0)


def test_a_key_ignores_free_leaves_and_knows_all_others():
    plain = mae_cell()
    same = ("log.every", "checkpoint.every", "data.workers", "profile")
    for leaf, value in zip(same, (7, 7, 3, "2:1"), strict=True):
        assert mae_cell(**{leaf: value}).key == plain.key, leaf
    other = ("steps", "objective.masking.ratio", "optim.b2", "data.flip", "scan")
    keys = {plain.key}
    for leaf, value in zip(other, (7, 0.5, 0.9, True, True), strict=True):
        keys.add(mae_cell(**{leaf: value}).key)
    # Free on resuming, and yet it decides which parameters a run ends with.
    keys.add(mae_cell(stop_after=7).key)
    assert len(keys) == 2 + len(other)


def test_a_key_knows_the_seed_and_the_run_that_another_begins_with():
    found = cells_of()
    tuned = runs.finetune(runs.MAE)
    keys = {found.of(tuned, seed).key for seed in (0, 1)}
    keys.add(found.of(runs.finetune(runs.RMAE), 0).key)
    assert len(keys) == 3
    # Where the parent's run directory lies does not matter.
    moved = Cells([], settings(), pathlib.Path("elsewhere"))
    assert moved.of(tuned, 0).key in keys
    assert "elsewhere" in moved.of(tuned, 0).tree.init_from.run


def test_a_leaf_that_a_later_version_adds_changes_no_key():
    frozen = dataclasses.dataclass(frozen=True, kw_only=True)

    @frozen
    class Part:
        width: int = 1

    @frozen
    class Job:
        part: Part = Part(width=2)
        steps: int = 5

    @frozen
    class LaterPart:
        width: int = 1
        new: float = 0.5

    @frozen
    class LaterJob:
        part: LaterPart = LaterPart(width=2)
        steps: int = 5
        also_new: str = ""

    found = []
    for one in (Job, LaterJob):
        trees = Trees({}, {"job": one})
        tree = trees.experiment("job")
        assert trees.changed(tree) == {}
        tree.part.width, tree.steps = 3, 6
        found.append(trees.changed(tree))
    assert found[0] == found[1] == {"config.part.width": 3, "config.steps": 6}


def test_changed_leaves_are_told_from_the_defaults_of_the_plug_in_that_is_chosen():
    tree = config.experiment("train", objective="mae", source="digits")
    before = config.changed(tree)
    with tree.objective.unlocked():
        tree.objective.masking = config.choose(Masking, "grid", cell=4)
    new = {k: v for k, v in config.changed(tree).items() if k not in before}
    assert new == {
        "config.objective.masking.name": "grid",
        "config.objective.masking.cell": 4,
    }


# Files of cells.


def measured_of(cell, **numbers) -> dict[str, Measured]:
    found = {
        key: Number(value, "share", 9, (0.1, 0.9)) for key, value in numbers.items()
    }
    curve = np.linspace(0, 1, 3)
    return {"knn": Measured(found, {"curve": curve})}


ABOUT = dict(
    minutes=1.0,
    resumed=False,
    processor="slow",
    devices="1 x cpu",
    versions=dict(mim_jax="0", jax="0"),
)


def one_cell(**leaves):
    cell = mae_cell(**leaves)
    cell.measures["knn"] = runs.KNN
    return cell


def test_a_file_gives_back_what_was_measured(tmp_path):
    cell = one_cell()
    assert cells.read(tmp_path, cell, "digits") is None
    path = cells.write(tmp_path, cell, "digits", ABOUT, measured_of(cell, a=0.25))
    assert not list(tmp_path.glob("*.tmp"))
    found = cells.read(tmp_path, cell, "digits")
    assert found is not None and not found.lacks(cell)
    assert found.measured["knn"].numbers == {"a": Number(0.25, "share", 9, (0.1, 0.9))}
    np.testing.assert_allclose(found.measured["knn"].arrays["curve"], [0, 0.5, 1])
    saved = json.loads(path.read_text())
    # The whole config, as a run directory has it.
    assert not config.difference(config.filled(saved["config"], "x"), cell.tree)


def test_a_file_of_another_config_is_not_used(tmp_path):
    cell = one_cell()
    path = cells.write(tmp_path, cell, "digits", ABOUT, measured_of(cell, a=0.25))
    saved = json.loads(path.read_text())
    saved["config"]["optim"]["b2"] = 0.5  # as if that default had changed since
    path.write_text(json.dumps(saved))
    assert cells.read(tmp_path, cell, "digits") is None
    # A leaf that the file lacks has its default.
    saved["config"]["optim"]["b2"] = cell.tree.optim.b2
    del saved["config"]["optim"]["eps"]
    path.write_text(json.dumps(saved))
    assert cells.read(tmp_path, cell, "digits") is not None
    path.write_text("{")
    with pytest.raises(config.ConfigError, match="want it removed"):
        cells.read(tmp_path, cell, "digits")


BOMB = base64.b64encode(zlib.compress(bytes(10**7))).decode()


def array(**changes):
    return {"shape": [2], "dtype": "<f4", "list": [0, 1]} | changes


@pytest.mark.parametrize(
    "place, value",
    [
        ("numbers/a/value", "1e3 <script>"),
        ("numbers/a/value", True),
        ("numbers/a/n", "many"),
        ("numbers/a/unit", ["share"]),
        ("numbers/a/interval", [0.1, "0.9"]),
        ("numbers/a/interval", [0.1]),
        ("missing", {"why": 1}),
        ("arrays/curve", array(dtype="O")),
        ("arrays/curve", array(dtype="V8")),
        ("arrays/curve", array(shape=[3])),
        ("arrays/curve", {"shape": [2], "dtype": "<f4", "zlib": BOMB}),
        ("arrays/curve", {"shape": [2], "dtype": "<f4", "zlib": "AAAA"}),
        ("arrays/curve", array(shape=[-1])),
        ("arrays/curve", array(shape=[2.0])),
        ("arrays/curve", array(list=[[0], [1]])),
        ("/minutes", "1"),
        ("/processor", ["slow"]),
        ("/versions", {"jax": 1}),
        ("/versions", []),
    ],
)
def test_a_file_of_somebody_elses_making_is_refused(tmp_path, place, value):
    cell = one_cell()
    path = cells.write(tmp_path, cell, "digits", ABOUT, measured_of(cell, a=0.25))
    saved = json.loads(path.read_text())
    node = saved["measured"]["knn"]
    if place.startswith("/"):
        node, place = saved, place[1:]
    *above, last = place.split("/")
    for part in above:
        node = node[part]
    node[last] = value
    path.write_text(json.dumps(saved))
    with pytest.raises(config.ConfigError, match="is no file of a cell .*want it rem"):
        cells.read(tmp_path, cell, "digits")


@pytest.mark.parametrize(
    "packed",
    [
        {"shape": [2], "dtype": "<f4", "zlib": BOMB},
        {"shape": [-1], "dtype": "|u1", "zlib": BOMB},  # as many as there are
        {"shape": [10**7], "dtype": "<f8", "zlib": BOMB},  # honest, and 80 MB
        {"shape": [2], "dtype": "<U10000000", "list": ["a", "b"]},  # 80 MB of zeros
        {"shape": [1], "dtype": "<U1000000", "list": [["a"] * 20]},
    ],
)
def test_an_array_takes_little_memory_whatever_its_file_claims(packed):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            packing.unpack(packed)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_what_cannot_be_unpacked_is_not_packed():
    with pytest.raises(ValueError, match="80000000 bytes, want at most 67108864"):
        packing.pack(np.zeros(10**7))


def test_a_run_that_somebody_trained_on_is_not_the_cells(tmp_path):
    cell = one_cell()
    folder = tmp_path / cell.name
    folder.mkdir()
    (folder / "trained").write_text(cell.key)
    assert not work.is_trained(folder, cell)  # nothing is there
    tree = copy.deepcopy(cell.tree)
    tree.data.workers = 0  # which changes nothing that is learned
    (folder / "config.json").write_text(config.dumps(tree))
    assert work.is_trained(folder, cell)
    tree.steps = tree.steps + 1
    (folder / "config.json").write_text(config.dumps(tree))
    assert not work.is_trained(folder, cell)
    (folder / "config.json").write_text("no JSON")
    assert not work.is_trained(folder, cell)


def test_other_settings_of_a_measure_are_measured_anew(tmp_path):
    cell = one_cell()
    cells.write(tmp_path, cell, "digits", ABOUT, measured_of(cell, a=0.25))
    cell.measures["knn"] = dataclasses.replace(runs.KNN, settings=dict(k=(3,)))
    cell.measures["absent"] = Measure(name="absent", eval="not_here")
    found = cells.read(tmp_path, cell, "digits")
    assert found is not None and found.measured == {}
    assert found.lacks(cell) == ["knn"]  # nobody can measure the other


def test_a_fine_tuning_file_names_its_parent_and_no_folder_of_this_machine(tmp_path):
    found = Cells([], settings(), tmp_path / "runs")
    cell = found.of(runs.finetune(runs.MAE), 0)
    path = cells.write(tmp_path, cell, "digits", ABOUT, {})
    text = path.read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["config"]["init_from"]["run"] == cell.parent.name
    assert cells.read(tmp_path, cell, "digits") is not None


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=np.uint8),
        np.array([[True], [False]]),
        np.array(["a", "bc"]),
        np.array(0.5),
        np.random.default_rng(0).integers(0, 255, (3, 20, 20, 1)).astype(np.uint8),
        np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_survive_json(array):
    packed = json.loads(json.dumps(packing.pack(array)))
    found = packing.unpack(packed)
    assert found.shape == array.shape and found.dtype.kind == array.dtype.kind
    np.testing.assert_array_equal(found, array)
    with pytest.raises(TypeError, match="dtype=object"):
        packing.pack(np.array([None]))


# Statistics.


def test_means_and_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 7):
        values = rng.normal(5, 2, n)
        found = results.estimate(values.tolist())
        assert found.n == n and found.mean == pytest.approx(values.mean())
        assert found.deviation == pytest.approx(stats.tstd(values))
        want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert found.interval == pytest.approx((want.low, want.high))
    assert results.estimate([4.0]) == (4.0, None, 1, None)


@pytest.mark.parametrize(
    ("values", "within", "want"),
    [
        ([1.0, 1.2, 0.8], None, results.HOLDS),
        ([-1.0, -1.2, -0.8], None, results.FAILS),
        ([1.0, -1.2, 0.8], None, results.UNKNOWN),
        ([1.0], None, results.UNKNOWN),
        ([0.1, 0.2, 0.0], 1.0, results.HOLDS),
        ([-0.1, -0.2, 0.0], 1.0, results.HOLDS),
        ([1.5, 1.6, 1.4], 1.0, results.FAILS),
        ([-1.5, -1.6, -1.4], 1.0, results.FAILS),
        ([0.5, 1.5, 0.2], 1.0, results.UNKNOWN),
        ([], None, results.MISSING),
    ],
)
def test_an_answer_is_that_of_the_interval(values, within, want):
    found = results.estimate(values) if values else None
    assert results.answer(found, within) == want


def test_a_claim_holds_if_all_its_comparisons_do():
    holds, fails, unknown = results.HOLDS, results.FAILS, results.UNKNOWN
    assert results.verdict([holds, holds]) == holds
    assert results.verdict([holds, unknown]) == unknown
    assert results.verdict([holds, fails, unknown]) == fails
    assert results.verdict([holds, results.MISSING]) == results.MISSING
    assert results.verdict([]) == unknown  # a picture decides


# Results and page.

ABSENT = Measure(name="absent", eval="not_here")
ACCURACY = Column(
    title="10-NN, %", run="pretrain", measure=runs.KNN, keys=("accuracy_model_k10",)
)
SAMPLE = Study(
    name="sample",
    title="A sample",
    paper=facts.P1,
    table="1",
    small="digits",
    columns=(
        dataclasses.replace(ACCURACY, metric="FT Acc (%)"),
        dataclasses.replace(ACCURACY, title="new", measure=ABSENT),
    ),
    rows=(
        Row(name="a", runs={"pretrain": runs.MAE}, paper="R-MAE", at={"x": 1}),
        Row(name="b", runs={"pretrain": runs.RMAE}, at={"x": 2}),
        Row(
            name="none",
            runs={
                "pretrain": runs.MAE.but(
                    leaves={
                        "objective.masking.ratio": 0.9,
                        "objective.masking.unit": 4,
                    }
                )
            },
        ),
        Row(name="CAE", paper="CAE", missing="it is not here"),
    ),
    claims=(
        Claim(
            text="a is better.",
            where="here",
            compares=(Difference(first="a", second="b", column=ACCURACY.title),),
        ),
    ),
    figures=(Lines(x="x", columns=(ACCURACY.title,)),),
)


@pytest.fixture(scope="module")
def sample():
    """Three seeds of one row, two of another, which is paired in two."""
    found = Cells(
        [SAMPLE], settings(seeds=(0, 1, 2), recipes=str(ROOT / "configs")), ROOT
    )
    shares = {"a": {0: 0.50, 1: 0.52, 2: 0.90}, "b": {0: 0.40, 1: 0.41}}
    finished = {}
    for row in SAMPLE.rows[:2]:
        for seed, share in shares[row.name].items():
            cell = found.of(row.runs["pretrain"], seed)
            number = {"accuracy_model_k10": Number(share, "share")}
            finished[cell.key] = Finished(ABOUT, {"knn": Measured(number, {})})
    failed = {found.of(runs.RMAE, 2).key: "the disk is full (exit code 4)"}
    return results.gather(SAMPLE, found, finished, failed, EVALS)


def test_rows_are_compared_seed_by_seed(sample):
    (told,) = (sample.compared(one) for one in SAMPLE.claims[0].compares)
    want = stats.ttest_rel([50.0, 52.0], [40.0, 41.0])
    assert told.difference.n == 2
    assert told.difference.mean == pytest.approx(10.5)
    interval = want.confidence_interval(0.95)
    assert told.difference.interval == pytest.approx((interval.low, interval.high))
    assert told.answer == results.HOLDS


def test_what_is_missing_has_its_reason(sample):
    reasons = {where: entry.missing for where, entry in sample.entries.items()}
    title = ACCURACY.title
    assert reasons["a", title] == ""
    assert reasons["b", title] == "failed: the disk is full (exit code 4)"
    assert reasons["none", title].startswith("not defined: ratio=0.9 leaves 0 of")
    assert reasons["CAE", title] == "it is not here"
    assert reasons["a", "new"] == "this version has no evaluation 'not_here'"
    assert sample.entries["a", title].paper == 82.7


def test_a_number_that_an_evaluation_does_not_give_is_said_so():
    column = dataclasses.replace(ACCURACY, keys=("accuracy_model_k10", "loss_of_c"))
    study = dataclasses.replace(SAMPLE, columns=(column,), claims=(), figures=())
    found = Cells([study], settings(seeds=(0,), recipes=str(ROOT / "configs")), ROOT)
    measured = {"knn": Measured({"accuracy_model_k10": Number(0.5, "share")}, {})}
    finished = {found.of(runs.MAE, 0).key: Finished(ABOUT, measured)}
    told = results.gather(study, found, finished, {}, EVALS).entries["a", column.title]
    assert not told.values
    assert told.missing == (
        "knn does not give accuracy_model_k10, loss_of_c for such a run"
    )


def test_a_page_shows_numbers_claims_and_what_is_missing(sample, tmp_path):
    text = page.write(sample, tmp_path, EVALS, "python go").read_text()
    assert "| a | 0.75 | 64.0 ± 22.5 (82.7) | – |" in text
    assert "| b | 0.75 | 40.5 ± 0.7, n = 2 | – |" in text
    assert "| none | – | not defined | not defined |" in text
    assert "| CAE | – | – (83.3) | – |" in text
    assert "**Holds**: a is better. (here)" in text
    assert "a − b, 10-NN, %: +10.5, 95 % interval +4.1 to +16.9, n = 2" in text
    assert "b, 10-NN, %: failed: the disk is full (exit code 4)" in text
    assert "`python go` makes what is missing." in text
    assert "5 of 6 cells finished" in text
    assert "5 cells in 5 minutes of slow, 1 x cpu" in text
    for picture in ("table.png", "lines1.png"):
        assert picture in text and (tmp_path / picture).stat().st_size > 2000
    saved = json.loads((tmp_path / "results.json").read_text())
    (first, *_) = saved["rows"]
    assert first["numbers"][ACCURACY.title]["values"] == {
        "0": 50.0,
        "1": 52.0,
        "2": 90.0,
    }
    assert saved["claims"][0]["answer"] == results.HOLDS


def test_the_bars_of_lines_are_the_deviations_of_the_table(sample):
    figure = page._curves(sample, SAMPLE.figures[0])
    (axis,) = figure.axes
    (bars,) = axis.containers
    halves = [np.ptp(one, axis=0)[1] / 2 for one in bars.lines[2][0].get_segments()]
    wanted = [
        statistics.stdev(sample.entries[row, ACCURACY.title].values.values())
        for row in "ab"
    ]
    np.testing.assert_allclose(halves, wanted, rtol=1e-6)


def test_a_page_shows_texts_of_files_as_text(sample, tmp_path):
    reason = "<script>x</script>\n\n# A heading"
    entries = {
        where: dataclasses.replace(entry, missing=reason)
        for where, entry in sample.entries.items()
    }
    about = ABOUT | {"processor": "<img src=x>\n## fast"}
    finished = {key: Finished(about, {}) for key in sample.finished}
    odd = dataclasses.replace(sample, entries=entries, finished=finished)
    text = page.write(odd, tmp_path, EVALS, "python go").read_text()
    assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;x&lt;/script&gt; # A heading" in text
    assert "&lt;img src=x&gt; ## fast, 1 x cpu" in text


def test_the_time_of_a_resumed_cell_is_a_bound(sample, tmp_path):
    """Its file has the minutes since it was resumed."""
    finished = {key: Finished(ABOUT, {}) for key in sample.finished}
    finished[next(iter(finished))] = Finished(ABOUT | {"resumed": True}, {})
    one = dataclasses.replace(sample, finished=finished)
    text = page.write(one, tmp_path, EVALS, "python go").read_text()
    assert "5 cells in at least 5 minutes of slow, 1 x cpu" in text


def test_a_figure_that_cannot_be_drawn_costs_no_page(sample, tmp_path):
    drawn = Drawn(run="pretrain", measure=runs.KNN)  # which keeps no array
    study = dataclasses.replace(SAMPLE, figures=(drawn,))
    text = page.write(
        dataclasses.replace(sample, study=study), tmp_path, EVALS, "python go"
    ).read_text()
    assert "The figure of knn was not drawn: KeyError" in text
    assert "| a | 0.75 | 64.0 ± 22.5 (82.7) | – |" in text


def test_a_figure_of_an_evaluation_names_its_seed(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(EVALS["knn"], "draw", lambda self, found: {"sketch": Figure()})
    drawn = Drawn(run="pretrain", measure=runs.KNN)
    study = dataclasses.replace(SAMPLE, figures=(drawn,))
    one = dataclasses.replace(sample, study=study)
    text = page.write(one, tmp_path, EVALS, "python go").read_text()
    _, _, below = text.partition("(sketch.png)")
    assert below.startswith("\n\nSeed 0 of each row.\n")
    assert text.count("of each row") == 1  # other figures show all seeds


# Some classes of ImageNet.


@pytest.mark.parametrize("size", ["full", "small"])
def test_what_a_claim_compares_is_a_column_at_that_size(size):
    for study in STUDIES.values():
        at = study.small if size == "small" else "full"
        if size == "full" and not study.full:
            continue
        titles = {column.title for column in study.columns_at(at)}
        for one in (one for claim in study.claims for one in claim.compares):
            assert one.column in titles, (study.name, one.column)


def test_at_the_papers_size_a_column_may_be_of_other_numbers():
    (shifted,) = (c for c in STUDIES["p2_table1"].columns if c.title.startswith("mean"))
    sets = ("imagenet_v2", "objectnet", "imagenet_r", "imagenet_a", "imagenet_sketch")
    numbers = {f"accuracy_{name}": k / 10 for k, name in enumerate(sets, 1)}
    numbers["accuracy_held_out"] = 0.9
    assert shifted.value(numbers, "full") == pytest.approx(30)
    assert shifted.value({**numbers, "accuracy_x": 1.0}, "full") == pytest.approx(30)
    del numbers["accuracy_objectnet"]
    assert shifted.value(numbers, "full") is None
    digits = {f"accuracy_shift_{kind}": 0.5 for kind in ("blur", "noise", "rotation")}
    digits |= {"accuracy_shift_contrast": 0.5, "accuracy_shift_inversion": 1.0}
    assert shifted.value(digits, "mnist") == pytest.approx(60)


def test_dino_warms_up_for_as_long_in_a_longer_run():
    cell = all_cells("full").of(runs.DINO, 0)
    objective = cell.tree.objective
    assert cell.tree.epochs * objective.teacher_warmup == pytest.approx(50)
    assert cell.tree.epochs * objective.freeze_prototypes == pytest.approx(3)
    short = config.read("configs/dino.py")
    assert short.epochs * short.objective.teacher_warmup == pytest.approx(50)


def test_imagenet_100_is_chosen_from_imagenet_by_a_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("n1\nn2\n")
    for listed, dataset in ((str(path), "imagenet2012"), ("", "imagenet100")):
        found = Cells([STUDIES["p1_table5"]], settings("full", class_list=listed), ROOT)
        for cell in found.by_key.values():
            source = cell.tree.data.source
            assert (source.source if listed else source).dataset == dataset


def test_a_class_list_is_read_by_every_run_of_the_papers_size(tmp_path):
    path = tmp_path / "three.txt"
    path.write_text("n1\nn2\nn3\n")
    listed = settings("full", class_list=str(path))
    found = Cells([STUDIES["p1_table1"], STUDIES["p1_table7"]], listed, ROOT)
    whole = Cells(found.studies, settings("full"), ROOT)
    assert len(found.by_key) == len(whole.by_key) > 10
    assert not found.by_key.keys() & whole.by_key.keys()
    for cell in found.by_key.values():
        source = cell.tree.data.source
        if source.name == "few":  # chosen among the images of these classes
            source = source.source
        assert source.name == "classes" and source.names == ("n1", "n2", "n3")
        assert source.source.name == "tfds" and not source.file
        if "classes" in cell.tree.objective:
            assert cell.tree.objective.classes == 3
    with pytest.raises(ValueError, match="class_list='x' at size 'digits'"):
        settings(class_list="x")
    places = job.Places.of(listed, STUDIES["p1_table1"], tmp_path / "studies" / "one")
    assert places.page.name == "p1_table1-full-three"


# The page of all claims.


def test_each_claim_has_its_answer_its_interval_and_its_limits(sample, tmp_path):
    folder, home = tmp_path / "docs" / "studies", tmp_path / "docs"
    later = Claim(text="it is not asked yet.", where="there", compares=())
    waiting = dataclasses.replace(SAMPLE, name="waiting", claims=(later,))
    noted = dataclasses.replace(SAMPLE, notes=("Few images.",))
    page.write(sample, folder / "sample", EVALS, "python go")
    page.write(sample, folder / "sample-full", EVALS, "python go")
    saved = json.loads((folder / "sample-full" / "results.json").read_text())
    del saved["cells"]  # as an earlier version wrote it
    (folder / "sample-full" / "results.json").write_text(json.dumps(saved))
    claims.write([noted, waiting], folder, home / "claims.md")
    assert [path.name for path in home.iterdir() if path.is_file()] == ["claims.md"]
    text = (home / "claims.md").read_text()
    counted = "holds 1, does not hold 0, cannot be told at this scale 0, not measured 1"
    assert f"Answers to 2 claims: {counted}." in text
    assert text.count("* **Holds**: a is better. (here)") == 2  # at both sizes
    compared = "a − b, 10-NN, %: +10.5, 95 % interval +4.1 to +16.9, n = 2"
    assert f"{compared}; asked: > 0; holds" in text
    assert "Limits: Few images." in text
    for name in ("sample", "sample-full"):
        link = f"studies/{name}/README.md"
        assert f"[Table and figures]({link})" in text and (home / link).exists()
    assert text.count(": 5 of 6 cells finished.") == 1
    assert "`configs/study_waiting.py` has no page yet." in text
    assert "* **Not measured**: it is not asked yet. (there)" in text


def test_a_run_that_begins_with_a_stale_one_is_stale_too(tmp_path):
    child = Cells([], settings(), tmp_path / "runs").of(runs.finetune(runs.MAE), 0)
    for one in child.line:
        cells.write(tmp_path, one, "digits", ABOUT, {})
    assert cells.read(tmp_path, child, "digits") is not None
    path = cells.path_of(tmp_path, child.parent)
    saved = json.loads(path.read_text())
    saved["config"]["optim"]["b2"] = 0.5
    path.write_text(json.dumps(saved))
    assert cells.read(tmp_path, child, "digits") is None
    path.unlink()  # without a file nothing is known of it
    assert cells.read(tmp_path, child, "digits") is not None
