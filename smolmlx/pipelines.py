"""A recipe of several stages: training recipes, and the data made between them, run in order in one folder.

    runs/<name>-<yyyymmdd-hhmmss>-<4 hex>/
        pipeline.json     every stage as it runs, overrides included
        <stage>/          a run's folder, or the rows that were made

A training stage goes on with what the training stage before it left: its adapter, or the whole model where that was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolmlx import recipe as recipes
from smolmlx import rundir
from smolmlx.backend import Choice
from smolmlx.errors import RecipeError, RunError, nearest
from smolmlx.evals.run import Meter
from smolmlx.plan import resolve
from smolmlx.recipe import Loaded
from smolmlx.rundir import RunDir, write_text
from smolmlx.stages import is_complete, open_generator
from smolmlx.synth.flaws import ISSUES
from smolmlx.synth.on_policy import Sampling, drawing, write_sampled
from smolmlx.synth.pairs import COUNTS, Order, check_order, write_pairs

FILE = "pipeline.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pairs(_Strict):
    """Preference pairs, as `smolmlx data pairs` makes them."""

    rows: Annotated[list[str], Field(min_length=1)]
    """Notes files, or folders that hold train.jsonl and validation.jsonl."""
    counts: tuple[int, int] | None = None
    """Pairs for train and validation. Left out: 258 and 42 by rule, all that the answers give with `samples`."""
    issues: list[str] | None = None
    """Flaws of pairs by rule; left out, all."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Answers drawn for each row from the stage trained last; 0 makes pairs by rule."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Of these answers."""
    about: Literal["any", "form"] = "any"
    """Pairs of these answers. form: only those whose rejected answer breaks the strict rule."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_way(self) -> Pairs:
        if self.samples == 1 or (self.samples and self.issues is not None):
            raise ValueError("`samples` takes 2 or more, and no `issues`, which are of pairs by rule")
        idle = {"temperature", "about"} & self.model_fields_set
        if not self.samples and idle:
            raise ValueError(f"`{sorted(idle)[0]}` has no effect without `samples`")
        return self

    def order(self) -> Order:
        return Order(self.counts or COUNTS, tuple(ISSUES if self.issues is None else self.issues), self.seed)


class Entry(_Strict):
    """One stage as a file writes it."""

    recipe: str | None = None
    """A training recipe: a shipped name, or a path beside the file."""
    pairs: Pairs | None = None
    set: dict[str, Any] = {}
    """Recipe keys laid over the recipe; `{stage}` is the folder of an earlier stage."""

    @model_validator(mode="after")
    def _one_kind(self) -> Entry:
        if (self.recipe is None) == (self.pairs is None):
            raise ValueError("a stage has either `recipe` or `pairs`")
        if self.pairs and self.set:
            raise ValueError("`set` lays values over a recipe; this stage has none")
        return self


class File(_Strict):
    """A pipeline file."""

    stages: Annotated[dict[str, Entry], Field(min_length=1)]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: a recipe with what is laid over it, or pairs."""

    name: str
    pairs: Pairs | None = None
    source: str = ""
    """The recipe's file."""
    tree: Mapping[str, Any] | None = None
    """The recipe, as its file has it."""
    values: Mapping[str, Any] | None = None
    """Dotted recipe key -> value laid over it; texts may hold `{stage}`."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages in the order they run."""

    name: str
    description: str
    stages: tuple[Stage, ...]

    @property
    def training(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.tree is not None)


def is_pipeline(tree: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is a pipeline rather than the recipe of one stage."""
    return "stages" in tree


def open_pipeline(
    source: Path | Mapping[str, Any],
    name: str,
    find: Callable[[str], Path],
    sets: Mapping[str, Any] | None = None,
    max_steps: int | None = None,
) -> Pipeline:
    """Check a pipeline and every recipe it leads to.

    Args:
        source: its file, or what would stand in it; paths of recipes begin beside the file, or in the working folder.
        name: what the pipeline's folder is called.
        find: turns the name of a recipe into its file.
        sets: `stage.key` -> value, laid over a stage's recipe.
        max_steps: of every training stage.

    Raises:
        RecipeError: with everything that is wrong, in the pipeline and in its recipes.
    """
    if isinstance(source, Path):
        file, said, folder = _check(recipes.read(source), str(source)), str(source), source.parent
    else:
        file, said, folder = _check(source, "pipeline"), "pipeline", Path()
    over = _by_stage(sets or {}, file.stages)
    found: list[Stage] = []
    problems: list[str] = []
    for stage, entry in file.stages.items():
        if entry.pairs is not None:
            try:
                if not entry.pairs.samples:
                    check_order(entry.pairs.order())
                elif not any(earlier.tree is not None for earlier in found):
                    problems.append(
                        f"stages.{stage}: `samples` are answers of a trained stage, and none stands before it."
                    )
            except RecipeError as error:
                problems += [f"stages.{stage}: {problem}" for problem in error.problems]
            found.append(Stage(stage, entry.pairs))
            continue
        assert entry.recipe is not None
        beside = folder / entry.recipe
        path = beside if beside.is_file() else find(entry.recipe)
        values = {**recipes.flatten_tree(entry.set), **over.get(stage, {})}
        if max_steps:
            values["train.max_steps"] = max_steps
        found.append(Stage(stage, None, str(path.resolve()), recipes.read(path), values))
    made = Pipeline(name, file.description, tuple(found))
    for step in made.training:
        try:
            load_stage(made, step, Path("RUN"))
        except RecipeError as error:
            problems += [f"stages.{step.name}: {problem}" for problem in error.problems or [str(error)]]
    if not made.training:
        problems.append("stages: none of them trains; give one a `recipe`.")
    if problems:
        raise RecipeError(said, problems)
    return made


def load_stage(pipeline: Pipeline, stage: Stage, folder: Path) -> Loaded:
    """Build the recipe of a training stage, with `{stage}` filled in and the last trained stage as its start."""
    assert stage.tree is not None and stage.values is not None
    names = [other.name for other in pipeline.stages[: pipeline.stages.index(stage)]]
    flags = {key: (f"stages.{stage.name}", _filled(value, names, folder)) for key, value in stage.values.items()}
    if not {"model.adapter", "model.id"} & set(flags):
        flags |= {key: ("the stage before", value) for key, value in _handed_on(pipeline, names, folder)}
    return recipes.build(stage.tree, source=stage.source, folder=Path(stage.source).parent, flags=flags)


def _handed_on(pipeline: Pipeline, earlier: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the recipe keys that take what the last training stage before this one left."""
    trained = [stage for stage in pipeline.training if stage.name in earlier]
    if trained:
        last = load_stage(pipeline, trained[-1], folder).recipe
        run = RunDir(folder.resolve() / trained[-1].name)
        if last.train.method == "full":
            yield "model.id", str(run.model)
        else:  # an adapter is worth something on its own base alone
            yield "model.id", str(last.model.id)
            yield "model.adapter", str(run.adapter)


def _filled(value: Any, names: list[str], folder: Path) -> Any:
    if isinstance(value, str):
        for name in names:
            value = value.replace(f"{{{name}}}", str(folder.resolve() / name))
        return value
    return [_filled(item, names, folder) for item in value] if isinstance(value, list) else value


def _check(tree: Mapping[str, Any], source: str) -> File:
    try:
        file = File.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(source, [_said(dict(item)) for item in error.errors()]) from error
    bad = [name for name in file.stages if not _NAME.fullmatch(name)]
    if bad:
        raise RecipeError(
            source, [f"stages.{name}: a stage's name is its folder: small letters, digits, -" for name in bad]
        )
    return file


def _said(item: Mapping[str, Any]) -> str:
    dotted = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = [*File.model_fields] if len(item["loc"]) == 1 else [*Entry.model_fields, *Pairs.model_fields]
        key = str(item["loc"][-1])
        return f"{dotted}: unknown key of a pipeline.{nearest(key, known) or ' Recipe keys go under `set` of a stage.'}"
    return f"{dotted or 'stages'}: {item['msg'].removeprefix('Value error, ')}"


def _by_stage(sets: Mapping[str, Any], stages: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for key, value in sets.items():
        stage, _, rest = key.partition(".")
        if stage not in stages or stages[stage].recipe is None or not rest:
            trained = [name for name, entry in stages.items() if entry.recipe is not None]
            known = f", e.g. {trained[0]}.{key}. Stages: {', '.join(trained)}." if trained else "; none of them trains."
            problems.append(f"--set {key}: begin with the stage it is for{known}")
        found.setdefault(stage, {})[rest] = value
    if problems:
        raise RecipeError("a pipeline", problems)
    return found


def start(pipeline: Pipeline, out: Path) -> Path:
    """Make the pipeline's folder with what it takes to go on later."""
    folder = rundir.create(pipeline.name, out).path
    stages = [
        {
            "name": s.name,
            "pairs": s.pairs.model_dump(exclude_unset=True) if s.pairs else None,
            "source": s.source,
            "tree": s.tree,
            "values": s.values,
        }
        for s in pipeline.stages
    ]
    tree = {"name": pipeline.name, "description": pipeline.description, "stages": stages}
    write_text(folder / FILE, json.dumps(tree, indent=2, default=str) + "\n")
    return folder


def reopen(folder: Path) -> Pipeline:
    """Read back the pipeline of a folder.

    Raises:
        RunError: not the folder of one.
    """
    tree = RunDir(folder).read_json(FILE)
    try:
        stages = [{**s, "pairs": Pairs.model_validate(s["pairs"]) if s["pairs"] else None} for s in tree["stages"]]
        return Pipeline(tree["name"], tree["description"], tuple(Stage(**stage) for stage in stages))
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{folder / FILE}: not what smolmlx wrote ({error}).") from error


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether a stage has left its whole result in the pipeline's folder."""
    path = folder / stage.name
    if stage.pairs is not None:
        return (path / "manifest.json").is_file()
    return (path / "recipe.yaml").is_file() and is_complete(RunDir(path))


def make_pairs(pipeline: Pipeline, stage: Stage, folder: Path, choice: Choice, meter: Meter) -> dict[str, Any]:
    """Write a stage's pairs, by rule or from the answers of the last trained stage; return their manifest."""
    assert stage.pairs is not None
    wanted = stage.pairs
    if not wanted.samples:
        return write_pairs(wanted.rows, folder / stage.name, wanted.order())
    earlier = pipeline.stages[: pipeline.stages.index(stage)]
    trained = next(other for other in reversed(earlier) if other.tree is not None)
    plan = resolve(load_stage(pipeline, trained, folder), choice)
    run = RunDir(folder / trained.name)
    left = run.model if plan.full else run.adapter
    sampling = Sampling(
        plan.model.name, str(left), wanted.samples, wanted.temperature, seed=wanted.seed, about=wanted.about
    )
    generator = open_generator(plan, choice.backend, left, run)
    draw = drawing(generator, plan.tokenizer, sampling, meter)
    return write_sampled(wanted.rows, folder / stage.name, wanted.counts, sampling, draw)
