# SPDX-License-Identifier: Apache-2.0
"""A side of benchmarks/gpu.py: PyTorch trains transformers' ViTMAE, compiled."""

import time

from gpu import Absent, serve

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(sizes: dict, batch: int, steps: int, small: bool):
    """Facts of the step, and what runs a turn."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Absent(
            f"no module {error.name}: want pip install -e '.[oracle]'"
        ) from error
    if not small and not torch.cuda.is_available():
        raise Absent(f"PyTorch {torch.__version__} sees no GPU")
    device = "cpu" if small else "cuda"
    torch.set_float32_matmul_precision("high")
    transformers.logging.set_verbosity_error()
    settings = transformers.ViTMAEConfig(
        norm_pix_loss=True, attn_implementation="sdpa", **sizes
    )
    model = transformers.ViTMAEForPreTraining(settings).to(device)
    # Compiling for a CPU takes a C++ compiler and minutes: the small test only traces.
    forward = torch.compile(model, backend="eager" if small else "inductor")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    side = settings.image_size
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    images = images.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))

    def train_once():
        optimiser.zero_grad(set_to_none=True)
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        with torch.autocast(device, torch.bfloat16):
            loss = forward(pixels).loss
        loss.backward()
        optimiser.step()

    def wait():
        if not small:
            torch.cuda.synchronize()

    def turn():
        train_once()
        wait()
        before = time.perf_counter()
        for _ in range(steps):
            train_once()
        wait()
        seconds = time.perf_counter() - before
        peak = None if small else torch.cuda.max_memory_allocated()
        return {"ms": 1e3 * seconds / steps, "peak_bytes": peak}

    facts = {
        "device": "cpu" if small else torch.cuda.get_device_name(),
        "attention": model.config._attn_implementation,
        "versions": {x.__name__: x.__version__ for x in (torch, transformers)},
    }
    return facts, turn


if __name__ == "__main__":
    serve(build)
