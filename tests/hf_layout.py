# SPDX-License-Identifier: Apache-2.0
"""MAE networks under the names of transformers' ViTMAEForPreTraining, in numpy.

Shared by `golden/make_vitmae.py` and `golden_test.py`. Names are those of transformers
5; position tables are computed on both sides, so they are not among the weights.
"""

import dataclasses

import numpy as np

# Ours: theirs, inside a block and for the leaves outside of blocks.
_BLOCK = {
    "ln1": "layernorm_before",
    "attn/out": "attention.o_proj",
    "ln2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_REST = {
    "encoder": {
        "cls_token": "vit.embeddings.cls_token",
        "embed": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
    },
    "decoder": {
        "embed": "decoder.decoder_embed",
        "mask_token": "decoder.mask_token",
        "norm": "decoder.decoder_norm",
        "predict": "decoder.decoder_pred",
    },
}
_LAYERS = {"encoder": "vit.layers", "decoder": "decoder.decoder_layers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A network and its inputs; sides in pixels, `stored` with its weights and inputs.

    What is not stored is drawn again from the seed.
    """

    seed: int
    height: int
    width: int
    channels: int
    patch: int
    encoder: tuple[int, int, int]  # width, depth, heads
    decoder: tuple[int, int, int]
    mlp_ratio: float
    ratio: float
    normalise_target: bool
    stored: bool
    batch: int = 2

    @property
    def patches(self) -> int:
        return self.height * self.width // self.patch**2

    @property
    def visible(self) -> int:
        """As transformers counts; a whole number at these ratios, so as we do too."""
        return int(self.patches * (1 - self.ratio))


# Each number that can differ from another does, and none is a default.
CASES = {
    "wide": Case(
        seed=1,
        height=12,
        width=48,
        channels=5,
        patch=4,
        encoder=(16, 3, 2),
        decoder=(12, 2, 3),
        mlp_ratio=4.0,
        ratio=0.75,
        normalise_target=True,
        stored=True,
    ),
    "gray": Case(
        seed=2,
        height=20,
        width=20,
        channels=1,
        patch=5,
        encoder=(20, 2, 5),
        decoder=(8, 1, 2),
        mlp_ratio=2.5,
        ratio=0.5,
        normalise_target=False,
        stored=True,
        batch=3,
    ),
    "base": Case(  # ViT-B/16 and the decoder of the paper
        seed=3,
        height=224,
        width=224,
        channels=3,
        patch=16,
        encoder=(768, 12, 12),
        decoder=(512, 8, 16),
        mlp_ratio=4.0,
        ratio=0.75,
        normalise_target=True,
        stored=False,
        batch=1,
    ),
}


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, as transformers has them."""
    result = {}

    def linear(name, inputs, outputs):
        result[f"{name}.weight"], result[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, width):
        result[f"{name}.weight"], result[f"{name}.bias"] = (width,), (width,)

    def layers(name, width, depth):
        for i in range(depth):
            block = f"{name}.{i}"
            norm(f"{block}.layernorm_before", width)
            for letter in "qkvo":
                linear(f"{block}.attention.{letter}_proj", width, width)
            norm(f"{block}.layernorm_after", width)
            linear(f"{block}.mlp.fc1", width, int(case.mlp_ratio * width))
            linear(f"{block}.mlp.fc2", int(case.mlp_ratio * width), width)

    (width, depth, _), (narrow, shallow, _) = case.encoder, case.decoder
    embed = _REST["encoder"]["embed"]
    result["vit.embeddings.cls_token"] = (1, 1, width)
    result[f"{embed}.weight"] = (width, case.channels, case.patch, case.patch)
    result[f"{embed}.bias"] = (width,)
    layers("vit.layers", width, depth)
    norm("vit.layernorm", width)
    linear("decoder.decoder_embed", width, narrow)
    result["decoder.mask_token"] = (1, 1, narrow)
    layers("decoder.decoder_layers", narrow, shallow)
    norm("decoder.decoder_norm", narrow)
    linear("decoder.decoder_pred", narrow, case.patch**2 * case.channels)
    return result


def draw(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(weights, pixels "b c h w", noise "b n") of a case, from its seed.

    Xavier-uniform matrices and unit gains, all perturbed by 0.05 * N(0, 1) so that no
    gain, bias or token is neutral. Weights and pixels are float32 numbers, the same in
    any precision. The streams of numpy's RandomState are frozen for good.
    """
    weights = {}
    for i, (name, shape) in enumerate(shapes(case).items()):
        random = np.random.RandomState([case.seed, i])
        value = 0.05 * random.standard_normal(shape)
        if len(shape) in (2, 4):
            inputs = int(np.prod(shape[1:]))
            bound = (6 / (shape[0] + inputs)) ** 0.5
            value += random.uniform(-bound, bound, shape)
        elif "norm" in name and name.endswith("weight"):
            value += 1
        weights[name] = value.astype(np.float32)
    random = np.random.RandomState([case.seed, 1000])
    shape = (case.batch, case.channels, case.height, case.width)
    pixels = random.standard_normal(shape).astype(np.float32)
    order = [random.permutation(case.patches) for _ in range(case.batch)]
    noise = (np.stack(order) + 0.5) / case.patches  # distinct in any precision
    return weights, pixels, noise


def to_params(weights: dict[str, np.ndarray]) -> dict:
    """Our parameter tree of their weights, the dtype unchanged."""
    params = {}
    for part, layers in _LAYERS.items():
        tree = {}
        for ours, theirs in _REST[part].items():
            tree[ours] = _leaf(weights, theirs)
        depth = sum(f"{layers}.{i}.mlp.fc1.bias" in weights for i in range(100))
        for i in range(depth):
            block, theirs = {"attn": {}}, f"{layers}.{i}"
            for ours, name in _BLOCK.items():
                *above, last = ours.split("/")
                node = block[above[0]] if above else block
                node[last] = _leaf(weights, f"{theirs}.{name}")
            parts = [_leaf(weights, f"{theirs}.attention.{x}_proj") for x in "qkv"]
            block["attn"]["qkv"] = {
                name: np.concatenate([part[name] for part in parts], axis=-1)
                for name in ("kernel", "bias")
            }
            tree[f"block{i:02d}"] = block
        params[part] = tree
    return params


def to_weights(params: dict, case: Case) -> dict[str, np.ndarray]:
    """Inverse of `to_params`; gradients translate the same way."""
    weights = {}

    def put(name, leaf):
        if not isinstance(leaf, dict):
            weights[name] = np.asarray(leaf)
            return
        if "scale" in leaf:
            weights[f"{name}.weight"] = np.asarray(leaf["scale"])
        elif name == _REST["encoder"]["embed"]:
            kernel = np.asarray(leaf["kernel"])
            kernel = kernel.reshape(case.patch, case.patch, case.channels, -1)
            weights[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
        else:
            weights[f"{name}.weight"] = np.asarray(leaf["kernel"]).T
        weights[f"{name}.bias"] = np.asarray(leaf["bias"])

    for part, layers in _LAYERS.items():
        for ours, leaf in params[part].items():
            if not ours.startswith("block"):
                put(_REST[part][ours], leaf)
                continue
            theirs = f"{layers}.{int(ours[5:])}"
            for name, their_name in _BLOCK.items():
                *above, last = name.split("/")
                node = leaf[above[0]] if above else leaf
                put(f"{theirs}.{their_name}", node[last])
            qkv = leaf["attn"]["qkv"]
            kernels = np.split(np.asarray(qkv["kernel"]), 3, axis=1)
            biases = np.split(np.asarray(qkv["bias"]), 3)
            for x, kernel, bias in zip("qkv", kernels, biases, strict=True):
                put(f"{theirs}.attention.{x}_proj", {"kernel": kernel, "bias": bias})
    return weights


def _leaf(weights, name):
    """A token, or the parameters of a norm, a dense layer or the patch convolution."""
    if name in weights:
        return weights[name]
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    if weight.ndim == 4:  # "d c p q" to our patch vector's order: row, column, channel
        weight = weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return {"kernel": weight.T, "bias": bias}
