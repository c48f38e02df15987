# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over whole short sequences, in each backend's fastest form.

What costs is moving n x n weights to memory and back. On a TPU one kernel keeps those
of an image in the chip's vector memory: XLA writes them out in float32, and turns the
layout of q, k and v around them, which with heads of 32 numbers, as in MAE's decoder,
is half of a step. On a CPU they are computed again for the gradient, image by image, so
that those of one fit the cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mim_jax.ops.backend import ROWS, accurate, target, target_mesh

LANES = 128  # of a TPU's vector registers, and a side of its matrix units
# Vector memory of a device that a kernel may take, MiB of 128 or 64; of others, 16.
_ROOM = {"TPU v5 lite": 120, "TPU v6 lite": 120, "TPU v5": 60, "TPU v5p": 60}
_ROOM |= {"TPU7x": 60}
_LEAST_ROOM = 12
# On a CPU, weights of an image that are worth a loop; below it all go at once.
_LOOP = 2**20


def attend(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """softmax(q k / sqrt(size of a head)) v of each head, heads side by side.

    Args:
        qkv: queries, keys and values, each with its heads side by side.
        bias: added to `qkv`.
    """
    mesh = target_mesh()
    if mesh is None:
        if target() == "cpu":
            return recomputing_attention(qkv, bias, heads)
    elif _splits(qkv, heads, mesh):
        if target() == "cpu":
            return _spread(recomputing_attention, qkv, bias, heads, mesh)
        if target() == "tpu" and _kernel_fits(qkv, mesh):
            return _spread(short_attention, qkv, bias, heads, mesh)
    mixed, _ = attend_with_weights(qkv, bias, heads)
    return mixed


def _splits(qkv, heads: int, mesh: jax.sharding.Mesh) -> bool:
    rows = math.prod(mesh.shape[axis] for axis in ROWS)
    return qkv.shape[0] % rows == 0 and heads % mesh.shape["tensor"] == 0


def _spread(form, qkv, bias, heads: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """`form` on each device's own rows and heads: the compiler can split neither a
    kernel nor a loop over rows by itself."""
    spread = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    parts, rows = mesh.shape["tensor"], PartitionSpec(ROWS)
    if mesh.size == 1:
        return form(qkv, bias, heads)
    if parts == 1:
        each = functools.partial(form, heads=heads)
        both = rows, PartitionSpec()
        return spread(each, in_specs=both, out_specs=rows)(qkv, bias)

    def local(qkv, bias):
        return form(qkv.reshape(*qkv.shape[:2], -1), bias.reshape(-1), heads // parts)

    # Of queries, keys and values some heads each. (A TPU pads that axis of three.)
    whole = *qkv.shape[:2], 3, qkv.shape[2] // 3
    return spread(
        local,
        in_specs=(
            PartitionSpec(ROWS, None, None, "tensor"),
            PartitionSpec(None, "tensor"),
        ),
        out_specs=PartitionSpec(ROWS, None, "tensor"),
    )(qkv.reshape(whole), bias.reshape(whole[2:]))


def attend_with_weights(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> tuple[Float[Array, "b n e//3"], Float[Array, "b {heads} n n"]]:
    """`attend`, and the softmax weights, in float32 at least."""
    q, k, v = _scaled(_apart(qkv, bias, heads))
    weights = jax.nn.softmax(_logits(q, k), axis=-1)
    return _joined(jnp.einsum("banm,bamc->banc", weights.astype(v.dtype), v)), weights


def _apart(qkv, bias, heads: int) -> Float[Array, "b 3 a n c"]:
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    parts = (qkv + bias[None, None]).reshape(rows, tokens, 3, heads, width // heads)
    return jnp.transpose(parts, (0, 2, 3, 1, 4))


def _scaled(parts):
    """q, divided by the root of the size of a head, k and v: each "... a n c"."""
    q, k, v = jnp.moveaxis(parts, -4, 0)
    return q * parts.shape[-1] ** -0.5, k, v


def _joined(heads):
    rows, count, tokens, size = heads.shape
    return jnp.moveaxis(heads, 1, 2).reshape(rows, tokens, count * size)


def _logits(q, k):
    # Logits and softmax in float32 at least: bfloat16 has 8 bits of mantissa.
    kind = accurate(q.dtype)
    return jnp.einsum("...nc,...mc->...nm", q, k, preferred_element_type=kind)


def _kernel_fits(qkv, mesh: jax.sharding.Mesh) -> bool:
    tokens, width = qkv.shape[1], qkv.shape[2] // 3 // mesh.shape["tensor"]
    room = _ROOM.get(mesh.devices.flat[0].device_kind, _LEAST_ROOM) * 2**20
    # As the compiler was seen to need it, for 197 to 1025 tokens: up to 12 blocks of
    # weights at once, and what is read and written twice, once being on its way.
    weights = 4 * _up(tokens, 8) * _up(tokens, LANES)
    return (
        qkv.dtype == jnp.bfloat16
        and width % LANES == 0
        and 12 * weights + 16 * tokens * width <= room
    )


def recomputing_attention(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int
) -> Float[Array, "b n e//3"]:
    """`attend` that keeps no weights for the gradient."""
    return _joined(_recomputing(_apart(qkv, bias, heads)))


# Of one array: gradients of three slices of it would be padded and added.
@jax.custom_vjp
def _recomputing(parts: Float[Array, "b 3 a n c"]) -> Float[Array, "b a n c"]:
    q, k, v = _scaled(parts)
    weights, scale = _softmax(_logits(q, k))
    mixed = jnp.einsum("...nm,...mc->...nc", weights.astype(v.dtype), v)
    return mixed * scale.astype(v.dtype)


def _recomputing_backward(parts, gradient):
    _, heads, tokens, _ = gradient.shape
    if heads * tokens**2 * 4 < _LOOP:
        return (jax.vmap(_gradients)(parts, gradient),)
    return (jax.lax.map(lambda image: _gradients(*image), (parts, gradient)),)


def _gradients(
    parts: Float[Array, "3 a n c"], gradient: Float[Array, "a n c"]
) -> Float[Array, "3 a n c"]:
    q, k, v = _scaled(parts)
    weights, scale = _softmax(_logits(q, k))
    weights = weights * scale
    dv = jnp.einsum("anm,anc->amc", weights.astype(v.dtype), gradient)
    dw = _logits(gradient, v)
    ds = weights * (dw - (weights * dw).sum(axis=-1, keepdims=True))
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("anm,amc->anc", ds, k) * parts.shape[-1] ** -0.5
    return jnp.stack([dq, jnp.einsum("anm,anc->amc", ds, q), dv])


_recomputing.defvjp(lambda parts: (_recomputing(parts), parts), _recomputing_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def short_attention(
    qkv: Float[Array, "b n e"],
    bias: Float[Array, " e"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "b n e//3"]:
    """`attend` as a TPU kernel: one image at a time, whole in vector memory.

    Args:
        interpret: run it as plain JAX, on any backend.
    Raises:
        ValueError: the width, e / 3, is not a multiple of 128 lanes.
    """
    rows, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = jax.ShapeDtypeStruct((rows, tokens, width), qkv.dtype)
    return _call(_forward, [qkv, bias[None]], [out], heads, interpret)[0]


def _short_forward(qkv, bias, heads, interpret):
    return short_attention(qkv, bias, heads, interpret), (qkv, bias)


def _short_backward(heads, interpret, kept, gradient):
    # The weights are computed again: keeping them is what costs.
    qkv, bias = kept
    out = [qkv, jax.ShapeDtypeStruct((1, *bias.shape), jnp.float32)]
    arrays = [qkv, bias[None], gradient]
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
    product = 2 * _up(tokens, 8) * _up(tokens, LANES) * lanes
    return pl.CostEstimate(
        flops=rows * products * product,
        transcendentals=rows * heads * tokens * tokens,
        bytes_accessed=2 * rows * tokens * width * moved,
    )


def _up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def _window(head: int, size: int) -> tuple[int, int]:
    """(first lane, lanes) of the whole tiles that a head of `size` lanes lies in.

    Heads that share a tile are told apart by zeros: a matrix unit takes a whole tile
    in the time of a part of one, and moving lanes costs more.
    """
    first = head * size // LANES * LANES
    return first, _up((head + 1) * size, LANES) - first


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
