# SPDX-License-Identifier: Apache-2.0
"""Tokens by k-means: the index of the nearest of 512 small pictures."""

import dataclasses
import functools
import pathlib

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from mim_jax.ops.patches import Grid, patchify
from mim_jax.tokenizers.base import Tokenizer

SIDE = 4  # pixels of a codeword
CODEBOOK = pathlib.Path(__file__).with_name("kmeans.npz")


@functools.cache
def codebook() -> UInt8[np.ndarray, "v 4 4 3"]:
    """The codewords: token i stands for the i-th; the file says how they were made."""
    with np.load(CODEBOOK, allow_pickle=False) as file:
        return file["codewords"]


def shrink(
    images: Float[Array, "b h w c"], grid: Grid
) -> Float[Array, "b {grid.size} 48"]:
    """Each patch as 4 x 4 pixels of three channels, in the order of `patchify`.

    If the patch's side is a multiple of 4, pixels are averaged over equal squares;
    otherwise the patch is resized (linear, antialiased). Grey images get three equal
    channels.
    """
    patches = patchify(images, grid.patch)
    pixels = einops.rearrange(
        patches, "b n (p q c) -> b n p q c", p=grid.patch, q=grid.patch
    )
    if grid.patch % SIDE == 0:
        pixels = einops.reduce(
            pixels, "b n (p i) (q j) c -> b n p q c", "mean", p=SIDE, q=SIDE
        )
    else:
        shape = (*pixels.shape[:2], SIDE, SIDE, pixels.shape[-1])
        pixels = jax.image.resize(pixels, shape, "linear")
    pixels = jnp.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    return einops.rearrange(pixels, "b n p q c -> b n (p q c)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KMeans(Tokenizer):
    """A patch is averaged down to 4 x 4 pixels; its token is the nearest of 512
    codewords.

    Departure from BEiT (arXiv:2106.08254), where a discrete VAE gives the tokens: this
    tokenizer needs no weights from elsewhere. benchmarks/codebook.py made the codewords
    from the embedded photographs.
    """

    @property
    def vocabulary(self) -> int:
        return len(codebook())

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        codebook()
        if image_shape[2] not in (1, 3):
            raise ValueError(
                f"tokenizer 'kmeans' for images of {image_shape[2]} channels: want 1 "
                "(grey) or 3 (colour)"
            )

    def __call__(
        self, images: Float[Array, "b h w c"], grid: Grid
    ) -> Int[Array, "b {grid.size}"]:
        pixels = shrink(images, grid)
        words = codebook().reshape(self.vocabulary, -1).astype(np.float64) / 255
        # The distance omits |pixels|^2, which is the same for all codewords. Full
        # precision: an accelerator's default, 8 bits of mantissa, can pick a wrong one.
        products = jnp.einsum(
            "bnp,vp->bnv",
            pixels,
            jnp.asarray(words, pixels.dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        lengths = jnp.asarray((words**2).sum(axis=1), pixels.dtype)
        distances = lengths[None, None] - 2 * products
        return distances.argmin(axis=-1).astype(jnp.int32)
