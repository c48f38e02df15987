# SPDX-License-Identifier: Apache-2.0
"""The choice of forms: made once, from what is known before anything is traced."""

import dataclasses
from typing import Any, TypeVar

import jax

from mim_jax.kernels import FORMS
from mim_jax.kernels.base import Kernels, Site

_Objective = TypeVar("_Objective")


def choose_attention(wanted: str, site: Site) -> str:
    """The form of attention for a site: "plain", or a name of FORMS.

    Example:
        >>> site = Site("cpu", "cpu", "float32", tokens=197, width=768, heads=12)
        >>> choose_attention("auto", site)
        'recompute'
        >>> choose_attention("plain", site)
        'plain'

    Args:
        wanted: "auto" takes the fastest known form that fits; "plain" or the name of a
            form takes that one.
    Raises:
        ValueError: the wanted form is unknown or cannot run there; the message says
            why.
    """
    if wanted == "auto":
        for name, form in FORMS.items():
            here = form.platform == site.platform and not form.misfit(site)
            if here and form.preferred(site):
                return name
        return "plain"
    if wanted == "plain":
        return wanted
    if wanted not in FORMS:
        known = ", ".join(sorted(FORMS))
        raise ValueError(
            f"attention={wanted!r} is unknown; known: auto, plain, {known}"
        )
    form = FORMS[wanted]
    why = form.misfit(site)
    if form.platform != site.platform:
        why = f"it runs on {form.platform}: want a form of {site.platform}"
    if why:
        raise ValueError(f"attention={wanted!r}: {why}, or attention='auto'")
    return wanted


def site_of(device: Any, dtype: str, tokens: int, width: int, heads: int) -> Site:
    """The site of a network on a device of JAX; the rest is as in `Site`."""
    # Plug-ins of JAX may call a GPU by its maker.
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    capability = getattr(device, "compute_capability", "")
    return Site(
        platform, device.device_kind, dtype, tokens, width, heads, str(capability)
    )


def with_kernels(
    objective: _Objective,
    wanted: str,
    tokens: int,
    device: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> _Objective:
    """An objective whose networks have been told their forms.

    The same call serves training, evaluation, `aot` and use as a library, so one run
    computes attention in one form wherever it is on the same kind of device.

    Example:
        >>> from mim_jax.objectives.mae import MAE
        >>> cpu = jax.devices("cpu")[0]
        >>> told = with_kernels(MAE(), "auto", tokens=197, device=cpu)
        >>> told.encoder.kernels
        Kernels(attention='recompute', merge_rows=True, mesh=None)

    Args:
        objective: a dataclass; each field that has a field `kernels` is a network.
        wanted: as for `choose_attention`.
        tokens: length of the longest sequence, the class token included.
        device: one of those that the networks run on.
        mesh: of several devices that share the work; None for one.
    Raises:
        ValueError: as `choose_attention`, with the name of the network.
    """
    changes = {}
    for field in dataclasses.fields(objective):  # pyright: ignore[reportArgumentType]
        network = getattr(objective, field.name)
        if not isinstance(getattr(network, "kernels", None), Kernels):
            continue
        attention = "plain"
        if hasattr(network, "heads"):
            try:
                attention = _attention_of(network, wanted, tokens, device, mesh)
            except ValueError as error:
                raise ValueError(f"{field.name}: {error}") from error
        kernels = Kernels(
            attention=attention,
            merge_rows=device.platform == "cpu",
            mesh=mesh if mesh is not None and mesh.size > 1 else None,
        )
        changes[field.name] = network.clone(kernels=kernels)
    return dataclasses.replace(objective, **changes)  # pyright: ignore[reportArgumentType]


def _attention_of(network, wanted: str, tokens: int, device, mesh) -> str:
    parts = 1 if mesh is None else mesh.shape["tensor"]
    if network.heads % parts:
        if wanted not in ("auto", "plain"):
            raise ValueError(
                f"attention={wanted!r}: {network.heads} heads on mesh.tensor={parts}: "
                "want a multiple, or attention='auto'"
            )
        return "plain"  # the compiler splits it as it can
    width, heads = network.width // parts, network.heads // parts
    return choose_attention(
        wanted, site_of(device, network.dtype, tokens, width, heads)
    )


def described(objective: Any) -> str:
    """The forms of an objective's networks, for people: "encoder plain, ...".

    Example:
        >>> from mim_jax.objectives.mae import MAE
        >>> described(MAE())
        'attention: encoder plain, decoder plain'
    """
    forms = {
        field.name: getattr(objective, field.name).kernels.attention
        for field in dataclasses.fields(objective)
        if isinstance(getattr(getattr(objective, field.name), "kernels", None), Kernels)
        and hasattr(getattr(objective, field.name), "heads")
    }
    return "attention: " + ", ".join(f"{name} {form}" for name, form in forms.items())
