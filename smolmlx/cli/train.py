"""`smolmlx train`: run a recipe from its data to an evaluated adapter."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import DataError, RecipeError, SmolError

if TYPE_CHECKING:
    from smolmlx.backend import Choice
    from smolmlx.evals.run import Evaluation
    from smolmlx.pipelines import Pipeline
    from smolmlx.plan import Plan
    from smolmlx.run_files import Report
    from smolmlx.rundir import RunDir

EPILOG = """\b
Examples:
  smolmlx train                                        the quickstart, on the embedded model
  smolmlx train notes/sft --backend cuda               a shipped recipe on NVIDIA
  smolmlx train my.yaml --set train.learning_rate=1e-4 --out runs
  smolmlx train my.yaml --resume                       go on with its last unfinished run
  smolmlx train notes/pipeline --set dpo.dpo.beta=0.2  several stages, in one folder
"""


@click.command("train", epilog=EPILOG)
@click.argument("recipe", required=False)
@options.engine
@options.overrides
@click.option(
    "--out",
    default="runs",
    show_default=True,
    type=click.Path(file_okay=False),
    help="Folder the run's folder is made in.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    default=None,
    metavar="[auto|PATH]",
    help="Go on with the last unfinished run, or with the one at PATH.",
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after N optimizer steps.")
@options.as_json
def command(
    recipe: str | None,
    backend: str,
    device: str | None,
    sets: tuple[str, ...],
    out: str,
    resume: str | None,
    max_steps: int | None,
    as_json: bool,
) -> None:
    """Train RECIPE, a shipped name or a path (default: quickstart), then evaluate what it asks for."""
    from smolmlx import console, pipelines, shelf, stages
    from smolmlx import recipe as recipes

    if resume not in (None, "auto") and not Path(str(resume)).exists() and recipe is None:
        recipe, resume = resume, "auto"  # `--resume my-recipe`: the word was meant as the recipe
    if resume:
        if resume != "auto" and options.typed("out"):
            raise click.UsageError(f"--out has no effect with --resume {resume}: a run goes on in its own folder.")
        run = _find_run(recipe, Path(out), resume)
        if (run.path / pipelines.FILE).is_file():
            pipeline = pipelines.reopen(run.path)
            if sets or max_steps:
                pipeline = pipelines.change(pipeline, run.path, dict(map(recipes.parse_override, sets)), max_steps)
            first = _first_run(pipeline, run.path)
            with _saying_where_it_began(first):
                _run_pipeline(pipeline, run.path, _engine_of(first, backend, device), as_json)
            return
        choice = _engine_of(run, backend, device)
        with _saying_where_it_began(run):
            plan = _reopen(run, choice, sets, max_steps)
        console.note(f"resuming {run.path} {'at its evaluation' if run.done else f'after step {_position(run)}'}")
    elif pipelines.is_pipeline(recipes.read(path := shelf.find(recipe or "quickstart"))):
        values = dict(map(recipes.parse_override, sets))
        name = stages.run_name(recipe or "quickstart")
        pipeline = pipelines.open_pipeline(path, name, shelf.find, values, max_steps)
        choice = options.choose(backend, device)
        _run_pipeline(pipeline, pipelines.start(pipeline, Path(out)), choice, as_json)
        return
    else:
        loaded = options.load_recipe(recipe or "quickstart", sets, max_steps)
        choice = options.choose(backend, device)
        plan = options.resolve(loaded, choice)
        run = stages.start_run(plan, Path(out), stages.run_name(recipe or "quickstart"))
    with _saying_how_to_go_on(run.path):
        tree = _run_stage(plan, choice, run, show=not as_json)
    if as_json:
        console.print_json(tree)


@contextlib.contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    from smolmlx import console, stages

    try:
        yield
    except (stages.Interrupted, KeyboardInterrupt) as stop:
        console.note(f"{str(stop) or 'interrupted'}\n{_what_is_left(folder, stop)}", style="yellow")
        raise click.exceptions.Exit(130) from stop


def _what_is_left(folder: Path, stop: BaseException) -> str:
    from smolmlx import stages
    from smolmlx.rundir import RunDir

    if _is_complete(RunDir(folder)):
        return f"Nothing is left but the report: smolmlx report {folder}"
    untouched = isinstance(stop, stages.Interrupted) and stop.step == 0 and stop.run.path == folder
    return f"{'Begin again' if untouched else 'Go on'} with: smolmlx train --resume {folder}"


@contextlib.contextmanager
def _saying_where_it_began(run: RunDir) -> Iterator[None]:
    """Name the folder a run was begun in where an error names a path that is there and not here."""
    try:
        yield
    except (DataError, RecipeError) as error:
        began = run.read_json("env.json").get("began_in") if (run.path / "env.json").is_file() else None
        named = re.findall(r"[^\s:,'\"]{1,255}", str(error))
        if not began or not any((Path(began) / name).exists() and not Path(name).exists() for name in named):
            raise
        text = f"{error.head.removesuffix('.')}. The run was begun in {began}; resume from there."
        raise type(error)(text, error.problems) from error


@contextlib.contextmanager
def _keeping_what_is_done(pipeline: Pipeline, folder: Path) -> Iterator[None]:
    """Say on an error how to go on, once a stage is done."""
    from smolmlx import console, pipelines

    try:
        yield
    except SmolError:
        if any(pipelines.is_done(stage, folder) for stage in pipeline.stages):
            change = "--set STAGE.KEY=VALUE changes a stage that has not begun"
            console.note(f"Go on with: smolmlx train --resume {folder}  ({change})", style="yellow")
        raise


def _run_stage(plan: Plan, choice: Choice, run: RunDir, show: bool) -> dict[str, Any]:
    """Train and evaluate what is left of a run; return what `--json` prints."""
    from smolmlx import stages

    if run.done:
        report = stages.read_report(run)
    else:
        _introduce(plan)
        report = _train(plan, choice, run)
    evaluation = _evaluate(plan, choice, run) if plan.recipe.evaluate else None
    _write_report(run)
    if show:
        _show(plan, run, report, evaluation, _next(plan, run, choice))
    return {
        "run": str(run.path),
        **report.model_dump(),
        "evaluation": evaluation.to_json() if evaluation else None,
    }


def _run_pipeline(pipeline: Pipeline, folder: Path, choice: Choice, as_json: bool) -> None:
    """Run the stages that are left, one after the other."""
    from smolmlx import console, pipelines, stages
    from smolmlx.cli.documents import say_jobs, show_reasons

    trees: dict[str, Any] = {}
    with _saying_how_to_go_on(folder), _keeping_what_is_done(pipeline, folder):
        for number, stage in enumerate(pipeline.stages, 1):
            title = f"stage {number}/{len(pipeline.stages)}, {stage.name}"
            if pipelines.is_done(stage, folder):
                console.note(f"{title}: done before", style="bold")
            elif stage.making is not None:
                made = pipelines.make(pipeline, stage, folder, choice, console.Counter)
                what = "pairs" if "pairs" in made else "rows"
                counts = ", ".join(f"{file[what]:,} for {split}" for split, file in made["files"].items())
                console.note(f"{title}: {counts} in {folder / stage.name}", style="bold")
                if "jobs" in made:
                    show_reasons(made, most=3)
                    console.note(say_jobs(made), style="")
                trees[stage.name] = made
            else:
                console.note(title, style="bold")
                plan = options.resolve(pipelines.load_stage(pipeline, stage, folder), choice)
                run = stages.begin(plan, folder / stage.name)
                trees[stage.name] = _run_stage(plan, choice, run, show=not as_json)
            if stage.making is not None:
                pipelines.refuse_empty(pipeline, stage, folder)
    if as_json:
        console.print_json({"folder": str(folder), "stages": trees})
    else:
        several = "one report of all its training stages" if len(pipeline.training) > 1 else "its report"
        console.result(f"Pipeline: {folder}  ({several}: smolmlx report {folder})")


def _first_run(pipeline: Pipeline, folder: Path) -> RunDir:
    from smolmlx.rundir import RunDir

    return RunDir(folder / pipeline.training[0].name)


def _find_run(recipe: str | None, out: Path, resume: str) -> RunDir:
    """Return the unfinished run that is meant."""
    from smolmlx.rundir import RunDir
    from smolmlx.stages import run_name

    if resume == "auto":
        return _latest(out, recipe)
    run = RunDir(Path(resume))
    if not _is_run(run):
        raise RecipeError(f"{run.path}: not a run folder (no recipe.yaml). Pass the folder that `smolmlx train` named.")
    if recipe and not run.path.resolve().name.startswith(f"{run_name(recipe)}-"):
        raise click.UsageError(f"{run.path} is not a run of '{recipe}'. Leave the recipe out: a run has its own.")
    if _is_complete(run):
        raise RecipeError(f"{run.path}: this run is finished. Leave --resume out to start a new one.")
    return run


def _engine_of(run: RunDir, backend: str, device: str | None) -> Choice:
    """Pick the engine and device a run was begun on, unless others are asked for or these are not here."""
    from smolmlx import console
    from smolmlx.errors import BackendError

    begun = run.read_json("env.json") if (run.path / "env.json").is_file() else {}
    if backend == "auto" and device is None and "device_kind" in begun:
        try:
            with console.status("loading the engine"):
                choice = _as_begun(begun["backend"], begun["device_kind"])
        except BackendError as error:
            console.note(f"begun on {begun['backend']}, {begun['device']}, which is not here: {error}", style="yellow")
        else:
            options.say_engine(choice)
            return choice
    return options.choose(backend, device)


def _as_begun(name: str, kind: str) -> Choice:
    """Pick an engine and device: the default choice where it comes to the same, so that no flag is needed later."""
    from smolmlx import backend as backends
    from smolmlx.errors import BackendError

    found = None
    with contextlib.suppress(BackendError):
        found = backends.choose()
    if found is None or found.backend.name != name or found.backend.capabilities(found.device).device != kind:
        found = backends.choose(name, kind)
    return replace(found, reason="as the run began")


def _reopen(run: RunDir, choice: Choice, sets: tuple[str, ...], max_steps: int | None) -> Plan:
    """Resolve a run's recorded recipe again."""
    from smolmlx import recipe as recipes

    flags = {"train.max_steps": ("--max-steps", max_steps)} if max_steps else {}
    tree = recipes.read(run.path / "recipe.yaml")
    folder = Path(run.read_json("env.json").get("folder", "."))
    loaded = recipes.build(tree, source=str(run.path / "recipe.yaml"), folder=folder, overrides=sets, flags=flags)
    return options.resolve(loaded, choice)


def _latest(out: Path, recipe: str | None) -> RunDir:
    """Return the newest unfinished run, of one recipe where it is named."""
    from smolmlx.rundir import RunDir
    from smolmlx.stages import run_name

    name = re.escape(run_name(recipe)) if recipe else ".+"
    stamped = re.compile(rf"{name}-(\d{{8}}-\d{{6}})-[0-9a-f]{{4}}")
    found = [(match[1], path) for path in out.glob("*") if (match := stamped.fullmatch(path.name))]
    runs = [run for run in (RunDir(path) for _, path in sorted(found)) if _is_run(run)]
    unfinished = [run for run in runs if not _is_complete(run)]
    if not unfinished:
        of = f" of '{recipe}'" if recipe else ""
        raise RecipeError(f"{out}: no unfinished run{of} to resume. Leave --resume out to start a new one.")
    return unfinished[-1]


def _is_run(run: RunDir) -> bool:
    from smolmlx import pipelines

    return (run.path / "recipe.yaml").is_file() or (run.path / pipelines.FILE).is_file()


def _is_complete(run: RunDir) -> bool:
    from smolmlx import pipelines, stages

    if (run.path / pipelines.FILE).is_file():
        return all(pipelines.is_done(stage, run.path) for stage in pipelines.reopen(run.path).stages)
    return stages.is_complete(run)


def _position(run: RunDir) -> int:
    last = run.last_checkpoint()
    return int(last.name) if last else 0


def _introduce(plan: Plan) -> None:
    from smolmlx import console

    share = plan.num_trainable / max(1, plan.num_parameters)
    capabilities = plan.capabilities
    console.note(f"{capabilities.device_name}, {plan.dtype}: {capabilities.dtype_reason}", style="")
    console.note(
        f"{plan.model.name}: {plan.num_trainable:,} of {plan.num_parameters:,} parameters train ({100 * share:.2f} %)",
        style="",
    )
    store = plan.train.store
    console.note(
        f"{plan.num_rows:,} {'pairs' if plan.pairs else 'rows'} ({plan.format_name}), {int(store.supervised.sum()):,} of {int(store.lengths.sum()):,} tokens supervised; "
        f"{plan.steps} steps of {plan.train.batch_size} x {plan.train.accumulation} {'pairs' if plan.pairs else 'rows'}",
        style="",
    )
    if plan.start:
        console.note(f"starts from the adapter in {plan.start.described}", style="")
    for reason, count in store.account.reasons.items():
        console.note(f"{count} of {store.account.rows} rows: {reason}", style="yellow")
    for text in plan.notes:
        console.note(text, style="yellow")


def _train(plan: Plan, choice: Choice, run: RunDir) -> Report:
    from smolmlx import console, stages

    with console.TrainingDisplay(plan.recipe.stage, plan.steps) as display:
        return stages.train(plan, choice, run, lambda event: display(event.kind, event.step, event.values))


def _evaluate(plan: Plan, choice: Choice, run: RunDir) -> Evaluation:
    from smolmlx import console, stages

    return stages.evaluate_run(plan, choice.backend, run, console.Counter)


def _write_report(run: RunDir) -> None:
    """Leave report.html and the model card behind, where the charting library is installed."""
    from smolmlx import console
    from smolmlx.reports import card
    from smolmlx.reports.folders import read_run

    if not card.can_draw():
        console.note("no report.html: it needs pip install 'smolmlx[report]', then: smolmlx report " + str(run.path))
        return
    with console.status("drawing the report"):
        card.write_run_report(read_run(run.path))


def _show(plan: Plan, run: RunDir, report: Report, evaluation: Evaluation | None, following: str) -> None:
    from smolmlx import console, run_files

    rows = [
        (
            "training loss",
            f"{report.first_loss:.4f} (first step) -> {report.final_loss:.4f} ({run_files.FINAL_LOSS}),"
            f" {'per pair' if plan.pairs else 'nats per supervised token'}",
        ),
        (
            "time",
            f"{console.format_seconds(report.seconds)} for {report.steps} steps, {report.tokens_per_second:,.0f} tokens/s"
            f" (about {plan.flops_per_token * report.tokens_per_second / 1e9:,.0f} GFLOP/s)",
        ),
    ]
    if report.best_val_loss is not None:
        rows.insert(1, ("validation", _validation(report, plan.recipe.eval.keep_best)))
    if report.peak_bytes:
        rows.append(("peak memory", console.format_bytes(report.peak_bytes)))
    console.table(rows)
    if evaluation:
        from smolmlx.cli.eval import show

        show(evaluation)
    _show_samples(run, plan.recipe.samples.prompts)
    left = "model" if plan.full else "adapter"
    there = [f"{left}/", *(["samples.md"] if (run.path / "samples.md").is_file() else []), "metrics.csv", "report.json"]
    console.result(f"\nRun: {run.path}  ({', '.join([*there, *(['eval/'] if evaluation else [])])})")
    console.result(f'Next: {following} --prompt "..."')


def _validation(report: Report, keep_best: bool) -> str:
    """Return the best validation loss, and that of the weights that are kept where these are others."""
    text = f"{report.best_val_loss:.4f} at step {report.best_step}"
    if report.last_val_loss is not None and not keep_best and report.best_step != report.steps:
        text = f"best {text}; kept: the last, {report.last_val_loss:.4f} at step {report.steps}"
    return text + (" (stopped early)" if report.stopped_early else "")


def _next(plan: Plan, run: RunDir, choice: Choice) -> str:
    """Return the command that answers with what was trained, on the same base, engine and device."""
    words = ["smolmlx generate --model", str(run.model if plan.full else plan.model.name)]
    if not plan.full:
        words += ["--adapter", str(run.adapter)]
    if plan.recipe.model.quantize != "none":
        words += ["--quantize", plan.recipe.model.quantize]
    if choice.asked:
        words += ["--backend", choice.backend.name]
        words += ["--device", choice.device] if choice.device is not None else []
    return " ".join(words)


def _show_samples(run: RunDir, prompts: list[str]) -> None:
    """Print the first two prompts with their answers before and after."""
    from smolmlx import console, run_files

    if not prompts:
        return
    samples = run_files.read(run, "samples.json")
    for prompt, before, after in list(zip(prompts, samples["before"], samples["after"], strict=True))[:2]:
        console.result(f"\nPROMPT\n{_indent(prompt)}\nBEFORE\n{_indent(before)}\nAFTER\n{_indent(after)}")


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines()) or "  (nothing)"
