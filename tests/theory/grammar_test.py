# SPDX-License-Identifier: Apache-2.0
"""Exact inference in random hierarchies: against enumeration, and calibrated."""

import itertools

import numpy as np
import pytest

from mim_jax.theory.grammar import Grammar, ancestors


def uniform(seed):
    return np.random.default_rng(seed).random


def made(levels=2, symbols=3, synonyms=2, seed=0):
    return Grammar.random(levels, symbols, synonyms, uniform(seed))


def accuracy(posterior, symbols):
    """The share of symbols that are the most likely ones, by level."""
    pairs = zip(posterior, symbols, strict=True)
    return [(chances.argmax(axis=-1) == true).mean() for chances, true in pairs]


def quarter(row, col, k):
    """The place of child k of a node, counted by hand."""
    return 2 * row + k // 2, 2 * col + k % 2


def everything(grammar):
    """Every derivation of a two-level grammar: (root, level 1, tokens), all equally
    likely."""
    top, low = grammar.rules
    found = []
    for root, choice in itertools.product(range(top.shape[0]), range(top.shape[1])):
        middle = np.zeros((2, 2), int)
        for k in range(4):
            middle[quarter(0, 0, k)] = top[root, choice, k]
        for choices in itertools.product(range(low.shape[1]), repeat=4):
            tokens = np.zeros((4, 4), int)
            for k, one in enumerate(choices):
                place = quarter(0, 0, k)
                for j in range(4):
                    tokens[quarter(*place, j)] = low[middle[place], one, j]
            found.append((np.array([[root]]), middle, tokens))
    return found


@pytest.mark.parametrize("synonyms", [1, 2, 4])
def test_messages_equal_enumeration(synonyms):
    grammar = made(synonyms=synonyms)
    derivations = everything(grammar)
    rng = np.random.default_rng(1)
    for hide in (0.2, 0.5, 0.8, 1.1):
        tokens = derivations[rng.integers(len(derivations))][2]
        hidden = rng.random((4, 4)) < hide
        fits = [d for d in derivations if (d[2] == tokens)[~hidden].all()]
        found = grammar.posterior(tokens[None], hidden[None])
        for level, chances in enumerate(found):
            want = np.zeros(chances.shape[1:])
            for derivation in fits:
                symbols = derivation[level]
                for place in np.ndindex(symbols.shape):
                    want[(*place, symbols[place])] += 1 / len(fits)
            np.testing.assert_allclose(chances[0], want, atol=1e-12)


def test_all_synonyms_of_a_level_differ():
    for rule in made(3, 5, 7).rules:
        assert rule.shape == (5, 7, 4) and rule.max() < 5
        assert len({tuple(one) for one in rule.reshape(-1, 4)}) == 35
    with pytest.raises(ValueError, match=r"synonyms=9: want at most symbols\*\*3 = 8"):
        made(symbols=2, synonyms=9)


def test_samples_follow_the_rules_evenly():
    grammar = made(2, 3, 4)
    root, middle, tokens = grammar.sample(np.arange(3).repeat(2000), uniform(3))
    used = []
    for above, below, rule in ((root, middle, 0), (middle, tokens, 1)):
        counts = np.zeros((3, 4), int)
        for b, row, col in np.ndindex(above.shape):
            children = [below[(b, *quarter(row, col, k))] for k in range(4)]
            synonyms = grammar.rules[rule][above[b, row, col]].tolist()
            counts[above[b, row, col], synonyms.index(children)] += 1
        used.append(counts)
    share = used[0] / used[0].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share, 0.25, atol=0.05)
    share = used[1] / used[1].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(share[used[1].sum(axis=1) > 0], 0.25, atol=0.03)


def test_posteriors_are_calibrated():
    grammar = made(3, 6, 4, seed=5)
    count = 600
    symbols = grammar.sample(np.arange(count) % 6, uniform(6))
    hidden = uniform(7)(count * 64).reshape(count, 8, 8) < 0.85
    found = grammar.posterior(symbols[-1], hidden)
    right = accuracy(found, symbols)
    for level, chances in enumerate(found):
        best = chances.max(axis=-1)
        assert best.mean() < 0.999
        assert right[level] == pytest.approx(best.mean(), abs=0.03)
        for low, high in ((0.2, 0.5), (0.5, 0.8), (0.8, 1)):
            chosen = (chances >= low) & (chances < high)
            true = np.eye(6)[symbols[level]][chosen]
            error = 4 / np.sqrt(max(len(true), 1))
            assert true.mean() == pytest.approx(chances[chosen].mean(), abs=error)


def test_bounds_are_those_of_the_best_and_of_a_blind_prediction():
    grammar, noise = made(2, 4, 3, seed=2), 0.3
    rng = np.random.default_rng(0)
    textures = rng.standard_normal((4, 12))
    count = 4000
    tokens = grammar.sample(np.arange(count) % 4, uniform(8))[-1]
    hidden = np.tile(rng.permutation(16) < 10, (count, 1)).reshape(count, 4, 4)
    found = grammar.bounds(tokens, hidden, textures, noise)
    pixels = textures[tokens] + noise * rng.standard_normal((count, 4, 4, 12))
    best = grammar.posterior(tokens, hidden)[-1] @ textures
    error = ((pixels - best) ** 2).mean(axis=-1)[hidden].mean()
    assert found.optimum == pytest.approx(error, rel=0.02)
    blind = ((pixels - pixels.mean(axis=0)) ** 2).mean(axis=-1)[hidden].mean()
    assert found.floor == pytest.approx(blind, rel=0.02)
    assert noise**2 < found.optimum < found.floor


def test_nothing_hidden_leaves_nothing_open():
    grammar = made(3, 5, 3)
    symbols = grammar.sample(np.arange(5), uniform(1))
    found = grammar.posterior(symbols[-1], np.zeros((5, 8, 8), bool))
    assert accuracy(found, symbols) == [1, 1, 1, 1]
    assert all(np.allclose(chances.max(axis=-1), 1) for chances in found)


def test_tokens_that_no_rule_makes_are_refused():
    grammar = made(2, 3, 1)
    tokens = grammar.sample(np.arange(3), uniform(1))[-1]
    four = {tuple(one) for one in grammar.rules[-1].reshape(-1, 4).tolist()}
    absent = next(t for t in itertools.product(range(3), repeat=4) if t not in four)
    tokens[1, :2, :2] = np.reshape(absent, (2, 2))
    with pytest.raises(ValueError, match="image 1: the grammar does not make"):
        grammar.posterior(tokens, np.zeros((3, 4, 4), bool))


def test_ancestors_are_numbered_row_by_row():
    found = ancestors(2)
    assert found[1].tolist() == [[0] * 4] * 4
    assert found[0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
