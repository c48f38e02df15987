# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: runs as files, and other programs' weights as runs.

python -m mim_jax.weights export runs/mnist mnist.safetensors
python -m mim_jax.weights import mnist.safetensors runs/mnist-again
python -m mim_jax.weights import mae_pretrain_vit_base.pth runs/mae-1600
python -m mim_jax.weights export runs/mae exported --format=hf
python -m mim_jax.weights inspect mae_pretrain_vit_base.pth

`import` makes a run directory that every evaluation, comparison and
`--config.init_from.run` takes. docs/weights.md lists whose weights it knows.
"""

import argparse
import json
import math
import shlex
import sys

from mim_jax import config as configs
from mim_jax.interop import foreign, native, reading, writing
from mim_jax.run import files, notes
from mim_jax.run.checkpoint import CheckpointError
from mim_jax.run.commandline import outlive_pipes
from mim_jax.run.files import DiskError

EXIT_CONFIG, EXIT_CHECKPOINT = 2, 4


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    options.line = f"python -m mim_jax.weights {shlex.join(words)}"
    try:
        configs.load_plugins(filter(None, options.plugins.split(",")))
        return options.run(options)
    except configs.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (CheckpointError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT


def _export(options: argparse.Namespace) -> int:
    run, to = options.rundir, options.to
    if options.format == "safetensors":
        _show(to, native.export(run, to, options.step))
        return 0
    for line in writing.export(run, to, options.format, options.step):
        print(f"{to}: {line}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if not native.is_ours(options.source):
        source = reading.read(options.source)
        _tell(options.source, foreign.convert(source, _said(options)))
        for name, one in source.tensors.items():
            print(f"{reading.printable(name):60s} {one.dtype:8s} {list(one.shape)}")
        return 0
    about = native.inspect(options.source)
    _show(options.source, about)
    for name, (kind, shape) in about["shapes"].items():
        print(f"{name:60s} {kind:5s} {shape}")
    return 0


def _import(options: argparse.Namespace) -> int:
    if native.is_ours(options.source):
        step = native.to_run(options.source, options.rundir)
    else:
        source = reading.read(options.source)
        found, step = foreign.convert(source, _said(options)), 0
        _tell(options.source, found)
        config = json.loads(configs.dumps(found.config))
        flat = {f"params/{name}": one for name, one in found.params.items()}
        native.write_run(options.rundir, reading.name_of(source), step, config, flat)
    what = f"weights     of {reading.printable(options.source)}, step {step}\n"
    notes.begin(files.place(options.rundir), what, options.line)
    print(f"{options.rundir} is a run directory with the checkpoint of step {step}")
    return 0


def _said(options: argparse.Namespace) -> foreign.Said:
    return foreign.Said(
        heads=options.heads,
        decoder_heads=options.decoder_heads,
        source=options.images,
        path=options.path,
    )


def _tell(path: str, found: foreign.Converted) -> None:
    numbers = sum(one.size for one in found.params.values())
    print(f"{path}: {found.family}, {numbers / 1e6:.2f} M parameters")
    for note in found.notes:
        print(f"  {note}")


def _show(path: str, about: dict) -> None:
    numbers = sum(
        math.prod(shape)
        for name, (_, shape) in about["shapes"].items()
        if name.startswith("params/")
    )
    print(
        f"{path}: {about['config']['objective']['name']}, step {about['step']}, "
        f"{numbers / 1e6:.2f} M parameters, written by mim_jax {about['version']}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--plugins", default="", help="modules to import first, separated by commas"
    )
    commands = parser.add_subparsers(required=True, metavar="export|import|inspect")
    one = commands.add_parser("export", help="write the weights of a run")
    one.add_argument("rundir", help="directory of a training run")
    one.add_argument("to", help="a .safetensors file; a folder for hf and timm")
    one.add_argument(
        "--format",
        choices=("safetensors", "hf", "timm"),
        default="safetensors",
        help="one file of ours, or a folder for transformers or timm",
    )
    one.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    one.set_defaults(run=_export)
    one = commands.add_parser("import", help="make a run directory of weights")
    _add_source(one)
    one.add_argument("rundir", help="the directory to make")
    one.set_defaults(run=_import)
    one = commands.add_parser("inspect", help="say what weights there are")
    _add_source(one)
    one.set_defaults(run=_inspect)
    return parser


def _add_source(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "source", help="a file of weights, or a folder as Hugging Face has them"
    )
    for name in ("heads", "decoder-heads"):
        one.add_argument(
            f"--{name}", type=_count, help="attention heads, where nothing tells them"
        )
    one.add_argument(
        "--source",
        dest="images",
        default="tfds",
        help="source of the run's images; default: tfds, whose default is ImageNet",
    )
    one.add_argument("--path", default="", help="where these images are")


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 2**15):
        raise argparse.ArgumentTypeError(f"{text!r}: want a number of 1 to {2**15}")
    return int(text)


if __name__ == "__main__":
    outlive_pipes()
    sys.exit(main())
