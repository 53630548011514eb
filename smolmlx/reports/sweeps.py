"""A sweep as the report shows it: settings with mean and spread over seeds, read from the sweep.json that runs left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolmlx import run_files
from smolmlx.evals.headlines import BY_KEY, RESEARCH
from smolmlx.reports.figures import PER_TOKEN
from smolmlx.reports.folders import Tree
from smolmlx.rundir import RunDir


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a setting, and how it is read."""

    key: str
    label: str
    meaning: str
    higher_is_better: bool | None
    """None for a figure that is no aim in itself."""
    style: str
    board: str = ""
    """Row set that base and controls have it of."""
    metric: str = ""
    """Its name in comparisons and on boards."""


def _score(board: str, key: str) -> Figure:
    metric = BY_KEY[key]
    label, meaning = metric.label, f"held-out rows; {metric.meaning}"
    if board == "ood":
        label, meaning = f"{label}, other subjects", "the same on out-of-distribution rows"
    style = ".1%" if metric.yes_or_no else ".3f"
    return Figure(f"{board}.{key}", label, meaning, metric.higher_is_better, style, board, key)


FIGURES = (
    *(_score(board, key) for board in ("test", "ood") for key in ("compliance", "content_alignment")),
    *(_score("test", metric.key) for metric in RESEARCH),
    Figure("eval.loss", "held-out loss", PER_TOKEN, False, ".4f"),
    Figure("eval.perplexity", "perplexity", "exp of the held-out loss", False, ".2f"),
    Figure("val_loss", "validation loss", f"best during training, {PER_TOKEN}", False, ".4f", "", "val_loss"),
    Figure("train_loss", "training loss", f"{run_files.FINAL_LOSS}, {PER_TOKEN}", None, ".4f"),
)


@dataclass(frozen=True, slots=True)
class SweepView:
    """A sweep's folder, as far as it got."""

    path: Path
    name: str
    description: str
    recipe: str
    seeds: Sequence[int]
    runs: Sequence[Tree]
    """One a run: setting, seed, status, error, keys, figures, run (its folder)."""
    settings: Mapping[str, Mapping[str, Tree]]
    """Setting -> figure -> {mean, sd, low, high, num_seeds}."""
    comparisons: Sequence[Tree]
    """Each setting against the first: {setting, metric, verdict, sentence, ...}."""
    best: Sequence[Tree]

    @property
    def first(self) -> str:
        """The setting that the others are compared with."""
        return next(iter(self.settings))

    @property
    def finished(self) -> int:
        return sum(run["status"] == "finished" for run in self.runs)

    @property
    def figures(self) -> list[Figure]:
        """The figures that any setting has."""
        return [figure for figure in FIGURES if any(figure.key in found for found in self.settings.values())]

    def verdict(self, setting: str, metric: str) -> str:
        """Return higher, lower or no difference shown, against the first setting; '' where they were not compared."""
        found = [c for c in self.comparisons if c["setting"] == setting and c["metric"] == metric]
        return str(found[0]["verdict"]) if found else ""

    def sentence(self, setting: str, metric: str) -> str:
        return next((str(c["sentence"]) for c in self.comparisons if (c["setting"], c["metric"]) == (setting, metric)), "")  # fmt: skip

    def changes(self, setting: str) -> list[tuple[str, str]]:
        """Return the recipe keys in which a setting differs from the first, with its values."""
        keys: dict[str, Tree] = {}
        for run in self.runs:
            keys.setdefault(run["setting"], run["keys"])
        mine, base = keys[setting], keys[self.first]
        return [(key, _short(value)) for key, value in mine.items() if value != base.get(key)]

    def values(self, setting: str, figure: str) -> list[tuple[int, float]]:
        """Return (seed, value) of each finished run."""
        return [(r["seed"], r["figures"][figure]) for r in self.runs if r["setting"] == setting and figure in r["figures"]]  # fmt: skip


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def open_sweeps(paths: Sequence[Path]) -> list[SweepView]:
    """Read the sweeps among some folders; a folder of single runs is none.

    Raises:
        RunError: a sweep.json is broken.
    """
    return [_read(path) for path in dict.fromkeys(paths) if (path / "sweep.json").is_file()]


def _read(path: Path) -> SweepView:
    tree = run_files.read(RunDir(path), "sweep.json")
    return SweepView(
        path, tree["name"], tree["description"], tree["recipe"], tree["seeds"], tree["runs"], tree["settings"],
        tree["comparisons"], tree["best"],
    )  # fmt: skip
