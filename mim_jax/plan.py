# SPDX-License-Identifier: Apache-2.0
"""The plan of a training run: all its parts, built and checked before compilation."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from mim_jax import config as configs
from mim_jax import sharding
from mim_jax import state as states
from mim_jax.data.input import Input
from mim_jax.data.passes import EvalPasses
from mim_jax.data.trial import check_first
from mim_jax.kernels.choice import check_forms, described, with_kernels
from mim_jax.maskings.base import Masking
from mim_jax.objectives.base import Detector, LabelObjective, Objective
from mim_jax.ops.masking import Mask
from mim_jax.ops.patches import Grid
from mim_jax.schema import raised, returned
from mim_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of a training run, built from its config and checked against each
    other.

    Attributes:
        settings: the built config. `settings.objective` uses the plain form of every
            operation, which runs on any single device.
        objective: the same objective with the forms (kernels) chosen for `mesh`.
        mesh: device mesh.
        tx: optax transformation.
        schedule: function from step to learning rate.
        total: number of steps of the whole run.
        stop: the step at which this process stops, <= total.
        config: the config as JSON text.
    """

    settings: configs.Train
    objective: Objective
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformationExtraArgs
    schedule: Any
    total: int
    stop: int
    config: str

    @classmethod
    def of(
        cls,
        config: configs.Tree,
        devices: list | None = None,
        stand_in: bool = False,
    ) -> "Plan":
        """The plan of a config.

        Args:
            devices: devices to run on; None: all devices of all processes.
            stand_in: True if the source only replaces one that this machine lacks. Its
                images have the right shape; its records, its labels, and whether the
                report can use its images, are not checked.
        Raises:
            ConfigError: the parts do not fit each other or this machine, or a plug-in
                does not do what it promises.
        """
        settings = configs.build(config)
        objective, data = settings.objective, settings.data
        try:
            mesh = settings.mesh.build(devices)
            _check_offers(objective, data)
            _check_masking(objective, data)
            _check_shapes(objective, data)
            _check_report(settings)
            if not stand_in:
                check_first(data, jax.process_index())
                _check_labels(objective, data)
                _check_evaluations(settings)
            data.source.chosen()  # raises here if the labels do not allow the choice
            chosen = for_devices(objective, settings.attention, data.image_shape, mesh)
            check_forms(chosen, _tokens(chosen, data.image_shape), mesh)
        except ValueError as error:
            raise configs.ConfigError(f"config: {error}") from error
        _check_batch(settings, sharding.row_parts(mesh))
        total = settings.steps
        if total is None:
            draws = settings.epoch_images or len(data.source)
            total = math.ceil(settings.epochs * draws / settings.batch_size)
        stop = min(total, settings.stop_after or total)
        settings = dataclasses.replace(settings, objective=objective.for_run(total))
        chosen = chosen.for_run(total)
        schedule = settings.optim.schedule(settings.batch_size, settings.epochs, total)
        try:
            tx = settings.optim.build(schedule, total, chosen.frozen, chosen.late)
        except ValueError as error:
            raise configs.ConfigError(f"config: {error}") from error
        text = configs.dumps(config)
        return cls(settings, chosen, mesh, tx, schedule, total, stop, text)

    @property
    def epoch_images(self) -> int:
        """Number of images drawn per epoch."""
        return self.settings.epoch_images or len(self.settings.data.source)

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of the training example that a step reads."""
        return self.objective.batch_fields

    @property
    def on_cpus(self) -> bool:
        """Whether the devices are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def forms(self) -> str:
        """A line for people that names the chosen forms."""
        rows = "merged" if self.on_cpus else "as they are"
        return f"{described(self.objective)}; rows of dense layers {rows}"

    @property
    def create(self):
        """A function without arguments that makes the first state."""
        settings = self.settings
        return functools.partial(
            states.create,
            settings.objective,
            self.tx,
            scan=settings.scan,
            **self._origin,
        )

    @property
    def _origin(self) -> dict[str, Any]:
        """What decides the first state, besides objective and optimiser."""
        settings = self.settings
        return dict(seed=settings.seed, image_shape=settings.data.image_shape)

    @functools.cached_property
    def initial(self) -> Callable[[], tuple[Any, Any]]:
        """A jitted function without arguments that makes the parameters and the
        statistics of the first state, each array in its shards."""
        settings, like = self.settings, self.abstract_state()

        def make():
            trees = states.initial(settings.objective, **self._origin)
            return tuple(states.layout(tree, settings.scan) for tree in trees)

        placed = sharding.shardings_of((like.params, like.stats))
        return jax.jit(make, out_shardings=placed)

    def first_state(self) -> TrainState:
        """The first state, each array in its shards: what `create` makes."""
        # The closing report makes the first parameters, too. So they have a program of
        # their own, which is most of what there is to compile.
        return self._begin(*self.initial())

    @functools.cached_property
    def _begin(self) -> Callable[..., TrainState]:
        """A jitted function from what `initial` makes to the first state; it uses up
        its arguments."""
        begin = functools.partial(
            states.begun, self.settings.objective, self.tx, **self._origin
        )
        placed = sharding.shardings_of(self.abstract_state())
        return jax.jit(begin, donate_argnums=(0, 1), out_shardings=placed)

    def abstract_state(self) -> TrainState:
        """The state with a ShapeDtypeStruct (and sharding) in place of each array."""
        return self._abstract_state

    @functools.cached_property
    def _abstract_state(self) -> TrainState:
        shapes = jax.eval_shape(self.create)
        return sharding.placed(shapes, sharding.by_path(shapes, self.mesh))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields that a step reads, as ShapeDtypeStructs with their shardings."""
        rows, rule = self.settings.batch_size, sharding.by_row(self.mesh)
        shapes = self.settings.data.shapes
        return {
            name: jax.ShapeDtypeStruct((rows, *shape), kind, sharding=rule)
            for name in self.reads
            for shape, kind in [shapes[name]]
        }

    def abstract_bound(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a step takes besides: the bound of the loss, if the policy for spikes
        acts, as a ShapeDtypeStruct with its sharding."""
        if not self.settings.spikes.acts:
            return ()
        rule = sharding.replicated(self.mesh)
        return (jax.ShapeDtypeStruct((), np.float32, sharding=rule),)


def for_devices(
    objective: Objective,
    attention: str,
    image_shape: tuple[int, int, int],
    mesh: jax.sharding.Mesh | None = None,
) -> Objective:
    """The objective with the forms of its operations chosen for some devices.

    Args:
        attention: the form of attention, or "auto", as in `config.attention`.
        image_shape: rows, columns and channels.
        mesh: the devices; None: the first device of this process.
    Raises:
        ValueError: the form is unknown or cannot run on these devices.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    tokens = _tokens(objective, image_shape)
    return with_kernels(objective, attention, tokens, device, mesh)


def for_evaluation(
    objective: Objective, attention: str, image_shape: tuple[int, int, int]
) -> tuple[Objective, str]:
    """The objective of a trained run for the first device of this process.

    Forms are chosen as in training. If the run's config names a form that this device
    cannot run, "auto" chooses another.

    Returns:
        The objective, and a line for people that names its forms.
    """
    try:
        found = for_devices(objective, attention, image_shape)
    except ValueError:
        found = for_devices(objective, "auto", image_shape)
    return found, described(found)


def _tokens(objective: Objective, image_shape: tuple[int, int, int]) -> int:
    """Length of the longest sequence, the class token included."""
    return objective.grid(image_shape).size + 1


def _check_offers(objective: Objective, data: Input) -> None:
    """ValueError unless the data offer the fields that a step reads."""
    name = type(objective).__name__
    data.check_offers(objective.reads, name)
    for word, masking in objective.maskings.items():
        data.check_offers(masking.reads, f"{word} {type(masking).__name__} of {name}")
    data.check_offers(objective.batch_fields, name)


def _check_shapes(objective: Objective, data: Input) -> None:
    """ValueError unless the images that the objective reads fit it."""
    for name in objective.reads:
        shape, kind = data.shapes[name]
        if len(shape) >= 3 and kind is np.uint8:  # an image, or several
            rows, cols, channels = shape[-3:]
            objective.check_shape((rows, cols, channels))


def _check_report(settings: configs.Train) -> None:
    """ValueError if the closing report cannot measure the objective."""
    for name, one in settings.closing.items():
        try:
            one.check_objective(settings.objective)
        except ValueError as error:
            also = name in settings.also
            raise ValueError(
                f"config.also: {name} measures the run when it ends: {error}"
                if also
                else f"config.report measures every run when it ends: {error}, or "
                "another report, such as --config=configs/FILE.py:eval=knn"
            ) from error


def _check_evaluations(settings: configs.Train) -> None:
    """ValueError if data of an evaluation are missing, or one that is to run while
    training cannot measure the objective."""
    objective, passes = settings.objective, EvalPasses(settings.data)
    for one in settings.closing.values():
        one.check_data(objective, passes)
    every, found = settings.evaluate_every, settings.evaluations
    if every and not found:
        raise ValueError(
            f"evaluate_every={every}: no evaluation fits {type(objective).__name__} on "
            "images without labels by itself; want some by name, such as "
            """--config.evaluate_with='("cka",)'"""
        )
    for name, one in found.items():
        try:
            one.check_objective(objective)
            one.check_data(objective, passes)
        except ValueError as error:
            raise ValueError(
                f"config.evaluate_with: {name} measures the run every {every} steps: "
                f"{error}"
            ) from error


def _check_masking(objective: Objective, data: Input) -> None:
    """ValueError unless field `masking` draws the masks that it promises."""
    if "masking" not in objective.maskings:
        return
    masking, shapes = objective.maskings["masking"], data.shapes
    grid, name = objective.grid(data.image_shape), type(masking).__name__
    wrote = {part: getattr(type(masking), part) for part in ("first_memory", "refresh")}
    lacks = [part for part, one in wrote.items() if one is getattr(Masking, part)]
    if masking.refresh_every and lacks:
        raise ValueError(
            f"masking {name} has refresh_every={masking.refresh_every}, so a memory, "
            f"and no method {' and no method '.join(lacks)}: want both methods, or "
            "refresh_every=0"
        )
    _check_visible_count(masking, grid)
    _check_names(masking)
    batch = {
        field: jax.ShapeDtypeStruct((2, *shape), kind)
        for field in masking.reads
        for shape, kind in [shapes[field]]
    }

    def drawn(batch):
        given = dict(batch)
        if masking.refresh_every:
            given["memory"] = masking.first_memory(grid)
        mask = masking(jax.random.split(jax.random.key(0), 2), grid, **given)
        if not isinstance(mask, Mask):
            raise ValueError(
                f"masking {name} returned {returned(mask)}: want a Mask, such as "
                "from_scores(scores, self.visible_count(grid))"
            )
        return mask

    try:
        mask = jax.eval_shape(drawn, batch)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"masking {name} cannot draw: {raised(error)}") from error
    visible, want = mask.keep.shape[1], masking.visible_count(grid)
    if visible != want:
        raise ValueError(
            f"masking {name}: its masks leave {visible} of {grid.size} patches "
            f"visible, and its visible_count says {want}: want the same"
        )


def _check_visible_count(masking: Masking, grid: Grid) -> None:
    """ValueError unless a masking's visible count is a number."""
    count = masking.visible_count(grid)
    if not isinstance(count, int):
        raise ValueError(
            f"masking {type(masking).__name__}: its visible_count is "
            f"{returned(count)}: want an int, by round()"
        )


def _check_names(masking: Masking) -> None:
    """ValueError unless a masking can take the arguments that it will be given."""
    names = [*masking.reads, *(["memory"] if masking.refresh_every else [])]
    try:
        inspect.signature(masking).bind(None, None, **dict.fromkeys(names))
    except TypeError as error:
        memory = " and memory" if masking.refresh_every else ""
        raise ValueError(
            f"masking {type(masking).__name__}: {error}, with reads={masking.reads!r}"
            f"{memory}: reads=(...) and __call__ must name the same fields"
        ) from error


def _check_labels(objective: Objective, data: Input) -> None:
    """ValueError if the source lacks the labels that the objective reads, or has more
    classes than the objective."""
    if isinstance(objective, Detector):
        known = len(data.source.object_classes)
        if objective.classes < known or not known:
            raise ValueError(
                f"objective.classes={objective.classes}: objects of data.source have "
                f"{known} classes; want objective.classes={known}"
                if known
                else "data.source has no objects with classes, which "
                f"{type(objective).__name__} reads; want a source with objects, such "
                "as scenes"
            )
    if "label" not in objective.reads:
        return
    if not data.source.classes:
        raise ValueError(
            f"data.source has no labels, which {type(objective).__name__} reads; want "
            "a source with classes, such as digits"
        )
    known = len(data.source.classes)
    if isinstance(objective, LabelObjective) and objective.classes < known:
        raise ValueError(
            f"objective.classes={objective.classes}: data.source has {known} classes, "
            "and the loss would ignore images of the remaining ones; want "
            f"objective.classes={known}"
        )


def _check_batch(settings: configs.Train, parts: int) -> None:
    """ConfigError unless the objective allows micro-batches and the mesh divides them
    evenly."""
    objective, accumulate = settings.objective, settings.accumulate
    coupled = objective.batch_coupled and not settings.accumulate_coupled
    if accumulate > 1 and coupled:
        raise configs.ConfigError(
            f"config.accumulate={accumulate}: in the loss of "
            f"{type(objective).__name__} every image depends on the whole batch, so "
            "micro-batches would change the loss; want accumulate=1, or "
            "--config.accumulate_coupled=true to compute it per micro-batch"
        )
    if settings.batch_size // accumulate % parts:
        raise configs.ConfigError(
            f"config.batch_size={settings.batch_size} in {accumulate} micro-batch(es) "
            f"on {parts} parts of the mesh: want a multiple of {accumulate * parts}"
        )
