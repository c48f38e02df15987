# SPDX-License-Identifier: Apache-2.0
"""Every form of attention that runs on this machine, beside the plain one.

python benchmarks/attention.py

For each size: the error of each form against the plain form in float64, forward and
gradient, as a share of the largest number; then the time of forward and gradient
together, in rounds in which all forms take turns. Prints a table with medians in
milliseconds and the median of the ratios of each round. --small takes tiny sizes.

python benchmarks/attention.py --step=configs/mae.py:mnist

The training step of a config in the plain form and in the one that "auto" takes, by
turns: medians in milliseconds, of processor time on a CPU, and their ratio.

Exit codes: 0, or 1 if a form is wrong: its error is far above the plain form's.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mim_jax import config, sharding, train
from mim_jax.data.pipeline import train_batches
from mim_jax.kernels import FORMS
from mim_jax.kernels.base import Site
from mim_jax.kernels.choice import choose_attention, site_of
from mim_jax.ops.attention import attention
from mim_jax.plan import Plan


class Case(NamedTuple):
    """What is computed: so many images of so many tokens, heads of `size` numbers."""

    name: str
    images: int
    tokens: int
    heads: int
    size: int


# ViT-B/16 and MAE's decoder at 224 x 224 pixels: all tokens, or a quarter or three
# quarters of the patches and the class token.
LARGE = [
    Case("encoder, a quarter seen", 128, 50, 12, 64),
    Case("encoder, three quarters seen", 128, 148, 12, 64),
    Case("encoder, all seen", 128, 197, 12, 64),
    Case("decoder", 128, 197, 16, 32),
]
CPU = [
    Case("mae.py:digits", 128, 17, 4, 16),
    Case("decoder of mae.py:hierarchy", 128, 65, 4, 8),
    Case("cmae.py:mnist in a study", 128, 65, 4, 16),
    Case("detect.py:scenes", 16, 257, 4, 24),
    Case("mae.py:photos", 64, 65, 2, 32),
    Case("ViT-Ti's width / 2", 128, 50, 4, 24),
    Case("ViT-S/16, all seen", 16, 197, 6, 64),
    Case("ViT-B/16, a quarter seen", 16, 50, 12, 64),
    Case("ViT-B/16, all seen", 8, 197, 12, 64),
]
SMALL = [Case("tiny", 4, 17, 4, 16), Case("less tiny", 4, 50, 4, 32)]
CHECKED = 4  # images of the check: float64 is slow
# A form is wrong if it errs so many times more than the plain one does.
TOO_MUCH = 4.0
HEAD = """
| size | images x tokens x heads x numbers | form | error | of the gradient | ms | \
plain / form | auto |
|---|---|---|---|---|---|---|---|"""


def plain(qkv, bias, heads: int):
    """The form that defines what the others compute."""
    return attention(qkv, bias, heads)[0]


def forms_for(site: Site) -> tuple[dict, dict]:
    """({name: form that runs at a site}, {name: why it does not})."""
    runs, reasons = {"plain": plain}, {}
    for name, form in FORMS.items():
        if form.platform != site.platform:
            continue
        if why := form.misfit(site):
            reasons[name] = why
        else:
            runs[name] = form.run
    return runs, reasons


def drawn(case: Case, images: int, dtype: str) -> list[jax.Array]:
    """qkv, bias, and the gradient of what comes out."""
    random, width = np.random.default_rng(0), case.heads * case.size
    shapes = [(images, case.tokens, 3 * width), (3 * width,)]
    shapes.append((images, case.tokens, width))
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def work_of(run, heads: int):
    """Forward and gradient of a form: (qkv, bias, gradient) to three arrays."""

    @jax.jit
    def work(qkv, bias, gradient):
        mixed, back = jax.vjp(functools.partial(run, heads=heads), qkv, bias)
        return mixed, *back(gradient)

    return work


def errors(run, case: Case, dtype: str) -> tuple[float, float]:
    """Of the mixed values and of the gradients, as shares of the largest number."""
    arrays = drawn(case, CHECKED, dtype)
    found = [np.asarray(x, np.float64) for x in work_of(run, case.heads)(*arrays)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        exact = [np.asarray(x) for x in work_of(plain, case.heads)(*wide)]
    shares = [
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(found, exact, strict=True)
    ]
    return shares[0], max(shares[1:])


def milliseconds(work, arrays, calls: int) -> float:
    """Of a call; the first of a turn is left out."""
    jax.block_until_ready(work(*arrays))
    before = time.perf_counter()
    for _ in range(calls):
        done = work(*arrays)
    jax.block_until_ready(done)
    return 1e3 * (time.perf_counter() - before) / calls


def measured(case: Case, dtype: str, rounds: int, calls: int) -> list[dict]:
    """A row for each form; one that cannot run has the reason."""
    device, width = jax.devices()[0], case.heads * case.size
    site = site_of(device, dtype, tokens=case.tokens, width=width, heads=case.heads)
    runs, reasons = forms_for(site)
    auto = choose_attention("auto", site)
    rows: dict[str, dict] = {}
    works, raised = {}, set()
    for name, run in runs.items():
        try:
            forward, gradient = errors(run, case, dtype)
            works[name] = work_of(run, case.heads)
        except Exception as error:  # the other forms are measured all the same
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            raised.add(name)
            continue
        rows[name] = dict(error=forward, gradient_error=gradient)
    arrays, times = drawn(case, case.images, dtype), {name: [] for name in works}
    for number in range(rounds + 1):  # the first is left out
        order = list(works)[number % len(works) :] + list(works)[: number % len(works)]
        for name in order:
            times[name].append(milliseconds(works[name], arrays, calls))
    for name, row in rows.items():
        pairs = list(zip(times["plain"], times[name], strict=True))[1:]
        row["ms"] = statistics.median(own for _, own in pairs)
        row["plain_over_form"] = statistics.median(base / own for base, own in pairs)
    facts = dict(case=case._asdict(), dtype=dtype)
    found = [facts | {"form": name, "auto": name == auto} | rows[name] for name in rows]
    return found + [
        facts | {"form": name, "why": why, "raised": name in raised}
        for name, why in reasons.items()
    ]


def wrong(rows: list[dict]) -> list[str]:
    """Forms of a case that raised, or that err far more than the plain one."""
    found = []
    plain_row = next((row for row in rows if row["form"] == "plain"), {})
    for row in rows:
        where = f"{row['form']} at {row['case']['name']}"
        if row.get("raised"):
            found.append(f"{where}: {row['why']}")
        for name in ("error", "gradient_error"):
            # NaN is wrong, too.
            if name in row and not row[name] <= TOO_MUCH * plain_row[name] + 1e-7:
                found.append(f"{where}: {name} {row[name]:.1e}")
    return found


def line(row: dict) -> str:
    """Of the table."""
    case = row["case"]
    sizes = " x ".join(str(case[key]) for key in ("images", "tokens", "heads", "size"))
    if "why" in row:
        cells = [row["why"], "", "", "", ""]
    else:
        cells = [f"{row[key]:.1e}" for key in ("error", "gradient_error")]
        cells += [f"{row['ms']:.3g}", f"{row['plain_over_form']:.2f}"]
        cells.append("*" if row["auto"] else "")
    return "| " + " | ".join([case["name"], sizes, row["form"], *cells]) + " |"


def step_of(path: str, form: str):
    """(Its forms in words, the training step with its batch, the first state)."""
    tree = config.read(path)
    tree.attention, tree.compile_cache = form, False
    plan = Plan.of(tree)
    settings, reads = plan.settings, plan.objective.reads
    size = settings.batch_size
    with train_batches(settings.data, seed=0, batch_size=size, stop=1) as batches:
        batch = {
            name: np.array(x) for name, x in next(batches).items() if name in reads
        }
    batch = jax.device_put(batch, sharding.by_row(plan.mesh))
    compiled = train.lowered(plan).compile()
    return plan.forms, lambda state: compiled(state, batch)[0], plan.first_state()


def whole_steps(path: str, rounds: int) -> None:
    """Prints what a training step takes in both forms."""
    clock = time.perf_counter
    if jax.default_backend() == "cpu":  # whose cores may do other work, too
        clock = time.process_time
    runs = {form: list(step_of(path, form)) for form in ("plain", "auto")}
    times: dict[str, list[float]] = {form: [] for form in runs}
    for _ in range(rounds + 2):  # the first two are left out
        for form, run in runs.items():
            before = clock()
            run[2] = jax.block_until_ready(run[1](run[2]))
            times[form].append(1e3 * (clock() - before))
    plain, auto = (statistics.median(found[2:]) for found in times.values())
    print(f"{path}: plain {plain:.1f} ms, auto {auto:.1f} ms, {plain / auto:.2f} times")
    print(f"auto is {runs['auto'][0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=0, help="per turn; 0: 2 or 20")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write, if any")
    parser.add_argument("--step", default="", help="config whose step is timed")
    args = parser.parse_args()
    if args.step:
        if args.small or args.out or args.calls:
            parser.error("--step has no --small, --out or --calls: leave them out")
        whole_steps(args.step, args.rounds)
        return
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    cases = SMALL if args.small else CPU if on_cpu else LARGE
    dtype, calls = ("float32", 2) if on_cpu else ("bfloat16", 20)
    said = f"{device.device_kind}, {dtype}, jax {jax.__version__}, {args.rounds} rounds"
    table = [said, *HEAD.splitlines()]
    print("\n".join(table))
    rows, failures = [], []
    for case in cases:
        found = measured(case, dtype, args.rounds, args.calls or calls)
        print("\n".join(map(line, found)), flush=True)
        table += map(line, found)
        rows += found
        failures += wrong(found)
    if args.out:
        found = {"rows": rows, "wrong": failures, "table": "\n".join(table)}
        args.out.write_text(json.dumps(found) + "\n")
    if failures:
        sys.exit("wrong: " + "; ".join(failures))


if __name__ == "__main__":
    main()
