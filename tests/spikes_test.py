# SPDX-License-Identifier: Apache-2.0
"""A loss that spikes: what counts as one, and what each policy makes of a run."""

import dataclasses
import doctest
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import restored
from tiny import bits, share_first_state

from mim_jax import config, train
from mim_jax.data.pipeline import train_batches
from mim_jax.data.sources.base import Source
from mim_jax.evals.base import Eval
from mim_jax.evals.report import Report
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import Aux, Objective
from mim_jax.plan import Plan
from mim_jax.run import spikes
from mim_jax.run.checkpoint import Checkpointer
from mim_jax.run.log import read_rows
from mim_jax.run.spikes import Guard, SpikeError, Spikes

frozen = dataclasses.dataclass(frozen=True, kw_only=True)
RECORDS, ROWS, STEPS, EVERY, SEED = 80, 8, 16, 5, 36
WHITE = 7  # the record on which the loss jumps


@frozen
class Noise(Source):
    """Dark noise, and one white image."""

    split: str = "train"

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        if index == WHITE and self.split == "train":
            return {"image": np.full((4, 4, 1), 255, np.uint8), "label": 0}
        pixels = np.random.default_rng(index).integers(0, 100, (4, 4, 1), np.uint8)
        return {"image": pixels, "label": 0}

    @property
    def classes(self):
        return ()

    @property
    def channels(self):
        return 1

    def held_out(self):
        return dataclasses.replace(self, split="held_out")

    def fingerprint(self):
        return {"split": self.split}


@frozen
class Jumpy(Objective):
    """The distance of noise to a learned image; a hundred times that, or NaN, where a
    white image is in the batch."""

    encoder: Encoder = Encoder(patch=2, width=4, depth=1, heads=1)
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    nan: bool = False

    def check_shape(self, image_shape):
        pass

    def init(self, key, batch):
        return {"image": jax.random.normal(key, batch["image"].shape[1:])}, {}

    def loss(self, params, state, batch, keys):
        images = batch["image"].astype(jnp.float32) / 255
        white = (images == 1).all(axis=(1, 2, 3)).any()
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys)
        errors = jnp.square(images + 0.1 * noise - params["image"][None])
        factor = jnp.where(white, jnp.nan if self.nan else 100.0, 1.0)
        loss = errors.mean() * factor
        return loss, Aux(jnp.float32(len(keys)), stats={}, metrics={})

    def teacher(self, old, params, step):
        return None

    def flops(self, image_shape):
        return 1.0


@frozen
class Nothing(Eval):
    description = "Nothing."
    headlines = ()

    def check_objective(self, objective):
        pass

    def measure(self, run, data):
        return Report(numbers={})

    def draw(self, found):
        return {}


@pytest.fixture(autouse=True, scope="module")
def tables():
    with restored():
        config.register("noise", Noise)
        config.register("jumpy", Jumpy)
        config.register("nothing", Nothing)
        yield


def tree_of(policy: str, **changes) -> config.Tree:
    tree = config.experiment("train", source="noise", objective="jumpy", eval="nothing")
    tree.update(dict(steps=STEPS, batch_size=ROWS, seed=SEED, dtype="float32"))
    tree.data.update(dict(image_size=(4, 4), workers=0, threads=1, flip=False))
    tree.data.update(dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)))
    tree.optim.update(dict(warmup_epochs=0.0, base_lr=1.0))
    tree.spikes.update(dict(policy=policy, after=5, horizon=10.0))
    tree.checkpoint.update(dict(every=EVERY, keep=99))
    tree.log.update(dict(every=1, tensorboard=False, progress="lines"))
    tree.scan, tree.compile_cache = False, False
    for name, value in changes.items():
        group, _, leaf = name.rpartition("__")
        (tree[group] if group else tree)[leaf] = value
    return tree


@functools.cache
def program(acts: bool, nan: bool):
    """The step, compiled; runs and references have the same."""
    tree = tree_of("skip" if acts else "log", objective__nan=nan)
    return train.lowered(Plan.of(tree)).compile()


@functools.cache
def logging_plan() -> Plan:
    return Plan.of(tree_of("log"))


@pytest.fixture(autouse=True, scope="module")
def quick(tables):
    """Runs compile nothing that another run has compiled, and draw no report."""
    lowered, measure = train.lowered, train.report.measure
    with pytest.MonkeyPatch.context() as patch:
        program(True, False), program(True, True), program(False, False)

        def known(plan):
            acts, nan = plan.settings.spikes.acts, plan.settings.objective.nan
            return types.SimpleNamespace(compile=lambda: program(acts, nan))

        patch.setattr(train, "lowered", known)
        patch.setattr(train.report, "measure", lambda *_: None)
        share_first_state(patch, logging_plan())
        yield lowered, measure


def run(workdir, policy: str, **changes) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.run(tree_of(policy, **changes), workdir)


def found(workdir, step: int = STEPS) -> tuple[dict[str, bytes], dict]:
    plan = Plan.of(tree_of("skip"))
    with Checkpointer(workdir, plan.settings.checkpoint) as checkpointer:
        at, state, extra = checkpointer.restore(plan.abstract_state())
    assert at == step
    return bits(state), extra


@functools.cache
def trained(*parts: range, stop: int = STEPS) -> dict[str, bytes]:
    """The state after steps on these batches, in this order, each step made."""
    plan = Plan.of(tree_of("log"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = program(False, False)
        state = plan.first_state()
    for part in parts:
        data = plan.settings.data
        ends = dict(start=part.start, stop=part.stop)
        with train_batches(data, seed=SEED, batch_size=ROWS, **ends) as batches:
            for batch in batches:
                images = {"image": np.array(batch["image"])}
                state, values = step(
                    state, train.sharding.to_devices(images, plan.mesh)
                )
                assert values["ok"]
    assert int(state.step) == stop
    return bits(state)


# With this seed the white image is in batches 8 and 13, counted from 0, then in 26.
SKIPPED = (range(0, 8), range(9, 13), range(14, 18))
ROLLED_BACK = (range(0, 5), range(14, 25))


def test_the_batches_that_jump_are_known():
    data = config.build(tree_of("log")).data
    with train_batches(data, seed=SEED, batch_size=ROWS, stop=27) as batches:
        jumps = [n for n, batch in enumerate(batches) if WHITE in batch["index"]]
    assert jumps == [8, 13, 26]


# The bound.


def test_the_example_runs():
    assert doctest.testmod(spikes).attempted


def by_hand(losses, horizon: float) -> tuple[float, float]:
    """Mean and deviation of losses, weighted by a geometric series."""
    weights = (1 - 1 / horizon) ** np.arange(len(losses))[::-1]
    mean = np.average(losses, weights=weights)
    return mean, np.sqrt(np.average((losses - mean) ** 2, weights=weights))


@pytest.mark.parametrize("horizon, deviations", [(2.0, 3.0), (50.0, 6.0)])
def test_the_bound_is_mean_and_deviations_of_the_losses_up_to_the_last_but_one(
    horizon, deviations
):
    losses = np.random.default_rng(0).gamma(2.0, size=60)
    guard = Guard(Spikes(horizon=horizon, deviations=deviations, after=4), None)
    for number, loss in enumerate(losses, 1):
        known = losses[: max(0, number - 2)]
        bound = guard.bound(number)
        if len(known) < 4:
            assert bound == math.inf
        else:
            mean, deviation = by_hand(known, horizon)
            assert bound == pytest.approx(mean + deviations * deviation, rel=1e-9)
        guard.note(number, float(loss))


def test_losses_that_hardly_differ_do_not_spike_by_rounding():
    guard = Guard(Spikes(after=2), None)
    for number in range(1, 10):
        guard.note(number, 2.0)
    assert guard.bound(10) == pytest.approx(2.0 * 1.006)


def test_the_bound_does_not_depend_on_when_losses_are_read_or_saved():
    losses = np.random.default_rng(1).gamma(2.0, size=30).tolist()
    prompt, late = Guard(Spikes(after=2), None), Guard(Spikes(after=2), None)
    waiting = []
    for number, loss in enumerate(losses, 1):
        # As in a plain step: the loss of the batch before last is known, no more.
        for one in waiting[:-1]:
            late.note(*one)
        waiting = waiting[-1:]
        assert late.bound(number) == prompt.bound(number)
        prompt.note(number, loss)  # as where the run saves at every step
        prompt = Guard(Spikes(after=2), json.loads(json.dumps(prompt.saved())))
        waiting.append((number, loss))


# The step.


@pytest.mark.parametrize("policy", ["log", "halt", "skip", "rollback"])
def test_only_a_policy_that_acts_gives_the_step_a_bound(policy):
    bound = Plan.of(tree_of(policy)).abstract_bound()
    assert len(bound) == (policy != "log")


def test_a_loss_at_the_bound_changes_no_bit_of_the_state():
    plan = Plan.of(tree_of("skip"))
    batch = {"image": np.zeros((ROWS, 4, 4, 1), np.uint8)}

    def after(bound: float):
        state = plan.first_state()
        rows = train.sharding.to_devices(batch, plan.mesh)
        limit = train.sharding.everywhere(np.asarray(bound, np.float32), plan.mesh)
        state, values = program(True, False)(state, rows, limit)
        return bits(state), float(values["loss"]), bool(values["ok"])

    made, loss, ok = after(math.inf)
    assert ok and made == after(float(np.nextafter(np.float32(loss), np.float32(9))))[0]
    left, again, ok = after(loss)
    assert not ok and again == loss and left != made
    assert left == after(-math.inf)[0]


# Runs.


def rows(workdir) -> list[dict]:
    return [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]


def test_log_says_so_and_makes_every_update(tmp_path, capfd):
    run(tmp_path / "run", "log")
    state, extra = found(tmp_path / "run")
    assert state == trained(range(STEPS)) and extra["skipped"] == 0
    told = [one for one in capfd.readouterr().err.splitlines() if "spikes" in one]
    assert [one.split(":")[1] for one in told] == [" step 9", " step 14"]
    assert "skipped" not in rows(tmp_path / "run")[0]


def test_halt_makes_no_update_and_ends_the_run(tmp_path):
    with pytest.raises(SpikeError) as caught:
        run(tmp_path / "run", "halt")
    said = str(caught.value)
    assert said.startswith("step 9: the loss spikes: ") and str(WHITE) in said
    assert "Last good checkpoint: step 5." in said
    assert isinstance(caught.value, FloatingPointError)  # exit code 3
    about = json.loads((tmp_path / "run" / "spike-step9-host0.json").read_text())
    assert WHITE in about["indices"] and about["step"] == 9
    # With another policy the same directory goes on.
    run(tmp_path / "run", "skip", on_change="accept")
    assert found(tmp_path / "run")[0] == trained(*SKIPPED)


@pytest.mark.parametrize("nan", [False, True])
def test_skip_goes_on_with_the_next_batch(tmp_path, nan):
    run(tmp_path / "run", "skip", objective__nan=nan)
    state, extra = found(tmp_path / "run")
    assert state == trained(*SKIPPED)
    assert extra["skipped"] == 2
    written = rows(tmp_path / "run")
    assert [row["step"] for row in written] == [*range(1, STEPS + 1)]
    assert [row["skipped"] for row in written] == [0] * 8 + [1] * 4 + [2] * 4
    assert written[-1]["epoch"] == pytest.approx(18 * ROWS / RECORDS)


# A run that ends just before, just after and far from a spike.
@pytest.mark.parametrize("stops", [(8, 9), (3, 13)])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path, policy, stops):
    for stop in stops:
        run(tmp_path / "run", policy, stop_after=stop)
    run(tmp_path / "run", policy)
    straight = SKIPPED if policy == "skip" else ROLLED_BACK
    assert found(tmp_path / "run")[0] == trained(*straight)
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(1, STEPS + 1)]


def test_rollback_skips_all_batches_since_the_checkpoint(tmp_path, capfd):
    run(tmp_path / "run", "rollback")
    state, extra = found(tmp_path / "run")
    assert state == trained(*ROLLED_BACK)
    assert extra["skipped"] == 9
    # What was logged after the checkpoint was logged anew.
    assert [row["step"] for row in rows(tmp_path / "run")] == [*range(1, STEPS + 1)]
    assert capfd.readouterr().out.count("going back") == 2


def test_rollback_before_the_first_checkpoint_begins_anew(tmp_path):
    # Then too few losses are known for batch 13 to spike.
    run(tmp_path / "run", "rollback", checkpoint__every=99, steps=12)
    assert found(tmp_path / "run", 12)[0] == trained(range(9, 21), stop=12)


def test_a_second_return_to_one_checkpoint_may_be_too_many(tmp_path):
    run(tmp_path / "other", "skip", spikes__most=1)  # the two do not come in a row
    with pytest.raises(SpikeError, match="step 10: the loss spikes: "):
        run(tmp_path / "run", "rollback", spikes__most=1)
