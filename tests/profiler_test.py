# SPDX-License-Identifier: Apache-2.0
"""Traces of the steps that were asked for."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from mim_jax.run.profiler import Tracer, traced_steps


def test_steps_by_first_and_count():
    assert list(traced_steps("10:3")) == [10, 11, 12]
    assert not traced_steps("")
    for text in ("10", "0:3", "3:0", "a:b", "-1:2", "1:2:3"):
        with pytest.raises(ValueError, match=f"profile='{text}': want FIRST:COUNT"):
            traced_steps(text)


@pytest.mark.parametrize("last", [9, 5])
def test_a_trace_holds_those_steps_alone(tmp_path, last, capsys):
    tracer = Tracer(tmp_path, traced_steps("4:3"))
    steps = {
        step: jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile()
        for step in range(1, last + 1)
    }
    for step, compute in steps.items():
        tracer.before(step)
        with jax.profiler.TraceAnnotation(f"marked{step}"):
            values = compute(jnp.ones((8, 8)))
        tracer.after(step, values)
    tracer.close()
    (path,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    marked = {name for name in names if name.startswith("marked")}
    assert marked == {f"marked{step}" for step in range(4, min(last, 6) + 1)}
    assert capsys.readouterr().out.count("trace of steps in") == 1
