"""Rows that come and go while others run, each decoded in its own way: what the server stands on."""

from __future__ import annotations

import pytest

from lab import Lab, sentence
from smolmlx import backend
from smolmlx.backend import Decoding, OneOf, Regex
from smolmlx.generation.row import Row

NEVER = (319,)


@pytest.fixture
def generator(lab: Lab) -> backend.Generator:
    return lab.generator(lab.plan())


@pytest.fixture
def asked(lab: Lab) -> list[tuple[list[int], Decoding]]:
    """Fourteen prompts with fourteen ways to decode."""
    tokenizer = lab.plan().tokenizer
    hows: list[Decoding] = []
    for i in range(14):
        changes: dict[str, object] = {"max_tokens": 5 + 7 * (i % 4), "seed": i}
        changes |= [
            {},
            {"temperature": 1.0},
            {"temperature": 1.0, "top_k": 7},
            {"schema": Regex("[a-e]{3,9}"), "temperature": 0.7},
            {"repetition_penalty": 1.5},
            {"schema": OneOf(("red", "green river"))},
            {"no_repeat_ngram": 1, "temperature": 0.3, "top_p": 0.8},
        ][i % 7]
        hows.append(Decoding(**changes))  # type: ignore[arg-type]
    return [(tokenizer.encode(sentence(3 * i)), how) for i, how in enumerate(hows)]


def alone(generator: backend.Generator, asked: list[tuple[list[int], Decoding]]) -> list[tuple[int, ...]]:
    found = []
    for index, (prompt, how) in enumerate(asked):
        batcher = generator.batcher(1)
        (row,) = batcher.run([batcher.make_row(index, prompt, how)])
        found.append(row.completion().ids)
    return found


@pytest.mark.parametrize("size", [2, 6, 32])
def test_rows_that_come_later_change_nothing(
    generator: backend.Generator, asked: list[tuple[list[int], Decoding]], size: int
) -> None:
    batcher = generator.batcher(size)
    rows = [batcher.make_row(index, prompt, how) for index, (prompt, how) in enumerate(asked)]
    waiting, calls = rows[3:], [0]

    def more() -> list[Row]:
        calls[0] += 1
        return [waiting.pop(0)] if waiting and calls[0] % 3 == 0 else []

    done = list(batcher.run(rows[:3], more))
    # A server's loop ends when nothing runs; what came since begins the next one.
    while waiting:
        done += batcher.run([waiting.pop(0)], more)
    found = {row.index: row.completion().ids for row in done}
    assert [found[i] for i in range(len(rows))] == alone(generator, asked)


def test_a_cancelled_row_leaves_the_others(
    generator: backend.Generator, asked: list[tuple[list[int], Decoding]]
) -> None:
    batcher = generator.batcher(8)
    long = [(prompt, Decoding(max_tokens=30, stop_ids=NEVER)) for prompt, _ in asked[:4]]
    rows = [batcher.make_row(index, prompt, how) for index, (prompt, how) in enumerate(long)]
    calls = [0]

    def more() -> list[Row]:
        calls[0] += 1
        if calls[0] == 10:
            rows[1].cancel()
        return []

    found = {row.index: row.completion() for row in batcher.run(rows, more)}
    assert len(found[1].ids) < 15 and not found[1].finished
    wanted = alone(generator, long)
    assert [found[i].ids for i in (0, 2, 3)] == [wanted[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("method", ["start", "take", "allowed"])
def test_a_row_that_fails_leaves_the_others(
    generator: backend.Generator,
    asked: list[tuple[list[int], Decoding]],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("broken")

    batcher = generator.batcher(8)
    rows = [batcher.make_row(index, prompt, how) for index, (prompt, how) in enumerate(asked[:4])]
    monkeypatch.setattr(rows[1], method, fail)
    found = {row.index: row for row in batcher.run(rows)}
    with pytest.raises(ValueError, match="broken"):
        found[1].completion()
    wanted = alone(generator, asked[:4])
    assert [found[i].completion().ids for i in (0, 2, 3)] == [wanted[i] for i in (0, 2, 3)]
