# SPDX-License-Identifier: Apache-2.0
"""What `PixelObjective` promises: hidden pixels cannot reach a reconstruction. And what
it need not have: a decoder, or masks that depend on nothing but keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passes import Given
from small_evals import SIDE, disturbed, objective_of, run_of
from small_run import batches
from tiny import TINY

from mim_jax.evals.base import Run
from mim_jax.evals.images import example_fields, hidden_pixels, keys_of
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import PixelObjective
from mim_jax.ops.masking import from_scores
from mim_jax.ops.patches import denormalise, to_float, unpatchify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simple(PixelObjective):
    """As SimMIM, arXiv:2111.09886: mask tokens, and one linear layer for a decoder.

    Half of the patches are hidden: those with the greatest "order" of the example.
    """

    encoder: Encoder
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    normalise_target: bool = False
    leaks: bool = False

    @property
    def occlusion(self):
        return "mask_token"

    def mask(self, batch, keys, memory=None):
        return from_scores(batch["order"], batch["order"].shape[1] // 2)

    def reconstruct(self, params, batch, mask):
        images = to_float(batch["image"])
        hidden = mask.hidden & (not self.leaks)
        tokens, _ = self.encode(params, images, hidden=hidden)
        patches = tokens[:, 1:] @ params["head"]
        image = unpatchify(patches, self.grid(images.shape[1:]))
        return denormalise(image, self.mean, self.std)

    def init(self, key, batch):
        patches, grid = self.patches(to_float(batch["image"]))
        hidden = jnp.zeros(patches.shape[:2], bool)
        found = self.encoder.init(key, patches, grid, hidden=hidden)
        head = jax.random.normal(key, (self.encoder.width, patches.shape[2]))
        return {"encoder": found["params"], "head": head}, {}

    def _never(self, *args):
        raise NotImplementedError

    check_shape = loss = teacher = flops = _never


def batch_of(rows: int = 5) -> dict[str, np.ndarray]:
    (batch,) = batches(rows, rows, side=SIDE)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(36), (rows, 1)), axis=1)
    return batch | {"order": order.astype(np.float32)}


def simple(**fields) -> Run:
    objective = Simple(encoder=Encoder(patch=2, width=8, depth=1, heads=2), **fields)
    params, _ = jax.jit(objective.init)(jax.random.key(0), example_fields(batch_of(1)))
    params = disturbed(params)
    return Run(objective=objective, params=params, initial=params, step=1, name="x")


def check_no_leak(run: Run) -> None:
    """Changing hidden pixels changes no bit of a reconstruction.

    Without `normalise_target`: with it, the true statistics of hidden patches scale the
    result, by design.
    """
    objective, batch = run.objective, jax.device_put(example_fields(batch_of()))
    if objective.normalise_target:
        objective = dataclasses.replace(objective, normalise_target=False)
    mask = objective.mask(batch, keys_of(batch_of(), seed=0))
    hidden = np.asarray(hidden_pixels(mask, objective.grid((SIDE, SIDE, 1))))[..., None]
    assert 0 < hidden.mean() < 1
    fill = jax.jit(
        lambda images: objective.reconstruct(
            run.params, batch | {"image": images}, mask
        )
    )
    images = batch_of()["image"]
    whole, other_hidden, other_visible = (
        np.asarray(fill(np.where(place, 255 - images, images)))
        for place in (False, hidden, ~hidden)
    )
    assert whole.shape == images.shape and np.isfinite(whole).all()
    np.testing.assert_array_equal(other_hidden, whole)
    assert (other_visible != whole)[np.broadcast_to(hidden, whole.shape)].all()


def pixel_objectives() -> list[str]:
    return [one for one in TINY if isinstance(objective_of(one), PixelObjective)]


@pytest.mark.parametrize("name", pixel_objectives())
def test_hidden_pixels_do_not_reach_a_reconstruction(name):
    check_no_leak(run_of(name))


def test_a_leak_is_seen():
    check_no_leak(simple())
    with pytest.raises(AssertionError, match="not equal"):
        check_no_leak(simple(leaks=True))


def test_reconstruction_needs_three_members_and_hands_on_every_field():
    evaluation, run = Reconstruction(rows=2, draws=2, inpainted=0), simple()
    evaluation.check_objective(run.objective)
    batch = batch_of()
    report = evaluation.measure(run, Given([batch]))
    # The hidden half is the one that the examples name.
    greatest = np.argsort(batch["order"], axis=1)[:, 18:]
    hidden = np.zeros((5, 36), bool)
    np.put_along_axis(hidden, greatest, True, axis=1)
    hidden = hidden.reshape(5, 6, 6).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(report.arrays["panel_hidden"], hidden[:2])
    # By hand, from the objective's own reconstruction.
    fields = jax.device_put(example_fields(batch))
    mask = run.objective.mask(fields, None)
    filled = np.asarray(run.objective.reconstruct(run.params, fields, mask)).clip(0, 1)
    error = (filled - batch["image"] / 255)[..., 0] ** 2
    psnr = -10 * np.log10(
        [one[place].mean() for one, place in zip(error, hidden, strict=True)]
    )
    assert report.scalars["psnr_model_db"] == pytest.approx(psnr.mean(), rel=1e-4)
    assert "psnr_patch_mean_db" not in report.numbers
