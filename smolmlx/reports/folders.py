"""Read back what runs and evaluations left on disk; nothing here needs an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from smolmlx import run_files
from smolmlx.errors import RecipeError, RunError
from smolmlx.rundir import RunDir
from smolmlx.session import read_metrics

Tree = Mapping[str, Any]
_PIPELINE = "pipeline.json"
"""As `pipelines.FILE`, which stands above this package."""


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
    sha256: str
    """Of that file; '' where the run does not say."""
    num_rows: int
    systems: Mapping[str, Mapping[str, Tree]]
    """System -> metric -> {mean, low, high, num_rows, level, num_groups}."""
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
    files: Mapping[str, Tree] = field(default_factory=dict)
    """`test`, and where given `ood` and `train`: {path, sha256, rows} of what was scored."""
    loss: Mapping[str, Tree] = field(default_factory=dict)
    """System -> loss with its low and high, perplexity, accuracy (suites loss and research)."""
    loss_findings: Sequence[str] = ()
    """What its paired differences show."""
    setting: str = ""
    """What a sweep calls this run's setting; '' outside of a sweep."""
    seed: int | None = None
    samples: Tree = field(default_factory=dict)
    pipeline: Tree = field(default_factory=dict)
    """pipeline.json, where the run is a stage of a pipeline that is looked at as a whole."""

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
    found: dict[Path, Tree] = {}
    problems = []
    for path in paths:
        inside = [path] if _is_view(path) else sorted(p for p in path.glob("[!.]*") if _is_view(p))
        pipeline = run_files.read(RunDir(path), _PIPELINE)
        order = [*_places(path), *(stage["name"] for stage in pipeline.get("stages", ()))]
        inside.sort(key=lambda p: order.index(p.name) if p.name in order else len(order))
        if not inside:
            what = "no such folder" if not path.exists() else "neither a run (plan.json) nor results (results.json)"
            problems.append(f"{path}: {what}, nor a folder of them")
        for one in inside:
            found.setdefault(one, pipeline)
    if problems:
        raise RecipeError("report: pass the folder that `smolmlx train` or `smolmlx eval --out` named", problems)
    return [read_run(path, _places(path.parent).get(path.name), pipeline) for path, pipeline in found.items()]


def _places(folder: Path) -> dict[str, tuple[str, int]]:
    """Return run folder -> (setting, seed) where the folder is a sweep's."""
    if not (folder / "sweep.json").is_file():
        return {}
    return {run["run"]: (run["setting"], run["seed"]) for run in run_files.read(RunDir(folder), "sweep.json")["runs"]}


def _is_view(path: Path) -> bool:
    return (path / "plan.json").is_file() or (path / "results.json").is_file()


def read_run(path: Path, place: tuple[str, int] | None = None, pipeline: Tree = MappingProxyType({})) -> RunView:
    """Read one run or evaluation folder.

    Args:
        place: setting and seed of a sweep's run.
        pipeline: the pipeline.json that this is a stage of.

    Raises:
        RunError: a file of it is broken.
    """
    run = RunDir(path)
    scored = path / "eval" if (path / "plan.json").is_file() else path
    results = run_files.read(RunDir(scored), "results.json")
    rows = read_metrics(run)
    recipe = _read_recipe(path / "recipe.yaml")
    # Results of before 2026-11-21 name the test file alone.
    files = results.get("files") or {"test": {"path": results.get("data")}, "ood": {"path": (recipe.get("evaluate") or {}).get("ood")}}  # fmt: skip
    return RunView(
        path=path,
        name=path.resolve().name,
        recipe=recipe,
        plan=run_files.read(run, "plan.json"),
        env=run_files.read(run, "env.json"),
        report=run_files.read(run, "report.json"),
        steps=[row for row in rows if row["kind"] == "step"],
        evals=[row for row in rows if row["kind"] == "eval"],
        sets={
            name: _read_set(name, tree, files.get(name, {}), scored) for name, tree in results.get("sets", {}).items()
        },
        files=files,
        loss=results.get("systems", {}),
        loss_findings=[found["sentence"] for found in results.get("differences", ())],
        samples=run_files.read(run, "samples.json"),
        setting=place[0] if place else "",
        seed=place[1] if place else None,
        pipeline=pipeline,
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not valid YAML ({error}).") from error
    return tree if isinstance(tree, dict) else {}


def _read_set(name: str, tree: Tree, file: Tree, folder: Path) -> ScoredSet:
    return ScoredSet(
        name=name,
        data=str(file.get("path") or ""),
        sha256=str(file.get("sha256") or ""),
        num_rows=tree["n"],
        systems=tree["systems"],
        differences=tree["differences"],
        scores=tree["rows"],
        rows=_read_answers(folder / f"{name}-answers.jsonl"),
    )


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
