# SPDX-License-Identifier: Apache-2.0
"""The closing report of a training run: the evaluation that its config names."""

import pathlib

import jax

from mim_jax import config as configs
from mim_jax import sharding
from mim_jax import state as states
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval, Run, caption
from mim_jax.evals.report import save
from mim_jax.plan import Plan, for_evaluation
from mim_jax.state import TrainState


def measure(plan: Plan, state: TrainState, workdir: pathlib.Path) -> None:
    """Run the evaluation of `config.report` on the first host, and write report/.

    All hosts must call this, since they gather the parameters together.
    """
    settings, mesh = plan.settings, plan.mesh
    everywhere = sharding.replicated(mesh)
    gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
    params, stats, memory = map(gather, (state.params, state.stats, state.memory))

    def make():
        shape = settings.data.image_shape
        first = states.initial(
            settings.objective, seed=settings.seed, image_shape=shape
        )
        return states.layout(first[0], settings.scan)

    initial = jax.jit(make, out_shardings=everywhere)()
    if jax.process_index() != 0:
        return
    shape = settings.data.image_shape
    objective, _ = for_evaluation(settings.objective, settings.attention, shape)
    trained = Run(
        objective=objective,
        params=jax.device_get(params),
        stats=jax.device_get(stats),
        memory=jax.device_get(memory),
        initial=jax.device_get(initial),
        step=int(state.step),
        name=workdir.resolve().name,
    )
    report = settings.report.measure(trained, EvalPasses(settings.data))
    names = {cls: name for name, cls in configs.KINDS[Eval][1].items()}
    name = names[type(settings.report)]
    found = {caption(trained): report}
    save(workdir / "report", name, found, settings.report.draw(found))
