# SPDX-License-Identifier: Apache-2.0
"""What can be configured: the jobs, and the plug-ins that each kind has.

A config is a tree with one typed leaf per field of the job's dataclass and of all
dataclasses below it. `mim_jax.schema` says how fields become leaves, `mim_jax.trees`
does the work. Plug-ins are chosen by name from the tables of KINDS; `register` and
`load_plugins` add rows from outside.

Example:
    >>> from mim_jax import config
    >>> from mim_jax.maskings.base import Masking
    >>> tree = config.experiment("train", objective="mae", source="digits")
    >>> tree.objective.masking = config.choose(Masking, "grid", cell=4)
    >>> config.build(tree).objective.masking
    GridMasking(cell=4)
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from mim_jax.data.examples import EXAMPLES
from mim_jax.data.examples.base import Examples
from mim_jax.data.input import Input
from mim_jax.data.sources import SOURCES
from mim_jax.data.sources.base import Source
from mim_jax.evals import EVALS
from mim_jax.evals.attention import Attention
from mim_jax.evals.base import Eval
from mim_jax.evals.cka import CKA
from mim_jax.evals.knn import KNN
from mim_jax.evals.reconstruction import Reconstruction
from mim_jax.evals.robustness import Robustness
from mim_jax.evals.tsne import TSNE
from mim_jax.maskings import MASKINGS
from mim_jax.maskings.base import Masking
from mim_jax.models.vit import REMAT
from mim_jax.objectives import OBJECTIVES
from mim_jax.objectives.base import (
    Detector,
    LabelObjective,
    Objective,
    PixelObjective,
)
from mim_jax.objectives.mae import MAE
from mim_jax.optim import OPTIMISERS, AdamW, Optimiser
from mim_jax.run.checkpoint import Checkpoints
from mim_jax.run.log import Log
from mim_jax.run.plugins import load_plugins as load_plugins
from mim_jax.run.profiler import traced_steps
from mim_jax.run.spikes import Spikes
from mim_jax.schema import ConfigError as ConfigError
from mim_jax.schema import check_ranges, formerly, free, within
from mim_jax.sharding import Mesh
from mim_jax.tokenizers import TOKENIZERS
from mim_jax.tokenizers.base import Tokenizer
from mim_jax.trees import Tree as Tree
from mim_jax.trees import Trees
from mim_jax.trees import dumps as dumps
from mim_jax.trees import read as read

KINDS: dict[type, tuple[str, dict[str, type]]] = {
    Objective: ("objective", OBJECTIVES),
    Masking: ("masking", MASKINGS),
    Tokenizer: ("tokenizer", TOKENIZERS),
    Source: ("source", SOURCES),
    Examples: ("examples", EXAMPLES),
    Eval: ("eval", EVALS),
    Optimiser: ("optimiser", OPTIMISERS),
}

DTYPES = ("bfloat16", "float32", "float64")
# Environment variables that name folders of data.
DATA_FOLDERS = ("TFDS_DATA_DIR", "COCO_DIR", "OBJECTNET_DIR", "CUE_CONFLICT_DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """The run whose parameters another one begins with.

    Attributes:
        run: run directory; "" begins from scratch. `Objective.adopt` says what of
            this run's config the other one decides.
        keep: leaves of `objective`, such as "pool", that the other run does not decide
            all the same.
        data: parts of `data`, such as "source", that the other run decides; without
            those that the command line sets. Of a source `few`, the whole is taken.
        step: checkpoint to read; None is the newest.
        weights: "trained", or "teacher": the averaged ones of methods that have them.
        parts: paths of parameters to take, with all below them.
    """

    run: str = ""
    step: int | None = within(None, least=0)
    weights: Literal["trained", "teacher"] = "trained"
    parts: tuple[str, ...] = ("encoder",)
    keep: tuple[str, ...] = ()
    # What they decide stands in the leaves themselves, which a resumed run compares.
    data: tuple[str, ...] = free(())

    def __post_init__(self):
        if self.run and not self.parts:
            raise ValueError(f"parts={self.parts}: want at least one, such as encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Job "train": the one loop, for any objective.

    Attributes:
        seed: of parameters, data order, crops and masks.
        epochs: passes over the source; `steps`, if set, decides instead and keeps the
            warm-up's share of the run.
        epoch_images: images drawn in what counts as an epoch; None is the size of the
            source. ImageNet's 1,281,167 gives few images the steps of many.
        steps: optimiser steps of the whole run: its length and the schedule's horizon.
        stop_after: end early, after this many steps in all; the schedule is unchanged.
        batch_size: images per step, over all devices.
        accumulate: micro-batches per step.
        accumulate_coupled: let objectives whose examples depend on each other work per
            micro-batch, which is another loss.
        dtype: of activations; parameters, statistics and losses stay float32.
        init_from: a run to begin with.
        count_classes: let `objective.classes` be the number of classes of the source,
            unless the command line sets it.
        scan: run the blocks as one loop: compiles faster, same result.
        remat: what the backward pass recomputes: none, dots (all but matmuls), full.
        attention: the form of attention: "auto" takes what measurements on such
            devices chose, for time or for memory; "plain" runs everywhere;
            `mim_jax.kernels.FORMS` has the others.
        spikes: what to do when the loss of a step spikes.
        report: the evaluation that ends the run.
        also: names of further evaluations that end it, with their defaults.
        evaluate_every: steps between evaluations of the state in memory; None is off.
            The end of the run is evaluated too.
        evaluate_with: names of these evaluations. () takes those that fit: `knn` if
            the source has labels, `reconstruction` for objectives that predict pixels,
            `detection` for those that find objects, `robustness` on the held-out
            images alone for those that learn labels.
        on_change: "refuse" or "accept" to resume a run with another config.
        compile_cache: keep compiled programs in the user's folder for caches
            (docs/security.md).
        profile: "FIRST:COUNT" writes a trace of COUNT steps, the first being FIRST
            (counted from 1), to the folder profile/ of the run.
        plugins: modules that add plug-ins to the tables; set by --plugins. A resumed
            run may add modules, and refuses to start without one that it has recorded.
    """

    seed: int = within(0, least=0, most=2**31 - 1)
    epochs: float = within(100.0, above=0, most=1e6)
    epoch_images: int | None = within(None, least=1, most=2**31 - 1)
    steps: int | None = within(None, least=1, most=2**31 - 1)
    stop_after: int | None = free(within(None, least=1, most=2**31 - 1))
    batch_size: int = within(1024, least=1, most=2**20)
    accumulate: int = within(1, least=1, most=2**20)
    accumulate_coupled: bool = False
    dtype: str = "bfloat16"
    scan: bool = True
    remat: str = "dots"
    attention: str = "auto"
    init_from: InitFrom = InitFrom()
    count_classes: bool = free(False)
    objective: Objective = MAE()
    data: Input
    optim: Optimiser = formerly("adamw", AdamW())
    mesh: Mesh = Mesh()
    checkpoint: Checkpoints = free(Checkpoints())
    log: Log = free(Log())
    spikes: Spikes = Spikes()
    report: Eval = Reconstruction()
    also: tuple[str, ...] = free(())
    evaluate_every: int | None = free(within(None, least=1, most=2**31 - 1))
    evaluate_with: tuple[str, ...] = free(())
    on_change: str = free("refuse")
    compile_cache: bool = free(True)
    profile: str = free("")
    plugins: tuple[str, ...] = free(())

    def __post_init__(self):
        check_ranges(self)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} in accumulate={self.accumulate} "
                "micro-batches: want a multiple"
            )
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("remat", self.remat, REMAT)
        _one_of("on_change", self.on_change, ("refuse", "accept"))
        for name in self.evaluate_with:
            _one_of("evaluate_with", name, EVALS)
        for name in self.also:
            _one_of("also", name, EVALS)
            if EVALS[name] is type(self.report):
                raise ValueError(f"also={name!r}: it is the report already")
        if self.evaluate_with and self.evaluate_every is None:
            raise ValueError(
                f"evaluate_with={self.evaluate_with} and evaluate_every=None: want "
                "evaluate_every=N, the number of steps between evaluations"
            )
        traced_steps(self.profile)  # raises if it is none
        self.optim.schedule(self.batch_size, self.epochs, 1)  # raises if it cannot be

    @property
    def closing(self) -> dict[str, Eval]:
        """The evaluations that end the run, by name: `report`, then those of `also`."""
        (first,) = (name for name, cls in EVALS.items() if cls is type(self.report))
        return {first: self.report} | {name: EVALS[name]() for name in self.also}

    @property
    def evaluations(self) -> dict[str, Eval]:
        """What `evaluate_every` measures, by name; {} if it is off, or nothing fits.

        An evaluation that `report` names too has the settings of `report`. Only the
        accuracy that no one asked for by name leaves out the sets of `report`.
        """
        if self.evaluate_every is None:
            return {}
        names = self.evaluate_with
        if not names:
            fits = {
                "knn": bool(self.data.source.classes),
                "detection": isinstance(self.objective, Detector),
                "reconstruction": isinstance(self.objective, PixelObjective),
                "robustness": isinstance(self.objective, LabelObjective),
            }
            names = tuple(name for name, fit in fits.items() if fit)
        found = {
            name: self.report if type(self.report) is EVALS[name] else EVALS[name]()
            for name in names
        }
        if not self.evaluate_with and "robustness" in found:
            found["robustness"] = Robustness()
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """The images of an evaluation.

    Attributes:
        source: read in place of the run's own source, which then need not be on this
            machine; None: the run's. Their size, crop and standardisation are the
            run's in any case. `--config=configs/knn.py:source=folder` names one.
    """

    source: Source | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Job "eval": one evaluation of a run, which says itself what it is.

    Attributes:
        run: run directory; its own config decides architecture and data.
        also: further run directories, measured alike, for figures side by side; their
            images must be of the same source and size.
        step: checkpoint to read; None is the newest.
        weights: "trained"; "teacher", the averaged ones of methods that have them; or
            "initial", new ones by the run's seed: the random baseline.
        data: which images, if not the run's.
        eval: what to measure.
        plugins: modules that add plug-ins to the tables; set by --plugins.
    """

    run: str = ""
    also: tuple[str, ...] = ()
    step: int | None = within(None, least=0)
    weights: Literal["trained", "teacher", "initial"] = "trained"
    data: Images = Images()
    eval: Eval = Reconstruction()
    plugins: tuple[str, ...] = free(())

    def __post_init__(self):
        if not self.run:
            raise ValueError(
                "run is empty: name a run directory, e.g. --config.run=runs/mae"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Job "compare": several runs on one page.

    Attributes:
        runs: run directories that read the same images.
        step: checkpoint to read of each; None is the newest.
        random: show the first run before training, too.
        skip: evaluations to leave out, by name.
        also: further evaluations, by name, with their defaults.
        data: which images, if not the runs' own.
        reconstruction, knn, cka, attention, tsne: what is measured.
        plugins: modules that add plug-ins to the tables; set by --plugins.
    """

    runs: tuple[str, ...] = ()
    step: int | None = within(None, least=0)
    random: bool = True
    skip: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    data: Images = Images()
    reconstruction: Reconstruction = Reconstruction(draws=1, inpainted=0, rows=10)
    knn: KNN = KNN(k=(10,), rows=5)
    cka: CKA = CKA(images=2000, occlusion="model")
    attention: Attention = Attention(rows=4)
    tsne: TSNE = TSNE()
    plugins: tuple[str, ...] = free(())

    def __post_init__(self):
        if not self.runs:
            raise ValueError(
                "runs is empty: name run directories, e.g. "
                """--config.runs='("runs/mae","runs/cmae")'"""
            )
        for name in self.skip:
            _one_of("skip", name, self._groups)
        for name in self.also:
            _one_of("also", name, EVALS)
            if name in self._groups:
                raise ValueError(
                    f"also={name!r}: the page has it already; set --config.{name}.*"
                )

    @property
    def evaluations(self) -> dict[str, Eval]:
        """What is measured, by name, in the order of the page."""
        found = {n: one for n, one in self._groups.items() if n not in self.skip}
        return found | {name: EVALS[name]() for name in self.also}

    @property
    def _groups(self) -> dict[str, Eval]:
        """The evaluations that have config leaves here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: one for name, one in values.items() if isinstance(one, Eval)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore:
    """Job "explore": a page on which a person tries one or two runs.

    Attributes:
        runs: run directories, one or two, that read the same images.
        step: checkpoint to read of each; None is the newest.
        data: which images, if not the runs' own.
        bank: neighbours are looked for among so many training images at most, of all
            classes alike if records are sorted by class.
        neighbours: training images shown beside the one that was picked.
        upload_bytes: an uploaded file may have at most.
        port: of the page's address on this machine; 0 takes a free one.
        plugins: modules that add plug-ins to the tables; set by --plugins.
    """

    runs: tuple[str, ...] = ()
    step: int | None = within(None, least=0)
    data: Images = Images()
    bank: int = within(5000, least=1, most=10**6)
    neighbours: int = within(8, least=1, most=100)
    upload_bytes: int = within(20_000_000, least=1, most=2**31 - 1)
    port: int = within(8765, least=0, most=65535)
    plugins: tuple[str, ...] = free(())

    def __post_init__(self):
        check_ranges(self)
        if not 1 <= len(self.runs) <= 2:
            raise ValueError(
                f"runs={self.runs}: want one or two run directories, e.g. "
                """--config.runs='("runs/mae","runs/cmae")'"""
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStudy:
    """Job "study": all runs and evaluations behind a table or figure of a paper.

    Attributes:
        study: its name, a key of `mim_jax.studies.STUDIES`.
        size: "full" is the paper's; the others are embedded sources, at sizes for two
            CPU cores (`mim_jax.studies.sizes`).
        seeds: each run is trained once with each of them.
        class_list: at the paper's size, a file with the names of the classes that are
            read, one on each line, such as those of ImageNet-100; "" reads all.
        given: "ROW=RUNDIR": run directories, such as those of imported weights, that
            stand for the pre-training of rows of the study, by the rows' names.
        only: the name of one cell, to make in this process; "" makes all that are
            missing, each in a process of its own.
        commands: print commands instead of running anything: "local" one for each
            missing cell; "slurm" and "jobset" the same through the scripts of launch/;
            "aot" the compiler's account of each distinct run.
        data: "NAME=FOLDER": where data are, by the environment variables that sources
            and sets read: TFDS_DATA_DIR, COCO_DIR, OBJECTNET_DIR, CUE_CONFLICT_DIR.
        cells: begin at most so many missing cells.
        minutes: begin no cell after so many minutes.
        keep_runs: False deletes the run directories of finished cells from which no
            unfinished cell begins.
        recipes: folder of the config files that studies name.
        results: folder of cells/, and of one folder per study with its page; "" is
            docs/studies beside `recipes` if that is there, else the folder that the
            work directory is in.
        runs: folder of the run directories, which all studies share; "" is runs/ in the
            folder that the work directory is in.
        plugins: modules that add plug-ins and studies; set by --plugins.
    """

    study: str = ""
    size: Literal["full", "mnist", "cues", "digits", "hierarchy", "scenes"] = "full"
    seeds: tuple[int, ...] = within((0, 1, 2), least=0, most=2**31 - 1)
    class_list: str = ""
    given: tuple[str, ...] = ()
    data: tuple[str, ...] = free(())
    only: str = ""
    commands: Literal["", "local", "slurm", "jobset", "aot"] = ""
    cells: int | None = within(None, least=0)
    minutes: float | None = within(None, least=0)
    keep_runs: bool = True
    recipes: str = "configs"
    results: str = ""
    runs: str = ""
    plugins: tuple[str, ...] = free(())

    def __post_init__(self):
        if not self.study:
            raise ValueError(
                "study is empty: name one, e.g. --config=configs/study_p1_table1.py"
            )
        check_ranges(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: want each once")
        for one in self.data:
            name, _, folder = one.partition("=")
            if name not in DATA_FOLDERS or not folder:
                raise ValueError(
                    f"data={self.data}: {one!r} is no NAME=FOLDER; want NAME of "
                    f"{', '.join(DATA_FOLDERS)}"
                )
        if self.class_list and self.size != "full":
            raise ValueError(
                f"class_list={self.class_list!r} at size {self.size!r}: want size="
                "'full', or no class list"
            )


JOBS = {
    "train": Train,
    "eval": Evaluate,
    "compare": Compare,
    "explore": Explore,
    "study": RunStudy,
}

TREES = Trees(KINDS, JOBS)

schema = TREES.schema
choose = TREES.choose
experiment = TREES.experiment
variant = TREES.variant
build = TREES.build
load = TREES.load
filled = TREES.filled
changed = TREES.changed
check_path = TREES.check_path
difference = TREES.difference
write = TREES.write


def objective_class(tree: Tree) -> type[Objective]:
    """The class of a training job's objective."""
    return TREES.chosen(Objective, tree.objective, "config.objective")


def build_objective(tree: Tree) -> Objective:
    """The objective of a training job alone: its data need not be here.

    Raises:
        ConfigError: as `build`.
    """
    return TREES.build_part(tree, "objective")


def build_source(tree: Tree) -> Source:
    """The data source of a training job alone.

    Raises:
        ConfigError: as `build`.
    """
    return TREES.build_part(tree, "data").source


def register(name: str, cls: type) -> None:
    """Adds a plug-in from outside to the table of the kind that its class derives from.

    A module that calls this is named by `--plugins=my_module`, or imported by your own
    program. From then on configs choose the class by its name, as
    `--config=configs/mae.py:masking=top` does here. A source that worker processes read
    is defined in a module, not in a notebook, so that they can import it.

    Example:
        >>> import dataclasses, jax.numpy as jnp
        >>> from mim_jax import config
        >>> from mim_jax.maskings.base import Masking
        >>> from mim_jax.ops.masking import from_scores
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Top(Masking):
        ...     rows: int = 1  # of patches, which stay visible
        ...
        ...     def visible_count(self, grid):
        ...         return self.rows * grid.cols
        ...
        ...     def __call__(self, keys, grid):
        ...         order = jnp.arange(grid.size, dtype=jnp.int32)
        ...         scores = jnp.broadcast_to(order, (len(keys), grid.size))
        ...         return from_scores(scores, self.visible_count(grid))
        >>> config.register("top", Top)
        >>> tree = config.experiment("train", source="digits", masking="top")
        >>> tree.objective.masking.rows = 2
        >>> config.build(tree).objective.masking
        Top(rows=2)

    Args:
        name: in configs.
        cls: a frozen dataclass; its fields are leaves of the config
            (`mim_jax.schema`). It derives from one of the classes in KINDS, and has all
            methods that this one demands.
    Raises:
        ConfigError: the class is of no kind or cannot be configured, with the field and
            the remedy; or the name belongs to another class.
    """
    TREES.register(name, cls)


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(known)}")
