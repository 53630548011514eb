"""One HTML file that holds everything: no address outside it, every text escaped, nothing that can run but our own script."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from smolmlx import __version__
from smolmlx.evals.headlines import SUMMED_UP
from smolmlx.reports import charts, figures, sweep_figures
from smolmlx.reports.boards import Board, label_runs, make_boards
from smolmlx.reports.folders import RunView, Tree
from smolmlx.reports.rows import count_flaws, flaw_kind, view_rows
from smolmlx.reports.sweeps import SweepView
from smolmlx.reports.weights import weight_changes
from smolmlx.rundir import write_text

MAX_ROWS = 500
"""Rows of each set that the viewer holds unless more are asked for; the tables always cover all."""
SHOWN_FIRST = (*SUMMED_UP, "unsupported")
"""Metrics whose chart is seen without a click."""
CURVES = ("loss", "accuracy", "pair-loss", "pair-accuracy", "margin")
"""Curves seen without a click."""
_MAX_MAPS = 6


def render(
    views: Sequence[RunView],
    *,
    sweeps: Sequence[SweepView] = (),
    title: str | None = None,
    max_rows: int = MAX_ROWS,
) -> str:
    """Return the report of one or several runs as HTML; `sweeps` are those that some of the runs are of."""
    labels, boards = label_runs(views), make_boards(views)
    specs = {**sweep_charts(sweeps), **run_charts(views, labels, boards)}
    many = len(views) > 1 or bool(sweeps)
    viewers = [_viewer(board, max_rows) for board in boards]
    payload = {
        "themes": {"light": charts.LIGHT, "dark": charts.DARK},
        "charts": specs,
        "boards": viewers,
    }
    bundle, script = charts.browser_bundle(), _asset("page.js")
    context = {
        "title": title or _title(views, sweeps, labels),
        "version": __version__,
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "many": many,
        "views": views,
        "labels": labels,
        "boards": boards,
        "sweeps": sweeps,
        "pipeline": _pipeline(views),
        "sweep_figures": sweep_figures,
        "opened": [_shown_systems(board, sweeps) for board in boards],
        "shown_first": SHOWN_FIRST,
        "specs": specs,
        "curves": [(name, specs[name]["title"]) for name in CURVES if name in specs],
        "figures": figures,
        "run_table": figures.run_table(views, labels) if many else None,
        "recipes": {str(view.path): _yaml(view.recipe) for view in views},
        "flaw_counts": [count_flaws(board["rows"]).most_common() for board in viewers],
        "max_rows": max_rows,
        "csp": _content_policy(bundle, script),
        # Trusted text: written by this package, or JSON in which no tag can begin.
        "style": _trusted(_asset("page.css")),
        "bundle": _trusted(bundle),
        "script": _trusted(script),
        "payload": _trusted(_safe_json(payload)),
    }
    text = _templates().get_template("page.html.j2").render(context)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair in an answer must not stop it


def _title(views: Sequence[RunView], sweeps: Sequence[SweepView], labels: Mapping[str, str]) -> str:
    if made := _pipeline(views):
        return str(made["name"])
    outside = [labels[str(view.path)] for view in views if not view.setting]
    named = [*(sweep.name for sweep in sweeps), *outside]
    return " · ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")


def _pipeline(views: Sequence[RunView]) -> Tree:
    """Return the pipeline that all runs are the stages of; empty where there is none."""
    first = views[0].pipeline if views else {}
    return first if all(view.pipeline is first for view in views) else {}


def _shown_systems(board: Board, sweeps: Sequence[SweepView]) -> list[int]:
    """Return which systems the viewer opens with: all but the controls, or of many the base and those that matter."""
    shown = [i for i, entrant in enumerate(board.entrants) if entrant.kind != "control"]
    if not board.crowded:
        return shown
    leaders = {sweep.first for sweep in sweeps} | {found["leader"] for sweep in sweeps for found in sweep.best}
    seed = f", seed {sweeps[0].seeds[0]}" if sweeps else ""
    wanted = {f"{setting}{seed}" for setting in leaders}
    few = [i for i in shown if board.entrants[i].kind == "base" or board.entrants[i].label in wanted]
    return few if len(few) > 1 else shown[:3]


def write_report(
    views: Sequence[RunView],
    target: Path,
    *,
    sweeps: Sequence[SweepView] = (),
    title: str | None = None,
    max_rows: int = MAX_ROWS,
) -> None:
    """Write the HTML file.

    Raises:
        BackendError: the charting library is not installed.
        RunError: the file cannot be written.
    """
    write_text(target, render(views, sweeps=sweeps, title=title, max_rows=max_rows))


def run_charts(views: Sequence[RunView], labels: Mapping[str, str], boards: Sequence[Board]) -> dict[str, charts.Spec]:
    """Return every chart by its name; one without data is left out."""
    found = _loss_charts(views, labels)
    for name, key, title, unit, style in (
        ("learning-rate", "learning_rate", "Learning rate", "learning rate", ".3g"),
        ("grad-norm", "grad_norm", "Gradient norm", "norm before clipping", ".3f"),
    ):
        if points := charts.curve_points(views, labels, key, None):
            found[name] = charts.curve(points, title, unit, style)
    for board in boards:
        found |= {f"{board.slug}-{key}": spec for key, spec in charts.forests(board).items()}
    # Of a setting, the first seed's map stands for the others.
    firsts = {view.setting or str(view.path): number for number, view in reversed(list(enumerate(views)))}
    for number in sorted(firsts.values())[:_MAX_MAPS]:
        changes = weight_changes(views[number].path / "adapter")
        if changes:
            found[f"weights{number}"] = charts.weight_map(changes)
    return found


def _loss_charts(views: Sequence[RunView], labels: Mapping[str, str]) -> dict[str, charts.Spec]:
    """Return the curves of loss, accuracy and margin: those of pairs apart from those of tokens, where there are both."""
    tokens = [view for view in views if figures.loss_unit(view) == figures.PER_TOKEN]
    pairs = [view for view in views if figures.loss_unit(view) == figures.PER_PAIR]
    prefix = "pair-" if tokens and pairs else ""
    wanted = (
        (tokens, "loss", "loss", "Loss", figures.PER_TOKEN, ".4f"),
        (tokens, "accuracy", "accuracy", "Token accuracy", "share of supervised tokens", ".3f"),
        (pairs, f"{prefix}loss", "loss", "Loss", figures.PER_PAIR, ".4f"),
        (pairs, f"{prefix}accuracy", "accuracy", "Pair accuracy", "share of pairs", ".3f"),
        (pairs, "margin", "margin", "Reward margin", "beta x nats", ".3f"),
    )
    found: dict[str, charts.Spec] = {}
    for members, name, key, title, unit, style in wanted:
        points = charts.curve_points(members, labels, key, f"val_{key}")
        if points:
            named = [labels[str(view.path)] for view in members]
            of = f": {', '.join(named)}" if prefix and len(named) < 4 else ""
            found[name] = charts.curve(points, title + of, unit, style)
    return found


def sweep_charts(sweeps: Sequence[SweepView]) -> dict[str, charts.Spec]:
    """Return the chart of each figure of each sweep by its name."""
    found = {
        f"sweep{number}-{figure.key.replace('.', '-').replace('_', '-')}": charts.settings_chart(sweep, figure)
        for number, sweep in enumerate(sweeps)
        for figure in sweep.figures
    }
    return {name: spec for name, spec in found.items() if spec is not None}


def _viewer(board: Board, max_rows: int) -> dict[str, Any]:
    rows = view_rows(board, max_rows)
    for row in rows:
        for answer in row["answers"]:
            answer["kinds"] = sorted({flaw_kind(flaw) for flaw in answer["flaws"]})
    return {
        "systems": [{"label": entrant.label, "kind": entrant.kind} for entrant in board.entrants],
        "rows": rows,
    }


def _safe_json(tree: Any) -> str:
    """Return JSON in which no tag, comment or entity can begin, whatever its strings hold."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _content_policy(*scripts: str) -> str:
    """Let the browser run these scripts only, and fetch nothing at all."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _trusted(text: str) -> Any:
    from markupsafe import Markup  # comes with jinja2

    return Markup(text)


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True) if tree else ""


def _asset(name: str) -> str:
    return (files("smolmlx.reports") / name).read_text(encoding="utf-8")


def _templates() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(_asset)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
