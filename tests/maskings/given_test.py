# SPDX-License-Identifier: Apache-2.0
"""Maskings that read more than keys: a field of the example, or a memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, share, tree_of

from mim_jax import config, train
from mim_jax.maskings.base import Masking
from mim_jax.ops.masking import from_scores, masks_of
from mim_jax.ops.patches import Grid
from mim_jax.plan import Plan
from mim_jax.run.checkpoint import Checkpointer

EVERY = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Masking):
    """Hides the left half of images of an even class, the right half of the others."""

    reads = ("label",)

    def visible_count(self, grid: Grid) -> int:
        return grid.size // 2

    def __call__(self, keys, grid, *, label):
        left = jnp.arange(grid.size) % grid.cols < grid.cols // 2
        hidden = left[None] == (label % 2 == 0)[:, None]
        return from_scores(hidden.astype(jnp.int32), self.visible_count(grid))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(Masking):
    """Hides patches in turns: memory counts refreshes, and holds a parameter."""

    refresh_every: int = EVERY

    def visible_count(self, grid: Grid) -> int:
        return grid.size // 4

    def first_memory(self, grid):
        return {"turn": jnp.int32(0), "seen": jnp.zeros(()), "scores": jnp.zeros(16)}

    def refresh(self, memory, objective, params, batch, keys):
        tokens, _ = objective.encode(params, batch["image"].astype(jnp.float32) / 255)
        return {
            "turn": memory["turn"] + 1,
            "seen": params["encoder"]["norm"]["scale"].sum(),
            "scores": jnp.abs(tokens[:, 1:]).mean(axis=(0, 2)),
        }

    def __call__(self, keys, grid, *, memory):
        scores = (jnp.arange(grid.size) + 4 * memory["turn"]) % grid.size
        scores = jnp.broadcast_to(scores[None], (len(keys), grid.size))
        return from_scores(scores, self.visible_count(grid))


@pytest.fixture
def known(monkeypatch):
    """Both maskings have rows in the table while a test runs."""
    table = config.KINDS[Masking][1]
    monkeypatch.setitem(table, "labelled", Labelled)
    monkeypatch.setitem(table, "remembering", Remembering)


def tree(masking: str, **changes):
    made = tree_of("mae", **changes)
    with made.objective.unlocked():
        made.objective.masking = config.choose(Masking, masking)
    made.objective.color_jitter = "none"
    return made


def test_a_masking_gets_the_field_that_it_reads(known):
    plan = Plan.of(tree("labelled"), jax.devices()[:1])
    assert plan.reads == ("image", "label")
    assert plan.abstract_batch()["label"].dtype == np.int32
    batch = {"label": jnp.asarray([0, 1, 4]), "image": jnp.zeros((3, 8, 8, 1), "uint8")}
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = plan.objective.mask(batch, keys).hidden.reshape(3, 4, 4)
    for row, left in enumerate((True, False, True)):
        assert hidden[row, :, :2].all() == left and hidden[row, :, 2:].all() != left


def test_a_field_that_the_data_lack_is_refused_before_anything_compiles(known):
    class Latent(Labelled):
        reads = ("latent",)

    table = config.KINDS[Masking][1]
    table["labelled"] = dataclasses.dataclass(frozen=True, kw_only=True)(Latent)
    with pytest.raises(
        config.ConfigError, match="no 'latent', which masking Latent of MAE reads"
    ):
        Plan.of(tree("labelled"), jax.devices()[:1])


def test_a_mask_in_the_batch_goes_before_what_the_masking_draws():
    grid, keys = Grid(4, 4, 2), jax.random.split(jax.random.key(0), 2)
    mask = Remembering()(keys, grid, memory={"turn": jnp.int32(1)})
    found = masks_of(Remembering(), {"mask": mask}, keys, grid)
    assert found is mask


def trained(made, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(made, workdir)
    plan = Plan.of(made, jax.devices()[:8])
    with Checkpointer(workdir, plan.settings.checkpoint) as checkpointer:
        found = checkpointer.restore(plan.abstract_state())
    assert found is not None
    return found[1]


def test_a_memory_is_refreshed_when_due_saved_and_resumed(known, tmp_path, monkeypatch):
    monkeypatch.setattr(train.report, "measure", lambda *_: None)
    quiet = dict(log__tensorboard=False, log__progress="none")
    share(monkeypatch, Plan.of(tree("remembering")))
    straight = trained(tree("remembering", stop_after=7, **quiet), tmp_path / "one")
    for steps in (4, 7):
        parts = trained(
            tree("remembering", stop_after=steps, **quiet), tmp_path / "two"
        )
    found, other = leaves(straight.memory), leaves(parts.memory)
    assert found["turn"] == 2  # after steps 3 and 6
    assert found["seen"] > 0 and np.ptp(found["scores"]) > 0
    for name, value in found.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    for name, value in leaves(straight.params).items():
        np.testing.assert_array_equal(value, leaves(parts.params)[name], err_msg=name)


def test_the_mask_is_that_of_the_memory_at_each_step(known):
    plan = Plan.of(tree("remembering"), jax.devices()[:1])
    step = train.lowered(plan).compile()
    state = jax.jit(plan.create)()
    batch = {"image": jnp.arange(16 * 64, dtype=jnp.uint8).reshape(16, 8, 8, 1)}
    for number in range(1, 5):
        keys = train.example_keys(state, 16)
        mask = plan.objective.mask(batch, keys, state)
        turn = int(state.memory["turn"])
        assert turn == (number - 1) // EVERY
        assert sorted(mask.keep[0].tolist()) == sorted(
            np.argsort((np.arange(16) + 4 * turn) % 16)[:4].tolist()
        )
        state, _ = step(state, batch)


def test_a_masking_that_breaks_its_promise_is_refused(known):
    class Wrong(Labelled):
        def visible_count(self, grid):
            return grid.size // 4

        def __call__(self, keys, grid, *, label):
            return Labelled()(keys, grid, label=label)._replace(
                keep=jnp.zeros((len(keys), 5), "int32")
            )

    class Deaf(Labelled):
        def __call__(self, keys, grid):
            return Labelled()(keys, grid, label=jnp.zeros(len(keys), "int32"))

    table = config.KINDS[Masking][1]
    for cls, reason in ((Wrong, "leave 5 of 16 .* says 4"), (Deaf, "'label'")):
        table["labelled"] = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        with pytest.raises(config.ConfigError, match=reason):
            Plan.of(tree("labelled"), jax.devices()[:1])


def test_a_second_masking_with_a_memory_is_refused(known):
    made = tree_of("rmae", objective__t2="independent")
    with made.objective.unlocked():
        made.objective.t2_masking = config.choose(Masking, "remembering")
    with pytest.raises(config.ConfigError, match="t2_masking=Remembering"):
        Plan.of(made, jax.devices()[:1])
