# SPDX-License-Identifier: Apache-2.0
"""The form for long sequences compiles for TPUs: their vector memory suffices."""

import importlib.util
import os
import subprocess
import sys

import environments
import pytest

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]

_PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from mim_jax.aot.devices import devices_of
from mim_jax.kernels.long import block_of, long_attention
topology, *numbers = sys.argv[1:]
size, tokens = map(int, numbers)
here = SingleDeviceSharding(devices_of(topology)[0])
array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
def loss(qkv, bias):
    return long_attention(qkv, bias, 2).astype(jnp.float32).sum()
step = jax.jit(jax.grad(loss, (0, 1)))
step.trace(array(1, tokens, 6 * size), array(6 * size)).lower().compile()
print(block_of(tokens))
"""


# Those of the least vector memory; the smallest, an uneven and the largest head.
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])
@pytest.mark.parametrize("size", [32, 80, 128])
@pytest.mark.parametrize("tokens, block", [(577, 640), (1024, 1024), (4097, 384)])
def test_blocks_fit(topology, size, tokens, block):
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, topology, str(size), str(tokens)],
        env=environments.small(TPU_SKIP_MDS_QUERY="1", PYTHONPATH=os.getcwd()),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == str(block)
