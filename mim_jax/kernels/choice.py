# SPDX-License-Identifier: Apache-2.0
"""The choice of forms: made once, from what is known before anything is traced."""

import dataclasses
from typing import Any, TypeVar

import jax

from mim_jax.kernels import FORMS
from mim_jax.kernels.base import Form, Kernels, Site
from mim_jax.ops.attention import accurate, attention
from mim_jax.schema import brief, raised, returned

_Objective = TypeVar("_Objective")
_PLATFORMS = ("cpu", "gpu", "tpu")


def choose_attention(wanted: str, site: Site) -> str:
    """The form of attention for a site: "plain", or a name of FORMS.

    Example:
        >>> site = Site("cpu", "cpu", "float32", tokens=197, width=768, heads=12)
        >>> choose_attention("auto", site)
        'recompute'
        >>> choose_attention("plain", site)
        'plain'

    Args:
        wanted: "auto" takes the last row of FORMS that fits and is preferred; "plain"
            or the name of a form takes that one.
    Raises:
        ValueError: the wanted form is unknown or cannot run there, or a row of FORMS
            is none; the message says why.
    """
    for name, form in FORMS.items():
        _check_row(name, form)
    if wanted == "auto":
        for name, form in reversed(FORMS.items()):
            here = form.platform == site.platform and not _misfit(name, site)
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
    if form.platform != site.platform:
        here = [one for one, row in FORMS.items() if row.platform == site.platform]
        why = f"it runs on {form.platform}: want {' or '.join(['plain', *here])}"
    else:
        why = _misfit(wanted, site)
    if why:
        raise ValueError(f"attention={wanted!r}: {why}, or attention='auto'")
    return wanted


def _check_row(name: str, form: Any) -> None:
    """ValueError unless a row of FORMS is a form that can be chosen."""
    where = f"kernels.FORMS[{name!r}]"
    if name in ("auto", "plain"):
        raise ValueError(f"{where}: attention={name!r} has a meaning; want another")
    if not isinstance(form, Form):
        raise ValueError(f"{where} is {brief(form)}: want Form(run, platform, misfit)")
    if form.platform not in _PLATFORMS:
        raise ValueError(
            f"{where}: platform={form.platform!r}: want one of {', '.join(_PLATFORMS)}"
        )
    for part in ("run", "misfit", "preferred"):
        if not callable(getattr(form, part)):
            raise ValueError(
                f"{where}: {part}={brief(getattr(form, part))}: want a function"
            )


def _misfit(name: str, site: Site) -> str:
    """Why a form cannot run at a site of its platform; "" if it can."""
    why = FORMS[name].misfit(site)
    if not isinstance(why, str):
        raise ValueError(
            f"kernels.FORMS[{name!r}]: misfit returned {returned(why)}: want a str, "
            "the reason why the form cannot run at the site, or '' if it can"
        )
    return why


def check_forms(
    objective: Any, tokens: int, mesh: jax.sharding.Mesh, device: Any = None
) -> None:
    """Checks the results of the forms that the networks of an objective were told.

    Nothing is computed: shapes and dtypes alone are followed.

    Args:
        objective: as `with_kernels` returned it.
        tokens, mesh: as for `with_kernels`.
        device: one of those of the mesh; None: its first.
    Raises:
        ValueError: a form fails, or its result has not the shape and dtype of that of
            the plain form; the message names form and network.
    """
    device = mesh.devices.flat[0] if device is None else device
    for field in dataclasses.fields(objective):
        network = getattr(objective, field.name)
        kernels = getattr(network, "kernels", None)
        if not isinstance(kernels, Kernels) or kernels.attention == "plain":
            continue
        try:
            _check_form(kernels.attention, _site(network, tokens, device, mesh))
        except ValueError as error:
            raise ValueError(f"{field.name}: {error}") from error


def _check_form(name: str, site: Site) -> None:
    """ValueError unless a form's result is like that of the plain form."""
    qkv = jax.ShapeDtypeStruct((2, site.tokens, 3 * site.width), site.dtype)
    bias = jax.ShapeDtypeStruct(qkv.shape[2:], accurate(site.dtype))

    def shape_of(run):
        return jax.eval_shape(lambda qkv, bias: run(qkv, bias, site.heads), qkv, bias)

    want, _ = shape_of(attention)
    where = f"attention={name!r} with qkv {_shown(qkv)} and heads={site.heads}"
    try:
        found = shape_of(FORMS[name].run)
    except Exception as error:
        raise ValueError(
            f"{where} fails: {raised(error)}; want a function of (qkv, bias, heads), "
            "or attention='plain'"
        ) from error
    if getattr(found, "shape", None) != want.shape or found.dtype != want.dtype:
        raise ValueError(
            f"{where} returns {_shown(found)}: want {_shown(want)}, the mixed values "
            "alone"
        )


def _shown(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    return returned(value)


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
    parts = _parts(mesh)
    if getattr(network, "relative_positions", False):
        if wanted not in ("auto", "plain"):
            raise ValueError(
                f"attention={wanted!r}: it cannot add the biases of "
                "relative_positions=true: want attention='plain' or 'auto'"
            )
        return "plain"
    if network.heads % parts:
        if wanted not in ("auto", "plain"):
            raise ValueError(
                f"attention={wanted!r}: {network.heads} heads on mesh.tensor={parts}: "
                "want a multiple, or attention='auto'"
            )
        return "plain"  # the compiler splits it as it can
    return choose_attention(wanted, _site(network, tokens, device, mesh))


def _site(network, tokens: int, device, mesh) -> Site:
    """The site of a network on one of the devices that share its heads."""
    width, heads = network.width // _parts(mesh), network.heads // _parts(mesh)
    return site_of(device, network.dtype, tokens, width, heads)


def _parts(mesh) -> int:
    return 1 if mesh is None else mesh.shape["tensor"]


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
