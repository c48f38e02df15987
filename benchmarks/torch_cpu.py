# SPDX-License-Identifier: Apache-2.0
"""MAE on the CPU beside PyTorch: a training step and the encoder, interleaved.

pip install -e '.[oracle]'
python benchmarks/torch_cpu.py

The same work on both sides: float32, transformers' ViTMAE of the same sizes, the same
batch of uint8 images, AdamW; eager, and compiled by inductor (which wants a C++
compiler). Each side has a process of its own, as it would in use, and they take turns
of four steps, of which the first is left out: it fetches back what another one took of
the caches and of the memory. Prints medians in milliseconds, and the median of the
ratios of each round.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import statistics
import time
import warnings

import numpy as np

from mim_jax.models.vit import SIZES
from mim_jax.ops.patches import to_float
from mim_jax.plan import Plan

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "mae.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(size: str, images: np.ndarray) -> dict:
    """{what: a function that does it once}."""
    import jax
    import jax.numpy as jnp

    from mim_jax import config, train
    from mim_jax.objectives.base import apply

    tree = config.read(f"{CONFIG}:photos")
    leaves = dict(mean=MEAN, std=STD, **{f"encoder.{k}": v for k, v in size_of(size)})
    leaves["color_jitter"] = "none"
    leaves |= {"decoder.width": 512, "decoder.depth": 8, "decoder.heads": 16}
    tree.update_from_flattened_dict({f"objective.{k}": v for k, v in leaves.items()})
    tree.data.image_size = images.shape[1:3]
    tree.batch_size = len(images)
    plan = Plan.of(tree)
    step = train.lowered(plan).compile()
    state = [jax.jit(plan.create)()]
    objective = plan.settings.objective

    @jax.jit
    def encode(params, images):
        patches, grid = objective.patches(to_float(images))
        return apply(objective.encoder, params["encoder"], patches, grid)[0]

    params = jax.tree.map(jnp.copy, state[0].params)

    def train_once():
        state[0], values = step(state[0], {"image": images})
        return float(values["loss"])

    multiply = jax.jit(lambda x, w, g: (x @ w, g @ w.T, x.T @ g))
    drawn = [tuple(map(jnp.asarray, each)) for each in factors(size, len(images))]
    return {
        "training step": train_once,
        "encoder": lambda: jax.block_until_ready(encode(params, images)),
        "products": lambda: jax.block_until_ready([multiply(*it) for it in drawn]),
    }


def theirs(size: str, images: np.ndarray, compiled: bool) -> dict:
    """Likewise."""
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
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

    drawn = [tuple(map(torch.from_numpy, it)) for it in factors(size, len(images))]

    def multiply():
        return [(x @ w, g @ w.T, x.T @ g) for x, w, g in drawn]

    return {"training step": train_once, "encoder": encode_once, "products": multiply}


_SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
)


def factors(size: str, batch: int) -> list[tuple[np.ndarray, ...]]:
    """Inputs, weights and gradients of the first layer of each network's MLP."""
    random, width = np.random.default_rng(0), SIZES[size]["width"]
    shapes = [(50 * batch, width, 4 * width), (197 * batch, 512, 2048)]
    return [
        tuple(
            random.normal(size=shape).astype(np.float32)
            for shape in [(rows, d), (d, e), (rows, e)]
        )
        for rows, d, e in shapes
    ]


def size_of(name: str) -> list[tuple[str, int]]:
    """Fields of an encoder."""
    return list(({"patch": 16} | SIZES[name]).items())


def side(name: str, size: str, images: np.ndarray, pipe) -> None:
    """A process that does what it is told to, and sends back milliseconds."""
    if name == "ours":
        jobs = ours(size, images)
    else:
        jobs = theirs(size, images, compiled=name == "torch compiled")
    while work := pipe.recv():
        times = []
        for _ in range(TURN):
            before = time.perf_counter()
            jobs[work]()
            times.append(1e3 * (time.perf_counter() - before))
        pipe.send(statistics.median(times[1:]))


TURN = 4
WORKS = ("training step", "encoder", "products")
SIDES = ("ours", "torch eager", "torch compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="B", choices=["Ti", "S", "B", "L"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    args = parser.parse_args()
    shape = (args.batch, 224, 224, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pipes = {}
    context = multiprocessing.get_context("spawn")
    for name in SIDES:
        pipes[name], far = context.Pipe()
        given = (name, args.size, images, far)
        context.Process(target=side, args=given).start()
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "torch", "transformers")
    ]
    print(
        f"ViT-{args.size}/16, {args.batch} images of 224 x 224, {args.rounds} rounds; "
        f"{', '.join(versions)}, {os.cpu_count()} cores, {platform.machine()}\n\n"
        "| work | ours | torch eager | torch compiled | eager / ours | "
        "compiled / ours |\n|---|---|---|---|---|---|"
    )

    def turn(name, work):
        pipes[name].send(work)
        return pipes[name].recv()

    for work in args.works:
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for name in SIDES:
            turn(name, work)  # compiles
        for number in range(args.rounds):
            first = number % len(SIDES)
            for name in SIDES[first:] + SIDES[:first]:
                times[name].append(turn(name, work))
        medians = [f"{statistics.median(each):.0f}" for each in times.values()]
        ratios = [
            statistics.median(
                other / mine
                for other, mine in zip(times[name], times["ours"], strict=True)
            )
            for name in SIDES[1:]
        ]
        shown = [f"{ratio:.2f}" for ratio in ratios]
        print("| " + " | ".join([work, *medians, *shown]) + " |", flush=True)
    for pipe in pipes.values():
        pipe.send("")


if __name__ == "__main__":
    main()
