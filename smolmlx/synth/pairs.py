"""Preference pairs by rule: notes rows with a rejected answer of one flaw and the chosen one's length.

Rows are taken round-robin over topic and difficulty, flaws are dealt evenly, and every pair is read again by
`find_flaws` before it is written. The same rows, counts and seed give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolmlx.data.clean import json_line, replacing
from smolmlx.data.formats import locate, read_rows
from smolmlx.data.notes import OOD_SPLIT, SPLITS, validate_notes
from smolmlx.errors import DataError, RecipeError
from smolmlx.evals.notes import strict_compliance
from smolmlx.models import files_root
from smolmlx.synth.documents import read_made_by
from smolmlx.synth.flaws import ISSUES, Neighbours, NotesRow, find_flaws, gap, read_note, spoil
from smolmlx.synth.notes import Dice, note_words

Pair = dict[str, Any]

MADE_BY = "smolmlx data pairs"
COUNTS = (258, 42)
"""Pairs by rule for train and validation, where no other number is asked for."""
HELD_OUT = ("test", OOD_SPLIT)
LEFT_OUT_FLAWED = "the chosen answer itself has a flaw"
LEFT_OUT_NONE = "no flaw fits at this length"


@dataclass(frozen=True, slots=True)
class Order:
    """How many pairs are wanted, with which flaws; `counts` are those of train, validation and test."""

    counts: tuple[int, ...] = COUNTS
    issues: tuple[str, ...] = ISSUES
    seed: int = 0
    allow_test: bool = False
    """Take test and out-of-distribution rows too; a model trained on them cannot be measured by them."""

    def wanted(self) -> dict[str, int]:
        """Pairs of each split that is wanted at all."""
        return {split: count for split, count in zip(SPLITS, self.counts, strict=False) if count}


def check_order(order: Order) -> None:
    """Refuse counts and flaws that contradict each other.

    Raises:
        RecipeError
    """
    problems = []
    counts = ",".join(map(str, order.counts))
    if not 1 <= len(order.counts) <= len(SPLITS) or min(order.counts) < 0 or not sum(order.counts):
        problems.append(f"--counts {counts}: expected pairs for train and validation, e.g. 258,42")
    elif "test" in order.wanted() and not order.allow_test:
        problems.append(f"--counts {counts}: asks for pairs of test rows, which are for measuring; add --allow-test")
    elif order.allow_test and "test" not in order.wanted():
        problems.append(f"--allow-test: has no effect with --counts {counts}; give a third number, e.g. 258,42,20")
    problems += [
        f"issue '{issue}': unknown. Known: {', '.join(ISSUES)}" for issue in order.issues if issue not in ISSUES
    ]
    if problems:
        raise RecipeError("data pairs", problems)


def write_pairs(
    names: Sequence[str], out_dir: Path, order: Order, on_pairs: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl (test.jsonl where asked for) and, last, manifest.json; return the manifest.

    Args:
        names: notes files, or folders that hold train.jsonl and validation.jsonl.
        on_pairs: called with the number of pairs made so far.

    Raises:
        RecipeError: an order that contradicts itself, or a folder whose files would be lost.
        DataError: rows that are no notes, held-out rows that were not asked for, or too few rows for the counts.
        RunError: `out_dir` cannot be written.
    """
    check_order(order)
    files = list(row_files(names, order.wanted()))
    rows = read_notes_rows(files, order.allow_test)
    tree = {"seed": order.seed, "counts": list(order.counts), "issues": list(order.issues)}
    return write_files(out_dir, files, len(rows), tree, lambda: make_pairs(rows, order, on_pairs))


def write_files(
    out_dir: Path,
    files: Sequence[Path],
    num_rows: int,
    order: Mapping[str, Any],
    make: Callable[[], tuple[dict[str, list[Pair]], dict[str, int]]],
) -> dict[str, Any]:
    """Make pairs and write one file a split, then manifest.json; return the manifest.

    Raises:
        RecipeError: a folder whose files would be lost.
        RunError: `out_dir` cannot be written.
    """
    _check_folder(out_dir)
    made, left_out = make()
    entries = {}
    for split, pairs in made.items():
        content = b"".join(json_line(pair, pair["id"]) for pair in pairs)
        with replacing(out_dir / f"{split}.jsonl") as file:
            file.write(content)
        entries[split] = {"path": f"{split}.jsonl", "sha256": hashlib.sha256(content).hexdigest(), **_summary(pairs)}
    sources = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    tree = {"made_by": MADE_BY, **order, "rows": num_rows, "pairs": sum(map(len, made.values())), "files": entries, "left_out": left_out, "sources_sha256": sources}  # fmt: skip
    with replacing(out_dir / "manifest.json") as file:
        file.write(json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n")
    for split in set(SPLITS) - set(entries):  # of an earlier order
        (out_dir / f"{split}.jsonl").unlink(missing_ok=True)
    return tree


def _check_folder(out_dir: Path) -> None:
    present = [name for name in (*(f"{split}.jsonl" for split in SPLITS), "manifest.json") if (out_dir / name).exists()]
    if present and read_made_by(out_dir) != MADE_BY:
        raise RecipeError(f"{out_dir}: holds {', '.join(present)}, not written by `{MADE_BY}`. Choose another folder.")


def row_files(names: Sequence[str], splits: Iterable[str]) -> Iterator[Path]:
    """Yield the notes files behind names of files, and of folders that hold one file a split."""
    for name in names:
        # As in recipes: what is not in the working folder may be the project's own, e.g. data/notes.
        path = locate(name, (files_root(),)) or Path(name)
        if path.is_dir():
            yield from (path / f"{split}.jsonl" for split in splits)
        else:
            yield path


def read_notes_rows(
    files: Sequence[Path], allow_test: bool = False, advice: str = "Leave the file out, or pass --allow-test."
) -> list[NotesRow]:
    """Read rows of the notes task from all files, validated together.

    Args:
        advice: what to do about held-out rows.

    Raises:
        DataError: listing rows that are no notes or whose answers break the strict rules, or held-out rows.
    """
    label = ", ".join(map(str, files))
    for path in files:
        _refuse_others(path)
    found = validate_notes(files, lambda answer: strict_compliance(answer).problems)
    _refuse(label, [str(problem) for problem in found])
    # Not splitlines(): JSON strings may hold U+2028 unescaped.
    lines = [
        (f"{path}:{number}", json.loads(line))
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
        if line.strip()
    ]
    held_out = [where for where, raw in lines if raw["split"] in HELD_OUT]
    if held_out and not allow_test:
        raise DataError(
            f"{label}: {len(held_out)} rows are held out (first {held_out[0]}): what is trained on them cannot be "
            f"measured by them. {advice}"
        )
    rows = [_row(raw) for _, raw in lines]
    _refuse(label, [f"{where}: the answer is not laid out as the task's notes are: each header and each text on a line of its own" for (where, _), row in zip(lines, rows, strict=True) if row is None])  # fmt: skip
    return [row for row in rows if row is not None]


def _refuse_others(path: Path) -> None:
    """Say of rows of another kind what they are, where the fields that they lack would fill the screen."""
    rows = read_rows([path], []) if path.is_file() else iter(())
    _, first = next(rows, ("", {}))
    if {"task", "chunk", "prompt_version"} <= set(first):
        raise DataError(
            f"{path}: rows of `smolmlx data augment`, not notes rows. Pairs take rows with the fields of data/notes, "
            "such as concept, topic and difficulty."
        )
    if first and not {"topic", "difficulty", "input_sha256"} & set(first):
        count = 1 + sum(1 for _ in rows)
        raise DataError(
            f"{path}: {count:,} row{'s' if count > 1 else ''} with columns {', '.join(map(str, first))}, not rows of the notes task, whose fields "
            "data/notes/README.md names. Pairs that are ready (prompt, chosen, rejected) need no command: name their file as "
            "data.train."
        )


def _refuse(label: str, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(label, problems)


def _row(raw: Mapping[str, str]) -> NotesRow | None:
    note = read_note(raw["output"])
    if note is None:
        return None
    prompt = f"{raw['instruction']}\n\n{raw['input']}"  # as the alpaca layout asks it in SFT
    split = "test" if raw["split"] in HELD_OUT else raw["split"]
    labels = (raw["concept"], raw["topic"], raw["difficulty"], split, prompt)
    return NotesRow(raw["id"], raw["input"], raw["output"], note, raw["source"] == "rule", *labels)


def make_pairs(
    rows: Sequence[NotesRow], order: Order, on_pairs: Callable[[int], None] | None = None
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    """Return the pairs of each split, and how many rows were passed over for which reason.

    Raises:
        DataError: a split has too few rows for its count.
    """
    made: dict[str, list[Pair]] = {}
    left_out, problems = Counter[str](), []
    for split, count in order.wanted().items():
        members = [row for row in rows if row.split == split]
        # Each split has dice of its own, so that the count of one does not change the pairs of another.
        dice = Dice(order.seed * len(SPLITS) + SPLITS.index(split))
        made[split] = []
        for pair in _split_pairs(members, order.issues, dice, left_out):
            made[split].append(pair)
            if on_pairs is not None:
                on_pairs(sum(map(len, made.values())))
            if len(made[split]) == count:
                break
        else:
            problems.append(f"{split}: {count} pairs asked for, {len(members)} rows gave {len(made[split])}")
    if problems:
        have = ",".join(str(len(pairs)) for pairs in made.values())
        raise DataError(f"too few rows for the pairs asked for; try --counts {have}", problems)
    return made, dict(left_out)


def _split_pairs(rows: Sequence[NotesRow], issues: Sequence[str], dice: Dice, left_out: Counter[str]) -> Iterator[Pair]:
    """Yield a pair of every row that gives one; why the others do not is counted in `left_out`."""
    by_concept: dict[str, list[NotesRow]] = defaultdict(list)
    for row in rows:
        by_concept[row.concept].append(row)
    neighbours, used = Neighbours(by_concept), Counter[tuple[str, str]]()
    for row in round_robin(rows, dice):
        if find_flaws(row.passage, row.answer, row.answer):
            left_out[LEFT_OUT_FLAWED] += 1
            continue
        # The rarest flaw so far comes first, and of those the rarest for this topic.
        order = sorted(dice.shuffled(issues), key=lambda issue: (used[issue, ""], used[issue, row.topic]))
        drafts = ((issue, spoil(row, issue, neighbours, dice)) for issue in order)
        issue, rejected = next(((issue, text) for issue, text in drafts if text is not None), ("", ""))
        if not issue:
            left_out[LEFT_OUT_NONE] += 1
            continue
        used.update([(issue, ""), (issue, row.topic)])
        yield record(row, issue, row.answer, rejected)


def round_robin(rows: Iterable[NotesRow], dice: Dice) -> Iterator[NotesRow]:
    """Yield every row, one of each topic and difficulty in turn for as long as it has any."""
    cells: dict[tuple[str, str], list[NotesRow]] = defaultdict(list)
    for row in dice.shuffled(rows):
        cells[row.topic, row.difficulty].append(row)
    turns = dice.shuffled(sorted(cells))
    while any(cells.values()):
        yield from (cells[cell].pop() for cell in turns if cells[cell])


def record(row: NotesRow, issue: str, chosen: str, rejected: str) -> Pair:
    """Lay out one pair with where it comes from and hashes of its texts."""
    labels = {"concept": row.concept, "topic": row.topic, "difficulty": row.difficulty, "split": row.split}
    words = {"chosen_words": len(note_words(chosen)), "rejected_words": len(note_words(rejected))}
    texts = {"prompt": row.prompt, "chosen": chosen, "rejected": rejected}
    hashes = {f"{name}_sha256": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {"id": f"{row.id}-{issue}", **texts, "issues": [issue], "source_id": row.id, **labels, **words, **hashes}


def _summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    gaps = [gap(pair["chosen"], pair["rejected"]) for pair in pairs]
    counts = {name: dict(sorted(Counter(pair[name] for pair in pairs).items())) for name in ("topic", "difficulty")}
    issues = dict(sorted(Counter(issue for pair in pairs for issue in pair["issues"]).items()))
    return {
        "pairs": len(pairs),
        "issues": issues,
        **counts,
        "mean_word_gap": sum(map(abs, gaps)) / len(gaps),
        "largest_word_gap": max(map(abs, gaps)),
        "mean_signed_word_gap": sum(gaps) / len(gaps),
    }
