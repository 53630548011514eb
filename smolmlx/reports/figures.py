"""What the report says in words and tables; the model card says the same from here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolmlx.evals.headlines import SUMMED_UP, Metric, label
from smolmlx.recipe import flatten_tree
from smolmlx.reports.boards import Board, Comparison, Entrant
from smolmlx.reports.folders import RunView, Tree
from smolmlx.run_files import FINAL_LOSS

FEW_ROWS = 30
"""Below this many rows the report says that intervals are wide."""
PER_TOKEN, PER_PAIR = "nats per supervised token", "mean per pair"
"""What a loss is counted in; one axis never holds both."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure."""

    label: str
    value: str
    note: str = ""


def number(value: object, style: str = ",.4f") -> str:
    """Return a number as text; a dash for none, or for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return format(value, style)


def big_number(value: object) -> str:
    """Return e.g. '1.2 M'."""
    if not isinstance(value, (int, float)):
        return "–"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1000 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:,.0f}"


def duration(seconds: object) -> str:
    """Return e.g. '1 h 02 min', '4 min 05 s', '12 s'."""
    if not isinstance(seconds, (int, float)):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def figure(entrant: Entrant, metric: Metric) -> str:
    found = entrant.summary.get(metric.key)
    return "–" if found is None else _level(metric, found["mean"])


def interval(entrant: Entrant, metric: Metric) -> str:
    found = entrant.summary.get(metric.key)
    return "" if found is None else f"{_level(metric, found['low'])} to {_level(metric, found['high'])}"


def _level(metric: Metric, value: float) -> str:
    if metric.yes_or_no:
        return f"{100 * value:.0f} %"
    return f"{value:.3f}" if metric.share else f"{value:.2f}"


def status(view: RunView) -> str:
    """Say how far a run got; '' where it is finished or nothing was trained."""
    if not view.is_run or view.report:
        return ""
    done = view.steps[-1]["step"] if view.steps else 0
    return f"Not finished: step {done} of {view.plan.get('steps', '?')}. Every figure below is of that moment."


def loss_unit(view: RunView) -> str:
    """Return what a run's loss is counted in."""
    return PER_PAIR if view.plan.get("stage") == "dpo" else PER_TOKEN


def last_stage(views: Sequence[RunView], labels: Mapping[str, str], boards: Sequence[Board]) -> list[Tile]:
    """Return the key figures of the stage that a pipeline came to, by the boards that it stands on."""
    last = labels[str(views[-1].path)]
    own = [b for b in boards if any(e.label == last or e.label.startswith(f"{last}: ") for e in b.entrants)]
    return tiles(views[-1], own)


def tiles(view: RunView, boards: Sequence[Board]) -> list[Tile]:
    """Return the key figures of one run; it is the last trained system of its boards."""
    found: list[Tile] = []
    if boards:
        found += _score_tiles(boards[0])
    report = view.report
    if view.steps:
        last = number(report.get("final_loss", view.steps[-1]["loss"]))
        which = FINAL_LOSS if report else "last step's"
        found.append(
            Tile("training loss", last, f"{which}; first step's {number(view.steps[0]['loss'])}; {loss_unit(view)}")
        )
    best = min(view.evals, key=lambda row: row["val_loss"], default=None)
    if best is not None:
        middle = {"perplexity": "val_perplexity", "margin": "val_margin"}
        shown = [f"{word} {number(best[key], '.2f')}" for word, key in middle.items() if key in best]
        note = "; ".join([f"best, at step {best['step']}", *shown])
        found.append(Tile("validation loss", number(best["val_loss"]), note))
    if report:
        speed = f"{duration(report['seconds'])}, {big_number(report['num_tokens'])} tokens"
        found.append(Tile("tokens per second", number(report["tokens_per_second"], ",.0f"), speed))
        if report.get("peak_bytes"):
            found.append(Tile("peak memory", f"{report['peak_bytes'] / 1e9:.2f} GB", str(view.env.get("device", ""))))
    plan = view.plan
    if plan.get("num_parameters") and plan.get("num_trainable"):
        share = 100 * plan["num_trainable"] / plan["num_parameters"]
        found.append(Tile("trained parameters", big_number(plan["num_trainable"]), f"{share:.2f} % of {big_number(plan['num_parameters'])}"))  # fmt: skip
    return found


def _score_tiles(board: Board) -> list[Tile]:
    trained = [entrant for entrant in board.entrants if entrant.kind == "trained"]
    beside = [*(entrant for entrant in board.entrants if entrant.kind == "base"), *trained[-2:-1]]
    found = []
    for metric in board.metrics[:2]:
        if trained and metric.key in trained[-1].summary:
            others = "".join(f"; {other.label} {figure(other, metric)}" for other in beside)
            note = f"95 % interval {interval(trained[-1], metric)}{others}"
            found.append(Tile(metric.label, figure(trained[-1], metric), note))
    return found


def findings(board: Board) -> list[str]:
    """Say what a board shows, a sentence per trained system and leading metric; no claim without a difference."""
    said = [metric for metric in board.metrics if metric.key in SUMMED_UP]
    found = [
        _finding(board, entrant, metric)
        for entrant in board.entrants
        for metric in said
        if entrant.kind == "trained" and metric.key in entrant.summary
    ]
    if found and board.num_rows < FEW_ROWS:
        found.append(f"{board.num_rows} rows are few: read the intervals, not the means.")
    return found


def _finding(board: Board, entrant: Entrant, metric: Metric) -> str:
    value, rows = figure(entrant, metric), entrant.summary[metric.key].get("num_rows", board.num_rows)
    if metric.key == "compliance":
        head = f"{entrant.label} keeps to the template in {value} of {rows} held-out answers"
    else:
        of = f" of {rows} row{'s' if rows > 1 else ''}" if rows != board.num_rows else ""
        head = f"{entrant.label}: {metric.label} {value}{of}"
    return f"{head} (95 % interval {interval(entrant, metric)}){_against(board, entrant, metric)}."


def _against(board: Board, entrant: Entrant, metric: Metric) -> str:
    said = []
    for word, verdict in (
        ("better than", "better"),
        ("worse than", "worse"),
        ("no difference shown to", "no difference shown"),
    ):
        others = [c.against for c in board.comparisons if (c.system, c.metric, c.verdict) == (entrant.label, metric.key, verdict)]  # fmt: skip
        if others:
            said.append(f"{word} {listed(others)}")
    return f": {'; '.join(said)}" if said else ""


def listed(names: Sequence[str]) -> str:
    """Return e.g. 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def comparison_table(board: Board) -> list[tuple[str, str, list[Comparison | None]]]:
    """Return (system, against, one cell per metric of the board)."""
    cells = {(c.system, c.against, c.metric): c for c in board.comparisons}
    pairs = dict.fromkeys((c.system, c.against) for c in board.comparisons)
    return [(a, b, [cells.get((a, b, metric.key)) for metric in board.metrics]) for a, b in pairs]


def all_metrics(board: Board) -> list[tuple[str, list[str]]]:
    """Return every metric with one `mean [low, high]` per system."""
    names = dict.fromkeys(name for entrant in board.entrants for name in entrant.summary)
    return [(label(name), [_spread(entrant.summary.get(name)) for entrant in board.entrants]) for name in names]


def _spread(found: Tree | None) -> str:
    return "–" if found is None else f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def loss_cell(found: Tree) -> str:
    """Return a held-out loss with its interval; results of before 2026-11-21 may have none."""
    low, high = (number(found.get(end)) for end in ("low", "high"))
    return number(found["loss"]) + (f" [{low}, {high}]" if "–" not in (low, high) else "")


def data_names(view: RunView) -> tuple[list[str], list[str]]:
    """Return what a run's recipe names as rows for training, and for validation."""
    data = view.recipe.get("data") or {}
    train, validation = ([value] if isinstance(value, str) else list(value or ()) for value in (data.get("train"), data.get("validation")))  # fmt: skip
    share = data.get("validation_share")
    return train, validation or ([f"{100 * share:g} % of the rows for training"] if share else [])


def training_facts(view: RunView) -> list[tuple[str, str]]:
    """Return what was trained, how, and on what machine."""
    plan, env, recipe, report = view.plan, view.env, view.recipe, view.report
    model = plan.get("model", {})
    revision = f" at {model['revision']}" if model.get("revision") else ""
    lora = recipe.get("lora", {})
    method = "LoRA" if plan.get("targets") else "full"
    adapter = f", r {lora.get('r', 'as by default')}, alpha {lora.get('alpha', 'as by default')}" if method == "LoRA" else ""  # fmt: skip
    rate, low = number(plan.get("learning_rate_peak"), ".3g"), number(plan.get("learning_rate_last"), ".3g")
    tokens = number(plan.get("tokens"), ",d")
    train, validation = map(", ".join, data_names(view))
    facts = [
        ("stage", f"{plan.get('stage', '–')}, {method}{adapter}"),
        ("base", f"{model.get('id', '–')}{revision}"),
        ("data", f"{train}; validation: {validation or 'none'}" if train else ""),
        ("rows", f"{number(plan.get('rows'), ',d')} ({plan.get('format', '–')}), {tokens} tokens an epoch, {number(plan.get('supervised'), ',d')} supervised"),
        ("steps", f"{report.get('steps', plan.get('steps', '–'))} of {plan.get('batch_size', '–')} x {plan.get('accumulation', '–')} rows"),
        ("learning rate", f"peak {rate}, last {low}"),
        ("engine", f"{plan.get('backend', '–')} ({plan.get('why_backend', '–')}), {plan.get('dtype', '–')}"),
        ("machine", f"{env.get('device', '–')}; {env.get('platform', '–')}; Python {env.get('python', '–')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items())),
        ("command", " ".join(map(str, env.get("command", [])))),
        ("hashes", f"data {plan.get('data_hash', '–')}, template {plan.get('template', '–')}, plan {plan.get('fingerprint', '–')}"),
    ]  # fmt: skip
    if report.get("stopped_early"):
        facts.insert(5, ("stopped early", f"best evaluation at step {report.get('best_step')}"))
    lost = plan.get("reasons", {})
    if lost:
        facts.insert(4, ("rows left out or cut", ", ".join(f"{count:,} {reason}" for reason, count in lost.items())))
    return facts


def differing_keys(views: Sequence[RunView]) -> list[str]:
    """Return the recipe's dotted keys whose values differ between runs; prompts and descriptions do not count."""
    trees = [flatten_tree(view.recipe) for view in views if view.is_run]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    skipped = ("description", "samples.", "evaluate.")
    return [key for key in keys if not key.startswith(skipped) and len({str(tree.get(key)) for tree in trees}) > 1]


def run_table(views: Sequence[RunView], labels: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one line per run: what sets it apart, and how it trained."""
    keys = differing_keys(views)
    mixed = len({loss_unit(view) for view in views if view.is_run}) > 1
    head = ["run", *keys, "steps", "training loss", "best validation loss", "tokens/s", "time"]
    lines = []
    for view in views:
        if view.is_run:
            tree: dict[str, Any] = flatten_tree(view.recipe)
            losses = [row["val_loss"] for row in view.evals]
            unit = " per pair" if mixed and loss_unit(view) == PER_PAIR else ""
            lines.append(
                [
                    labels[str(view.path)],
                    *(str(tree.get(key, "default")) for key in keys),
                    str(view.steps[-1]["step"] if view.steps else 0) + ("" if view.report else " (not finished)"),
                    number(view.report.get("final_loss", view.steps[-1]["loss"] if view.steps else None)) + unit,
                    number(min(losses, default=None)) + (unit if losses else ""),
                    number(view.report.get("tokens_per_second"), ",.0f"),
                    duration(view.report.get("seconds")),
                ]
            )
    return head, lines
