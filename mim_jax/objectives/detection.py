# SPDX-License-Identifier: Apache-2.0
"""Finding objects: a Mask R-CNN on the encoder, for boxes, classes and masks."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mim_jax.models.detection import LEVELS, BoxHead, MaskHead, Proposer, Pyramid
from mim_jax.models.vit import SIZES, Encoder, Windows
from mim_jax.objectives.base import (
    Aux,
    Batch,
    Detector,
    Found,
    Params,
    Stats,
    apply,
    purpose,
)
from mim_jax.ops import boxes as coding
from mim_jax.ops.losses import cross_entropy, sigmoid_cross_entropy, smooth_l1
from mim_jax.ops.matching import match, nms, sample
from mim_jax.ops.patches import to_float
from mim_jax.ops.roi import crop_masks, levels, roi_align
from mim_jax.schema import check_ranges, within

BOX_SIDE, MASK_SIDE = 7, 14  # of the regions that the two heads see
# Factors of a region's offsets, which make them about 1 large.
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposals:
    """How anchors become the boxes that the heads look at.

    Attributes:
        side: of the anchors, in strides of their level.
        ratios: heights divided by widths.
        low, high: overlaps with an object below which an anchor is background, and
            from which it is one.
        samples: anchors of an image whose losses count; at most half are objects.
        before, before_eval: best anchors of each level, in training and evaluation.
        overlap: of two proposals of a level, above which the worse one is dropped.
        after: best proposals of an image.
    """

    side: float = within(8.0, above=0, most=1000)
    ratios: tuple[float, ...] = within((0.5, 1.0, 2.0), least=0.01, most=100)
    low: float = within(0.3, least=0, most=1)
    high: float = within(0.7, above=0, most=1)
    samples: int = within(256, least=2, most=2**16)
    before: int = within(2000, least=1, most=2**16)
    before_eval: int = within(1000, least=1, most=2**16)
    overlap: float = within(0.7, above=0, most=1)
    after: int = within(1000, least=1, most=2**16)

    def __post_init__(self):
        check_ranges(self)
        if self.low > self.high:
            raise ValueError(f"low={self.low}, high={self.high}: want low <= high")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
    """Which proposals the heads learn from.

    Attributes:
        samples: of an image.
        share: of the samples, at most, that may be objects.
        overlap: with an object from which a proposal is that object.
    """

    samples: int = within(512, least=2, most=2**16)
    share: float = within(0.25, above=0, most=1)
    overlap: float = within(0.5, above=0, most=1)

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What an evaluation gets.

    Attributes:
        least: score of a class below which a box is no answer.
        candidates: best boxes of an image that are compared with each other.
        overlap: of two boxes of a class, above which the worse one is dropped.
        most: answers of an image.
    """

    least: float = within(0.05, least=0, below=1)
    candidates: int = within(1000, least=1, most=2**16)
    overlap: float = within(0.5, above=0, most=1)
    most: int = within(100, least=1, most=2**14)

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(Detector):
    """Mask R-CNN, arXiv:1703.06870, on a plain vision transformer.

    It reads examples of `mim_jax.data.examples.instances.Instances`. The sum of five
    losses: score and box of the anchors, class, box and mask of the regions. Each is a
    mean over images, so an image's loss depends on no other image. The boxes' losses
    are absolute errors, summed and divided by the number of samples; the mask's is the
    mean over the image's regions with an object.

    Attributes:
        encoder: whose patch tokens become the pyramid.
        pyramid, proposer, box_head, mask_head: the networks behind it.
        classes: number of classes of objects.
        window: side, in patches, of the squares within which blocks attend,
            arXiv:2203.16527; 0: all patches attend to all.
        global_blocks: with windows, the blocks that attend everywhere all the same.
        proposals, regions, answers: from anchors to boxes.
        mean, std: of the data, per channel, for pixels in 0..1.
    """

    reads = (
        *("image", "size", "boxes", "boxes_valid", "categories"),
        *("masks", "masks_valid"),
    )

    encoder: Encoder = Encoder(**SIZES["B"], positions="learned", drop_path=0.1)
    pyramid: Pyramid = Pyramid()
    proposer: Proposer = Proposer()
    box_head: BoxHead = BoxHead()
    mask_head: MaskHead = MaskHead()
    classes: int = within(80, least=1, most=2**16)
    window: int = within(0, least=0, most=2**12)
    global_blocks: tuple[int, ...] = within((2, 5, 8, 11), least=0, most=1000)
    proposals: Proposals = Proposals()
    regions: Regions = Regions()
    answers: Answers = Answers()
    mean: tuple[float, ...] = within((0.485, 0.456, 0.406), least=0, most=1)
    std: tuple[float, ...] = within((0.229, 0.224, 0.225), least=1e-3, most=10)

    def __post_init__(self):
        check_ranges(self)

    @property
    def feature(self):
        return "avg"  # the heads read patch tokens alone

    def check_shape(self, image_shape: tuple[int, int, int]) -> None:
        self.check_encoder(image_shape)
        self.pyramid.check_sizes()
        for name in ("proposer", "box_head", "mask_head"):
            check_ranges(getattr(self, name), f"{name}.")
        grid, side = self.grid(image_shape), self.window or 2
        if grid.rows % 2 or grid.cols % 2 or grid.rows % side or grid.cols % side:
            window = f" and of window={self.window}" if self.window else ""
            raise ValueError(
                f"images of {image_shape[0]}x{image_shape[1]} have {grid.rows} x "
                f"{grid.cols} patches: want multiples of 2{window}, by which the "
                "pyramid and the windows divide them"
            )
        if self.window and self.encoder.relative_positions:
            raise ValueError(
                f"window={self.window} with encoder.relative_positions=True: want "
                "window=0 or no relative positions"
            )

    def init(self, key: Key[Array, ""], batch: Batch) -> tuple[Params, Stats]:
        keys = jax.random.split(key, 5)
        grid = self.grid(batch["image"].shape[1:])
        tokens, encoder = self.init_encoder(keys[0], batch)
        maps, pyramid = self.pyramid.init_with_output(keys[1], _map(tokens, grid))
        proposer = self.proposer.init(keys[2], maps, len(self.proposals.ratios))
        width = maps[0].shape[-1]
        small = jnp.zeros((1, BOX_SIDE, BOX_SIDE, width))
        large = jnp.zeros((1, MASK_SIDE, MASK_SIDE, width))
        heads = {
            "pyramid": pyramid,
            "proposer": proposer,
            "box_head": self.box_head.init(keys[3], small, self.classes),
            "mask_head": self.mask_head.init(keys[4], large, self.classes),
        }
        return {"encoder": encoder, **{k: v["params"] for k, v in heads.items()}}, {}

    def loss(
        self, params: Params, state, batch: Batch, keys: Key[Array, " b"]
    ) -> tuple[Float[Array, ""], Aux]:
        del state
        maps = self.maps(params, to_float(batch["image"]), purpose(keys, 4))
        size = batch["size"].astype(jnp.float32)
        objects, valid = batch["boxes"], batch["boxes_valid"]
        anchors, scored = self._scored(params, maps)
        logits = jnp.concatenate([one for one, _ in scored], axis=1)
        offsets = jnp.concatenate([one for _, one in scored], axis=1)
        all_anchors = np.concatenate(anchors)
        losses = jax.vmap(functools.partial(self._anchor_losses, all_anchors))(
            purpose(keys, 1), logits, offsets, objects, valid
        )
        limit = self.proposals.before
        proposed = jax.vmap(functools.partial(self._propose, limit, anchors))
        boxes, real = proposed([jax.lax.stop_gradient(one) for one in scored], size)
        # The objects themselves are proposals: early ones overlap none of them.
        boxes = jnp.concatenate([boxes, objects], axis=1)
        real = jnp.concatenate([real, valid], axis=1)
        taken = jax.vmap(self._sample)(
            purpose(keys, 2), boxes, real, objects, valid, batch["categories"]
        )
        regions = self._regions(maps, taken.boxes, BOX_SIDE)
        classes, moves = self._boxes_of(params, regions)
        losses |= jax.vmap(self._region_losses)(taken, classes, moves, objects)
        first = jax.tree.map(lambda one: one[:, : self._positives], taken)
        masks = self._masks_of(params, self._regions(maps, first.boxes, MASK_SIDE))
        losses["mask"] = jax.vmap(_mask_loss)(
            first, masks, objects, batch["masks"], batch["masks_valid"]
        )
        means = {f"loss_{name}": one.mean() for name, one in losses.items()}
        found = jnp.asarray(taken.positive, jnp.float32).sum(axis=1).mean()
        metrics = means | {"positive_regions": found}
        weight = jnp.asarray(len(objects), jnp.float32)
        total = functools.reduce(jnp.add, means.values())
        return total, Aux(weight=weight, stats={}, metrics=metrics)

    def maps(
        self,
        params: Params,
        images: Float[Array, "b h w c"],
        keys: Key[Array, " b"] | None = None,
    ) -> list[Float[Array, "b _ _ f"]]:
        """The maps of the pyramid, and a coarser one for the largest anchors."""
        tokens, _ = self.encode(params, images, keys=keys)
        grid = self.grid(images.shape[1:])
        maps = apply(self.pyramid, params["pyramid"], _map(tokens, grid))
        return [*maps, maps[-1][:, ::2, ::2]]

    def encode(
        self,
        params: Params,
        images: Float[Array, "b h w c"],
        keep: Int[Array, "b k"] | None = None,
        hidden: Bool[Array, "b n"] | None = None,
        taps: Sequence[str] = (),
        keys: Key[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, Float[Array, "..."]]]:
        if not self.window or keep is not None:
            return super().encode(params, images, keep, hidden, taps, keys)
        patches, grid = self.patches(images)
        windows = Windows(self.window, self.global_blocks, grid)
        given = dict(taps=taps, hidden=hidden, keys=keys, through=windows.run_blocks)
        return apply(self.encoder, params["encoder"], patches, grid, **given)

    def detect(
        self,
        params: Params,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
        size: Int[Array, "b 2"],
    ) -> Found:
        maps = self.maps(params, to_float(images))
        sizes = size.astype(jnp.float32)
        anchors, scored = self._scored(params, maps)
        limit = self.proposals.before_eval
        proposed = jax.vmap(functools.partial(self._propose, limit, anchors))
        boxes, real = proposed(scored, sizes)
        regions = self._regions(maps, boxes, BOX_SIDE)
        logits, moves = self._boxes_of(params, regions)
        answers = jax.vmap(self._answers)(boxes, real, logits, moves, sizes)
        boxes, scores, classes, valid = answers
        # A logit that is not finite would look like an image without objects.
        logits = logits.reshape(len(images), -1)
        every = jnp.concatenate([logits, *(one for one, _ in scored)], axis=1)
        finite = jnp.isfinite(every).all(axis=1, keepdims=True)
        scores = jnp.where(finite, scores, jnp.nan)
        masks = self._masks_of(params, self._regions(maps, boxes, MASK_SIDE))
        shown = jax.vmap(_of_class)(masks, classes)
        return Found(boxes, scores, classes, valid, jax.nn.sigmoid(shown))

    # From anchors to proposals.

    def _scored(self, params: Params, maps):
        """Of each level its anchors; and its logits and offsets."""
        given = self.proposals
        scored = apply(self.proposer, params["proposer"], maps, len(given.ratios))
        anchors = [
            coding.anchors(one.shape[1:3], stride, given.side * stride, given.ratios)
            for one, stride in zip(maps, self._strides, strict=True)
        ]
        return anchors, scored

    @property
    def _strides(self) -> list[float]:
        """Pixels per place of each map, the coarsest one included."""
        return [self.encoder.patch * 2.0 ** (level - 2) for level in range(LEVELS + 1)]

    def _anchor_losses(self, anchors, key, logits, offsets, objects, valid):
        given, places = self.proposals, jnp.asarray(anchors)
        matched = match(places, objects, valid, given.low, given.high, best=True)
        count = min(given.samples, len(anchors))
        most = max(1, given.samples // 2)
        taken = sample(key, matched.positive, matched.negative, count, most)
        target = jnp.where(taken.positive, 1.0, 0.0)
        score = sigmoid_cross_entropy(logits[taken.place], target)
        box = objects[matched.best[taken.place]]
        want = coding.encode(box, places[taken.place])
        error = smooth_l1(offsets[taken.place] - want).sum(axis=1)
        return {
            "anchor_score": jnp.where(taken.valid, score, 0).sum() / given.samples,
            "anchor_box": jnp.where(taken.positive, error, 0).sum() / given.samples,
        }

    def _propose(self, limit: int, anchors, scored, size):
        """Boxes "n 4" of one image, n <= proposals.after, and which of them are real.

        Args:
            limit: best anchors of each level that are compared with each other.
            anchors, scored: of each level.
        """
        given, boxes, scores = self.proposals, [], []
        for (logits, offsets), places in zip(scored, anchors, strict=True):
            logits, best = jax.lax.top_k(logits, min(limit, len(logits)))
            found = coding.decode(offsets[best], jnp.asarray(places)[best])
            found = coding.clip(found, size)
            solid = coding.area(found) > 0
            kept = nms(found, solid, given.overlap)
            boxes.append(found)
            scores.append(jnp.where(kept, logits, -jnp.inf))
        boxes, scores = jnp.concatenate(boxes), jnp.concatenate(scores)
        scores, best = jax.lax.top_k(scores, min(given.after, len(scores)))
        return boxes[best], scores > -jnp.inf

    # From proposals to regions.

    @property
    def _positives(self) -> int:
        return max(1, int(self.regions.samples * self.regions.share))

    def _sample(self, key, boxes, real, objects, valid, categories) -> "_Taken":
        given = self.regions
        cut = given.overlap
        matched = match(boxes, objects, valid, cut, cut)
        positive, negative = matched.positive & real, matched.negative & real
        count = min(given.samples, len(boxes))
        taken = sample(key, positive, negative, count, self._positives)
        best = matched.best[taken.place]
        label = jnp.where(taken.positive, categories[best], self.classes)
        return _Taken(boxes[taken.place], best, label, taken.positive, taken.valid)

    def _regions(self, maps, boxes, side: int):
        """Features "b n s s c" of the boxes of each image."""
        maps, strides = maps[:LEVELS], self._strides[:LEVELS]

        def one(maps, boxes):
            # A square of 14 patches, the whole image of pre-training, is read from the
            # map of patches.
            patch = self.encoder.patch
            level = levels(boxes, strides[0], LEVELS, patch, 14 * patch)
            return roi_align(maps, boxes, level, strides, side)

        return jax.vmap(one)(maps, boxes)

    def _boxes_of(self, params: Params, regions):
        flat = regions.reshape(-1, *regions.shape[2:])
        found = apply(self.box_head, params["box_head"], flat, self.classes)
        return [one.reshape(*regions.shape[:2], *one.shape[1:]) for one in found]

    def _masks_of(self, params: Params, regions):
        flat = regions.reshape(-1, *regions.shape[2:])
        found = apply(self.mask_head, params["mask_head"], flat, self.classes)
        return found.reshape(*regions.shape[:2], *found.shape[1:])

    def _region_losses(self, taken: "_Taken", logits, moves, objects):
        count = self.regions.samples
        target = jax.nn.one_hot(taken.label, self.classes + 1, dtype=logits.dtype)
        wrong = cross_entropy(logits, target)
        want = coding.encode(objects[taken.best], taken.boxes, _WEIGHTS)
        own = jnp.minimum(taken.label, self.classes - 1)
        move = _of_class(moves.swapaxes(1, 2), own)
        error = smooth_l1(move - want).sum(axis=1)
        return {
            "class": jnp.where(taken.valid, wrong, 0).sum() / count,
            "box": jnp.where(taken.positive, error, 0).sum() / count,
        }

    def _answers(self, boxes, real, logits, moves, size):
        """Boxes, scores, classes and validity of one image's answers."""
        given = self.answers
        scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
        scores = jnp.where(real[:, None], scores, 0)
        flat = scores.reshape(-1)
        flat, best = jax.lax.top_k(flat, min(given.candidates, len(flat)))
        place, label = best // self.classes, best % self.classes
        found = coding.decode(moves[place, label], boxes[place], _WEIGHTS)
        found = coding.clip(found, size)
        valid = (flat > given.least) & (coding.area(found) > 0)
        kept = nms(found, valid, given.overlap, label)
        most = min(given.most, len(flat))
        flat, best = jax.lax.top_k(jnp.where(kept, flat, 0), most)
        return found[best], flat, label[best].astype(jnp.int32), flat > 0

    def teacher(self, old: Params | None, params: Params, step: Array) -> None:
        return None

    def flops(self, image_shape: tuple[int, int, int]) -> float:
        return 3 * sum(self.parts(image_shape).values())

    def parts(self, image_shape: tuple[int, int, int]) -> dict[str, float]:
        """FLOPs of one image's forward pass in training, by part of the network."""
        grid, width = self.grid(image_shape), self.pyramid.width
        places = grid.size * sum(4.0 ** (2 - level) for level in range(LEVELS + 1))
        encoder = self.encoder.flops(grid.size, image_shape[2])
        if self.window:
            # Pairs of patches that the blocks with windows do not compare.
            few = len(set(self.global_blocks) & set(range(self.encoder.depth)))
            saved = grid.size * (grid.size - self.window**2)
            encoder -= 4 * (self.encoder.depth - few) * saved * self.encoder.width
        box = self.box_head.flops(BOX_SIDE, width, self.classes)
        mask = self.mask_head.flops(MASK_SIDE, width, self.classes)
        ratios = len(self.proposals.ratios)
        return {
            "encoder": encoder,
            "pyramid": self.pyramid.flops(grid.size, self.encoder.width),
            "proposer": self.proposer.flops(places, width, ratios),
            "box_head": self.regions.samples * box,
            "mask_head": self._positives * mask,
        }


class _Taken(NamedTuple):
    """Regions of which an image's heads learn, those with an object first.

    Attributes:
        boxes: of the regions.
        best: object of each.
        label: class of each; the number of classes is background.
        positive: whether it has an object.
        valid: whether the entry is a region at all.
    """

    boxes: Any
    best: Any
    label: Any
    positive: Any
    valid: Any


def _mask_loss(taken: _Taken, logits, objects, masks, masks_valid):
    counts = taken.positive & masks_valid[taken.best]
    label = jnp.where(counts, taken.label, 0)
    own = _of_class(logits, label)
    frames = objects[taken.best]
    target = crop_masks(masks[taken.best], frames, taken.boxes, own.shape[-1])
    wrong = sigmoid_cross_entropy(own, target).mean(axis=(1, 2))
    count = jnp.maximum(counts.sum(), 1).astype(wrong.dtype)
    return jnp.where(counts, wrong, 0).sum() / count


def _of_class(
    values: Float[Array, "n ... k"], label: Int[Array, " n"]
) -> Float[Array, "n ..."]:
    """Of each entry the values of its own class."""
    # On TPUs the gradient of a gather would be a loop over the entries.
    classes = values.shape[-1]
    own = jax.nn.one_hot(label, classes, dtype=bool)
    own = own.reshape(len(label), *(1,) * (values.ndim - 2), classes)
    return jnp.where(own, values, 0).sum(axis=-1)


def _map(tokens: Float[Array, "b t d"], grid) -> Float[Array, "b h w d"]:
    """The patch tokens where they are in the image."""
    return tokens[:, 1:].reshape(len(tokens), grid.rows, grid.cols, -1)
