# SPDX-License-Identifier: Apache-2.0
"""The worked examples of CONTRIBUTING.md: each runs and keeps the contract of its kind,
without an edit of the package."""

import ast
import dataclasses
import json
import pathlib
import pickle
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from data import examples_test
from evals import contract_test as evals_test
from evals import pixels_test
from kernels import forms_test
from maskings import masking_test
from objectives import contract_test as objectives_test
from small_evals import SMALL, run_of
from tables import restored
from tiny import TINY, Tiny

from mim_jax import compare, config, evaluate, kernels, train
from mim_jax.data.examples.base import Examples
from mim_jax.data.input import Input
from mim_jax.data.pipeline import eval_batches, train_batches
from mim_jax.kernels.base import Kernels
from mim_jax.models.vit import Encoder
from mim_jax.ops.patches import Grid, patchify
from mim_jax.plan import Plan
from mim_jax.run import loading

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "tests/plugins"
PLUGINS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}


@pytest.fixture(autouse=True, scope="module")
def modules():
    """The plug-ins by name, imported as --plugins imports them, and their rows in the
    tables until the tests of this file are done."""
    forms = dict(kernels.FORMS)
    sys.path.insert(0, str(FOLDER))
    with restored():
        yield {name: sys.modules[name] for name in config.load_plugins(PLUGINS)}
    sys.path.remove(str(FOLDER))
    kernels.FORMS.clear()
    kernels.FORMS.update(forms)
    for name in PLUGINS:
        del sys.modules[name]


def command_of(name: str) -> dict[str, str]:
    """The flags of the command in the docstring of a plug-in."""
    text = ast.get_docstring(ast.parse(PLUGINS[name].read_text()))
    _, command = text.split("\n\n", 1)
    words = shlex.split(command)
    assert words[:4] == ["PYTHONPATH=tests/plugins", "python", "-m", "mim_jax.main"]
    return dict(word.removeprefix("--").split("=", 1) for word in words[4:])


def tree_of(name: str, **changes) -> config.Tree:
    """The config that the command of a plug-in names, made small."""
    flags = command_of(name)
    assert flags.pop("plugins") == name and flags.pop("workdir").startswith("runs/")
    tree = config.read(str(ROOT / flags.pop("config")))
    tree.plugins = (name,)
    if tree.job == "train":
        tree.steps, tree.batch_size, tree.compile_cache = 4, 16, False
        tree.data.threads = 1
        tree.log.update(dict(every=1, tensorboard=False, progress="none"))
        tree.objective.encoder.update(dict(width=16, depth=1, heads=2))
        if "decoder" in tree.objective:
            tree.objective.decoder.update(dict(width=16, depth=1, heads=2))
        tree.report.update(dict(images=2, draws=1, inpainted=0, rows=1))
    leaves = {flag.removeprefix("config."): text for flag, text in flags.items()}
    for path, value in (leaves | changes).items():
        *above, leaf = path.split(".")
        node = tree
        for part in above:
            node = node[part]
        plain = isinstance(value, str) and not isinstance(node[leaf], str)
        node[leaf] = ast.literal_eval(value) if plain else value
    return tree


def run(tree: config.Tree, workdir: pathlib.Path, job=train.run) -> pathlib.Path:
    # Strict promotion is for our own code; here a whole program runs, optax included.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        job(tree, workdir)
    return workdir


def losses_of(workdir: pathlib.Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


# The objective.


@pytest.fixture(scope="module")
def simmim(modules, tmp_path_factory):
    """The directory of a short run."""
    return run(tree_of("simmim"), tmp_path_factory.mktemp("runs") / "simmim")


def test_simmim_trains_and_is_reported(simmim):
    assert len(losses_of(simmim)) == 4 and np.isfinite(losses_of(simmim)).all()
    saved = json.loads((simmim / "config.json").read_text())
    assert saved["plugins"] == ["simmim"] and saved["objective"]["name"] == "simmim"
    report = json.loads((simmim / "report/reconstruction.json").read_text())
    # The prediction before training is that of other parameters.
    assert report["psnr_model_db"] != report["psnr_untrained_db"]


def test_a_run_without_its_module_says_which_is_missing(simmim, monkeypatch):
    monkeypatch.delitem(sys.modules, "simmim")
    with pytest.raises(
        config.ConfigError, match="want --plugins=simmim on the command"
    ):
        loading.load(simmim)


@pytest.fixture
def rows(monkeypatch, modules):
    """The test rows of the plug-ins, as CONTRIBUTING.md gives them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(\".*?)^```$", text, re.DOTALL | re.MULTILINE)
    names = {
        name: one for module in modules.values() for name, one in vars(module).items()
    }
    tables = {
        "simmim": TINY,
        "checkerboard": masking_test.MEMBERS,
        "rank": SMALL,
        "boxes": examples_test.ROWS,
        "tiled": forms_test.HERE,
    }
    found = eval("{" + "".join(blocks) + "}", {"Tiny": Tiny, **names, **modules})
    assert found.keys() == tables.keys()
    for name, row in found.items():
        monkeypatch.setitem(tables[name], name, row)


@pytest.mark.parametrize(
    "check",
    [
        objectives_test.test_the_loss_is_a_number,
        objectives_test.test_every_parameter_learns_or_is_named,
        objectives_test.test_the_loss_falls,
    ],
)
def test_simmim_keeps_the_contract_of_objectives(check, rows):
    check("simmim")


def test_hidden_pixels_do_not_reach_what_simmim_fills_in(rows):
    pixels_test.check_no_leak(run_of("simmim"))


def test_simmim_is_l1_between_hidden_patches(rows):
    run = run_of("simmim")
    image = small_run.batches(4, 4)[0]["image"]
    batch = {"image": jnp.asarray(image)}
    keys = jax.random.split(jax.random.key(1), 4)
    mask = run.objective.mask(batch, keys)
    found = jax.jit(run.objective.reconstruct)(run.params, batch, mask)
    error = jnp.abs(found - image.astype(np.float32) / 255) / 0.25
    hidden = np.asarray(mask.hidden)
    assert 0.4 < hidden.mean() < 0.8
    loss, _ = jax.jit(run.objective.loss)(run.params, None, batch, keys)
    np.testing.assert_allclose(
        loss, np.asarray(patchify(error, 2))[hidden].mean(), rtol=1e-5
    )


# The maskings.


@pytest.mark.parametrize(
    "check",
    [
        masking_test.test_keep_and_drop_partition_the_grid,
        masking_test.test_images_and_keys_have_their_own_masks,
        masking_test.test_a_mask_depends_on_its_own_key_alone,
        masking_test.test_bits_are_those_of_any_number_of_devices_of_jit_and_of_vmap,
        masking_test.test_bits_are_those_without_64_bit_types,
    ],
)
def test_checkerboard_keeps_the_contract_of_maskings(check, rows):
    (masking,) = masking_test.members_of("checkerboard")
    check(masking)


def test_checkerboard_is_one(modules):
    masking, grid = modules["checkerboard"].Checkerboard(cell=2), Grid(4, 4, 2)
    hidden = masking(jax.random.split(jax.random.key(0), 8), grid).hidden
    black = np.kron([[0, 1], [1, 0]], np.ones((2, 2))).astype(bool)
    found = {tuple(row.tolist()) for row in np.asarray(hidden)}
    assert found == {tuple(black.ravel()), tuple(~black.ravel())}
    with pytest.raises(ValueError, match="cell=2 on a grid of 2x2 patches: want a div"):
        masking.visible_count(Grid(2, 2, 2))


def test_a_config_chooses_the_checkerboard(modules):
    masking = Plan.of(tree_of("checkerboard")).objective.masking
    assert masking == modules["checkerboard"].Checkerboard()


def test_covered_reads_the_boxes_of_the_example(modules):
    masking, grid = modules["boxes"].Covered(ratio=0.25), Grid(4, 4, 2)
    boxes = np.full((2, 2, 4), -1, np.float32)
    boxes[0, 0] = 0.5, 0.0, 1.0, 0.5  # the quarter at the bottom left
    boxes[1, 1] = 0.0, 0.25, 0.25, 1.0  # the first row but its first patch
    valid = np.array([[True, False], [False, True]])
    keys = jax.random.split(jax.random.key(0), 2)
    mask = masking(keys, grid, boxes=jnp.asarray(boxes), boxes_valid=jnp.asarray(valid))
    hidden = np.asarray(mask.hidden).reshape(2, 4, 4)
    assert hidden[0, 2:, :2].all() and hidden[0].sum() == 4
    assert hidden[1, 0, 1:].all() and hidden[1].sum() == 4


def test_attended_hides_what_its_memory_names(modules):
    masking, grid = modules["attended"].Attended(ratio=0.25), Grid(4, 4, 2)
    weights = np.full(16, 1e-6, np.float32)
    weights[[3, 5, 8, 12]] = 1
    keys = jax.random.split(jax.random.key(0), 50)
    hidden = np.asarray(masking(keys, grid, memory=jnp.asarray(weights)).hidden)
    assert hidden[:, [3, 5, 8, 12]].mean() > 0.99
    even = np.asarray(masking(keys, grid, memory=masking.first_memory(grid)).hidden)
    assert len(np.unique(even, axis=0)) > 40


def test_attended_remembers_where_the_class_token_looks(modules):
    run, old = run_of("mae"), modules["attended"].Attended().first_memory(Grid(4, 4, 2))
    batch = {"image": jnp.asarray(small_run.batches(4, 4)[0]["image"])}

    @jax.jit
    def refreshed(decay):
        masking = dataclasses.replace(modules["attended"].Attended(), decay=decay)
        return masking.refresh(old, run.objective, run.params, batch, None)

    found = refreshed(0.0)
    # The class token attends to itself too, so the patches get less than 1 in all.
    assert found.shape == old.shape and 0.5 < found.sum() < 1
    assert np.ptp(found) > 0
    half = (found + old) / 2
    np.testing.assert_allclose(refreshed(0.5), half, rtol=1e-5)


def test_a_step_keeps_the_memory_of_attended():
    plan = Plan.of(tree_of("attended"), jax.devices()[:1])
    state, batch = plan.abstract_state(), plan.abstract_batch()
    after, _ = jax.eval_shape(train.step_of(plan), state, batch)
    assert after.memory.shape == state.memory.shape == (16,)


def test_a_memory_that_is_an_array_is_read_for_evaluation(simmim, monkeypatch):
    read = loading.read_trained

    def with_memory(*args):
        step, found = read(*args)
        return step, found | {"memory": jnp.arange(16)}

    assert loading.load(simmim)[0].memory is None
    monkeypatch.setattr(loading, "read_trained", with_memory)
    assert loading.load(simmim)[0].memory.tolist() == list(range(16))


# The source, the examples.


@pytest.mark.parametrize(
    "check",
    [
        examples_test.test_examples_are_those_declared,
        examples_test.test_examples_are_a_function_of_seed_and_position,
        examples_test.test_rows_without_a_record_have_the_fill_values,
    ],
)
def test_boxes_keep_the_contract_of_examples(check, rows):
    check("boxes")


def test_rectangles_keep_the_contract_of_sources(modules):
    for source in (
        modules["boxes"].Rectangles(),
        modules["boxes"].Rectangles().held_out(),
    ):
        for index in (0, len(source) // 2, len(source) - 1):
            one, again = source[index], source[index]
            assert all(np.array_equal(one[key], again[key]) for key in one)
            assert one["image"].dtype == np.uint8 and one["image"].shape == (48, 48, 1)
            assert one["label"] == -1 and source.classes == ()
        assert pickle.loads(pickle.dumps(source)) == source
        json.dumps(source.fingerprint(), allow_nan=False)
    train = modules["boxes"].Rectangles()
    assert not np.array_equal(train[3]["image"], train.held_out()[3]["image"])


def test_boxes_lie_on_their_rectangles(modules):
    data = Input(
        source=modules["boxes"].Rectangles(images=20),
        examples=modules["boxes"].Boxes(),
        image_size=(48, 48),
        eval_crop_fraction=1.0,
        workers=0,
    )
    with eval_batches(data, batch_size=20, source=data.source) as batches:
        (batch,) = batches
        images, boxes, valid = (
            np.array(batch[name]) for name in ("image", "boxes", "boxes_valid")
        )
    for image, found, real in zip(images, boxes, valid, strict=True):
        inside = np.zeros((48, 48), bool)
        for top, left, bottom, right in np.round(found[real] * 48).astype(int):
            inside[top:bottom, left:right] = True
        np.testing.assert_array_equal(image[..., 0] > 100, inside)


def test_boxes_decide_what_a_loss_hides(modules):
    plan = Plan.of(tree_of("boxes"), jax.devices()[:1])
    assert plan.reads == ("image", "boxes", "boxes_valid")
    data = dataclasses.replace(plan.settings.data, workers=0)
    with train_batches(data, seed=0, batch_size=16, stop=1) as batches:
        read = next(batches)
        batch = {name: jnp.asarray(read[name]) for name in plan.reads}
    keys = jax.random.split(jax.random.key(0), 16)
    hidden = plan.objective.mask(batch, keys).hidden
    brightness = patchify(batch["image"], 4).mean(axis=-1)
    assert brightness[hidden].mean() > 2 * brightness[~hidden].mean()

    @jax.jit
    def loss(batch):
        params, _ = plan.objective.init(jax.random.key(1), batch)
        return plan.objective.loss(params, None, batch, keys)[0]

    moved = batch | {"boxes_valid": jnp.zeros_like(batch["boxes_valid"])}
    assert np.isfinite(loss(batch)) and loss(batch) != loss(moved)


def test_a_masking_that_reads_boxes_says_which_examples_have_them():
    tree = tree_of("boxes")
    with tree.data.unlocked():
        tree.data.examples = config.choose(Examples, "crops")
    with pytest.raises(
        config.ConfigError, match="'boxes', which masking Covered of MAE "
    ):
        Plan.of(tree)


# The evaluation.


@pytest.mark.parametrize(
    "check",
    [
        evals_test.test_padding_and_batch_size_change_nothing,
        evals_test.test_the_compare_page_can_show_it,
        evals_test.test_images_without_labels_are_measured_or_refused_by_a_value_error,
    ],
)
def test_rank_keeps_the_contract_of_evaluations(check, rows):
    check("rank")


def test_what_is_written_of_the_rank_can_be_read(rows, tmp_path, capsys):
    evals_test.test_what_is_written_can_be_read("rank", tmp_path, capsys)


@pytest.mark.parametrize(
    "values, rank", [([2.0, 2.0, 2.0], 3), ([5.0, 0.0], 1), ([3.0, 1.0], 1.7548)]
)
def test_the_effective_rank_is_exp_of_the_entropy(modules, values, rank):
    # 1.7548: of the shares 3/4 and 1/4.
    found = modules["rank"].effective_rank(np.array(values))
    assert found == pytest.approx(rank, rel=1e-4)


def test_a_run_from_outside_is_evaluated_and_compared_from_outside(simmim, tmp_path):
    tree = tree_of("rank", run=str(simmim))
    tree.plugins = ("rank", "simmim")
    workdir = run(tree, tmp_path / "rank", evaluate.run)
    found = json.loads((workdir / "results.json").read_text())
    numbers = found["runs"]["simmim, step 4"]["results"]
    assert 1 <= numbers["rank_model"]["value"] <= 16 and found["eval"] == "rank"
    tree = config.experiment("compare")
    tree.runs, tree.also, tree.random = (str(simmim),), ("rank",), False
    tree.skip = ("reconstruction", "knn", "cka", "attention", "tsne")
    tree.plugins = ("rank", "simmim")
    workdir = run(tree, tmp_path / "compare", compare.run)
    page = (workdir / "report/index.html").read_text()
    assert "effective rank" in page and "SimMIM" in page


# The form of attention.


@pytest.mark.parametrize("heads, width, tokens", forms_test.SIZES[:2])
def test_tiled_attention_is_the_formula(heads, width, tokens, rows):
    forms_test.test_a_form_is_the_formula(heads, width, tokens, "tiled")


@pytest.mark.parametrize("heads, width, tokens", forms_test.SIZES[:1])
def test_gradients_of_tiled_attention_are_differences(
    heads, width, tokens, rows, monkeypatch
):
    forms_test.test_gradients_are_differences(
        monkeypatch, heads, width, tokens, "tiled", False
    )


def test_a_form_is_taken_if_named_and_if_it_fits(modules):
    named = Plan.of(tree_of("tiled"))
    assert named.forms.startswith("attention: encoder tiled, decoder tiled")
    assert "tiled" not in Plan.of(tree_of("tiled", attention="auto")).forms
    with pytest.raises(config.ConfigError, match="5 tokens are one tile: want more"):
        Plan.of(tree_of("tiled", **{"data.image_size": (4, 4)}))


def test_a_network_runs_the_form_that_it_is_told():
    encoder = Encoder(patch=2, width=16, depth=1, heads=2)
    patches = jax.random.normal(jax.random.key(0), (2, 16, 4))

    @jax.jit
    def outputs(patches):
        params = encoder.init(jax.random.key(1), patches, Grid(4, 4, 2))
        told = (encoder.clone(kernels=Kernels(form)) for form in ("plain", "tiled"))
        return [one.apply(params, patches, Grid(4, 4, 2))[0] for one in told]

    plain, tiled = outputs(patches)
    np.testing.assert_allclose(tiled, plain, atol=1e-5)
    assert (tiled != plain).any()  # the same sums in another order


# The page.

_SHOWN = re.compile(r"<!-- (tests/plugins/\S+) -->\n```python\n(.*?)```", re.DOTALL)


def test_contributing_shows_what_the_files_have():
    shown = _SHOWN.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert {ROOT / name for name, _ in shown} == set(PLUGINS.values())
    for name, text in shown:
        assert text in (ROOT / name).read_text(), f"{name} has not:\n{text}"
