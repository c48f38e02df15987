# SPDX-License-Identifier: Apache-2.0
"""All that wants measuring on a GPU, in one command: attention, then training steps.

pip install -e '.[cuda,oracle]'
python benchmarks/gpu.py

First every form of attention that runs there beside the plain one, as
`benchmarks/attention.py` does. Then a training step of MAE, R-MAE and C-MAE B/16 in
bfloat16 on one GPU, with synthetic images: milliseconds, images per second, the share
of the card's FLOP/s, and the memory at the peak. Beside each, in turns, PyTorch trains
transformers' ViTMAE B/16: SDPA attention, bfloat16 autocast, torch.compile, fused
AdamW. Each side has a process of its own. Where the batch has no room, both sides take
half of it. Where PyTorch or its GPU is missing, its columns stay empty, and a line says
why; `--torch-python` names the Python of another environment, for a PyTorch that wants
another CUDA than JAX. With `--no-torch` they stay empty, too.

Prints tables, and writes a JSON file and a markdown table beside it. `--small` runs
everything tiny on the CPU: a test of this program, whose times mean nothing.

Exit codes: 0; 1 a form of attention is wrong or a step failed; 2 JAX sees no GPU.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).parent
LEAST_BATCH = 8
EXIT_NO_GPU = 2
# Case: (config, leaves).
CASES: dict[str, tuple[str, dict]] = {
    "MAE B/16": ("mae", {}),
    "MAE B/16, plain attention": ("mae", {"attention": "plain"}),
    "R-MAE B/16": ("rmae", {}),
    "C-MAE B/16": ("cmae", {}),
}
# Sizes of networks, as leaves of our configs and as fields of transformers'.
SMALL = {
    "data.image_size": [32, 32],
    "objective.encoder.patch": 8,
    "objective.encoder.width": 64,
    "objective.encoder.depth": 2,
    "objective.encoder.heads": 4,
}
SMALL_DECODER = {
    "objective.decoder.width": 32,
    "objective.decoder.depth": 1,
    "objective.decoder.heads": 2,
}
SMALL_HEADS = {
    f"objective.{head}.{size}": 64
    for head in ("projector", "predictor")
    for size in ("hidden", "out")
}
SMALL_THERE = dict(
    image_size=32,
    patch_size=8,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    decoder_hidden_size=32,
    decoder_intermediate_size=128,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
)
HEAD = """
| case | batch | ms | images/s | of the FLOP/s | GiB at the peak | PyTorch's MAE: ms | \
images/s | of the FLOP/s | GiB at the peak | PyTorch / ours |
|---|---|---|---|---|---|---|---|---|---|---|"""


class Absent(Exception):
    """What a side needs is not here; the message says what."""


def serve(build: Callable[..., tuple[dict, Callable[[], dict]]]) -> None:
    """The program of a side: builds it, says what it is, and runs a turn for each line.

    Args:
        build: of the settings in the first argument, JSON; returns facts, and what
            runs a turn and returns its milliseconds per step and bytes at the peak.
    """
    try:
        facts, turn = build(**json.loads(sys.argv[1]))
        turn()  # the first compiles and takes its memory
    except Absent as error:
        said = {"status": "absent", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        full = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.I)
        said = {"status": "no room" if full else "failed", "why": line}
    else:
        said = {"status": "ready"} | facts
    print(json.dumps(said), flush=True)
    if said["status"] == "ready":
        for _ in sys.stdin:
            print(json.dumps(turn()), flush=True)


class Side:
    """A process that takes turns at one training step.

    Attributes:
        facts: what it said of itself; `status` is "ready", "no room", "absent" or
            "failed", and `why` has the reason of the last three.
    """

    def __init__(self, python: str, program: str, settings: dict, small: bool):
        self._process = subprocess.Popen(
            [python, str(HERE / program), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(small),
        )
        self.facts = self._read()

    def turn(self) -> dict:
        """One turn, measured."""
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        found = self._read()
        if "ms" not in found:
            raise RuntimeError(found["why"])
        return found

    def close(self) -> None:
        """Ends the process, and so frees its memory."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                return json.loads(line)
        code = self._process.wait()
        return {"status": "failed", "why": f"the process ended with code {code}"}


def environment(small: bool) -> dict[str, str]:
    """Of a process: it takes memory as it needs it, so that others have room."""
    found = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if small:
        found |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        found["OMP_NUM_THREADS"] = "1"  # PyTorch's threads wait by turning
    return found


def attention(small: bool, rounds: int) -> dict:
    """The rows of benchmarks/attention.py, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "attention.json"
        command = [sys.executable, str(HERE / "attention.py")]
        command += [f"--rounds={rounds}", f"--out={out}"]
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], env=environment(small)
        )
        if not out.exists():
            why = f"attention.py ended with code {done.returncode}"
            return {"rows": [], "wrong": [why], "table": why}
        return json.loads(out.read_text())


def sides(
    case: str, batch: int, args: argparse.Namespace, without_torch: bool
) -> dict[str, Side]:
    """Both sides of a case, each ready or not."""
    config, leaves = CASES[case]
    if args.small:
        leaves = leaves | SMALL | (SMALL_HEADS if config == "cmae" else SMALL_DECODER)
    common = {"batch": batch, "steps": args.steps, "small": args.small}
    found = {
        "ours": Side(
            sys.executable,
            "gpu_ours.py",
            common | {"config": config, "leaves": leaves},
            args.small,
        )
    }
    if not without_torch:
        sizes = SMALL_THERE if args.small else {}
        settings = common | {"sizes": sizes}
        found["torch"] = Side(args.torch_python, "gpu_torch.py", settings, args.small)
    return found


def measured(case: str, args: argparse.Namespace, without_torch: bool) -> dict:
    """A row of the table; `why` has the reason of a side that is missing."""
    batch = args.batch
    while True:
        pair = sides(case, batch, args, without_torch)
        full = any(side.facts["status"] == "no room" for side in pair.values())
        if not full or batch // 2 < LEAST_BATCH:
            break
        for side in pair.values():
            side.close()
        batch //= 2
    row: dict[str, Any] = {"case": case, "batch": batch}
    row["why"] = {
        name: f"{side.facts['status']}: {side.facts['why']}"
        for name, side in pair.items()
        if side.facts["status"] != "ready"
    }
    try:
        row |= in_turns(
            {name: it for name, it in pair.items() if name not in row["why"]},
            args.rounds,
        )
    except RuntimeError as error:
        row["why"]["ours"] = f"failed: {error}"
    for side in pair.values():
        side.close()
    for name in ("ours", "torch"):
        if name in row:
            row[name]["images_per_second"] = 1e3 * batch / row[name]["ms"]
    add_shares(row)
    return row


def in_turns(ready: dict[str, Side], rounds: int) -> dict:
    """Medians of the sides, and the median of the ratios of each round."""
    turns: dict[str, list[dict]] = {name: [] for name in ready}
    for number in range(rounds):
        for name in list(ready)[:: 1 if number % 2 else -1]:
            turns[name].append(ready[name].turn())
    found: dict[str, Any] = {}
    for name, each in turns.items():
        found[name] = ready[name].facts | {
            "ms": statistics.median(one["ms"] for one in each),
            "peak_bytes": each[-1]["peak_bytes"],
        }
    if len(ready) == 2:
        pairs = zip(turns["ours"], turns["torch"], strict=True)
        ratio = statistics.median(b["ms"] / a["ms"] for a, b in pairs)
        found["torch_over_ours"] = ratio
    return found


def add_shares(row: dict) -> None:
    """The share of the card's FLOP/s that the algorithm needs at each side's rate."""
    if "ours" not in row or not row["ours"]["peak_flops"]:
        return
    # PyTorch trains MAE, whatever the case.
    for name in ("ours", "torch") if trains_mae(row["case"]) else ("ours",):
        if name in row:
            work = row[name]["images_per_second"] * row["ours"]["flops_per_image"]
            row[name]["share"] = work / row["ours"]["peak_flops"]


def versions(rows: list[dict]) -> list[str]:
    """A line for each side: its device, and what it ran with."""
    lines = {}
    for row in rows:
        for name in ("ours", "torch"):
            if name in row:
                shown = (f"{key} {it}" for key, it in row[name]["versions"].items())
                lines[name] = f"{name}: {row[name]['device']}, {', '.join(shown)}"
    return list(lines.values())


def trains_mae(case: str) -> bool:
    """Whether both sides of a case do the same work."""
    return CASES[case][0] == "mae"


def line(row: dict) -> str:
    """Of the table."""
    cells = [row["case"], str(row["batch"])]
    for name in ("ours", "torch"):
        one = row.get(name)
        if one is None:
            cells += [row["why"].get(name, ""), "", "", ""]
            continue
        cells += [f"{one['ms']:.1f}", f"{one['images_per_second']:.0f}"]
        cells.append(f"{one['share']:.0%}" if "share" in one else "")
        cells.append(f"{one['peak_bytes'] / 2**30:.1f}" if one["peak_bytes"] else "")
    same = "torch_over_ours" in row and trains_mae(row["case"])
    cells.append(f"{row['torch_over_ours']:.2f}" if same else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="images; 128, or 8 if small")
    parser.add_argument("--rounds", type=int, help="9, or 2 if small")
    parser.add_argument("--steps", type=int, help="of a turn; 10, or 1 if small")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--small", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"))
    args = parser.parse_args()
    usual = dict(batch=8, rounds=2, steps=1)
    if not args.small:
        usual = dict(batch=128, rounds=9, steps=10)
    for name, value in usual.items():
        setattr(args, name, getattr(args, name) or value)
    forms = attention(args.small, args.rounds)
    print(HEAD, flush=True)
    rows, without_torch = [], args.no_torch
    for case in args.cases:
        rows.append(measured(case, args, without_torch))
        print(line(rows[-1]), flush=True)
        why = rows[-1]["why"]
        if why.get("ours", "").startswith("absent"):
            print(why["ours"], file=sys.stderr)
            sys.exit(EXIT_NO_GPU)
        without_torch = without_torch or why.get("torch", "").startswith("absent")
    reasons = sorted(
        {f"{name}: {it}" for one in rows for name, it in one["why"].items()}
    )
    if args.no_torch:
        reasons.append("torch: not measured, by --no-torch")
    print("\n".join(["", *versions(rows), *reasons, *forms["wrong"]]))
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    found = {"command": command, "attention": forms, "steps": rows, "missing": reasons}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    table = [f"    {command}", "", forms["table"], HEAD, *map(line, rows), ""]
    table += [*versions(rows), *reasons]
    args.out.with_suffix(".md").write_text("\n".join(table).rstrip() + "\n")
    failed = any("failed" in it or "no room" in it for it in reasons)
    sys.exit(1 if failed or forms["wrong"] else 0)


if __name__ == "__main__":
    main()
