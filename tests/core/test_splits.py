"""A split keeps every row once, every group whole and every count asked for, and says so in its manifest."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolmlx.data.formats import open_source
from smolmlx.data.splits import LEFT_OUT, SPLITS, Method, assign, check_method, split_sizes, split_source
from smolmlx.errors import DataError, RecipeError

Row = dict[str, Any]
quick = settings(max_examples=30, deadline=None)


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(count: int) -> list[Row]:
    """Rows with an id, a topic of three uneven kinds, and a document of one to five rows."""
    return [
        {
            "id": i,
            "prompt": f"question {i}",
            "completion": f"answer {i}",
            "topic": "abc"[i % 7 % 3],
            "document": i * i % 23,
        }
        for i in range(count)
    ]


def divide(folder: Path, rows: Sequence[Row], method: Method) -> tuple[dict[str, list[Row]], Row]:
    """Split rows through files; return the rows of each split and the manifest."""
    manifest = split_source(open_source(str(write(folder / "rows.jsonl", rows))), folder / "out", method)
    assert manifest == json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"), object_hook=tuples)
    return {name: read(folder / "out" / f"{name}.jsonl") for name in manifest["files"]}, manifest


def tuples(tree: Row) -> Row:
    """Shares and counts are tuples in Python, lists in JSON."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


counts_of = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 20))


@quick
@given(counts_of, st.integers(0, 30), st.integers(0, 9))
def test_random_counts_are_exact_and_the_rest_is_left_out(counts: tuple[int, ...], more: int, seed: int) -> None:
    rows = sum(counts) + more
    labels = assign(np.zeros(rows, np.int64), Method(counts=counts, seed=seed))
    assert np.bincount(labels, minlength=LEFT_OUT + 1).tolist() == [*counts, more]


@quick
@given(st.integers(10, 3000), st.floats(0.05, 0.9), st.floats(0.1, 0.9))
def test_shares_are_within_a_row_and_complete(rows: int, first: float, ratio: float) -> None:
    shares = (first, (1 - first) * ratio, (1 - first) * (1 - ratio))
    try:
        sizes = split_sizes(rows, Method(shares=shares))
    except DataError:
        assert min(shares) * rows < 1
        return
    assert sum(sizes) == rows and sizes[LEFT_OUT] == 0
    assert all(abs(size - share * rows) < 1 for size, share in zip(sizes, shares, strict=False))


@quick
@given(st.lists(st.integers(0, 5), min_size=40, max_size=300), st.integers(0, 9), st.booleans())
def test_strata_keep_their_shares_and_counts_are_exact(values: list[int], seed: int, fixed: bool) -> None:
    strata = np.unique(values, return_inverse=True)[1].astype(np.int64)
    method = Method(counts=(20, 5, 7) if fixed else None, stratify="topic", seed=seed)
    labels = assign(strata, method)
    sizes = split_sizes(len(values), method)
    assert np.bincount(labels, minlength=LEFT_OUT + 1).tolist() == sizes
    for stratum in np.unique(strata):
        size = int((strata == stratum).sum())
        found = np.bincount(labels[strata == stratum], minlength=LEFT_OUT + 1)
        whole = [size * wanted // len(values) for wanted in sizes]
        assert all(whole[i] <= found[i] <= whole[i] + len(sizes) for i in range(len(sizes)))


@quick
@given(st.lists(st.integers(1, 12), min_size=40, max_size=200), st.integers(0, 9))
def test_groups_stay_whole_and_the_sizes_are_met(weights: list[int], seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(weights)), weights))
    method = Method(group="document", seed=seed)
    labels = assign(groups, method)
    for group in range(len(weights)):
        assert len(set(labels[groups == group].tolist())) == 1
    found = np.bincount(labels, minlength=LEFT_OUT + 1)
    assert found.sum() == len(groups) and found[LEFT_OUT] == 0
    assert max(abs(found - split_sizes(len(groups), method))) <= max(weights)


def test_group_counts_that_can_be_met_are_met() -> None:
    sizes = [6, 7] * 48
    groups = np.repeat(np.arange(96), sizes)
    for counts in ((480, 60, 84), (101, 33, 41), (7, 7)):
        labels = assign(groups, Method(counts=counts, group="concept"))
        assert np.bincount(labels, minlength=3)[: len(counts)].tolist() == list(counts)
    with pytest.raises(DataError, match=r"add up to 5,60; the nearest were 6,60"):
        assign(groups, Method(counts=(5, 60), group="concept"))


def test_a_group_too_large_for_its_split_goes_to_the_largest() -> None:
    groups = np.repeat(np.arange(21), [80, *[1] * 20])
    labels = assign(groups, Method(group="document"))
    assert set(labels[:80]) == {0} and np.bincount(labels).tolist() == [80, 10, 10]
    with pytest.raises(DataError, match="whole groups cannot fill every split"):
        assign(np.repeat([0, 1], 50), Method(group="document"))


@pytest.mark.parametrize(
    "method", [Method(), Method(stratify="topic"), Method(group="document"), Method(counts=(50, 9))]
)
def test_files_hold_every_row_once_unchanged_and_in_order(tmp_path: Path, method: Method) -> None:
    rows = make_rows(100)
    found, manifest = divide(tmp_path, rows, method)
    ids = [row["id"] for split in found.values() for row in split]
    assert len(ids) == len(set(ids)) == 100 - manifest["left_out"]
    for split in found.values():
        assert [rows[row["id"]] for row in split] == split
        assert [row["id"] for row in split] == sorted(row["id"] for row in split)
    if method.group:
        places = defaultdict(set)
        for name, split in found.items():
            for row in split:
                places[row["document"]].add(name)
        assert all(len(names) == 1 for names in places.values())


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    rows = make_rows(100)
    found, manifest = divide(tmp_path, rows, Method(stratify="topic", seed=3))
    assert (manifest["method"], manifest["column"], manifest["seed"]) == ("stratified", "topic", 3)
    assert manifest["format"] == "prompt-completion" and manifest["rows"] == 100
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / entry["path"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["rows"] == len(found[name])
    source = tmp_path / "rows.jsonl"
    assert manifest["source"]["files"] == {str(source): hashlib.sha256(source.read_bytes()).hexdigest()}
    topics = {name: Counter(row["topic"] for row in split) for name, split in found.items()}
    assert manifest["strata"] == {t: {name: topics[name][t] for name in SPLITS} for t in "abc"}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    rows = make_rows(60)
    first = divide(tmp_path, rows, Method())[1]
    assert divide(tmp_path, rows, Method())[1] == first
    assert divide(tmp_path, rows, Method(seed=1))[1]["files"] != first["files"]


def test_a_second_division_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    rows = make_rows(60)
    divide(tmp_path, rows, Method())
    divide(tmp_path, rows, Method(shares=(0.5, 0.5)))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", "train.jsonl", "validation.jsonl"]


def test_rows_repeated_across_splits_are_counted(tmp_path: Path) -> None:
    rows = make_rows(30)
    rows += [{**row, "prompt": row["prompt"].upper() + " "} for row in rows]
    found, manifest = divide(tmp_path, rows, Method(shares=(0.5, 0.5)))
    held = [{row["prompt"].strip().lower() for row in split} for split in found.values()]
    assert manifest["rows_repeated_across_splits"] == 2 * len(held[0] & held[1]) > 0


def test_any_format_is_written_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"wie weit {i}?", "null") for i in range(20))])
    manifest = split_source(open_source(str(path)), tmp_path / "out", Method())
    assert {name: entry["rows"] for name, entry in manifest["files"].items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }
    assert read(tmp_path / "out" / "test.jsonl")[0].keys() == {"question", "answer"}


def test_a_line_separator_and_half_a_surrogate_survive(tmp_path: Path) -> None:
    rows = [{"text": f"{i} line\u2028separator \ud800 ß"} for i in range(10)]
    found, _ = divide(tmp_path, rows, Method())
    assert sorted(row["text"] for split in found.values() for row in split) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (Method(stratify="a", group="b"), "choose one of them"),
        (Method(shares=(0.5, 0.4)), "add up to 0.9, and must add up to 1"),
        (Method(shares=(1.2, -0.2)), "must be positive"),
        (Method(counts=(1,)), "two or three numbers"),
        (Method(counts=(0, 0, 0)), "must be positive"),
    ],
)
def test_a_method_that_contradicts_itself_is_refused(method: Method, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        check_method(method)


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    rows = make_rows(20)
    with pytest.raises(DataError, match="30 rows asked for, and there are 20"):
        divide(tmp_path, rows, Method(counts=(20, 10)))
    with pytest.raises(RecipeError, match=r"no column 'topik'\. Did you mean 'topic'\?"):
        divide(tmp_path, rows, Method(stratify="topik"))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: no value in column 'document'"):
        divide(
            tmp_path,
            [{k: v for k, v in row.items() if (k, row["id"]) != ("document", 2)} for row in rows],
            Method(group="document"),
        )
    with pytest.raises(DataError, match="2 rows are too few"):
        divide(tmp_path, rows[:2], Method())
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_not_written_over(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "train.jsonl", make_rows(20))))
    with pytest.raises(RecipeError, match="overwrite its own source"):
        split_source(source, tmp_path, Method())
    other = tmp_path / "other"
    other.mkdir()
    write(other / "test.jsonl", make_rows(3))
    with pytest.raises(RecipeError, match=r"holds test\.jsonl, not written by"):
        split_source(source, other, Method())
