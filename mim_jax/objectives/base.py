# SPDX-License-Identifier: Apache-2.0
"""The interface of an objective: what is learned, as pure functions of pytrees.

Functions named `images` take uint8, or floats in 0..1; functions named `patches` take
the standardised patches of such images (`Objective.patches`).
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8

from mim_jax.maskings.base import Masking
from mim_jax.models.decoder import Decoder
from mim_jax.models.vit import Encoder, mean_token
from mim_jax.ops.losses import cross_entropy
from mim_jax.ops.masking import Mask, masks_of, unshuffle
from mim_jax.ops.patches import (
    Grid,
    denormalise,
    grid_of,
    patch_statistics,
    standard_patches,
    to_float,
    unpatchify,
)

Params = Any
Stats = Any
Batch = dict[str, Any]


def apply(network: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The output of a Flax network with these parameters."""
    return network.apply({"params": params}, *args, **kwargs)


class Aux(NamedTuple):
    """What a loss returns besides its value.

    Attributes:
        weight: sum, over the batch, of the weights with which the loss averages its
            examples; it does not depend on parameters. Gradient accumulation weighs
            the micro-batches by it.
        stats: new running statistics; {} if the objective has none.
        metrics: further scalars to log, each a mean with the same weights.
    """

    weight: Float[Array, ""]
    stats: Stats
    metrics: dict[str, Float[Array, ""]]


def purpose(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """Keys for a further random draw of the same examples, independent of `keys`.

    Args:
        number: differs from draw to draw.
    """
    # `split(key, n)[i]` is `fold_in(key, i)`. No split here reaches 1000 keys, so that
    # e.g. T2 never draws with a key that T1 has used.
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 1000 + number)


def label_loss(
    logits: Float[Array, "b c"], targets: Float[Array, "b c"], stats: Stats
) -> tuple[Float[Array, ""], Aux]:
    """Mean cross-entropy of a batch, with its accuracy.

    The weight of an image is the sum of its target: 1, or less if its own label or the
    label of an image mixed into it is unknown.
    """
    targets = targets.astype(logits.dtype)
    weights = targets.sum(axis=-1)
    right = (logits.argmax(axis=-1) == targets.argmax(axis=-1)).astype(logits.dtype)
    weight = weights.sum()
    safe = jnp.maximum(weight, 1e-6)
    metrics = {"accuracy": (weights * right).sum() / safe}
    loss = cross_entropy(logits, targets).sum() / safe
    return loss, Aux(weight=weight, stats=stats, metrics=metrics)


class Objective(abc.ABC):
    """What is learned: a frozen dataclass, whose fields are its config.

    Attributes:
        reads: fields of the training example that the loss reads, besides those that a
            masking reads; see `mim_jax.data.input.Input`.
        encoder: the network that is learned.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)

    encoder: Encoder
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def batch_coupled(self) -> bool:
        """True if an example's loss depends on other examples, as in contrastive
        losses. Then a mean over micro-batches differs from the batch's loss."""
        return False

    @property
    def frozen(self) -> tuple[str, ...]:
        """Paths of parameters (`encoder/embed`) that keep their first values."""
        return ()

    @property
    def late(self) -> dict[str, int]:
        """Paths of parameters that keep their first values before a step of the run,
        counted from 0, with that step. Until then the loss gives them a gradient of
        zero."""
        return {}

    @property
    def occlusion(self) -> Literal["drop", "mask_token"]:
        """How hidden patches reach the encoder in training: "drop" leaves them out, and
        "mask_token" puts a learned token in their place."""
        return "drop"

    @property
    def feature(self) -> Literal["cls", "avg"]:
        """Which tokens represent an image: the class token, or the patches' mean."""
        return "cls"

    @property
    def drops_paths(self) -> bool:
        """Whether the loss lets the encoder drop paths."""
        return False

    def for_run(self, total_steps: int) -> "Objective":
        """This objective for a run of `total_steps`; its schedules may need them."""
        del total_steps
        return self

    def adopt(self, other: "Objective") -> "Objective":
        """A copy that can begin with the parameters of another run.

        The copy takes the encoder's sizes, and which parameters it has, and the
        standardisation of images from `other`, the objective of that run. Learned
        positions are for the copy to decide, unless the other encoder has none.
        """
        same = other.encoder.positions == "none"
        encoder = dataclasses.replace(
            self.encoder,
            patch=other.encoder.patch,
            width=other.encoder.width,
            depth=other.encoder.depth,
            heads=other.encoder.heads,
            mlp_ratio=other.encoder.mlp_ratio,
            positions="none" if same else self.encoder.positions,
            relative_positions=other.encoder.relative_positions,
            layer_scale=other.encoder.layer_scale,
            epsilon=other.encoder.epsilon,
        )
        # Every concrete objective is a dataclass.
        return dataclasses.replace(
            self,  # pyright: ignore[reportArgumentType]
            encoder=encoder,
            mean=other.mean,
            std=other.std,
        )

    @abc.abstractmethod
    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        """Checks, on the host, that images of (rows, columns, channels) fit; the plan
        calls it for each image field that the objective reads.

        Raises:
            ValueError: naming the field, its value and what would fit.
        """

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        """New parameters (blocks not stacked) and statistics, for images shaped like
        the batch's."""

    @abc.abstractmethod
    def loss(
        self, params: Params, state: Any, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        """Loss of a batch. Pure; differentiated in params alone.

        Args:
            params: as `init` returns them, or with their blocks stacked.
            state: has `step` (int32, steps done), `teacher`, `stats` and `memory`, like
                `mim_jax.state.TrainState`. A loss reads the fields that its objective
                uses. MAE, R-MAE, BEiT and Supervised use none and accept None, unless
                their masking has a memory.
            batch: the fields that `batch_fields` names: "image" (uint8 "b h w c") and
                others.
            keys: one key per example, the only source of randomness: an example's
                masks depend neither on its neighbours nor on the number of devices. Any
                typed keys work, e.g. `jax.random.split(jax.random.key(0), b)`.
        """

    @abc.abstractmethod
    def teacher(self, old: Params | None, params: Params, step: Array) -> Params | None:
        """The next teacher, or None if the objective has no teacher.

        Args:
            old: the teacher so far; None asks for the first one.
            params: the student's parameters.
            step: optimiser steps done before this one.
        """

    @abc.abstractmethod
    def flops(self, image_shape: tuple[int, int, int]) -> float:
        """FLOPs of one training step per image; recomputation is not counted."""

    # Methods that every objective inherits.

    @property
    def maskings(self) -> dict[str, Masking]:
        """The maskings among the fields, by name."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {k: value for k, value in values.items() if isinstance(value, Masking)}

    @property
    def batch_fields(self) -> tuple[str, ...]:
        """All fields of the training example that a step reads, each once."""
        read = [name for one in self.maskings.values() for name in one.reads]
        return tuple(dict.fromkeys((*self.reads, *read)))

    def first_memory(self, image_shape: tuple[int, ...]) -> Any:
        """The memory of the field `masking` before the first step, or None if it has no
        memory."""
        masking = self.maskings["masking"] if "masking" in self.maskings else None
        if masking is None or not masking.refresh_every:
            return None
        return masking.first_memory(self.grid(image_shape))

    def next_memory(
        self, state: Any, params: Params, batch: Batch, keys: Key[Array, " b"]
    ) -> Any:
        """The memory after a step: refreshed if the step's number is a multiple of
        `refresh_every`, else the old one.

        Args:
            state: before the step.
            params: after the step.
            batch, keys: of the step.
        """
        masking, memory = self.maskings["masking"], state.memory
        return jax.lax.cond(
            (state.step + 1) % masking.refresh_every == 0,
            lambda: masking.refresh(memory, self, params, batch, keys),
            lambda: memory,
        )

    def grid(self, image_shape: tuple[int, ...]) -> Grid:
        """The patches of images of (rows, columns, channels)."""
        return grid_of(image_shape[0], image_shape[1], self.encoder.patch)

    def patches(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b n p"], Grid]:
        """Standardised patches of images in 0..1, and the grid where they sit."""
        return standard_patches(images, self.encoder.patch, self.mean, self.std)

    def encode(
        self,
        params: Params,
        images: Float[Array, "b h w c"],
        keep: Int[Array, "b k"] | None = None,
        hidden: Bool[Array, "b n"] | None = None,
        taps: Sequence[str] = (),
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
        """Tokens and taps of the encoder, as `Encoder` returns them.

        Args:
            params: a student's or a teacher's, with the encoder under "encoder".
            images: in 0..1.
            keep, hidden, taps, keys: as for `Encoder`.
        """
        patches, grid = self.patches(images)
        return apply(
            self.encoder, params["encoder"], patches, grid, keep, taps, hidden, keys
        )

    def encode_masked(
        self,
        params: Params,
        images: Float[Array, "b h w c"],
        mask: Mask,
        taps: Sequence[str] = (),
    ) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
        """`encode`, with hidden patches dropped or replaced as `occlusion` says."""
        return self.encode(params, images, taps=taps, **self._occluded(mask))

    def init_encoder(
        self, key: Key[Array, ""], batch: Batch, mask: Mask | None = None
    ) -> tuple[Float[Array, "1 t d"], Params]:
        """Tokens of the batch's first image, and new parameters of the encoder.

        Args:
            mask: patches to hide, dropped or replaced as `occlusion` says; with
                "mask_token" the encoder gets a parameter `mask_token`. None hides
                nothing.
        """
        patches, grid = self.patches(to_float(batch["image"][:1]))
        how = {} if mask is None else self._occluded(mask)
        (tokens, _), made = self.encoder.init_with_output(key, patches, grid, **how)
        return tokens, made["params"]

    def _occluded(self, mask: Mask) -> dict[str, Any]:
        """The keyword arguments that pass a mask to the encoder."""
        if self.occlusion == "mask_token":
            return {"hidden": mask.hidden}
        return {"keep": mask.keep}

    def features(
        self,
        params: Params,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        """One vector per image, from the whole image: the class token, or the patch
        tokens' mean, as `feature` says.

        Args:
            images: uint8, or in 0..1.
            keys: if given, the encoder drops paths, as in training.
        """
        return self.pooled(*self.encode(params, to_float(images), keys=keys))

    def pooled(
        self,
        tokens: Float[Array, "b t d"],
        seen: dict[str, Float[Array, "..."]],
    ) -> Float[Array, "b d"]:
        """One vector per image, as `feature` says, from what `encode` returns."""
        if self.feature == "cls":
            return tokens[:, 0]
        if "pooled" in seen:
            return seen["pooled"]
        return mean_token(tokens[:, 1:])[:, 0]

    def check_encoder(self, image_shape: tuple[int, int, int]) -> None:
        """ValueError if encoder, standardisation or maskings do not fit the images."""
        channels = image_shape[2]
        self.encoder.check_sizes()
        labels = isinstance(self, LabelObjective)
        pooled = self.encoder.norm == "pooled"
        if pooled and not (labels and self.feature == "avg"):
            raise ValueError(
                "encoder.norm='pooled': want 'tokens', or an objective with labels "
                "that reads the mean of the patch tokens"
            )
        if self.encoder.drop_path and not self.drops_paths:
            raise ValueError(
                f"encoder.drop_path={self.encoder.drop_path}: want 0, or an objective "
                "with labels"
            )
        self.grid(image_shape)
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise ValueError(
                f"mean={self.mean}, std={self.std} for images of {channels} channel(s):"
                " want one number per channel, std > 0"
            )
        for name, masking in self.maskings.items():
            if name != "masking" and masking.refresh_every:
                raise ValueError(
                    f"{name}={type(masking).__name__} has a memory, but the trainer "
                    "updates the memory of `masking` only; want a masking without one"
                )


class LabelObjective(Objective):
    """An objective that classifies images.

    Attributes:
        classes: number of classes; labels are 0 to classes - 1.
    """

    classes: int

    @property
    def drops_paths(self) -> bool:
        return True

    @abc.abstractmethod
    def logits(
        self,
        params: Params,
        stats: Stats,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    ) -> Float[Array, "b {self.classes}"]:
        """Logits of each class, computed without randomness, for evaluation.

        Args:
            stats: running statistics, as `TrainState.stats`.
            images: uint8, or in 0..1.
        """


class Found(NamedTuple):
    """Objects that were found in each image of a batch, the best first.

    Attributes:
        boxes: left, top, right, bottom in pixels.
        scores: in 0..1; NaN for images of which a logit is not finite.
        classes: positions in the source's object classes.
        valid: which entries are answers.
        masks: probabilities, each in the frame of its box.
    """

    boxes: Float[Array, "b k 4"]
    scores: Float[Array, "b k"]
    classes: Int[Array, "b k"]
    valid: Bool[Array, "b k"]
    masks: Float[Array, "b k m m"]


class Detector(Objective):
    """An objective that finds objects in images.

    Attributes:
        classes: number of classes of objects.
    """

    classes: int

    @property
    def drops_paths(self) -> bool:
        return True

    @abc.abstractmethod
    def detect(
        self,
        params: Params,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
        size: Int[Array, "b 2"],
    ) -> Found:
        """The objects that images show, computed without randomness.

        Args:
            images: uint8, or in 0..1.
            size: rows and columns of the picture in each image; the rest is padding.
        """


class PixelObjective(Objective):
    """An objective that can fill in the pixels of hidden patches.

    This is an interface: evaluations use these three members and no other.

    Attributes:
        normalise_target: True if the network predicts patches with their own mean and
            deviation removed; then the true patch is needed to scale them back.
    """

    normalise_target: bool

    @abc.abstractmethod
    def mask(self, batch: Batch, keys: Key[Array, " b"], state: Any = None) -> Mask:
        """The masks of a batch: its field "mask" if it has one, else drawn by `keys`.

        Args:
            batch: fields of the training example by name.
            state: a TrainState or the Run of an evaluation; only a masking with a
                memory needs it.
        """

    @abc.abstractmethod
    def reconstruct(
        self, params: Params, batch: Batch, mask: Mask
    ) -> Shaped[Array, "b h w c"]:
        """Images whose patches, visible ones too, are all predicted from the visible
        patches; in 0..1, not clipped.

        The output must not depend on the hidden pixels, with one exception: if
        `normalise_target` is True, each patch's true mean and deviation scale its
        prediction back.
        """


class AutoEncoder(PixelObjective):
    """A PixelObjective of an encoder that drops hidden patches and a decoder with mask
    tokens: what MAE and its relatives share.

    Attributes:
        decoder: predicts pixels from tokens; its parameters are under "decoder".
        masking: which patches are hidden.
    """

    decoder: Decoder
    masking: Masking

    def mask(self, batch: Batch, keys: Key[Array, " b"], state: Any = None) -> Mask:
        grid = self.grid(batch["image"].shape[1:])
        return masks_of(self.masking, batch, keys, grid, state)

    def reconstruct(
        self, params: Params, batch: Batch, mask: Mask
    ) -> Shaped[Array, "b h w c"]:
        patches, grid = self.patches(to_float(batch["image"]))
        tokens, _ = apply(self.encoder, params["encoder"], patches, grid, mask.keep)
        outputs = patches.shape[-1]
        prediction = apply(
            self.decoder, params["decoder"], tokens, mask, grid, outputs, predict="all"
        )
        prediction = unshuffle(prediction.astype(patches.dtype), mask)
        if self.normalise_target:
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        return denormalise(unpatchify(prediction, grid), self.mean, self.std)

    def init_networks(self, key: Key[Array, ""], batch: Batch) -> Params:
        """New parameters of the encoder and of one decoder."""
        grid = self.grid(batch["image"].shape[1:])
        mask = first_mask(grid, self.masking.visible_count(grid))
        encoder_key, decoder_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch, mask)
        outputs = self.encoder.patch**2 * batch["image"].shape[-1]
        decoder = self.decoder.init(decoder_key, tokens, mask, grid, outputs)
        return {"encoder": encoder, "decoder": decoder["params"]}

    def check_networks(self, image_shape: tuple[int, int, int]) -> None:
        """ValueError if networks, masking and standardisation do not fit."""
        self.check_encoder(image_shape)
        self.decoder.check_sizes()
        self.masking.visible_count(self.grid(image_shape))

    def decoder_flops(
        self,
        visible: int,
        image_shape: tuple[int, int, int],
        predicted: int | None = None,
    ) -> float:
        """FLOPs of the decoder's forward pass; `predicted` is as in Decoder.flops."""
        outputs = self.encoder.patch**2 * image_shape[2]
        grid, width = self.grid(image_shape), self.encoder.width
        return self.decoder.flops(visible, grid, width, outputs, predicted)


def first_mask(grid: Grid, visible: int) -> Mask:
    """A mask of one image, for the initialisation of networks.

    The parameters do not depend on which patches the mask hides, only on whether it
    hides any.
    """
    order = jnp.arange(grid.size, dtype=jnp.int32)[None]
    return Mask(keep=order[:, :visible], drop=order[:, visible:])


def check_boundary(masking: Masking, grid: Grid, depth: int, soft: bool) -> None:
    """ValueError if no hidden pixel is further than `depth` from the visible ones.

    Args:
        depth: the field `ignore_boundary`; 0 ignores nothing.
        soft: whether near pixels count a little, so that any depth works.
    """
    if not depth:
        return
    if masking.visible_count(grid) == grid.size:
        raise ValueError(
            f"ignore_boundary={depth} with a masking that hides nothing: want "
            "ignore_boundary=0"
        )
    side = masking.whole_side(grid)
    if not soft and side is not None and 2 * depth >= side:
        raise ValueError(
            f"ignore_boundary={depth} of masks made of squares of {side} pixels: want "
            f"less than {side / 2:g}, so that a pixel remains of a square with visible "
            "ones around it, or boundary='soft'"
        )
