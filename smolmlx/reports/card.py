"""The model card of a run (README.md) and its charts as files, from the same figures as the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from smolmlx import __version__
from smolmlx.data import formats
from smolmlx.evals.headlines import SUMMED_UP
from smolmlx.models import files_root
from smolmlx.reports import charts, figures, page
from smolmlx.reports.boards import Board, label_runs, make_boards
from smolmlx.reports.folders import RunView
from smolmlx.reports.sweeps import SweepView
from smolmlx.rundir import RunDir, publish, write_text

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IN_CARD = ("loss", "accuracy", "margin", *(f"test-{metric}" for metric in SUMMED_UP))


def card(view: RunView, chart_names: Sequence[str] = ()) -> str:
    """Return the model card as Markdown with the Hub's front matter; text from models and recipes is escaped."""
    boards = make_boards([view])
    head = {key: value for key, value in _front_matter(view).items() if value}
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---", f"# {_plain(view.name)}"]
    if view.recipe.get("description"):
        parts.append(_plain(view.recipe["description"]))
    if figures.status(view):
        parts.append(f"**{figures.status(view)}**")
    parts += [_use(view), "## Evaluation", *(_evaluation(board) for board in boards)]
    parts += _loss_tables(view) if view.loss else [] if boards else ["Not evaluated on held-out rows."]
    parts += [f"![{name}](charts/{name}.svg)" for name in _IN_CARD if name in chart_names]
    facts = [(name, _plain(value)) for name, value in figures.training_facts(view) if value]
    parts += ["## Training and data", _table(("", ""), facts)]
    parts += [
        "## Limits",
        "Scores are of the files named above, with their intervals; a difference whose interval holds 0 is not shown. "
        f"The base model's licence applies to what was trained on it.\n\nWritten by smolmlx {__version__} from the run's own files.",
    ]
    return "\n\n".join(parts) + "\n"


def write_run_report(view: RunView, *, title: str | None = None, max_rows: int = page.MAX_ROWS) -> list[Path]:
    """Write report.html, README.md and charts/ into a run's folder; return what was written.

    Raises:
        BackendError: the charting library is not installed.
        RunError: the folder cannot be written.
    """
    made = [view.path / "report.html"]
    page.write_report([view], made[0], title=title, max_rows=max_rows)
    names = write_charts([view], view.path / "charts")
    made += [view.path / "charts"] if names else []
    if view.is_run:
        write_text(view.path / "README.md", card(view, names))
        made.append(view.path / "README.md")
    return made


def write_sweep_report(
    views: Sequence[RunView], sweep: SweepView, *, title: str | None = None, max_rows: int = page.MAX_ROWS
) -> list[Path]:
    """Write report.html and charts/ into a sweep's folder; return what was written. Errors as `write_run_report`."""
    made = [sweep.path / "report.html"]
    page.write_report(views, made[0], sweeps=[sweep], title=title, max_rows=max_rows)
    return [*made, *([sweep.path / "charts"] if write_charts(views, sweep.path / "charts", [sweep]) else [])]


def write_charts(views: Sequence[RunView], folder: Path, sweeps: Sequence[SweepView] = ()) -> list[str]:
    """Write the charts that the report shows first as SVG and PNG; return their names."""
    boards = make_boards(views)
    hidden = {
        f"{board.slug}-{metric.key}"
        for board in boards
        for metric in board.metrics
        if metric.key not in page.SHOWN_FIRST
    }
    hidden |= {"learning-rate", "grad-norm"}
    drawn = {**page.sweep_charts(sweeps), **page.run_charts(views, label_runs(views), boards)}
    specs = {name: spec for name, spec in drawn.items() if name not in hidden}
    if specs:
        with publish(folder) as target:
            for name, spec in specs.items():
                write_text(target / f"{name}.svg", charts.to_svg(spec))
                (target / f"{name}.png").write_bytes(charts.to_png(spec))
    return list(specs)


def can_draw() -> bool:
    """Say whether the charting library is installed."""
    return find_spec("vl_convert") is not None


def _front_matter(view: RunView) -> dict[str, Any]:
    model = str(view.plan.get("model", {}).get("id", ""))
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/"))
    adapter = RunDir(view.path).adapter.is_dir()
    return {
        "base_model": model if is_hub_id else "",
        "datasets": _hub_datasets(view),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["smolmlx", str(view.plan.get("stage", "")), *(["lora"] if adapter else [])],
    }


def _hub_datasets(view: RunView) -> list[str]:
    """Return the hub ids among a run's data: the Hub takes no other names in `datasets`."""
    folders = (Path(view.env.get("folder", ".")), files_root())
    names = dict.fromkeys(name for names in figures.data_names(view) for name in names)
    return [n for n in names if _HUB_ID.fullmatch(n) and not Path(n).suffix and formats.locate(n, folders) is None]


def _use(view: RunView) -> str:
    model = view.plan.get("model", {}).get("id", "MODEL")
    arguments = f"--model {model} --adapter adapter" if RunDir(view.path).adapter.is_dir() else "--model model"
    return f'## Use\n\n```sh\nsmolmlx generate {arguments} --prompt "..."    # in this folder\n```'


def _evaluation(board: Board) -> str:
    head = (f"{board.name} (n={board.num_rows})", *(metric.label for metric in board.metrics))
    lines = [
        (_plain(e.label), *(f"{figures.figure(e, m)} [{figures.interval(e, m)}]" for m in board.metrics))
        for e in board.entrants
    ]
    said = "\n".join(f"- {_plain(sentence)}" for sentence in figures.findings(board))
    return f"{_rows_of(board.num_rows, board.data, board.sha256)}{_table(head, lines)}\n\n{said}".rstrip()


def _rows_of(count: object, path: object, sha256: object) -> str:
    """Name a scored file; of a path outside the working folder the last part alone, since a card is for others."""
    if not path:
        return ""
    shown = Path(str(path)).name if Path(str(path)).is_absolute() else path
    mark = f" (sha256 {str(sha256)[:12]})" if sha256 else ""
    return f"{figures.number(count, ',d')} rows of {_plain(shown)}{mark}.\n\n"


def _loss_tables(view: RunView) -> list[str]:
    lines = [
        (_plain(system), figures.loss_cell(f), figures.number(f["perplexity"], ",.2f"), figures.number(f["accuracy"], ".3f"))
        for system, f in view.loss.items()
    ]  # fmt: skip
    test = view.files.get("test", {})
    named = "" if view.sets else _rows_of(test.get("rows"), test.get("path"), test.get("sha256"))
    return [named + _table(("system", "loss", "perplexity", "token accuracy"), lines)]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _plain(text: object) -> str:
    """Take from a text what Markdown or HTML would read as more than text."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.replace("|", "\\|").replace("[", "\\[").replace("](", "\\](").split())
