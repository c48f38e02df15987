# SPDX-License-Identifier: Apache-2.0
"""Draws which room of the package imports which, from the import statements.

    python docs/rooms.py [PICTURE]

writes docs/rooms.svg, or PICTURE, and prints the imports as a list. The picture states
that list in its metadata, which tests/walk_test.py compares with the code.

A room is a folder of the package, or a module of its root. Every import statement is
read, also those inside functions. An arrow goes down from a room to one that it
imports. An import that a longer way through other rooms implies has no arrow. A folder
of which one part imports the modules above it, and another part is imported by them,
is drawn as two boxes.
"""

import ast
import pathlib
import sys

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mim_jax"
# What a box says of its room; tests/walk_test.py wants a line for each room.
ABOUT = {
    "main": "the program",
    "train": "the step, the loop",
    "plan": "all choices, made",
    "evaluate": "one evaluation",
    "compare": "runs on one page",
    "explore": "runs, tried by hand",
    "studies": "tables of the papers",
    "config": "jobs, plug-in tables",
    "trees": "config trees",
    "schema": "fields as leaves",
    "state": "what a step carries",
    "optim": "optimisers",
    "sharding": "the device mesh",
    "presets": "small sizes",
    "run": "keeping a run",
    "objectives": "what is learned",
    "maskings": "what is hidden",
    "tokenizers": "tokens of patches",
    "models": "Flax networks",
    "kernels": "forms of attention",
    "theory": "what masks divide",
    "ops": "arrays in, arrays out",
    "evals": "what is measured",
    "data": "records to batches",
    "aot": "compile, no device",
    "weights": "files in and out",
    "interop": "weights as files",
}
_BOX, _ARROW = 1.0, 0.22  # widths that a box and an arrow take in a row

Edges = dict[str, set[str]]


def module_imports() -> Edges:
    """The modules of the package that each module imports, as `run.log`."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    names.pop("__init__")  # only the version and what `interop` has
    names.pop("__main__")  # it runs main
    found: Edges = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            package, _, inner = node.module.partition(".")
            if package != "mim_jax":
                continue
            for alias in node.names:
                longer = f"{inner}.{alias.name}".lstrip(".")
                found[name].add(longer if longer in names else inner)
        found[name] -= {name, ""}
    return found


def imports(modules: Edges | None = None) -> Edges:
    """The rooms that each room imports."""
    found: Edges = {}
    for name, below in (module_imports() if modules is None else modules).items():
        room = name.partition(".")[0]
        others = {other.partition(".")[0] for other in below} - {room}
        found[room] = found.get(room, set()) | others
    return found


def boxes(modules: Edges) -> dict[str, str]:
    """The box of each module: its room; or "ROOM, above" and "ROOM, below" for modules
    of a folder that reach the rooms which the folder is in a circle with, and for
    those that do not."""
    reached, rooms = closure(modules), closure(imports(modules))
    found = {}
    for name in modules:
        room = name.partition(".")[0]
        circle = {other for other in rooms[room] if room in rooms[other]} - {room}
        if circle and (PACKAGE / room).is_dir():
            if name == room:
                continue  # its __init__.py, which is in neither part
            upper = any(other.partition(".")[0] in circle for other in reached[name])
            room += ", above" if upper else ", below"
        found[name] = room
    return found


def closure(edges: Edges) -> Edges:
    """What each node reaches, directly or through others."""
    reached = {name: set(below) for name, below in edges.items()}
    for _ in edges:
        for below in reached.values():
            below |= set().union(*(reached[other] for other in below))
    return reached


def arrows(modules: Edges) -> Edges:
    """The imports between boxes that no longer way implies."""
    box_of = boxes(modules)
    edges: Edges = {box: set() for box in box_of.values()}
    for name, box in box_of.items():
        edges[box] |= {box_of[one] for one in modules[name] if one in box_of} - {box}
    reached = closure(edges)
    return {
        box: {
            other
            for other in below
            if not any(other in reached[one] for one in below - {other})
        }
        for box, below in edges.items()
    }


def rows(edges: Edges) -> dict[str, int]:
    """The row of each box, 0 the lowest: above all that it imports, and no lower than
    just below the lowest box that imports it."""
    row = dict.fromkeys(edges, 0)
    for _ in edges:
        for box, below in edges.items():
            row[box] = max([row[box], *(row[other] + 1 for other in below)])
    above = {box: [one for one in edges if box in edges[one]] for box in edges}
    for box in sorted(edges, key=lambda box: -row[box]):
        if len(above[box]) >= len(edges[box]) and above[box]:
            row[box] = min(row[one] for one in above[box]) - 1
    return row


def layout(edges: Edges) -> tuple[dict[str, tuple[float, int]], list[list[str]]]:
    """(x, row) of each box and of each point that an arrow passes, and the arrows as
    lists of these."""
    row = rows(edges)
    ways = []
    for box, below in sorted(edges.items()):
        for other in sorted(below):
            between = range(row[box] - 1, row[other], -1)
            ways.append([box, *(f"{box}>{other}@{y}" for y in between), other])
    height = row | {
        point: row[way[0]] - i for way in ways for i, point in enumerate(way)
    }
    near: dict[str, list[str]] = {name: [] for name in height}
    for way in ways:
        for one, other in zip(way, way[1:], strict=False):
            near[one].append(other)
            near[other].append(one)
    levels = [
        sorted(name for name in height if height[name] == y)
        for y in range(max(height.values()) + 1)
    ]
    x = {name: float(i) for level in levels for i, name in enumerate(level)}
    for sweep in range(60):
        for level in levels if sweep % 2 else levels[::-1]:
            wanted = {
                name: sum(x[one] for one in near[name]) / len(near[name])
                if near[name]
                else x[name]
                for name in level
            }
            level.sort(key=lambda name: (wanted[name], name))
            x |= _spaced(level, wanted)
    return {name: (x[name], height[name]) for name in height}, ways


def _spaced(level: list[str], wanted: dict[str, float]) -> dict[str, float]:
    """Places of a row near the wanted ones, in that order, that do not overlap."""
    half = [(_ARROW if "@" in name else _BOX) / 2 for name in level]
    gaps = [a + b for a, b in zip(half, half[1:], strict=False)]
    starts = [0.0]
    for gap in gaps:
        starts.append(starts[-1] + gap)
    # Isotonic regression of the offsets: pools neighbours that would overlap.
    pools: list[list[float]] = []
    for name, start in zip(level, starts, strict=True):
        pools.append([wanted[name] - start])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    offsets = [_mean(pool) for pool in pools for _ in pool]
    return {
        name: start + offset
        for name, start, offset in zip(level, starts, offsets, strict=True)
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(modules: Edges) -> Figure:
    """The picture: a box for each room, arrows down to what it imports."""
    edges = arrows(modules)
    place, ways = layout(edges)
    across = [x for x, _ in place.values()]
    left, right = min(across) - 0.55, max(across) + 0.55
    top = max(y for _, y in place.values()) + 0.5
    figure = Figure(figsize=(1.75 * (right - left), 1.05 * (top + 0.5)), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))
    colours = {box: f"C{i % 10}" for i, box in enumerate(sorted(edges))}
    for way in ways:
        axis.add_patch(_arrow([place[name] for name in way], colours[way[0]]))
    for box in edges:
        folder = (PACKAGE / box.partition(",")[0]).is_dir()
        axis.text(
            *(*place[box], _label(box, modules)),
            ha="center",
            va="center",
            fontsize=9,
            linespacing=1.3,
            bbox=dict(
                boxstyle="round,pad=0.4",
                fc="#fdf3d8" if folder else "#e3eefb",
                ec="#666666",
                lw=0.8,
            ),
            zorder=3,
        )
    axis.set_xlim(left, right)
    axis.set_ylim(-0.5, top)
    axis.set_axis_off()
    return figure


def _label(box: str, modules: Edges) -> str:
    room, _, part = box.partition(", ")
    folder = (PACKAGE / room).is_dir()
    title = f"{room}{'/' if folder else '.py'}"
    if not part:
        return f"{title}\n{ABOUT[room]}"
    inside = sorted(
        name.partition(".")[2] for name, one in boxes(modules).items() if one == box
    )
    half = -(-len(inside) // 2)
    return "\n".join([title, ", ".join(inside[:half]), ", ".join(inside[half:])])


def _arrow(points: list[tuple[float, int]], colour: str) -> FancyArrowPatch:
    """A smooth line down through the points, with a head."""
    (x, y), *rest = points
    vertices, codes = [(x, y - 0.2)], [Path.MOVETO]
    for i, (u, v) in enumerate(rest):
        end = v + (0.27 if i == len(rest) - 1 else 0)
        start = vertices[-1]
        middle = (start[1] + end) / 2
        vertices += [(start[0], middle), (u, middle), (u, end)]
        codes += [Path.CURVE4] * 3
    return FancyArrowPatch(
        path=Path(vertices, codes),
        arrowstyle="-|>",
        mutation_scale=9,
        color=colour,
        lw=1.2,
        alpha=0.8,
        zorder=1,
    )


def listing(edges: Edges) -> str:
    """One line a room: what it imports."""
    return "\n".join(
        f"{room}: {', '.join(sorted(below)) or '-'}"
        for room, below in sorted(edges.items())
    )


def main() -> None:
    """Write the picture, and print the imports."""
    modules = module_imports()
    target = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "docs" / "rooms.svg")
    listed = listing(imports(modules))
    # The same code gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "rooms"
    about = {"Description": listed}
    if target.endswith(".svg"):
        about["Date"] = None
    draw(modules).savefig(target, metadata=about)
    print(listed)


if __name__ == "__main__":
    main()
