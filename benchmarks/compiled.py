# SPDX-License-Identifier: Apache-2.0
"""What the compilers of TPUs and GPUs say of our training steps, without any of these:
a table and a plot.

pip install -e '.[tpu]'     # or '.[cuda]', for the suite gpus
python benchmarks/compiled.py --suite=methods --out=compiled.jsonl

Compiles each case of a suite (see SUITES), one to three minutes each, as `python -m
mim_jax.aot` would, appends what it finds to the file, and goes on from there when
started again. Prints the table of all that the file holds of the suite;
with the suite `chips` also draws bytes and memory over the number of chips, beside the
file. Rates are estimates of the compiler, of GPUs upper bounds; no measurements.
"""

import argparse
import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

from mim_jax import config  # noqa: E402
from mim_jax.aot import step as aot  # noqa: E402
from mim_jax.models.vit import SIZES  # noqa: E402

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SCANNED = {"scan": True, "remat": "dots"}
UNROLLED = {"scan": False, "remat": "none"}
GIB = 2**30


def encoder(**fields) -> dict:
    """Leaves of an encoder."""
    return {f"objective.encoder.{name}": value for name, value in fields.items()}


# A billion parameters: heads of a whole tile of lanes.
BILLION = encoder(width=1536, depth=36, heads=12, patch=14)
# Suite: {case: (config, topology, leaves)}.
SUITES: dict[str, dict[str, tuple[str, str, dict]]] = {
    "methods": {
        "MAE B/16": ("mae", "v5e:2x4", {}),
        "MAE B/16, unrolled": ("mae", "v5e:2x4", UNROLLED),
        "MAE L/16": ("mae", "v5e:2x4", encoder(**SIZES["L"])),
        "MAE L/16, unrolled": ("mae", "v5e:2x4", encoder(**SIZES["L"]) | UNROLLED),
        "MAE B/8": ("mae", "v5e:2x4", encoder(patch=8) | {"batch_size": 256}),
        "R-MAE B/16": ("rmae", "v5e:2x4", {}),
        "R-MAE B/16, unrolled": ("rmae", "v5e:2x4", UNROLLED),
        "C-MAE B/16": ("cmae", "v5e:2x4", {}),
        "C-MAE B/16, unrolled": ("cmae", "v5e:2x4", UNROLLED),
    },
    "sizes": {
        "MAE H/14, fsdp 16": ("mae", "v5e:4x4", encoder(**SIZES["H"])),
        "MAE 1B/14, fsdp 16": ("mae", "v5e:4x4", BILLION),
    },
    "topologies": {
        "MAE B/16 on v6e": ("mae", "v6e:2x4", {}),
        "MAE B/16 on v4": ("mae", "v4:2x2x2", {}),
        "MAE B/16 on v5p": ("mae", "v5p:2x2x2", {}),
        "MAE B/16 on tpu7x": ("mae", "tpu7x:2x2x1", {}),
    },
    "gpus": {
        f"{case} on {gpu}": (name, f"{gpu}:8", leaves)
        for case, name, leaves in [
            ("MAE B/16", "mae", {}),
            ("MAE B/16, unrolled", "mae", UNROLLED),
            ("R-MAE B/16", "rmae", {}),
            ("C-MAE B/16", "cmae", {}),
        ]
        for gpu in ("a100-40", "h100")
    },
    "chips": {
        f"{case} on {rows * cols}": (
            "mae",
            f"v5e:{rows}x{cols}",
            leaves
            | {"batch_size": per_chip * rows * cols}
            | ({"mesh.fsdp": rows * cols} if shared else {}),
        )
        for case, leaves, per_chip, shared in [
            ("MAE B/16", {}, 128, False),
            ("MAE H/14, fsdp", encoder(**SIZES["H"]), 64, True),
        ]
        for rows, cols in [(2, 2), (4, 4), (8, 8), (16, 16)]
    },
}
for _leaves in (leaves for _, _, leaves in SUITES["sizes"].values()):
    _leaves |= {"mesh.fsdp": 16}


def compiled(name: str, topology: str, leaves: dict) -> dict:
    """What `aot` finds of a config."""
    tree = config.read(str(CONFIGS / f"{name}.py"))
    tree.update_from_flattened_dict(SCANNED | leaves)
    plan, _ = aot.plan_for(tree, topology)
    found = aot.facts(plan)
    sizes, text = aot.compile_step(plan)
    found |= sizes
    found |= aot.verdict(found)
    return found | (aot.estimate(plan, topology, text) if text else {})


def row(case: str, found: dict) -> str:
    """A line of the table."""
    sent = sum(one["bytes"] for one in found.get("collectives", {}).values())
    cells = [
        case,
        f"{found['parameters'] / 1e6:.0f} M",
        str(found["batch_per_device"]),
        "yes" if found["fits"] else "may not" if found["compiles"] else "no",
        f"{found['peak_bytes'] / GIB:.2f} / {found['held_bytes'] / GIB:.2f}",
        f"{sent / 2**20:.0f}",
    ]
    account = found.get("estimate")
    if account:
        times = (1e3 * account[name] for name in ("priced", "unpriced", "meanwhile"))
        cells.append(" + ".join(f"{value:.1f}" for value in times))
        for name in ("priced", "with_unpriced"):
            rate, share = account["images_per_second"].get(name), account["utilisation"]
            cells.append(f"{rate:.0f} ({share[name]:.0%})" if rate else "")
    else:
        cells += ["", "", ""]
    return "| " + " | ".join([*cells, f"{found['compile_seconds']:.0f}"]) + " |"


HEAD = """
| case | parameters | images per device | fits | GiB per device: peak / laid out | \
MiB sent per step | ms: priced + bound + meanwhile | images/s per device: priced | \
with the bound | compiled in, s |
|---|---|---|---|---|---|---|---|---|---|"""


def draw(found: dict[str, dict], path: pathlib.Path) -> None:
    """Bytes and memory over the number of chips."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    groups: dict[str, list[dict]] = {}
    for case, one in found.items():
        groups.setdefault(case.rpartition(" on ")[0], []).append(one)
    for name, cases in groups.items():
        chips = [one["devices"] for one in cases]
        sent = [
            sum(kind["bytes"] for kind in one["collectives"].values()) / GIB
            for one in cases
        ]
        held = [one["held_bytes"] / GIB for one in cases]
        left.plot(chips, sent, "o-", label=name)
        right.plot(chips, held, "o-", label=name)
    left.set(ylabel="GiB sent per chip and step")
    right.set(ylabel="GiB per chip, laid out")
    left.legend()
    ticks = sorted({one["devices"] for one in found.values()})
    for axes in (left, right):
        axes.set(xscale="log", xlabel="chips", ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="methods", choices=list(SUITES))
    parser.add_argument("--out", type=pathlib.Path, default="compiled.jsonl")
    args = parser.parse_args()
    known = {}
    if args.out.exists():
        lines = args.out.read_text().splitlines()
        known = {case: one for case, one in map(json.loads, lines)}
    suite = SUITES[args.suite]
    for case, (name, topology, leaves) in suite.items():
        if case not in known:
            known[case] = compiled(name, topology, leaves)
            with args.out.open("a") as file:
                file.write(json.dumps([case, known[case]]) + "\n")
    found = {case: known[case] for case in suite}
    print("\n".join([HEAD, *(row(case, one) for case, one in found.items())]))
    if args.suite == "chips":
        draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
