# SPDX-License-Identifier: Apache-2.0
"""The sections of a comparison: what each evaluation found, and the gallery."""

import base64
import html
import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mim_jax.compare.table import BETTER, full_title
from mim_jax.evals.base import Eval
from mim_jax.evals.report import Report, png
from mim_jax.evals.side_by_side import Shown

_LARGEST = 160  # pixels of a side in the gallery


def section(
    name: str,
    evaluation: Eval,
    reports: dict[str, Report],
    figures: dict[str, Figure],
    reasons: dict[str, str],
    below: str = "",
) -> str:
    """What an evaluation shows, its headline numbers explained, its figures, and why
    runs are missing.

    Args:
        below: what else the section shows, as HTML.
    """
    title = html.escape(name.replace("_", " "))
    lines = [f"<h2 id='{html.escape(name)}'>{title}</h2>"]
    lines.append(f"<p>{html.escape(evaluation.description)}</p>")
    lines.append("<ul>")
    keys = [key for one in reports.values() for key in one.numbers]
    for headline in evaluation.headlines:
        word = full_title(headline, headline.title.format("..."))
        text = f"{headline.meaning} {BETTER[headline.better].capitalize()}."
        columns = headline.columns(keys)
        measured = (
            report.numbers[key].n
            for report in reports.values()
            for key in columns
            if key in report.numbers
        )
        sizes = {n for n in measured if n is not None}
        if not columns:
            text += " Not measured here."
        elif sizes:
            text += f" n = {', '.join(map(str, sorted(sizes)))}."
        lines.append(f"<li><b>{html.escape(word)}</b>: {html.escape(text)}</li>")
    lines.append("</ul>")
    lines += [tag_of(title, figure) for title, figure in figures.items()]
    lines.append(below)
    lines += [
        f"<p class='note'>{html.escape(run)}: {html.escape(why)}</p>"
        for run, why in reasons.items()
    ]
    return "\n".join(lines)


def tag_of(title: str, figure: Figure) -> str:
    """The figure as a tag that holds its PNG."""
    data = base64.b64encode(png(figure)).decode()
    alt = html.escape(_in_words(title, figure))
    return (
        "<div class='figure' tabindex='0' role='region' "
        f"aria-label='{html.escape(title)}'>"
        f"<img alt='{alt}' src='data:image/png;base64,{data}'></div>"
    )


def _in_words(name: str, figure: Figure) -> str:
    """What a figure says of itself: its title, and titles, labels and legends of its
    axes."""
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        texts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        if legend := axis.get_legend():
            texts += [text.get_text() for text in legend.get_texts()]
    words = [" ".join(text.replace(r"\$", "$").split()) for text in texts]
    said = "; ".join(dict.fromkeys(word for word in words if word))
    return f"{name}: {said}"[:600] if said else name


def gallery(shown: Shown, alike: bool) -> str:
    """The same images through all models, as a table of images.

    Args:
        alike: whether all models hid patches in the same way in training.
    """
    mark = {run: " †" if run in shown.helped else "" for run in shown.filled}
    heads = ["image", "original", "visible"]
    heads += [run + mark[run] for run in shown.filled]
    lines = [
        "<h3>the same images through all models</h3>",
        "<p>A row is one held-out image. All models see the same visible patches, and "
        "fill in the grey ones. Below: PSNR of the hidden pixels in dB, higher is "
        f"better. The masks are drawn as {html.escape(shown.masked_as)} drew them in "
        "training.</p>",
    ]
    if not alike:
        lines.append(
            "<p><b>These models hid patches in different ways in training</b> (see "
            "objective.masking below), so some of them see here what they were not "
            "trained for; and the PSNR in the table above, which is each model's with "
            "masks of its own, does not compare them.</p>"
        )
    if shown.helped:
        lines.append(
            "<p>† predicts patches with mean and contrast removed, and was given the "
            "true ones of each hidden patch.</p>"
        )
    lines.append(
        "<div class='wide gallery' tabindex='0' role='region' aria-label='the same "
        "images through all models'><table><thead><tr>"
    )
    lines += [f"<th scope='col'>{html.escape(head)}</th>" for head in heads]
    lines.append("</tr></thead><tbody>")
    for i, label in enumerate(shown.classes):
        name = f"{label or 'image'} (no. {shown.records[i]})"
        cells = [
            _small(shown.original[i], f"{name}: original"),
            _small(shown.seen[i], f"{name}: the visible patches; hidden ones are grey"),
        ]
        for run, images in shown.filled.items():
            score = f"{shown.psnr[run][i]:.1f} dB"
            text = f"{name}, filled in by {run}: {score}"
            cells.append(f"{_small(images[i], text)}<small>{score}</small>")
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        small = f"<small>no. {shown.records[i]}</small>"
        head = f"<th scope='row'>{html.escape(label or 'image')}{small}</th>"
        lines.append(f"<tr>{head}{row}</tr>")
    lines.append("</tbody></table></div>")
    lines += [
        f"<p class='note'>Not here: {html.escape(run)}: {html.escape(why)}</p>"
        for run, why in shown.reasons.items()
    ]
    return "\n".join(lines)


def _small(image: np.ndarray, alt: str) -> str:
    """An image in 0..1 as a tag that holds its PNG."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    made, file = Image.fromarray(pixels), io.BytesIO()
    if max(made.size) > _LARGEST:
        made.thumbnail((_LARGEST, _LARGEST))
    made.save(file, format="png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"
