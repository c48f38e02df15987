# SPDX-License-Identifier: Apache-2.0
"""What a plan refuses: plug-ins that do not do what they promise."""

import dataclasses
import re
from typing import Any, ClassVar
from unittest import mock

import jax.numpy as jnp
import pytest
from tables import restored
from tiny import plan_of, tree_of

from mim_jax import config
from mim_jax.data.examples.base import Examples
from mim_jax.data.sources.base import Source
from mim_jax.evals.base import Eval
from mim_jax.kernels import FORMS
from mim_jax.kernels.base import Form, Site
from mim_jax.kernels.choice import choose_attention
from mim_jax.maskings.base import Masking
from mim_jax.ops.attention import attention
from mim_jax.ops.masking import from_scores
from mim_jax.plan import Plan
from mim_jax.run import summary

frozen = dataclasses.dataclass(frozen=True, kw_only=True)


@frozen
class Top(Masking):
    """Hides the first rows; `counted` is what it says of its visible patches."""

    visible: int = 8

    @property
    def counted(self) -> Any:
        return self.visible

    def visible_count(self, grid):
        return self.counted

    def __call__(self, keys, grid, **given):
        scores = jnp.arange(grid.size, dtype=jnp.int32)
        rows = jnp.broadcast_to(scores, (len(keys), grid.size))
        return from_scores(rows, self.visible)


@frozen
class Miscounts(Top):
    @property
    def counted(self):
        return self.visible + 1


@frozen
class Unrounded(Top):
    @property
    def counted(self):
        return float(self.visible)


@frozen
class Forgets(Top):
    refresh_every: int = 5


@frozen
class NeverRefreshes(Forgets):
    def first_memory(self, grid):
        return jnp.zeros(grid.size)


@frozen
class Remembers(NeverRefreshes):
    def refresh(self, memory, objective, params, batch, keys):
        return memory


@frozen
class Demands(Top):
    def __call__(self, keys, grid, *, trees):
        return super().__call__(keys, grid)


@frozen
class Misnames(Top):
    reads = ("label",)

    def __call__(self, keys, grid, *, labels):
        return super().__call__(keys, grid)


@frozen
class ForgetsMemory(Remembers):
    def __call__(self, keys, grid):
        return super().__call__(keys, grid)


@frozen
class Silent(Top):
    def __call__(self, keys, grid):
        super().__call__(keys, grid)


@frozen
class Scores(Top):
    def __call__(self, keys, grid):
        return jnp.zeros((len(keys), grid.size))


@frozen
class Uncounted(Top):
    def visible_count(self, grid):
        pass


@frozen
class Fails(Top):
    def __call__(self, keys, grid):
        return keys.no_such_thing


@frozen
class Outside(Top):
    reads = ("trees",)


def masked(cls: type[Masking]) -> Plan:
    """The plan of a small MAE with this masking."""
    config.register("mine", cls)
    with (tree := tree_of("mae")).unlocked():
        tree.objective.masking = config.choose(Masking, "mine")
    return Plan.of(tree)


@pytest.fixture(autouse=True)
def tables():
    with restored():
        yield


@pytest.mark.parametrize("cls", [Top, Remembers])
def test_a_masking_that_keeps_its_promises_is_taken(cls):
    assert masked(cls).objective.maskings["masking"] == cls()


@pytest.mark.parametrize(
    "cls, expected",
    [
        (
            Miscounts,
            "its masks leave 8 of 16 patches visible, and its visible_count says 9: "
            "want the same",
        ),
        (Unrounded, "its visible_count is 8.0: want an int, by round()"),
        (
            Forgets,
            "has refresh_every=5, so a memory, and no method first_memory and no "
            "method refresh: want both methods, or refresh_every=0",
        ),
        (
            NeverRefreshes,
            "has refresh_every=5, so a memory, and no method refresh: want both "
            "methods, or refresh_every=0",
        ),
        (
            Demands,
            " argument: 'trees', with reads=(): reads=(...) and "
            "__call__ must name the same fields",
        ),
        (Misnames, " argument: 'labels', with reads=('label',): "),
        (
            ForgetsMemory,
            ": got an unexpected keyword argument 'memory', with reads=() and memory: ",
        ),
        (Silent, " returned None (has it a `return`?): want a Mask, such as from_scor"),
        (Scores, ": want a Mask, such as from_scores(scores, self.visible_count(grid)"),
        (Uncounted, ": its visible_count is None (has it a `return`?): want an int, "),
        (Fails, f" cannot draw: AttributeError: .*no_such_thing.*({__file__}:"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_masking_that_breaks_a_promise_is_named(cls, expected):
    with pytest.raises(config.ConfigError) as caught:
        masked(cls)
    found = str(caught.value)
    assert found.startswith(f"config: masking {cls.__name__}")
    pattern = ".*".join(map(re.escape, expected.split(".*")))
    assert re.search(pattern, found) and "\n" not in found


def test_a_field_that_the_data_lack_is_asked_for_by_the_masking():
    with pytest.raises(config.ConfigError) as caught:
        masked(Outside)
    assert str(caught.value).startswith(
        "config: data has no 'trees', which masking Outside of MAE reads; want "
    )


@pytest.mark.parametrize("annotation", [{}, {"reads": ClassVar[tuple[str, ...]]}])
def test_reads_in_mere_parentheses_are_refused(annotation):
    body = {"reads": ("boxes"), "__annotations__": annotation}
    with pytest.raises(config.ConfigError, match=r"want \('boxes',\), a tuple"):
        config.register("mine", frozen(type("Bare", (Top,), body)))


# Forms of attention.

SITE = Site("cpu", "cpu", "float32", tokens=17, width=16, heads=2)


def mixed(qkv, bias, heads):
    return attention(qkv, bias, heads)[0]


def fits(site):
    return ""


@pytest.fixture
def forms():
    with mock.patch.dict(FORMS):
        yield FORMS


@pytest.mark.parametrize(
    "run, expected",
    [
        (attention, "returns (ShapeDtypeStruct("),
        (lambda qkv, bias, heads: None, "returns None (has it a `return`?): want "),
        (lambda qkv, bias, heads: qkv, "returns float32[2, 17, 48]: want float32[2, "),
        (
            lambda *given: mixed(*given).astype("bfloat16"),
            "returns bfloat16[2, 17, 16]: want float32[2, 17, 16], the mixed values",
        ),
        (lambda qkv, bias: qkv, "fails: TypeError: "),
        (lambda qkv, bias, heads: qkv[..., None] @ bias, "fails: "),
    ],
    ids=["weights", "none", "shape", "dtype", "arguments", "raises"],
)
def test_a_form_with_another_result_is_refused_at_planning(forms, run, expected):
    forms["mine"] = Form(run, "cpu", fits)
    tree = tree_of("mae", attention="mine")
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree)
    found = str(caught.value)
    start = "config: encoder: attention='mine' with qkv float32[2, 17, 48] and heads=2 "
    assert found.startswith(start + expected) and "\n" not in found
    forms["mine"] = Form(mixed, "cpu", fits)
    assert "encoder mine, decoder mine" in Plan.of(tree).forms


@pytest.mark.parametrize(
    "name, form, expected",
    [
        ("mine", mixed, r"kernels.FORMS\['mine'\] is <function mixed .*: want Form\("),
        ("mine", Form(mixed, "cuda", fits), "platform='cuda': want one of cpu, gpu, t"),
        ("mine", Form(mixed, "cpu", True), "misfit=True: want a function"),  # pyright: ignore
        ("mine", Form(mixed, "cpu", fits, True), "preferred=True: want a function"),  # pyright: ignore
        (
            "mine",
            Form(mixed, "cpu", lambda site: None),  # pyright: ignore
            r"misfit returned None \(has it a `return`\?\): want a str",
        ),
        ("plain", Form(mixed, "cpu", fits), "attention='plain' has a meaning; want an"),
        ("auto", Form(mixed, "cpu", fits), "attention='auto' has a meaning; want anot"),
    ],
)
def test_a_row_that_is_no_form_is_refused(forms, name, form, expected):
    forms[name] = form
    with pytest.raises(ValueError, match=expected):
        choose_attention("auto", SITE)


def test_auto_takes_a_form_only_where_it_is_preferred(forms):
    forms["mine"] = Form(mixed, "cpu", fits)
    assert choose_attention("auto", SITE) == "keep"
    assert choose_attention("mine", SITE) == "mine"
    forms["mine"] = Form(mixed, "cpu", fits, preferred=lambda site: site.heads == 2)
    assert choose_attention("auto", SITE) == "mine"
    assert choose_attention("auto", SITE._replace(heads=4)) == "keep"


# Reports.


def test_a_report_that_cannot_measure_the_objective_says_how_to_choose_another():
    tree = tree_of("supervised")
    Plan.of(tree)  # its report is of neighbours
    with tree.unlocked():
        tree.report = config.choose(Eval, "reconstruction")
    with pytest.raises(config.ConfigError) as caught:
        Plan.of(tree)
    assert str(caught.value) == (
        "config: config.report measures every run when it ends: reconstruction of a "
        "Supervised run: want an objective that predicts pixels, a PixelObjective, or "
        "another report, such as --config=configs/FILE.py:eval=knn"
    )


def test_objects_need_a_source_that_has_them_and_enough_classes():
    tree = tree_of("detection", objective__classes=13)
    with pytest.raises(config.ConfigError, match="classes=13: .*want .*classes=14"):
        Plan.of(tree)
    bare = tree_of("detection")
    with bare.data.unlocked():
        bare.data.source = config.choose(Source, "digits")
    with pytest.raises(
        config.ConfigError, match="and no objects|no objects with class"
    ):
        Plan.of(bare)
    with bare.data.unlocked():
        bare.data.examples = config.choose(Examples, "crops")
    with pytest.raises(config.ConfigError, match="data has no 'size'.*Detection reads"):
        Plan.of(bare)


def test_a_run_that_finds_objects_is_measured_by_detection_while_it_trains():
    built = config.build(tree_of("detection", evaluate_every=5))
    assert built.evaluations.keys() == {"detection"}


def test_a_short_run_of_batches_larger_than_the_data_has_a_hint(tmp_path):
    """The probe's recipe, batches of 16384, on a folder of 270 images is two steps."""
    count = len(plan_of("mae").settings.data.source)
    want = f"every image 2 times: want a config.batch_size below {count}"

    def shown(**changes):
        plan = plan_of("mae", **changes)
        return summary.summarise(plan, plan.abstract_state(), tmp_path, [])

    twice = dict(batch_size=2 * count)
    assert want in shown(**twice, steps=27)
    for changes in (dict(**twice, steps=100), dict(batch_size=count, steps=27)):
        assert "each batch has" not in shown(**changes)
