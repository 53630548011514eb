"""What the report says of a sweep in words, tiles and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smolmlx.evals.headlines import BY_KEY, SUMMED_UP
from smolmlx.reports import figures
from smolmlx.reports.boards import Board
from smolmlx.reports.figures import Tile
from smolmlx.reports.sweeps import FIGURES, Figure, SweepView
from smolmlx.sweeps.findings import MIN_SEEDS, NOT_SHOWN, TOO_FEW

SEEN_FIRST = (*(f"test.{metric}" for metric in SUMMED_UP), "eval.loss", "val_loss")
"""Figures whose chart is seen without a click."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure of one setting."""

    mean: str
    spread: str
    """Standard deviation over seeds; '' for one seed."""
    seeds: str
    """Every seed's value."""
    verdict: str
    """Against the first setting: a verdict of `sweeps.findings`; '' where they were not compared."""
    good: bool | None
    """Whether a verdict is to the setting's credit; None where it is neither."""
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, or base and controls below them."""

    name: str
    changes: str
    """Recipe values that differ from the first setting's."""
    seeds: str
    cells: Sequence[Cell | None]
    kind: str = "trained"


def tiles(sweep: SweepView) -> list[Tile]:
    """Return the key figures of a sweep."""
    size = f"{len(sweep.settings)} × {len(sweep.seeds)}"
    found = [Tile("settings × seeds", size, f"{sweep.finished} of {len(sweep.runs)} runs finished")]
    by_metric = {figure.metric: figure for figure in sweep.figures if figure.board == "test"}
    for best in sweep.best:
        figure = by_metric.get(best["metric"])
        if figure is not None:
            mean = sweep.settings[best["leader"]][figure.key]["mean"]
            note = "higher than each other setting" if best["shown"] else "no best setting is shown"
            leader = "shared by several settings" if best.get("shared") else best["leader"]
            found.append(Tile(f"highest {figure.label}", _value(mean, figure), f"{leader}; {note}"))
    if sweep.comparisons:
        shown, few = (
            sum(c["verdict"] in words for c in sweep.comparisons) for words in (("higher", "lower"), (TOO_FEW,))
        )
        note = f"; {few} lie apart, and a verdict takes {MIN_SEEDS} seeds" if few else ""
        found.append(
            Tile("differences shown", f"{shown} of {len(sweep.comparisons)}", f"settings against {sweep.first}{note}")
        )
    seconds = sum(run["figures"].get("seconds", 0.0) for run in sweep.runs)
    found.append(Tile("time in training", figures.duration(seconds), "all runs together"))
    return found


def findings(sweep: SweepView) -> list[str]:
    """Say in a sentence a figure which setting is best, and which are shown to differ from the first."""
    found = [best["sentence"] for best in sweep.best]
    for metric in dict.fromkeys(c["metric"] for c in sweep.comparisons):
        own = [c for c in sweep.comparisons if c["metric"] == metric]
        said = []
        for verdict, words in (("higher", "higher with"), ("lower", "lower with"), (NOT_SHOWN, "no difference shown with"), (TOO_FEW, f"apart, though a verdict takes {MIN_SEEDS} seeds, with")):  # fmt: skip
            names = [c["setting"] for c in own if c["verdict"] == verdict]
            if names:
                said.append(f"{words} {figures.listed(names)}")
        label = next((figure.label for figure in FIGURES if figure.metric == metric), metric)
        found.append(f"{label}, against {sweep.first}: {'; '.join(said)}.")
    return found


def rows(sweep: SweepView, boards: Sequence[Board]) -> list[Row]:
    """Return a row for each setting, then base and controls of the boards that the sweep's runs stand on."""
    found = []
    for setting in sweep.settings:
        seeds = max((spread["num_seeds"] for spread in sweep.settings[setting].values()), default=0)
        changes = ", ".join(f"{key} {value}" for key, value in sweep.changes(setting))
        cells = [_cell(sweep, setting, figure) for figure in sweep.figures]
        found.append(Row(setting, changes, f"{seeds} of {len(sweep.seeds)}", cells))
    return [*found, *_beside(sweep, boards)]


def _cell(sweep: SweepView, setting: str, figure: Figure) -> Cell | None:
    spread = sweep.settings[setting].get(figure.key)
    if spread is None:
        return None
    verdict = sweep.verdict(setting, figure.metric) if figure.board in ("", "test") else ""
    good = None if verdict not in ("higher", "lower") else (verdict == "higher") == figure.higher_is_better
    sd = f"± {_value(spread['sd'], figure)}" if spread["sd"] is not None else ""
    seeds = ", ".join(f"seed {seed}: {_value(value, figure)}" for seed, value in sweep.values(setting, figure.key))
    return Cell(_value(spread["mean"], figure), sd, seeds, verdict, good, sweep.sentence(setting, figure.metric))


def _beside(sweep: SweepView, boards: Sequence[Board]) -> list[Row]:
    by_name = {board.name: board for board in boards}
    names = dict.fromkeys((e.label, e.kind) for board in boards for e in board.entrants if e.kind != "trained")
    found = []
    for name, kind in names:
        cells: list[Cell | None] = []
        for figure in sweep.figures:
            board = by_name.get(figure.board)
            entrant = next((e for e in board.entrants if e.label == name), None) if board else None
            summary = entrant.summary.get(figure.metric) if entrant and figure.metric in BY_KEY else None
            cells.append(Cell(_value(summary["mean"], figure), "", "", "", None) if summary else None)
        if any(cells):
            found.append(Row(name, "no model" if kind == "control" else "before training", "", cells, kind))
    return found


def _value(value: float, figure: Figure) -> str:
    return f"{100 * value:.1f} %" if figure.style == ".1%" else f"{value:{figure.style}}"
