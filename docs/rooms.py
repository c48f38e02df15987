# SPDX-License-Identifier: Apache-2.0
"""Draws docs/rooms.png: the rooms of mim_jax, and which room imports which.

    python docs/rooms.py [FILE.png]

A room is a folder of the package, or a module of its root. Every import statement is
read, also those inside functions. A room stands above all rooms that it imports. An
import that a longer way through other rooms implies has no line.
"""

import ast
import pathlib
import sys

from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mim_jax"
_ABOUT = {
    "main": "the program",
    "train": "the step, the loop",
    "plan": "all choices, resolved",
    "evaluate": "one measurement",
    "compare": "runs on one page",
    "config": "jobs, tables",
    "trees": "config trees",
    "schema": "marks of fields",
    "state": "what a step carries",
    "optim": "optimisers",
    "sharding": "the device mesh",
    "presets": "embedded sizes",
    "run": "keeping a run",
    "objectives": "what is learned",
    "maskings": "what is hidden",
    "tokenizers": "tokens of patches",
    "models": "Flax networks",
    "kernels": "forms of attention",
    "ops": "arrays in, arrays out",
    "evals": "what is measured",
    "data": "records to batches",
    "aot": "compile without devices",
}


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, by name."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        below = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package, *rest = node.module.split(".")
            if package == "mim_jax":
                below |= {rest[0]} if rest else {one.name for one in node.names}
    rooms = found.keys()
    return {room: (below & rooms) - {room} for room, below in found.items()}


def closure(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms that each room imports, directly or through others."""
    reached = {room: set(below) for room, below in edges.items()}
    for _ in edges:
        for below in reached.values():
            below |= set().union(*(reached[other] for other in below))
    return reached


def direct(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that no longer way implies: the lines of the picture."""
    reached = closure(edges)

    def implied(room: str, other: str) -> bool:
        # Rooms that import each other imply nothing about each other.
        between = [
            one
            for one in edges[room] - {other}
            if room not in reached[one] and one not in reached[other]
        ]
        return any(other in reached[one] for one in between)

    return {
        room: {other for other in below if not implied(room, other)}
        for room, below in edges.items()
    }


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """The height of each room: 0 if it imports none, else above all that it imports.

    Rooms that import each other, through different modules, share a height.
    """
    reached = closure(edges)
    height = dict.fromkeys(edges, 0)
    for _ in edges:
        for room, below in edges.items():
            for other in below:
                least = height[other] + (room not in reached[other])
                height[room] = max(height[room], least)
    return height


def draw(edges: dict[str, set[str]]) -> Figure:
    """The picture: a box per room, a line from each room down to those it imports."""
    height = levels(edges)
    rows = sorted(set(height.values()))
    figure = Figure(figsize=(13, 1.25 * len(rows) + 0.6), dpi=110)
    axis = figure.subplots()
    place = {}
    for y, level in enumerate(rows):
        names = sorted(name for name in edges if height[name] == level)
        for i, name in enumerate(names):
            # Rows are shifted against each other, so that lines do not lie on boxes.
            place[name] = ((i + 0.5) / len(names) + 0.03 * (-1) ** y, y)
    for colour, (room, below) in enumerate(sorted(direct(edges).items())):
        for other in sorted(below):
            (x, y), (u, v) = place[room], place[other]
            axis.plot(
                *([x, u], [y - 0.2, v + 0.2]),
                color=f"C{colour % 10}",
                lw=1.1,
                alpha=0.7,
                zorder=1,
            )
    for name, (x, y) in place.items():
        folder = (PACKAGE / name).is_dir()
        axis.text(
            *(x, y, f"{name}{'/' if folder else '.py'}\n{_ABOUT.get(name, '')}"),
            ha="center",
            va="center",
            fontsize=8.5,
            zorder=2,
            bbox=dict(
                boxstyle="round,pad=0.45",
                fc="#fdf3d8" if folder else "#e3eefb",
                ec="#666666",
                lw=0.8,
            ),
        )
    axis.set_xlim(-0.04, 1.06)
    axis.set_ylim(-0.5, len(rows) - 0.5)
    axis.set_axis_off()
    axis.set_title(
        "Rooms of mim_jax: folders yellow, modules blue. Lines go down to the rooms "
        "that a room imports; what a longer way implies has no line.",
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def main() -> None:
    """Write the picture, and print the imports."""
    edges = imports()
    target = sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "rooms.png"
    draw(edges).savefig(target)
    for room, below in sorted(edges.items()):
        print(f"{room}: {', '.join(sorted(below)) or '-'}")


if __name__ == "__main__":
    main()
