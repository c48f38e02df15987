# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs compute here what they compute there.

The numbers are those of timm and transformers, which `foreign_models.py` stored; where
both packages and torch are installed, they are computed anew.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from foreign_models import CASES, FOLDER, VISIBLE, images, make, order
from safetensors.numpy import save_file
from tables import restored

from mim_jax import config as configs
from mim_jax.data.sources.mnist import Mnist
from mim_jax.interop import foreign, reading, writing
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import patch_mse

LIVE = all(map(importlib.util.find_spec, ("torch", "timm", "transformers")))
live = pytest.mark.skipif(not LIVE, reason="torch, timm or transformers is missing")
# What each format can hold, and what is left out of it.
WRITTEN = {
    "hf": ("mae.pth", "hf_mae", "long_sequence.pth", "hf_vit", "hf_classifier"),
    "timm": (
        *("timm.safetensors", "timm_layer_scale.safetensors", "finetuned.pth"),
        *("mae_encoder.pth", "beit_finetuned.pth", "cae.pth"),
    ),
}
# Leaves of the config that the format does not say.
MASKING = {f"config.objective.masking.{name}" for name in ("unit", "partial_units")}
NOT_SAID = {"hf": MASKING, "timm": {"config.objective.pool"}}
PAIRS = [(kind, name) for kind, names in WRITTEN.items() for name in names]


def read(path: pathlib.Path) -> foreign.Converted:
    return foreign.convert(reading.read(path), foreign.Said(**CASES[path.name]))


def close(found, want) -> None:
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-5, atol=1e-5)


def check(folder: pathlib.Path, name: str) -> None:
    """An imported network has the outputs that its own program stored."""
    found, want = read(folder / name), dict(np.load(folder / f"{name}.npz"))
    objective = configs.build_objective(found.config)
    params = traverse_util.unflatten_dict(found.params, sep="/")
    pixels, shuffled = jnp.asarray(images()), jnp.asarray(order(), jnp.int32)
    mask = Mask(shuffled[:, :VISIBLE], shuffled[:, VISIBLE:])
    outputs = {}
    if "tokens" in want:
        outputs["tokens"], _ = objective.encode(params, pixels)
    if "logits" in want:
        outputs["logits"] = objective.logits(params, {}, pixels)
    if "masked_tokens" in want:
        assert objective.occlusion == "mask_token"
        outputs["masked_tokens"], _ = objective.encode_masked(params, pixels, mask)
    if "loss" in want:
        patches, grid = objective.patches(pixels)
        outputs["seen_tokens"], _ = objective.encode(params, pixels, keep=mask.keep)
        predicted, _ = objective.predict(params, patches, grid, mask)
        target = objective.target(pixels, mask.drop)
        outputs["loss"] = patch_mse(predicted, target).mean()
        rows = np.asarray(mask.drop)[:, :, None]
        want["predictions"] = np.take_along_axis(want["predictions"], rows, axis=1)
        outputs["predictions"] = predicted
    assert outputs.keys() == want.keys()
    for key, value in want.items():
        assert np.abs(value).max() > 0.1
        close(outputs[key], value)


@pytest.mark.parametrize("name", CASES)
def test_an_imported_network_computes_what_its_own_program_did(name):
    check(FOLDER, name)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("weights")
    make(folder)
    return folder


@live
@pytest.mark.parametrize("name", CASES)
def test_and_what_it_computes_here(name, made):
    check(made, name)


# Out again.


def written(kind: str, name: str, folder: pathlib.Path) -> foreign.Converted:
    """An imported network, written into a folder as another program has it."""
    found = read(FOLDER / name)
    about, tensors, _ = writing.converted(found.config, found.params, kind, name)
    tensors = {key: np.ascontiguousarray(one) for key, one in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file, values in about.items():
        (folder / file).write_text(json.dumps(values))
    return found


def bits(found: foreign.Converted) -> dict[str, tuple]:
    return {key: (one.shape, one.tobytes()) for key, one in found.params.items()}


@pytest.mark.parametrize("kind, name", PAIRS)
def test_a_network_that_is_written_and_read_has_the_same_bits(kind, name, tmp_path):
    found = written(kind, name, tmp_path)
    again = foreign.convert(reading.read(tmp_path), foreign.Said())
    assert bits(again) == bits(found) and len(found.params) > 20
    differ = configs.difference(found.config, again.config)
    assert {line.split(":")[0] for line in differ} <= NOT_SAID[kind]


@pytest.mark.parametrize("kind, name", [("hf", "hf_classifier"), ("timm", PAIRS[5][1])])
def test_what_is_written_is_what_that_program_wrote(kind, name, tmp_path):
    written(kind, name, tmp_path)
    theirs = reading.read(FOLDER / name).tensors
    mine = reading.read(tmp_path).tensors
    assert mine.keys() == theirs.keys()
    for key, one in theirs.items():
        assert one.read().tobytes() == mine[key].read().tobytes(), key


@live
@pytest.mark.parametrize("kind, name", PAIRS)
def test_that_program_reads_what_was_written(kind, name, tmp_path):
    import timm
    import torch
    import transformers

    config = written(kind, name, tmp_path).config
    want = dict(np.load(FOLDER / f"{name}.npz"))
    mean, std = (np.array(config.objective[x], np.float32) for x in ("mean", "std"))
    pixels = torch.tensor(((images() - mean) / std).transpose(0, 3, 1, 2))
    with torch.no_grad():
        if kind == "timm":
            one = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            found = {"tokens": one.forward_features(pixels), "logits": one(pixels)}
        elif "loss" in want:
            cls = transformers.ViTMAEForPreTraining
            one, about = cls.from_pretrained(tmp_path, output_loading_info=True)
            noise = torch.tensor(np.argsort(order(), axis=1).astype(np.float32))
            out = one.eval()(pixels, noise=noise)
            found = {"loss": out.loss, "predictions": out.logits}
        elif "logits" in want:
            cls = transformers.ViTForImageClassification
            one, about = cls.from_pretrained(tmp_path, output_loading_info=True)
            found = {"logits": one.eval()(pixels).logits}
        else:
            cls = transformers.ViTModel
            one, about = cls.from_pretrained(
                tmp_path, output_loading_info=True, add_pooling_layer=False
            )
            found = {"tokens": one.eval()(pixels).last_hidden_state}
    if kind == "hf":
        assert not any(about[word] for word in ("missing_keys", "unexpected_keys"))
    keys = want.keys() & found.keys()
    assert keys
    for key in keys:
        close(found[key], want[key])


@pytest.mark.parametrize(
    "kind, name, why",
    [
        ("hf", "beit.pth", "encoder.relative_positions=True: the format has none"),
        ("hf", "finetuned.pth", "its last norm is of the mean of patch tokens"),
        ("timm", "hf_vit", "encoder.epsilon=1e-12: timm's is 1e-06"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(kind, name, why):
    found = read(FOLDER / name)
    with pytest.raises(configs.ConfigError) as caught:
        writing.converted(found.config, found.params, kind, name)
    assert str(caught.value).startswith(f"{name}, --format={kind}: {why}")


@pytest.mark.parametrize(
    "kind, name, left",
    [
        ("timm", "beit.pth", "encoder/mask_token"),
        ("timm", "mae.pth", "decoder"),
        ("timm", "timm.safetensors", ""),
        ("hf", "hf_mae", ""),
    ],
)
def test_what_a_format_leaves_out_is_told(kind, name, left):
    found = read(FOLDER / name)
    *_, notes = writing.converted(found.config, found.params, kind, name)
    told = [note for note in notes if note.startswith("left out")]
    assert told == [f"left out, since the format has none: {left}"] * bool(left)


def test_a_number_that_a_format_has_no_place_for_is_refused():
    found = read(FOLDER / "beit_finetuned.pth")
    name = "encoder/block01/attn/qkv/bias"
    params = found.params | {name: found.params[name] + 1}
    with pytest.raises(configs.ConfigError) as caught:
        writing.converted(found.config, params, "timm", "x")
    assert str(caught.value) == (
        f"x, --format=timm: {name}: a bias of keys is not 0, and the format has none"
    )


@pytest.mark.parametrize(
    "name, about, images, said",
    [
        *[
            ("hf_vit", {"layer_norm_eps": x}, {}, "layer_norm_eps=")
            for x in ("x", None)
        ],
        (
            "hf_vit",
            {"image_size": ["a", 8]},
            {},
            "image_size='a': want a finite number",
        ),
        ("hf_vit", {"image_size": [8, float("nan")]}, {}, "image_size=nan"),
        *[
            (name, {"image_size": size}, {}, "positions, and holds [0-9]+: want a size")
            for name in ("hf_vit", "hf_beit")
            for size in ([10**9, 10**9], [-16, -16], [0, 0])
        ],
        ("hf_vit", {}, {"image_mean": ["x"], "image_std": [1]}, "image_mean='x'"),
    ],
)
def test_what_a_config_claims_is_checked_before_it_is_used(name, about, images, said):
    source = reading.read(FOLDER / name)
    other = dataclasses.replace(
        source, about=source.about | about, images=source.images | images
    )
    with pytest.raises(configs.ConfigError, match=said):
        foreign.convert(other, foreign.Said())


def test_an_activation_that_is_not_ours_is_refused():
    source = reading.read(FOLDER / "hf_vit")
    other = dataclasses.replace(source, about=source.about | {"hidden_act": "relu"})
    with pytest.raises(configs.ConfigError, match="hidden_act='relu': want 'gelu'"):
        foreign.convert(other, foreign.Said())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unplaced(Mnist):
    """A source that wants a setting before it can say anything."""

    root: str = ""

    def __post_init__(self):
        if not self.root:
            raise ValueError("root='': want a folder")


def test_a_source_that_cannot_say_its_channels_is_asked_by_the_run():
    source = reading.read(FOLDER / "hf_vit")
    with restored():
        configs.register("unplaced", Unplaced)
        converted = foreign.convert(source, foreign.Said(source="unplaced"))
    assert converted.config.data.source.name == "unplaced"


@pytest.mark.parametrize("name, refused", [("mnist", True), ("photos", False)])
def test_colour_weights_want_a_source_in_colour(name, refused):
    source = reading.read(FOLDER / "hf_vit")
    convert = functools.partial(foreign.convert, source, foreign.Said(source=name))
    if refused:
        with pytest.raises(configs.ConfigError, match="1 channel.*those of 3: want"):
            convert()
    else:
        assert convert().config.data.source.name == "photos"
