"""A mix holds each source's share, no row twice, in an order that a seed decides, and says what came from where."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolmlx.data.formats import open_source
from smolmlx.data.mix import count_rows
from smolmlx.errors import RecipeError

Call = Callable[..., tuple[int, str, str]]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """90 rows of one format, 40 of another."""
    first = [{"prompt": f"a {i}", "completion": "x", "topic": i} for i in range(90)]
    second = [{"instruction": f"b {i}", "input": "", "output": "y"} for i in range(40)]
    return write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def origins(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["messages"][0]["content"][0] for row in rows)


def test_shares_order_and_manifest(call: Call, files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = files
    code, out, err = call("data", "mix", f"{a}=3", b, "mixed", "--seed", 5, "--json")
    assert code == 0, err
    made, rows = json.loads(out), read(tmp_path / "mixed")
    assert origins(rows) == {"a": 90, "b": 30} and len({json.dumps(row) for row in rows}) == 120
    assert "".join(row["messages"][0]["content"][0] for row in rows[:60]).strip("a"), "the two are mixed"
    assert {"topic", "messages"} == set(next(row for row in rows if "topic" in row)), "other columns are kept"
    assert (made["rows"], made["to"], made["seed"]) == (120, "messages", 5)
    assert made["sources"][str(b)]["rows"] == 30 and made["sources"][str(b)]["share"] == 0.25
    assert {"folder": "mixed", **json.loads((tmp_path / "mixed" / "manifest.json").read_text())} == made
    assert open_source(str(tmp_path / "mixed")).form.name == "messages", "the folder can be a recipe's data.train"


def test_the_seed_decides(call: Call, files: tuple[Path, Path], tmp_path: Path) -> None:
    for seed, folder in ((1, "one"), (1, "again"), (2, "two")):
        assert call("data", "mix", *files, folder, "--rows", 20, "--seed", seed)[0] == 0
    one, again, two = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two
    assert origins(read(tmp_path / "one")) == {"a": 10, "b": 10}


@pytest.mark.parametrize(
    ("sizes", "weights", "rows", "counts"),
    [
        ((90, 40), (3, 1), None, (90, 30)),
        ((90, 40), (1, 1), None, (40, 40)),
        ((10, 10, 10), (1, 1, 1), 10, (4, 3, 3)),
        ((7, 100), (1, 2), None, (7, 14)),
        ((1, 1), (1, 1.5), None, None),
        ((90, 40), (1, 1), 100, None),
    ],
)
def test_counts(
    sizes: tuple[int, ...], weights: tuple[float, ...], rows: int | None, counts: tuple[int, ...] | None
) -> None:
    names = "abc"[: len(sizes)]
    given = dict(zip(names, sizes, strict=True)), dict(zip(names, weights, strict=True)), rows
    if counts is None:
        with pytest.raises(RecipeError, match="share is"):
            count_rows(*given)
    else:
        assert tuple(count_rows(*given).values()) == counts


def test_kinds(call: Call, files: tuple[Path, Path], pair_rows: Path, text_rows: Path, tmp_path: Path) -> None:
    code, _, err = call("data", "mix", files[0], pair_rows, "mixed")
    assert code == 2 and "different kinds" in err and "--to messages" in err
    code, out, _ = call("data", "mix", files[0], pair_rows, "mixed", "--to", "messages")
    assert code == 0 and "Next: smolmlx data inspect mixed/train.jsonl" in out
    code, _, err = call("data", "mix", files[0], text_rows, "other")
    assert code == 2 and "different kinds" in err and not (tmp_path / "other").exists()


def test_what_is_refused(call: Call, files: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = files
    for words, said in (
        ((f"{a}=lots", b), "expected a number behind ="),
        ((f"{a}=0", b), "above 0"),
        ((a, a), "named twice"),
        ((a,), "two inputs or more"),
    ):
        code, _, err = call("data", "mix", *words, "mixed")
        assert code == 2 and said in err
    code, _, err = call("data", "mix", a, tmp_path / "none.jsonl", "mixed")
    assert code == 4 and "none.jsonl" in err
    write(tmp_path / "train.jsonl", [{"prompt": "mine", "completion": "mine"}])
    code, _, err = call("data", "mix", a, b, ".")
    assert code == 2 and "not written by `smolmlx data mix`" in err
    code, _, err = call("data", "mix", a, tmp_path / "train.jsonl", ".")
    assert code == 2 and "overwrite one of its sources" in err
