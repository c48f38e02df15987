# SPDX-License-Identifier: Apache-2.0
"""Attention for TPUs: one Pallas kernel that holds a whole short sequence.

What costs on a TPU is moving n x n weights to memory and back. The kernel keeps the
weights of an image in the chip's vector memory. XLA writes them out in float32, and
changes the layout of q, k and v around them; with heads of 32 numbers, as in MAE's
decoder, that takes half of a step.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mim_jax.kernels.base import Site

LANES = 128  # of a TPU's vector registers, and a side of its matrix units
# Vector memory that a kernel may take, in MiB, by kind of device. These have 128 or 64
# MiB; the others have 16.
_ROOM = {"TPU v5 lite": 120, "TPU v6 lite": 120, "TPU v5": 60, "TPU v5p": 60}
_ROOM |= {"TPU7x": 60}
_LEAST_ROOM = 12


def misfit(site: Site) -> str:
    """Why the kernel cannot run at a site; "" if it can."""
    if site.dtype != "bfloat16":
        return f"activations are {site.dtype}: want bfloat16"
    if site.width % LANES:
        return f"width {site.width} per device: want a multiple of {LANES}"
    room = _ROOM.get(site.device, _LEAST_ROOM) * 2**20
    # The compiler needed this much for 197 to 1025 tokens: up to 12 blocks of weights
    # at once, and two copies of what it reads and writes, one of them under way.
    weights = 4 * up(site.tokens, 8) * up(site.tokens, LANES)
    need = 12 * weights + 16 * site.tokens * site.width
    if need > room:
        return (
            f"{site.tokens} tokens need {need / 2**20:.0f} MiB of vector memory: want "
            f"at most {room / 2**20:.0f} on {site.device}"
        )
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def short_attention(
    qkv: Float[Array, "b n e"],
    bias: Float[Array, " e"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "b n e//3"]:
    """Attention as a TPU kernel: one image at a time, whole in vector memory.

    Args:
        interpret: run it as plain JAX, on any backend.
    Raises:
        ValueError: the width, e / 3, is not a multiple of 128 lanes.
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = jax.ShapeDtypeStruct((rows, tokens, width), qkv.dtype)
    return _call(_forward, [qkv, _row(bias, qkv)], [out], heads, interpret)[0]


def _row(bias, qkv):
    """The bias as the kernel reads it; the kernel sums its gradient in float32."""
    return bias.astype(qkv.dtype)[None]


def _short_forward(qkv, bias, heads, interpret):
    return short_attention(qkv, bias, heads, interpret), (qkv, bias)


def _short_backward(heads, interpret, saved, gradient):
    # The weights are computed again: keeping them is what costs.
    qkv, bias = saved
    out = [qkv, jax.ShapeDtypeStruct((1, *bias.shape), jnp.float32)]
    arrays = [qkv, _row(bias, qkv), gradient]
    dqkv, dbias = _call(_backward, arrays, out, heads, interpret)
    return dqkv, dbias[0].astype(bias.dtype)


short_attention.defvjp(_short_forward, _short_backward)


def _call(kernel, arrays, out, heads: int, interpret: bool):
    rows, tokens, three = arrays[0].shape
    if three % (3 * LANES):
        raise ValueError(f"width {three // 3}: want a multiple of {LANES}")

    def one_image(array):
        if array.ndim == 2:  # the same for all images
            return pl.BlockSpec(array.shape, lambda i: (0, 0))
        return pl.BlockSpec((1, *array.shape[1:]), lambda i: (i, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(rows,),
        in_specs=[one_image(array) for array in arrays],
        out_specs=[one_image(array) for array in out],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=max(_ROOM.values()) * 2**20,
        ),
        cost_estimate=_cost(kernel, rows, tokens, three // 3, heads),
        interpret=interpret,
        name=f"short_attention{kernel.__name__}",
    )(*arrays)


def _cost(kernel, rows, tokens, width, heads) -> pl.CostEstimate:
    """Of a call, with products counted as the matrix units work them: whole tiles."""
    products, moved = {_forward: (2, 4), _backward: (5, 7)}[kernel]
    lanes = sum(_window(h, width // heads)[1] for h in range(heads))
    product = 2 * up(tokens, 8) * up(tokens, LANES) * lanes
    return pl.CostEstimate(
        flops=rows * products * product,
        transcendentals=rows * heads * tokens * tokens,
        bytes_accessed=2 * rows * tokens * width * moved,
    )


def up(count: int, multiple: int) -> int:
    """The least multiple that is not less than a count."""
    return math.ceil(count / multiple) * multiple


def _window(head: int, size: int) -> tuple[int, int]:
    """(first lane, lanes) of the whole tiles that a head of `size` lanes lies in.

    Heads that share a tile are told apart by zeros: a matrix unit takes a whole tile
    in the time of a part of one, and moving lanes costs more.
    """
    first = head * size // LANES * LANES
    return first, up((head + 1) * size, LANES) - first


def _masked(x, first: int, head: int, size: int):
    """`x`, lanes from `first` on, with zeros where other heads lie."""
    lane = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= head * size) & (lane < (head + 1) * size)
    return x if x.shape[1] == size else jnp.where(mine, x, jnp.zeros_like(x))


def _dot(a, b, contracted: tuple[int, int]):
    axes = ((contracted[:1], contracted[1:]), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _softmax(logits):
    """(numerators, 1 / their sums), each row by itself."""
    raised = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised, 1 / raised.sum(axis=-1, keepdims=True)


class _Sums:
    """What heads add to the columns of a block, by tiles of lanes."""

    def __init__(self):
        self._tiles = {}

    def add(self, first: int, x):
        for at in range(0, x.shape[1], LANES):
            tile = x[:, at : at + LANES]
            before = self._tiles.get(first + at)
            self._tiles[first + at] = tile if before is None else before + tile

    def tiles(self) -> dict[int, jax.Array]:
        """Sums by their first lane."""
        return self._tiles


def _parts(qkv_ref, bias_ref, head: int, size: int):
    """q, k and v in the window of a head; of q, other heads' lanes are zero."""
    width = qkv_ref.shape[2] // 3
    first, lanes = _window(head, size)
    q, k, v = (
        qkv_ref[0, :, at : at + lanes] + bias_ref[:, at : at + lanes]
        for at in (first, width + first, 2 * width + first)
    )
    return _masked(q * jnp.asarray(size**-0.5, q.dtype), first, head, size), k, v


def _forward(qkv_ref, bias_ref, out_ref, *, heads: int):
    size, mixed = out_ref.shape[2] // heads, _Sums()
    for head in range(heads):
        first, _ = _window(head, size)
        q, k, v = _parts(qkv_ref, bias_ref, head, size)
        weights, scale = _softmax(_dot(q, k, (1, 1)))
        v = _masked(v, first, head, size)
        mixed.add(first, _dot(weights.astype(v.dtype), v, (1, 0)) * scale)
    for at, tile in mixed.tiles().items():
        out_ref[0, :, at : at + LANES] = tile.astype(out_ref.dtype)


def _backward(qkv_ref, bias_ref, gradient_ref, dqkv_ref, dbias_ref, *, heads: int):
    width = gradient_ref.shape[2]
    size, sums = width // heads, _Sums()
    for head in range(heads):
        first, lanes = _window(head, size)
        q, k, v = _parts(qkv_ref, bias_ref, head, size)
        k = _masked(k, first, head, size)
        gradient = gradient_ref[0, :, first : first + lanes]
        gradient = _masked(gradient, first, head, size)
        weights, scale = _softmax(_dot(q, k, (1, 1)))
        weights = weights * scale
        sums.add(2 * width + first, _dot(weights.astype(v.dtype), gradient, (0, 0)))
        dw = _dot(gradient, v, (1, 1))
        ds = weights * (dw - (weights * dw).sum(axis=-1, keepdims=True))
        ds = ds.astype(q.dtype)
        sums.add(first, _dot(ds, k, (1, 0)) * jnp.float32(size**-0.5))
        sums.add(width + first, _dot(ds, q, (0, 0)))

    @pl.when(pl.program_id(0) == 0)
    def _():
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    for at, tile in sums.tiles().items():
        dqkv_ref[0, :, at : at + LANES] = tile.astype(dqkv_ref.dtype)
        dbias_ref[:, at : at + LANES] += tile.sum(axis=0, keepdims=True)
