# SPDX-License-Identifier: Apache-2.0
"""Run transformers' ViTMAEForPreTraining in float64 and store what it computes.

    PYTHONPATH=tests python tests/golden/make_vitmae.py

writes `vitmae_*.npz` and `vitmae.json`, with the versions that made them, beside this
file. It needs the extra `oracle`; neither JAX nor mim_jax takes part.
"""

import dataclasses
import json
import pathlib
import platform

import numpy as np
import torch
import transformers
from hf_layout import CASES, Case, draw
from transformers.models.vit_mae import modeling_vit_mae

SAMPLES = 400  # entries of large arrays that are stored


class Rectangular(transformers.ViTMAEForPreTraining):
    """Without the check that images are square: the code behind it is general."""

    def patchify(self, pixel_values, interpolate_pos_encoding=False):
        return super().patchify(pixel_values, interpolate_pos_encoding=True)


def build(case: Case, weights: dict[str, np.ndarray]) -> Rectangular:
    """Their network with given weights, in float64.

    The grid of a case has as many patches as some square one, since their initial
    position tables, replaced below, are square.
    """
    (width, depth, heads), (narrow, shallow, few) = case.encoder, case.decoder
    config = transformers.ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=int(case.mlp_ratio * width),
        layer_norm_eps=1e-6,  # the reference's; the default here is 1e-12
        image_size=(case.height, case.width),
        patch_size=case.patch,
        num_channels=case.channels,
        decoder_hidden_size=narrow,
        decoder_num_hidden_layers=shallow,
        decoder_num_attention_heads=few,
        decoder_intermediate_size=int(case.mlp_ratio * narrow),
        mask_ratio=case.ratio,
        norm_pix_loss=case.normalise_target,
    )
    model = Rectangular(config).double().eval()
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    state["vit.embeddings.position_embeddings"] = table(case, width)
    state["decoder.decoder_pos_embed"] = table(case, narrow)
    model.load_state_dict(state, strict=True)
    return model


def table(case: Case, width: int) -> torch.Tensor:
    """Their position table as they initialise it: columns first, in float32."""
    rows_first = modeling_vit_mae.build_2d_sinusoidal_position_embedding(
        case.height // case.patch, case.width // case.patch, width, cls_token=True
    )
    return rows_first.roll(width // 2, dims=-1)[None]


def run(model: Rectangular, pixels: np.ndarray, noise: np.ndarray) -> dict:
    """Outputs in the model's own precision, and the gradient of each weight.

    tokens: of the encoder, the class token first, then visible patches by rising noise.
    predictions: in grid order. hidden: 1 where the encoder does not see.
    """
    dtype = next(model.parameters()).dtype
    pixels, noise = torch.from_numpy(pixels).to(dtype), torch.from_numpy(noise)
    model.zero_grad()
    with torch.no_grad():
        tokens = model.vit(pixels, noise=noise).last_hidden_state
    outputs = model(pixels, noise=noise)
    outputs.loss.backward()
    return {
        "tokens": tokens.numpy(),
        "predictions": outputs.logits.detach().numpy(),
        "hidden": outputs.mask.numpy().astype(bool),
        "loss": outputs.loss.detach().numpy(),
        "gradients": {
            name: parameter.grad.numpy()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


def stored(case: Case) -> dict[str, np.ndarray]:
    """What is written of a case; see `golden_test.py` for what is done with it."""
    weights, pixels, noise = draw(case)
    result = run(build(case, weights), pixels, noise)
    arrays = {name: result[name] for name in ("tokens", "predictions")}
    if not case.stored:
        arrays = {name: sample(value) for name, value in arrays.items()}
    arrays["hidden"], arrays["loss"] = result["hidden"], result["loss"]
    names = list(weights)
    gradients = [result["gradients"][name] for name in names]
    arrays["gradient_norms"] = np.array([np.linalg.norm(x) for x in gradients])
    arrays["gradient_dots"] = np.array(
        [(g * weights[x]).sum() for x, g in zip(names, gradients, strict=True)]
    )
    if case.stored:
        arrays |= {"pixels": pixels, "noise": noise}
        arrays |= {f"weights/{name}": value for name, value in weights.items()}
    return arrays


def sample(values: np.ndarray) -> np.ndarray:
    """A few hundred entries, evenly spread over an array of any size."""
    chosen = np.linspace(0, values.size - 1, SAMPLES).astype(np.int64)
    return values.ravel()[chosen]


def main() -> None:
    torch.set_num_threads(1)
    folder = pathlib.Path(__file__).parent
    for name, case in CASES.items():
        arrays = stored(case)
        np.savez_compressed(folder / f"vitmae_{name}.npz", **arrays)
        print(name, f"loss {arrays['loss']:.15f}")
    made_by = {
        "command": "PYTHONPATH=tests python tests/golden/make_vitmae.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cases": {name: dataclasses.asdict(case) for name, case in CASES.items()},
    }
    (folder / "vitmae.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main()
