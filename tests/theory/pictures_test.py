# SPDX-License-Identifier: Apache-2.0
"""Pictures show what was found, and curves the masks that training draws."""

import matplotlib.colors
import networkx as nx
import numpy as np
import pytest
from small_graphs import both_sides

from mim_jax.theory import Tree, curves, locate, pictures
from mim_jax.theory.__main__ import graph_of, main, names_of
from mim_jax.theory.locating import Graph


def toy():
    return graph_of("binary:8")


def test_layout_has_no_overlap_and_latents_stand_above_their_children():
    for case in both_sides(60):
        model = Graph.of(case.graph())
        place = pictures.layout(model)
        assert place.keys() == model.level.keys()
        for node, (x, level) in place.items():
            assert level == model.level[node]
            others = [u for v, (u, y) in place.items() if y == level and v != node]
            assert all(abs(u - x) > 1 - 1e-9 for u in others)
    place = pictures.layout(Graph.of(toy()))
    for node, (x, _) in place.items():
        below = [place[child][0] for child in toy().succ[node]]
        assert not below or x == pytest.approx(np.mean(below))


def test_neighbours_are_moved_apart_as_little_as_possible():
    wanted = {"a": 0.0, "b": 0.2, "c": 0.4, "d": 5.0}
    found = pictures._apart(wanted)
    # Three nodes at distance 1 around the mean of what they want, 0.2.
    assert found == pytest.approx({"a": -0.8, "b": 0.2, "c": 1.2, "d": 5.0})


def test_colours_are_those_of_the_legend():
    found = locate(toy(), ["x0", "x1"], "frontier")
    figure = pictures.draw({"mask": found})
    (axis,) = figure.axes
    place = pictures.layout(found.graph)
    legend = {
        text.get_text(): handle.get_color()
        for text, handle in zip(
            figure.legends[0].get_texts(),
            figure.legends[0].legend_handles,
            strict=True,
        )
    }
    shown = {}
    for marks in axis.collections:
        ((x, y),) = marks.get_offsets()
        if len(marks.get_paths()[0]) > 4:  # no cross
            shown[round(float(x), 6), float(y)] = matplotlib.colors.to_hex(
                marks.get_facecolor()[0]
            )
    for node, (x, y) in place.items():
        colour = shown[round(x, 6), y]
        assert (colour == legend["in c"]) == (node in found.c)
        assert (colour == legend["its noise is in $s_m$"]) == (node in found.s_m)
    assert {text.get_text() for text in axis.texts} == set(toy())


@pytest.mark.parametrize("length", [6, 32])
def test_intervals_are_all_intervals(length):
    hidden = curves.interval(length)
    starts = hidden.argmax(axis=1)
    want = [np.isin(np.arange(64), range(s, s + length)) for s in starts]
    np.testing.assert_array_equal(hidden, want)
    every = [np.isin(np.arange(64), range(s, s + length)) for s in range(65 - length)]
    tree = Tree.regular(2, 6)
    found, exact = (curves.level(tree, np.array(h)) for h in (hidden, every))
    assert found.mean == pytest.approx(exact.mean, abs=0.16)


def test_squares_and_units_are_those_of_the_maskings():
    hidden = curves.block(7).reshape(-1, 32, 32)
    assert (hidden.any(axis=1).sum(axis=1) == 7).all()
    assert (hidden.any(axis=2).sum(axis=1) == 7).all()
    assert (hidden.sum(axis=(1, 2)) == 49).all()
    tree = Tree.quadtree(5)
    point = curves.level(tree, curves.quadtree(0.75, 8))
    assert point.mean == pytest.approx(4, abs=0.02)
    assert curves.level(tree, curves.quadtree(0.25)).size == pytest.approx(174, abs=2)


def test_ratios_that_so_few_units_do_not_have_are_left_out():
    tree = Tree.quadtree(5)
    found = curves.by_ratio(lambda r: curves.quadtree(r, 16), tree, (0.1, 0.5, 0.9))
    assert list(found) == [0.1, 0.5]
    assert found[0.1].mean == found[0.5].mean == 5


def test_the_command_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "c.png"
    assert main(["locate", "binary:8", "--hidden=x0-x3", f"--picture={picture}"]) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["c"] == "z1 (level 3)"
    assert lines["s_m"].endswith("x0, x1, x2, x3, z2, z4, z5")
    assert picture.read_bytes().startswith(b"\x89PNG")
    edges = tmp_path / "graph.txt"
    edges.write_text("r u\nr v\n\nu x\nu y\nv z\n")
    assert main(["locate", str(edges), "--hidden=x,z", "--reading=frontier"]) == 0
    assert "c             r (level 2), u (level 1)" in capsys.readouterr().out


def test_names_and_trees():
    assert names_of("x0,x3-x5,a-b") == ["x0", "x3", "x4", "x5", "a-b"]
    assert set(graph_of("quadtree:2")) == {"z1", "x0", "x1", "x2", "x3"}
    want = [("z3", "z6"), ("z3", "z7"), ("z6", "x4"), ("z6", "x5"), ("z7", "x6")]
    assert set(want) <= set(toy().edges) and nx.is_arborescence(toy())


@pytest.mark.parametrize(
    "command, message",
    [
        (["binary:6", "--hidden=x0"], "binary:6: want binary:N, N a power of two"),
        (["binary:8", "--hidden=x9"], "hidden 'x9' is no node of the graph"),
        (["absent.txt", "--hidden=x9"], "absent.txt"),
        (["wrong.txt", "--hidden=x"], "line 2: 'z x y' has 3 words: want a parent and"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.txt").write_text("z w\nz x y\n")
    assert main(["locate", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
