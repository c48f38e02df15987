# SPDX-License-Identifier: Apache-2.0
"""Compiled for devices that are not here: what fits, what does not, what is kept."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from mim_jax import config
from mim_jax.aot import step as aot
from mim_jax.aot.lines import after_compiling, tried_line
from mim_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "data.image_size": "(32,32)",
    "objective.encoder.depth": 2,
    "objective.encoder.width": 256,
    "objective.encoder.heads": 2,
    "objective.decoder.depth": 1,
    "objective.decoder.width": 128,
    "objective.decoder.heads": 2,
    "batch_size": 64,
}
GIB = 2**30


def recipe(data_dir, **leaves):
    """configs/mae.py, small, with its data looked for in a folder without any."""
    tree = config.read(str(ROOT / "configs" / "mae.py"))
    tree.data.source.data_dir = str(data_dir)
    tree.data.image_size = (64, 32)
    tree.objective.encoder.update(dict(depth=1, width=16, heads=2))
    tree.objective.decoder.update(dict(depth=1, width=16, heads=2))
    tree.batch_size = 16
    tree.update(leaves)
    return tree


@pytest.fixture
def cpus(monkeypatch):
    """CPUs in place of a TPU's devices: what is planned does not depend on it."""
    monkeypatch.setattr(aot, "devices_of", lambda topology: jax.devices())


def test_photographs_stand_in_for_absent_data_at_the_same_size(tmp_path, cpus):
    tree = recipe(tmp_path)
    plan, source = aot.plan_for(tree, "v5e:2x4")
    assert source == "photos: the data of tfds are not here"
    assert plan.settings.data.image_shape == (64, 32, 3)
    assert tree.data.source.name == "tfds"  # the caller's config is as it was
    plan, source = aot.plan_for(config.read("configs/mae.py:photos"), "v5e:2x4")
    assert source == "photos"


def test_what_is_wrong_with_a_config_is_not_taken_for_absent_data(tmp_path, cpus):
    with pytest.raises(ConfigError, match="batch_size=12 .* want a multiple of 8"):
        aot.plan_for(recipe(tmp_path, batch_size=12), "v5e:2x4")
    tree = config.read("configs/mae.py:source=folder")  # its path is empty
    with pytest.raises(ConfigError, match="path is empty"):
        aot.plan_for(tree, "v5e:2x4")
    with pytest.raises(ConfigError, match="config.job='eval': want a training config"):
        aot.plan_for(config.read("configs/reconstruction.py"), "v5e:2x4")


@pytest.fixture
def refused(tmp_path, cpus, monkeypatch):
    """A plan whose step the compiler refuses with a message."""

    def of(message):
        def compile(lowered, options):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
        return plan

    plan, _ = aot.plan_for(recipe(tmp_path), "v5e:2x4")
    lowered = jax.jit(lambda x: x).lower(0)
    monkeypatch.setattr(aot, "lowered", lambda plan: lowered)
    return of


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (20.50G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeds hbm capacity by 4.75G.",
    ],
)
def test_both_numbers_of_a_refusal_are_read(refused, message):
    found, text = aot.compile_step(refused(message))
    assert text == ""
    assert not found["compiles"] and found["peak_bytes"] == 20.5 * GIB
    found = aot.verdict(found | {"hbm_bytes": round(15.75 * GIB)})
    assert found == {"fits": False, "held_bytes": 20.5 * GIB}


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.50M of "
        "16.00M vmem.",
        "INTERNAL: hbm of 20.50G and 15.75G",
    ],
)
def test_another_refusal_is_not_taken_for_a_step_too_large(refused, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message[:20]):
        aot.compile_step(refused(message))


@pytest.fixture
def without_cudnn(monkeypatch):
    """JAX refuses to trace any form of attention but the plain one."""
    lowered = aot.lowered

    def refuse(plan):
        if "recompute" in plan.forms:
            raise RuntimeError(refuse.message)
        return lowered(plan)

    refuse.message = "cuDNN not found.\nMore lines."
    monkeypatch.setattr(aot, "lowered", refuse)
    return refuse


def test_a_step_is_priced_with_plain_attention_where_cudnn_is_absent(
    tmp_path, cpus, without_cudnn
):
    plan, _ = aot.plan_for(recipe(tmp_path, attention="recompute"), "h100:8")
    found, text = aot.compile_step(plan)
    assert found["note"] == "priced with plain attention: cuDNN not found."
    assert found["compiles"] and text
    shown = after_compiling(
        found | {"hbm_bytes": GIB} | {"fits": True, "held_bytes": 1}
    )
    assert shown.splitlines()[0] == f"note        {found['note']}"
    tried = found | {"leaves": {"scan": True}, "fits": True, "held_bytes": 1}
    assert tried_line(tried).endswith(f"; {found['note']}")


def test_any_other_error_of_tracing_is_raised(tmp_path, cpus, without_cudnn):
    plan, _ = aot.plan_for(recipe(tmp_path, attention="recompute"), "h100:8")
    without_cudnn.message = "another"
    with pytest.raises(RuntimeError, match="another"):
        aot.compile_step(plan)


def test_a_step_whose_buffers_have_no_room_is_not_taken_to_fit():
    sizes = dict(argument=2, output=2, alias=1, temp=6, peak=5, hbm=9)
    found = {f"{name}_bytes": size for name, size in sizes.items()}
    found["compiles"] = True
    assert aot.verdict(found) == {"fits": True, "held_bytes": 9}
    assert not aot.verdict(found | {"temp_bytes": 7})["fits"]
    assert aot.verdict(found | {"temp_bytes": 1}) == {"fits": True, "held_bytes": 5}


# In processes of their own: libtpu reads its environment once, and stays loaded.
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -e '.[tpu]'",
)


def program(config_file, topology, *arguments, **leaves):
    command = [
        *(sys.executable, "-m", "mim_jax.aot", f"--topology={topology}"),
        f"--config={config_file}",
        *(f"--config.{name}={value}" for name, value in leaves.items()),
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("fsdp", [1, 4])
def test_the_step_fits_and_its_state_is_donated(tmp_path, fsdp):
    out = tmp_path / "json"
    absent = {"data.source.data_dir": tmp_path, "mesh.fsdp": fsdp}
    done = program("configs/mae.py", "v5e:2x4", f"--out={out}", **TINY, **absent)
    assert done.returncode == 0, done.stderr
    assert "source      photos: the data of tfds are not here" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: peak 0.")
    found = json.loads(out.read_text())
    assert found["fits"] and found["devices"] == 8
    assert found["batch_size"] == 64 and found["batch_per_device"] == 8
    assert found["hbm_bytes"] == 15.75 * GIB
    assert found["config"]["objective"]["encoder"]["width"] == 256
    # Donated: all of the new state takes the place of the old. Rows of an array are
    # padded to 128 numbers, so it takes more than its numbers do.
    assert found["state_bytes"] < found["alias_bytes"] < 1.4 * found["state_bytes"]
    assert found["output_bytes"] - found["alias_bytes"] < 0.01 * found["output_bytes"]
    if fsdp == 1:  # parameters and both moments of Adam, float32
        assert found["state_bytes"] == pytest.approx(12 * found["parameters"], 0.01)
    else:
        assert found["state_bytes"] < 8 * found["parameters"]


@pytest.mark.tpu
@needs_libtpu
def test_an_impossible_batch_does_not_fit(tmp_path):
    out = tmp_path / "json"
    leaves = TINY | {"batch_size": 2**21}
    done = program("configs/mae.py:photos", "v5e:2x2", f"--out={out}", **leaves)
    assert done.returncode == 1, done.stderr
    found = json.loads(out.read_text())
    assert not found["fits"] and found["devices"] == 4
    assert found["peak_bytes"] > found["hbm_bytes"] == 15.75 * GIB
    wanted = f"does not fit: it wants {found['peak_bytes'] / GIB:.3f} GiB of 15.750 GiB"
    assert done.stdout.splitlines()[-1].startswith(wanted)


@pytest.mark.tpu
@needs_libtpu
def test_what_libtpu_refuses_is_one_line(tmp_path):
    done = program("configs/mae.py:photos", "v5e:3x3")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: topology='v5e:3x3': INVALID_ARGUMENT: ")


@pytest.mark.cuda
@pytest.mark.parametrize("topology, devices", [("h100:4", 4), ("a100-40:2x2", 4)])
def test_a_step_is_compiled_for_gpus(tmp_path, topology, devices):
    out = tmp_path / "json"
    done = program("configs/mae.py:photos", topology, f"--out={out}", **TINY)
    assert done.returncode == 0, done.stderr
    assert "nothing is estimated" in done.stdout and " at most, " in done.stdout
    found = json.loads(out.read_text())
    assert found["fits"] and found["devices"] == devices
    # Donated: all of the new state takes the place of the old.
    assert found["alias_bytes"] == pytest.approx(found["state_bytes"], rel=0.01)
    # Gradients are summed over devices, in float32 here.
    sent = found["collectives"]["all-reduce"]["bytes"]
    assert 4 <= sent / found["parameters"] < 4.01
    account = found["estimate"]
    assert account["priced"] == 0
    assert account["unpriced"] > found["roofline_seconds"]


@pytest.mark.cuda
@pytest.mark.parametrize("leaves", [{}, {"mesh.tensor": 2}])
def test_attention_by_cudnn_is_compiled_without_a_gpu(tmp_path, leaves):
    """Also of 17 tokens, an odd number, and where devices share the heads."""
    out = tmp_path / "json"
    leaves = TINY | {"dtype": "bfloat16", "data.image_size": "(16,16)"} | leaves
    done = program("configs/mae.py:photos", "h100:4", f"--out={out}", **leaves)
    assert done.returncode == 0, done.stderr
    assert "kernels     attention: encoder cudnn, decoder cudnn" in done.stdout
    found = json.loads(out.read_text())
    assert found["note"] == "" and found["fits"]
    assert "custom-call" in found["estimate"]["unpriced_opcodes"]


@pytest.mark.cuda
def test_a_step_that_a_gpu_has_no_room_for_does_not_fit():
    leaves = TINY | {"batch_size": 2**21}
    done = program("configs/mae.py:photos", "a100-40:2", **leaves)
    assert done.returncode == 1, done.stderr
    assert "may not fit: peak " in done.stdout.splitlines()[-1]
