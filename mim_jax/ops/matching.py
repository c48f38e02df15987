# SPDX-License-Identifier: Apache-2.0
"""Which box goes with which object, which boxes a loss reads, which are duplicates.

All functions are of one image and have static shapes: lists of boxes are padded, and a
bool array says which entries are real.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mim_jax.ops.boxes import iou


class Match(NamedTuple):
    """What each box was matched with.

    Attributes:
        best: which object it overlaps most; 0 if there is no object.
        positive: whether it counts as that object.
        negative: whether it counts as background; a box that is neither is ignored.
    """

    best: Int[Array, " n"]
    positive: Bool[Array, " n"]
    negative: Bool[Array, " n"]


def match(
    boxes: Float[Array, "n 4"],
    objects: Float[Array, "m 4"],
    valid: Bool[Array, " m"],
    low: float,
    high: float,
    best: bool = False,
) -> Match:
    """Matches boxes with objects by their overlap, arXiv:1506.01497, section 3.1.2.

    Args:
        objects, valid: the objects' boxes, and which entries are objects.
        low: below this overlap with every object a box is background.
        high: from this overlap on a box is an object, low <= high.
        best: whether the boxes that overlap an object most, if at all, are positive
            too; each keeps its own best object.
    """
    overlap = jnp.where(valid[None], iou(boxes, objects), -1)
    most, index = overlap.max(axis=1), overlap.argmax(axis=1).astype(jnp.int32)
    positive = most >= high
    if best:
        top = overlap.max(axis=0)
        positive |= ((overlap == top[None]) & (top > 0)[None]).any(axis=1)
    negative = (most < low) & ~positive
    return Match(jnp.where(most >= 0, index, 0), positive, negative)


class Sample(NamedTuple):
    """Boxes that a loss reads, the positive ones first.

    Attributes:
        place: of the sampled boxes among all.
        positive: whether a sampled box is positive.
        valid: whether the entry is a sample at all.
    """

    place: Int[Array, " k"]
    positive: Bool[Array, " k"]
    valid: Bool[Array, " k"]


def sample(
    key: Key[Array, ""],
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    count: int,
    most: int,
) -> Sample:
    """A random sample of positive and negative boxes.

    Args:
        count: of all samples, at most the number of boxes. There are fewer if the boxes
            are fewer.
        most: of positive samples; negative ones take what these leave.
    """
    noise = jax.random.uniform(key, positive.shape, jnp.float32)
    ranked = jnp.where(positive, noise, -1)
    # Positive boxes beyond the first `most` are left out.
    last = jax.lax.top_k(ranked, min(most, len(positive)))[0][-1]
    chosen = positive & (ranked >= last)
    score = jnp.where(chosen, 2 + noise, jnp.where(negative, noise, -1))
    score, index = jax.lax.top_k(score, count)
    return Sample(index, score >= 2, score >= 0)


def nms(
    boxes: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    threshold: float,
    groups: Int[Array, " n"] | None = None,
) -> Bool[Array, " n"]:
    """Which boxes greedy suppression keeps: of boxes that overlap by more than a
    threshold, the first.

    Args:
        boxes: in falling order of their scores.
        valid: entries that are boxes; others are not kept and suppress nothing.
        threshold: intersection over union.
        groups: boxes of different groups, such as classes, never suppress each other.
    """
    order = jnp.arange(len(boxes))
    rivals = (iou(boxes, boxes) > threshold) & (order[:, None] < order[None])
    rivals &= valid[:, None]
    if groups is not None:
        rivals &= groups[:, None] == groups[None]

    # A box is kept unless a kept one before it is a rival. Starting with all, the first
    # box is right at once, and each round the first one that is wrong becomes right:
    # the fixed point is the greedy answer, after as many rounds as the longest chain.
    def rounds(state):
        kept, _ = state
        again = valid & ~(rivals & kept[:, None]).any(axis=0)
        return again, (again != kept).any()

    return jax.lax.while_loop(lambda state: state[1], rounds, (valid, valid.any()))[0]
