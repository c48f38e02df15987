# SPDX-License-Identifier: Apache-2.0
"""`locate` equals a search over all sets, and keeps what Theorem 1 promises."""

import itertools
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
from small_graphs import both_sides, draw, least, separators

from mim_jax.theory import locate

READINGS = ("invertible", "frontier", "separator")


def check_least(case, reading, every_w=False):
    found = locate(case.graph(), case.hidden, reading)
    (want,) = least(case, reading, every_w)  # it is unique
    assert (found.c, found.s_m) == want, case
    assert found.c_dimension == min_dimension(case, reading, found.c)


def min_dimension(case, reading, c):
    up = case.closure()
    if reading == "invertible":
        return sum(case.weight(up[v]) for v in c)
    return sum(case.dimension[v] for v in c)


@pytest.mark.parametrize("reading", ["invertible", "frontier"])
def test_c_and_s_m_are_the_least_of_all_sets(reading):
    for seed in range(400):
        check_least(draw(seed), reading)


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["invertible", "frontier"])
def test_c_and_s_m_are_the_least_of_all_pairs_of_sets(reading):
    for seed in range(1500):
        check_least(draw(seed), reading, every_w=True)
    for seed in range(1500):
        check_least(draw(seed, (4, 7), (3, 5)), reading)


def check_separator(case):
    found = locate(case.graph(), case.hidden, "separator")
    weight, sets = separators(case)
    assert found.c_dimension == weight and found.c in sets, case


def test_a_separator_is_the_least_of_all_that_separate():
    for case in both_sides(250):
        check_separator(case)


@pytest.mark.slow
def test_a_separator_is_the_least_of_all_that_separate_in_many_graphs():
    for case in both_sides(2000):
        check_separator(case)


def test_of_several_separators_the_one_closest_to_the_hidden_pixels_is_taken():
    graph = nx.DiGraph([("r", "a"), ("r", "b"), ("r", "d")])
    graph.add_edges_from([("a", "a0"), ("a", "a1"), ("b", "b0"), ("d", "d0")])
    assert locate(graph, ["a0", "b0"], "separator").c == {"a", "b"}
    # A chain: every link separates.
    chain = nx.DiGraph([("r", "u"), ("u", "v"), ("v", "x"), ("r", "y")])
    assert locate(chain, ["x"], "separator").c == {"v"}
    assert locate(chain, ["y"], "separator").c == {"r"}
    chain.nodes["v"]["dimension"] = 2
    assert locate(chain, ["x"], "separator").c == {"u"}


def test_a_separator_does_not_open_a_collider():
    graph = nx.DiGraph([("p", "x1"), ("p", "v"), ("q", "v"), ("q", "y"), ("v", "x2")])
    for node, dimension in dict(p=3, q=2).items():
        graph.nodes[node]["dimension"] = dimension
    # Given v, the cheapest, its parents p and q depend on each other.
    assert locate(graph, ["x1", "x2"], "separator").c == {"q"}


def test_readings_are_ordered_and_separate():
    for case in both_sides(500):
        graph = case.graph()
        literal, frontier, cut = (locate(graph, case.hidden, r) for r in READINGS)
        assert literal.c <= frontier.c
        assert cut.c_dimension <= frontier.c_dimension
        sides = set(case.hidden), set(case.visible)
        assert nx.is_d_separator(graph, *sides, set(frontier.c))


def test_both_sides_share_the_same():
    for case in both_sides(500):
        one, other = (
            locate(case.graph(), side) for side in (case.hidden, case.visible)
        )
        assert one.c == other.c and one.shared == other.shared
        assert one.s_mc == other.s_m and one.s_m == other.s_mc


@pytest.mark.parametrize("reading", READINGS)
def test_names_and_unused_latents_do_not_matter(reading):
    rng = np.random.default_rng(0)
    for case in both_sides(200):
        want = locate(case.graph(), case.hidden, reading)
        names = [f"n{i}" for i in rng.permutation(len(case.parents))]
        graph = case.graph(names)
        graph.add_node("unused", latent=True)
        graph.add_edge(names[0], "unused")
        found = locate(graph, [names[node] for node in case.hidden], reading)
        if reading == "separator":  # several may be as small
            assert found.c_dimension == want.c_dimension
            continue
        assert found.c == {names[node] for node in want.c}
        assert found.s_m == {names[node] for node in want.s_m}


@pytest.mark.parametrize("reading", READINGS)
def test_nothing_is_shared_without_two_sides(reading):
    for seed in range(40):
        case = draw(seed)
        pixels = case.hidden | case.visible
        empty = locate(case.graph(), [], reading)
        assert not empty.c and not empty.s_m and np.isnan(empty.mean_level)
        full = locate(case.graph(), pixels, reading)
        ancestors = {node for node in pixels}
        for node in pixels:
            ancestors |= nx.ancestors(case.graph(), node)
        assert not full.c and full.s_m == ancestors and not full.s_mc


# Figure 4: z1 -> z2, z3; z2 -> z4, z5; z3 -> z6, z7; two pixels below each of z4 to z7.
TOY = nx.DiGraph((f"z{i // 2}", f"z{i}") for i in range(2, 8))
TOY.add_edges_from((f"z{4 + i // 2}", f"x{i}") for i in range(8))
ALL = {f"x{i}" for i in range(8)}


@pytest.mark.parametrize(
    "hidden, reading, c, mean",
    [
        ({"x0"}, "invertible", {"z4"}, 1),
        (ALL - {"x7"}, "invertible", {"z7"}, 1),
        (ALL - {"x7"}, "frontier", {"z1", "z3", "z7"}, 2),
        ({"x0", "x1", "x2", "x3"}, "invertible", {"z1"}, 3),
        ({"x0", "x1"}, "invertible", {"z2"}, 2),
        ({"x0", "x2", "x4", "x6"}, "invertible", {"z4", "z5", "z6", "z7"}, 1),
    ],
)
def test_the_masks_of_figure_4(hidden, reading, c, mean):
    found = locate(TOY, hidden, reading)
    assert found.c == c and found.mean_level == mean


def test_dimensions_and_levels_by_hand():
    graph = nx.DiGraph([("r", "u"), ("r", "v"), ("u", "x"), ("u", "y"), ("v", "z")])
    for node, dimension in dict(r=np.int64(2), u=3, v=5, x=7, z=11).items():
        graph.nodes[node]["dimension"] = dimension
    found = locate(graph, ["x", "z"])
    assert found.c == {"u"} and found.levels == {"u": 1}
    assert found.c_dimension == 5 and found.information == 5
    assert found.s_m == {"v", "x", "z"} and found.s_m_dimension == 23
    assert found.s_mc == {"y"} and found.s_mc_dimension == 1
    other = locate(graph, ["x", "z"], "frontier")
    assert other.c == {"r", "u"} and other.c_dimension == 5
    # Two members share the noise of the root: it counts twice in c, once as shared.
    graph.add_edge("v", "w")
    both = locate(graph, ["x", "z"])
    assert both.c == {"u", "v"} and both.c_dimension == 12 and both.information == 10


def test_two_ways_to_write_s_mc():
    found = locate(TOY, ALL - {"x7"}, "frontier")
    assert found.s_mc == {"x7"} and not found.s_mc_latents
    found = locate(TOY, {"x0"}, "frontier")
    assert found.c == {"z4"}
    assert found.s_mc_latents == {"z1", "z2"}
    assert found.s_mc == {"z3", "z5", "z6", "z7"} | (ALL - {"x0"})
    noises = locate(TOY, {"x0"}, "frontier", style="noises")
    assert not noises.s_mc_latents
    assert noises.s_mc == {f"z{i}" for i in (1, 2, 3, 5, 6, 7)} | (ALL - {"x0"})


def graph_with(*edges, **attributes):
    made = nx.DiGraph(edges)
    for node, about in attributes.items():
        made.nodes[node].update(about)
    return made


EDGES = (("z", "x"), ("z", "y"))


@pytest.mark.parametrize(
    "graph, hidden, message",
    [
        (graph_with(*EDGES, ("x", "z")), [], "node '[xz]' is its own ancestor"),
        (graph_with(*EDGES, ("z", "z")), [], "node 'z' is its own ancestor"),
        (graph_with(*EDGES), ["q"], "hidden 'q' is no node"),
        (graph_with(*EDGES), ["x", "x"], "hidden 'x' comes twice"),
        (graph_with(*EDGES), ["z"], "hidden 'z' has children: want names of pixels"),
        (graph_with(*EDGES, x=dict(latent=True)), ["x"], "hidden 'x' is a latent"),
        (
            graph_with(*EDGES, ("x", "y"), x=dict(latent=False)),
            ["y"],
            r"node 'x' is a pixel \(latent=False\) and has children",
        ),
        (graph_with(*EDGES, z=dict(dimension=0)), [], "node 'z' has dimension=0"),
        (graph_with(*EDGES, y=dict(dimension=1.5)), [], "node 'y' has dimension=1.5"),
        (nx.Graph(EDGES), [], "no directions: want a networkx.DiGraph"),
    ],
)
def test_what_cannot_be_located_is_named(graph, hidden, message):
    with pytest.raises(ValueError, match=message):
        locate(graph, hidden)


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="reading='literal': want one of"):
        locate(TOY, ["x0"], "literal")
    with pytest.raises(ValueError, match="style='both': want one of"):
        locate(TOY, ["x0"], style="both")


def test_it_is_importable_alone():
    program = """
import sys
import mim_jax.theory
heavy = {"jax", "flax", "matplotlib", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Linear models: a node is a matrix whose columns are the noises.

RTOL = 1e-9


def scalar_model(case, seed):
    """Rows of each node over all noises; noises have dimension 1."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(case.parents),) * 2)
    for node, above in enumerate(case.parents):
        for parent in above:
            rows[node] += rng.choice([-1, 1]) * rng.uniform(0.5, 1.5) * rows[parent]
        rows[node, node] = rng.uniform(0.5, 1.5)
    return rows


def invertible_model(case, seed):
    """A matrix for each node: an orthogonal map of its parents and its noise."""
    rng = np.random.default_rng(seed)
    noises, found = np.eye(len(case.parents)), []
    for node, above in enumerate(case.parents):
        inputs = np.concatenate([*(found[p] for p in above), noises[node][None]])
        turn, _ = np.linalg.qr(rng.standard_normal((len(inputs),) * 2))
        found.append(turn @ inputs)
    return found


def stacked(rows, nodes, count):
    parts = [np.atleast_2d(rows[node]) for node in sorted(nodes)]
    return np.concatenate([*parts, np.zeros((0, count))])


def basis(rows):
    """Orthonormal rows that span the same."""
    if not len(rows):
        return rows
    _, values, turned = np.linalg.svd(rows, full_matrices=False)
    return turned[values > RTOL * max(values.max(), 1)]


def spans(rows, others):
    """Whether the second rows lie in the span of the first."""
    frame = basis(rows)
    return np.abs(others - others @ frame.T @ frame).max(initial=0) < 1e-7


def test_the_frontier_holds_in_linear_models():
    for seed, case in enumerate(both_sides(500)):
        count, graph = len(case.parents), case.graph(dimensions=False)
        rows, eye = scalar_model(case, seed), np.eye(len(case.parents))
        found = locate(graph, case.hidden, "frontier")
        c = stacked(rows, found.c, count)
        s_m = stacked(eye, found.s_m, count)
        x_m, x_mc = (stacked(rows, s, count) for s in (case.hidden, case.visible))
        assert spans(np.concatenate([c, s_m]), x_m)
        # Covariances are products of rows, as noises are independent with variance 1.
        np.testing.assert_allclose(s_m @ np.concatenate([c, x_mc]).T, 0, atol=1e-12)
        rest = np.eye(count) - basis(c).T @ basis(c)
        np.testing.assert_allclose(x_m @ rest @ x_mc.T, 0, atol=1e-10)
        for style in ("latents", "noises"):
            one = locate(graph, case.hidden, "frontier", style)
            parts = (
                stacked(rows, one.s_mc_latents, count),
                stacked(eye, one.s_mc, count),
            )
            assert spans(np.concatenate([c, *parts]), x_mc)
        cut = locate(graph, case.hidden, "separator")
        rank = np.linalg.matrix_rank(x_m @ x_mc.T, tol=1e-9)
        assert rank <= len(cut.c) <= len(found.c)
        for side, noise in ((x_m, cut.s_m), (x_mc, cut.s_mc)):
            held = stacked(rows, cut.c, count), stacked(eye, noise, count)
            assert spans(np.concatenate(held), side)


def test_the_invertible_reading_and_theorem_2_hold_in_linear_models():
    for seed, case in enumerate(both_sides(500)):
        count, eye = len(case.parents), np.eye(len(case.parents))
        rows = invertible_model(case, seed)
        found = locate(case.graph(dimensions=False), case.hidden)
        c = stacked(rows, found.c, count)
        x_m, x_mc = (stacked(rows, s, count) for s in (case.hidden, case.visible))
        both = np.concatenate([c, stacked(eye, found.s_m, count)])
        assert spans(both, x_m) and spans(x_m, both)
        assert spans(x_m, c) and spans(x_mc, c)
        rest = np.eye(count) - basis(c).T @ basis(c)
        np.testing.assert_allclose(x_m @ rest @ x_mc.T, 0, atol=1e-10)
        for left in itertools.combinations(sorted(found.c), max(len(found.c) - 1, 0)):
            if found.c:
                fewer = np.concatenate(
                    [stacked(rows, left, count), stacked(eye, found.s_m, count)]
                )
                assert not spans(fewer, x_m)
        frames = basis(x_m), basis(x_mc)
        correlations = np.linalg.svd(frames[0] @ frames[1].T, compute_uv=False)
        assert (correlations > 1 - 1e-8).sum() == len(found.shared)
        # Theorem 2: what the best linear prediction of x_m from x_mc spans is c.
        prediction = x_m @ frames[1].T @ frames[1]
        assert spans(prediction, c) and spans(c, prediction)
