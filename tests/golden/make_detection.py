# SPDX-License-Identifier: Apache-2.0
"""Makes detection.npz: what torchvision and PyTorch answer to the inputs below.

python tests/golden/make_detection.py

It needs torch 2.14 and torchvision 0.29; tests/ops/detection_test.py reads the file,
and calls `answers` where both are installed.
"""

import pathlib

import numpy as np

FILE = pathlib.Path(__file__).with_name("detection.npz")
SIZES = ((32, 48), (16, 24), (8, 12), (4, 6))  # of feature maps, strides 4 to 32
STRIDES = (4, 8, 16, 32)
IMAGE = (128, 192)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def boxes(count, seed, flat=True):
    """Boxes of all sizes in an image of 128 x 192 pixels, three around each place; some
    reach over its border and some, if `flat`, have no area."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-30, (180, 120), (count, 2))
    sides = np.exp(rng.uniform(np.log(4), np.log(150), (count, 2)))
    first = np.arange(count) // 3 * 3
    corner, sides = corner[first], sides[first]
    corner += rng.normal(0, 0.08, corner.shape) * sides
    found = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    if flat:
        found[5::17, 2] = found[5::17, 0]  # no width
    return found


def inputs():
    """The arrays that both sides are given, by name."""
    rng = np.random.default_rng(0)
    scores = rng.permutation(300).astype(np.float32)
    masks = rng.random((12, 28, 28)).astype(np.float32)
    given = {
        "boxes": boxes(300, 1),
        "anchors": np.abs(boxes(300, 2)) + np.float32([0, 0, 60, 60]),
        "codes": rng.normal(0, 2, (300, 4)).astype(np.float32),
        "scores": scores,
        "groups": rng.integers(0, 4, 300).astype(np.int32),
        "objects": boxes(300, 1, flat=False)[:200] + np.float32([1, -2, 3, 1]),
        "masks": masks,
        "logits": rng.normal(0, 4, (64,)).astype(np.float32),
        "targets": rng.random(64).astype(np.float32),
    }
    for number, (rows, cols) in enumerate(SIZES):
        given[f"map{number}"] = rng.normal(0, 1, (rows, cols, 3)).astype(np.float32)
    return given


def answers(given):
    """What torchvision and PyTorch compute of `inputs()`, by name."""
    import torch
    import torch.nn.functional as F
    from torchvision import ops
    from torchvision.models.detection._utils import BoxCoder, Matcher

    t = {name: torch.from_numpy(np.asarray(array)) for name, array in given.items()}
    solid = t["boxes"].clone()
    solid[:, 2:] = torch.maximum(solid[:, 2:], solid[:, :2] + 1)
    coder = BoxCoder(WEIGHTS)
    found = {
        "iou": ops.box_iou(solid, t["objects"]),
        "area": ops.box_area(t["boxes"]),
        "clipped": ops.clip_boxes_to_image(t["boxes"], IMAGE),
        "encoded": coder.encode_single(solid, t["anchors"]),
        "decoded": coder.decode_single(t["codes"], t["anchors"]),
    }
    for name, count in (("", 200), ("_one", 1)):
        overlap = ops.box_iou(t["objects"][:count], solid)
        for best in (False, True):
            matcher = Matcher(0.7, 0.3, allow_low_quality_matches=best)
            found[f"matched{name}_{best}"] = matcher(overlap)
    for threshold in (0.3, 0.7):
        kept = ops.nms(t["boxes"], t["scores"], threshold)
        found[f"nms_{threshold}"] = kept
        kept = ops.batched_nms(t["boxes"], t["scores"], t["groups"].long(), threshold)
        found[f"nms_groups_{threshold}"] = kept
    for number, stride in enumerate(STRIDES):
        one = t[f"map{number}"].permute(2, 0, 1)[None]
        for side in (2, 7):
            seen = ops.roi_align(one, [t["boxes"]], side, 1 / stride, 2, aligned=True)
            found[f"roi{side}_{number}"] = seen.permute(0, 2, 3, 1)[:40]
    at = torch.tensor(paste_boxes())
    y = (torch.arange(64) + 0.5)[None] - at[:, 1:2]
    x = (torch.arange(96) + 0.5)[None] - at[:, :1]
    y = y / (at[:, 3:] - at[:, 1:2]) * 2 - 1
    x = x / (at[:, 2:3] - at[:, :1]) * 2 - 1
    where = torch.stack(
        [x[:, None].expand(-1, 64, -1), y[:, :, None].expand(-1, -1, 96)], dim=-1
    )
    pasted = F.grid_sample(t["masks"][:, None], where, align_corners=False)
    found["pasted"] = pasted[:, 0]
    where = torch.from_numpy(crops())
    solid = (t["masks"][:, None] > 0.5).float()
    cut = ops.roi_align(solid, where, 14, 1.0, 1, aligned=True)
    found["cut"] = cut[:, 0]
    logits, targets = t["logits"], t["targets"]
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    found["sigmoid_cross_entropy"] = bce
    for beta in (0.0, 1 / 9, 1.0):
        smooth = F.smooth_l1_loss(logits, targets, reduction="none", beta=beta)
        found[f"smooth_l1_{beta:.2f}"] = smooth
    return {name: array.numpy() for name, array in found.items()}


def paste_boxes():
    """Where 12 masks are pasted in an image of 64 x 96 pixels: inside, over the border,
    far outside, smaller than a pixel."""
    found = boxes(12, 4) / 2
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 0.3)
    found[3] = -40, -40, -10, -10
    return found.astype(np.float32)


def crops():
    """One box for each of 12 masks of 28 x 28 pixels, inside of them; the number of the
    mask stands first."""
    corner = np.random.default_rng(5).uniform(1, 10, (12, 2))
    found = np.concatenate([corner, corner + np.linspace(4, 16, 12)[:, None]], axis=1)
    rows = np.arange(12)[:, None]
    return np.concatenate([rows, found], axis=1).astype(np.float32)


if __name__ == "__main__":
    given = inputs()
    answered = answers(given)
    kept = {
        name: array.astype(np.int32) if array.dtype.kind == "i" else array
        for name, array in answered.items()
    }
    kept["iou"] = kept["iou"][:, :40]
    np.savez_compressed(FILE, **kept)
    print(FILE, FILE.stat().st_size, "bytes")
