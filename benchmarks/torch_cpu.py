# SPDX-License-Identifier: Apache-2.0
"""MAE on the CPU beside PyTorch: a training step and the encoder, interleaved.

pip install -e '.[oracle]'
python benchmarks/torch_cpu.py

The same work on both sides: float32, transformers' ViTMAE of the same sizes, the same
batch of uint8 images, AdamW; eager, and compiled by inductor (which wants a C++
compiler). Prints medians in milliseconds, and the median of the ratios of each round.
"""

import argparse
import pathlib
import platform
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mim_jax import config, train
from mim_jax.models.vit import SIZES
from mim_jax.objectives.base import apply
from mim_jax.ops import augment

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "mae.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(size: str, batch: int, images: np.ndarray) -> dict:
    """{what: a function that does it once}."""
    tree = config.read(f"{CONFIG}:photos")
    leaves = dict(mean=MEAN, std=STD, **{f"encoder.{k}": v for k, v in size_of(size)})
    leaves["color_jitter"] = "none"
    leaves |= {"decoder.width": 512, "decoder.depth": 8, "decoder.heads": 16}
    tree.update_from_flattened_dict({f"objective.{k}": v for k, v in leaves.items()})
    tree.data.image_size = images.shape[1:3]
    tree.batch_size = batch
    plan = train.Plan.of(tree)
    step = plan.lowered().compile()
    state = [jax.jit(plan.create)()]
    objective = plan.settings.objective

    @jax.jit
    def encode(params, images):
        patches, grid = objective.patches(augment.to_float(images))
        return apply(objective.encoder, params["encoder"], patches, grid)[0]

    params = jax.tree.map(jnp.copy, state[0].params)

    def train_once():
        state[0], values = step(state[0], {"image": images})
        return float(values["loss"])

    return {
        "training step": train_once,
        "encoder": lambda: jax.block_until_ready(encode(params, images)),
    }


def theirs(size: str, images: np.ndarray, compiled: bool) -> dict:
    """Likewise."""
    width, depth, heads = (dict(size_of(size))[k] for k in ("width", "depth", "heads"))
    settings = transformers.ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=images.shape[1],
        norm_pix_loss=True,
    )
    model = transformers.ViTMAEForPreTraining(settings)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
    )
    encoder = transformers.ViTModel(
        transformers.ViTConfig(**{name: getattr(settings, name) for name in _SHARED}),
        add_pooling_layer=False,
    ).eval()
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    forward = torch.compile(model) if compiled else model
    encode = torch.compile(encoder) if compiled else encoder

    def pixels():
        chosen = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return (chosen / 255 - mean) / std

    def train_once():
        optimiser.zero_grad()
        loss = forward(pixels()).loss
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    def encode_once():
        with torch.inference_mode():
            return encode(pixels()).last_hidden_state

    return {"training step": train_once, "encoder": encode_once}


_SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
)


def size_of(name: str) -> list[tuple[str, int]]:
    """Fields of an encoder."""
    return list(({"patch": 16} | SIZES[name]).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B", choices=["Ti", "S", "B", "L"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    shape = (args.batch, 224, 224, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sides = {
        "ours": ours(args.size, args.batch, images),
        "torch eager": theirs(args.size, images, compiled=False),
        "torch compiled": theirs(args.size, images, compiled=True),
    }
    print(
        f"ViT-{args.size}/16, {args.batch} images of 224 x 224, {args.rounds} rounds; "
        f"jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}\n\n| work | ours | torch eager | torch compiled | "
        "eager / ours | compiled / ours |\n|---|---|---|---|---|---|"
    )
    for work in ("training step", "encoder"):
        times: dict[str, list[float]] = {side: [] for side in sides}
        for jobs in sides.values():
            jobs[work]()  # compiles
            jobs[work]()
        for number in range(args.rounds):
            order = list(sides)
            for side in order[number % 3 :] + order[: number % 3]:
                before = time.perf_counter()
                sides[side][work]()
                times[side].append(1e3 * (time.perf_counter() - before))
        medians = [f"{statistics.median(each):.0f}" for each in times.values()]
        ratios = [
            statistics.median(
                other / mine
                for other, mine in zip(times[side], times["ours"], strict=True)
            )
            for side in list(sides)[1:]
        ]
        shown = [f"{ratio:.2f}" for ratio in ratios]
        print("| " + " | ".join([work, *medians, *shown]) + " |", flush=True)


if __name__ == "__main__":
    main()
