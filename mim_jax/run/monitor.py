# SPDX-License-Identifier: Apache-2.0
"""What the host watches during a training run: metrics, undecodable images, NaN."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from mim_jax import sharding
from mim_jax.data.pipeline import check_replaced
from mim_jax.plan import Plan
from mim_jax.run.log import Progress, Window, Writer


class NonFiniteError(FloatingPointError):
    """A loss or gradient was NaN or infinite; the state was not updated with it."""


class Monitor:
    """Reads the metrics of a step on the host while the device runs the next step.

    It logs means, counts images that could not be decoded, and stops the run at a value
    that is not finite.

    Args:
        plan: of the run.
        workdir: directory of the run.
        start: steps done when this process began.
        extra: what `saved` returned for the checkpoint; {} for a new run.
        newest: returns the step of the newest checkpoint, or None.
    """

    def __init__(
        self,
        plan: Plan,
        workdir: pathlib.Path,
        start: int,
        extra: dict,
        newest: Callable[[], int | None],
    ):
        self._plan, self._workdir, self._newest = plan, workdir, newest
        self._window = Window(extra.get("window"))
        first_host = jax.process_index() == 0
        self._replaced = extra.get("replaced", 0) if first_host else 0  # by this host
        self._pending: tuple | None = None
        log = plan.settings.log
        self._writer = Writer(workdir, log, start) if first_host else None
        mode = log.progress if first_host else "none"
        self._progress = Progress(mode, start, plan.stop)
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0

    def timed(self, batches: Iterable) -> Iterator:
        """The same batches; adds up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(iterator, None)
            self._waiting += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def dispatched(self, step: int, values: dict, batch: dict) -> None:
        """Note that step `step` was sent to the device; read the metrics of the step
        before."""
        self.settle()
        indices = np.array(batch["index"])  # a copy: the batch lies in shared memory
        self._pending = (step, values, indices, int(batch["replaced"].sum()))

    def settle(self) -> None:
        """Read the metrics of the last dispatched step; wait until they are there.

        Raises:
            NonFiniteError: that step's loss or gradients were not finite.
            RuntimeError: too many images could not be decoded.
        """
        if self._pending is None:
            return
        step, values, indices, replaced = self._pending
        self._pending = None
        values = {name: float(v) for name, v in jax.device_get(values).items()}
        if not values.pop("ok"):
            raise NonFiniteError(self._not_finite(step, values["loss"], indices))
        self._replaced += replaced
        self._window.add(values)
        self._steps_since += 1
        self._progress.advance(step)
        if step % self._plan.settings.log.every == 0 or step == self._plan.total:
            self._log(step)

    def saved(self) -> dict[str, Any]:
        """JSON values to save with the checkpoint, for `extra` of the next process."""
        return {
            "window": self._window.saved(),
            "replaced": sum(sharding.from_hosts(self._replaced)),
            "data": self._plan.settings.data.source.fingerprint(),
        }

    def close(self) -> None:
        """Close the files and the progress bar."""
        self._progress.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, step: int) -> None:
        settings = self._plan.settings
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        replaced = sum(sharding.from_hosts(self._replaced))
        values = self._window.take() | {
            # The learning rate of this step's update: the schedule counts from 0.
            "lr": float(self._plan.schedule(step - 1)),
            "epoch": step * settings.batch_size / self._plan.epoch_images,
            "replaced": replaced,
            "images_per_second": self._steps_since * settings.batch_size / elapsed,
            "input_wait_share": self._waiting / elapsed,
        }
        self._mark, self._steps_since, self._waiting = time.monotonic(), 0, 0.0
        if self._writer is not None:
            self._writer.write(step, values)
        self._progress.show(step, values)
        # The share is that of at least one epoch of images, so that a single bad image
        # at the start does not stop the run.
        seen = max(step * settings.batch_size, len(settings.data.source))
        check_replaced(replaced, seen, settings.data.max_replaced)

    def _not_finite(self, step: int, loss: float, indices: np.ndarray) -> str:
        path = self._workdir / f"nonfinite-step{step}-host{jax.process_index()}.json"
        path.write_text(json.dumps({"step": step, "indices": indices.tolist()}) + "\n")
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        newest = self._newest()
        good = "none yet" if newest is None else f"step {newest}"
        return (
            f"step {step}: loss {loss} or its gradient is not finite; the update was "
            f"not made. Records of the batch: {shown} (all in {path}). Last good "
            f"checkpoint: {good}. Look at those images, or lower "
            "config.optim.base_lr."
        )
