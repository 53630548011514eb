"""Read back what runs and evaluations left on disk; nothing here needs an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from smolmlx.errors import RecipeError, RunError
from smolmlx.rundir import RunDir
from smolmlx.session import read_metrics

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One held-out row with every system's answer to it."""

    id: str
    input: str
    reference: str
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """One row set (`test`, `ood`) of the notes suite, as `evals.run.write` left it."""

    name: str
    data: str
    """The file the rows came from; '' where the run does not say."""
    num_rows: int
    systems: Mapping[str, Mapping[str, Tree]]
    """System -> metric -> {mean, low, high, num_rows, level}."""
    differences: Sequence[Tree]
    """Paired: {system, control, metric, interval, sentence}."""
    scores: Mapping[str, Sequence[Tree]]
    """System -> one record of metrics and problems per row."""
    rows: Sequence[AnswerRow]


@dataclass(frozen=True, slots=True)
class RunView:
    """A run (or the folder of a `smolmlx eval`), as far as it got."""

    path: Path
    name: str
    recipe: Tree = field(default_factory=dict)
    plan: Tree = field(default_factory=dict)
    env: Tree = field(default_factory=dict)
    report: Tree = field(default_factory=dict)
    """Empty while the run is not finished."""
    steps: Sequence[Tree] = ()
    evals: Sequence[Tree] = ()
    sets: Mapping[str, ScoredSet] = field(default_factory=dict)
    loss: Mapping[str, Tree] = field(default_factory=dict)
    """System -> loss, perplexity, accuracy (suite loss)."""
    samples: Tree = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether something was trained here, rather than only evaluated."""
        return bool(self.plan)


def open_runs(paths: Sequence[Path]) -> list[RunView]:
    """Read run folders, evaluation folders, and folders that hold such folders (a pipeline, a sweep, `runs/`).

    Raises:
        RecipeError: with every path that is none of these.
        RunError: a file of a run is broken.
    """
    found: dict[Path, None] = {}
    problems = []
    for path in paths:
        inside = [path] if _is_view(path) else sorted(p for p in path.glob("[!.]*") if _is_view(p))
        if not inside:
            what = "no such folder" if not path.exists() else "neither a run (plan.json) nor results (results.json)"
            problems.append(f"{path}: {what}, nor a folder of them")
        found |= dict.fromkeys(inside)
    if problems:
        raise RecipeError("report: pass the folder that `smolmlx train` or `smolmlx eval --out` named", problems)
    return [read_run(path) for path in found]


def _is_view(path: Path) -> bool:
    return (path / "plan.json").is_file() or (path / "results.json").is_file()


def read_run(path: Path) -> RunView:
    """Read one run or evaluation folder.

    Raises:
        RunError: a file of it is broken.
    """
    run = RunDir(path)
    scored = path / "eval" if (path / "plan.json").is_file() else path
    results = _optional(RunDir(scored), "results.json")
    rows = read_metrics(run)
    recipe = _read_recipe(path / "recipe.yaml")
    files = {"test": results.get("data"), "ood": (recipe.get("evaluate") or {}).get("ood")}
    return RunView(
        path=path,
        name=path.resolve().name,
        recipe=recipe,
        plan=_optional(run, "plan.json"),
        env=_optional(run, "env.json"),
        report=_optional(run, "report.json"),
        steps=[row for row in rows if row["kind"] == "step"],
        evals=[row for row in rows if row["kind"] == "eval"],
        sets={
            name: _read_set(name, tree, str(files.get(name) or ""), scored)
            for name, tree in results.get("sets", {}).items()
        },
        loss=results.get("systems", {}),
        samples=_optional(run, "samples.json"),
    )


def _optional(run: RunDir, name: str) -> dict[str, Any]:
    return run.read_json(name) if (run.path / name).is_file() else {}


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not valid YAML ({error}).") from error
    return tree if isinstance(tree, dict) else {}


def _read_set(name: str, tree: Tree, data: str, folder: Path) -> ScoredSet:
    try:
        return ScoredSet(
            name=name,
            data=data,
            num_rows=tree["n"],
            systems=tree["systems"],
            differences=tree["differences"],
            scores=tree["rows"],
            rows=_read_answers(folder / f"{name}-answers.jsonl"),
        )
    except KeyError as error:
        raise RunError(f"{folder / 'results.json'}: set '{name}' has no {error}. Run `smolmlx eval` again.") from error


def _read_answers(path: Path) -> list[AnswerRow]:
    if not path.is_file():
        return []
    rows = []
    # Not splitlines(): an answer may hold U+2028, which JSON leaves as it is.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            tree = json.loads(line)
            rows.append(AnswerRow(tree["id"], tree["input"], tree["reference"], tree["answers"]))
        except (ValueError, KeyError) as error:
            raise RunError(f"{path}:{number}: not a row of answers ({error!r}). Run `smolmlx eval` again.") from error
    return rows
