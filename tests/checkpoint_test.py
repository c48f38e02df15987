# SPDX-License-Identifier: Apache-2.0
"""What is restored is what was saved, bit for bit, or the checkpoint before it."""

import contextlib
import dataclasses
import gc
import itertools
import pathlib
import re
import resource
import shutil
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mim_jax import sharding, state
from mim_jax.run import storage
from mim_jax.run.checkpoint import (
    Checkpointer,
    CheckpointError,
    Checkpoints,
    MismatchError,
)
from mim_jax.run.interrupt import Interrupted
from mim_jax.run.parts import read_parts
from mim_jax.state import TrainState, stack_blocks, unstack_blocks

# Orbax drops coroutines of reads and writes that fail; who collects them is chance.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

EXTRA = {"window": {"sums": {"loss": 0.1 + 0.2}, "steps": 1}, "data": {"records": 12}}


def make(seed: int, width: int = 16) -> TrainState:
    """A state with every kind of leaf, two blocks, and numbers drawn from a seed."""
    rng = np.random.default_rng(seed)

    def floats(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def block():
        return {"mlp": {"fc1": {"kernel": floats(8, width), "bias": floats(width)}}}

    params = {
        "encoder": {"block00": block(), "block01": block(), "norm": floats(8)},
        "decoder": {"token": floats(1, 1, 8).astype(jnp.bfloat16)},
    }
    moments = optax.scale_by_adam().init(params)
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed, leaf.dtype), moments)
    return TrainState(
        step=jnp.int32(seed),
        params=params,
        teacher=jax.tree.map(lambda leaf: leaf * 2, params["encoder"]),
        stats={"seen": jnp.asarray([True, False])},
        opt_state=(moments, optax.EmptyState()),
        key=state.run_key(seed),
    )


def placed(value: TrainState, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    mesh = sharding.Mesh(fsdp=2).build() if mesh is None else mesh
    return jax.device_put(value, sharding.by_path(value, mesh))


def like(value: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value
    )


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture
def fill(tmp_path):
    """Saves `make(step)` for each step and waits for the disk."""

    def fill(*steps: int, width: int = 16, **settings) -> pathlib.Path:
        with Checkpointer(tmp_path, Checkpoints(**settings)) as checkpointer:
            for step in steps:
                checkpointer.save(step, placed(make(step, width)), EXTRA)
        return tmp_path / "checkpoints"

    return fill


def restore(workdir, target: TrainState | None = None):
    target = like(placed(make(0))) if target is None else target
    with Checkpointer(workdir, Checkpoints()) as checkpointer:
        return checkpointer.restore(target)


def flip(path: pathlib.Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << offset % 8
    path.write_bytes(data)


@contextlib.contextmanager
def full_disk(limit: int = 2048):
    """No file of this process can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_leaf_comes_back_bit_for_bit(fill, tmp_path):
    fill(7)
    step, found, extra = restore(tmp_path)
    assert (step, extra) == (7, EXTRA)
    assert_same_bits(found, placed(make(7)))
    wanted = jax.tree.map(lambda leaf: leaf.sharding, placed(make(7)))
    assert wanted == jax.tree.map(lambda leaf: leaf.sharding, found)


def test_no_checkpoint_is_no_error(tmp_path):
    assert restore(tmp_path) is None


@pytest.mark.parametrize("before", ["stacked", "single"])
@pytest.mark.parametrize("after", ["stacked", "single"])
def test_names_on_disk_do_not_depend_on_scan(tmp_path, before, after):
    layouts = {
        "single": placed(make(3)),
        "stacked": placed(jax.jit(stack_blocks)(make(3))),
    }
    assert "blocks" in layouts["stacked"].params["encoder"]
    with Checkpointer(tmp_path, Checkpoints()) as checkpointer:
        checkpointer.save(3, layouts[before], EXTRA)
    found = restore(tmp_path, like(layouts[after]))[1]
    assert jax.tree.structure(found) == jax.tree.structure(layouts[after])
    assert_same_bits(unstack_blocks(found), placed(make(3)))
    names = storage.read_record(tmp_path / "checkpoints", 3)["leaves"]
    assert "params/encoder/block01/mlp/fc1/kernel" in names
    assert not any("/blocks/" in name for name in names)


@pytest.mark.parametrize("devices, fsdp", [(8, 1), (8, 4), (2, 2), (1, 1)])
def test_restores_directly_into_other_shardings(fill, tmp_path, devices, fsdp):
    fill(3)
    mesh = sharding.Mesh(fsdp=fsdp).build(jax.devices()[:devices])
    target = like(placed(make(0), mesh))
    _, found, _ = restore(tmp_path, target)
    assert_same_bits(found, make(3))
    kernel = found.params["encoder"]["block00"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.mesh == mesh
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16 // fsdp)


def test_keeps_the_newest_and_every_kth(fill):
    folder = fill(0, 2, 4, 6, 8, 10, 12, keep=2, keep_every=4)
    assert sorted(int(path.name) for path in folder.iterdir()) == [4, 8, 10, 12]


@pytest.mark.parametrize("name", ["3000000000", "9" * 200, "007", "٣"])
def test_a_folder_that_no_step_is_called_is_left_alone(fill, tmp_path, name):
    fill(4)
    shutil.copytree(tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / name)
    found = restore(tmp_path)
    assert found is not None and found[0] == 4
    assert (tmp_path / "checkpoints" / name).is_dir()


def test_saving_a_step_again_is_no_error(fill, tmp_path):
    fill(0)
    fill(0)
    assert restore(tmp_path)[0] == 0


def test_flipped_bits_name_the_leaf_and_fall_back(fill, tmp_path, capfd):
    width = 4096  # small leaves lie in index nodes, which Orbax checks itself
    folder = fill(2, 4, width=width)
    pristine = tmp_path / "pristine"
    shutil.copytree(folder / "4", pristine)
    target = like(placed(make(0, width)))
    # Orbax lays leaves in one or several files, in any order; small ones are indices.
    files = [x for x in pristine.rglob("d/*") if x.stat().st_size > 4 * width]
    named = 0  # a flip in an index node is told by Orbax, which names no leaf
    places = itertools.product((0.2, 0.4, 0.6, 0.8, 0.3, 0.7, 0.5), files)
    for number, (part, data) in enumerate(places):
        if named and number >= 4:
            break
        shutil.rmtree(folder / "4", ignore_errors=True)
        shutil.copytree(pristine, folder / "4")
        flip(folder / "4" / data.relative_to(pristine), int(part * data.stat().st_size))
        step, found, _ = restore(tmp_path, target)
        assert step == 2
        assert_same_bits(found, placed(make(2, width)))
        assert (tmp_path / "damaged-checkpoints" / "4").is_dir()
        assert not (folder / "4").exists()
        error = capfd.readouterr().err
        assert "WARNING: the checkpoint of step 4 is damaged: " in error
        named += bool(re.search(r"block0\d/mlp/fc1/kernel: not the bytes that", error))
        assert "going back to step 2" in error
    assert named


@pytest.mark.parametrize(
    "fault",
    [
        "missing",
        "flipped",
        pytest.param("empty", marks=pytest.mark.slow),
        pytest.param("half", marks=pytest.mark.slow),
    ],
)
def test_no_damaged_file_can_change_what_comes_back(fill, tmp_path, capfd, fault):
    folder = fill(2, 4)
    pristine = tmp_path / "pristine"
    shutil.copytree(folder / "4", pristine)
    fell_back = set()
    for path in sorted(path for path in pristine.rglob("*") if path.is_file()):
        name = path.relative_to(pristine)
        shutil.rmtree(folder / "4", ignore_errors=True)
        shutil.copytree(pristine, folder / "4")
        victim = folder / "4" / name
        size = victim.stat().st_size
        if fault == "missing":
            victim.unlink()
        elif fault == "flipped":
            flip(victim, size // 2)
        else:
            victim.write_bytes(victim.read_bytes()[: size // 2 * (fault == "half")])
        step, found, extra = restore(tmp_path)
        assert_same_bits(found, placed(make(step)))
        assert extra == EXTRA
        if step == 2:
            fell_back.add(str(name))
    assert {"about/metadata", "state/manifest.ocdbt"} <= fell_back
    assert "Traceback" not in capfd.readouterr().err


def test_a_leaf_that_orbax_does_not_find_is_damage(fill, tmp_path, capfd):
    folder = fill(2, 4)
    listing = folder / "4" / "state" / "_METADATA"
    text = listing.read_text()
    assert text.count("'seen'") == 1
    listing.write_text(text.replace("'seen'", "'sein'").replace('"seen"', '"sein"'))
    assert restore(tmp_path)[0] == 2
    assert "stats/seen: not the bytes that were saved" in capfd.readouterr().err


def test_the_checkpoint_of_another_step_is_damage(fill, tmp_path):
    folder = fill(2, 4)
    (folder / "2").rename(folder / "6")
    assert restore(tmp_path)[0] == 4


def test_all_damaged_stops_and_says_why_for_each(fill, tmp_path):
    folder = fill(2, 4)
    (folder / "2" / "about" / "metadata").write_text("")
    shutil.rmtree(folder / "4" / "state")
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path)
    assert "step 2: JSONDecodeError" in str(error.value)
    assert "step 4: " in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_another_model_is_not_damage(fill, tmp_path):
    folder = fill(2, 4)
    with pytest.raises(MismatchError) as error:
        restore(tmp_path, like(placed(make(0, width=24))))
    line = "mu/encoder/block00/mlp/fc1/kernel: float32[8, 16] -> float32[8, 24]"
    assert line in str(error.value)
    fewer = make(0)
    fewer = dataclasses.replace(fewer, teacher=None)
    with pytest.raises(MismatchError, match=r"teacher/.*: .* -> absent"):
        restore(tmp_path, like(placed(fewer)))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_too_little_memory_is_not_damage(fill, tmp_path, monkeypatch):
    folder = fill(2, 4)

    def exhausted(*_, **__):
        raise MemoryError("64 GiB")

    monkeypatch.setattr(storage.ocp.Checkpointer, "restore", exhausted)
    with pytest.raises(MemoryError):
        restore(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_retention_keeps_the_whole_one_while_the_newest_is_damaged(fill, tmp_path):
    folder = fill(2, 4, keep=2)
    (folder / "4" / "about" / "metadata").write_text("{}")
    with Checkpointer(tmp_path, Checkpoints(keep=2)) as checkpointer:
        assert checkpointer.restore(like(placed(make(0))))[0] == 2
        checkpointer.save(4, placed(make(4)), EXTRA)
        assert checkpointer.newest() == 4
        assert checkpointer.steps() == [2, 4]
    assert_same_bits(restore(tmp_path)[1], placed(make(4)))


def test_what_a_killed_process_left_is_ignored_and_cleaned(fill, tmp_path):
    folder = fill(2)
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    shutil.copytree(folder / "2", folder / "1.deleting")
    (folder / "3 of mine").mkdir()
    assert restore(tmp_path)[0] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3 of mine"]


@pytest.mark.parametrize("kept", [False, True])
def test_remains_of_a_failed_save_that_appear_late_are_removed(tmp_path, kept):
    folder = tmp_path / "run" / "checkpoints"
    if kept:
        folder.mkdir(parents=True)
        (folder.parent / "mine.txt").touch()

    def write():  # as TensorStore does: makes what a path lacks
        (folder / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)

    late = [threading.Timer(seconds, write) for seconds in (0.07, 0.3)]
    for timer in late:
        timer.start()
    storage.remove_remains(folder)
    for timer in late:
        timer.join()
    left = ["run", "run/mine.txt"] if kept else []
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == left


def test_a_failed_save_is_told_soon_and_the_next_one_works(fill, tmp_path, capfd):
    folder = fill(2)
    with Checkpointer(tmp_path, Checkpoints(keep=1)) as checkpointer:
        with full_disk():
            checkpointer.save(4, placed(make(4)), EXTRA)
            if checkpointer._saving:
                checkpointer._saving[1].exception(timeout=30)  # what a step's time is
        checkpointer.poll()
        error = capfd.readouterr().err
        assert "WARNING: the checkpoint of step 4 could not be saved" in error
        assert "Newest one on the disk: step 2" in error
        assert checkpointer.steps() == [2]
        assert checkpointer.restore(like(placed(make(0))))[0] == 2
        checkpointer.save(6, placed(make(6)), EXTRA)
    assert sorted(path.name for path in folder.glob("[0-9]")) == ["6"]
    assert_same_bits(restore(tmp_path)[1], placed(make(6)))


def test_what_a_failed_save_gave_up_is_not_told(monkeypatch):
    """Python warns of each coroutine that nobody awaited. A save has hundreds."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    async def write():
        pass

    writer = storage.Writer()
    given_up = [write()]
    given_up.append(given_up)  # only the garbage collector finds it
    del given_up
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        writer.close(stay_silent=True)
        gc.collect()
    assert warned == []
    late = write()  # a thread of TensorStore still held it
    del late  # warnings are errors here, so Python hands it to the hook
    assert told == []


def fail_at(tmp_path, steps, error=None, **settings):
    with Checkpointer(tmp_path, Checkpoints(**settings)) as checkpointer:
        for step in steps:
            with full_disk():
                checkpointer.save(step, placed(make(step)), EXTRA)
                if checkpointer._saving:
                    checkpointer._saving[1].exception(timeout=30)
        if error is not None:
            raise error


def test_a_failed_last_save_is_an_error_at_the_end(fill, tmp_path):
    folder = fill(2)
    with pytest.raises(CheckpointError, match="step 4 could not be saved"):
        fail_at(tmp_path, [4], keep=1)
    with pytest.raises(CheckpointError, match="step 4 could not be saved"):
        fail_at(tmp_path, [4], Interrupted(), keep=1)  # must not say "saved"
    with pytest.raises(FloatingPointError):
        fail_at(tmp_path, [4], FloatingPointError("first"), keep=1)
    assert restore(tmp_path)[0] == 2
    # What the failed save left is swept away by the next start, once nothing writes it.
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["2"]


def test_three_failures_in_a_row_stop_the_run(fill, tmp_path):
    fill(2)
    with pytest.raises(CheckpointError, match="3 times in a row"):
        fail_at(tmp_path, [4, 6, 8, 10])


def test_no_bad_state_is_saved(fill, tmp_path):
    fill(2)
    bad = make(4)
    bad.params["encoder"]["norm"] = jnp.full((8,), jnp.nan, jnp.float32)
    with Checkpointer(tmp_path, Checkpoints()) as checkpointer:
        with pytest.raises(FloatingPointError, match="step 4: params/encoder/norm"):
            checkpointer.save(4, placed(bad), EXTRA)
    assert restore(tmp_path)[0] == 2


def test_read_parts_reads_what_is_asked_for(fill, tmp_path):
    fill(2, 4)
    step, found = read_parts(tmp_path)
    assert step == 4 and found.keys() == {"params"}
    assert_same_bits(found["params"], make(4).params)
    _, found = read_parts(tmp_path, 2, ("params", "teacher", "stats"))
    assert_same_bits(found["teacher"], make(2).teacher)
    assert_same_bits(found["stats"], make(2).stats)
    assert read_parts(tmp_path, 2)[0] == 2
    assert read_parts(tmp_path, 2, ("memory",)) == (2, {"memory": {}})
    with pytest.raises(FileNotFoundError, match="steps there: 2, 4"):
        read_parts(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="none"):
        read_parts(tmp_path / "nowhere")


def test_read_parts_says_damaged(fill, tmp_path):
    folder = fill(2, 4)
    (folder / "4" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint 4 .* is damaged"):
        read_parts(tmp_path)
    assert read_parts(tmp_path, 2)[0] == 2


def test_read_parts_sees_a_flipped_bit(fill, tmp_path):
    folder = fill(2, width=4096)
    whole = make(2, 4096).params
    told = []
    # Orbax lays leaves in files as it likes, and some of them are not read here; small
    # files are indices, which it checks itself.
    for data in [x for x in folder.rglob("d/*") if x.stat().st_size > 4 * 4096]:
        for tenth in range(1, 10):
            offset = data.stat().st_size * tenth // 10
            flip(data, offset)
            try:
                assert_same_bits(read_parts(tmp_path)[1]["params"], whole)
            except CheckpointError as error:
                told.append(str(error))
            flip(data, offset)
    assert any("not the bytes that were saved" in text for text in told)
