# SPDX-License-Identifier: Apache-2.0
"""Spikes of the loss: what counts as one, and what a run does about it.

The device compares the loss of a batch with a bound that the host gives with the batch,
so that nobody waits: an update that is not to be made never reaches the parameters. The
bound is a function of the losses of the batches before the previous one, which the host
has read by then, whenever else it reads and saves.
"""

import collections
import dataclasses
import math
from typing import Any, Literal

from mim_jax.schema import check_ranges, within

_FLOOR = 1e-3  # the least deviation, as a share of the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spikes:
    """What to do when a loss is finite, but far above those before it.

    Batch n spikes if its loss is greater than mean + `deviations` x deviation of the
    losses of batches up to n - 2. Both are exponential running ones: with each batch
    the weight of an earlier loss falls by the factor 1 - 1 / `horizon`. The deviation
    counts as a thousandth of the mean if it is less. A loss that spiked does not count;
    with "log" it counts as the bound that it crossed, so that a level that stays is no
    spike for long. The first `after` batches never spike.

    With "skip" and "rollback" a loss or gradient that is not finite counts as a spike.
    Otherwise it ends the run, whatever is set here.

    Attributes:
        policy: "log" says so in a line and goes on. "halt" does not make the update and
            ends the run. "skip" does not make the update and goes on with the next
            batch. "rollback" goes back to the newest checkpoint whose step is a
            multiple of `checkpoint.every`, and skips all batches from there to the
            spike, this one included. A skipped batch is read in addition: the run makes
            as many updates as without.
        most: "skip": batches skipped in a row; "rollback": returns to one checkpoint.
            When there would be one more the run ends, as with "halt".
        deviations: how far above the mean a loss has to be, in deviations.
        horizon: number of batches that the running mean remembers.
        after: number of batches whose losses are known before any can spike.
    """

    policy: Literal["log", "halt", "skip", "rollback"] = "log"
    most: int = within(10, least=1, most=10**6)
    deviations: float = within(6.0, above=0, most=1e6)
    horizon: float = within(100.0, least=2, most=1e9)
    after: int = within(100, least=2, most=10**9)

    def __post_init__(self):
        check_ranges(self)

    @property
    def acts(self) -> bool:
        """Whether the device has to know the bound."""
        return self.policy != "log"


class SpikeError(FloatingPointError):
    """The loss spiked, and the run ends; the update was not made."""


class RollBack(Exception):
    """The run should go back to its newest regular checkpoint.

    Args:
        number: the batch that spiked, counted from 1 over the whole run.
        returned: the checkpoint to which the run went back last, and how often.
    """

    def __init__(self, number: int, returned: list[int]):
        super().__init__(number)
        self._number, self._returned = number, returned

    def skipping(self, step: int, extra: dict[str, Any]) -> dict[str, Any]:
        """What the checkpoint of `step` was saved with, changed so that the next batch
        is the one after that which spiked."""
        before, times = self._returned
        returned = [step, times + 1 if before == step else 1]
        return extra | {"skipped": self._number - step, "returned": returned}


class Guard:
    """The bound of each batch, from the losses of those before it.

    Args:
        settings: what counts as a spike.
        saved: what `saved` returned for the checkpoint; None for a new run.

    Example:
        >>> guard = Guard(Spikes(after=2, deviations=3.0), None)
        >>> for number, loss in enumerate([1.0, 1.2, 1.1, 9.0], 1):
        ...     bound = guard.bound(number)
        ...     print(loss > bound)
        ...     guard.note(number, loss)
        False
        False
        False
        True
    """

    def __init__(self, settings: Spikes, saved: dict[str, Any] | None):
        self._settings, saved = settings, saved or {}
        # Of the losses that count: how many, their weight, mean and variance.
        self._stats: list[Any] = saved.get("stats", [0, 0.0, 0.0, 0.0])
        self._waiting = collections.deque(saved.get("waiting", []))

    def bound(self, number: int) -> float:
        """The loss above which batch `number` spikes; infinite if it cannot. Ask in
        the order of the batches."""
        while self._waiting and self._waiting[0][0] <= number - 2:
            self._count(self._waiting.popleft()[1])
        count, _, mean, variance = self._stats
        if count < self._settings.after:
            return math.inf
        deviation = max(math.sqrt(variance), _FLOOR * abs(mean))
        return mean + self._settings.deviations * deviation

    def note(self, number: int, loss: float) -> None:
        """The loss of batch `number`, which is to count."""
        self._waiting.append((number, loss))

    def saved(self) -> dict[str, Any]:
        """Plain JSON values for `Guard(settings, saved)`; floats stay exact."""
        return {"stats": self._stats, "waiting": [list(one) for one in self._waiting]}

    def _count(self, loss: float) -> None:
        # Weighted incremental mean and variance (West 1979), weights of a geometric
        # series.
        count, weight, mean, variance = self._stats
        keep = 1 - 1 / self._settings.horizon
        weight = keep * weight + 1
        gap, share = loss - mean, 1 / weight
        mean += share * gap
        variance = (1 - share) * (variance + share * gap * gap)
        self._stats = [count + 1, weight, mean, variance]
