# SPDX-License-Identifier: Apache-2.0
"""Devices that are not here: what is refused, and what their compilers know of them."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from mim_jax.aot import devices as targets
from mim_jax.config import ConfigError


@pytest.mark.parametrize(
    "topology, expected",
    [
        ("", "topology='': want CHIP:LAYOUT, e.g. --topology=v5e:2x4"),
        ("v9:2x2", "chips: v4, v5e, v5p, v6e, tpu7x, a100-40, a100-80, h100, h200"),
        ("v5e", "topology='v5e': want 2 sides, e.g. v5e:2x4"),
        ("v5e:2x4x1", "want 2 sides"),
        ("v5e:0x4", "want 2 sides"),
        ("v4:2x2", "topology='v4:2x2': want 3 sides, e.g. v4:2x2x4"),
        ("h100", "topology='h100': want the number of GPUs in one host, e.g. h100:8"),
        ("h100:0", "want the number of GPUs in one host"),
        ("h200:2x2x2", "of GPUs in each, e.g. h200:4x8"),
    ],
)
def test_a_topology_is_checked_before_the_compiler_is_needed(
    monkeypatch, topology, expected
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        targets.devices_of(topology)
    assert expected in str(error.value)


def test_a_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"want pip install -e '\.\[tpu\]'"):
        targets.devices_of("v5e:2x4")

    def absent(**of):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", absent)
    with pytest.raises(ConfigError, match=r"want pip install -e '\.\[cuda\]'"):
        targets.devices_of("h100:8")


def test_beyond_a_host_gpus_speak_at_the_speed_of_the_network():
    one, also_one = targets.speed_of("h100:8"), targets.speed_of("h100:1x8")
    several = targets.speed_of("h100:2x8")
    assert one == also_one and one.flops == several.flops
    assert (one.wires, several.wires) == (450e9, 50e9)


@pytest.mark.tpu
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -e '.[tpu]'",
)
def test_every_chip_is_known_to_the_compiler():
    """Devices, and GiB that the compiler of libtpu 0.0.42.1 gives to a program."""
    expected = {
        "v4:2x2x2": (8, 30.75),
        "v5e:1x1": (1, 15.75),
        "v5e:1x2": (2, 15.75),
        "v5e:16x16": (256, 15.75),
        "v5p:2x2x1": (4, 95.74),
        "v6e:2x4": (8, 31.25),
        "tpu7x:2x2x1": (8, 94.75),  # two devices a chip
    }
    assert {name.partition(":")[0] for name in expected} == set(targets.TPUS)
    text = """
import json, sys
from mim_jax.aot import devices as targets
from mim_jax.sharding import Mesh
found = {}
for name in sys.argv[1:]:
    devices = targets.devices_of(name)
    gib = targets.usable_memory(Mesh().build(devices)) / 2**30
    found[name] = len(devices), round(gib, 2)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", text, *expected],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: tuple(pair) for name, pair in found.items()} == expected


@pytest.mark.cuda
def test_every_gpu_is_known_to_the_compiler():
    """Devices of a host or of several, and three quarters of the memory of each."""
    expected = {
        "a100-40:1": (1, 29.57),
        "a100-80:8": (8, 59.44),
        "h100:2x8": (16, 59.33),
        "h200:4": (4, 105.75),
    }
    assert {name.partition(":")[0] for name in expected} == set(targets.GPUS)
    text = """
import json, sys
from mim_jax.aot import devices as targets
from mim_jax.sharding import Mesh
found = {}
for name in sys.argv[1:]:
    devices = targets.devices_of(name)
    gib = targets.usable_memory(Mesh().build(devices)) / 2**30
    found[name] = len(devices), round(gib, 2)
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", text, *expected],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: tuple(pair) for name, pair in found.items()} == expected
