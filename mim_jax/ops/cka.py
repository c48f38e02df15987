# SPDX-License-Identifier: Apache-2.0
"""Linear centred kernel alignment from sums over examples, in float64 on the host."""

import numpy as np
from jaxtyping import Float

_ROUNDING = 1e-24  # of the squared length of a matrix, what centring may leave


class Moments:
    """Sums over examples of two feature sets, from which CKA is exact.

    It needs no n x n matrix: memory is 3 d^2 numbers per layer for any number of
    examples, and the result does not depend on how they were split into batches.

    Args:
        layers, width: shape of the features of one example.
    """

    def __init__(self, layers: int, width: int):
        self.count = 0
        square = (layers, width, width)
        self._ff, self._gg, self._fg = (np.zeros(square) for _ in range(3))
        self._f, self._g = np.zeros((2, layers, width))
        self._shift: np.ndarray | None = None
        # |f|^2, |g|^2, their products, and features weighted by them.
        self._f2, self._g2 = np.zeros((2, layers))
        self._f4, self._g4, self._f2g2 = np.zeros((3, layers))
        self._ff2, self._fg2, self._gf2, self._gg2 = np.zeros((4, layers, width))

    def add(
        self, f: Float[np.ndarray, "layers n d"], g: Float[np.ndarray, "layers n d"]
    ) -> None:
        """Add the features of n examples; `f` and `g` are of the same examples."""
        f, g = f.astype(np.float64), g.astype(np.float64)
        if self._shift is None:
            # Both estimators ignore a constant shift; the sums lose the fewest digits
            # if features are near 0.
            self._shift = np.stack([f.mean(axis=1), g.mean(axis=1)])
        f, g = f - self._shift[0][:, None], g - self._shift[1][:, None]
        self.count += f.shape[1]
        ft, gt = f.transpose(0, 2, 1), g.transpose(0, 2, 1)
        self._ff += ft @ f
        self._gg += gt @ g
        self._fg += ft @ g
        self._f += f.sum(axis=1)
        self._g += g.sum(axis=1)
        f2, g2 = (f * f).sum(axis=2), (g * g).sum(axis=2)
        self._f2 += f2.sum(axis=1)
        self._g2 += g2.sum(axis=1)
        self._f4 += (f2 * f2).sum(axis=1)
        self._g4 += (g2 * g2).sum(axis=1)
        self._f2g2 += (f2 * g2).sum(axis=1)
        self._ff2 += (f * f2[..., None]).sum(axis=1)
        self._fg2 += (f * g2[..., None]).sum(axis=1)
        self._gf2 += (g * f2[..., None]).sum(axis=1)
        self._gg2 += (g * g2[..., None]).sum(axis=1)

    def plain(self) -> Float[np.ndarray, " layers"]:
        """||G'F||^2 / (||F'F|| ||G'G||) with centred columns, in 0..1.

        Biased upwards unless there are many more examples than features. NaN where the
        features of one side do not differ between the examples.

        Raises:
            ValueError: fewer than 2 examples.
        Source: Kornblith et al., arXiv:1905.00414, Eq. (4).
        """
        self._at_least(2)

        def norm(products, a, b):
            centred = products - a[:, :, None] * b[:, None, :] / self.count
            found, whole = ((x**2).sum(axis=(1, 2)) for x in (centred, products))
            return np.where(found > _ROUNDING * whole, found, 0)

        across = norm(self._fg, self._f, self._g)
        within = norm(self._ff, self._f, self._f) * norm(self._gg, self._g, self._g)
        with np.errstate(invalid="ignore", divide="ignore"):
            return across / np.sqrt(within)

    def debiased(self) -> Float[np.ndarray, " layers"]:
        """CKA from unbiased estimates of HSIC; may fall slightly below 0 or above 1.
        NaN where an estimate of one side with itself is not above 0.

        Raises:
            ValueError: fewer than 4 examples.
        Source: Song et al. 2012, JMLR 13, Eq. (5); Nguyen et al., arXiv:2010.15327.
        """
        self._at_least(4)
        f, g = self._f, self._g
        across = self._hsic(
            self._fg, f, g, self._f2, self._g2, self._fg2, self._gf2, self._f2g2
        )
        ff = self._hsic(
            self._ff, f, f, self._f2, self._f2, self._ff2, self._ff2, self._f4
        )
        gg = self._hsic(
            self._gg, g, g, self._g2, self._g2, self._gg2, self._gg2, self._g4
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(np.minimum(ff, gg) > 0, across / np.sqrt(ff * gg), np.nan)

    def _hsic(self, products, a, b, a2, b2, ab2, ba2, a2b2):
        n = self.count
        trace = (products**2).sum(axis=(1, 2)) - a2b2
        total_a, total_b = (a * a).sum(axis=1) - a2, (b * b).sum(axis=1) - b2
        rows = np.einsum("ld,lde,le->l", a, products, b)
        rows = rows - (a * ab2).sum(axis=1) - (b * ba2).sum(axis=1) + a2b2
        value = trace + total_a * total_b / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
        return value / (n * (n - 3))

    def _at_least(self, least: int) -> None:
        if self.count < least:
            raise ValueError(f"CKA of {self.count} example(s): want at least {least}")
