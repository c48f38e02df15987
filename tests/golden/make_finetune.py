# SPDX-License-Identifier: Apache-2.0
"""Writes finetune.npz: pieces of fine-tuning as timm and torch compute them.

python tests/golden/make_finetune.py, where the extra `oracle` is installed.
"""

import json
import pathlib

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data
from timm.data import auto_augment
from timm.layers import calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from timm.optim._param_groups import param_groups_layer_decay

# Our name of an operation: timm's, and whether it has a direction.
OPERATIONS = {
    "auto_contrast": ("AutoContrast", False),
    "equalize": ("Equalize", False),
    "invert": ("Invert", False),
    "rotate": ("Rotate", True),
    "posterize": ("PosterizeIncreasing", False),
    "solarize": ("SolarizeIncreasing", False),
    "solarize_add": ("SolarizeAdd", False),
    "color": ("ColorIncreasing", True),
    "contrast": ("ContrastIncreasing", True),
    "brightness": ("BrightnessIncreasing", True),
    "sharpness": ("SharpnessIncreasing", True),
    "shear_x": ("ShearX", True),
    "shear_y": ("ShearY", True),
    "translate_x": ("TranslateXRel", True),
    "translate_y": ("TranslateYRel", True),
}
SHARES = (0.3, 0.9)
FILL = (124, 116, 104)


def picture() -> np.ndarray:
    """A crop with colours, edges and dark and bright places."""
    return data.astronaut()[100:124, 180:212]


def vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=(16, 24),
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=5,
        global_pool="avg",
    )


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Numbers for every parameter; the streams of RandomState are frozen for good."""
    found = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        value = 0.3 * np.random.RandomState([7, i]).standard_normal(shape)
        found[name] = value + (1 if "norm" in name and name.endswith("weight") else 0)
    return found


def logits() -> np.ndarray:
    model = vit().double().eval()
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}
    weights = {name: torch.tensor(x) for name, x in draw(shapes).items()}
    model.load_state_dict(weights)
    pixels = np.random.RandomState(8).standard_normal((3, 3, 16, 24))
    with torch.no_grad():
        return model(torch.tensor(pixels)).numpy()


def layers() -> dict[str, list]:
    """[share of the learning rate, decays] of each parameter, by timm's name."""
    model = vit()
    groups = param_groups_layer_decay(
        model, 0.05, model.no_weight_decay(), layer_decay=0.65
    )
    names = {id(x): name for name, x in model.named_parameters()}
    return {
        names[id(x)]: [group["lr_scale"], group["weight_decay"] > 0]
        for group in groups
        for x in group["params"]
    }


def lars() -> list[np.ndarray]:
    """Kernel and bias after each of three steps with different rates."""
    random = np.random.RandomState(9)
    kernel, bias = (
        torch.nn.Parameter(torch.tensor(random.standard_normal(shape)))
        for shape in ((4, 3), (3,))
    )
    # The trust ratio is for the kernel alone.
    always = dict(momentum=0.9, trust_coeff=0.001, eps=0.0, lr=1.0)
    optimisers = [
        Lars([kernel], always_adapt=True, **always),
        Lars([bias], always_adapt=False, **always),
    ]
    found = []
    for rate in (6.4, 3.2, 0.5):
        for parameter, optimiser in zip((kernel, bias), optimisers, strict=True):
            parameter.grad = torch.tensor(random.standard_normal(parameter.shape))
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
        found += [x.detach().numpy().copy() for x in (kernel, bias)]
    return found


def operations() -> dict[str, np.ndarray]:
    """The picture after each operation of RandAugment, for both signs."""
    found, image = {}, Image.fromarray(picture())
    arguments = dict(fillcolor=FILL, resample=Image.Resampling.BICUBIC)
    for ours, (theirs, directed) in OPERATIONS.items():
        level_of = auto_augment.LEVEL_TO_ARG[theirs]
        for share in SHARES:
            for sign in (1, -1) if directed else (1,):
                # It draws the sign itself: > 0.5 is minus.
                auto_augment.random.random = lambda sign=sign: 0.4 if sign > 0 else 0.6
                level = level_of(10 * share, {}) if level_of else ()
                changed = auto_augment.NAME_TO_OP[theirs](image, *level, **arguments)
                found[f"{ours} {share} {sign}"] = np.asarray(changed)
    return found


def positions() -> dict[str, np.ndarray]:
    table = np.random.RandomState(10).standard_normal((3, 4, 8))
    found = {"table": table}
    for size in ((5, 6), (2, 4), (6, 3)):
        resized = torch.nn.functional.interpolate(
            torch.tensor(table.transpose(2, 0, 1)[None]),
            size=size,
            mode="bicubic",
            align_corners=False,
        )
        found[f"{size[0]}x{size[1]}"] = resized[0].numpy().transpose(1, 2, 0)
    return found


def main() -> None:
    about = {
        "command": "python tests/golden/make_finetune.py",
        "versions": {"timm": timm.__version__, "torch": torch.__version__},
        "layers": layers(),
        "drop_path": [float(rate) for rate in calculate_drop_path_rates(0.1, 12)],
    }
    arrays = {"logits": logits()}
    arrays |= {f"lars {i}": leaf for i, leaf in enumerate(lars())}
    arrays |= {f"randaugment {name}": leaf for name, leaf in operations().items()}
    arrays |= {f"positions {name}": leaf for name, leaf in positions().items()}
    path = pathlib.Path(__file__).parent / "finetune.npz"
    np.savez_compressed(path, about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main()
