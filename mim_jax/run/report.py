# SPDX-License-Identifier: Apache-2.0
"""Measures the state of a run in memory, and writes the closing report."""

from typing import Any

import jax

from mim_jax import sharding
from mim_jax.data.fields import DataError
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval, Run, caption, drawn, measured
from mim_jax.evals.report import Report, save
from mim_jax.plan import Plan, for_evaluation
from mim_jax.run import curves, files, hosts, notes
from mim_jax.schema import ConfigError
from mim_jax.state import TrainState


class InMemory:
    """Shows evaluations the state of a training run that is in memory.

    Attributes:
        plan: of the run.
        workdir: directory of the run.
        passes: passes over the run's images.
    """

    def __init__(self, plan: Plan, workdir: files.Place):
        self.plan, self.workdir = plan, workdir
        settings = plan.settings
        shape = settings.data.image_shape
        self.passes = EvalPasses(settings.data)
        # One object, since programs are compiled once for each.
        self._objective, _ = for_evaluation(
            settings.objective, settings.attention, shape
        )

        everywhere = sharding.replicated(plan.mesh)
        self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)

    def run(self, state: TrainState) -> Run | None:
        """The run as evaluations read it, on the first host; None on the others.

        All hosts must call this, since they gather the parameters together.
        """
        with hosts.deadline("all hosts to gather the parameters"):
            initial, _ = self.plan.initial()
            tree = (state.params, state.stats, state.memory, initial)
            gathered = [*map(self._gather, tree)]
            jax.block_until_ready(gathered)
        if jax.process_index() != 0:
            return None
        params, stats, memory, initial = map(_here, gathered)
        return Run(
            objective=self._objective,
            params=params,
            stats=stats,
            memory=memory,
            initial=initial,
            step=int(state.step),
            name=files.absolute(self.workdir).name,
        )


def measure(memory: InMemory, state: TrainState, known: dict[str, Report]) -> None:
    """Run the evaluations that end the run on the first host, and write report/.

    All hosts must call this, since they gather the parameters together.

    Args:
        known: what evaluations found about this state that ran already, by name.
    """
    run, sentences = memory.run(state), []
    if run is None:
        return
    folder = memory.workdir / "report"
    for name, evaluation in memory.plan.settings.closing.items():
        found = known[name] if name in known else None
        if found is None:
            found = _measured(name, evaluation, run, memory)
        reports = {caption(run): found}
        save(folder, name, reports, drawn(evaluation, reports))
        sentences.append(evaluation.sentence(found))
    curves.write(memory.workdir / "metrics.jsonl", folder / "curves.png")
    learned = "; ".join(filter(None, sentences))
    if learned:
        print("learned    ", learned, flush=True)
    notes.end(
        memory.workdir,
        f"step {run.step} of {memory.plan.total}: {learned or 'trained'}\n"
        "report/ has pictures and numbers, metrics.jsonl every logged step",
    )


def _measured(name: str, evaluation: Eval, run: Run, memory: InMemory) -> Report:
    """What an evaluation of the closing report measures.

    Raises:
        ConfigError, DataError: it cannot, by its own fault or since data are gone.
    """
    done = f"the run is trained and saved, but {name} cannot measure it"
    try:
        return measured(evaluation, run, memory.passes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{done}: {error}") from error
    except OSError as error:
        raise DataError(
            f"{done}: {error}. Put the data back: the same command goes on from here"
        ) from error


def _here(tree: Any) -> Any:
    """A tree of arrays that every device has whole, as arrays of a device of this
    host."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
