# SPDX-License-Identifier: Apache-2.0
"""Robustness and shape bias of real, tiny runs, through the jobs."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mim_jax import config, evaluate, presets, train
from mim_jax.data.passes import EvalPasses
from mim_jax.data.sources.digits import Digits
from mim_jax.evals.base import Eval
from mim_jax.plan import Plan

ROOT = pathlib.Path(__file__).parent.parent


def trained(argument, folder, steps=3, **leaves):
    tree = config.read(str(ROOT / "configs" / argument))
    tree.steps, tree.batch_size, tree.compile_cache = steps, 16, False
    tree.log.update(dict(every=1, tensorboard=False, progress="none"))
    tree.objective.encoder.update(dict(width=16, depth=2, heads=2))
    for name, value in leaves.items():
        tree[name] = value
    # Strict promotion is for our own code; here a whole program runs, optax included.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree, folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return trained("finetune.py:digits", tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def cues(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cues"
    report = config.choose(Eval, "shape_bias", examples=0)
    return trained("linear_probe.py:cues", folder, report=report)


def job(name, run, **values):
    tree = config.read(str(ROOT / "configs" / name))
    tree.run = str(run)
    tree.update(values)
    return tree


def results(folder):
    return json.loads((folder / "results.json").read_text())["runs"]


def test_a_run_with_labels_ends_with_its_robustness(digits):
    found = json.loads((digits / "report" / "robustness.json").read_text())
    want = {f"accuracy_{name}" for name in ("held_out", *presets.SHIFTS["digits"])}
    want |= {f"top5_{name}" for name in ("held_out", *presets.SHIFTS["digits"])}
    assert found.keys() == want
    assert (digits / "report" / "robustness.png").exists()


def test_robustness_of_a_run_again(digits, tmp_path):
    evaluate.run(job("robustness.py:digits", digits), tmp_path / "out")
    theirs = json.loads((digits / "report" / "robustness.json").read_text())
    (run,) = results(tmp_path / "out").values()
    ours = {name: number["value"] for name, number in run["results"].items()}
    assert ours == pytest.approx(theirs, abs=0.01)
    held_out = Digits().held_out()
    assert run["results"]["accuracy_held_out"]["n"] == len(held_out) == 355
    turned = np.isin(held_out.labels(), (7, 3, 5, 1, 4, 0, 2)).sum()
    assert run["results"]["accuracy_digits_rotation"]["n"] == turned
    # By another way: all logits at once, and no restriction but to the seven.
    model, training = evaluate.load(digits)
    images = np.stack([held_out[i]["image"] for i in range(len(held_out))])
    logits = jax.jit(model.objective.logits)(model.params, model.stats, images)
    accuracy = (np.asarray(logits).argmax(axis=1) == held_out.labels()).mean()
    assert ours["accuracy_held_out"] == pytest.approx(accuracy, abs=1e-6)
    found = EvalPasses(training.data).evaluation_set("digits_rotation").images
    images = np.stack([found[i]["image"] for i in range(len(found))])
    logits = jax.jit(model.objective.logits)(model.params, model.stats, images)
    chosen = np.asarray(logits)[:, [7, 3, 5, 1, 4, 0, 2]].argmax(axis=1)
    labels = [found[i]["labels"][0] for i in range(len(found))]
    assert ours["accuracy_digits_rotation"] == pytest.approx(
        (chosen == labels).mean(), abs=1e-6
    )


def test_a_run_may_end_with_its_shape_bias(cues):
    assert {path.name for path in (cues / "report").iterdir()} == {
        "curves.png",
        "shape_bias.json",
        "shape_bias.npz",
        "shape_bias.png",
    }


def test_shape_bias_of_runs_side_by_side(cues, tmp_path):
    again = shutil.copytree(cues, tmp_path / "again")
    tree = job("shape_bias.py", cues, also=(str(again),))
    evaluate.run(tree, tmp_path / "out")
    found = results(tmp_path / "out")
    assert found.keys() == {"cues, step 3", "again, step 3"}
    for run in found.values():
        shares = [
            run["results"][f"{name}_share"]["value"]
            for name in ("shape", "texture", "neither")
        ]
        assert (
            sum(shares) == pytest.approx(1) and run["results"]["images"]["value"] == 448
        )
        # Three steps teach nothing: most decisions are for one of six other classes.
        assert shares[2] > 0.5
    folder = tmp_path / "out" / "report"
    assert {path.name for path in folder.glob("*.png")} == {
        "shape_bias.png",
        "decisions0.png",
        "decisions1.png",
    }


def test_an_untrained_model_is_near_chance(cues, tmp_path):
    tree = job("robustness.py", cues, weights="initial")
    evaluate.run(tree, tmp_path / "out")
    (run,) = results(tmp_path / "out").values()
    # 800 images of eight classes in equal numbers.
    assert run["results"]["accuracy_held_out"]["value"] == pytest.approx(1 / 8, abs=0.1)


def test_what_does_not_fit_is_one_line(cues, digits, tmp_path):
    out = tmp_path / "out"

    def refused(tree, message):
        with pytest.raises(config.ConfigError, match=message):
            evaluate.run(tree, out)
        assert not out.exists()

    refused(job("shape_bias.py", digits), "set 'cues' is for models of 8 classes, and")
    tree = job("robustness.py", cues)
    tree.eval.sets = ("digits_blurr",)
    refused(tree, "set 'digits_blurr' is unknown; known: cue_conflict, cues, digits_bl")
    # Before hours of training, too.
    tree = config.read(str(ROOT / "configs" / "finetune.py:cues"))
    tree.report.sets = ("imagenet_v2=/nowhere",)
    want = "no folder '/nowhere'; want 'imagenet_v2=FOLDER' with a sub-folder per class"
    with pytest.raises(config.ConfigError, match=want):
        Plan.of(tree)
    # And what has no classes is no run for these.
    tree = config.read(str(ROOT / "configs" / "mae.py:digits"))
    tree.report = config.choose(Eval, "robustness")
    with pytest.raises(config.ConfigError, match="MAE tells no classes apart"):
        Plan.of(tree)
