"""The verbs from Python: train, load, generate, evaluate, sweep. The command line is a thin skin over the same functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolmlx import backend as backends
from smolmlx import pipelines, shelf, stages
from smolmlx import recipe as recipes
from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.convert import convert
from smolmlx.backend import Backend, Decoding, Generator, Loading, OnText
from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import Encoding
from smolmlx.errors import BackendError, DataError, RecipeError, nearest
from smolmlx.evals.bases import Bases, System
from smolmlx.evals.run import Evaluation, Settings
from smolmlx.evals.run import evaluate as run_suite
from smolmlx.generation.prompts import check_lengths
from smolmlx.models import BaseModel, files_root, find_model, open_model
from smolmlx.plan import Plan, resolve
from smolmlx.run_files import Report
from smolmlx.rundir import RunDir
from smolmlx.session import Event
from smolmlx.sweeps import record
from smolmlx.sweeps.definition import Cell
from smolmlx.sweeps.table import Table, read_table, write_table


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    path: Path
    report: Report
    adapter: Path | None
    """Adapter folder in PEFT layout; None after full training."""
    model: str
    """What the adapter stands on, or the trained model's folder."""
    backend: str
    device: str
    dtype: str
    quantize: str
    """How the base was loaded: an adapter answers as it was trained on the same base alone."""
    evaluation: Evaluation | None


@dataclass(frozen=True, slots=True)
class SweepRun:
    """A sweep as far as it got."""

    path: Path
    table: Table
    """`.lines`, one a run; `.settings`, mean and spread over seeds; `.findings`, what they show."""


@dataclass(frozen=True)
class Model:
    """A loaded model, ready to answer and to be scored."""

    base: BaseModel
    adapter: Path | None
    tokenizer: Tokenizer
    backend: Backend
    loading: Loading
    generator: Generator

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        system: str | None = None,
        on_text: OnText | None = None,
        **decoding: Any,
    ) -> list[str]:
        """Answer prompts, each a user message or a list of messages; answers come back in order.

        Args:
            on_text: told (index of the prompt, further text) while answers are written.
            decoding: fields of `backend.Decoding`: max_tokens, temperature, top_p, top_k, min_p, seed, batch_size, stop,
                repetition_penalty, no_repeat_ngram, and schema (a Pydantic model, a JSON schema, Regex or OneOf).

        Raises:
            RecipeError: values out of bounds, or a schema that cannot be kept to, by name.
            DataError: one text in place of a list, or prompts that leave no room for an answer in the model's context.
        """
        _check_prompts(prompts)
        head = ({"role": "system", "content": system},) if system else ()
        messages = [(*head, {"role": "user", "content": p}) if isinstance(p, str) else tuple(p) for p in prompts]
        tokens = [self.tokenizer.encode(self.tokenizer.prompt(found)) for found in messages]
        check_lengths(tokens, self.base.context, "generate")
        answers = [""] * len(tokens)
        for completion in self.generator.generate(tokens, Decoding(**decoding), on_text):
            answers[completion.index] = completion.text.strip()
        return answers


def _check_prompts(prompts: Any) -> None:
    if isinstance(prompts, str):
        raise DataError("generate: expected a list of prompts, got one text: write [text].")
    if not isinstance(prompts, Sequence):
        raise DataError(f"generate: expected a list of prompts, got {prompts!r}.")
    problems = [
        f"prompt {number}: got {prompt!r}, expected a text or a list of messages."
        for number, prompt in enumerate(prompts)
        if not isinstance(prompt, str)
        and not (isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt))
    ]
    if problems:
        raise DataError("generate", problems)


def train(
    recipe: str | Path | Mapping[str, Any] = "quickstart",
    *,
    backend: str = "auto",
    device: str | None = None,
    set: Mapping[str, Any] | None = None,
    out: str | Path = "runs",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Train a recipe (a shipped name, a path, or a mapping) and evaluate what it asks for. Silent unless `on_event` prints.

    Of a pipeline all stages run, and the last one's run is returned; keys of `set` then begin with the stage's name.

    Raises:
        SmolError: one of the four families of `smolmlx.errors`.
    """
    if set is not None and not isinstance(set, Mapping):
        raise RecipeError(f"train: set: got {set!r}, expected a dict, e.g. {{'train.max_steps': 100}}.")
    if isinstance(recipe, Mapping):
        source: Path | Mapping[str, Any] = recipe
        tree, said, beside, name = recipe, "recipe", Path.cwd(), "run"
    else:
        source = shelf.find(str(recipe))
        tree, said, beside, name = (
            recipes.read(source),
            str(source),
            source.resolve().parent,
            stages.run_name(str(recipe)),
        )
    if pipelines.is_pipeline(tree):
        pipeline = pipelines.open_pipeline(source, name, shelf.find, set)
        choice = backends.choose(backend, device)
        folder = pipelines.start(pipeline, Path(out))
        for stage in pipeline.stages:
            if stage.making is not None:
                pipelines.make(pipeline, stage, folder, choice, _silent)
                pipelines.refuse_empty(pipeline, stage, folder)
            else:
                plan = resolve(pipelines.load_stage(pipeline, stage, folder), choice)
                run = _finish(plan, choice, stages.begin(plan, folder / stage.name), on_event)
        return run
    flags = {key: ("set", value) for key, value in (set or {}).items()}
    loaded = recipes.build(tree, source=said, folder=beside, flags=flags)
    choice = backends.choose(backend, device)
    plan = resolve(loaded, choice)
    return _finish(plan, choice, stages.start_run(plan, Path(out), name), on_event)


def _finish(plan: Plan, choice: backends.Choice, folder: RunDir, on_event: Callable[[Event], None]) -> Run:
    report = stages.train(plan, choice, folder, on_event)
    found = stages.evaluate_run(plan, choice.backend, folder, _silent) if plan.recipe.evaluate else None
    model, adapter = stages.trained_model(plan, folder)
    return Run(
        folder.path, report, adapter, str(model.folder), choice.backend.name, plan.capabilities.device, plan.dtype,
        plan.recipe.model.quantize, found,
    )  # fmt: skip


@contextlib.contextmanager
def _silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def load(
    source: Run | str | Path | tuple[str | Path, str | Path],
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    quantize: str = "auto",
) -> Model:
    """Load a run, a run's or a pipeline's folder, a model (id or folder), or a (model, adapter) pair.

    Of a pipeline, what its last training stage left.

    Left out, engine, device, dtype and quantization are those a run was trained with, where they are to be had.

    Raises:
        RecipeError: the folder is neither a model nor a finished run or pipeline, or `source` is something else.
        BackendError: no engine.
    """
    if not isinstance(source, Run | str | Path) and not (
        isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, str | Path) for part in source)
    ):
        raise RecipeError(
            f"load: got {source!r}; expected a run, a run's folder, a model's folder or hub id, or a (model, adapter) pair."
        )
    if isinstance(source, str | Path):
        source = pipelines.last_run(Path(source)) or source
    base, adapter = _locate(source)
    trained = _trained(source)
    choice = _choose(backend, device, trained)
    if quantize == "auto":
        quantize = trained.quantize if trained else "none"
    if dtype == "auto" and trained and (choice.backend.name, choice.device) == (trained.backend, trained.device):
        dtype = trained.dtype
    has_own = adapter is not None and (adapter / "tokenizer.json").is_file()
    tokenizer = Tokenizer(adapter if has_own and adapter else base.folder)
    how = Loading(choice.device, dtype, quantize)
    return Model(base, adapter, tokenizer, choice.backend, how, choice.backend.generator(base, adapter, tokenizer, how))


@dataclass(frozen=True, slots=True)
class _Trained:
    """How a run's base was loaded."""

    backend: str
    device: str
    dtype: str
    quantize: str


def _trained(source: Run | str | Path | tuple[str | Path, str | Path]) -> _Trained | None:
    if isinstance(source, Run):
        return _Trained(source.backend, source.device, source.dtype, source.quantize)
    if isinstance(source, tuple) or not RunDir(Path(source)).done:
        return None
    plan = RunDir(Path(source)).read_json("plan.json")
    model = recipes.read(Path(source) / "recipe.yaml").get("model", {})
    return _Trained(plan["backend"], plan["device"], plan["dtype"], model.get("quantize", "none"))


def _choose(backend: str, device: str | None, trained: _Trained | None) -> backends.Choice:
    """Take the engine and device a run was trained on, unless others are asked for or these are not here."""
    if trained is not None and backend == "auto" and device is None:
        with contextlib.suppress(BackendError):
            return backends.choose(trained.backend, trained.device)
    return backends.choose(backend, device)


def _locate(source: Run | str | Path | tuple[str | Path, str | Path]) -> tuple[BaseModel, Path | None]:
    if isinstance(source, Run):
        return find_model(source.model), source.adapter
    if isinstance(source, tuple):
        return find_model(str(source[0])), Path(source[1])
    run = RunDir(Path(source))
    if run.done:
        if run.model.is_dir():
            return open_model(run.model), None
        config = run.read_json("adapter/adapter_config.json")
        here = adapters.recorded_base(adapters.read(run.adapter))
        return here or find_model(str(config["base_model_name_or_path"]), config.get("revision")), run.adapter
    if (run.path / "recipe.yaml").is_file():
        raise RecipeError(f"{source}: this run is not finished. Go on with: smolmlx train --resume {source}")
    return find_model(str(source)), None


def evaluate(
    model: Model,
    data: str,
    suite: str = "loss",
    *,
    train: str | None = None,
    ood: str | None = None,
    limit: int | None = None,
    ids: Sequence[str] = (),
    registry: str | Path | None = None,
    constrained: bool | None = None,
    max_length: int = 2048,
    **decoding: Any,
) -> Evaluation:
    """Score a model (and its base, when it carries an adapter) on rows, as `smolmlx eval` does.

    Args:
        suite: notes, loss or research.
        ids: score these rows alone; row-0007 is the seventh where rows have no `id`.
        registry: task file that the rows were made with (suite research).
        constrained: keep answers to their schemas, as is done where this is left out (suite research).
        decoding: fields of `backend.Decoding`, for suites that answer.

    Raises:
        RecipeError: an unknown suite, or what the suite has no use for, by name.
        DataError: rows without what the suite needs.
    """
    if suite not in recipes.SUITES:
        known = ", ".join(recipes.SUITES)
        raise RecipeError(f"evaluate: no suite '{suite}'.{nearest(suite, recipes.SUITES)} Suites: {known}.")
    given = {"train": train, "ood": ood, "registry": registry, "constrained": constrained, **decoding}
    if idle := list(recipes.find_idle(suite, [key for key, value in given.items() if value is not None])):
        raise RecipeError("evaluate: leave out what the suite has no use for", [f"{key}: {why}." for key, why in idle])
    systems = [System("base", model.base)]
    if model.adapter is not None:
        systems.append(System("adapter", model.base, model.adapter))
    settings = Settings(
        data=data, suite=suite, train=train, ood=ood, limit=limit, ids=tuple(ids), decoding=Decoding(**decoding),
        loading=model.loading, encoding=Encoding(max_length=max_length), folders=(files_root(),),
        registry=Path(registry) if registry else None, constrained=constrained is not False,
    )  # fmt: skip
    return run_suite(model.backend, systems, model.tokenizer, settings, _silent)


def sweep(
    recipe: str | Path,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | int | None = None,
    set: Mapping[str, Any] | None = None,
    backend: str = "auto",
    device: str | None = None,
    out: str | Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> SweepRun:
    """Train a sweep file, or a recipe under a grid, with several seeds; go on with what is there, as `smolmlx sweep` does.

    A run that fails does not stop the others; it is a line with `status` "failed" and its error. Finished runs are not
    run again.

    Args:
        grid: dotted recipe key -> values, e.g. {"lora.r": [8, 32]}; several keys are crossed.
        seeds: how many from 0, or which; default: the file's, else 1.
        out: the sweep's folder; default: runs/sweep-<name>.

    Raises:
        SmolError: one of the four families of `smolmlx.errors`, before anything runs.
        stages.Interrupted: Ctrl-C, after a checkpoint.
    """
    made, folder = shelf.find_sweep(str(recipe), out, grid=grid, seeds=seeds, sets=set)
    choice = backends.choose(backend, device)
    bases = Bases(choice.backend)

    def work(cell: Cell, path: Path) -> None:
        stages.complete_run(cell.loaded, choice, path, lambda plan: on_event, _silent, bases)

    with record.lock(folder):
        record.run_cells(made, folder, work, lambda cell, why: write_table(read_table(made, folder), folder))
        found = read_table(made, folder)
        write_table(found, folder)
    return SweepRun(folder, found)


def convert_adapter(adapter: str | Path, out: str | Path, to: str | None = None, base: str | None = None) -> Path:
    """Write an adapter in the other library's format (`peft` or `mlx`), as `smolmlx adapter convert` does.

    Raises:
        RecipeError: what the target cannot hold exactly, by name.
        DataError: a broken adapter.
    """
    return convert(adapters.find_folder(adapter), Path(out), to, find_model(base) if base else None).folder
