# SPDX-License-Identifier: Apache-2.0
"""Memory of C-MAE's contrastive loss on a TPU, by the compiler, without a TPU.

pip install -e '.[tpu]' && python benchmarks/contrastive_memory.py --batch 1024 4096

Compiles value and gradient of the symmetric loss alone, for queries and keys given as
bfloat16 [batch, 196, 768] with rows spread over v5e:2x4, and prints one JSON line each.
"""

import argparse
import json
import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp

from mim_jax import sharding
from mim_jax.aot.devices import devices_of
from mim_jax.ops.contrastive import info_nce

POSITIONS, WIDTH = 196, 768


def symmetric(query1, key1, query2, key2):
    """C-MAE's default loss of both directions."""
    one = info_nce(query1, key2, 0.2).mean()
    return 0.5 * (one + info_nce(query2, key1, 0.2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--hlo", default="", help="file to write the program to")
    arguments = parser.parse_args()
    mesh = sharding.Mesh().build(devices_of(arguments.topology))
    rows = sharding.by_row(mesh)
    grad = jax.value_and_grad(symmetric, argnums=(0, 2))
    outputs = (sharding.replicated(mesh), (rows, rows))
    for batch in arguments.batch:
        shape = (batch, POSITIONS, WIDTH)
        tokens = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)
        jitted = jax.jit(grad, out_shardings=outputs)
        compiled = jitted.lower(*[tokens] * 4).compile()
        memory = compiled.memory_analysis()
        if arguments.hlo:
            with open(arguments.hlo, "w") as file:
                file.write(compiled.as_text())
        found = {
            "batch": batch,
            "topology": arguments.topology,
            "temp_gib": memory.temp_size_in_bytes / 2**30,
            "peak_gib": memory.peak_memory_in_bytes / 2**30,
            "argument_gib": memory.argument_size_in_bytes / 2**30,
            "jax": jax.__version__,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
