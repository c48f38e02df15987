# SPDX-License-Identifier: Apache-2.0
"""What the compiler of a TPU v5e says of detecting objects in 5,000 images of COCO.

pip install -e '.[tpu,detection]'
python benchmarks/detection_tpu.py

Compiles the evaluation's program of configs/detect.py for one chip that is not there,
and prints its memory and time, as benchmarks/compiled.py does for training steps.
Pasting of masks and pycocotools run on the host and are not in it.
"""

import argparse
import os
import pathlib
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from mim_jax import config  # noqa: E402
from mim_jax.aot import hlo  # noqa: E402
from mim_jax.aot import step as aot  # noqa: E402
from mim_jax.aot.devices import devices_of, speed_of  # noqa: E402

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "detect.py"
IMAGES, GIB = 5000, 2**30
TOPOLOGY = "v5e:2x2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    args = parser.parse_args()
    tree = config.read(str(CONFIG))
    tree.batch_size = args.batch
    device = devices_of(TOPOLOGY)[0]
    plan, _ = aot.plan_on(tree, [device])
    here = SingleDeviceSharding(device)

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    params = jax.tree.map(placed, plan.abstract_state().params)
    shape = (args.batch, *plan.settings.data.image_shape)
    image = jax.ShapeDtypeStruct(shape, "uint8", sharding=here)
    size = jax.ShapeDtypeStruct((args.batch, 2), "int32", sharding=here)
    started = time.monotonic()
    compiled = jax.jit(plan.objective.detect).trace(params, image, size).lower()
    compiled = compiled.compile()
    found = aot.sizes(compiled)
    account = hlo.account(compiled.as_text() or "", speed_of(TOPOLOGY), 1)
    seconds = account["priced"] + account["unpriced"]
    print(f"{plan.forms}; {args.batch} images of {shape[1:]} at a time")
    print(f"compiled in {time.monotonic() - started:.0f} s")
    print(f"peak {found['peak_bytes'] / GIB:.2f} GiB")
    print(f"ms a batch: {1e3 * account['priced']:.1f} priced, ", end="")
    print(f"{1e3 * account['unpriced']:.1f} bound")
    print(f"{IMAGES} images: {IMAGES / args.batch * seconds:.0f} s")
    for name, part in sorted(account["parts"].items()):
        both = part["priced"] + part["unpriced"]
        if both:
            print(f"  {name:28} {both / seconds:.0%}")
    for name, one in list(account["unpriced_opcodes"].items())[:5]:
        print(f"  no estimate: {name}, {1e3 * one:.2f} ms")


if __name__ == "__main__":
    main()
