# SPDX-License-Identifier: Apache-2.0
"""A random hierarchy over an image, and exact inference in it.

A symbol stands for a square of the image. It is replaced by four symbols, one for each
quarter, and so on down to the tokens. What a symbol is replaced by is one of its
synonyms, all equally likely: this choice is the noise of the four children together.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Uniform = Callable[[int], Float[np.ndarray, " n"]]  # so many numbers in [0, 1)


class Bounds(NamedTuple):
    """Mean squared errors of hidden tokens, per pixel, the noise of pixels included.

    Attributes:
        optimum: of the best prediction from the visible tokens: no model can be better.
        floor: of the mean of all images: what a model reaches that looks at nothing.
    """

    optimum: float
    floor: float


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Rules that make an image of 2**levels x 2**levels tokens from one symbol.

    Attributes:
        rules: by level, the root's first: an array "symbols synonyms 4" of symbols of
            the level below, for the quarters top left, top right, bottom left, bottom
            right.
    """

    rules: tuple[Int[np.ndarray, "_symbols _synonyms 4"], ...]

    @classmethod
    def random(
        cls, levels: int, symbols: int, synonyms: int, uniform: Uniform
    ) -> "Grammar":
        """Rules with the same number of symbols at all levels.

        All synonyms of a level differ, so four children determine their parent.

        Args:
            uniform: the source of randomness.
        Raises:
            ValueError: there are not so many different synonyms.
        """
        if synonyms > symbols**3:
            raise ValueError(
                f"synonyms={synonyms}: want at most symbols**3 = {symbols**3}, so that "
                f"all {symbols} x synonyms of a level differ"
            )

        def rule():
            chosen = np.argsort(uniform(symbols**4), kind="stable")[
                : symbols * synonyms
            ]
            digits = [chosen // symbols**k % symbols for k in range(4)]
            return np.stack(digits, axis=-1).reshape(symbols, synonyms, 4)

        return cls(tuple(rule() for _ in range(levels)))

    @property
    def tokens(self) -> int:
        """Tokens along a side of the image."""
        return 2 ** len(self.rules)

    def sample(
        self, roots: Int[np.ndarray, " b"], uniform: Uniform
    ) -> list[Int[np.ndarray, "b _rows _cols"]]:
        """Symbols of each level under given roots, from the root to the tokens.

        Args:
            uniform: the source of randomness.
        """
        found = [roots[:, None, None]]
        for rule in self.rules:
            above = found[-1]
            choice = (uniform(above.size) * rule.shape[1]).astype(int)
            found.append(_placed(rule[above, choice.reshape(above.shape)]))
        return found

    def posterior(
        self,
        tokens: Int[np.ndarray, "b n n"],
        hidden: Bool[np.ndarray, "b n n"],
    ) -> list[Float[np.ndarray, "b _rows _cols _symbols"]]:
        """Probabilities of all symbols given the visible tokens, by level, the root's
        first: two passes of messages, exact since the hierarchy is a tree.

        All roots are equally likely. The time is proportional to images x tokens x the
        number of rules of a level.

        Args:
            tokens: symbols; those of hidden tokens are not read.
            hidden: True at hidden tokens.
        Raises:
            ValueError: the grammar does not make these visible tokens.
        """
        symbols = 1 + max(
            int(self.rules[-1].max()), int(tokens[~hidden].max(initial=0))
        )
        seen = np.eye(symbols)[np.where(hidden, 0, tokens)]
        upward = [np.where(hidden[..., None], 1.0, seen)]
        parts = []  # what each quarter says to each synonym: "b rows cols s m 4"
        for rule in self.rules[::-1]:
            four = _quarters(upward[-1])
            part = [four[..., k, :][..., rule[:, :, k]] for k in range(4)]
            parts.append(np.stack(part, axis=-1))
            upward.append(_normal(parts[-1].prod(axis=-1).mean(axis=-1)))
        downward = [np.full_like(upward[-1], 1 / upward[-1].shape[-1])]
        for rule, part, below in zip(
            self.rules, parts[::-1], upward[-2::-1], strict=True
        ):
            prior = downward[-1][..., None]
            told = []
            for k in range(4):
                others = np.delete(part, k, axis=-1).prod(axis=-1)
                by_rule = (prior * others).reshape(*prior.shape[:3], -1)
                told.append(by_rule @ np.eye(below.shape[-1])[rule[:, :, k].ravel()])
            downward.append(_normal(_placed(np.stack(told, axis=3))))
        return [
            _normal(above * below)
            for above, below in zip(downward, upward[::-1], strict=True)
        ]

    def bounds(
        self,
        tokens: Int[np.ndarray, "b n n"],
        hidden: Bool[np.ndarray, "b n n"],
        textures: Float[np.ndarray, "symbols p"],
        noise: float,
        shifted: bool = False,
    ) -> Bounds:
        """The errors on hidden tokens of the best model and of a blind one.

        They are means over the hidden tokens of these images, in expectation over what
        the visible ones leave open.

        Args:
            tokens, hidden: as for `posterior`; every image hides as many.
            textures: the mean pixels of each token.
            noise: standard deviation of independent noise of each pixel.
            shifted: the model sees each image moved, as a torus, by a random number of
                tokens down and right, while `tokens` and `hidden` are given where they
                were before. The optimum is that of a model which is told this shift;
                one that looks at nothing does not know it.
        """
        given = self.posterior(tokens, hidden)[-1]
        nothing = self.posterior(tokens[:1], np.ones_like(hidden[:1]))[-1]
        if shifted:  # each token comes from every place alike
            nothing = nothing.mean(axis=(1, 2), keepdims=True)
        optimum = _variance(given, textures)[hidden].mean()
        floor = np.broadcast_to(_variance(nothing, textures), hidden.shape)[hidden]
        return Bounds(optimum + noise**2, floor.mean() + noise**2)


def _variance(
    chances: Float[np.ndarray, "b n n symbols"],
    textures: Float[np.ndarray, "symbols p"],
) -> Float[np.ndarray, "b n n"]:
    """Mean over pixels of the variance of each token's texture."""
    mean = chances @ textures
    return (chances @ textures**2 - mean**2).mean(axis=-1)


def _quarters(
    values: Float[np.ndarray, "b rows cols s"],
) -> Float[np.ndarray, "b rows//2 cols//2 4 s"]:
    """The four children of each node, from their places in the image."""
    b, rows, cols, s = values.shape
    four = values.reshape(b, rows // 2, 2, cols // 2, 2, s).swapaxes(2, 3)
    return four.reshape(b, rows // 2, cols // 2, 4, s)


def _placed(four: np.ndarray) -> np.ndarray:
    """Puts the four children of each node, axis 3, at their places in the image."""
    b, rows, cols, _, *more = four.shape
    four = four.reshape(b, rows, cols, 2, 2, *more).swapaxes(2, 3)
    return four.reshape(b, 2 * rows, 2 * cols, *more)


def _normal(values: Float[np.ndarray, "b rows cols s"]):
    """Divides by the sum over symbols."""
    total = values.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError(
            f"image {np.argwhere(total <= 0)[0][0]}: the grammar does not make its "
            "visible tokens; want tokens that `sample` made"
        )
    return values / total


def ancestors(levels: int) -> Int[np.ndarray, "levels n n"]:
    """The number of the node above each token at levels 1 to `levels`; nodes of a level
    are numbered row by row."""
    side = 2**levels
    row, col = np.divmod(np.arange(side * side).reshape(side, side), side)
    return np.stack(
        [(row >> k) * (side >> k) + (col >> k) for k in range(1, levels + 1)]
    )
