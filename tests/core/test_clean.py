"""Each filter drops what it is named for, and nothing that only looks like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smolmlx.data import clean
from smolmlx.data.clean import Filters, Tally, clean_rows, find_fault, json_line, prepare, row_hash, stops_mid_sentence
from smolmlx.data.formats import Example, open_source
from smolmlx.errors import DataError, RecipeError, RunError

Row = dict[str, Any]

SENTENCES = "The reef grows slowly. It feeds on light. Fish hide in it. Storms break it. It grows back in a few years. "
PARAGRAPHS = SENTENCES * 5


def chat(*turns: str) -> Example:
    """A conversation from `role: content` lines."""
    pairs = [turn.split(":", 1) for turn in turns]
    return Example("rows:1", tuple({"role": role, "content": content.strip()} for role, content in pairs))


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("reason", "example"),
    [
        (clean.EMPTY_TURN, chat("user: hi", "assistant:  ")),
        (clean.EMPTY_TURN, chat("user:", "assistant: hello")),
        (clean.BAD_ORDER, chat("assistant: hello", "user: hi", "assistant: bye")),
        (clean.BAD_ORDER, chat("user: hi", "user: there", "assistant: hello")),
        (clean.BAD_ORDER, chat("user: hi", "assistant: hello", "assistant: hello")),
        (clean.BAD_ORDER, chat("user: hi", "system: be kind", "assistant: hello")),
        (clean.NO_ANSWER, chat("system: be kind", "user: hi")),
        (clean.TOO_SHORT, chat("user: hi", "assistant: yes")),
        (clean.TOO_LONG, chat("user: " + "hi " * 50, "assistant: yes, it is")),
        (clean.REPEATED, chat("user: is it hot?", "assistant: it is hot " + "!" * 41)),
        (clean.TRUNCATED, chat("user: write a loop", "assistant: Here it is:\n```python\nfor i in range(3):\n    pri")),
        (clean.TOO_SHORT, Example("rows:1", text="  \n ")),
    ],
)
def test_each_reason_is_found(reason: str, example: Example) -> None:
    assert find_fault(example, Filters(min_chars=8, max_chars=100)) == reason


@pytest.mark.parametrize("answer", ["null", "None", "n/a", "nan", "NULL", "0", "no", "-", "はい", "42", "Yes", "[]"])
def test_legitimate_words_survive(answer: str) -> None:
    assert find_fault(chat("user: what is missing?", f"assistant: {answer}"), Filters()) is None


@pytest.mark.parametrize(
    "example",
    [
        chat("system: be kind", "user: hi", "assistant: hello", "user: bye"),
        chat("user: weather?", "assistant: let me look", "tool: 21 C", "tool: dry", "assistant: 21 C and dry"),
        Example("rows:1", ({"role": "user", "content": "weather?"}, {"role": "assistant", "tool_calls": [{"id": 1}]})),
        Example("rows:1", text="a document may end anywhere, and"),
        chat("user: draw", "assistant: Title\n" + "=" * 120 + "\n| a |\n|" + "-" * 100 + "|"),
        chat("user: how much?", "assistant: 10,000,000,000,000 or 10000000000000"),
    ],
)
def test_rows_that_only_look_odd_survive(example: Example) -> None:
    assert find_fault(example, Filters()) is None


@pytest.mark.parametrize(
    "answer",
    [
        PARAGRAPHS + "However, the frescoes also show a furth",
        PARAGRAPHS + "Despite her challenging circumstances, she",
        SENTENCES + "The colony is older than the town, the harbour and the",
        SENTENCES + "\nThe three that matter are the reef, the lagoon,",
        "Run it:\n\n```python\nprint('hello')\n",
    ],
)
def test_answers_that_break_off_are_found(answer: str) -> None:
    assert stops_mid_sentence(answer)


@pytest.mark.parametrize(
    "answer",
    [
        PARAGRAPHS,
        PARAGRAPHS + "The answer is 42",
        PARAGRAPHS + "\n\n- first point\n- second point without a stop",
        PARAGRAPHS + "\n\nKind regards,",
        PARAGRAPHS + "\n\nBest,\nMaria",
        PARAGRAPHS + "\n\n| reef | years |\n|---|---|\n| north | twelve |",
        PARAGRAPHS + "\n\n```python\nx = [1,\n```",
        "ok sir. the order will be ready soon. you can pick it up at the bar. have a nice day",
        "yes, that is what we were waiting for, so send it over to",
        "这座珊瑚礁生长得很慢。它以光为食。" * 20 + "鱼",
        "Sure thing!",
        "",
    ],
)
def test_answers_that_end_in_their_own_way_are_not(answer: str) -> None:
    assert not stops_mid_sentence(answer)


@pytest.mark.parametrize("longest", [2, 3, 7, 40])
def test_a_run_is_found_wherever_it_stands(longest: int) -> None:
    for before in range(2 * longest + 3):
        for character, allowed in (("a", longest), ("é", longest), ("-", 4 * longest)):
            ask = "user: " + "xy" * before
            for length, fault in ((allowed, None), (allowed + 1, clean.REPEATED)):
                row = chat(f"{ask}{character * length}z", "assistant: yes")
                assert find_fault(row, Filters(max_run=longest)) == fault, (before, character, length)


def test_a_pair_is_checked_on_both_sides_but_only_the_chosen_answer_must_end_well() -> None:
    ask = ({"role": "user", "content": "What is a reef?"},)
    good, cut = (
        {"role": "assistant", "content": text} for text in (PARAGRAPHS, PARAGRAPHS + "It also feeds the fish of")
    )
    assert find_fault(Example("r", ask, None, (good,), (cut,)), Filters()) is None
    assert find_fault(Example("r", ask, None, (cut,), (good,)), Filters()) == clean.TRUNCATED
    assert find_fault(Example("r", ask, None, (good,), (good,)), Filters()) == clean.SAME_PAIR
    assert (
        find_fault(Example("r", ask, None, (good,), ({"role": "assistant", "content": ""},)), Filters())
        == clean.EMPTY_TURN
    )


def test_duplicates_are_known_by_words_roles_and_calls() -> None:
    row = chat("user: Hello  there", "assistant: Hi")
    assert row_hash(row) == row_hash(chat("user: hello\nthere ", "assistant: hi"))
    assert row_hash(row) != row_hash(chat("user: Hello", "assistant: there Hi"))
    called = [{"role": "assistant", "content": "", "tool_calls": [{"name": name}]} for name in ("add", "sub")]
    assert row_hash(Example("r", (called[0],))) != row_hash(Example("r", (called[1],)))


def test_rows_are_counted_once_and_the_first_place_is_named(tmp_path: Path) -> None:
    rows: list[Row] = [{"instruction": "say a", "input": "", "output": "null"}]
    rows += [{"instruction": "SAY  A", "input": "", "output": "Null"}, {"instruction": "x", "input": "", "output": ""}]
    rows += [{"instruction": "y", "input": "", "output": ""}, {"instruction": "no answer"}]
    path = write(tmp_path / "rows.jsonl", rows)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write('{"instruction": oops\n')
    tally = Tally()
    kept = [example.messages[1]["content"] for _, example in clean_rows(open_source(path), Filters(), tally)]
    assert kept == ["null"]
    assert tally.reasons == {clean.DUPLICATE: 1, clean.EMPTY_TURN: 2, clean.UNREADABLE: 2}
    assert tally.rows == tally.kept + sum(tally.reasons.values()) == 6
    assert tally.first[clean.EMPTY_TURN] == f"{path}:3"
    assert tally.first[clean.UNREADABLE].startswith(f"{path}:5: missing field 'output'")


def test_prepare_writes_one_layout_and_keeps_other_columns(tmp_path: Path) -> None:
    target = tmp_path / "out" / "clean.jsonl"
    path = write(
        tmp_path / "rows.jsonl", [{"id": 7, "topic": "reef", "instruction": "a?", "input": "b", "output": "c"}]
    )
    assert prepare(open_source(path), target, Filters()).kept == 1
    turns = [{"role": "user", "content": "a?\n\nb"}, {"role": "assistant", "content": "c"}]
    assert read(target) == [{"id": 7, "topic": "reef", "messages": turns}]
    again = tmp_path / "again.jsonl"
    prepare(open_source(str(target)), again, Filters())
    assert read(again) == read(target)


def test_preference_rows_can_give_chats(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a?", "chosen": "good", "rejected": "bad", "id": 1}])
    ask, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "good"), ("assistant", "bad"))
    )
    prepare(open_source(path), tmp_path / "pairs.jsonl", Filters())
    assert read(tmp_path / "pairs.jsonl") == [{"id": 1, "prompt": [ask], "chosen": [good], "rejected": [bad]}]
    prepare(open_source(path), tmp_path / "chats.jsonl", Filters(), "messages")
    assert read(tmp_path / "chats.jsonl") == [{"id": 1, "messages": [ask, good]}]
    with pytest.raises(RecipeError, match=r"can be written as preference or messages, not as text"):
        prepare(open_source(path), tmp_path / "text.jsonl", Filters(), "text")


def test_prepare_writes_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "clean.jsonl"
    target.write_text("as it was")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match=r"no row is left of 1.*\n  empty turn: 1, first .*rows\.jsonl:1"):
        prepare(open_source(path), target, Filters())
    assert target.read_text() == "as it was" and sorted(p.name for p in tmp_path.iterdir()) == [
        "clean.jsonl",
        "rows.jsonl",
    ]
    with pytest.raises(RunError, match="cannot write"):
        prepare(open_source(write(tmp_path / "b.jsonl", [{"text": "a"}])), target / "below.jsonl", Filters())


def test_duplicates_and_truncated_ends_can_be_kept(tmp_path: Path) -> None:
    row = {"prompt": "write", "completion": "```\nx = 1"}
    source = open_source(write(tmp_path / "rows.jsonl", [row, row]))
    tally = Tally()
    assert len(list(clean_rows(source, Filters(keep_truncated=True, keep_duplicates=True), tally))) == 2


def test_values_json_has_no_form_for_are_named() -> None:
    with pytest.raises(DataError, match=r"rows:3: cannot be written as JSON: a value of type bytes"):
        json_line({"image": b"\x00"}, "rows:3")
