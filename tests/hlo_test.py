# SPDX-License-Identifier: Apache-2.0
"""The account of a program's text, against sums made by hand."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from mim_jax.aot import hlo

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


def test_a_collective_hidden_behind_other_work_counts_once():
    """As the TPU compiler writes it: fusions begin it, hide it and end it."""

    def body(name):
        return f"""
%{name}.7 (p.{name}: bf16[4]) -> bf16[16] {{
  %p.{name} = bf16[4]{{0}} parameter(0)
  ROOT %ag.{name} = bf16[16]{{0}} all-gather(%p.{name}), channel_id=5, \
metadata={{op_name="jit(step)/jvp(Encoder)/block00/fc1/convert"}}
}}
"""

    def call(name, more=""):
        return (
            f"  %{name}.8 = bf16[16]{{0}} fusion(%Arg_0.1), kind=kCustom, "
            f"calls=%{name}.7{more}\n"
        )

    priced = (
        ', metadata={op_name="jit(step)/jvp(Encoder)/block00/attn/out/dot"}, '
        'backend_config={"estimated_cycles":"500"}'
    )
    calls = call("start") + call("hiding", priced) + call("done")
    text = TEXT.replace("  %cond.2 =", calls + "  %cond.2 =")
    text += body("start") + body("hiding") + body("done")
    before, found = hlo.collectives(TEXT)["all-gather"], hlo.collectives(text)
    assert found["all-gather"]["count"] == before["count"] + 1
    assert found["all-gather"]["bytes"] == before["bytes"] + 32
    speed = hlo.Speed(flops=1e6, hbm=1e6, wires=1e6, clock=1e6)
    parts = hlo.account(text, speed, devices=4)["parts"]
    # On its way while the other one works.
    assert parts["encoder MLP"] == {
        "priced": 0,
        "unpriced": 0,
        "meanwhile": pytest.approx(32 * 0.75e-6),
    }
    old = hlo.account(TEXT, speed, devices=4)["parts"]["encoder attention"]["priced"]
    assert parts["encoder attention"]["priced"] == pytest.approx(old + 5e-4)


@pytest.mark.parametrize(
    "condition, rounds",
    [
        ("ROOT %lt.9 = pred[] compare(%i.9, %end.9), direction=LT", 12),
        ("ROOT %f.9 = pred[] fusion(%i.9, %end.9), kind=kLoop, calls=%less.9", 12),
        ("ROOT %gt.9 = pred[] compare(%i.9, %end.9), direction=GT", 1),
    ],
)
def test_where_nothing_else_tells_a_loop_is_counted_by_its_condition(condition, rounds):
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"12"}}', "")
    text = text.replace(
        "condition=%cond.1, body=%outer.1", "condition=%cond.9, body=%outer.1"
    )
    text += f"""
%less.9 (a.9: s32[], b.9: s32[]) -> pred[] {{
  %a.9 = s32[] parameter(0)
  %b.9 = s32[] parameter(1)
  ROOT %lt.8 = pred[] compare(%a.9, %b.9), direction=LT
}}

%cond.9 (c.9: (s32[], f32[4])) -> pred[] {{
  %c.9 = (s32[], f32[4]{{0}}) parameter(0)
  %i.9 = s32[] get-tuple-element(%c.9), index=0
  %end.9 = s32[]{{:T(128)}} constant(12)
  {condition}
}}
"""
    times = {one.instruction.name: one.times for one in hlo.executed(text)}
    assert times["gather.1"] == rounds and times["attn.1"] == 2 * rounds


def test_a_kernel_costs_what_it_says():
    said = '"cost_estimate":{"flops":"3000","transcendentals":"1","bytes_accessed":'
    call = (
        '  %kernel.1 = f32[8]{0} custom-call(%Arg_0.1), custom_call_target="tpu_custom_'
        'call", metadata={op_name="jit(step)/jvp(Decoder)/block00/attn/pallas_call"}, '
        "backend_config={%s}\n  %cond.2 ="
    )
    note = '  %n.1 = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"\n'
    speed = hlo.Speed(flops=1e6, hbm=1e6, wires=1e6, clock=1e6)
    for moved, seconds in [(2000, 3e-3), (5000, 5e-3)]:
        kernel = note + call.replace("%s", said + f'"{moved}"}}')
        text = TEXT.replace("  %cond.2 =", kernel)
        parts = hlo.account(text, speed, devices=1)["parts"]
        assert parts["decoder attention"]["unpriced"] == pytest.approx(seconds)
        assert parts["masks, augmentation, loss"]["unpriced"] == pytest.approx(64e-6)


@pytest.mark.parametrize("target, products", [("", 2), ("Backward", 5)])
def test_attention_by_cudnn_has_the_flops_of_its_products(target, products):
    """2 rows of 6 queries and of 9 keys, 3 heads of 4 numbers."""
    text = f"""HloModule step

ENTRY %main (q: bf16[2,6,3,4], k: bf16[2,9,3,4]) -> bf16[2,6,3,4] {{
  %q = bf16[2,6,3,4]{{3,2,1,0}} parameter(0)
  %k = bf16[2,9,3,4]{{3,2,1,0}} parameter(1)
  ROOT %a.1 = (bf16[2,6,3,4]{{3,1,2,0}}, f32[2,3,6]{{2,1,0}}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax{target}", backend_config={{}}
}}
"""
    (call,) = (one for one in hlo.executed(text) if one.instruction.name == "a.1")
    assert call.flops == products * 2 * 2 * 3 * 6 * 9 * 4


@pytest.mark.parametrize(
    "kernel, products",
    [("fwd_segmented_residuals", 2), ("dkv_segmented_no_residuals", 5)],
)
def test_splash_attention_has_the_flops_of_its_products(kernel, products):
    """2 rows of 3 heads, 256 tokens of 64 numbers, which take 128 lanes."""
    text = f"""HloModule step

ENTRY %main (q: bf16[2,3,256,64]) -> bf16[2,3,256,64] {{
  %mask.1 = s8[1,2,2]{{2,1,0}} parameter(0)
  %q = bf16[2,3,256,64]{{3,2,1,0}} parameter(1)
  ROOT %splash_mha_{kernel}.1 = (bf16[2,3,256,64]{{3,1,2,0}}, f32[4]{{0}}) \
custom-call(%mask.1, %mask.1, %q, %q, %q), custom_call_target="tpu_custom_call", \
frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 384}}"
}}}}, metadata={{op_name="jit(step)/jvp(Encoder)/blocks/attn/splash_mha_{kernel}"}}
}}
"""
    last = list(hlo.executed(text))[-1]
    assert last.instruction.opcode == "custom-call"
    speed = hlo.Speed(flops=1e6, hbm=1e9, wires=1e8, clock=1e6)
    account = hlo.account(text, speed, devices=1)
    assert account["parts"]["encoder attention"]["unpriced"] == account["unpriced"] > 0
    assert last.flops == products * 2 * 2 * 3 * 256 * 256 * 128


def test_an_account_has_cycles_by_part_and_a_bound_for_the_rest():
    speed = hlo.Speed(flops=1e6, hbm=1e9, wires=1e8, clock=1e6)
    found = hlo.account(TEXT, speed, devices=4)
    parts = found["parts"]
    assert parts["encoder attention"] == {
        "priced": pytest.approx(24 * 1e-4),
        "unpriced": 0,
        "meanwhile": 0,
    }
    # Not the 7 cycles inside: a fusion's own are those of all of it.
    assert parts["optimiser"]["priced"] == pytest.approx(1e-3)
    assert found["priced"] == pytest.approx(24e-4 + 1e-3 + 1e-5)
    # In a ring of four, 3/4 of a result pass over each wire, for all-reduce twice.
    wires = {"all-reduce": 12 * 2 * 16 * 0.75, "all-gather": 128 * 0.75}
    # Of the gather's operand only what is taken; both branches' negations 32 each.
    memory = {"gather": 12 * 128, "negate": 64}
    rest = {name: size * 1e-8 for name, size in wires.items()}
    rest |= {name: size * 1e-9 for name, size in memory.items()}
    assert found["unpriced_opcodes"] == {
        name: pytest.approx(value) for name, value in rest.items()
    }
    assert parts["decoder, rest"]["unpriced"] == pytest.approx(rest["gather"])
    assert found["meanwhile"] == pytest.approx(rest["all-gather"])
    waited = sum(rest.values()) - rest["all-gather"]
    assert found["unpriced"] == pytest.approx(waited)


def test_a_fusion_moves_of_an_array_the_part_that_it_cuts_or_changes():
    text = """
%part.1 (p.0: f32[12,8], p.1: f32[3,8], p.2: s32[]) -> (f32[12,8], f32[1,8]) {
  %p.0 = f32[12,8]{1,0} parameter(0)
  %p.1 = f32[3,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %cut.1 = f32[1,8]{1,0} dynamic-slice(%p.1, %p.2, %p.2), dynamic_slice_sizes={1,8}
  %same.1 = f32[12,8]{1,0} bitcast(%p.0)
  %set.1 = f32[12,8]{1,0} dynamic-update-slice(%same.1, %cut.1, %p.2, %p.2)
  ROOT %both.1 = (f32[12,8]{1,0}, f32[1,8]{1,0}) tuple(%set.1, %cut.1)
}

ENTRY %main.1 (a.0: f32[12,8], a.1: f32[3,8], a.2: s32[]) -> (f32[12,8], f32[1,8]) {
  %a.0 = f32[12,8]{1,0} parameter(0)
  %a.1 = f32[3,8]{1,0} parameter(1)
  %a.2 = s32[] parameter(2)
  ROOT %f.1 = (f32[12,8]{1,0}, f32[1,8]{1,0}) fusion(%a.0, %a.1, %a.2), kind=kLoop, \
calls=%part.1
}
"""
    (fusion,) = (it for it in hlo.executed(text) if it.instruction.name == "f.1")
    row, index = 8 * 4, 4
    # The index is read whole however often it is used; of the rest, a row each.
    assert (fusion.read, fusion.written) == (row + index, 2 * row)
    # Read whole elsewhere, it is read whole once.
    whole = text.replace("tuple(%set.1, %cut.1)", "tuple(%p.1, %cut.1)")
    (fusion,) = (it for it in hlo.executed(whole) if it.instruction.name == "f.1")
    assert fusion.read == 3 * row + index


def test_products_of_a_real_program_are_all_counted():
    """As this machine's compiler writes it, in fusions or not."""

    def loop(x, y):
        def once(_, y):
            return jnp.tanh(x @ y) + jnp.einsum("nm,nk->mk", x, y)

        return jax.lax.fori_loop(0, 5, once, y).sum()

    x, y = jnp.ones((16, 16)), jnp.ones((16, 24))
    text = jax.jit(loop).lower(x, y).compile().as_text()
    found = [one for one in hlo.executed(text) if not one.inside_fusion]
    assert sum(one.times * one.flops for one in found) == 5 * 2 * 2 * 16 * 16 * 24
    speed = hlo.Speed(flops=1.0, hbm=1e9, wires=1.0, clock=1.0)
    account = hlo.account(text, speed, devices=1)
    assert account["priced"] == 0
    assert account["unpriced"] == pytest.approx(5 * 2 * 2 * 16 * 16 * 24, rel=1e-3)


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.account("nothing", hlo.Speed(1.0, 1.0, 1.0, 1.0), 1)
