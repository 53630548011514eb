"""What a judge's replies come to: ties that cost nothing, costs that nobody knows, replies that are no judgement, groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import lab as labs
from judge_server import GOOD, serve, write_rows
from run_folders import make_run
from smolmlx.backend import Completion, Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.evals.judge import DIMENSIONS, Choice, Item, Marks, Question, Record, parse_reply, questions, summarise
from smolmlx.evals.judging import Ledger, LocalJudge, run

pytest.importorskip("openai", reason="openai is not installed")


def completion(text: str, **fields: Any) -> bytes:
    """Return a body with an end, and with what it took where `usage` is given."""
    choice = {"message": {"content": text}, "finish_reason": fields.pop("finish_reason", "stop")}
    return json.dumps({"choices": [choice], **fields}).encode()


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(call: Any, tmp_path: Path) -> None:
    mine, other = write_rows(tmp_path / "a.jsonl", 3), write_rows(tmp_path / "b.jsonl", 3)
    other.write_text(other.read_text().replace("answer 2", "another answer"))
    copy = write_rows(tmp_path / "c.jsonl", 3)
    words = ("judge", mine, "--pairwise", other, "--price", "1", "1")
    with serve(lambda prompt, times: json.dumps({"winner": "tie"})) as (url, server):
        code, out, _ = call(*words, "--judge", url, "--json")
        (found,) = json.loads(out)["judges"]
        assert code == 0 and sum(server.paid.values()) == 2, "one pair in two orders"
        assert (found["wins"], found["losses"], found["ties"], found["scored"]) == (0, 0, 3, 3)
        assert (found["equal_answers"], found["replies"], found["prompt_tokens"]) == (2, 2, 200)
        _, out, _ = call(*words, "--judge", url, "--resume")
        assert "equal answers" in out and "2, ties without being asked about" in out
        code, out, _ = call("judge", mine, "--pairwise", copy, "--judge", url, "--out", tmp_path / "same", "--json")
        (found,) = json.loads(out)["judges"]
        assert code == 0 and (found["ties"], found["scored"], found["prompt_tokens"]) == (3, 3, 0)
        assert "orders_agree" not in found and sum(server.paid.values()) == 2
        code, _, err = call("judge", mine, "--pairwise", mine, "--judge", url)
        assert code == 2 and "the same answers twice. Pass --other-system, or another file." in err


def test_the_two_orders_of_a_pair_are_two_questions() -> None:
    pair = Item("r", "q", "", "same", "same")
    assert Question(pair, "j").key != Question(pair, "j", swapped=True).key


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": 5}}], ids=str)
def test_a_cost_that_the_server_does_not_tell_is_unknown(call: Any, tmp_path: Path, usage: dict[str, Any]) -> None:
    def answer(prompt: str, times: int) -> Any:
        return completion(json.dumps(GOOD), **usage) if "question 1\n" in prompt else json.dumps(GOOD)

    words = ("judge", write_rows(tmp_path / "a.jsonl", 3), "--price", "1", "1")
    with serve(answer) as (url, _):
        code, out, _ = call(*words, "--judge", url, "--json")
        (found,) = json.loads(out)["judges"]
        assert code == 0 and (found["scored"], found["without_usage"], found["cost"]) == (3, 1, None)
        _, out, _ = call(*words, "--judge", url, "--resume")
    assert "unknown: 1 reply came without usage" in out and "$" not in out


def test_a_price_is_for_judges_at_addresses(call: Any, tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", 1)
    code, _, err = call("judge", rows, "--judge", tiny_model, "--price", "1", "2")
    assert code == 2 and f"--price: for a judge at an address, and {tiny_model} is none." in err
    if reason := labs.why_missing("mlx"):
        pytest.skip(reason)
    with serve(lambda *asked: json.dumps(GOOD)) as (url, _):
        local = ("--judge", tiny_model, "--backend", "mlx", "--device", "cpu")
        code, out, _ = call("judge", rows, *local, "--judge", url, "--price", "1", "2", "--json")
    assert code == 0 and [found["cost"] for found in json.loads(out)["judges"]] == [None, 120 / 1e6]


DRAFT = json.dumps(dict.fromkeys(DIMENSIONS, 1))
NO_MARKS = [
    f"<think>Perhaps {DRAFT}",
    f"<think>a</think><think>Perhaps {DRAFT}",
    f"<think>Perhaps {DRAFT}</think> I cannot say.",
    '{"relevance": 1, ' + json.dumps(GOOD)[1:],
    json.dumps(GOOD)[:-1] + ', "reason": "on second thought"}',
]


@pytest.mark.parametrize("text", NO_MARKS, ids=str)
def test_drafts_and_repeated_keys_are_no_marks(text: str) -> None:
    assert parse_reply(text, Marks) is None


def test_a_repeated_winner_is_no_choice_and_ended_thoughts_do_no_harm() -> None:
    assert parse_reply('{"winner": "first", "winner": "second"}', Choice) is None
    assert parse_reply(f"<think>Hm.</think> {json.dumps(GOOD)}", Marks) == GOOD


def test_a_reply_that_was_cut_is_nonsense(call: Any, tmp_path: Path) -> None:
    def answer(prompt: str, times: int) -> bytes:
        end = "length" if "question 1\n" in prompt else "stop"
        return completion(json.dumps(GOOD) + " but", finish_reason=end)

    with serve(answer) as (url, server):
        code, out, _ = call("judge", write_rows(tmp_path / "a.jsonl", 3), "--judge", url, "--json")
    (found,) = json.loads(out)["judges"]
    assert code == 0 and (found["scored"], found["nonsense"]) == (2, 1)
    assert sum(server.asked.values()) == 5, "asked again as other nonsense is"


class Talker:
    """A generator whose answer has marks, and no end."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        yield Completion(0, (1,) * how.max_tokens, False, json.dumps(GOOD) + " but")


def test_a_local_reply_that_was_cut_is_nonsense(tmp_path: Path, tiny_model: Path) -> None:
    local, items = LocalJudge("local", cast(Generator, Talker()), Tokenizer(tiny_model)), [Item("r", "q", "", "a")]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run(local, questions(items, "local"), ledger)
    found = summarise(list(ledger.records.values()), "local", items)
    assert (found["scored"], found["nonsense"]) == (0, 1)


def test_rows_of_a_group_are_resampled_together(call: Any, tmp_path: Path) -> None:
    """Four rows that always get one mark are worth one row: the interval widens."""
    path = write_rows(tmp_path / "a.jsonl", 24)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    grouped = tmp_path / "grouped.jsonl"
    grouped.write_text("".join(json.dumps({**row, "group": f"g{i // 4}"}) + "\n" for i, row in enumerate(rows)))

    def answer(prompt: str, times: int) -> str:
        number = int(prompt.partition("question ")[2].partition("\n")[0])
        return json.dumps({**GOOD, "relevance": 1 + 4 * (number // 4 % 2)})

    with serve(answer) as (url, _):
        alone, together = (json.loads(call("judge", one, "--judge", url, "--json")[1])["judges"][0] for one in (path, grouped))  # fmt: skip
        _, out, _ = call("judge", grouped, "--judge", url, "--resume")
    assert (alone["groups"], together["groups"], together["scored"]) == (0, 6, 24) and "24 in 6 groups" in out
    first, second = (found["means"]["relevance"] for found in (alone, together))
    assert first["mean"] == second["mean"] == 3
    assert second["high"] - second["low"] > 1.5 * (first["high"] - first["low"])


def test_pairs_of_a_group_are_resampled_together() -> None:
    items = [Item(f"r{i}", "q", "", "a", "b", f"g{i // 4}") for i in range(24)]
    records = [
        Record(f"{i}{swapped}", f"r{i}", "j", swapped, {"winner": "second" if swapped ^ (i // 4 % 2) else "first"})
        for i in range(24)
        for swapped in (False, True)
    ]
    together = summarise(records, "j", items)
    assert (together["scored"], together["groups"], together["wins"], together["losses"]) == (24, 6, 12, 12)
    alone = summarise(records, "j", [Item(item.id, "q", "", "a", "b") for item in items])
    first, second = (found["win_minus_loss"] for found in (alone, together))
    assert second["high"] - second["low"] > 1.5 * (first["high"] - first["low"])


def test_the_notes_suite_writes_the_group_that_judges_resample(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=12) / "eval"
    scored = json.loads((folder / "results.json").read_text())["sets"]["test"]["rows"]
    written = [json.loads(line) for line in (folder / "test-answers.jsonl").read_text().splitlines()]
    assert {row["id"]: row["group"] for row in written} == {row["id"]: row["group"] for row in scored["base"]}
    assert all(row["group"] for row in written)


def test_a_quota_that_is_used_up_stops_at_once(call: Any, tmp_path: Path) -> None:
    used_up = (429, {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}})
    rows = write_rows(tmp_path / "a.jsonl", 6)
    with serve(lambda prompt, times: used_up if "question 2\n" in prompt else json.dumps(GOOD)) as (url, server):
        words = ("judge", rows, "--judge", url, "--concurrency", "1", "--retries", "3")
        code, _, err = call(*words)
        assert code == 3 and f"--judge {url}: the quota is used up. Go on with --resume" in err
        assert list(server.asked.values()) == [1, 1, 1], "neither this question nor another one is asked again"
        server.answer = lambda prompt, times: json.dumps(GOOD)
        assert call(*words, "--resume")[0] == 0 and sum(server.paid.values()) == 6


def test_a_local_judge_leaves_no_thread_to_abort_the_process(tmp_path: Path, tiny_model: Path) -> None:
    """MLX ends a process whose other threads used it with SIGABRT, after all results were written."""
    if reason := labs.why_missing("mlx"):
        pytest.skip(reason)
    rows = write_rows(tmp_path / "a.jsonl", 1)
    words = ("judge", rows, "--judge", tiny_model, "--backend", "mlx", "--device", "cpu", "--json")
    code = "from smolmlx.cli import main; main()"
    child = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ})
    assert child.returncode == 1 and "nothing is scored" in child.stderr, child.stderr
    assert json.loads(child.stdout)["judges"][0]["replies"] == 1


def test_a_misspelt_system_is_one_line(call: Any, tmp_path: Path) -> None:
    rows = tmp_path / "a.jsonl"
    row = {"input": "q", "answers": {"base": "a", "sft": "b"}}
    rows.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n in range(30)))
    code, _, err = call("judge", rows, "--system", "stf", "--judge", "http://127.0.0.1:9/v1")
    assert code == 2 and err.count("\n") == 1
    assert f"{rows}: no system 'stf'. Did you mean 'sft'? There are: base, sft." in err
