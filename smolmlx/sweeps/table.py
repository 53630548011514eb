"""One line a run, mean and spread over seeds, and what the numbers show: read back from the runs' folders."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolmlx import recipe as recipes
from smolmlx import run_files
from smolmlx.evals import headlines
from smolmlx.run_files import Line, Spread
from smolmlx.rundir import RunDir, write_text
from smolmlx.sweeps.definition import SEED, Cell, Sweep
from smolmlx.sweeps.findings import Best, Comparison, compare_with_first, find_best
from smolmlx.sweeps.record import read_outcome, state

ALWAYS = ("lora.r", "train.learning_rate", "train.epochs")
"""Keys every table shows, whether the sweep varies them or not."""
SHOWN = (
    "train_loss",
    "val_loss",
    *(f"test.{metric}" for metric in headlines.SUMMED_UP),
    "eval.loss",
    "eval.perplexity",
)
"""Figures of the Markdown table and the terminal; csv and json hold all."""


@dataclass(frozen=True, slots=True)
class Table:
    """Everything a sweep came to, so far."""

    sweep: Sweep
    lines: Sequence[Line]
    settings: Mapping[str, Mapping[str, Spread]]
    """Setting -> figure -> spread, over finished runs."""
    comparisons: Sequence[Comparison]
    """Every setting against the first."""
    best: Sequence[Best]

    @property
    def findings(self) -> list[str]:
        """What it shows: the best setting of each score, then every setting against the first."""
        return [*(found.sentence for found in self.best), *(found.sentence for found in self.comparisons)]


def read_table(sweep: Sweep, folder: Path) -> Table:
    """Gather what is on disk; an unfinished run has its line, without figures.

    Raises:
        RunError: a file of a run is broken.
    """
    varied = dict.fromkeys([*ALWAYS, *(key for cell in sweep.cells for key in cell.values)])
    lines = [_line(cell, folder, list(varied)) for cell in sweep.cells]
    settings = {name: _spreads([line for line in lines if line.setting == name]) for name in sweep.settings}
    scores, groups = _scores(sweep, folder, lines)
    losses = {
        name: [line.figures["val_loss"] for line in lines if line.setting == name and "val_loss" in line.figures]
        for name in sweep.settings
    }
    compared = compare_with_first(sweep.settings, scores, losses, groups)
    return Table(sweep, lines, settings, compared, find_best(sweep.settings, scores, groups))


def _line(cell: Cell, folder: Path, keys: Sequence[str]) -> Line:
    run = RunDir(folder / cell.folder)
    flat = {**recipes.flatten(cell.loaded.recipe), **cell.values}
    full = cell.loaded.recipe.train.method == "full"
    found = state(cell, folder)
    return Line(
        setting=cell.setting,
        seed=cell.seed,
        status=found,
        error=str(read_outcome(run).get("error") or "") if found == "failed" else "",
        keys={key: flat.get(key) for key in keys if not (full and key.startswith("lora."))},
        figures=_figures(cell, run) if found == "finished" else {},
        run=cell.folder,
    )


def _figures(cell: Cell, run: RunDir) -> dict[str, float]:
    report = run_files.read(run, "report.json")
    named = {
        "train_loss": "final_loss", "val_loss": "best_val_loss", "steps": "steps", "seconds": "seconds",
        "tokens_per_second": "tokens_per_second", "peak_bytes": "peak_bytes",
    }  # fmt: skip
    found = {name: float(report[key]) for name, key in named.items() if report.get(key) is not None}
    results = _results(run)
    stage = cell.loaded.recipe.stage
    for name, tree in results.get("sets", {}).items():
        for metric, interval in tree["systems"][stage].items():
            found |= {f"{name}.{metric}": interval["mean"], f"{name}.{metric}_low": interval["low"], f"{name}.{metric}_high": interval["high"]}  # fmt: skip
    for key in ("loss", "perplexity", "accuracy"):
        value = results.get("systems", {}).get(stage, {}).get(key)
        if value is not None:  # a perplexity beyond what a double holds is none
            found[f"eval.{key}"] = value
    return found


def _results(run: RunDir) -> dict[str, Any]:
    return run_files.read(RunDir(run.path / "eval"), "results.json")


def _spreads(lines: Sequence[Line]) -> dict[str, Spread]:
    names = dict.fromkeys(name for line in lines for name in line.figures if not name.endswith(("_low", "_high")))
    found = {}
    for name in names:
        values = [line.figures[name] for line in lines if name in line.figures]
        sd = statistics.stdev(values) if len(values) > 1 else None
        found[name] = Spread(
            mean=statistics.fmean(values), sd=sd, low=min(values), high=max(values), num_seeds=len(values)
        )
    return found


def _scores(
    sweep: Sweep, folder: Path, lines: Sequence[Line]
) -> tuple[dict[str, dict[str, dict[int, list[float]]]], dict[str, list[str]]]:
    """Return setting -> metric -> seed -> one score per test row that it applies to, of finished runs; and their groups.

    Raises:
        RunError: results of the research suite from before it wrote down every row.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    groups: dict[str, list[str]] = {}
    for cell, line in zip(sweep.cells, lines, strict=True):
        tree = _results(RunDir(folder / cell.folder)).get("sets", {}).get("test") if line.figures else None
        if tree is None:
            continue
        for metric in headlines.SUMMED_UP:
            records = [row for row in tree["rows"][cell.loaded.recipe.stage] if row.get(metric) is not None]
            if records:
                groups[metric] = [str(row.get("group", "")) for row in records]
                rows = [float(row[metric]) for row in records]
                found.setdefault(cell.setting, {}).setdefault(metric, {})[cell.seed] = rows
    return found, groups


def write_table(table: Table, folder: Path) -> None:
    """Write sweep.json, sweep.csv (one line a run) and sweep.md."""
    write_text(folder / "sweep.json", json.dumps(to_json(table), indent=2) + "\n")
    write_text(folder / "sweep.csv", to_csv(table))
    write_text(folder / "sweep.md", to_markdown(table))


def to_json(table: Table) -> dict[str, Any]:
    sweep = table.sweep
    return {
        "name": sweep.name,
        "description": sweep.description,
        "recipe": sweep.recipe,
        "seeds": list(sweep.seeds),
        "runs": [line.model_dump() for line in table.lines],
        "settings": {
            name: {key: spread.model_dump() for key, spread in found.items()} for name, found in table.settings.items()
        },
        "comparisons": [asdict(found) for found in table.comparisons],
        "best": [asdict(found) for found in table.best],
        "findings": table.findings,
    }


def to_csv(table: Table) -> str:
    keys = list(dict.fromkeys(key for line in table.lines for key in line.keys))
    figures = list(dict.fromkeys(name for line in table.lines for name in line.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", SEED, "status", *keys, *figures, "run", "error"])
    for line in table.lines:
        cells = [*(line.keys.get(key, "") for key in keys), *(line.figures.get(name, "") for name in figures)]
        writer.writerow([line.setting, line.seed, line.status, *cells, line.run, line.error])
    return text.getvalue()


def run_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return header and one line per run, as text."""
    keys = list(dict.fromkeys(key for line in table.lines for key in line.keys))
    shown = [name for name in SHOWN if any(name in line.figures for line in table.lines)]
    rows = [
        [line.setting, str(line.seed), *(str(line.keys.get(key, "–")) for key in keys), *(_cell(line, name) for name in shown), line.status]
        for line in table.lines
    ]  # fmt: skip
    return ["setting", "seed", *keys, *(_label(name) for name in shown), "status"], rows


def setting_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return header and one line per setting: mean and standard deviation over seeds."""
    shown = [name for name in SHOWN if any(name in found for found in table.settings.values())]
    rows = []
    for name, found in table.settings.items():
        seeds = max((spread.num_seeds for spread in found.values()), default=0)
        cells = [_spread_cell(found[figure]) if figure in found else "–" for figure in shown]
        rows.append([name, f"{seeds} of {len(table.sweep.seeds)}", *cells])
    return ["setting", "seeds", *(_label(name) for name in shown)], rows


def _label(name: str) -> str:
    named = {"train_loss": "training loss", "val_loss": "validation loss"}
    return named.get(name) or headlines.label(name.removeprefix("test.")).replace("eval.", "held-out ")


def _cell(line: Line, name: str) -> str:
    if name not in line.figures:
        return "–"
    low, high = line.figures.get(f"{name}_low"), line.figures.get(f"{name}_high")
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{line.figures[name]:.{3 if interval else 4}f}{interval}"


def _spread_cell(spread: Spread) -> str:
    return f"{spread.mean:.4f}" + (f" ± {spread.sd:.4f}" if spread.sd is not None else "")


def to_markdown(table: Table) -> str:
    sweep = table.sweep
    seeds = ", ".join(map(str, sweep.seeds))
    parts = [f"# {sweep.name}\n", f"{sweep.description}\n" if sweep.description else "", f"Recipe `{sweep.recipe}`, seeds {seeds}.\n"]  # fmt: skip
    parts += ["## Mean ± standard deviation over seeds\n", _grid(*setting_rows(table))]
    if table.findings:
        parts += ["## What it shows\n", "".join(f"* {sentence}\n" for sentence in table.findings)]
    parts += ["## Runs\n", "Brackets: 95 % interval by bootstrap over rows, of one run.\n", _grid(*run_rows(table))]
    failed = [line for line in table.lines if line.error]
    if failed:
        text = [f"* {line.setting}, seed {line.seed}: {' '.join(line.error.split())}\n" for line in failed]
        parts += ["## Failed\n", "".join(text)]
    return "\n".join(part for part in parts if part)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
