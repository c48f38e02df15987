# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/, with every variant that it names, fits the program."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config, evaluate, presets, train
from mim_jax.data.sources.coco import Coco
from mim_jax.data.sources.tfds import Tfds
from mim_jax.plan import Plan
from mim_jax.trees import VariantError

ROOT = pathlib.Path(__file__).parents[1]
# Studies that do not run on handwritten digits, and their sizes.
SIZES = {
    "study_p2_table2": ("cues",),
    "study_p2_table3": ("scenes",),
    "study_p2_theorem2": ("hierarchy",),
    "study_p2_proposals": ("hierarchy",),
}
# file: the variants to try besides none. A preset that its file knows must be here.
FILES = {
    "mae.py": (
        "mnist",
        "cifar10",
        "photos",
        "masking=grid",
        "masking=block",
        "photos,masking=grid",
        "photos,source=digits",
        "digits",
        "cues",
        "hierarchy",
        "scenes",
        *presets.OWN,
    ),
    "rmae.py": ("mnist", "photos", "digits", "hierarchy", "scenes", "cifar10", "tiny"),
    "cmae.py": ("mnist", "digits", "scenes", "cifar10", "masking=none", *presets.OWN),
    "mocov3.py": ("mnist", "digits", "tiny"),
    "dino.py": ("mnist", "digits", "tiny"),
    "supervised.py": ("mnist", "digits", "hierarchy", "cifar10", "tiny"),
    "beit.py": (
        *("mnist", "digits", "masking=random", "digits,masking=random"),
        "tiny",
    ),
    "few.py": (
        *("mnist", "photos", "source=photos"),
        *("objective=rmae", "objective=cmae"),
    ),
    "reconstruction.py": ("eval=reconstruction",),
    "finetune.py": (
        *("mnist", "digits", "cues", "cifar10"),
        *("10pct", "1pct", "mnist-10pct", "digits-10pct", *presets.OWN),
    ),
    "linear_probe.py": ("mnist", "digits", "cues", "cifar10", "tiny"),
    "detect.py": ("scenes", "source=tfds"),
    "detection.py": (),
    "knn.py": (),
    "latents.py": (),
    "linear.py": (),
    "ridge.py": (),
    "cka.py": (),
    "occlusion.py": (),
    "attention.py": (),
    "tsne.py": (),
    "robustness.py": ("mnist", "digits"),
    "shape_bias.py": (),
    "compare.py": (),
    "explore.py": (),
    "study.py": ("mnist", "cues", "digits", "hierarchy", "scenes"),
    **{
        path.name: SIZES.get(path.stem, ("mnist", "digits"))
        for path in (ROOT / "configs").glob("study_*.py")
    },
}
ARGUMENTS = [
    f"configs/{name}" + (f":{variant}" if variant else "")
    for name, variants in FILES.items()
    for variant in ("", *variants)
]
every_config = pytest.mark.parametrize("argument", ARGUMENTS)
# Their steps are those of other variants at other sizes.
_ALIKE = re.compile(
    r":(photos|digits|tiny|cifar10|cues|.*10pct|1pct|" + "|".join(presets.OWN) + r")\b"
)


@pytest.fixture
def imagenet(monkeypatch):
    """Stands for a prepared ImageNet or CIFAR-10: length, channels and a black
    image."""

    def classes(self):
        return tuple(map(str, range(10 if self.dataset == "cifar10" else 1000)))

    monkeypatch.setattr(Tfds, "__post_init__", lambda self: None)
    monkeypatch.setattr(Tfds, "__len__", lambda self: 1281167)
    monkeypatch.setattr(Tfds, "channels", 3)
    monkeypatch.setattr(Tfds, "classes", property(classes))
    monkeypatch.setattr(Tfds, "fingerprint", lambda self: {"split": self.split})
    monkeypatch.setattr(Tfds, "object_classes", tuple(map(str, range(80))))
    black = {"image": np.zeros((300, 400, 3), np.uint8), "label": 0}
    box = {"bbox": np.array([[0.1, 0.1, 0.5, 0.5]], np.float32), "label": np.zeros(1)}
    black["objects"] = box
    monkeypatch.setattr(Tfds, "__getitem__", lambda self, index: black)
    # COCO's folder: as many classes.
    monkeypatch.setattr(Coco, "__post_init__", lambda self: None)
    monkeypatch.setattr(Coco, "__len__", lambda self: 117266)
    monkeypatch.setattr(Coco, "object_classes", tuple(map(str, range(80))))
    monkeypatch.setattr(Coco, "fingerprint", lambda self: {"split": self.split})
    monkeypatch.setattr(Coco, "note", "")
    monkeypatch.setattr(Coco, "__getitem__", lambda self, index: black)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_file_is_tested():
    assert {path.name for path in (ROOT / "configs").glob("*.py")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_every_preset_is_tested(name):
    with pytest.raises(VariantError) as known:
        config.read(f"configs/{name}:?")
    # The sizes for own images are the same in every file that has them.
    assert set(known.value.known) - set(presets.OWN) <= set(FILES[name])


@every_config
def test_a_config_is_locked_and_stated(argument):
    tree = config.read(argument)
    assert tree.is_locked and tree.job in config.JOBS
    assert config.dumps(tree)


@every_config
def test_a_config_builds(argument, imagenet):
    tree = config.read(argument)
    if tree.job != "train":
        if tree.job == "study":
            tree.study = tree.study or "any"
        needed = {"eval": dict(run="runs/any"), "compare": dict(runs=("a",))}
        needed["explore"] = dict(runs=("a", "b"))
        tree.update(needed.get(tree.job) or dict(seeds=(3,)))
        config.build(tree)
        return
    _fit_colours(argument, tree)
    Plan.of(tree, jax.devices()[:1])


def _fit_colours(argument: str, tree: config.Tree) -> None:
    if argument.endswith("photos,source=digits"):  # grey, and its colours are not
        tree.objective.update(dict(mean=(0.5,), std=(0.25,), color_jitter="none"))


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param(one, marks=pytest.mark.slow if _ALIKE.search(one) else ())
        for one in ARGUMENTS
        if config.read(str(ROOT / one)).job == "train"
    ],
)
def test_a_step_traces(argument, imagenet):
    tree = config.read(argument)
    _fit_colours(argument, tree)
    # Blocks are alike: more than one takes longer to trace, and shows no more.
    for network in ("encoder", "decoder"):
        if network in tree.objective:
            tree.objective[network].depth = 1
    plan = Plan.of(tree, jax.devices()[:1])
    state = plan.abstract_state()
    step = lambda state, batch: train.train_step(  # noqa: E731
        state,
        batch,
        objective=plan.settings.objective,
        tx=plan.tx,
        micro_batches=plan.settings.accumulate,
    )
    after, metrics = jax.eval_shape(step, state, plan.abstract_batch())
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == () and plan.total >= 1
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("name", FILES)
def test_the_header_gives_a_command_that_names_the_file(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / name).read_text()))
    commands = re.findall(r"--config=(configs/[^ \n\\]+)", text)
    assert commands
    for argument in commands:
        assert argument.split(":")[0] == f"configs/{name}"
        config.read(argument)


def test_mae_is_the_recipe_of_its_paper(imagenet):
    # arXiv:2111.06377, table 8, for the 100 epochs of arXiv:2208.04164.
    built = config.build(config.read("configs/mae.py"))
    assert (built.epochs, built.batch_size) == (100.0, 1024)
    assert (built.optim.base_lr, built.optim.warmup_epochs) == (1.5e-4, 20.0)
    assert (built.optim.b1, built.optim.b2) == (0.9, 0.95)
    assert built.optim.weight_decay == 0.05
    assert built.objective.masking.ratio == 0.75
    assert built.objective.normalise_target
    assert built.data.image_size == (224, 224)
    plan = Plan.of(config.read("configs/mae.py"))
    assert plan.total == 125114  # ceil(100 epochs * 1281167 / 1024)
    assert plan.schedule(plan.total * 0.2) == pytest.approx(6e-4, rel=1e-5)


@pytest.mark.parametrize(
    "objective, rate", [("mae", 1.5e-4), ("rmae", 3e-4), ("cmae", 1.5e-4)]
)
def test_each_method_has_its_rate_on_few_images_too(objective, rate, imagenet):
    # arXiv:2208.04164, section 5.
    for argument in (
        f"configs/{objective}.py",
        f"configs/few.py:objective={objective}",
    ):
        assert config.read(argument).optim.base_lr == rate


def test_without_data_the_error_shows_three_ways_out(tmp_path):
    tree = config.read("configs/mae.py")
    tree.data.source.data_dir = str(tmp_path)
    with pytest.raises(config.ConfigError) as caught:
        config.build(tree)
    text = str(caught.value)
    assert text.startswith(
        "config.data.source: data set 'imagenet2012' is not prepared: looked for "
        f"{tmp_path}/imagenet2012/VERSION/dataset_info.json"
    )
    assert f"mim_jax.data.prepare imagenet2012 --data_dir={tmp_path}" in text
    assert "pip install -e '.[prepare]'" in text
    assert "--config=configs/mae.py:photos" in text


def test_plans_refuse_what_does_not_fit_before_anything_compiles(imagenet):
    def refused(message, **changes):
        tree = config.read("configs/mae.py:photos")
        for path, value in changes.items():
            node = tree
            *above, name = path.split("__")
            for part in above:
                node = node[part]
            node[name] = value
        with pytest.raises(config.ConfigError) as caught:
            Plan.of(tree)
        assert message in str(caught.value)

    refused("unit=6 pixels with a ViT patch of 4", objective__masking__unit=6)
    refused("image 33x32 with patch=4: want both", data__image_size=(33, 32))
    refused("mesh data=3 x fsdp=1 x tensor=1 on 8 device(s)", mesh__data=3)
    refused("on 8 parts of the mesh: want a multiple of 8", batch_size=12)
    refused("encoder.width=62, encoder.heads=2", objective__encoder__width=62)
    refused("want one number per channel", objective__mean=(0.5,))


def test_an_eval_of_nothing_says_what_it_wants(tmp_path):
    tree = config.read("configs/reconstruction.py")
    tree.run = str(tmp_path)
    with pytest.raises(config.ConfigError, match="no config.json there; want the work"):
        evaluate.run(tree, tmp_path / "report")
