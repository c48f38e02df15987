# SPDX-License-Identifier: Apache-2.0
"""Compile the training step of any config for a TPU or GPU without having one.

python -m mim_jax.aot --config=configs/mae.py --topology=v5e:2x4

It reports whether the step fits into the devices' memory, how that memory is used, how
much the devices communicate, and the time of each part of the step. For a TPU the
compiler estimates the time; for a GPU only a lower bound is known. Neither is a
measurement (`mim_jax.aot.hlo`).
With --search --minutes=M it compiles variants of the config (scan, remat, mesh, batch),
and reports which of them fit and which of these the estimate calls fastest.

Exit codes: 0: the step fits; 1: it does not or may not; 2: the command cannot work.
"""

import os

if __name__ == "__main__":
    # JAX reads the first variable at import: tracing needs only the CPU, and this
    # machine's GPU or TPU stays free for other programs. libtpu reads the others when
    # it is loaded; without them it searches for a TPU host's metadata.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"  # any: --topology decides
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened: none is locked

import pathlib
from typing import Any

from absl import app, flags

from mim_jax import config as configs
from mim_jax.aot.devices import CHIPS
from mim_jax.aot.lines import after_compiling, before_compiling, cost_lines, tried_line
from mim_jax.aot.search import search
from mim_jax.aot.step import compile_step, estimate, facts, plan_for, verdict
from mim_jax.run.commandline import CONFIG, EXIT_CONFIG, given, leave, parse
from mim_jax.run.warmstart import check_given
from mim_jax.schema import to_json

EXIT_DOES_NOT_FIT = 1

# Not marked as required: a program that imports both this and `main` would need it too.
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"CHIP:LAYOUT, e.g. v5e:2x4 or h100:8; chips: {CHIPS}"
)
_SEARCH = flags.DEFINE_bool("search", False, "Compile variants and rank them.")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Begin no variant after so many.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write the result to, if any.")


def main(argv: list[str]) -> None:
    """Compile, print, write."""
    del argv  # `parse` left nothing in it
    config, topology = CONFIG.value, _TOPOLOGY.value
    try:
        check_given(config, given())
        plan, source = plan_for(config, topology)
    except configs.ConfigError as error:
        leave(f"error: {error}", EXIT_CONFIG)
    if _SEARCH.value:
        ranked = search(config, topology, _MINUTES.value)
        best = [one for one in ranked if one["fits"]][:1]
        print("\n".join(["fastest by estimate:", *map(tried_line, best)]), flush=True)
        _write({"topology": topology, "tried": ranked, "config": config.to_dict()})
        if not best:
            os._exit(EXIT_DOES_NOT_FIT)
        return
    found = {"topology": topology, "source": source} | facts(plan)
    print(before_compiling(found), flush=True)  # a full model takes minutes
    sizes, text = compile_step(plan)
    found |= sizes
    found |= verdict(found)
    if text:
        found |= estimate(plan, topology, text)
        print(cost_lines(found), flush=True)
    print(after_compiling(found), flush=True)
    _write(found | {"config": config.to_dict()})
    if not found["fits"]:
        os._exit(EXIT_DOES_NOT_FIT)


def _write(found: dict[str, Any]) -> None:
    """Writes the result as JSON to --out, if that is given."""
    if not _OUT.value:
        return
    try:
        pathlib.Path(_OUT.value).write_text(to_json(found, indent=2) + "\n")
    except OSError as error:
        leave(f"error: out={_OUT.value}: {error.strerror}", EXIT_CONFIG)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
