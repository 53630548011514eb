"""Divide the rows of a source into train, validation and test files, so that no row and no group is in two of them.

Only one label and one hash per row are held in memory; the rows themselves are read twice and streamed. The same
source, method and seed give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from smolmlx.data.clean import json_line, read_pairs, replacing, row_hash
from smolmlx.data.formats import Raw, Source
from smolmlx.errors import DataError, RecipeError, nearest

IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "validation", "test")
LEFT_OUT = len(SPLITS)
"""Label of a row that no split takes, where counts are fixed."""
MADE_BY = "smolmlx data split"
# The last 32 average groups of a split are chosen from 256 at hand, so that their rows add up.
_RESERVE, _WINDOW = 32, 256
_MAX_LISTED = 100


@dataclass(frozen=True, slots=True)
class Method:
    """How rows are divided; shares and counts are those of train, validation and test, in this order."""

    shares: tuple[float, ...] = (0.8, 0.1, 0.1)
    counts: tuple[int, ...] | None = None
    """Rows of each split, in place of shares; rows beyond their sum are left out."""
    stratify: str | None = None
    """Column whose values get the same shares in every split."""
    group: str | None = None
    """Column whose values are never in two splits."""
    seed: int = 0

    @property
    def name(self) -> str:
        return "stratified" if self.stratify else "grouped" if self.group else "random"

    @property
    def column(self) -> str | None:
        return self.stratify or self.group


@dataclass(slots=True)
class _Index:
    """What a first pass over the rows keeps of each."""

    values: dict[str, int]
    """Value of the column -> its number, in order of appearance."""
    labels: array[int]
    """Number of each row's value."""
    hashes: array[int]
    """First eight bytes of each row's hash."""


def split_source(
    source: Source, out_dir: Path, method: Method, on_rows: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, test.jsonl and, last, manifest.json; return the manifest.

    Rows keep their columns and their order. A split of size 0 is not written.

    Args:
        on_rows: called now and then with the number of rows read so far.

    Raises:
        RecipeError: a method that contradicts itself, or a folder whose files would be lost.
        DataError: rows that cannot be read or divided as asked.
        RunError: `out_dir` cannot be written.
    """
    check_method(method)
    _check_folder(source, out_dir)
    index = _read_index(source, method, on_rows)
    groups = np.asarray(index.labels, np.int64)
    labels = assign(groups, method)
    hashes = _write_splits(source, out_dir, labels)
    manifest = _manifest(source, method, index, labels, hashes)
    with replacing(out_dir / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    for name in set(SPLITS) - set(hashes):  # of an earlier division
        (out_dir / f"{name}.jsonl").unlink(missing_ok=True)
    return manifest


def check_method(method: Method) -> None:
    """Refuse sizes and options that contradict each other.

    Raises:
        RecipeError
    """
    problems = []
    if method.stratify and method.group:
        problems.append(f"--stratify {method.stratify} and --group {method.group}: choose one of them")
    sizes: Sequence[float] = method.shares if method.counts is None else method.counts
    what = "shares" if method.counts is None else "counts"
    if not 2 <= len(sizes) <= len(SPLITS):
        problems.append(f"{what} {_joined(sizes)}: give two or three numbers, for train, validation and test")
    if not all(math.isfinite(size) and size >= 0 for size in sizes) or not sum(sizes):
        problems.append(f"{what} {_joined(sizes)}: they must be positive, or 0 for a split that is not wanted")
    elif method.counts is None and abs(sum(sizes) - 1) > 1e-6:
        problems.append(f"shares {_joined(sizes)}: they add up to {sum(sizes):g}, and must add up to 1")
    if problems:
        raise RecipeError("data split", problems)


def _joined(sizes: Sequence[float]) -> str:
    return ",".join(f"{size:g}" for size in sizes)


def _check_folder(source: Source, out_dir: Path) -> None:
    """Refuse to write over the source, or over files that this module did not write."""
    targets = [out_dir / f"{name}.jsonl" for name in SPLITS]
    own = {path.resolve() for path in source.files}
    if any(path.resolve() in own for path in targets):
        raise RecipeError(f"{out_dir}: the split would overwrite its own source. Choose another folder.")
    manifest = out_dir / "manifest.json"
    present = [path.name for path in (*targets, manifest) if path.exists()]
    if present and not _is_ours(manifest):
        raise RecipeError(
            f"{out_dir}: holds {', '.join(present)}, not written by `{MADE_BY}`. Choose another folder, or move them."
        )


def _is_ours(manifest: Path) -> bool:
    try:
        tree = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("made_by") == MADE_BY


def _read_index(source: Source, method: Method, on_rows: Callable[[int], None] | None) -> _Index:
    problems: list[str] = []
    index = _Index({}, array("q"), array("Q"))
    columns: set[str] = set()
    for raw, example in read_pairs(source, problems):
        value = _value(raw, method)
        if value is None:
            problems.append(f"{example.where}: no value in column '{method.column}'")
        index.labels.append(index.values.setdefault(value or "", len(index.values)))
        index.hashes.append(int.from_bytes(row_hash(example)[:8], "big"))
        columns.update(raw)
        if on_rows is not None and len(index.labels) % 1024 == 0:
            on_rows(len(index.labels))
    if method.column and index.labels and method.column not in columns:
        hint = nearest(method.column, columns)
        listed = ", ".join(sorted(columns))
        raise RecipeError(f"{source.files[0]}: no column '{method.column}'.{hint} Columns: {listed}.")
    if problems:
        raise DataError(", ".join(map(str, source.files)), problems)
    return index


def _value(raw: Raw, method: Method) -> str | None:
    """Return a row's value in the column asked for, as text; None where a group is missing."""
    value = raw.get(method.column) if method.column else ""
    if value is None:
        return None if method.group else "(none)"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def assign(groups: IntArray, method: Method) -> IntArray:
    """Return the split of every row: its position in SPLITS, or LEFT_OUT.

    Args:
        groups: the number of each row's stratum or group, counted from 0; random division does not look at it.

    Raises:
        DataError: too few rows or groups.
    """
    sizes = split_sizes(len(groups), method)
    rng = np.random.default_rng(method.seed)
    if method.group:
        labels = _assign_groups(groups, sizes, rng)
        _check_groups(groups, labels, sizes, method)
    elif method.stratify:
        labels = _assign_strata(groups, sizes, rng)
    else:
        labels = np.empty(len(groups), np.int64)
        labels[rng.permutation(len(groups))] = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.bincount(labels, minlength=len(sizes))
    assert counts.sum() == len(groups) and (method.group or counts.tolist() == sizes)
    return labels


def split_sizes(rows: int, method: Method) -> list[int]:
    """Return how many rows each of SPLITS gets, and how many are left out; they add up to `rows`.

    Shares are rounded by largest remainder.

    Raises:
        DataError: more rows asked for than there are, or a share that gets none.
    """
    if method.counts is not None:
        counts = [*method.counts, *[0] * (len(SPLITS) - len(method.counts))]
        if sum(counts) > rows:
            raise DataError(f"counts {_joined(method.counts)}: {sum(counts)} rows asked for, and there are {rows}.")
        return [*counts, rows - sum(counts)]
    shares = [*method.shares, *[0.0] * (len(SPLITS) - len(method.shares))]
    sizes = [int(share * rows + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - shares[i] * rows)
    for i in by_remainder[: rows - sum(sizes)]:
        sizes[i] += 1
    if any(share and not size for share, size in zip(shares, sizes, strict=True)):
        raise DataError(
            f"{rows} rows are too few for shares {_joined(method.shares)}: a split would be empty. Give counts instead."
        )
    return [*sizes, 0]


def _assign_strata(strata: IntArray, sizes: Sequence[int], rng: np.random.Generator) -> IntArray:
    """Give each stratum its whole part of every split, then deal what is left over so that the sizes are exact."""
    labels = np.empty(len(strata), np.int64)
    shuffled = rng.permutation(len(strata))
    shuffled = shuffled[np.argsort(strata[shuffled], kind="stable")]
    wanted = np.asarray(sizes, np.int64)
    left, given = [], np.zeros_like(wanted)
    for rows in np.split(shuffled, np.cumsum(np.bincount(strata))[:-1]):
        part = len(rows) * wanted // len(strata)
        labels[rows[: part.sum()]] = np.repeat(np.arange(len(wanted)), part)
        left.append(rows[part.sum() :])
        given += part
    labels[rng.permutation(np.concatenate(left))] = np.repeat(np.arange(len(wanted)), wanted - given)
    return labels


def _assign_groups(groups: IntArray, sizes: Sequence[int], rng: np.random.Generator) -> IntArray:
    """Fill the splits with whole groups in random order, the smallest first; the last takes what is left."""
    weights = np.bincount(groups).tolist()
    order: list[int] = rng.permutation(len(weights)).tolist()
    splits = sorted((split for split in range(LEFT_OUT) if sizes[split]), key=lambda split: (sizes[split], split))
    last = LEFT_OUT if sizes[LEFT_OUT] else splits.pop()
    placed = np.full(len(weights), last)
    for split in splits:
        chosen = _fill(sizes[split], order, weights)
        placed[list(chosen)] = split
        order = [group for group in order if group not in chosen]
    return placed[groups]


def _fill(room: int, order: Sequence[int], weights: Sequence[int]) -> set[int]:
    """Choose groups whose rows add up to `room`, or to as near as was found; at least one group.

    Groups are taken as they come while much room is left; then a subset sum over some of the rest closes the gap.
    """
    reserve = _RESERVE * sum(weights) / len(weights)
    chosen: set[int] = set()
    for group in order:
        if room - weights[group] >= reserve:
            chosen.add(group)
            room -= weights[group]
    window = [group for group in order if group not in chosen][:_WINDOW]
    return chosen | _nearest_sum(room, window, weights, may_be_empty=bool(chosen))


def _nearest_sum(room: int, window: Sequence[int], weights: Sequence[int], may_be_empty: bool) -> set[int]:
    if not window:
        return set()
    highest = max(2 * room, min(weights[group] for group in window))
    reachable = [1]  # bit n of entry i: some of the first i groups add up to n rows
    for group in window:
        reachable.append((reachable[-1] | reachable[-1] << weights[group]) & ((1 << highest + 1) - 1))
    sums = (total for gap in range(highest + 1) for total in (room - gap, room + gap) if total >= (not may_be_empty))
    total = next(total for total in sums if reachable[-1] >> total & 1)
    chosen = set()
    for i in range(len(window) - 1, -1, -1):
        if not reachable[i] >> total & 1:
            chosen.add(window[i])
            total -= weights[window[i]]
    return chosen


def _check_groups(groups: IntArray, labels: IntArray, sizes: Sequence[int], method: Method) -> None:
    pairs = np.unique(np.stack([groups, labels]), axis=1)
    assert len(pairs[0]) == len(np.unique(groups)), "a group is in two splits"
    got = np.bincount(labels, minlength=len(sizes)).tolist()
    largest = f"{len(pairs[0])} groups, the largest of {int(np.bincount(groups).max())} rows"
    if any(size and not found for size, found in zip(sizes[:LEFT_OUT], got, strict=False)):
        raise DataError(f"--group {method.group}: {largest}: whole groups cannot fill every split. Use other sizes.")
    if method.counts is not None and got != list(sizes):
        raise DataError(
            f"--group {method.group}: {largest}: no whole groups were found that add up to {_joined(method.counts)}; "
            f"the nearest were {_joined(got[: len(method.counts)])}. Ask for those, or give --shares."
        )


def _write_splits(source: Source, out_dir: Path, labels: IntArray) -> dict[str, str]:
    """Stream every row to its file; return the sha256 of each."""
    counts = np.bincount(labels, minlength=LEFT_OUT)
    digests = {split: hashlib.sha256() for split in range(LEFT_OUT) if counts[split]}
    written = 0
    with contextlib.ExitStack() as stack:
        files: dict[int, BinaryIO] = {
            split: stack.enter_context(replacing(out_dir / f"{SPLITS[split]}.jsonl")) for split in digests
        }
        for (raw, example), split in zip(_reread(source, len(labels)), labels.tolist(), strict=True):
            if split in files:
                line = json_line(raw, example.where)
                files[split].write(line)
                digests[split].update(line)
                written += 1
    assert written == counts[:LEFT_OUT].sum()
    return {SPLITS[split]: digest.hexdigest() for split, digest in digests.items()}


def _reread(source: Source, rows: int) -> Iterator[Any]:
    count = 0
    for count, pair in enumerate(read_pairs(source, []), 1):
        if count <= rows:
            yield pair
    if count != rows:
        raise DataError(f"{source.files[0]}: changed while it was being split: {rows} rows before, {count} now.")


def _manifest(
    source: Source, method: Method, index: _Index, labels: IntArray, hashes: Mapping[str, str]
) -> dict[str, Any]:
    groups = np.asarray(index.labels, np.int64)
    files = {}
    for name, digest in hashes.items():
        chosen = labels == SPLITS.index(name)
        files[name] = {"path": f"{name}.jsonl", "rows": int(chosen.sum()), "sha256": digest}
        if method.group:
            files[name]["groups"] = len(np.unique(groups[chosen]))
    asked = {"shares": method.shares} if method.counts is None else {"counts": method.counts}
    tree: dict[str, Any] = {
        "made_by": MADE_BY,
        "method": method.name,
        "column": method.column,
        **asked,
        "seed": method.seed,
        "format": source.form.name,
        "rows": len(labels),
        "left_out": int((labels == LEFT_OUT).sum()),
        "rows_repeated_across_splits": _count_repeated(np.asarray(index.hashes, np.uint64), labels),
        "source": {"hash": source.content_hash(), "files": {str(path): file_hash(path) for path in source.files}},
        "files": files,
    }
    if method.stratify and len(index.values) <= _MAX_LISTED:
        table = np.zeros((len(index.values), LEFT_OUT + 1), np.int64)
        np.add.at(table, (groups, labels), 1)
        tree["strata"] = {
            value: {name: int(table[number, SPLITS.index(name)]) for name in hashes}
            for value, number in index.values.items()
        }
    return tree


def _count_repeated(hashes: npt.NDArray[np.uint64], labels: IntArray) -> int:
    """Count rows whose exact text also stands in another split."""
    taken = labels != LEFT_OUT
    _, which = np.unique(hashes[taken], return_inverse=True)
    low, high = np.full(len(which), LEFT_OUT), np.full(len(which), -1)
    np.minimum.at(low, which, labels[taken])
    np.maximum.at(high, which, labels[taken])
    return int((low != high)[which].sum())


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
