"""`smolmlx data chunk` and `smolmlx data augment`: from documents to chunks, and from chunks to instruction rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smolmlx.cli import options
from smolmlx.errors import RecipeError
from smolmlx.tasks import MADE

if TYPE_CHECKING:
    from smolmlx.data.splits import Method
    from smolmlx.synth.augment import Result, Totals
    from smolmlx.synth.jobs import Outline, Workshop
    from smolmlx.synth.runtimes import Runtime

CHUNK_EPILOG = """\b
Examples:
  smolmlx data chunk papers/ chunks
  smolmlx data chunk paper.pdf chunks --words 300 --overlap 50 --shares 1,0
  smolmlx data chunk notes.md appendix.tex pages.jsonl chunks --shares .9,.1 --seed 7
"""
AUGMENT_EPILOG = """\b
Examples:
  smolmlx data augment chunks rows --model tiny
  mlx_lm.server --model M --port 8080 &  smolmlx data augment chunks rows --server http://127.0.0.1:8080/v1 --model M
  smolmlx data augment chunks rows --server https://api.example.com/v1 --model NAME --concurrency 64 --task qa --task retrieval
  smolmlx data augment chunks notes --model M --task notes --layout alpaca
  smolmlx data augment --print-tasks > tasks.yaml
"""

_MANY_TOO_LONG = 0.1
"""Share of jobs with a prompt too long for the model above which shorter chunks are advised."""


@click.command("chunk", epilog=CHUNK_EPILOG)
@click.argument("names", nargs=-1, required=True, metavar="DOCUMENT...")
@click.argument("out_dir", metavar="OUT_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--words", default=500, show_default=True, type=click.IntRange(min=1), help="Words of a chunk.")
@click.option("--overlap", default=100, show_default=True, type=click.IntRange(min=0), help="Words shared with the one before.")  # fmt: skip
@click.option("--shares", default=".8,.1,.1", show_default=True, metavar="A,B[,C]", help="Train, validation and test.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Which documents go where.")
@options.as_json
def chunk(
    names: tuple[str, ...], out_dir: Path, words: int, overlap: int, shares: str, seed: int, as_json: bool
) -> None:
    """Cut documents into overlapping chunks, split by document.

    A DOCUMENT is a txt, md, html, tex or pdf file, a jsonl file with one document per row (field `text`), or a folder
    of those. Each goes to one split whole, so that nothing made from it can leak into another. Writes one JSONL file
    per split, and manifest.json with every document, its split and hash, and what was left out and why.
    """
    from smolmlx import console
    from smolmlx.synth.chunks import Cut, write_chunks

    with console.status("reading documents") as say:
        made = write_chunks(
            names, out_dir, Cut(words, overlap), _method(shares, seed), lambda n: say(f"reading: {n:,} documents")
        )
    if as_json:
        console.print_json({"folder": str(out_dir), **made})
        return
    rows = [(name, f"{f['documents']:,}", f"{f['rows']:,}", f["sha256"][:12]) for name, f in made["files"].items()]
    console.table(rows, ("split", "documents", "chunks", "sha256"), title=str(out_dir))
    for reason, entries in made["left_out"].items():
        first = entries[0]
        detail = f" ({first['detail']})" if first["detail"] else ""
        console.note(f"left out, {reason}: {len(entries):,}, first {first['document']}{detail}", style="yellow")
    console.result(f"Next: smolmlx data augment {out_dir} rows --model MODEL")


def _method(shares: str, seed: int) -> Method:
    from smolmlx.data.splits import Method

    try:
        return Method(shares=tuple(float(part) for part in shares.split(",")), group="document", seed=seed)
    except ValueError as error:
        raise RecipeError(f"--shares {shares}: expected numbers with commas between them, e.g. .8,.1,.1.") from error


@click.command("augment", epilog=AUGMENT_EPILOG)
@click.argument("source", metavar="CHUNKS", required=False, type=click.Path(path_type=Path))
@click.argument("out_dir", metavar="OUT_DIR", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", metavar="M", help="Hub id, folder or `tiny`; with --server, the name it goes by there.")
@click.option("--adapter", metavar="A", type=click.Path(), help="Adapter folder (PEFT layout).")
@click.option("--server", metavar="URL", help="OpenAI-compatible server, e.g. http://127.0.0.1:8080/v1.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="T",
    help=f"One of {', '.join(MADE)}, and notes; may be repeated.  [default: all but notes]",
)
@click.option(
    "--tasks-file",
    metavar="YAML",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Task registry in place of the built-in one.",
)
@click.option(
    "--print-tasks",
    is_flag=True,
    help="Print the task registry, to be copied and changed.",
)
@click.option(
    "--layout", default="messages", show_default=True, type=click.Choice(["messages", "prompt-completion", "alpaca"])
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--attempts", default=2, show_default=True, type=click.IntRange(min=1), help="Tries until an answer is acceptable."
)
@click.option(
    "--concurrency", default=16, show_default=True, type=click.IntRange(1, 1024), help="Requests at a time (server)."
)
@click.option(
    "--timeout",
    default=120.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds for one request (server).",
)
@click.option(
    "--retries", default=5, show_default=True, type=click.IntRange(min=0), help="Of a request that fails (server)."
)
@click.option("--per-minute", type=click.IntRange(min=1), help="Most requests begun in a minute (server).")
@click.option(
    "--response-format",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "json_schema", "json_object", "none"]),
    help="How the server is asked to keep to the schema.",
)
@click.option("--batch", is_flag=True, help="Through the server's batch endpoint: cheaper, answered within a day.")
@click.option(
    "--batch-requests", default=5_000, show_default=True, type=click.IntRange(1, 50_000), help="Of one batch (--batch)."
)
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    show_default=True,
    metavar="NAME",
    help="Environment variable with the server's key.",
)
@click.option(
    "--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Rows at a time (engine)."
)
@click.option("--dry-run", is_flag=True, help="Count jobs and show one request; ask nobody.")
@options.quantize
@options.engine
@options.as_json
def augment(source: Path | None, out_dir: Path | None, print_tasks: bool, as_json: bool, **given: Any) -> None:
    """Make instruction rows from chunks with a model.

    CHUNKS is a folder written by `data chunk`, or a jsonl file with a `text` per row. Each task of the registry runs on
    each chunk with its probability; answers are checked, and every row says from where, by which model and with which
    prompt it was made. OUT_DIR gets train.jsonl, validation.jsonl, test.jsonl, manifest.json and a card.

    Every finished job is in OUT_DIR/journal.jsonl at once. After an interruption the same command goes on from there;
    jobs that failed (time-outs, errors of a server) are asked again.
    """
    from smolmlx import console
    from smolmlx.tasks.registry import BUILT_IN, read_registry

    if print_tasks:
        path = given["tasks_file"] or BUILT_IN
        read_registry(path)  # refuses one that is not whole
        console.result(path.read_text(encoding="utf-8-sig").rstrip("\n"))
        return
    if source is None or out_dir is None:
        raise click.UsageError(
            "Missing argument 'CHUNKS' or 'OUT_DIR'. Try: smolmlx data augment chunks rows --model MODEL"
        )
    _refuse_idle(options.typed(*given), given)
    _Augmenting(source, out_dir, as_json, **given).run()


_SERVER = ("concurrency", "timeout", "retries", "per_minute", "response_format", "batch", "batch_requests")
_ENGINE = ("adapter", "batch_size", "quantize", "backend", "device")
_IDLE: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], bool], str], ...] = (
    (
        (*_SERVER, "key_variable"),
        lambda given: not given["server"],
        "needs --server URL; an engine here has no use for it",
    ),
    (_ENGINE, lambda given: bool(given["server"]), "has no effect with --server; start the server with it"),
    (("batch_requests",), lambda given: given["server"] and not given["batch"], "has no effect without --batch"),
    (("concurrency", "per_minute"), lambda given: given["batch"], "has no effect with --batch"),
)
"""Options, when they would do nothing, and why."""


def _refuse_idle(passed: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises RecipeError for options on the command line that would do nothing, all of them."""
    problems = [
        f"--{name.replace('_', '-')} {given[name]}".removesuffix(" True") + f": {why}."
        for names, idle, why in _IDLE
        for name in passed
        if name in names and idle(given)
    ]
    if problems:
        raise RecipeError("data augment", problems)


@dataclass(frozen=True, slots=True)
class _Augmenting:
    """One call of `augment`: its options, and the steps from them to rows."""

    source: Path
    out_dir: Path
    as_json: bool
    model: str | None
    adapter: str | None
    server: str | None
    tasks: tuple[str, ...]
    tasks_file: Path | None
    layout: str
    seed: int
    attempts: int
    concurrency: int
    timeout: float
    retries: int
    per_minute: int | None
    response_format: Any
    batch: bool
    batch_requests: int
    key_variable: str
    batch_size: int
    dry_run: bool
    quantize: str
    backend: str
    device: str | None

    def run(self) -> None:
        from smolmlx import console
        from smolmlx.synth.augment import outline
        from smolmlx.synth.jobs import Order, Workshop
        from smolmlx.synth.store import ChunkStore
        from smolmlx.tasks.registry import order_tasks, read_registry

        self._check()
        registry = read_registry(self.tasks_file)
        tasks = order_tasks(self.tasks, registry)
        with console.status("reading chunks"):
            store = ChunkStore(self.source)
        with store:
            if self.dry_run:
                self._check_engine()
                order = Order(tasks, self.seed, self.layout, self.model or "", "")
                workshop = Workshop(store, registry, order)
                self._show_plan(workshop, outline(workshop))
                return
            runtime = self._runtime()
            order = Order(tasks, self.seed, self.layout, runtime.model, runtime.name, self.quantize)
            self._show(self._make(Workshop(store, registry, order), runtime))

    def _check(self) -> None:
        if not self.model and not self.server and not self.dry_run:
            raise RecipeError("data augment: pass --model M for an engine here, or --server URL, or --dry-run.")
        if self.adapter and not Path(self.adapter).is_dir():
            raise RecipeError(f"--adapter {self.adapter}: no such folder.")

    def _check_engine(self) -> None:
        """Refuse what a run would refuse of a model and engine here, short of loading them or asking the hub."""
        from smolmlx import backend
        from smolmlx.models import find_model

        if self.server:
            return
        if self.model and (Path(self.model).is_dir() or self.model.count("/") != 1):
            find_model(self.model)
        if self.backend != "auto":
            backend.choose(self.backend, self.device)

    def _runtime(self) -> Runtime:
        if self.server:
            return self._server_runtime(self.server)
        from smolmlx import console
        from smolmlx.synth.runtimes import open_local

        choice = options.choose(self.backend, self.device)
        with console.status("loading the model"):
            return open_local(str(self.model), self.adapter, choice, quantize=self.quantize, batch_size=self.batch_size)

    def _server_runtime(self, url: str) -> Runtime:
        from smolmlx import console
        from smolmlx.synth.server import Limits, ServerRuntime

        key = os.environ.get(self.key_variable)
        limits = Limits(self.concurrency, self.timeout, self.retries, self.per_minute, self.response_format)
        runtime = ServerRuntime(url, self.model, key=key, limits=limits, on_note=console.note)
        model = runtime.find_model()
        if self.batch:
            from smolmlx.synth.batch import BatchRuntime

            form = "json_schema" if self.response_format == "auto" else self.response_format
            how: dict[str, Any] = {"form": form, "together": self.batch_requests, "retries": self.retries}
            console.note(f"server {url}: model {model}, {self.batch_requests:,} requests to a batch")
            return BatchRuntime(url, model, self.out_dir, key=key, on_note=console.note, **how)
        console.note(f"server {url}: model {model}, at most {self.concurrency} requests at a time")
        return runtime

    def _make(self, workshop: Workshop, runtime: Runtime) -> Result:
        from smolmlx import console
        from smolmlx.synth.augment import augment as make_rows
        from smolmlx.synth.augment import outline

        try:
            with console.Counter("augmenting", outline(workshop).total) as bar:
                began = time.monotonic()

                def show(totals: Totals) -> None:
                    bar(totals.done, _figures(totals, time.monotonic() - began))

                return make_rows(workshop, runtime, self.out_dir, attempts=self.attempts, on_progress=show)
        except KeyboardInterrupt:
            console.note(f"{self.out_dir}: every finished job is kept; the same command goes on.")
            raise

    def _show_plan(self, workshop: Workshop, planned: Outline) -> None:
        from smolmlx import console

        job = next((job for job in workshop.jobs() if job.task != "continuation"), None)
        request = workshop.request(job, 0) if job else None
        if self.as_json:
            example = {"prompt": request.prompt, "schema": request.schema.model_json_schema()} if request else None
            tree = {"chunks": len(workshop.store), "jobs": dict(planned.jobs), "left_out": dict(planned.left_out)}
            console.print_json({**tree, "prompt_version": workshop.registry.prompt_version, "example": example})
            return
        specs = workshop.registry.tasks
        rows = [
            (
                task,
                f"{count:,}",
                f"{specs[task].probability:g}",
                f"{specs[task].temperature:g}",
                f"{specs[task].max_tokens:,}",
            )
            for task, count in planned.jobs.items()
        ]
        console.table(
            rows,
            ("task", "jobs", "probability", "temperature", "max tokens"),
            title=f"{self.source}: {len(workshop.store):,} chunks",
        )
        for reason, count in planned.left_out.items():
            console.note(f"left out, {reason}: {count:,}")
        if request:
            console.result(f"\nThe first request:\n{request.prompt}")

    def _show(self, result: Result) -> None:
        from smolmlx import console
        from smolmlx.synth.augment import refuse_gaps
        from smolmlx.synth.runtimes import TOO_LONG

        made = result.manifest
        if self.as_json:
            console.print_json({"folder": str(self.out_dir), **made})
        else:
            counts = [(name, f"{entry['rows']:,}", entry["sha256"][:12]) for name, entry in made["files"].items()]
            console.table(counts, ("split", "rows", "sha256"), title=str(self.out_dir))
            show_reasons(made)
            if result.totals.rejected[TOO_LONG] > result.totals.jobs * _MANY_TOO_LONG:
                console.note(
                    "The chunks are long for this model. Cut shorter ones, e.g.: "
                    "smolmlx data chunk DOCUMENTS chunks --words 120 --overlap 20"
                )
            console.result(say_jobs(made))
        refuse_gaps(result)
        if not self.as_json:
            console.result(f"Next: smolmlx data inspect {self.out_dir / next(iter(made['files']))}.jsonl")


def say_jobs(made: Mapping[str, Any]) -> str:
    """Return how many jobs of a manifest were accepted."""
    return f"{made['jobs']['accepted']:,} of {made['jobs']['planned']:,} jobs accepted, {made['rows']:,} rows"


def show_reasons(made: Mapping[str, Any], most: int | None = None) -> None:
    """Note why jobs of a manifest left no row, the most frequent reasons first."""
    from smolmlx import console

    for what in ("rejected", "failed"):
        for reason, count in list(made[what].items())[:most]:
            console.note(f"{what}, {reason}: {count:,}", style="yellow")


def _figures(totals: Totals, seconds: float) -> str:
    """Lay out what the bar says beside its count."""
    speed = totals.rows_now / max(seconds, 1e-9)
    parts = [f"{totals.rows:,} rows", f"{speed:.1f} rows/s", f"accepted {totals.accepted:,}"]
    refused = totals.rejected + totals.failed
    parts += [f"{reason} {count:,}" for reason, count in refused.most_common(3)]
    return "  ".join([*parts, f"{totals.prompt_tokens + totals.completion_tokens:,} tokens"])
