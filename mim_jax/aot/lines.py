# SPDX-License-Identifier: Apache-2.0
"""The lines that `python -m mim_jax.aot` prints."""

from typing import Any


def before_compiling(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {it}" for name, it in found["versions"].items())
    axes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    shape = "x".join(map(str, found["image_shape"]))
    parts = found["micro_batches"]
    return (
        f"{found['objective']} for {found['topology']}, {versions}\n"
        f"source      {found['source']}; read as {shape}\n"
        f"mesh        {axes} on {found['devices']} devices\n"
        f"batch       {found['batch_size']} images, {found['batch_per_device']} per "
        "device" + (f", in {parts} micro-batches" if parts > 1 else "") + "\n"
        f"kernels     {found['forms']}\n"
        f"parameters  {found['parameters'] / 1e6:.2f} M; state "
        f"{_gib(found['state_bytes'])} per device"
    )


def after_compiling(found: dict[str, Any]) -> str:
    lines = [f"note        {found['note']}"] if found["note"] else []
    lines.append(f"compiled    in {found['compile_seconds']:.1f} s")
    if found["compiles"]:
        for name in ("argument", "output", "alias", "temp"):
            lines.append(f"{name:<11} {_gib(found[f'{name}_bytes'])} per device")
    hbm, peak, held = (found[f"{name}_bytes"] for name in ("hbm", "peak", "held"))
    if found["fits"]:
        lines.append(
            f"fits: peak {_gib(peak)} of {_gib(hbm)} per device, {_gib(hbm - peak)} "
            f"spare; laid out, buffers take {_gib(held)}"
        )
        return "\n".join(lines)
    if found["compiles"]:
        lines.append(
            f"may not fit: peak {_gib(peak)} of {_gib(hbm)} per device, but laid out, "
            f"buffers take {_gib(held)}, {_gib(held - hbm)} too much"
        )
    else:
        lines[-1] = (
            f"does not fit: it wants {_gib(peak)} of {_gib(hbm)} per device, "
            f"{_gib(peak - hbm)} too much"
        )
    return "\n".join(lines) + (
        f"; try {'' if found['coupled'] else '--config.accumulate=2, '}"
        "--config.remat=full or --config.mesh.fsdp=2"
    )


def cost_lines(found: dict[str, Any]) -> str:
    lines = []
    for kind, one in found["collectives"].items():
        size = one["bytes"] / 2**20
        lines.append(f"{kind:<11} {one['count']} x, {size:.1f} MiB per device and step")
    flops, roof = found["flops_per_image"] / 1e9, found["roofline_seconds"] * 1e3
    lines.append(
        f"work        {flops:.1f} GFLOP per image; {roof:.1f} ms a step at full speed"
    )
    if "estimate" not in found:
        return "\n".join([*lines, "estimate    none: this chip's cycles are not known"])
    account = found["estimate"]
    if account["priced"]:
        lines.append("estimate    of a step by the compiler, ms; no measurement")
        shape = "{priced:8.2f} + at least {unpriced:.2f} without a price"
    else:
        lines.append("at least    of a step, ms, at full speed; nothing is estimated")
        shape = "{unpriced:8.2f}"
    for part, one in [*account["parts"].items(), ("all", account)]:
        times = {name: 1e3 * one[name] for name in ("priced", "unpriced", "meanwhile")}
        shown = (shape + ", {meanwhile:.2f} meanwhile").format(**times)
        lines.append(f"  {part:<26} {shown}")
    for name, rate in account["images_per_second"].items():
        lines.append(
            f"  {name.replace('_', ' '):<26} {rate:8.0f} images/s per device"
            f"{'' if account['priced'] else ' at most'}, "
            f"{account['utilisation'][name]:.1%} of its FLOP/s"
        )
    return "\n".join(lines)


def tried_line(found: dict[str, Any]) -> str:
    leaves = ", ".join(f"{name}={value}" for name, value in found["leaves"].items())
    held = f"{'fits' if found['fits'] else 'no room'}, {_gib(found['held_bytes'])}"
    rates = found.get("estimate", {}).get("images_per_second", {})
    rate = f", {rates['with_unpriced']:.0f} images/s by estimate" if rates else ""
    note = f"; {found['note']}" if found["note"] else ""
    return f"{leaves}: {held}{rate}{note}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f} GiB"
