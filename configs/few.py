# SPDX-License-Identifier: Apache-2.0
"""MAE ViT-B/16 on one image of ImageNet-1k, tables 6 to 8 of arXiv:2208.04164.

python -m mim_jax.main --config=configs/few.py --workdir=runs/few \
    --config.data.source.images=1000 --config.stop_after=12512

An epoch is 1,281,167 draws, each with a new crop and new colours ("stronger
augmentation", which the paper does not specify: docs/deviations.md). The paper stops
early: after 5 epochs with 1 or 10 images, after 10 with 100 or 1,000. The leaf
stop_after does that: 6,256 steps by default, 12,512 for 10 epochs. The schedule remains
that of 100 epochs. With --config.stop_after=125114 the run goes on to its end, as in
the last rows of table 6.

--config.data.source.sampling=random, one_class or one_per_class (table 7) and
--config.data.source.seed choose the images; images.json in the run directory lists
them. The variant names another data set, `:source=folder`, or another method of table
8, `:objective=rmae` or `:objective=cmae`. Base learning rates are those of section 5:
3e-4 for R-MAE, 1.5e-4 for MAE and C-MAE. MAE jitters the colours of the whole image and
C-MAE those of each view; R-MAE has no jitter, as in the paper.

Hardware: 32 x TPU v5e, about 3 minutes for 5 epochs by arithmetic; not yet run.
Paper: 82.3 fine-tuned with 1 image, 82.1 with 1,000 (table 6).

Variant `:mnist`: one handwritten digit, at the size of configs/mae.py:mnist; more with
--config.data.source.images=N. Variant `:photos`: one photograph that ships inside
scikit-image or scikit-learn, at the size of configs/mae.py:photos. It needs no data set
and no accelerator. The PSNR of hidden pixels of held-out photographs is 16.0 dB;
training on twelve photographs gives 16.6, the visible mean 15.2 (docs/photos.md says
how that is measured; jax 0.10.2, two x86-64 cores).

python -m mim_jax.main --config=configs/few.py:photos --workdir=runs/few-photos
"""

from mim_jax import config, presets
from mim_jax.data.sources.base import Source
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("mnist", "photos"))
    chosen = {"objective": "mae", "source": presets.source_of(preset)} | chosen
    whole = config.choose(Source, chosen["source"])
    c = config.experiment("train", **(chosen | {"source": "few"}))
    c.data.source = config.choose(Source, "few", source=whole, images=1)
    c.epochs = 100.0
    c.epoch_images = 1281167
    c.stop_after = 6256
    c.batch_size = 1024
    c.optim.base_lr = 3e-4 if chosen["objective"] == "rmae" else 1.5e-4
    c.optim.warmup_epochs = 20.0
    c.data.crop_scale = (0.08, 1.0)
    if "decoder" not in c.objective:
        c.report = config.choose(Eval, "knn")
    if chosen["objective"] == "mae":
        c.objective.color_jitter = "whole"
    if "jitter" in c.objective:
        c.objective.jitter.blur_p = 0.5
    presets.apply(c, preset)
    if preset:
        c.stop_after = None
    if preset == "photos":
        c.data.source.seed = 5  # chooses the astronaut
    return c
