# SPDX-License-Identifier: Apache-2.0
"""What the host watches during a training run: metrics, unreadable images, NaN."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from mim_jax import sharding
from mim_jax.data.pipeline import identity
from mim_jax.plan import Plan
from mim_jax.run import files
from mim_jax.run.hosts import deadline
from mim_jax.run.log import Progress, Window, Writer
from mim_jax.run.replaced import Replaced
from mim_jax.run.spikes import Guard, RollBack, SpikeError
from mim_jax.schema import to_json


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the state was not updated with it."""


class Monitor:
    """Reads the metrics of a step on the host while the device runs the next step.

    It logs means, counts images that could not be read, and stops the run at a value
    that is not finite or, if the config says so, at a loss that spikes.

    Args:
        plan: of the run.
        workdir: directory of the run.
        start: steps done when this process began.
        extra: what `saved` returned for the checkpoint; {} for a new run.
        newest: returns the step of the newest checkpoint, or None.

    Attributes:
        failed: why no more batches can be read, or None.
    """

    def __init__(
        self,
        plan: Plan,
        workdir: files.Place,
        start: int,
        extra: dict,
        newest: Callable[[], int | None],
    ):
        self._plan, self._workdir, self._newest = plan, workdir, newest
        self._window = Window(extra.get("window"))
        first_host = jax.process_index() == 0
        settings = plan.settings
        self.failed: Exception | None = None
        self._replaced = Replaced(workdir, settings.data, extra)
        self._guard = Guard(settings.spikes, extra.get("spikes"))
        self._step, self._skipped = start, extra.get("skipped", 0)
        self._in_a_row = extra.get("in_a_row", 0)  # batches skipped
        self._returned: list[int] = extra.get("returned", [-1, 0])
        self._pending: tuple | None = None
        logged = start - self._window.steps  # the last step that has a row
        log = settings.log
        self._writer = Writer(workdir, log, start, logged) if first_host else None
        mode = log.progress if first_host else "none"
        self._progress = Progress(mode, start, plan.stop)
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0

    @property
    def read(self) -> int:
        """Number of batches read: the steps done and the batches skipped."""
        return self._step + self._skipped

    def timed(self, batches: Iterable) -> Iterator:
        """The same batches, until one cannot be read or too many records were replaced;
        `failed` says why. Adds up the time spent waiting for them.

        Of several hosts, one that cannot read leaves the others alone: it raises.
        """
        iterator = iter(batches)
        while self.failed is None:
            before = time.monotonic()
            try:
                with deadline("a batch of its own data"):
                    batch = next(iterator, None)
            except Exception as error:
                if jax.process_count() > 1:
                    raise
                self.failed = error
                return
            self._waiting += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def bound(self, number: int) -> tuple[jax.Array, ...]:
        """What the step takes for batch `number` besides state and batch: nothing, or
        the loss above which it makes no update."""
        if not self._plan.settings.spikes.acts:
            return ()
        bound = np.asarray(self._guard.bound(number), np.float32)
        return (sharding.everywhere(bound, self._plan.mesh),)

    def dispatched(self, number: int, values: dict, batch: dict) -> int:
        """Note that batch `number`, counted from 1, was sent to the device; read the
        metrics of the batch before.

        Returns:
            The steps that will be done, if the update of this batch is made.
        """
        before, indices = self._pending, np.array(batch["index"])  # from shared memory
        self._pending = number, values, indices, np.array(batch["replaced"])
        self._settle(before)
        return self._step + 1

    def settle(self) -> int:
        """Read the metrics of the last dispatched batch; wait until they are there.

        Returns:
            The steps done.
        Raises:
            NonFiniteError: that batch's loss or gradients were not finite.
            SpikeError, RollBack: its loss spiked; see `Spikes`.
        """
        pending, self._pending = self._pending, None
        self._settle(pending)
        return self._step

    def _settle(self, pending: tuple | None) -> None:
        if pending is None:
            return
        number, values, indices, replaced = pending
        with deadline(f"all hosts to compute step {self._step + 1}"):
            values = {name: float(v) for name, v in jax.device_get(values).items()}
        self._replaced.note(indices, replaced)
        if not values.pop("ok"):
            self._not_made(number, values, indices)
            return
        self._in_a_row = 0
        self._step += 1
        loss = values["loss"]
        if not self._plan.settings.spikes.acts:
            loss = min(loss, self._told_bound(number, loss))
        self._guard.note(number, loss)
        self._window.add(values)
        self._steps_since += 1
        self._progress.advance(self._step)
        if self._step % self._plan.settings.log.every == 0 or (
            self._step == self._plan.total
        ):
            self._log(self._step)

    def saved(self) -> dict[str, Any]:
        """JSON values to save with the checkpoint, for `extra` of the next process.

        The rows up to here are on the disk or in the bucket first: a process that goes
        on from the checkpoint does not write them again.

        Raises:
            MetricsError: they cannot be written.
        """
        if self._writer is not None:
            self._writer.sync()
        return {
            "window": self._window.saved(),
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "returned": self._returned,
            "spikes": self._guard.saved(),
            "data": identity(self._plan.settings.data.source),
            "config": json.loads(self._plan.config),
            **self._replaced.saved(),
        }

    def evaluated(
        self,
        step: int,
        values: dict[str, Any],
        pictures: dict[str, files.Place],
        seconds: float,
    ) -> None:
        """Log, in a row of its own, what was measured on the state after step `step`.

        Args:
            values: numbers by name; none is called "loss".
            pictures: PNG files by name.
            seconds: what the measuring took; the speed of training leaves it out.
        """
        self._mark += seconds
        if self._writer is not None:
            self._writer.write(step, values, pictures)

    def say(self, line: str) -> None:
        """Show a line of text on the first host."""
        self._progress.say(line)

    def close(self) -> None:
        """Close the files and the progress bar."""
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, step: int) -> None:
        settings = self._plan.settings
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        replaced, seen = self._replaced.total(), self.read * settings.batch_size
        values = self._window.take() | {
            # The learning rate of this step's update: the schedule counts from 0.
            "lr": float(self._plan.schedule(step - 1)),
            "epoch": seen / self._plan.epoch_images,
            "replaced": replaced,
            "images_per_second": self._steps_since * settings.batch_size / elapsed,
            "input_wait_share": self._waiting / elapsed,
        }
        if settings.spikes.acts:
            values["skipped"] = self._skipped
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0
        if self._writer is not None:
            self._writer.write(step, values)
        self._progress.show(step, values)
        self.failed = self.failed or self._replaced.check(replaced, seen)

    def _told_bound(self, number: int, loss: float) -> float:
        """The bound of the step that was just made; says so if its loss spiked."""
        bound = self._guard.bound(number)
        if loss > bound and jax.process_index() == 0:
            print(
                f"WARNING: step {self._step}: the loss spikes: {loss:.6g}, above "
                f"{bound:.6g}; config.spikes.policy='log' goes on",
                file=sys.stderr,
                flush=True,
            )
        return bound

    def _not_made(
        self, number: int, values: dict[str, float], indices: np.ndarray
    ) -> None:
        """Do what the config says about a batch whose update was not made."""
        loss, spikes = values["loss"], self._plan.settings.spikes
        finite = math.isfinite(loss) and math.isfinite(values["grad_norm"])
        if spikes.policy == "skip" and self._in_a_row < spikes.most:
            self._in_a_row += 1
            self._skipped += 1
            self.say(
                f"step {self._step + 1}: loss {loss:.6g}: batch {number} is skipped"
            )
            return
        every = self._plan.settings.checkpoint.every
        to, (last, times) = self._step // every * every, self._returned
        if spikes.policy == "rollback" and (to != last or times < spikes.most):
            self.say(f"step {self._step + 1}: loss {loss:.6g}: going back to step {to}")
            raise RollBack(number, self._returned)
        step = self._step + 1
        word = "spike" if finite else "nonfinite"
        path = self._workdir / f"{word}-step{step}-host{jax.process_index()}.json"
        content = {"step": step, "indices": indices.tolist()}
        files.write(path, to_json(content) + "\n")
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        newest = self._newest()
        good = "none yet" if newest is None else f"step {newest}"
        about = (
            f"the update was not made. Records of the batch: {shown} (all in {path}). "
            f"Last good checkpoint: {good}. Look at those images, or lower "
            "config.optim.base_lr"
        )
        if finite:
            raise SpikeError(
                f"step {step}: the loss spikes: {loss:.6g}; {about}, or try "
                "--config.spikes.policy=rollback --config.on_change=accept"
            )
        raise NonFiniteError(
            f"step {step}: loss {loss} or its gradient is not finite; {about}."
        )
