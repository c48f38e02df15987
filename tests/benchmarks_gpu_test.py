# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py runs on a CPU, so that it will run where a GPU is at hand."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mim_jax.kernels import FORMS

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


def load(name):
    spec = importlib.util.spec_from_file_location(name, PROGRAM.with_stem(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, attention = load("gpu"), load("attention")


def run(*arguments):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ, PYTHONPATH=paths, JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("cases", [["MAE B/16"], list(gpu.CASES)])
def test_the_small_benchmark_measures_every_form_and_every_case(tmp_path, cases):
    out = tmp_path / "gpu.json"
    done = run("--small", "--rounds=1", f"--out={out}", "--cases", *cases)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    here = {name for name, form in FORMS.items() if form.platform == "cpu"}
    assert {row["form"] for row in found["attention"]["rows"]} == {"plain", *here}
    assert not found["attention"]["wrong"]
    assert [row["case"] for row in found["steps"]] == cases
    assert all(row["ours"]["ms"] > 0 for row in found["steps"])
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        assert all(row["torch_over_ours"] > 0 for row in found["steps"])
    else:
        assert "torch: absent: no module" in found["missing"][0]
    table = out.with_suffix(".md").read_text()
    assert all(f"| {case} | 8 |" in table for case in cases)


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path, monkeypatch):
    absent = {"status": "absent", "why": "JAX sees no GPU: want ..."}

    class Nothing:
        facts = absent

        def __init__(self, *args):
            pass

        def close(self):
            pass

    monkeypatch.setattr(gpu, "Side", Nothing)
    monkeypatch.setattr(gpu, "attention", lambda *args: {"rows": [], "wrong": []})
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path / 'gpu.json'}"])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == gpu.EXIT_NO_GPU
    assert not list(tmp_path.iterdir())


def test_our_side_alone_says_that_the_other_was_not_asked_for(tmp_path, monkeypatch):
    asked = []

    def sides(case, batch, args, without_torch):
        asked.append(without_torch)
        return {"ours": Fake(batch, 999, [1.0] * 9)}

    monkeypatch.setattr(gpu, "sides", sides)
    monkeypatch.setattr(
        gpu, "attention", lambda *args: {"rows": [], "wrong": [], "table": ""}
    )
    out = tmp_path / "gpu.json"
    options = [f"--out={out}", "--no-torch", "--cases", "MAE B/16"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 0 and asked == [True]
    assert json.loads(out.read_text())["missing"] == [
        "torch: not measured, by --no-torch"
    ]


class Fake:
    """A side with room for `room` images, so many milliseconds per step."""

    closed = 0

    def __init__(self, batch, room, times):
        self.facts = {"status": "ready" if batch <= room else "no room", "why": "full"}
        self.facts |= {"flops_per_image": 5e9, "peak_flops": 1e12}
        self.facts |= {"device": "a card", "versions": {"jax": "1"}}
        self._times = iter(times)

    def turn(self):
        return {"ms": next(self._times), "peak_bytes": 2**30}

    def close(self):
        Fake.closed += 1


def test_a_batch_without_room_is_halved_for_both_sides(monkeypatch):
    def sides(case, batch, args, without_torch):
        return {
            "ours": Fake(batch, 64, [100.0, 200.0, 150.0]),
            "torch": Fake(batch, 32, [300.0, 300.0, 300.0]),
        }

    monkeypatch.setattr(gpu, "sides", sides)
    monkeypatch.setattr(Fake, "closed", 0)
    args = gpu.argparse.Namespace(batch=128, rounds=3)
    row = gpu.measured("MAE B/16", args, False)
    assert Fake.closed == 6  # both sides, at 128, 64 and 32 images
    assert row["batch"] == 32 and row["why"] == {}
    assert row["ours"]["ms"] == 150 and row["torch"]["ms"] == 300
    assert row["torch_over_ours"] == 2.0  # of 3, 1.5 and 2
    assert row["ours"]["images_per_second"] == pytest.approx(32 / 0.15)
    assert row["ours"]["share"] == pytest.approx(32 / 0.15 * 5e9 / 1e12)
    assert row["torch"]["share"] == pytest.approx(32 / 0.3 * 5e9 / 1e12)
    # PyTorch trains MAE beside every case: only there is the work the same.
    row = gpu.measured("R-MAE B/16", args, False)
    assert "share" in row["ours"] and "share" not in row["torch"]
    assert gpu.line(row).endswith(" |  |")


def test_a_form_that_raises_or_errs_too_much_is_wrong():
    def row(form, error, **more):
        return {"form": form, "case": {"name": "x"}, "error": error} | more

    raised = {"form": "b", "case": {"name": "x"}, "why": "no", "raised": True}
    unfit = raised | {"form": "c", "raised": False}
    rows = [row("plain", 1e-3), row("a", 3e-3), raised, unfit]
    assert attention.wrong(rows) == ["b at x: no"]
    for error in (5e-3, float("nan")):
        rows = [row("plain", 1e-3), row("a", error)]
        assert attention.wrong(rows) == [f"a at x: error {error:.1e}"]
