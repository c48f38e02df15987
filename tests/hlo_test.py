# SPDX-License-Identifier: Apache-2.0
"""The account of a program's text, against sums made by hand."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from mim_jax import hlo

# A loop of twelve rounds with a loop of two in it, a branch, and collectives of three
# kinds: one in a fusion, one begun and awaited.
TEXT = (pathlib.Path(__file__).parent / "golden" / "small.hlo").read_text()


def test_shapes_have_their_bytes():
    assert hlo.size_of("f32[4,2]{1,0:T(8,128)(2,1)}") == 32
    assert hlo.size_of("(bf16[3]{0}, s32[], u8[5]{0})") == 6 + 4 + 5
    assert hlo.size_of("pred[7]") == 7 and hlo.size_of("token[]") == 0


def test_loops_count_as_often_as_they_run():
    times = {}
    for one in hlo.executed(TEXT):
        times[one.instruction.name] = times.get(one.instruction.name, 0) + one.times
    assert times["attn.1"] == 24 and times["gather.1"] == 12
    assert times["out.1"] == times["f.1"] == times["mul.9"] == 1
    assert times["neg.1"] == 24 + 2  # in the loops, and once in each branch


def test_collectives_are_found_in_loops_and_fusions():
    assert hlo.collectives(TEXT) == {
        "all-reduce": {"count": 12, "bytes": 12 * 16},
        "reduce-scatter": {"count": 1, "bytes": 8},
        "all-gather": {"count": 1, "bytes": 128},
    }


def test_an_account_has_cycles_by_part_and_a_bound_for_the_rest():
    found = hlo.account(TEXT, hbm_bandwidth=1e9, clock=1e6)
    parts = found["parts"]
    assert parts["encoder attention"] == {
        "priced": pytest.approx(24 * 1e-4),
        "unpriced": 0,
    }
    # Not the 7 cycles inside: a fusion's own are those of all of it.
    assert parts["optimiser"] == {"priced": pytest.approx(1e-3), "unpriced": 0}
    # Two operands of 16 bytes and 64 written, twelve times.
    assert parts["decoder, rest"]["unpriced"] == pytest.approx(12 * 96e-9)
    assert found["priced"] == pytest.approx(24e-4 + 1e-3 + 1e-5)
    # all-reduce 32 x 12, all-gather 32 + 160, and both branches' negations 32 each.
    rest = {"gather": 12 * 96, "all-reduce": 12 * 32, "all-gather": 192, "negate": 64}
    assert found["unpriced_opcodes"] == {
        name: pytest.approx(size * 1e-9) for name, size in rest.items()
    }
    assert found["unpriced"] == pytest.approx(sum(rest.values()) * 1e-9)


def test_a_real_program_is_read_to_the_end():
    """As this machine's compiler writes it: every matmul of a loop is found."""

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ y), x).sum()

    text = jax.jit(loop).lower(jnp.ones((16, 16))).compile().as_text()
    dots = [one for one in hlo.executed(text) if one.instruction.opcode == "dot"]
    calls = [one for one in hlo.executed(text) if "dot" in one.instruction.scope]
    assert sum(one.times for one in dots or calls) >= 5


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.account("nothing", 1.0, 1.0)
