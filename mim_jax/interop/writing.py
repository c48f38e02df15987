# SPDX-License-Identifier: Apache-2.0
"""Writes the network of a run as other programs read it."""

import pathlib
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from mim_jax import config as configs
from mim_jax.interop import names
from mim_jax.interop.names import HOW, Layout
from mim_jax.ops.patches import Grid, sincos_2d
from mim_jax.run import files, rundir
from mim_jax.run.parts import read_parts
from mim_jax.schema import ConfigError, to_json

Flat = dict[str, np.ndarray]


def export(
    run: str | files.Place,
    folder: str | pathlib.Path,
    kind: str,
    step: int | None = None,
) -> tuple[str, ...]:
    """Writes a folder that timm or transformers reads.

    Args:
        run: run directory.
        folder: made if absent; files of an older export there are replaced.
        kind: "hf" for transformers, or "timm".
        step: which checkpoint; None is the newest.
    Returns:
        Lines for people: how it is read, and what was left out.
    Raises:
        ConfigError: no training run there, no such checkpoint, or the format has no
            such network.
        CheckpointError: the checkpoint is damaged.
    """
    config = rundir.read_config(files.place(run), f"run={str(run)!r}")
    try:
        _, found = read_parts(run, step)
    except FileNotFoundError as error:
        raise ConfigError(f"run={str(run)!r}: {error}") from error
    flat = traverse_util.flatten_dict(found["params"], sep="/")
    flat = {name: np.asarray(leaf) for name, leaf in flat.items()}
    about, tensors, notes = converted(config, flat, kind, f"run={str(run)!r}")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(one) for name, one in tensors.items()}
    files.write(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    for name, values in about.items():
        files.write(folder / name, to_json(values, indent=2, sort_keys=True) + "\n")
    return notes


def converted(
    config: configs.Tree, flat: Flat, kind: str, where: str
) -> tuple[dict[str, Any], Flat, tuple[str, ...]]:
    """What a folder of another program holds.

    Args:
        config: of the run.
        flat: its parameters by their paths.
        kind: "hf" or "timm".
        where: the run, for messages.
    Returns:
        (JSON values by the name of their file, arrays by their names, lines for
        people).
    Raises:
        ConfigError: the format has no such network.
    """
    network = _Network(config, flat, f"{where}, --format={kind}")
    about, tensors, notes = _WRITERS[kind](network)
    if network.left:
        notes = (*notes, f"left out, since the format has none: {network.left}")
    return about, tensors, notes


class _Network:
    """The network of a run, for writing.

    Attributes:
        objective: the node of the run's config.
        rows, cols: of the images, in pixels.
        where: the run, for messages.
        has_head, has_decoder: what is behind the encoder.
    """

    def __init__(self, config: configs.Tree, flat: Flat, where: str):
        self.objective, self.where, self._flat = config.objective, where, dict(flat)
        self.rows, self.cols = config.data.image_size
        self.has_decoder = config.objective.name == "mae"
        self.has_head = config.objective.name == "supervised"
        self._fill_positions()
        self._written: set[str] = set()

    @property
    def pooled(self) -> bool:
        """Whether a norm of the mean of patch tokens comes last."""
        return self.objective.encoder.norm == "pooled"

    @property
    def left(self) -> str:
        """Parameters that `tensors` has not written; a whole part by its name."""
        names = self._flat.keys() - self._written
        parts = {name.partition("/")[0] for name in names}
        whole = parts - {name.partition("/")[0] for name in self._written}
        names = {name for name in names if name.partition("/")[0] not in whole}
        return ", ".join(sorted(whole | names))

    def layout(self, **changes: Any) -> Layout:
        """The layout of the encoder, and of what is behind it."""
        encoder = self.objective.encoder
        usual = dict(
            depth=encoder.depth,
            positions=encoder.positions != "none",
            norm="fc_norm" if self.pooled else "norm",
            head=self.has_head,
        )
        return Layout(**(usual | changes))

    def tensors(self, layout: Layout) -> Flat:
        """The parameters by the names of timm."""
        patch, found = self.objective.encoder.patch, {}
        for row in names.rows(layout):
            try:
                given = HOW[row.how].give(self._flat[row.ours], len(row.theirs), patch)
            except ValueError as error:
                raise self.refused(f"{row.ours}: {error}") from error
            found |= dict(zip(row.theirs, given, strict=True))
            self._written.add(row.ours)
        return found

    def refused(self, why: str) -> ConfigError:
        """The error that this network cannot be written so."""
        return ConfigError(f"{self.where}: {why}")

    def check_plain(self) -> None:
        """ConfigError unless the encoder is a ViT without options."""
        encoder = self.objective.encoder
        for name, plain in (
            ("relative_positions", False),
            ("layer_scale", None),
        ):
            if encoder[name] != plain:
                raise self.refused(
                    f"encoder.{name}={encoder[name]!r}: the format has none; want "
                    "--format=timm or --format=safetensors"
                )
        if encoder.positions == "none":
            raise self.refused("encoder.positions='none': want --format=safetensors")

    def _fill_positions(self) -> None:
        """Adds the tables of fixed positions, which other programs save too."""
        patch = self.objective.encoder.patch
        grid = Grid(self.rows // patch, self.cols // patch, patch)
        for part in ("encoder", "decoder"):
            if part in self.objective and self.objective[part].positions == "fixed":
                width = self.objective[part].width
                table = np.concatenate([np.zeros((1, width)), sincos_2d(grid, width)])
                self._flat[f"{part}/pos_embed"] = table.astype(np.float32)


def _hf(network: _Network) -> tuple[dict[str, Any], Flat, tuple[str, ...]]:
    """As `ViTMAEForPreTraining`, `ViTForImageClassification` or `ViTModel`."""
    network.check_plain()
    objective, encoder = network.objective, network.objective.encoder
    if network.pooled or (network.has_head and objective.pool != "cls"):
        raise network.refused(
            "its last norm is of the mean of patch tokens, which the ViT of "
            "transformers does not have: want --format=timm or --format=safetensors"
        )
    architecture, kind = "ViTModel", "vit"
    if network.has_decoder:
        architecture, kind = "ViTMAEForPreTraining", "vit_mae"
    elif network.has_head:
        architecture = "ViTForImageClassification"
    about = dict(
        architectures=[architecture],
        model_type=kind,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=int(encoder.width * encoder.mlp_ratio),
        hidden_act="gelu",
        layer_norm_eps=encoder.epsilon,
        image_size=_side(network),
        patch_size=encoder.patch,
        num_channels=len(objective.mean),
        qkv_bias=True,
    )
    layout = network.layout(split=True)
    if network.has_decoder:
        decoder = objective.decoder
        if decoder.epsilon != encoder.epsilon:
            raise network.refused("encoder and decoder differ in epsilon")
        layout = network.layout(split=True, decoder=decoder.depth)
        about |= dict(
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=int(decoder.width * decoder.mlp_ratio),
            norm_pix_loss=objective.normalise_target,
        )
        if "ratio" in objective.masking:
            about["mask_ratio"] = objective.masking.ratio
    if network.has_head:
        labels = {str(i): f"LABEL_{i}" for i in range(objective.classes)}
        about |= dict(
            id2label=labels, label2id={text: int(i) for i, text in labels.items()}
        )
    tensors = {}
    for name, one in network.tensors(layout).items():
        part = "" if architecture == "ViTModel" or name.startswith("head.") else "vit."
        if name.startswith("decoder_") or (name == "mask_token" and layout.decoder):
            part = "decoder."
        tensors[part + names.to_transformers(name)] = one
    images = dict(
        image_processor_type="ViTImageProcessor",
        do_resize=True,
        size=dict(height=network.rows, width=network.cols),
        do_rescale=True,
        do_normalize=True,
        image_mean=list(objective.mean),
        image_std=list(objective.std),
    )
    files_ = {"config.json": about, "preprocessor_config.json": images}
    return files_, tensors, (f"transformers.{architecture}.from_pretrained(FOLDER)",)


def _timm(network: _Network) -> tuple[dict[str, Any], Flat, tuple[str, ...]]:
    """As timm's `VisionTransformer`, or its `Beit` for relative positions."""
    objective, encoder = network.objective, network.objective.encoder
    if encoder.epsilon != 1e-6:
        raise network.refused(
            f"encoder.epsilon={encoder.epsilon}: timm's is 1e-06; want --format=hf or "
            "--format=safetensors"
        )
    relative, gains = encoder.relative_positions, encoder.layer_scale
    if not relative and encoder.positions == "none":
        raise network.refused("encoder.positions='none': want --format=safetensors")
    averaged = network.pooled or (network.has_head and objective.pool == "avg")
    if averaged and not network.pooled:
        raise network.refused(
            "its head reads the mean of normed patch tokens, and timm's the norm of "
            "their mean: want --format=safetensors"
        )
    model = dict(
        img_size=_side(network),
        patch_size=encoder.patch,
        in_chans=len(objective.mean),
        embed_dim=encoder.width,
        depth=encoder.depth,
        num_heads=encoder.heads,
        mlp_ratio=encoder.mlp_ratio,
        global_pool="avg" if averaged else "token",
    )
    if gains is not None:
        model["init_values"] = gains
    layout = network.layout(gains="ls{}.gamma" if gains is not None else "")
    if relative:
        model |= dict(
            use_rel_pos_bias=True, use_abs_pos_emb=encoder.positions != "none"
        )
        layout = network.layout(
            gains="gamma_{}" if gains is not None else "", pairs="each", bias="qv"
        )
    about = dict(
        architecture="beit_base_patch16_224" if relative else "vit_base_patch16_224",
        num_classes=objective.classes if network.has_head else 0,
        num_features=encoder.width,
        model_args=model,
        pretrained_cfg=dict(
            input_size=[len(objective.mean), network.rows, network.cols],
            fixed_input_size=True,
            mean=list(objective.mean),
            std=list(objective.std),
            num_classes=objective.classes if network.has_head else 0,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    told = ("timm.create_model('local-dir:FOLDER', pretrained=True)",)
    return {"config.json": about}, network.tensors(layout), told


def _side(network: _Network) -> int | list[int]:
    """Size of the images: one number where they are square."""
    size = [network.rows, network.cols]
    return size[0] if size[0] == size[1] else size


_WRITERS = {"hf": _hf, "timm": _timm}
