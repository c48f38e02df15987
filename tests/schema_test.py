# SPDX-License-Identifier: Apache-2.0
"""Classes as configs: which can be configured, and what the others are told."""

import dataclasses
import doctest
import pathlib
import re
import tempfile
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import restored

from mim_jax import config, schema
from mim_jax.config import ConfigError
from mim_jax.data.sources.base import Source
from mim_jax.evals.base import Eval
from mim_jax.evals.report import Report
from mim_jax.maskings.base import Masking
from mim_jax.maskings.grid import GridMasking
from mim_jax.maskings.random import Random
from mim_jax.models.vit import Encoder
from mim_jax.objectives.base import Objective
from mim_jax.ops.masking import from_scores
from mim_jax.schema import free, internal, shared

frozen = dataclasses.dataclass(frozen=True, kw_only=True)


class Visible(Masking):
    """The methods of a masking, for classes below that differ in their fields."""

    def visible_count(self, grid):
        return grid.cols

    def __call__(self, keys, grid):
        order = jnp.arange(grid.size, dtype=jnp.int32)
        scores = jnp.broadcast_to(order, (len(keys), grid.size))
        return from_scores(scores, self.visible_count(grid))


@pytest.fixture
def tables():
    """Rows that a test adds are gone after it."""
    with restored():
        yield


def message(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_the_examples_run(tables):
    for module in (schema, config):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


# Marks.


@frozen
class Marked(Visible):
    dtype: str = shared("float16")
    width: int = 3
    clock: int = internal(7)
    note: str = free("")


def test_marks_decide_what_a_config_states(tables):
    config.register("marked", Marked)
    tree = config.experiment("train", source="digits", masking="marked")
    assert tree.objective.masking.to_dict() == dict(name="marked", width=3, note="")
    tree.dtype = "float64"
    built = config.build(tree).objective.masking
    assert built == Marked(dtype="float64", clock=7)
    other = config.experiment("train", source="digits", masking="marked")
    other.dtype, other.objective.masking.note = "float64", "new"
    assert config.difference(tree, other) == []
    other.objective.masking.width = 4
    assert config.difference(tree, other) == ["config.objective.masking.width: 3 -> 4"]


def test_constants_that_the_base_declares_need_no_annotation(tables):
    config.register("constants", Constants)
    assert config.KINDS[Eval][1]["constants"] is Constants


def test_a_shared_field_needs_a_job_that_has_it(tables):
    @frozen
    class Alone(Visible):
        colour: str = shared("red")

    assert message(config.register, "alone", Alone) == (
        f"{called(Alone)}.colour is shared, but no job has a field 'colour': want a "
        "plain default instead of shared(...)"
    )


# Classes that cannot be configured.


def called(cls) -> str:
    return f"{__name__}.{cls.__qualname__}"


class Undecorated(Visible):
    every: int = 2
    kinds: ClassVar = ("a",)


class NoFields(Visible):
    pass


@frozen
class Decorated(Visible):
    every: int = 2


class Child(Decorated):
    extra: float = 1.0


@dataclasses.dataclass
class Mutable(Visible):
    every: int = 2


@frozen
class Half(Masking):
    def visible_count(self, grid):
        return 1


@frozen
class Neither(Masking):
    every: int = 2


@frozen
class Bare(Visible):
    every = 2


class Whites(Source):
    """The methods of a source, for a class below."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"image": np.full((4, 4, 1), 255, np.uint8), "label": -1}

    @property
    def classes(self):
        return ()

    @property
    def channels(self):
        return 1

    def held_out(self):
        return self

    def fingerprint(self):
        return {}


@frozen
class BareSource(Whites):
    sides = [1, 2]


class Nothing(Eval):
    """The methods of an evaluation, for classes below."""

    description = "Nothing."
    headlines = ()

    def check_objective(self, objective):
        pass

    def measure(self, run, data):
        return Report(numbers={})

    def draw(self, found):
        return {}


@frozen
class BareEval(Nothing):
    shown = 8


@frozen
class Constants(Eval):
    """Class attributes that `Eval` declares need no annotation again."""

    description = "Nothing."
    headlines = ()
    check_objective, measure, draw = (
        Nothing.check_objective,
        Nothing.measure,
        Nothing.draw,
    )


@frozen
class BareNetwork(Visible):
    encoder = Encoder(width=8)


@frozen
class Overrides(Visible):
    ratio: float = 0.5


@frozen
class Overriding(Overrides):
    ratio = 0.75


@frozen
class Text(Visible):
    reads = "image"  # pyright: ignore


@frozen
class Factory(Visible):
    sides: tuple[int, ...] = dataclasses.field(default_factory=tuple)


@frozen
class NoDefault(Visible):
    every: int


@frozen
class Quoted(Visible):
    every: "int" = 2


@frozen
class Named(Visible):
    name: str = "mine"


@frozen
class Method(Visible):
    items: int = 2


@frozen
class WrongDefault(Visible):
    every: int = "two"  # pyright: ignore


@frozen
class WrongChoice(Visible):
    order: Literal["up", "down"] = "left"  # pyright: ignore


@frozen
class WrongLength(Visible):
    sides: tuple[int, int] = (1, 2, 3)  # pyright: ignore


@frozen
class WrongGroup(Visible):
    encoder: Encoder = 3  # pyright: ignore


@frozen
class Unregistered(Visible):
    inner: Masking = Decorated()


@frozen
class Options:
    sides: list[int] = dataclasses.field(default_factory=list)


@frozen
class Nested(Visible):
    options: Options = Options()


ABOVE = "@dataclasses.dataclass(frozen=True, kw_only=True) above it"
REFUSED = [
    (
        Undecorated,
        f" is no dataclass, so its fields every are none: want {ABOVE}",
    ),
    (NoFields, f" is no dataclass: want {ABOVE}"),
    (Child, f" is no dataclass, so its fields extra are none: want {ABOVE}"),
    (Mutable, f" is not frozen: want {ABOVE}"),
    (
        Half,
        " lacks __call__: want a method or property of each name, as "
        "mim_jax.maskings.base.Masking describes it",
    ),
    (Neither, " lacks __call__, visible_count: want a method"),
    (
        Bare,
        ".every = 2 has no annotation, so it is no field: want every: int = 2, or "
        "ClassVar[int] for a constant",
    ),
    (BareSource, ".sides = [1, 2] has no annotation, so it is no field: want sides: "),
    (BareEval, ".shown = 8 has no annotation, so it is no field: want shown: int = 8"),
    (BareNetwork, ".encoder = Encoder("),
    (
        Overriding,
        ".ratio has no annotation, so the field keeps the default of its base class: "
        "want ratio: TYPE = DEFAULT",
    ),
    (Text, ".reads = 'image': want ('image',), a tuple"),
    (Factory, ".sides has a default_factory, whose result no config can state: want"),
    (NoDefault, ".every has no default: want one, every: int = DEFAULT"),
    (Quoted, ".every is annotated by the string 'int': want the type itself"),
    (Named, ".name: config trees use the name 'name' themselves; want another"),
    (Method, ".items: config trees use the name 'items' themselves; want another"),
    (WrongDefault, ".every='two': want int"),
    (WrongChoice, ".order 'left' is unknown; known: down, up"),
    (WrongLength, ".sides=(1, 2, 3): want 2 values"),
    (WrongGroup, ".encoder=3: want an object of mim_jax.models.vit.Encoder"),
    (
        Unregistered,
        f".inner=Decorated(every=2): {__name__}.Decorated is in no table; want an "
        "object of a class that has a name as masking: config.register(NAME, CLASS)",
    ),
]


@pytest.mark.parametrize(
    "cls, expected", REFUSED, ids=lambda it: getattr(it, "__name__", "")
)
def test_a_class_that_cannot_be_configured_says_why(cls, expected, tables):
    assert message(config.register, "mine", cls).startswith(called(cls) + expected)
    assert "mine" not in config.KINDS[Masking][1]
    # The same for a class that somebody wrote into a table of ours.
    config.KINDS[Masking][1]["mine"] = cls
    assert message(config.choose, Masking, "mine").startswith(called(cls) + expected)
    arguments = dict(source="digits", masking="mine")
    assert message(config.experiment, "train", **arguments).startswith(called(cls))


def test_the_class_of_a_group_is_checked_too(tables):
    assert message(config.register, "mine", Nested).startswith(
        f"{__name__}.Options.sides has a default_factory"
    )


@pytest.mark.parametrize(
    "annotation, shown",
    [
        (list[int], "list[int]"),
        (list, "list"),
        (dict[str, int], "dict[str, int]"),
        (set, "set"),
        (tuple, "tuple"),
        (tuple[()], "tuple[()]"),
        (tuple[list[int], ...], "list[int]"),
        (int | str, "int | str"),
        (int | str | None, "int | str | None"),
        (Any, "Any"),
        (Literal["a", 1], "typing.Literal['a', 1]"),
        (Literal[None], "typing.Literal[None]"),
        (complex, "complex"),
        (Objective | int, str(Objective | int)),
        (abs, "<built-in function abs>"),
    ],
)
def test_an_annotation_that_no_leaf_can_have(annotation, shown, tables):
    @frozen
    class Wrong(Visible):
        value: annotation = None

    found = message(config.register, "mine", Wrong)
    assert found.startswith(f"{called(Wrong)}.value: no config leaf can be {shown}; ")
    assert "want bool, int, float, str, Literal[...]" in found
    assert "a frozen dataclass, or the base class of a kind" in found


def test_an_objective_declares_the_fields_that_its_base_reads(tables):
    methods = {
        name: lambda self, *_: None for name in sorted(Objective.__abstractmethods__)
    }
    fields = [("encoder", Encoder, Encoder()), ("mean", tuple[float, ...], (0.5,))]
    cls = dataclasses.make_dataclass(
        "Short", fields, bases=(Objective,), namespace=methods, frozen=True
    )
    assert message(config.register, "short", cls).endswith(
        "Short lacks the field std, which mim_jax.objectives.base.Objective declares: "
        "want std: tuple[float, ...] = DEFAULT"
    )


# Any class: it can be configured and comes back from its config, or is told why not.

_PLAIN = {
    bool: st.booleans(),
    int: st.integers(-9, 9),
    float: st.sampled_from([0.5, 1, -2.0]),  # an int is a good float
    str: st.sampled_from(["", "one", "(1, 2)"]),
    Literal["a", "b"]: st.sampled_from(["a", "b", "c"]),
    Literal[1, 2]: st.sampled_from([1, 2, 3]),
    Encoder: st.sampled_from([Encoder(), Encoder(width=96), 3]),
    Masking: st.sampled_from([Random(unit=32), GridMasking(cell=4), Decorated(), "no"]),
    list[int]: st.just(()),
    "int": st.just(1),
    dict: st.just(None),
}


def _tuples(pair):
    kind, values = pair
    fixed = (tuple[kind, kind], st.tuples(values, values))
    return st.sampled_from(
        [(tuple[kind, ...], st.lists(values, max_size=3).map(tuple)), fixed]
    )


def _optional(pair):
    kind, values = pair
    return st.just((kind | None, st.none() | values))


_SINGLE = st.sampled_from([pair for pair in _PLAIN.items() if pair[0] != "int"])
_PAIRS = st.one_of(
    st.sampled_from(list(_PLAIN.items())),
    _SINGLE.flatmap(_tuples),
    _SINGLE.flatmap(_optional),
    _SINGLE.flatmap(_tuples).flatmap(_optional),
)
_FIELDS = _PAIRS.flatmap(
    lambda pair: st.tuples(st.just(pair[0]), st.just(dataclasses.MISSING) | pair[1])
)
_NAMES = st.sampled_from(["one", "two", "three", "name", "update"])


@settings(max_examples=300)
@given(st.dictionaries(_NAMES, _FIELDS, max_size=3))
def test_any_class_is_configured_or_told_why_not(found):
    fields = [
        (name, kind, dataclasses.field(default=default))
        for name, (kind, default) in found.items()
    ]
    cls = dataclasses.make_dataclass(
        "Drawn", fields, bases=(Visible,), frozen=True, kw_only=True
    )
    with restored():
        try:
            config.register("drawn", cls)
        except ConfigError as error:
            assert re.match(rf"\S+\.Drawn\.({'|'.join(found)})\b", str(error))
            assert "want" in str(error) or "known" in str(error)
            return
        tree = config.experiment("train", source="digits", masking="drawn")
        assert set(tree.objective.masking) == {"name", *found}
        built = config.build(tree)
        for name, (kind, default) in found.items():
            value = getattr(built.objective.masking, name)
            if default is dataclasses.MISSING:
                assert isinstance(value, kind)
            elif kind is not Encoder:  # whose dtype is the experiment's
                assert value == default
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "config.json")
            path.write_text(config.dumps(tree))
            assert config.build(config.load(path)) == built


# Registering.


def test_a_registered_class_is_chosen_by_name(tables):
    config.register("decorated", Decorated)
    tree = config.read("configs/mae.py:digits,masking=decorated")
    tree.objective.masking.every = 5
    assert config.build(tree).objective.masking == Decorated(every=5)


@pytest.mark.parametrize(
    "cls", [Encoder, int, Decorated(), type("Other", (), {}), config.Train], ids=str
)
def test_a_class_of_no_kind_is_refused(cls):
    found = message(config.TREES.register, "mine", cls)
    assert found.startswith("register('mine', ")
    for kind in config.KINDS:
        assert f"{kind.__module__}.{kind.__name__}" in found


def test_a_name_belongs_to_one_class(tables):
    taken = next(iter(config.KINDS[Masking][1]))
    row = config.KINDS[Masking][1][taken]
    assert message(config.register, taken, Decorated) == (
        f"masking {taken!r} is {row.__module__}.{row.__name__} already: want another "
        f"name for {called(Decorated)}"
    )
    assert config.KINDS[Masking][1][taken] is row
    config.register("decorated", Decorated)
    config.register("decorated", Decorated)  # a module may be imported anew
    assert message(config.register, "again", Decorated).startswith(
        f"{called(Decorated)} is the masking 'decorated' already: want one name"
    )


def test_a_class_that_is_defined_anew_replaces_itself(tables):
    def define(default):
        @frozen
        class Cell(Visible):
            every: int = default

        return Cell

    config.register("cell", define(1))
    config.register("cell", define(2))
    assert config.choose(Masking, "cell").every == 2


@pytest.mark.parametrize("name", ["", "a=b", "a,b", "a b", "=", "a:b"])
def test_a_name_that_no_command_line_could_say(name, tables):
    expected = f"masking {name!r} of {called(Decorated)}: want a name of letters"
    assert message(config.register, name, Decorated).startswith(expected)


def test_a_network_of_your_own_is_a_group(tables):
    class Tiny(nn.Module):
        width: int = 4
        dtype: str = shared("float32")

    @frozen
    class Learned(Visible):
        network: Tiny = Tiny(width=8)

    config.register("learned", Learned)
    tree = config.experiment("train", source="digits", masking="learned")
    assert tree.objective.masking.network.to_dict() == {"width": 8}
    tree.dtype = "float64"
    network = config.build(tree).objective.masking.network
    assert (network.width, network.dtype) == (8, "float64")
