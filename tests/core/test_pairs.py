"""Rule-made preference pairs: one flaw each, the chosen answer's length, and no held-out rows unless asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smolmlx.data.formats import open_source
from smolmlx.evals.notes import strict_compliance
from smolmlx.synth.flaws import MAX_GAP, find_flaws, gap

Call = Callable[..., tuple[int, str, str]]
NOTES = Path(__file__).parents[2] / "data" / "notes"


def test_pairs_have_one_flaw_and_one_length(call: Call, tmp_path: Path) -> None:
    for name in ("one", "two"):
        code, _, err = call("data", "pairs", NOTES, tmp_path / name, "--counts", "0,20")
        assert code == 0, err
    text = (tmp_path / "one" / "validation.jsonl").read_bytes()
    assert text == (tmp_path / "two" / "validation.jsonl").read_bytes()
    assert open_source(str(tmp_path / "one" / "validation.jsonl")).form.name == "preference"
    rows = [json.loads(line) for line in text.decode().split("\n") if line]
    assert len(rows) == 20 and len({row["topic"] for row in rows}) == 8
    for row in rows:
        assert strict_compliance(row["chosen"]).passed
        assert find_flaws(row["prompt"], row["chosen"], row["rejected"]) == set(row["issues"])
        assert abs(gap(row["chosen"], row["rejected"])) < MAX_GAP


def test_flaws_are_dealt_evenly(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("data", "pairs", NOTES, tmp_path / "pairs", "--json")
    files = json.loads(out)["files"]
    assert code == 0 and {name: file["pairs"] for name, file in files.items()} == {"train": 258, "validation": 42}
    for file in files.values():
        counts = file["issues"].values()
        # A fourth bullet needs words that a note leaves out, or another note on its concept: train has one row of each.
        assert len(counts) == 5 and min(counts) >= 0.12 * sum(counts) and max(counts) <= 0.25 * sum(counts)
        assert file["mean_word_gap"] < 0.01


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "a", "topic": "data"}', "missing field 'output'"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 40,
            "rows.jsonl: 40 rows with columns prompt, chosen, rejected, not rows of the notes task, whose fields "
            "data/notes/README.md names. Pairs that are ready (prompt, chosen, rejected) need no command",
        ),
        ("", "holds no rows"),
        ('{"task": "qa", "chunk": "a:0", "prompt_version": "x"}', "rows of `smolmlx data augment`, not notes rows"),
    ],
)
def test_rows_that_are_no_notes_exit_4(call: Call, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line, encoding="utf-8")
    code, _, err = call("data", "pairs", tmp_path / "rows.jsonl", tmp_path / "out")
    assert code == 4 and said in err and not (tmp_path / "out").exists()


def test_what_is_replaced_is_said(call: Call, tmp_path: Path) -> None:
    pairs = ("data", "pairs", NOTES, tmp_path / "pairs", "--counts")
    assert "replaces" not in call(*pairs, "6,4")[2]
    code, _, err = call(*pairs, "2,1")
    assert code == 0 and f"replaces 10 pairs in {tmp_path / 'pairs'}\n" in err
    split = ("data", "split", NOTES / "validation.jsonl", tmp_path / "split", "--seed")
    assert "replaces" not in call(*split, 0)[2]
    code, _, err = call(*split, 1)
    assert code == 0 and f"replaces 75 rows in {tmp_path / 'split'}\n" in err


def test_words_that_are_missing_or_name_nothing(call: Call) -> None:
    code, _, err = call("data", "pairs", NOTES)
    assert code == 2 and f"Missing argument 'OUT_DIR', the folder to write: smolmlx data pairs {NOTES} OUT_DIR" in err
    code, _, err = call("data", "pairs", "data/note", "out")
    assert code == 4 and "data/note: no such file or folder. Check the path." in err and ":0:" not in err


def test_held_out_rows_need_a_flag(call: Call, tmp_path: Path) -> None:
    code, _, err = call("data", "pairs", NOTES / "test.jsonl", tmp_path / "out", "--counts", "1,0")
    assert code == 4 and "--allow-test" in err and not (tmp_path / "out").exists()
