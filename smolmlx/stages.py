"""The verbs: train, evaluate, generate. Each is a short function over plan, session and engine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from smolmlx import run_files, rundir
from smolmlx.backend import Backend, Choice, Decoding, Generator, Loading
from smolmlx.data.chat import Tokenizer
from smolmlx.evals.bases import Bases, System
from smolmlx.evals.run import Evaluation, Meter, Settings, answer, evaluate, write
from smolmlx.held_out import eval_format, locate
from smolmlx.loggers import numbers, open_loggers
from smolmlx.models import BaseModel, make_model, open_model, write_base
from smolmlx.plan import Plan, adapter_config, encoding, initial_adapter, resolve
from smolmlx.recipe import Loaded
from smolmlx.recipe import read as read_recipe
from smolmlx.run_files import Report
from smolmlx.rundir import RunDir, publish, write_text
from smolmlx.session import Arrays, Event, Session, load_arrays, read_metrics, save_arrays, write_csv
from smolmlx.tasks.registry import read_registry

OnEvent = Callable[[Event], None]


class Interrupted(Exception):
    """The user pressed Ctrl-C (or the system asked to stop); a checkpoint was written if a step was taken."""

    def __init__(self, run: RunDir, step: int) -> None:
        text = f"interrupted before the first step of {run.path}; nothing was trained there"
        if run.done:
            text = f"interrupted after step {step}, the last; {run.path} is trained"
        elif step:
            text = f"interrupted after step {step}; a checkpoint is in {run.path}"
        super().__init__(text)
        self.run, self.step = run, step


def run_name(recipe: str) -> str:
    """Return the name that runs of a recipe (a shipped name or a path) begin with."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def start_run(plan: Plan, out: Path, name: str) -> RunDir:
    """Make the run's folder and write what every engine starts from: recipe, plan, environment, first weights."""
    _check_tasks(plan)
    run = rundir.create(name, out)
    _write_start(plan, run)
    return run


def _write_start(plan: Plan, run: RunDir) -> None:
    recipe = plan.recipe
    write_text(
        run.path / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    )
    run.write_json("plan.json", plan.to_json())
    run.write_json("env.json", environment(plan))
    with rundir.writing(run.path):
        if recipe.model.config is not None:
            make_model(plan.model.config, run.start, recipe.train.seed, recipe.model.first_weights)
        elif not plan.full:
            run.start.mkdir()
            save_arrays(first_adapter(plan), run.start / plan.weights_name)


def begin(plan: Plan, path: Path) -> RunDir:
    """Make the run's folder at `path`, unless it is there.

    It appears with its plan and first weights, or not at all, so a kill leaves nothing half-made in its place.
    """
    if not (path / "plan.json").is_file():
        _check_tasks(plan)
        with publish(path) as folder:
            _write_start(plan, RunDir(folder))
    return RunDir(path)


def _tasks_file(plan: Plan) -> Path | None:
    wanted = plan.recipe.evaluate
    return Path(locate(wanted.tasks_file, plan.loaded)) if wanted and wanted.tasks_file else None


def _check_tasks(plan: Plan) -> None:
    """Read the task registry of the evaluation, so that its faults are known before the training."""
    if (file := _tasks_file(plan)) is not None:
        read_registry(file)


def first_adapter(plan: Plan) -> Arrays:
    """Return the adapter a run starts from, under PEFT's names: the one the recipe names, or a new one."""
    if plan.start is None:
        return dict(initial_adapter(plan))
    stored = load_arrays(plan.start.weights)
    return {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): a for name, a in stored.items()}


def complete_run(
    loaded: Loaded,
    choice: Choice,
    path: Path,
    on_plan: Callable[[Plan], OnEvent],
    meter: Meter,
    bases: Bases | None = None,
) -> Evaluation | None:
    """Bring the run at `path` to its end from wherever it stands: not begun, stopped while training, or not yet scored.

    Args:
        on_plan: told the plan once it is resolved; returns what is told of each event of the training.
        bases: what earlier runs left loaded and answered, for the evaluation.
    """
    plan = resolve(loaded, choice)
    run = begin(plan, path)
    if not run.done:
        if bases is not None and not _fits_beside_training(plan):
            bases.release()
        train(plan, choice, run, on_plan(plan))
    return evaluate_run(plan, choice.backend, run, meter, bases) if plan.recipe.evaluate else None


def _fits_beside_training(plan: Plan) -> bool:
    """Whether a base that is loaded for evaluation may stay in memory while another one is trained."""
    limit = plan.capabilities.memory_bytes
    return limit is not None and plan.memory_bytes + 4 * plan.model.num_parameters() < limit / 2


def environment(plan: Plan) -> dict[str, Any]:
    """Return what this run ran on."""
    names = ("smolmlx", "mlx", "mlx-lm", "torch", "transformers", "trl", "peft", "unsloth", "numpy", "tokenizers")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": plan.backend,
        "device": plan.capabilities.device_name,
        "device_kind": plan.capabilities.device,
        "dtype": plan.dtype,
        "versions": versions,
        "command": ["smolmlx", *sys.argv[1:]],
        "origins": dict(plan.loaded.origins),
        "source": plan.loaded.source,
        "folder": str(plan.loaded.folder),
        "began_in": str(Path.cwd()),
    }


def train(plan: Plan, choice: Choice, run: RunDir, on_event: OnEvent = lambda event: None) -> Report:
    """Train one stage in `run`, or go on with it from its last checkpoint.

    Leaves adapter/ (or model/), metrics.csv, samples.md and report.json behind.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint if a step was taken.
        RunError: the run failed; checkpoints stay.
    """
    with ExitStack() as closing:  # a service counts a run as going on until it is told; TensorBoard holds points back
        logs = open_loggers(plan.recipe.loggers, run, plan.to_json())
        for _, close in logs:
            closing.callback(close)

        def tell(event: Event) -> None:
            on_event(event)
            if event.kind in ("step", "eval"):
                for log, _ in logs:
                    log(event.step, numbers(event.values))

        session = Session(plan, run, tell)
        _fit(plan, choice, run, session)
    if plan.recipe.samples.prompts:
        write_samples(plan, choice.backend, run)
    report = summarise(plan, session)
    run.write_json("report.json", report.model_dump())
    if session.interrupted:  # in the last step: the training is whole, and nothing else is wanted now
        raise Interrupted(run, session.state.step)
    return report


def _fit(plan: Plan, choice: Choice, run: RunDir, session: Session) -> None:
    """Answer the sample prompts, train, and leave weights and metrics.csv behind."""
    before = (
        answer_samples(plan, choice.backend, plan.start.folder if plan.start else None, run)
        if plan.recipe.samples.prompts and not (run.path / "samples.json").exists()
        else None
    )
    if before is not None:
        run.write_json("samples.json", {"before": before})
    with _signals(session):
        choice.backend.trainer().fit(plan, session)
    if session.interrupted and session.state.step < plan.steps and not session.state.stopped:
        raise Interrupted(run, session.state.step)
    save_result(plan, session)
    write_csv(run)


def is_complete(run: RunDir) -> bool:
    """Whether a run is trained and, where its recipe asks for that, scored."""
    scored = (run.path / "eval" / "results.json").is_file()
    return run.done and (scored or not read_recipe(run.path / "recipe.yaml").get("evaluate"))


def read_report(run: RunDir) -> Report:
    """Return the report of a run whose training is finished."""
    return Report.model_validate(run_files.read(run, "report.json"))


@contextmanager
def _signals(session: Session) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end training after the step at hand; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True
        session.note("stopping; a step under way is finished and kept in a checkpoint (again to stop at once)")

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def save_result(plan: Plan, session: Session) -> None:
    """Leave the trained weights behind in a layout that stock PEFT or transformers loads."""
    run = session.run
    target = run.model if plan.full else run.adapter
    with publish(target) as folder:
        dtype = plan.recipe.save.dtype if plan.full else "float32"
        weights = {key: value.astype(dtype) for key, value in session.final_weights().items()}
        save_arrays(weights, folder / plan.weights_name)
        name = "config.json" if plan.full else "adapter_config.json"
        tree = dict(plan.model.config) if plan.full else adapter_config(plan)
        if plan.full:
            tree |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 reads the first, others the second
        write_text(folder / name, json.dumps(tree, indent=2) + "\n")
        copy_tokenizer(plan.tokenizer, folder)
        if not plan.full:
            write_base(plan.model, folder)
        if plan.full:
            eos = list(plan.tokenizer.eos_ids)
            write_text(
                folder / "generation_config.json",
                json.dumps({"eos_token_id": eos, "pad_token_id": plan.tokenizer.pad_id}) + "\n",
            )


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy tokenizer files, with the template that was trained on."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "tokenizer.model",
    ):
        source = tokenizer.folder / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())
    if tokenizer.template_text:
        config = {**tokenizer.config, "chat_template": tokenizer.template_text}
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def summarise(plan: Plan, session: Session) -> Report:
    metrics, state = read_metrics(session.run), session.state
    rows = [row for row in metrics if row["kind"] == "step"]
    scored = [row["val_loss"] for row in metrics if row["kind"] == "eval"]
    tail = rows[-max(1, len(rows) // 20) :]
    weights = [row["num_supervised"] for row in rows]
    counts = [b - a for a, b in zip([0, *weights[:-1]], weights, strict=True)][-len(tail) :]
    final = sum(row["loss"] * count for row, count in zip(tail, counts, strict=True)) / max(1, sum(counts))
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes")]
    return Report(
        steps=state.step,
        num_tokens=state.num_tokens,
        num_supervised=state.num_supervised,
        seconds=state.seconds,
        first_loss=rows[0]["loss"],
        final_loss=final,
        best_val_loss=state.best_loss,
        best_step=state.best_step,
        last_val_loss=scored[-1] if scored else None,
        stopped_early=state.stopped,
        peak_bytes=max(peaks) if peaks else None,
        tokens_per_second=state.num_tokens / max(state.seconds, 1e-9),
    )


def trained_model(plan: Plan, run: RunDir) -> tuple[BaseModel, Path | None]:
    """Return the base and adapter a finished run left behind."""
    return (open_model(run.model), None) if plan.full else (plan.model, run.adapter)


def evaluate_run(plan: Plan, backend: Backend, run: RunDir, meter: Meter, bases: Bases | None = None) -> Evaluation:
    """Score base and trained model as the recipe's `evaluate` block says, into eval/ of the run."""
    wanted = plan.recipe.evaluate
    assert wanted is not None
    base = open_model(run.start) if plan.recipe.model.config is not None else plan.model
    model, adapter = trained_model(plan, run)
    systems = [System("base", base), System(plan.recipe.stage, model, adapter)]
    if plan.start is not None:  # what this stage was given, so that what it lost or gained is seen
        systems.insert(1, System("sft" if plan.recipe.stage == "dpo" else "start", plan.model, plan.start.folder))
    settings = Settings(
        data=locate(wanted.data, plan.loaded), suite=wanted.suite,
        train=locate(wanted.train, plan.loaded) if wanted.train else None,
        ood=locate(wanted.ood, plan.loaded) if wanted.ood else None,
        decoding=Decoding(
            max_tokens=wanted.max_tokens, batch_size=wanted.batch_size, repetition_penalty=wanted.repetition_penalty, no_repeat_ngram=wanted.no_repeat_ngram
        ), limit=wanted.limit,
        template_args=plan.recipe.data.template_args, system_message=plan.recipe.data.system, columns=plan.recipe.data.columns, form=eval_format(plan.recipe),
        loading=Loading(plan.capabilities.device, plan.dtype, plan.recipe.model.quantize if not plan.full else "none"),
        encoding=encoding(plan.recipe), constrained=wanted.constrained,
        registry=_tasks_file(plan),
    )  # fmt: skip
    found = evaluate(backend, systems, plan.tokenizer, settings, meter, bases)
    write(found, run.path / "eval")
    return found


def open_generator(plan: Plan, backend: Backend, adapter: Path | None, run: RunDir) -> Generator:
    """Load the base (before), or the trained adapter or model (after), the way it was trained."""
    model = plan.model
    if plan.recipe.model.config is not None:
        model = open_model(run.start)
    if adapter == run.model:
        model, adapter = open_model(run.model), None
    how = Loading(plan.capabilities.device, plan.dtype, plan.recipe.model.quantize if not plan.full else "none")
    return backend.generator(model, adapter, plan.tokenizer, how)


def answer_samples(plan: Plan, backend: Backend, adapter: Path | None, run: RunDir) -> list[str]:
    recipe = plan.recipe
    generator = open_generator(plan, backend, adapter, run)
    if plan.tokenizer.template_text is None:
        tokens = [plan.tokenizer.encode(prompt) for prompt in recipe.samples.prompts]
        found = {c.index: c.text for c in generator.generate(tokens, Decoding(max_tokens=recipe.samples.max_tokens))}
        return [found[i] for i in range(len(tokens))]
    system = ({"role": "system", "content": recipe.data.system},) if recipe.data.system else ()
    prompts = [(*system, {"role": "user", "content": prompt}) for prompt in recipe.samples.prompts]
    settings = Settings(
        "", decoding=Decoding(max_tokens=recipe.samples.max_tokens), template_args=recipe.data.template_args
    )
    return answer(generator, plan.tokenizer, prompts, settings)


def write_samples(plan: Plan, backend: Backend, run: RunDir) -> None:
    """Answer the recipe's prompts again and put both answers side by side into samples.md."""
    before = run.read_json("samples.json")["before"]
    after = answer_samples(plan, backend, run.model if plan.full else run.adapter, run)
    run.write_json("samples.json", {"prompts": plan.recipe.samples.prompts, "before": before, "after": after})
    parts = ["# Before and after\n\nGreedy decoding, the same template and limits on both sides.\n"]
    for number, (prompt, old, new) in enumerate(zip(plan.recipe.samples.prompts, before, after, strict=True), 1):
        parts.append(f"## {number}\n\n{_quote(prompt)}\n\n**Before**\n\n{_quote(old)}\n\n**After**\n\n{_quote(new)}\n")
    write_text(run.path / "samples.md", "\n".join(parts))


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines()) or "> (nothing)"
