# SPDX-License-Identifier: Apache-2.0
"""Job "compare": several runs on one page that opens from disk."""

import base64
import dataclasses
import html
import io
import json
import pathlib

from matplotlib.figure import Figure

from mim_jax import config as configs
from mim_jax import evaluate
from mim_jax.data.passes import EvalPasses
from mim_jax.evals.base import Eval, Report, Run, caption
from mim_jax.run import rundir

_PAGE = pathlib.Path(__file__).parent / "compare.html"

# What each evaluation shows, for a reader who does not know the papers.
_ABOUT = {
    "reconstruction": "Held-out images with patches hidden, filled in by each model.",
    "knn": "Held-out images and their nearest training images by frozen features.",
    "cka": "How alike features stay, block by block, when patches are hidden: 1 is "
    "unchanged.",
    "attention": "Where the last block looks: from the class token, and from the "
    "patch marked red.",
    "tsne": "Features of held-out images in the plane, one colour a class.",
}


def run(config: configs.Tree, workdir: pathlib.Path) -> None:
    """Measure all of `config.runs` and write workdir/report/index.html.

    Raises:
        ConfigError: the config cannot work, or a run cannot be read or compared.
    """
    settings = configs.build(config)
    loaded = {}
    for folder in settings.runs:
        model, training = evaluate.load(folder, settings.step)
        evaluate.check_alike(folder, training, [one for _, one in loaded.values()])
        if caption(model) in loaded:
            raise configs.ConfigError(
                f"runs: {folder!r} is called {caption(model)!r} like another run: want "
                "folders with different names"
            )
        loaded[caption(model)] = model, training
    models = {title: model for title, (model, _) in loaded.items()}
    if settings.random:
        first = next(iter(models.values()))
        untrained = dataclasses.replace(
            first, params=first.initial, name=f"random ({first.name})", step=0
        )
        models[caption(untrained)] = untrained
    _, training = next(iter(loaded.values()))
    passes = EvalPasses(training.data)
    evals = {
        name: getattr(settings, name) for name in _ABOUT if name not in settings.skip
    }
    with rundir.claim(workdir):
        (workdir / "config.json").write_text(configs.dumps(config))
        folder = workdir / "report"
        folder.mkdir(exist_ok=True)
        parts, results = [], {}
        for name, evaluation in evals.items():
            print(f"{name} ...", flush=True)
            found, left_out = _measure(evaluation, models, passes)
            results[name] = found
            figures = evaluation.draw(found) if found else {}
            for title, figure in figures.items():
                figure.savefig(folder / f"{title}.png")
            parts.append(_section(name, figures, left_out))
        folders = {
            title: pathlib.Path(where)
            for title, where in zip(loaded, settings.runs, strict=True)
        }
        curves = _curves(folders)
        curves.savefig(folder / "curves.png")
        page = _PAGE.read_text()
        for mark, text in {
            "TITLE": ", ".join(html.escape(model.name) for model in models.values()),
            "TABLE": _table(models, results),
            "SECTIONS": "\n".join(parts),
            "CURVES": _picture("training loss", curves),
            "CONFIGS": _differences(folders),
        }.items():
            page = page.replace(f"<!--{mark}-->", text)
        (folder / "index.html").write_text(page)
        saved = {
            name: {
                title: {key: n._asdict() for key, n in report.numbers.items()}
                for title, report in found.items()
            }
            for name, found in results.items()
        }
        (workdir / "results.json").write_text(json.dumps(saved, indent=2) + "\n")
    print(f"open {folder / 'index.html'}", flush=True)


def _measure(
    evaluation: Eval, models: dict[str, Run], passes: EvalPasses
) -> tuple[dict[str, Report], dict[str, str]]:
    """Reports by run, and why others have none."""
    found, left_out = {}, {}
    for title, model in models.items():
        try:
            evaluation.check_objective(model.objective)
            found[title] = evaluation.measure(model, passes)
        except ValueError as error:
            left_out[title] = str(error)
    return found, left_out


def _table(models: dict[str, Run], results: dict[str, dict[str, Report]]) -> str:
    """The numbers that tell most, one row per run."""
    columns = {
        "nearest neighbours": ("knn", "accuracy_model_k"),
        "linear, cross-validated": ("tsne", "linear_accuracy"),
        "silhouette": ("tsne", "silhouette"),
        "PSNR of hidden pixels, dB": ("reconstruction", "psnr_model_db"),
        "SSIM, full input": ("reconstruction", "full_ssim"),
        "CKA, half hidden, last block": ("cka", "cka_ratio0.5_last_block"),
        "attention entropy": ("attention", "attention_entropy_class_token"),
    }
    rows, shown = [], set()
    for title, model in models.items():
        cells = {}
        for head, (name, prefix) in columns.items():
            report = results.get(name, {}).get(title)
            numbers = report.numbers if report else {}
            key = next((key for key in numbers if key.startswith(prefix)), None)
            if key is None:
                continue
            number = numbers[key]
            text = f"{number.value:.3g}"
            if number.unit == "share" and "entropy" not in key:
                text = f"{number.value:.1%}"
                if number.interval:
                    low, high = number.interval
                    text += f" <small>{low:.1%} to {high:.1%}</small>"
            cells[head] = text
            shown.add(head)
        rows.append((title, type(model.objective).__name__, cells))
    heads = [head for head in columns if head in shown]
    lines = ["<tr><th>run</th><th>method</th>"]
    lines += [f"<th>{html.escape(head)}</th>" for head in heads]
    lines.append("</tr>")
    for title, method, cells in rows:
        values = "".join(f"<td>{cells.get(head, '–')}</td>" for head in heads)
        lines.append(f"<tr><td>{html.escape(title)}</td><td>{method}</td>{values}</tr>")
    return "\n".join(lines)


def _section(name: str, figures: dict[str, Figure], left_out: dict[str, str]) -> str:
    lines = [f"<h2 id={name!r}>{name}</h2><p>{html.escape(_ABOUT[name])}</p>"]
    lines += [_picture(title, figure) for title, figure in figures.items()]
    lines += [
        f"<p class='note'>{html.escape(title)}: {html.escape(why)}</p>"
        for title, why in left_out.items()
    ]
    return "\n".join(lines)


def _picture(title: str, figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"


def _curves(folders: dict[str, pathlib.Path]) -> Figure:
    """Training loss of each run, on axes of its own: losses are not comparable."""
    figure = Figure(figsize=(3.2 * len(folders), 2.6), dpi=110)
    axes = figure.subplots(1, len(folders), squeeze=False)[0]
    for axis, (title, folder) in zip(axes, folders.items(), strict=True):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line) for line in lines]
        axis.plot([v["step"] for v in values], [v["loss"] for v in values])
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    return figure


def _differences(folders: dict[str, pathlib.Path]) -> str:
    """Leaves of the configs that are not the same in all runs."""
    flat = [
        _flat(json.loads((folder / "config.json").read_text()))
        for folder in folders.values()
    ]
    names = sorted(set().union(*flat))
    lines = ["<tr><th>config</th>"]
    lines += [f"<th>{html.escape(title)}</th>" for title in folders]
    lines.append("</tr>")
    for name in names:
        values = [one.get(name, "–") for one in flat]
        if len({json.dumps(value) for value in values}) > 1:
            cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
            lines.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return "\n".join(lines)


def _flat(tree: dict, above: str = "") -> dict[str, object]:
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found
