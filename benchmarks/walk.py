# SPDX-License-Identifier: Apache-2.0
"""Every function of the package that one training step runs, and its lines of code.

    python benchmarks/walk.py [--config=configs/mae.py:digits] [--attention=plain]

traces one step of a config on one CPU device and lists, by file, the functions that
were entered and how many lines of code they have: docstrings, comments and blank lines
do not count, nor does a line of a function that was only defined. This is what a reader
has to read to know the whole step. README states the sums; tests/walk_test.py compares
them with what this script finds.
"""

import argparse
import ast
import io
import pathlib
import sys
import tokenize

import jax

import mim_jax
from mim_jax import config, train
from mim_jax.plan import Plan

PACKAGE = pathlib.Path(mim_jax.__file__).parent
_NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
)


def entered(plan: Plan) -> dict[pathlib.Path, set[int]]:
    """First lines of the functions that tracing one step enters, by file."""
    found: dict[pathlib.Path, set[int]] = {}

    def note(frame, event, argument):
        del argument
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            lines = found.setdefault(pathlib.Path(code.co_filename), set())
            lines.add(code.co_firstlineno)

    state, batch = plan.abstract_state(), plan.abstract_batch()
    jitted = jax.jit(train.step_of(plan))
    sys.setprofile(note)
    try:
        jitted.trace(state, batch)
    finally:
        sys.setprofile(None)
    return found


def functions(path: pathlib.Path, firsts: set[int]) -> dict[str, int]:
    """Lines of code of the functions of a file that begin at those lines, by name; a
    function inside another one counts with the outer one."""
    source = path.read_text()
    tree, code = ast.parse(source), _lines_of_code(source)
    found: dict[str, int] = {}
    counted: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(one.lineno for one in decorators)])
        if first not in firsts and node.lineno not in firsts:
            continue
        lines = set(range(first, (node.end_lineno or first) + 1)) & code - counted
        if lines:
            name = getattr(node, "name", "lambda")
            found[name] = found.get(name, 0) + len(lines)
        counted |= lines
    return found


def _lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) is not None and first is not None:
                lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return lines


def walk(name: str, attention: str) -> dict[str, dict[str, int]]:
    """Lines of code by file, relative to the package, and by function."""
    tree = config.read(name)
    tree.attention = attention
    plan = Plan.of(tree, jax.devices()[:1])
    found = {
        str(path.relative_to(PACKAGE)): functions(path, firsts)
        for path, firsts in sorted(entered(plan).items())
    }
    return {path: names for path, names in found.items() if names}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mae.py:digits")
    parser.add_argument("--attention", default="plain", help="form; or auto")
    args = parser.parse_args()
    found = walk(args.config, args.attention)
    for path, names in found.items():
        listed = ", ".join(f"{name} {lines}" for name, lines in names.items())
        print(f"{sum(names.values()):4d}  {path}: {listed}")
    total = sum(sum(names.values()) for names in found.values())
    print(f"{total:4d}  lines of code in {len(found)} files")


if __name__ == "__main__":
    main()
