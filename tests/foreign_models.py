# SPDX-License-Identifier: Apache-2.0
"""Tiny networks of timm and transformers, saved in every way that we read.

    python tests/foreign_models.py

writes tests/fixtures/weights, for which torch, timm and transformers must be installed.
Every parameter is moved by noise, position tables too, so that none is neutral. Where
a family has no class in these packages (MAE as FAIR saves it, MoCo v3, DINO, CAE), its
names are given to the parameters of a network that computes the same.
"""

import argparse
import json
import pathlib
import platform
import sys
import warnings

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "weights"
SIDE, PATCH, WIDTH, DEPTH, HEADS, RATIO = 16, 4, 16, 2, 2, 2
NARROW, SHALLOW, DECODER_HEADS = 12, 1, 3
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VISIBLE, CLASSES = 4, 5

# How each is imported; what nothing in the file can tell.
SAID = {"heads": HEADS}
CASES = {
    "timm.safetensors": SAID,
    "timm_layer_scale.safetensors": SAID,
    "finetuned.pth": SAID,
    "mae.pth": SAID | {"decoder_heads": DECODER_HEADS},
    "mae_encoder.pth": SAID,
    "long_sequence.pth": SAID | {"decoder_heads": DECODER_HEADS},
    "mocov3.pth.tar": SAID,
    "dino.pth": SAID,
    "cae.pth": SAID,
    "beit.pth": {},
    "beit_finetuned.pth": {},
    "hf_mae": {},
    "hf_vit": {},
    "hf_vit_sharded": {},
    "hf_vit_bin": {},
    "hf_classifier": {},
    "hf_beit": {},
    "hf_beit_classifier": {},
}


def images() -> np.ndarray:
    """Three images in 0..1, "b h w c"."""
    random = np.random.RandomState(0)
    return random.uniform(size=(3, SIDE, SIDE, 3)).astype(np.float32)


def order() -> np.ndarray:
    """The patches of each image, "b n": the first VISIBLE ones are seen."""
    count = (SIDE // PATCH) ** 2
    return np.stack([np.random.RandomState(i).permutation(count) for i in range(3)])


def make(folder: pathlib.Path) -> None:
    """Writes every case, and NAME.npz with what its network computes."""
    import torch
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer

    torch.set_num_threads(1)
    _make_timm(folder, VisionTransformer)
    _make_beit(folder, Beit)
    _make_transformers(folder)


def _perturbed(network, seed: int):
    """The network with all its parameters moved."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in network.parameters():
            one.add_(0.1 * torch.randn(one.shape, generator=generator))
    return network.eval()


def _pixels(mean_and_std):
    import torch

    mean, std = (np.array(one, np.float32) for one in mean_and_std)
    return torch.tensor(((images() - mean) / std).transpose(0, 3, 1, 2))


def _keep(folder: pathlib.Path, name: str, **arrays) -> None:
    kept = {key: np.asarray(one.detach()) for key, one in arrays.items()}
    np.savez(folder / f"{name}.npz", **kept)


def _make_timm(folder: pathlib.Path, vit) -> None:
    import torch
    from safetensors.torch import save_file

    usual = dict(img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH)
    usual |= dict(num_heads=HEADS, mlp_ratio=RATIO, num_classes=CLASSES)
    pixels = _pixels(IMAGENET)
    for seed, (name, more) in enumerate(
        {
            "timm": dict(global_pool="token"),
            "timm_layer_scale": dict(global_pool="token", init_values=0.5),
        }.items()
    ):
        one = _perturbed(vit(**usual, **more), seed)
        save_file(one.state_dict(), folder / f"{name}.safetensors")
        tokens = one.forward_features(pixels)
        _keep(folder, f"{name}.safetensors", tokens=tokens, logits=one(pixels))
    one = _perturbed(vit(**usual, global_pool="avg"), 2)
    args = argparse.Namespace(model="vit_tiny", lr=1e-3, dist_on_itp=False)
    saved = dict(model=one.state_dict(), epoch=99, args=args)
    torch.save(saved, folder / "finetuned.pth")
    _keep(folder, "finetuned.pth", logits=one(pixels))

    one = _perturbed(vit(**usual | dict(num_classes=0), global_pool="token"), 3)
    state = one.state_dict()
    head = {"mlp.0.weight": torch.ones(4, WIDTH), "last_layer.weight_g": torch.ones(4)}
    other = {name: state[name] + 1 for name in ("cls_token", "norm.weight")}
    torch.save(dict(model=state), folder / "mae_encoder.pth")
    moco = {f"module.base_encoder.{key}": leaf for key, leaf in state.items()}
    moco |= {f"module.momentum_encoder.{key}": leaf for key, leaf in other.items()}
    moco |= {"module.base_encoder.head.0.weight": torch.ones(4, WIDTH)}
    moco |= {"module.predictor.0.weight": torch.ones(4, 4)}
    saved = dict(epoch=300, arch="vit_base", state_dict=moco)
    torch.save(saved, folder / "mocov3.pth.tar")
    teacher = {f"backbone.{key}": leaf for key, leaf in state.items()}
    student = {f"module.backbone.{key}": leaf for key, leaf in other.items()}
    teacher |= {f"head.{key}": leaf for key, leaf in head.items()}
    saved = dict(student=student, teacher=teacher, epoch=100, args=args)
    torch.save(saved, folder / "dino.pth")
    for name in ("mae_encoder.pth", "mocov3.pth.tar", "dino.pth"):
        _keep(folder, name, tokens=one.forward_features(pixels))


def _make_beit(folder: pathlib.Path, beit) -> None:
    import torch

    usual = dict(img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH)
    usual |= dict(num_heads=HEADS, mlp_ratio=RATIO, init_values=0.5)
    pixels = _pixels(IMAGENET)
    shared = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True)
    one = _perturbed(beit(**usual, **shared, num_classes=0, global_pool="token"), 4)
    state = one.state_dict() | {
        "mask_token": torch.ones(1, 1, WIDTH),
        "lm_head.weight": torch.ones(9, WIDTH),
        "lm_head.bias": torch.ones(9),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
    }
    torch.save(dict(model=state), folder / "beit.pth")
    _keep(folder, "beit.pth", tokens=one.forward_features(pixels))
    each = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, num_classes=CLASSES)
    one = _perturbed(beit(**usual, **each, global_pool="avg"), 5)
    torch.save(dict(module=one.state_dict()), folder / "beit_finetuned.pth")
    _keep(folder, "beit_finetuned.pth", logits=one(pixels))
    one = _perturbed(beit(**usual, num_classes=0, global_pool="token"), 6)
    state = {f"encoder.{key}": leaf for key, leaf in one.state_dict().items()}
    state |= {"teacher.cls_token": torch.ones(1, 1, WIDTH)}
    state |= {"mask_token": torch.ones(1, 1, WIDTH)}
    state |= {"pretext_neck.regressors.0.norm1_q.weight": torch.ones(WIDTH)}
    args = argparse.Namespace(imagenet_default_mean_and_std=True)
    torch.save(dict(model=state, args=args), folder / "cae.pth")
    _keep(folder, "cae.pth", tokens=one.forward_features(pixels))


def _make_transformers(folder: pathlib.Path) -> None:
    import torch
    import transformers as hf

    usual = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    usual |= dict(intermediate_size=RATIO * WIDTH, image_size=SIDE, patch_size=PATCH)
    decoder = dict(decoder_hidden_size=NARROW, decoder_num_hidden_layers=SHALLOW)
    decoder |= dict(decoder_num_attention_heads=DECODER_HEADS, norm_pix_loss=True)
    decoder |= dict(decoder_intermediate_size=RATIO * NARROW, mask_ratio=0.75)
    half = ((0.5,) * 3, (0.5,) * 3)

    def save(name, network, mean_and_std=half, **how):
        network.save_pretrained(folder / name, **how)
        mean, std = map(list, mean_and_std)
        about = dict(image_mean=mean, image_std=std)
        path = folder / name / "preprocessor_config.json"
        path.write_text(json.dumps(about))

    config = hf.ViTMAEConfig(**usual, **decoder, layer_norm_eps=1e-6)
    mae = _perturbed(hf.ViTMAEForPreTraining(config), 7)
    save("hf_mae", mae, IMAGENET)
    _keep(folder, "hf_mae", **_mae_outputs(mae))
    saved = dict(model=_as_fair(mae.state_dict()), epoch=1599)
    saved["args"] = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75)
    torch.save(saved, folder / "mae.pth")
    _keep(folder, "mae.pth", **_mae_outputs(mae))
    without = {
        key: torch.zeros_like(leaf) if key.endswith("k_proj.bias") else leaf
        for key, leaf in mae.state_dict().items()
    }
    mae.load_state_dict(without)
    state = _as_fair(mae.state_dict())
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        queries, _, values = state.pop(key).chunk(3)
        state[key.replace("qkv.bias", "q_bias")] = queries.clone()
        state[key.replace("qkv.bias", "v_bias")] = values.clone()
    saved["model"] = state
    saved["args"].mask_downsampling = 2
    torch.save(saved, folder / "long_sequence.pth")
    _keep(folder, "long_sequence.pth", **_mae_outputs(mae))

    pixels = _pixels(half)
    vit = _perturbed(hf.ViTModel(hf.ViTConfig(**usual)), 8)  # epsilon 1e-12
    found = vit(pixels).last_hidden_state
    save("hf_vit", vit)
    save("hf_vit_sharded", vit, max_shard_size="8KB")
    save("hf_vit_bin", vit)
    (folder / "hf_vit_bin" / "model.safetensors").unlink()
    torch.save(vit.state_dict(), folder / "hf_vit_bin" / "pytorch_model.bin")
    for name in ("hf_vit", "hf_vit_sharded", "hf_vit_bin"):
        _keep(folder, name, tokens=found)
    config = hf.ViTConfig(**usual, num_labels=CLASSES)
    one = _perturbed(hf.ViTForImageClassification(config), 9)
    save("hf_classifier", one)
    _keep(folder, "hf_classifier", logits=one(pixels).logits)

    masked = torch.ones(3, 16, dtype=torch.bool)
    masked.scatter_(1, torch.tensor(order()[:, :VISIBLE]), False)
    config = hf.BeitConfig(
        **usual,
        vocab_size=9,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.5,
    )
    one = _perturbed(hf.BeitForMaskedImageModeling(config), 10)
    save("hf_beit", one)

    def tokens(**more):
        return one.layernorm(one.beit(pixels, **more).last_hidden_state)

    _keep(
        folder, "hf_beit", tokens=tokens(), masked_tokens=tokens(bool_masked_pos=masked)
    )
    config = hf.BeitConfig(**usual, num_labels=CLASSES, use_relative_position_bias=True)
    one = _perturbed(hf.BeitForImageClassification(config), 11)
    save("hf_beit_classifier", one)
    _keep(folder, "hf_beit_classifier", logits=one(pixels).logits)


def _mae_outputs(mae) -> dict:
    """Tokens, predictions and loss, with the patches hidden that `order` says."""
    import torch

    noise = torch.tensor(np.argsort(order(), axis=1).astype(np.float32))
    pixels = _pixels(IMAGENET)
    found = mae(pixels, noise=noise)
    tokens = mae.vit(pixels, noise=noise).last_hidden_state
    return dict(seen_tokens=tokens, predictions=found.logits, loss=found.loss)


def _as_fair(state: dict) -> dict:
    """Parameters of transformers' MAE under the names of FAIR's program."""
    import torch

    found = {}
    for key, leaf in state.items():
        name = key.removeprefix("vit.").removeprefix("decoder.")
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("decoder_layers", "decoder_blocks"),
            ("attention.o_proj", "attn.proj"),
            ("attention.q_proj", "attn.qkv"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("layernorm", "norm"),
        ):
            name = name.replace(old, new)
        name = f"blocks{name[6:]}" if name.startswith("layers.") else name
        if "q_proj" in key:
            others = [state[key.replace("q_proj", f"{x}_proj")] for x in "kv"]
            leaf = torch.cat([leaf, *others])
        if "k_proj" not in key and "v_proj" not in key:
            found[name] = leaf.clone()
    return found


def main() -> None:
    import timm
    import torch
    import transformers

    warnings.simplefilter("ignore")
    FOLDER.mkdir(parents=True, exist_ok=True)
    make(FOLDER)
    made_by = {
        "command": "python tests/foreign_models.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "transformers": transformers.__version__,
        },
    }
    (FOLDER / "made.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
