# SPDX-License-Identifier: Apache-2.0
"""Projection and prediction heads of siamese methods, and classification heads."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mim_jax.kernels.base import PLAIN, Kernels
from mim_jax.models.vit import Dense, LayerNorm, gelu
from mim_jax.ops.attention import accurate, repeated
from mim_jax.ops.contrastive import l2_normalise
from mim_jax.schema import check_ranges, internal, shared, within


class BatchNorm(nn.Module):
    """Batch norm over all leading axes of the global batch, in float32 at least.

    Under jit a mean over a sharded axis is the mean over all devices, so no extra code
    synchronises the statistics. There are no running statistics: the heads that use
    this norm are discarded after pre-training.
    """

    dtype: str
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x = x.astype(accurate(self.dtype))
        axes = tuple(range(x.ndim - 1))
        variance = x.var(axis=axes, keepdims=True)
        x = (x - x.mean(axis=axes, keepdims=True)) * jax.lax.rsqrt(variance + 1e-5)
        if self.affine:
            shape = (1,) * len(axes) + x.shape[-1:]
            scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
            x = x * scale.reshape(shape).astype(x.dtype)
            x = x + bias.reshape(shape).astype(x.dtype)
        return x.astype(self.dtype)


class Head(nn.Module):
    """MLP on each token: (linear, norm, activation) per hidden layer, then linear.

    The defaults are C-MAE's (arXiv:2208.04164, section 5): "2 layers, the activation
    function is GELU, hidden 2048, output 768"; batch norm is MoCo v3's. Linear layers
    before a batch norm have no bias.

    Attributes:
        layers: number of linear layers, >= 1.
        hidden, out: width of hidden layers and of the output.
        norm: norm after each hidden layer: batch norm, layer norm or none.
        activation: activation after each hidden layer's norm.
        last_norm: batch norm without scale and bias after the last layer.
        dtype: dtype of activations.
        kernels: the form of each operation; the plan sets it.
    """

    layers: int = within(2, least=1, most=100)
    hidden: int = within(2048, least=1, most=2**20)
    out: int = within(768, least=1, most=2**20)
    norm: Literal["batch", "layer", "none"] = "batch"
    activation: Literal["gelu", "relu"] = "gelu"
    last_norm: bool = False
    dtype: str = shared("float32")
    kernels: Kernels = internal(PLAIN)

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b {self.out}"]:
        for i in range(1, self.layers):
            bias = self.norm != "batch"
            x = self._dense(self.hidden, f"fc{i}", bias)(x)
            if self.norm == "batch":
                x = BatchNorm(self.dtype, name=f"norm{i}")(x)
            elif self.norm == "layer":
                x = LayerNorm(self.dtype, name=f"norm{i}")(x)
            if self.activation == "gelu":
                x = gelu(x)
            else:
                x = jax.nn.relu(x)
        bias = not self.last_norm
        x = self._dense(self.out, f"fc{self.layers}", bias)(x)
        if self.last_norm:
            x = BatchNorm(self.dtype, affine=False, name="last_norm")(x)
        return x

    def _dense(self, features: int, name: str, use_bias: bool) -> Dense:
        return Dense(features, self.dtype, self.kernels, use_bias=use_bias, name=name)

    def check_sizes(self, name: str) -> None:
        """ValueError if a size is out of range."""
        check_ranges(self, f"{name}.")

    def flops(self, width: int) -> float:
        """FLOPs of one forward pass of one token of `width` numbers."""
        widths = [width, *[self.hidden] * (self.layers - 1), self.out]
        return sum(2.0 * a * b for a, b in zip(widths, widths[1:], strict=False))


class Prototypes(nn.Module):
    """DINO's head (arXiv:2104.14294, section 3.1): an MLP, and the cosine similarities
    of its output to `out` prototypes.

    Attributes:
        layers, hidden: number of layers and hidden width of the MLP, which has GELU
            and no norms.
        bottleneck: output width of the MLP.
        out: number of prototypes.
        dtype: dtype of activations; similarities are float32 at least.
        kernels: the form of each operation; the plan sets it.
    """

    layers: int = within(3, least=1, most=100)
    hidden: int = within(2048, least=1, most=2**20)
    bottleneck: int = within(256, least=1, most=2**20)
    out: int = within(65536, least=1, most=2**24)
    dtype: str = shared("float32")
    kernels: Kernels = internal(PLAIN)

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b {self.out}"]:
        mlp = Head(
            layers=self.layers,
            hidden=self.hidden,
            out=self.bottleneck,
            norm="none",
            dtype=self.dtype,
            kernels=self.kernels,
            name="mlp",
        )
        kind = accurate(self.dtype)
        x = l2_normalise(mlp(x).astype(kind))
        shape = (self.bottleneck, self.out)
        # Weight norm with every length fixed to 1: only directions are learned.
        kernel = self.param("prototypes", nn.initializers.normal(0.02), shape)
        kernel = l2_normalise(kernel.astype(kind), axis=0).astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=kind)

    def check_sizes(self, name: str) -> None:
        """ValueError if a size is out of range."""
        check_ranges(self, f"{name}.")

    def flops(self, width: int) -> float:
        """FLOPs of one forward pass of one view."""
        widths = [width, *[self.hidden] * (self.layers - 1), self.bottleneck, self.out]
        return sum(2.0 * a * b for a, b in zip(widths, widths[1:], strict=False))


class Classifier(nn.Module):
    """Linear classification head for images or tokens; logits are float32 at least.

    Attributes:
        classes: number of logits.
        deviation: of the normal distribution that initialises the kernel.
        dtype: dtype of the matrix product.
    """

    classes: int
    deviation: float = 2e-5
    dtype: str = shared("float32")

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b {self.classes}"]:
        init = nn.initializers.normal(self.deviation)
        return WideDense(self.classes, init, self.dtype, name="linear")(x)


class WideDense(nn.Module):
    """Linear layer whose outputs are float32 at least. Rounded to bfloat16, logits of
    two classes would often be the same.

    Attributes:
        features: output width.
        start: initialiser of the kernel; biases start at zero.
        dtype: of what is multiplied.
    """

    features: int
    start: nn.initializers.Initializer
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b {self.features}"]:
        kind, shape = accurate(self.dtype), (x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", self.start, shape), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=kind)
        return x + repeated(bias, x)


def init_heads(
    projector: Head, predictor: Head, keys: tuple[Array, Array], x: Float[Array, "*b d"]
) -> dict[str, Any]:
    """New parameters of a projector for tokens like `x`, and of a predictor behind it.

    Args:
        keys: one for each head.
    Returns:
        {"projector": parameters, "predictor": parameters}.
    """
    projected, first = projector.init_with_output(keys[0], x)
    second = predictor.init(keys[1], projected)
    return {"projector": first["params"], "predictor": second["params"]}


def check_heads(projector: Head, predictor: Head) -> None:
    """ValueError if a head's sizes are out of range, or the outputs of the two heads,
    which the loss compares, differ in width."""
    projector.check_sizes("projector")
    predictor.check_sizes("predictor")
    if predictor.out != projector.out:
        raise ValueError(
            f"predictor.out={predictor.out}, projector.out={projector.out}: want the "
            "same, since they are compared"
        )
