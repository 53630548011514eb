"""Instruction rows from chunks: ask a runtime, check every answer, keep it at once, and go on where a kill stopped.

Results reach `journal.jsonl` one by one; when all jobs are done the rows are written to one file per split in the order
of jobs. So an interrupted and resumed generation leaves the same bytes as one that ran through, as far as the model
gives the same answer to the same request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from smolmlx.data.clean import json_line, replacing
from smolmlx.data.splits import SPLITS
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.rundir import write_text
from smolmlx.synth.jobs import Job, Outline, Workshop
from smolmlx.synth.journal import ACCEPTED, FAILED, REJECTED, Journal, Record
from smolmlx.synth.runtimes import Reply, Request, Runtime
from smolmlx.tasks.replies import CUT_OFF, Rejected, read

MADE_BY = "smolmlx data augment"
_UNSAID = {"quantize": "none"}
"""Settings that folders of earlier versions do not name."""
JOURNAL, SETTINGS, MANIFEST = "journal.jsonl", "settings.json", "manifest.json"


@dataclass(slots=True)
class Totals:
    """What has been done, by this run and earlier ones."""

    jobs: int
    done: int = 0
    rows: int = 0
    rows_now: int = 0
    """Rows of this run."""
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> jobs whose last answer was not accepted for it."""
    failed: Counter[str] = field(default_factory=Counter)
    """Reason -> jobs without an answer; the next run asks them again."""
    attempts_refused: Counter[str] = field(default_factory=Counter)
    """Reason -> answers that were not accepted, though a later one may have been."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, record: Record) -> None:
        if record.state != FAILED:
            self.done += 1
        self.rows += len(record.rows)
        self.accepted += record.state == ACCEPTED
        if record.state == REJECTED:
            self.rejected[record.reasons[-1]] += 1
        elif record.state == FAILED:
            self.failed[record.reasons[-1]] += 1
        self.attempts_refused.update(record.reasons[:-1] if record.state == FAILED else record.reasons)
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens


OnProgress = Callable[[Totals], None]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    folder: Path
    totals: Totals
    manifest: dict[str, Any]


def outline(workshop: Workshop) -> Outline:
    """Count what there is to do, asking nobody."""
    found = Outline()
    for _ in workshop.jobs(found):
        pass
    return found


def augment(
    workshop: Workshop,
    runtime: Runtime,
    out_dir: Path,
    *,
    attempts: int = 2,
    on_progress: OnProgress = lambda totals: None,
) -> Result:
    """Make all rows, or those that an earlier run into `out_dir` has left to make, and write them by split.

    Args:
        attempts: how often a question is asked whose answers are not acceptable.

    Raises:
        RecipeError: `out_dir` belongs to other settings.
        BackendError: the runtime refuses all requests.
        RunError: the runtime has stopped answering, or the disk writing; the same call goes on later.
    """
    planned = outline(workshop)
    if not planned.total:
        reasons = "".join(f"\n  {reason}: {count}" for reason, count in planned.left_out.items())
        raise RecipeError(
            f"{workshop.store.source}: no job in {len(workshop.store)} chunks. Give more text, or another seed.{reasons}"
        )
    settings = {**_settings(workshop), "attempts": attempts}
    _claim(out_dir, settings)
    with Journal(out_dir / JOURNAL, planned.total) as journal:
        totals = Totals(planned.total)
        for record in journal.records():
            if record.state != FAILED:
                totals.count(record)
        asyncio.run(_Run(workshop, runtime, journal, totals, attempts, on_progress).all())
        manifest = publish(out_dir, journal, settings, (workshop, planned, totals))
    return Result(out_dir, totals, manifest)


def refuse_gaps(made: Result) -> None:
    """Refuse a generation with jobs that failed, or without rows.

    Raises:
        RunError: jobs failed; the same call asks them again.
        DataError: no answer was accepted.
    """
    if made.totals.failed:
        raise RunError(
            f"{made.folder}: {made.totals.failed.total():,} jobs failed and are not in the rows. The same command asks them again."
        )
    if not made.totals.rows:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in made.totals.rejected.most_common(3))
        raise DataError(
            f"{made.folder}: no row was accepted ({reasons}). Look at journal.jsonl, and try a larger model."
        )


class _Run:
    """One pass over the jobs that are left."""

    def __init__(
        self,
        workshop: Workshop,
        runtime: Runtime,
        journal: Journal,
        totals: Totals,
        attempts: int,
        on_progress: OnProgress,
    ) -> None:
        self.workshop, self.runtime, self.journal, self.totals = workshop, runtime, journal, totals
        self.attempts, self.on_progress = attempts, on_progress
        self.failures_in_a_row = 0
        self.patience = 10 + 2 * runtime.concurrency * runtime.together

    async def all(self) -> None:
        units = self._units()
        self.on_progress(self.totals)
        async with self.runtime:
            workers = [asyncio.create_task(self._work(units)) for _ in range(self.runtime.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _units(self) -> Iterator[list[Job]]:
        """Yield what is left to do, one call at a time."""
        unit: list[Job] = []
        for job in self.workshop.jobs():
            if self.journal.is_done(job.number):
                continue
            if job.task == "continuation":  # needs no model, so no place in a call
                yield [job]
                continue
            unit.append(job)
            if len(unit) == self.runtime.together:
                yield unit
                unit = []
        if unit:
            yield unit

    async def _work(self, units: Iterator[list[Job]]) -> None:
        for unit in units:  # shared by all workers: each takes the next
            await self._make(unit)
            await asyncio.sleep(0)

    async def _make(self, unit: Sequence[Job]) -> None:
        left = list(unit)
        reasons: dict[int, list[str]] = {job.number: [] for job in unit}
        tokens = {job.number: [0, 0] for job in unit}
        for attempt in range(self.attempts):
            again = []
            for job, reply in zip(left, await self._ask(left, attempt), strict=True):
                tokens[job.number][0] += reply.prompt_tokens if reply else 0
                tokens[job.number][1] += reply.completion_tokens if reply else 0
                made = self._judge(job, reply)
                if isinstance(made, list):
                    self._keep(job, ACCEPTED, made, reasons, tokens)
                    continue
                reasons[job.number].append(made.reason)
                if reply is not None and reply.failed:
                    self._keep(job, FAILED, [], reasons, tokens)
                elif (reply is not None and reply.rejected) or attempt == self.attempts - 1:
                    self._keep(job, REJECTED, [], reasons, tokens)
                else:
                    again.append(job)
            left = again
            if not left:
                return

    async def _ask(self, jobs: Sequence[Job], attempt: int) -> list[Reply | None]:
        requests = [self.workshop.request(job, attempt) for job in jobs]
        asked: list[Request] = [request for request in requests if request is not None]
        replies = iter(await self.runtime.ask(asked) if asked else [])
        return [None if request is None else next(replies) for request in requests]

    def _judge(self, job: Job, reply: Reply | None) -> list[dict[str, Any]] | Rejected:
        """Return the rows of an answer, or why it makes none."""
        if reply is None:
            return self.workshop.rows(job, None)
        if reason := reply.failed or reply.rejected:
            return Rejected(reason)
        value = read(self.workshop.schema(job), reply.text)
        if isinstance(value, Rejected):
            return Rejected(CUT_OFF) if reply.cut else value
        if reply.cut:
            return Rejected(CUT_OFF)
        return self.workshop.refuse(job, value) or self.workshop.rows(job, value)

    def _keep(
        self,
        job: Job,
        state: str,
        rows: list[dict[str, Any]],
        reasons: dict[int, list[str]],
        tokens: dict[int, list[int]],
    ) -> None:
        """Write what became of a job."""
        said = reasons[job.number]
        record = Record(job.number, self.workshop.key(job), state, rows, said, *tokens[job.number])
        self.journal.append(record)
        self.totals.count(record)
        self.totals.rows_now += len(rows)
        self.on_progress(self.totals)
        if job.task != "continuation":  # which asks nobody
            self.failures_in_a_row = self.failures_in_a_row + 1 if state == FAILED else 0
        if self.failures_in_a_row >= self.patience:
            raise RunError(
                f"{self.runtime.model}: no answer to the last {self.failures_in_a_row} requests ({said[-1]}). "
                f"{self.totals.done} of {self.totals.jobs} jobs are kept; the same command goes on with the rest."
            )


def _settings(workshop: Workshop) -> dict[str, Any]:
    """Return what decides the rows."""
    order = workshop.order
    return {
        "made_by": MADE_BY,
        "chunks": workshop.store.fingerprint,
        "tasks": list(order.tasks),
        "prompt_version": workshop.registry.prompt_version,
        "model": order.model,
        "runtime": order.runtime,
        "quantize": order.quantize,
        "seed": order.seed,
        "layout": order.layout,
    }


def _claim(out_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds rows of other settings, or anything else this module would write over."""
    path = out_dir / SETTINGS
    try:
        found = {**_UNSAID, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        names = [JOURNAL, MANIFEST, *(f"{split}.jsonl" for split in SPLITS)]
        present = [name for name in names if (out_dir / name).exists()]
        if present:
            raise RecipeError(
                f"{out_dir}: holds {', '.join(present)}, and no {SETTINGS} of `{MADE_BY}`. Choose another folder."
            ) from None
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    changed = [
        f"{key}: {found.get(key)} there, {value} now" for key, value in settings.items() if found.get(key) != value
    ]
    if changed:
        raise RecipeError(f"{out_dir}: was begun with other settings. Choose another folder, or give the same", changed)


def publish(
    out_dir: Path, journal: Journal, settings: dict[str, Any], work: tuple[Workshop, Outline, Totals]
) -> dict[str, Any]:
    """Write the accepted rows to one file per split in the order of jobs, then README.md and manifest.json."""
    workshop, planned, totals = work
    digests = {split: hashlib.sha256() for split in SPLITS}
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for record in journal.records():
            for row in record.rows:
                split = row["split"]
                if split not in files:
                    files[split] = stack.enter_context(replacing(out_dir / f"{split}.jsonl"))
                line = json_line(row, record.key)
                files[split].write(line)
                digests[split].update(line)
                counts[split][row["task"]] += 1
    manifest = {
        **settings,
        "source": str(workshop.store.source),
        "rows": totals.rows,
        "jobs": {"planned": planned.total, "accepted": totals.accepted, "rejected": totals.rejected.total(), "failed": totals.failed.total()},
        "rejected": _most_first(totals.rejected),
        "failed": _most_first(totals.failed),
        "answers_refused": _most_first(totals.attempts_refused),
        "chunks_left_out": dict(planned.left_out),
        "tokens": {"prompt": totals.prompt_tokens, "completion": totals.completion_tokens},
        "files": {
            split: {"path": f"{split}.jsonl", "rows": counts[split].total(), "sha256": digests[split].hexdigest(), "tasks": dict(sorted(counts[split].items()))}
            for split in files
        },
    }  # fmt: skip
    write_text(out_dir / "README.md", _card(manifest))
    write_text(out_dir / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _most_first(counts: Counter[str]) -> dict[str, int]:
    """Return counts, the highest first; equal ones by name, since they came in the order of answers."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _card(manifest: dict[str, Any]) -> str:
    tasks = sorted({task for entry in manifest["files"].values() for task in entry["tasks"]})
    lines = [
        "# Instruction rows made from documents",
        "",
        f"{manifest['rows']:,} rows, made by `{MADE_BY}` from the chunks in `{manifest['source']}` ({manifest['chunks']}) by the model "
        f"`{manifest['model']}`, prompts {manifest['prompt_version']}, seed {manifest['seed']}. A model wrote the answers; no person has read them.",
        "The licence of the documents, and the terms of the model, hold for these rows too.",
        "",
        f"| task | {' | '.join(manifest['files'])} |",
        f"|---|{'---:|' * len(manifest['files'])}",
        *(
            f"| {task} | {' | '.join(str(e['tasks'].get(task, 0)) for e in manifest['files'].values())} |"
            for task in tasks
        ),
        "",
        "Splits are by document, decided before any row was made; the passages of one row are from one split.",
        f"Of {manifest['jobs']['planned']:,} jobs {manifest['jobs']['accepted']:,} were accepted, {manifest['jobs']['rejected']:,} rejected and "
        f"{manifest['jobs']['failed']:,} failed; reasons are in manifest.json, every attempt in journal.jsonl.",
    ]
    return "\n".join(lines) + "\n"
