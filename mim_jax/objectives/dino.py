# SPDX-License-Identifier: Apache-2.0
"""DINO, the self-distillation baseline of arXiv:2208.04164."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mim_jax.models.heads import Prototypes
from mim_jax.models.vit import SIZES, Encoder
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Objective,
    Params,
    Stats,
    apply,
    purpose,
)
from mim_jax.ops.augment import ColorJitter
from mim_jax.ops.ema import EMA
from mim_jax.ops.patches import to_float
from mim_jax.schema import check_ranges, internal, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINO(Objective):
    """Self-distillation with no labels, arXiv:2104.14294, algorithm 1.

    The student sees two global and some local crops; the teacher sees the global ones.
    The loss is the cross-entropy from the teacher's centred and sharpened distribution
    over prototypes to the student's, over all pairs of different views.

    Attributes:
        encoder: the network that is learned; its class token is compared.
        head: maps the class token to similarities with the prototypes.
        student_temperature: temperature of the student's softmax.
        teacher_temperature: first and last temperature of the teacher's softmax.
        teacher_warmup: share of the run over which the teacher's temperature goes from
            first to last.
        centre_momentum: momentum of the running mean of teacher outputs.
        freeze_prototypes: share of the run, from its start, in which the prototypes do
            not change; the optimiser sees them for the first time after it.
        view1, view2, local: augmentations of the two global crops and of local crops.
        ema: momentum of the teacher.
        mean, std: of the data, per channel, for pixels in 0..1.
        total_steps: steps of the run; `for_run` sets it.
    """

    reads = ("image", "image2", "local")

    encoder: Encoder = Encoder(**SIZES["B"])
    head: Prototypes = Prototypes()
    student_temperature: float = within(0.1, least=1e-4, most=1e4)
    teacher_temperature: tuple[float, float] = within(
        (0.04, 0.07), least=1e-4, most=1e4
    )
    teacher_warmup: float = within(0.125, least=0, most=1)
    centre_momentum: float = within(0.9, least=0, most=1)
    freeze_prototypes: float = within(0.0075, least=0, most=1)
    view1: ColorJitter = ColorJitter(saturation=0.2, blur_p=1.0)
    view2: ColorJitter = ColorJitter(saturation=0.2, blur_p=0.1, solarize_p=0.2)
    local: ColorJitter = ColorJitter(saturation=0.2, blur_p=0.5)
    ema: EMA = EMA(base=0.996, schedule="cosine")
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)
    total_steps: int = internal(1)

    def __post_init__(self):
        check_ranges(self)

    @property
    def batch_coupled(self) -> bool:
        return True  # by the centre, which is a mean over the batch

    @property
    def late(self) -> dict[str, int]:
        # A product such as .07 * 100 may lie a little above the step that is meant.
        frozen = math.ceil(self.freeze_prototypes * self.total_steps - 1e-6)
        return {"head/prototypes": frozen} if frozen > 0 else {}

    def for_run(self, total_steps: int) -> "DINO":
        return dataclasses.replace(self, total_steps=total_steps)

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        self.head.check_sizes("head")
        for view in (self.view1, self.view2, self.local):
            view.check_channels(image_shape[2])

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.init_encoder(encoder_key, batch)
        head = self.head.init(head_key, tokens[:, 0])
        stats = {"centre": jnp.zeros((self.head.out,), jnp.float32)}
        return {"encoder": encoder, "head": head["params"]}, stats

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        globals_ = [
            self.view1(to_float(batch["image"]), purpose(keys, 10)),
            self.view2(to_float(batch["image2"]), purpose(keys, 11)),
        ]
        rows, count = batch["local"].shape[:2]
        crops = to_float(batch["local"].reshape(-1, *batch["local"].shape[2:]))
        local_keys = jnp.stack([purpose(keys, 20 + i) for i in range(count)], axis=1)
        crops = self.local(crops, local_keys.reshape(-1))
        for first in self.late.values():
            head = self._gated(params["head"], state.step < first)
            params = params | {"head": head}
        taught = [self._outputs(state.teacher, view) for view in globals_]
        taught = jax.lax.stop_gradient(jnp.stack(taught))
        # All local crops have one size and run as one batch.
        locals_ = self._outputs(params, crops).reshape(rows, count, -1)
        student = [self._outputs(params, view) for view in globals_]
        student = jnp.concatenate(
            [jnp.stack(student), jnp.moveaxis(locals_, 1, 0)], axis=0
        )
        centre = state.stats["centre"]
        loss = self.distillation(student, taught, centre, state.step)
        new = taught.mean(axis=(0, 1)).astype(centre.dtype)
        m = self.centre_momentum
        stats = {"centre": m * centre + (1 - m) * new}
        weight = jnp.asarray(rows, loss.dtype)
        return loss, Aux(weight=weight, stats=stats, metrics={})

    def distillation(
        self,
        student: Float[Array, "v b k"],
        teacher: Float[Array, "g b k"],
        centre: Float[Array, " k"],
        step: Array | int,
    ) -> Float[Array, ""]:
        """Mean cross-entropy over all pairs of a teacher view and a different student
        view.

        Args:
            student: outputs for v views; the first g views are also the teacher's.
            teacher: outputs for these g views.
            centre: running mean of teacher outputs.
            step: optimiser steps done.
        """
        temperature = self.temperature_at(step)
        wanted = jax.nn.softmax((teacher - centre[None, None]) / temperature, axis=-1)
        found = jax.nn.log_softmax(student / self.student_temperature, axis=-1)
        pairs = -jnp.einsum("gbk,vbk->gv", wanted, found) / student.shape[1]
        views, taught = student.shape[0], teacher.shape[0]
        others = 1 - jnp.eye(taught, views, dtype=pairs.dtype)
        return (pairs * others).sum() / (taught * (views - 1))

    def temperature_at(self, step: Array | int) -> Float[Array, ""]:
        """The teacher's temperature at a step: linear in the warm-up, then constant."""
        first, last = self.teacher_temperature
        length = self.teacher_warmup * self.total_steps
        if not length:
            return jnp.asarray(last, jnp.float32)
        progress = jnp.asarray(step, jnp.float32) / length
        return first + (last - first) * jnp.clip(progress, 0, 1)

    def _outputs(
        self, params: Params, images: Float[Array, "b h w c"]
    ) -> Float[Array, "b k"]:
        tokens, _ = self.encode(params, images)
        return apply(self.head, params["head"], tokens[:, 0])

    def _gated(self, head: Params, frozen: Array) -> Params:
        """The head's parameters; while frozen, the prototypes get no gradient."""
        kernel = head["prototypes"]
        still = jax.lax.stop_gradient(kernel)
        return head | {
            "prototypes": still + jnp.where(frozen, 0.0, 1.0) * (kernel - still)
        }

    def teacher(self, old: Params | None, params: Params, step: Array) -> Params:
        return self.ema.update(old, params, step + 1, self.total_steps)

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        # Only global crops are counted: the data config sets the number of local crops.
        grid = self.grid(image_shape)
        view = self.encoder.flops(grid.size, image_shape[2])
        view += self.head.flops(self.encoder.width)
        return 2 * (3 * view + view)
