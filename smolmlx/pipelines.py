"""A recipe of several stages: training recipes, and the data made between them, run in order in one folder.

    runs/<name>-<yyyymmdd-hhmmss>-<4 hex>/
        pipeline.json     every stage as it runs, overrides included
        <stage>/          a run's folder, or the rows that were made

A training stage goes on with what the training stage before it left: its adapter, or the whole model where that was trained.
What the other stages do stands in `Pairs` and in `data_stages`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smolmlx import recipe as recipes
from smolmlx import rundir
from smolmlx.backend import Choice
from smolmlx.data.splits import SPLITS
from smolmlx.data_stages import Augment, Chunk, Options
from smolmlx.errors import DataError, RecipeError, RunError, nearest
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
_REFERENCE = re.compile(r"\{([^{}/\s]+)\}(?:/(train|validation|test)\.jsonl)?(?=/|$)")
"""The folder of an earlier stage, and which of its splits is meant; a path begins with it."""
_BASE_KEYS = ("model.id", "model.adapter")
"""What a stage takes from the one before whatever its own recipe says."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pairs(Options):
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

    def check(self) -> None:
        if not self.samples:
            check_order(self.order())

    def order(self) -> Order:
        return Order(self.counts or COUNTS, tuple(ISSUES if self.issues is None else self.issues), self.seed)


Making = Pairs | Chunk | Augment
"""What a stage that does not train makes."""
KINDS: Mapping[str, type[Options]] = {"pairs": Pairs, "chunk": Chunk, "augment": Augment}


class Entry(_Strict):
    """One stage as a file writes it."""

    recipe: str | None = None
    """A training recipe: a shipped name, or a path beside the file."""
    pairs: Pairs | None = None
    chunk: Chunk | None = None
    augment: Augment | None = None
    set: dict[str, Any] = {}
    """Recipe keys laid over the recipe; `{stage}` is the folder of an earlier stage."""

    @model_validator(mode="after")
    def _one_kind(self) -> Entry:
        if sum(found is not None for found in (self.recipe, self.pairs, self.chunk, self.augment)) != 1:
            raise ValueError("a stage has one of `recipe`, `pairs`, `chunk` and `augment`")
        if self.set and self.recipe is None:
            raise ValueError("`set` lays values over a recipe; this stage has none")
        return self

    @property
    def making(self) -> Making | None:
        return self.pairs or self.chunk or self.augment


class File(_Strict):
    """A pipeline file."""

    stages: Annotated[dict[str, Entry], Field(min_length=1)]
    description: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: a recipe with what is laid over it, or data that are made."""

    name: str
    making: Making | None = None
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
        sets: `stage.key` -> value, laid over a stage's recipe, or over what it makes.
        max_steps: of every training stage.

    Raises:
        RecipeError: with everything that is wrong, in the pipeline and in its recipes.
    """
    if isinstance(source, Path):
        file, said, folder = _check(recipes.read(source), str(source)), str(source), source.parent
    else:
        file, said, folder = _check(source, "pipeline"), "pipeline", Path()
    over = _by_stage(sets or {}, {stage: entry.recipe is not None for stage, entry in file.stages.items()})
    found: list[Stage] = []
    problems: list[str] = []
    for stage, entry in file.stages.items():
        if entry.making is not None:
            making = entry.making
            try:
                making = _laid_over(making, over.get(stage, {}))
                making.check()
            except RecipeError as error:
                problems += [f"stages.{stage}: {problem}" for problem in error.problems or [str(error)]]
            if isinstance(making, Pairs) and making.samples and not any(earlier.tree is not None for earlier in found):
                problems.append(f"stages.{stage}: `samples` are answers of a trained stage, and none stands before it.")
            found.append(Stage(stage, making))
            problems += _wrong_references(found)
            continue
        assert entry.recipe is not None
        beside = folder / entry.recipe
        path = beside if beside.is_file() else find(entry.recipe)
        values = _merged(recipes.flatten_tree(entry.set), over.get(stage, {}), max_steps)
        found.append(Stage(stage, None, str(path.resolve()), recipes.read(path), values))
        problems += _wrong_references(found)
    made = Pipeline(name, file.description, tuple(found))
    _refuse_wrong(said, made, problems)
    return made


def _refuse_wrong(said: str, made: Pipeline, problems: list[str]) -> None:
    """Refuse a pipeline whose recipes cannot be honoured, with the problems found before."""
    for step in made.training:
        try:
            load_stage(made, step, Path("RUN"))
        except RecipeError as error:
            problems += [f"stages.{step.name}: {problem}" for problem in error.problems or [str(error)]]
    if not made.training:
        problems.append("stages: none of them trains; give one a `recipe`.")
    if problems:
        raise RecipeError(said, problems)


def _merged(values: Mapping[str, Any], over: Mapping[str, Any], max_steps: int | None = None) -> dict[str, Any]:
    """Lay values over those of a stage; a whole section (`evaluate`) takes the place of its keys (`evaluate.data`)."""
    over = {**over, "train.max_steps": max_steps} if max_steps else over
    kept = {key: value for key, value in values.items() if not any(key.startswith(f"{other}.") for other in over)}
    return {**kept, **over}


def _wrong_references(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield what the last of some stages names and no stage before it makes."""
    *earlier, stage = stages
    before = {other.name: other for other in earlier}
    for key, name, split in _references(stage):
        if name not in before:
            yield f"stages.{stage.name}.{key}: {{{name}}}: no earlier stage of this name.{nearest(name, before)}"
        elif split and split not in (made := _splits_of(before[name], before)):
            chunks = next((other.name for other in earlier if isinstance(other.making, Chunk)), name)
            sizes = f"{name}.counts" if isinstance(before[name].making, Pairs) else f"{chunks}.shares"
            yield (
                f"stages.{stage.name}.{key}: {{{name}}}/{split}.jsonl: that stage makes {' and '.join(made)} alone."
                f" Give {split} more than 0 (--set '{sizes}=[...]'), or set {stage.name}.{key} to other rows."
            )


def _references(stage: Stage) -> Iterator[tuple[str, str, str | None]]:
    """Yield (key, stage, split) of every text that begins with `{stage}`."""
    values = stage.making.model_dump(exclude_unset=True) if stage.making is not None else stage.values or {}
    for key, value in values.items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and (match := _REFERENCE.match(text)):
                yield key, match[1], match[2]


def _splits_of(stage: Stage, stages: Mapping[str, Stage]) -> Sequence[str]:
    """Return the splits that a stage is asked for: all where that is not known before it runs."""
    making = stage.making
    if isinstance(making, Augment) and (match := _REFERENCE.match(making.chunks)) and match[1] in stages:
        return _splits_of(stages[match[1]], stages)
    sizes: Sequence[float] = making.shares if isinstance(making, Chunk) else (1, 1, 1)
    if isinstance(making, Pairs):
        sizes = making.counts or (1, 1)
    return [split for split, size in zip(SPLITS, sizes, strict=False) if size]


def refuse_empty(pipeline: Pipeline, stage: Stage, folder: Path) -> None:
    """Refuse to go on from a stage that has left no row for a split that a later stage reads.

    Raises:
        DataError
    """
    later = pipeline.stages[pipeline.stages.index(stage) + 1 :]
    used = {split for other in later for _, name, split in _references(other) if name == stage.name and split}
    if gone := [s for s in SPLITS if s in used and not (folder / stage.name / f"{s}.jsonl").is_file()]:
        more = "more documents or tasks, or a smaller `words`" if isinstance(stage.making, Augment) else "more rows"
        raise DataError(f"stage {stage.name}: no row was accepted for {' and '.join(gone)}: {more}.")


def _laid_over(making: Making, values: Mapping[str, Any]) -> Making:
    """Return what a stage makes with other values; RecipeError for those that it does not take."""
    try:
        return type(making).model_validate({**making.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        raise RecipeError("a pipeline", [_said(dict(item), type(making)) for item in error.errors()]) from error


def load_stage(pipeline: Pipeline, stage: Stage, folder: Path) -> Loaded:
    """Build the recipe of a training stage, with `{stage}` filled in and the last trained stage as its start."""
    assert stage.tree is not None and stage.values is not None
    names = [other.name for other in pipeline.stages[: pipeline.stages.index(stage)]]
    flags = {key: (f"stages.{stage.name}", _filled(value, names, folder)) for key, value in stage.values.items()}
    if not {"model.adapter", "model.id"} & set(flags):
        own = {*stage.values, *recipes.flatten_tree({"model": stage.tree.get("model") or {}})}
        for key, value in _handed_on(pipeline, names, folder):
            if key in _BASE_KEYS or key not in own:
                flags[key] = ("the stage before", value)
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
            yield "model.adapter", str(run.adapter)  # its folder holds tokenizer and template too
            if last.model.revision:
                yield "model.revision", last.model.revision
            if last.model.quantize != "none":
                yield "model.quantize", last.model.quantize


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


def _said(item: Mapping[str, Any], model: type[BaseModel] = File) -> str:
    """Put one of pydantic's errors about a pipeline, or about the kind of stage given, into words."""
    dotted = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        *parents, key = map(str, item["loc"])
        if model is File and parents:  # stages.NAME, or stages.NAME.KIND
            model = KINDS[parents[2]] if len(parents) > 2 else Entry
        known = list(model.model_fields)
        hint = " Recipe keys go under `set` of a stage." if model is Entry else f" Known: {', '.join(known)}."
        return f"{dotted}: unknown key of a pipeline.{nearest(key, known) or hint}"
    if item["type"] in ("list_type", "tuple_type"):
        given = item["input"]
        return f"{dotted}: expected a list: write [{'a, b' if isinstance(given, dict) else given}]."
    return f"{dotted or 'stages'}: {item['msg'].removeprefix('Value error, ')}"


def _by_stage(sets: Mapping[str, Any], stages: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Return the values of each stage; `stages` says which of them train."""
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for key, value in sets.items():
        stage, _, rest = key.partition(".")
        if stage not in stages or not rest:
            trained = [name for name, trains in stages.items() if trains]
            known = f", e.g. {trained[0]}.{key}. Stages: {', '.join(stages)}." if trained else "; none of them trains."
            if rest and nearest(stage, stages):
                known = "." + nearest(key, [f"{name}.{rest}" for name in stages])
            problems.append(f"--set {key}: begin with the stage it is for{known}")
        found.setdefault(stage, {})[rest] = value
    if problems:
        raise RecipeError("a pipeline", problems)
    return found


def start(pipeline: Pipeline, out: Path) -> Path:
    """Make the pipeline's folder with what it takes to go on later.

    Raises:
        DataError: documents, chunks or an adapter that a stage is to read are not there.
    """
    missing = [
        f"{stage.name}.{said}. Name what you have: --set {stage.name}.{said.partition(':')[0]}=PATH"
        for stage in pipeline.stages
        if stage.making is not None
        for said in stage.making.missing()
    ]
    if missing:
        raise DataError(pipeline.name, missing)
    folder = rundir.create(pipeline.name, out).path
    _write(pipeline, folder)
    return folder


def _write(pipeline: Pipeline, folder: Path) -> None:
    stages = [
        {
            "name": s.name,
            **{
                key: s.making.model_dump(exclude_unset=True)
                for key, kind in KINDS.items()
                if isinstance(s.making, kind)
            },
            "source": s.source,
            "tree": s.tree,
            "values": s.values,
        }
        for s in pipeline.stages
    ]
    tree = {"name": pipeline.name, "description": pipeline.description, "stages": stages}
    write_text(folder / FILE, json.dumps(tree, indent=2, default=str) + "\n")


def reopen(folder: Path) -> Pipeline:
    """Read back the pipeline of a folder.

    Raises:
        RunError: not the folder of one.
    """
    tree = RunDir(folder).read_json(FILE)
    try:
        stages = [
            Stage(s["name"], Entry.model_validate(made).making if made else None, s["source"], s["tree"], s["values"])
            for s in tree["stages"]
            for made in [{key: s[key] for key in KINDS if s.get(key)}]
        ]
        return Pipeline(tree["name"], tree["description"], tuple(stages))
    except (KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{folder / FILE}: not what smolmlx wrote ({error}).") from error


def change(pipeline: Pipeline, folder: Path, sets: Mapping[str, Any], max_steps: int | None = None) -> Pipeline:
    """Lay values over stages that have not begun, and keep the pipeline so in its folder.

    Args:
        sets: `stage.key` -> value.
        max_steps: of the training stages that have not begun.

    Raises:
        RecipeError: values of a stage that has begun, or that cannot be honoured.
    """
    over = _by_stage(sets, {stage.name: stage.tree is not None for stage in pipeline.stages})
    found: list[Stage] = []
    problems: list[str] = []
    if max_steps and all((folder / stage.name).exists() for stage in pipeline.training):
        problems.append("--max-steps: every stage that trains has begun, and goes on as it was begun. Leave it out.")
    for stage in pipeline.stages:
        values = over.get(stage.name, {})
        if (folder / stage.name).exists():
            problems += [
                f"--set {stage.name}.{key}: this stage has begun, and goes on as it was begun. Start a new run to change it."
                for key in values
            ]
        elif stage.making is None:
            stage = replace(stage, values=_merged(stage.values or {}, values, max_steps))
        elif values:
            try:
                making = _laid_over(stage.making, values)
                making.check()
                stage = replace(stage, making=making)
            except RecipeError as error:
                problems += [f"stages.{stage.name}: {problem}" for problem in error.problems or [str(error)]]
        found.append(stage)
        problems += _wrong_references(found)
    made = replace(pipeline, stages=tuple(found))
    _refuse_wrong("--resume", made, problems)
    _write(made, folder)
    return made


def last_run(folder: Path) -> Path | None:
    """Return the folder of a pipeline's last training stage; None for a folder that is no pipeline's.

    Raises:
        RecipeError: the stage has not run to its end.
        RunError: a broken pipeline.json.
    """
    if not (folder / FILE).is_file():
        return None
    stage = reopen(folder).training[-1]
    if not is_done(stage, folder):
        raise RecipeError(f"{folder}: this pipeline is not finished. Go on with: smolmlx train --resume {folder}")
    return folder / stage.name


def is_done(stage: Stage, folder: Path) -> bool:
    """Whether a stage has left its whole result in the pipeline's folder."""
    path = folder / stage.name
    if stage.making is not None:
        return stage.making.is_done(path)
    return (path / "recipe.yaml").is_file() and is_complete(RunDir(path))


def make(pipeline: Pipeline, stage: Stage, folder: Path, choice: Choice, meter: Meter) -> dict[str, Any]:
    """Write what a stage makes into its folder, or what an earlier call has left to make; return the manifest."""
    assert stage.making is not None
    earlier = pipeline.stages[: pipeline.stages.index(stage)]
    names = [other.name for other in earlier]
    tree = stage.making.model_dump(exclude_unset=True)
    wanted = _laid_over(stage.making, {key: _filled(value, names, folder) for key, value in tree.items()})
    if not isinstance(wanted, Pairs):
        return wanted.make(folder / stage.name, choice, meter)
    if not wanted.samples:
        return write_pairs(wanted.rows, folder / stage.name, wanted.order())
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
