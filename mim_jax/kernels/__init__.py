# SPDX-License-Identifier: Apache-2.0
"""Attention: the forms of each platform behind one dispatch.

The plain form, `mim_jax.ops.attention.attention`, runs everywhere and defines what all
others compute. To add a form, write a module beside these and add its row to FORMS; a
module from outside, named by `--plugins`, adds the row itself. `Form` has an example.
"""

from jaxtyping import Array, Float

from mim_jax.kernels import cpu, gpu, long, tpu
from mim_jax.kernels.base import Form, Kernels, always
from mim_jax.kernels.spread import spread

# "auto" asks from the last row to the first, and takes the first that is of the
# platform, fits and is preferred. So the row of a plug-in is asked before these.
FORMS: dict[str, Form] = {
    "recompute": Form(cpu.recomputing_attention, "cpu", cpu.misfit, always),
    "keep": Form(cpu.keeping_attention, "cpu", cpu.misfit, cpu.keep_preferred),
    "splash": Form(long.long_attention, "tpu", long.misfit, long.preferred),
    "pallas": Form(tpu.short_attention, "tpu", tpu.misfit, always),
    "cudnn": Form(gpu.cudnn_attention, "gpu", gpu.misfit, gpu.preferred),
}


def attend(
    qkv: Float[Array, "b n e"], bias: Float[Array, " e"], heads: int, kernels: Kernels
) -> Float[Array, "b n e//3"]:
    """Mixed values by the form that `kernels` names, which is not "plain"."""
    run = FORMS[kernels.attention].run
    if kernels.mesh is None:
        return run(qkv, bias, heads)
    return spread(run, qkv, bias, heads, kernels.mesh)
