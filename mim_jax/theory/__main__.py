# SPDX-License-Identifier: Apache-2.0
"""What a mask divides, printed and drawn.

python -m mim_jax.theory locate binary:8 --hidden=x0,x1 --picture=c.png
python -m mim_jax.theory curves curves.png

`locate` takes `binary:LEAVES`, `quadtree:SIDE`, or a file with an edge on each line: a
parent and a child, such as "z1 x0". In the trees, latents are z1, z2, ... from the root
down and pixels x0, x1, ...; --hidden may have ranges, such as x0-x5. `curves` draws the
level of c against mask ratio and unit, for the masks that training draws.
"""

import argparse
import sys
from collections.abc import Iterable

import networkx as nx

from mim_jax.theory.locating import READINGS, Located, locate
from mim_jax.theory.trees import Tree

EXIT_CONFIG = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 if the command cannot work."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def graph_of(name: str) -> nx.DiGraph:
    """The graph that a name or a file stands for.

    Raises:
        ValueError: no such tree, or the file has a line that is no edge.
        OSError: the file cannot be read.
    """
    kind, _, size = name.partition(":")
    if kind in ("binary", "quadtree") and size:
        number = int(size) if size.isdecimal() else 0
        levels = number.bit_length() - 1
        if number < 2 or 2**levels != number or levels > 10:
            raise ValueError(f"{name}: want {kind}:N, N a power of two from 2 to 1024")
        tree = Tree.regular(2, levels) if kind == "binary" else Tree.quadtree(levels)
        return nx.relabel_nodes(tree.graph(), dict(enumerate(tree.names)))
    graph = nx.DiGraph()
    with open(name) as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if len(words) not in (0, 2):
                raise ValueError(
                    f"{name}, line {number}: {line.strip()!r} has {len(words)} words: "
                    "want a parent and a child"
                )
            if words:
                graph.add_edge(*words)
    return graph


def names_of(text: str) -> list[str]:
    """The names in a list such as "x0,x3-x5"."""
    found = []
    for word in filter(None, text.split(",")):
        first, _, last = word.partition("-")
        numbers = first[1:], last[1:]
        if first[:1] == last[:1] and all(n.isdecimal() for n in numbers):
            low, high = map(int, numbers)
            found += [f"{first[0]}{n}" for n in range(low, high + 1)]
        else:
            found.append(word)
    return found


def _locate(options: argparse.Namespace) -> None:
    graph = graph_of(options.graph)
    found = locate(graph, names_of(options.hidden), options.reading)
    for line in lines(found):
        print(line)
    if options.picture:
        from mim_jax.theory import pictures  # imports matplotlib

        pictures.draw({options.graph: found}).savefig(options.picture)


def _curves(options: argparse.Namespace) -> None:
    from mim_jax.theory import curves  # imports JAX

    curves.draw().savefig(options.file)


def lines(found: Located) -> list[str]:
    """What was found, in words."""
    levels = ", ".join(f"{v} (level {found.levels[v]})" for v in _sorted(found.c))
    visible = ", ".join(_sorted(found.s_mc)) or "-"
    if found.s_mc_latents:
        visible = f"{', '.join(_sorted(found.s_mc_latents))}; noises of {visible}"
    return [
        f"reading       {found.reading}",
        f"c             {levels or '-'}",
        f"s_m           noises of {', '.join(_sorted(found.s_m)) or '-'}",
        f"s_mc          {visible} (one choice of several)",
        f"dimensions    c {found.c_dimension}, s_m {found.s_m_dimension}, "
        f"s_mc {found.s_mc_dimension}; shared noises {found.information}",
        f"mean level    {found.mean_level:.3f}",
    ]


def _sorted(nodes: Iterable) -> list[str]:
    return sorted(map(str, nodes), key=lambda name: (len(name), name))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mim_jax.theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="locate|curves")
    one = commands.add_parser("locate", help="find c, s_m and s_mc of a mask")
    one.add_argument("graph", help="binary:LEAVES, quadtree:SIDE, or a file of edges")
    one.add_argument("--hidden", required=True, help="pixels, as x0,x3-x5")
    one.add_argument("--reading", default=READINGS[0], choices=READINGS)
    one.add_argument("--picture", help="file to draw the graph into")
    one.set_defaults(run=_locate)
    one = commands.add_parser("curves", help="draw the level of c by ratio and unit")
    one.add_argument("file", help="file to draw into")
    one.set_defaults(run=_curves)
    return parser


if __name__ == "__main__":
    sys.exit(main())
