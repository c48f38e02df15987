# SPDX-License-Identifier: Apache-2.0
"""Throws wrong values at configs and damaged files at the decoders.

    PYTHONPATH=.:tests python tests/fuzz.py leaves --count=10000
    PYTHONPATH=.:tests python tests/fuzz.py images --count=2000

A value of a leaf must be refused in one line, or be one that its field declares; a file
must be read, or be counted and named. What does anything else, or takes longer than
PATIENCE seconds of work, is a finding: it is printed, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import io
import json
import math
import os
import pathlib
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import leaves
import numpy as np
from absl import flags
from leaves import Leaf
from ml_collections import config_flags
from PIL import Image, features

from mim_jax import config
from mim_jax.data.decoding import Undecodable, decode
from mim_jax.data.input import Input
from mim_jax.data.pipeline import eval_batches, train_batches, why_unreadable
from mim_jax.data.sources.folder import Folder
from mim_jax.plan import Plan
from mim_jax.schema import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 20  # seconds of work for one case
PLANNED = 8  # of so many configs that are accepted, one is planned to the end
LINES = 12  # of an error, at most: what to do about a data set that is not here


class Hang(Exception):
    """A case took too long."""


class Finding(Exception):
    """A case ended as none should."""


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so many seconds of work by this process."""

    def stop(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    # Who sleeps does no work, and Python hears no signal inside of a library.
    faulthandler.dump_traceback_later(20 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# Leaves.

WORDS = (
    *("", " ", "none", "None", "nan", "-nan", "inf", "-inf", "1e400", "true", "False"),
    *("0", "-0.0", "-1", "1", "2", "1.5", "0x10", "1_000", "9" * 400, "1e-320", "١٢"),
    *("()", "(1,)", "(1,2)", "(0.5,)", "(nan,)", "(1e999,)", "[1]", "{}", "(1,", "1,2"),
    *("('a',)", "(None,)", "((1,),)", "(True,)", "'1'", '"x"', "abc", "plain", "auto"),
    *("../x", "/dev/null", "a" * 5000, "\n", "é✓", "\udcff", "\0", "$(x)", "%s", "\\"),
    *("lambda: 0", "__import__('os')", "1/0", "10**10", "1e3", "0.1+0.2", "5:3", "0:0"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**30, 0.5, -0.0, math.nan, math.inf, 1e308),
    *("", "abc", "nan", "1", [], [1], [1, 2], [0.5], [math.nan], [None], [[1]], {}),
    *({"name": "mae"}, {"name": "zebra"}, {"a": 1}, [True], ["a"], [1, "a"]),
)


def trees() -> tuple[Callable[[], Any], ...]:
    """What makes a tree: each job with each plug-in, and each config file."""
    files = sorted((ROOT / "configs").glob("*.py"))
    return *leaves.makers(), *(functools.partial(_read, str(file)) for file in files)


def _read(file: str) -> Any:
    tree = config.read(file)
    if tree.job == "train":  # on data that are here
        tree = config.read(f"{file}:source=photos")
    return tree


def leaves_of(makers: Iterable[Callable[[], Any]]) -> list[Leaf]:
    """Every leaf of these trees, of any type."""
    found = []
    for make in makers:
        tree = make()
        found += leaves.leaves_of(make, config.JOBS[tree.job], tree, numeric=False)
    # The command line has --plugins for it.
    return [leaf for leaf in found if leaf.path != "plugins"]


def text_for(rng: random.Random, leaf: Leaf) -> str:
    """What a user might write behind the `=` of a leaf."""
    numeric = leaves.is_numeric(leaf.field.type)
    if not numeric or rng.random() < 0.3:
        return rng.choice(WORDS)
    kind, range_ = leaves.kind_of(leaf.field.type), leaves.bounds(leaf.field)
    number = leaves.drawn(rng, kind)
    if rng.random() < 0.5:  # one that may be right
        low = range_.least if range_.above is None else range_.above
        high = range_.most if range_.below is None else range_.below
        near = [low, high, rng.choice([1, 2, 4, 0.5, 0.1]), leaf.field.default]
        near = [it for it in near if it is not None]
        number = rng.choice(near)
    if isinstance(number, tuple):
        return str(number)
    if isinstance(leaf.field.default, tuple) and rng.random() < 0.8:
        count = rng.choice([1, len(leaf.field.default), 4])
        return "(" + f"{number}," * count + ")"
    return str(number)


def from_command_line(
    rng: random.Random, pool: list[Leaf]
) -> tuple[str, Callable[[], Any]]:
    """One or two leaves of a tree as the command line sets them."""
    leaf = rng.choice(pool)
    chosen = [leaf]
    if rng.random() < 0.2:
        chosen.append(rng.choice([one for one in pool if one.tree is leaf.tree]))
    words = [f"--config.{one.path}={text_for(rng, one)}" for one in chosen]

    def made() -> Any:
        argv, values = ["main", *words], flags.FlagValues()
        tree = leaf.tree()
        config_flags.DEFINE_config_dict(
            "config", tree, flag_values=values, sys_argv=argv
        )
        values(argv)
        return values["config"].value

    return f"{_called(leaf.tree)} {words!r}", made


def from_file(rng: random.Random, pool: list[Leaf]) -> tuple[str, Callable[[], Any]]:
    """A saved config of which one leaf, or a group, has another value."""
    leaf = rng.choice(pool)
    value = rng.choice(VALUES)
    *above, name = leaf.path.split(".")
    if above and rng.random() < 0.2:
        *above, name = above  # a group

    def made() -> Any:
        saved = json.loads(config.dumps(leaf.tree()))
        node = functools.reduce(lambda node, part: node[part], above, saved)
        node[name] = value
        return config.filled(saved, "config.json")

    return f"{_called(leaf.tree)} saved {leaf.path}={value!r}", made


def _called(make: Any) -> str:
    return " ".join([*map(str, make.args), *map(str, make.keywords.values())])


def one_config(rng: random.Random, pool: list[Leaf], plan: bool) -> str:
    """Draws a config; returns "accepted", "refused" or, if it is to be planned and can
    be, "planned".

    Raises:
        Finding: it was neither.
    """
    name, made = (from_file if rng.random() < 0.25 else from_command_line)(rng, pool)
    try:
        with patience(PATIENCE):
            built = config.build(tree := made())
    except (ConfigError, flags.Error) as error:
        if str(error).count("\n") >= LINES or not str(error).strip():
            raise Finding(f"{name}: the error is no line: {error}") from error
        return "refused"
    except (Exception, RecursionError) as error:
        raise Finding(f"{name}: {_shown(error)}") from error
    for path, number, field in leaves.numbers_of(built):
        finite = isinstance(number, int) or math.isfinite(number)
        if not finite or number not in leaves.bounds(field):
            raise Finding(f"{name}: {path}={number!r} was accepted")
    if not plan or tree.job != "train":
        return "accepted"
    try:
        with patience(PATIENCE):
            whole = Plan.of(tree)
            whole.abstract_state(), whole.abstract_batch()
            float(whole.schedule(whole.total - 1))
    except ValueError as error:  # as main does
        if not isinstance(error, ConfigError) and "Example" not in type(error).__name__:
            raise Finding(f"{name}: planning: {_shown(error)}") from error
        return "refused by the plan"
    except Exception as error:
        raise Finding(f"{name}: planning: {_shown(error)}") from error
    return "planned"


def fuzz_leaves(
    count: int, seed: int, makers: Iterable[Callable[[], Any]], planned: int = PLANNED
) -> tuple[collections.Counter, list[str]]:
    """Draws so many configs; returns how they ended, and what should not have been.

    Args:
        makers: of the trees whose leaves are set.
        planned: of so many that are accepted, one is planned; 0 plans none.
    """
    ends, found, accepted = collections.Counter(), [], 0
    pool = leaves_of(makers)
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        try:
            plan = planned > 0 and accepted % planned == 0
            end = one_config(rng, pool, plan)
        except Finding as error:
            end = "findings"
            found.append(f"case {i}: {error}")
        accepted += end not in ("refused", "findings")
        ends[end] += 1
        if i % 500 == 499:
            jax.clear_caches()
    return ends, found


# Images.


def samples() -> dict[str, bytes]:
    """Sound files, by format and kind."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (37, 53, 3), np.uint8)
    smooth = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3).astype(np.uint8)
    found = {}

    def add(name: str, picture: Image.Image, kind: str, **options: Any) -> None:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        found[name] = stream.getvalue()

    for word, pixels in (("rough", rough), ("smooth", smooth)):
        colour = Image.fromarray(pixels)
        exif = colour.getexif()
        exif[274] = 6
        for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX"):
            add(f"{kind} {word}", colour, kind)
        add(f"JPEG turned {word}", colour, "JPEG", exif=exif)
        add(f"JPEG progressive {word}", colour, "JPEG", progressive=True)
        add(f"JPEG CMYK {word}", colour.convert("CMYK"), "JPEG")
        for mode in ("L", "LA", "P", "1", "RGBA", "I;16"):
            picture = (
                Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
                if mode == "I;16"
                else colour.convert(mode)
            )
            add(f"PNG {mode} {word}", picture, "PNG")
        for way in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"):
            picture = colour.convert("1") if way == "group4" else colour
            add(f"TIFF {way} {word}", picture, "TIFF", compression=way)
        more = [colour.rotate(90 * i) for i in range(3)]
        add(f"GIF moving {word}", colour, "GIF", save_all=True, append_images=more)
        for kind in ("webp", "avif", "jpg_2000"):
            if features.check(kind):
                add(f"{kind} {word}", colour, kind.upper().replace("JPG_", "JPEG"))
    return found


def mutated(rng: random.Random, sound: dict[str, bytes]) -> tuple[str, bytes]:
    """A damaged file, and what it was made of."""
    name = rng.choice(sorted(sound))
    data = bytearray(sound[name])
    how = rng.choice(["cut", "bits", "head", "run", "swap", "joined", "grown", "zeros"])
    at = rng.randrange(len(data))
    if how == "cut":
        del data[at:]
    elif how in ("bits", "head"):  # the first bytes say what the rest is
        end = min(64, len(data)) if how == "head" else len(data)
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif how == "run":
        data[at : at + 16] = rng.randbytes(16)
    elif how == "swap":  # the head of one, the body of another
        other = sound[rng.choice(sorted(sound))]
        data[at:] = other[min(at, len(other)) :]
    elif how == "joined":
        data[at:at] = sound[rng.choice(sorted(sound))]
    elif how == "grown":
        data += data[: at + 1]
    else:
        data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff"])
    return f"{name}, {how}", bytes(data)


def one_image(name: str, data: bytes) -> str:
    """Decodes a damaged file in each way; returns "read" or "refused".

    Raises:
        Finding: it was neither.
    """
    ends = set()
    for channels in (1, 3):
        for suffices in (None, lambda shape: min(shape) >= 8):
            try:
                with patience(PATIENCE):
                    pixels = decode(data, channels, suffices)
            except Undecodable as error:
                if not str(error).strip():
                    raise Finding(f"{name}: refused without a reason") from error
                ends.add("refused")
            except Exception as error:
                raise Finding(f"{name}: {_shown(error)}") from error
            else:
                if pixels.dtype != np.uint8 or pixels.shape[2:] != (channels,):
                    raise Finding(f"{name}: {pixels.dtype}{pixels.shape}")
                ends.add("read")
    # Whether a file can be read does not depend on what is asked for.
    if len(ends) > 1:
        raise Finding(f"{name}: read in one way and refused in another")
    return ends.pop()


def fuzz_images(
    count: int, seed: int, folder: pathlib.Path, workers: int = 0
) -> tuple[collections.Counter, list[str]]:
    """Reads so many damaged files, one by one and as a run does; returns how they
    ended, and what should not have been."""
    rng, sound = random.Random(f"images {seed}"), samples()
    ends, found, refused = collections.Counter(), [], set()
    for i in range(count):
        name, data = mutated(rng, sound)
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"  # whatever it holds
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        # As many that can be read: a run gives up where nothing stands in for a record.
        path.with_name(f"{i}-sound.png").write_bytes(sound["PNG rough"])
        try:
            end = one_image(f"case {i}: {name}", data)
        except Finding as error:
            end = "findings"
            found.append(str(error))
        ends[end] += 1
        if end == "refused":
            refused.add(str(path))
    (folder / "val" / "a").mkdir(parents=True)
    (folder / "val" / "b").mkdir()
    (folder / "val" / "a" / "0.png").write_bytes(sound["PNG rough"])
    source = Folder(path=str(folder))
    data = Input(source=source, image_size=(16, 16), workers=workers, threads=2)
    with train_batches(data, seed=seed, batch_size=2 * count, stop=1) as batches:
        (batch,) = [{name: np.array(it) for name, it in one.items()} for one in batches]
    told = {source.name_of(i) for i in batch["index"][batch["replaced"]].tolist()}
    with eval_batches(data, batch_size=2 * count, source=source) as batches:
        (shown,) = [{name: np.array(it) for name, it in one.items()} for one in batches]
    left = {source.name_of(i) for i in shown["index"][~shown["valid"]].tolist()}
    for word, names in (("replaced", told), ("left out", left)):
        found += [f"{name}: not {word}" for name in refused - names]
        found += [f"{name}: {word}, and it can be read" for name in names - refused]
    ends["replaced in a batch"], ends["left out of a pass"] = len(told), len(left)
    for index in batch["index"][batch["replaced"]].tolist():
        if not why_unreadable(data, index):
            found.append(f"{source.name_of(index)}: replaced, and nothing says why")
    return ends, found


def _shown(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
    return f"{type(error).__name__} at {where}: {str(error)[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["leaves", "images"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    if given.what == "leaves":
        ends, found = fuzz_leaves(given.count, given.seed, trees())
    else:
        with tempfile.TemporaryDirectory() as folder:
            where = pathlib.Path(folder)
            ends, found = fuzz_images(given.count, given.seed, where, given.workers)
    print("\n".join(found))
    shown = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    print(f"{given.count} {given.what}, seed {given.seed}: {shown}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
