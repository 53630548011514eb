"""Preference pairs from a model's own answers: several are drawn for each notes row, ranked, and informative pairs kept.

An answer that keeps the strict rule stands before one that does not; among equals the one that is nearer to the row's
reference does, or the one that a judge marks higher. Nothing but the model's own words is trained on, so no style of a rule or of a judge is learned with them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smolmlx.backend import Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.evals.bases import generate
from smolmlx.evals.judge import Item, Marks, questions
from smolmlx.evals.judging import NONSENSE, Judge, open_ledger, run
from smolmlx.evals.run import Meter
from smolmlx.evals.suites import EvalRow, NotesScore, score_note
from smolmlx.synth.flaws import NotesRow, gap
from smolmlx.synth.notes import Dice
from smolmlx.synth.pairs import Pair, read_notes_rows, record, round_robin, row_files, write_files

LEAST_GAP = 0.15
"""Content alignment between two compliant answers below which a pair says too little."""
LEAST_MARK_GAP = 0.5
"""The same in a judge's mean mark, 1 to 5."""
LEFT_OUT_NONE_KEPT = "no answer keeps the strict rule"
LEFT_OUT_ALIKE = "the answers are too much alike"
LEFT_OUT_UNMARKED = "the judge gave no marks in the form asked for"
LEFT_OUT_NONE_BROKEN = "all answers keep the strict rule"
ROUND = 48
"""Rows whose answers are drawn together when a number of pairs is wanted; rows beyond it are not drawn for."""
EMPTY_ROUNDS = 2
"""Rounds after which drawing ends if no answer of theirs keeps the strict rule."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is drawn at once of the answers for one split, for one bar over all of them."""

    label: str
    before: int
    """Answers drawn for the split before."""
    total: int
    """Answers to all its rows; fewer are drawn where a number of pairs is wanted."""


Draw = Callable[[Sequence[str], int, int, Work], list[list[str]]]
"""Prompts, a number, a seed and the place in the work -> that many answers of the model to each."""
Marked = Mapping[tuple[str, str], float]
"""(id of a row, answer) -> a judge's mean mark; what it gave none is not in it."""
Mark = Callable[[Sequence[tuple[NotesRow, str]]], Marked]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Whose answers, and how they are drawn; recorded with the pairs."""

    model: str
    adapter: str
    samples: int = 8
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0
    about: Literal["any", "form"] = "any"
    """form: only pairs whose rejected answer breaks the strict rule."""
    judge: str = ""
    """Who ranks the answers that keep the strict rule; empty for content alignment."""


def drawing(generator: Generator, tokenizer: Tokenizer, sampling: Sampling, meter: Meter) -> Draw:
    """Return what draws answers of a loaded model; an answer depends on the seed and its place alone."""

    def draw(prompts: Sequence[str], number: int, seed: int, work: Work) -> list[list[str]]:
        how = Decoding(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, seed=seed
        )
        asked = [tokenizer.encode(tokenizer.prompt([{"role": "user", "content": prompt}])) for prompt in prompts]
        repeated = [ids for ids in asked for _ in range(number)]
        with meter(work.label, work.total) as on_done:
            on_done(work.before)
            found = generate(generator, tokenizer, repeated, how, lambda done: on_done(work.before + done))
        return [found[start : start + number] for start in range(0, len(found), number)]

    return draw


def judging(judge: Judge, ledger_path: Path, meter: Meter) -> Mark:
    """Return what asks a judge for marks; a reply that was paid for is kept in the ledger, so a second run asks no more."""

    def mark(asked: Sequence[tuple[NotesRow, str]]) -> Marked:
        found = {f"{row.id}-{hashlib.sha256(answer.encode()).hexdigest()[:12]}": (row, answer) for row, answer in asked}
        items = [Item(key, row.prompt, row.answer, answer) for key, (row, answer) in found.items()]
        wanted = questions(items, judge.name)
        with open_ledger(ledger_path) as ledger, meter(f"{judge.name} judges", len(wanted)) as on_done:
            run(judge, wanted, ledger, on_done)
            records = [ledger.records[question.key] for question in wanted]
        failed = [record.error for record in records if record.error not in ("", NONSENSE)]
        if failed:
            raise RunError(
                f"{len(failed)} of {len(wanted)} answers got no marks ({failed[0]}). Run it again: what was marked is kept in {ledger_path}."
            )
        marks = ((found[record.id], record.reply) for record in records if record.reply is not None)
        return {(row.id, answer): Marks.model_validate(reply).mean for (row, answer), reply in marks}

    return mark


def choose(
    row: NotesRow, answers: Sequence[str], about: str = "any", marks: Marked | None = None
) -> tuple[str, str, list[str]] | str:
    """Return (chosen, rejected, what is wrong with rejected) of a row's answers, or why they give no pair.

    Args:
        about: as in `Sampling`.
        marks: a judge's, which then rank what keeps the strict rule; needed where more than one answer does.
    """
    scored = _score(row, answers)
    kept = [(score, answer) for score, answer in scored if score.compliance]
    if not kept:
        return LEFT_OUT_NONE_KEPT
    if marks is not None and len(kept) > 1:
        kept = [(score, answer) for score, answer in kept if (row.id, answer) in marks]
        if not kept:
            return LEFT_OUT_UNMARKED

    def worth(found: tuple[NotesScore, str]) -> tuple[float, ...]:
        near = found[0].content_alignment, -found[0].unsupported
        return near if marks is None else (marks.get((row.id, found[1]), 0.0), *near)

    best = max(kept, key=worth)
    chosen = best[1]
    broken = [(score, answer) for score, answer in scored if not score.compliance]
    if broken:
        # The broken answer whose length is nearest, so that length teaches as little as it can.
        score, rejected = min(broken, key=lambda found: abs(gap(chosen, found[1])))
        return chosen, rejected, list(score.problems)
    if about == "form":
        return LEFT_OUT_NONE_BROKEN
    worst = min(kept, key=worth)
    if worth(best)[0] - worth(worst)[0] < (LEAST_GAP if marks is None else LEAST_MARK_GAP):
        return LEFT_OUT_ALIKE
    return chosen, worst[1], ["content"]


def _score(row: NotesRow, answers: Sequence[str]) -> list[tuple[NotesScore, str]]:
    asked = EvalRow(row.id, row.passage, row.answer)
    return [(score_note(asked, answer), answer) for answer in dict.fromkeys(answers)]


def _to_judge(row: NotesRow, answers: Sequence[str]) -> list[tuple[NotesRow, str]]:
    """Return what a judge is asked about: the answers that keep the strict rule, where there is more than one."""
    kept = [(row, answer) for score, answer in _score(row, answers) if score.compliance]
    return kept if len(kept) > 1 else []


def sample_pairs(
    rows: Sequence[NotesRow], counts: dict[str, int | None], sampling: Sampling, draw: Draw, mark: Mark | None = None
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """Return the pairs of each split, round-robin over topic and difficulty, and how many rows gave none, by reason.

    Args:
        counts: split -> most pairs wanted; None for all.

    Raises:
        DataError: a split gave no pair at all.
    """
    made: dict[str, list[Pair]] = {}
    all_left_out = Counter[str]()
    for split, count in counts.items():
        left_out = Counter[str]()
        members = list(round_robin([row for row in rows if row.split == split], Dice(sampling.seed)))
        pairs: list[Pair] = []
        together = ROUND if count else max(1, len(members))
        for start in range(0, len(members), together):
            if count and len(pairs) >= count:
                break
            asked = members[start : start + together]
            found_so_far = f", {len(pairs)} of {count} pairs" if count else ""
            work = Work(f"answers for {split}{found_so_far}", start * sampling.samples, len(members) * sampling.samples)
            answers = draw([row.prompt for row in asked], sampling.samples, sampling.seed + start, work)
            drawn_for = list(zip(asked, answers, strict=True))
            marks = mark([one for row, drawn in drawn_for for one in _to_judge(row, drawn)]) if mark else None
            found = [(row, choose(row, drawn, sampling.about, marks)) for row, drawn in drawn_for]
            left_out.update(choice for _, choice in found if isinstance(choice, str))
            pairs += [_pair(row, choice) for row, choice in found if not isinstance(choice, str)]
            if not pairs and left_out[LEFT_OUT_NONE_KEPT] == sum(left_out.values()) >= EMPTY_ROUNDS * ROUND:
                break
        made[split] = pairs[:count]
        if not pairs:
            raise DataError(_no_pair(split, left_out, sampling))
        all_left_out += left_out
    return made, dict(all_left_out)


def _no_pair(split: str, left_out: Mapping[str, int], sampling: Sampling) -> str:
    if not left_out:
        return f"no on-policy pair for {split}: no row is of that split. Leave its number out of --counts, or add its rows."
    why = "; ".join(f"{reason}: {number} rows" for reason, number in left_out.items())
    advice = "Train longer, or draw more --samples."
    if not sampling.adapter and left_out.get(LEFT_OUT_NONE_KEPT):
        advice = "Pass --adapter with one trained on notes, e.g. the adapter/ of a run of notes/sft."
    return f"no on-policy pair for {split} ({why}). {advice}"


def _pair(row: NotesRow, choice: tuple[str, str, list[str]]) -> Pair:
    chosen, rejected, issues = choice
    return {**record(row, "sampled", chosen, rejected), "issues": issues}


def write_sampled(
    names: Sequence[str],
    out_dir: Path,
    counts: Sequence[int] | None,
    sampling: Sampling,
    draw: Draw,
    mark: Mark | None = None,
) -> dict[str, Any]:
    """Draw, choose and write, as `pairs.write_pairs` does; return the manifest.

    Raises:
        RecipeError: fewer than two samples, pairs of held-out rows, or a folder whose files would be lost.
        DataError: rows that are no notes, or that give no pair.
    """
    if sampling.samples < 2 or sampling.temperature <= 0:
        raise RecipeError(
            "data pairs", ["--samples, --temperature: a pair takes two answers that may differ: 2 or more, above 0."]
        )
    if counts is not None and (len(counts) > 2 or not all(count > 0 for count in counts)):
        raise RecipeError(
            "data pairs",
            [f"--counts {','.join(map(str, counts))}: expected pairs for train and validation, e.g. 200,40"],
        )
    splits = ("train", "validation")
    files = list(row_files(names, splits[: len(counts)] if counts else splits))
    rows = read_notes_rows(files, advice="Leave the file out.")
    wanted: dict[str, int | None] = dict(zip(splits, counts or (), strict=False))
    if counts is None:
        wanted = {split: None for split in splits if any(row.split == split for row in rows)}
    order = {"sampling": {name: getattr(sampling, name) for name in sampling.__slots__}, "counts": list(counts or ())}
    return write_files(out_dir, files, len(rows), order, lambda: sample_pairs(rows, wanted, sampling, draw, mark))
