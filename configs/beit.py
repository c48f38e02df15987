# SPDX-License-Identifier: Apache-2.0
"""BEiT ViT-B/16 on ImageNet-1k for 800 epochs, the recipe of arXiv:2106.08254.

python -m mim_jax.main --config=configs/beit.py --workdir=runs/beit

Hyper-parameters are those of the paper's appendix for the base model: AdamW
(.9, .999), weight decay .05, batch 2048, learning rate 1.5e-3 after 10 epochs of
warm-up and 1e-5 at the end, gradients clipped to norm 3, block masking of 40 %, colour
jitter .4. Crops of 8 to 100 % of the area come from the released code.

It is no replication. k-means on the colours of 16 x 16 pixels makes the tokens, instead
of DALL-E's discrete VAE, and the network has no relative position bias, no layer scale
and no drop path (docs/deviations.md).

Hardware: not yet run. Paper: 83.2 fine-tuned (arXiv:2106.08254, table 1); 82.9 after
300 epochs (arXiv:2208.04164, table 1).

Variants `:mnist` and `:digits`: the same program on handwritten digits of 28 x 28
pixels and on scanned ones of 8 x 8, for two CPU cores. With `:digits`, in 1.5 minutes
ten nearest neighbours find the class of 69.6 % of held-out digits; untrained, 50.4 %.

python -m mim_jax.main --config=configs/beit.py:digits --workdir=runs/beit-digits

Variants `:tiny`, `:small` and `:base`: sizes for your own images, with `source=folder`.
"""

from mim_jax import config, presets
from mim_jax.evals.base import Eval


def get_config(variant: str = "") -> config.Tree:
    preset, chosen = config.variant(variant, presets=("mnist", "digits", *presets.OWN))
    chosen = {"objective": "beit", "source": presets.source_of(preset)} | chosen
    c = config.experiment("train", **chosen)
    c.report = config.choose(Eval, "knn")
    c.epochs = 800.0
    c.batch_size = 2048
    c.objective.color_jitter = "whole"
    c.optim.base_lr = 1.5e-3 * 256 / 2048
    c.optim.warmup_epochs = 10.0
    c.optim.final_lr = 1e-5
    c.optim.b2 = 0.999
    c.optim.clip = 3.0
    c.data.crop_scale = (0.08, 1.0)
    presets.apply(c, preset)
    if preset == "digits" and "least" in c.objective.masking:
        c.objective.masking.least = 4  # 7 patches are hidden
    return c
