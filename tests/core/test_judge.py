"""The judge against a real local server that fails in every way a server does, and killed in the middle of its work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lab as labs
from judge_server import GOOD, serve, write_rows
from smolmlx import cli
from smolmlx.backend import Completion, Decoding, Generator
from smolmlx.data.chat import Tokenizer
from smolmlx.evals import judging
from smolmlx.evals.judge import (
    DIMENSIONS,
    Choice,
    Item,
    Marks,
    Question,
    Record,
    agreement,
    parse_reply,
    questions,
    summarise,
)
from smolmlx.evals.judging import Ledger, LocalJudge, run

pytest.importorskip("openai", reason="openai is not installed")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smolmlx", "judge", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_faults_are_overcome_and_everything_is_counted(judge: Any, tmp_path: Path) -> None:
    faults: dict[str, list[Any]] = {
        "question 0": [500, 429],
        "question 1": [None],
        "question 2": [503, None, 429],
        "question 3": ["no idea"],
    }

    def answer(prompt: str, times: int) -> Any:
        time.sleep(0.02)  # so that requests overlap
        planned = next((f for key, f in faults.items() if f"{key}\n" in prompt), [])
        return planned[times - 1] if 0 < times <= len(planned) else json.dumps(GOOD)

    with serve(answer) as (url, server):
        code, out, _ = judge(write_rows(tmp_path / "a.jsonl", 12), "--judge", url, "--price", "1", "2", "--json")
    (found,) = json.loads(out)["judges"]
    assert code == 0 and found["judge"] == f"tiny-judge at {url}"
    assert (found["scored"], found["nonsense"], found["failed"]) == (12, 0, 0)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (1300, 130), "the nonsense reply was paid for, too"
    assert found["cost"] == pytest.approx((1300 + 2 * 130) / 1e6)
    means = {name: value["mean"] for name, value in found["means"].items()}
    assert means == {**{name: GOOD[name] for name in DIMENSIONS}, "overall": 3.5}
    assert 1 < server.most_busy <= 4
    assert all(body["response_format"]["type"] == "json_schema" and body["temperature"] == 0 for body in server.bodies)


@pytest.mark.parametrize("nonsense", ["", "I like it!", '{"faithfulness": 5}', json.dumps({**GOOD, "relevance": 7}), json.dumps({**GOOD, "relevance": "5"}), '{"faithfulness": 5,'])  # fmt: skip
def test_nonsense_is_reported_and_never_scored(judge: Any, tmp_path: Path, nonsense: str) -> None:
    with serve(lambda prompt, times: nonsense if "question 1\n" in prompt else json.dumps(GOOD)) as (url, server):
        code, out, _ = judge(write_rows(tmp_path / "a.jsonl", 3), "--judge", url, "--json")
        (found,) = json.loads(out)["judges"]
        assert code == 0 and (found["scored"], found["nonsense"]) == (2, 1)
        assert found["means"]["overall"]["mean"] == 3.5
        assert max(server.paid.values()) == 3
        judge(tmp_path / "a.jsonl", "--judge", url, "--resume")
        assert sum(server.paid.values()) == 5, "nothing is asked again, nonsense neither"


def test_nonsense_is_written_down_as_it_is_paid_for(judge: Any, tmp_path: Path) -> None:
    rows, ledger = write_rows(tmp_path / "a.jsonl", 1), tmp_path / "a-judged" / "ledger.jsonl"
    written: list[int] = []

    def answer(prompt: str, times: int) -> Any:
        written.append(ledger.read_text().count("\n") if ledger.exists() else 0)
        return "no idea" if times != 2 else 401  # stopped after the first reply

    with serve(answer) as (url, server):
        assert judge(rows, "--judge", url)[0] == 3
        code, out, err = judge(rows, "--judge", url, "--resume", "--json")
        (found,) = json.loads(out)["judges"]
        assert code == 1 and (found["nonsense"], found["prompt_tokens"]) == (1, 300)
        assert f"nothing is scored: no reply was in the form asked for. What was said is in {ledger}" in err
        assert sum(server.paid.values()) == 3 and written == [0, 1, 1, 2]


def test_a_second_process_is_kept_out_of_the_ledger(judge: Any, tmp_path: Path) -> None:
    rows, path = write_rows(tmp_path / "a.jsonl", 1), tmp_path / "a-judged" / "ledger.jsonl"
    with serve(lambda *asked: json.dumps(GOOD)) as (url, server):
        with judging.open_ledger(path):
            code, _, err = judge(rows, "--judge", url, "--resume")
            assert code == 1 and f"{path}: another process" in err and not server.asked
        assert judge(rows, "--judge", url, "--resume")[0] == 0


def test_two_servers_of_one_model_are_two_judges(judge: Any, tmp_path: Path) -> None:
    ones, fives = ({**dict.fromkeys(DIMENSIONS, mark), "reason": ""} for mark in (1, 5))
    rows = write_rows(tmp_path / "a.jsonl", 2)
    with serve(lambda *asked: json.dumps(fives)) as (first, _), serve(lambda *asked: json.dumps(ones)) as (second, low):
        words = (rows, "--judge", first, "--judge", second, "--model", "same")
        code, out, _ = judge(*words, "--json")
        found = json.loads(out)
        assert code == 0 and [j["means"]["overall"]["mean"] for j in found["judges"]] == [5, 1]
        assert found["agreement"][0]["equal"] == found["agreement"][0]["within_1"] == 0 and len(low.paid) == 2
        code, _, _ = judge(*words, "--resume")
        assert code == 0 and sum(low.paid.values()) == 2, "the ledger of each goes on"


def test_a_judge_is_not_held_against_itself(judge: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", 2)
    with serve(lambda *asked: json.dumps(GOOD)) as (url, server):
        code, _, err = judge(rows, "--judge", url, "--judge", f"{url}/")
        assert code == 2 and f"tiny-judge at {url}" in err and not server.asked
        code, _, err = judge(rows, "--judge", url, "--model", "a", "--model", "b")
        assert code == 2 and "2 models for 1 address." in err
        code, out, _ = judge(rows, "--judge", url, "--judge", url, "--model", "a", "--model", "b", "--json")
        assert code == 0 and json.loads(out)["agreement"][0]["judges"] == [f"a at {url}", f"b at {url}"]
    assert {body["model"] for body in server.bodies} == {"a", "b"}


def test_what_got_no_reply_is_asked_again_on_resume(judge: Any, tmp_path: Path) -> None:
    broken = True
    rows = write_rows(tmp_path / "a.jsonl", 4)
    with serve(lambda prompt, times: 500 if broken and "question 2\n" in prompt else json.dumps(GOOD)) as (url, server):
        code, _, err = judge(rows, "--judge", url, "--retries", "1")
        assert code == 1 and "1 of 4 questions got no reply" in err and "--resume" in err
        code, _, err = judge(rows, "--judge", url)
        assert code == 2 and "--resume" in err
        broken = False
        code, out, _ = judge(rows, "--judge", url, "--resume", "--json")
    assert code == 0 and json.loads(out)["judges"][0]["scored"] == 4
    assert set(server.paid.values()) == {1}


BAD_BODIES = [b"<html>busy</html>", b"[]", b"", b'{"choices": [{"mess', b'{"choices": [{"message": null}]}', b'{"choices": []}', b"\xff", b"[" * 9999, b'{"choices": [{"message": {"content": "{}"}}], "usage": {"prompt_tokens": Infinity}}']  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: body[:40].decode(errors="replace"))
def test_a_body_that_is_no_completion_is_asked_for_again(judge: Any, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(judging, "_FIRST_PAUSE", 0.01)
    rows = write_rows(tmp_path / "a.jsonl", 3)

    def answer(prompt: str, times: int) -> Any:
        return body if "question 1\n" in prompt or ("question 2\n" in prompt and times < 2) else json.dumps(GOOD)

    with serve(answer) as (url, server):
        code, out, err = judge(rows, "--judge", url, "--retries", "1", "--json")
    (found,) = json.loads(out)["judges"]
    assert code == 1 and "1 of 3 questions got no reply (reply is not a chat completion)" in err
    assert (found["scored"], found["failed"]) == (2, 1) and sorted(server.asked.values()) == [1, 2, 2]


def test_a_server_that_is_too_slow_gives_no_reply(judge: Any, tmp_path: Path) -> None:
    def answer(prompt: str, times: int) -> str:
        time.sleep(0.5 if "question 1\n" in prompt else 0)
        return json.dumps(GOOD)

    with serve(answer) as (url, _):
        code, _, err = judge(write_rows(tmp_path / "a.jsonl", 2), "--judge", url, "--timeout", "0.2", "--retries", "0")
    assert code == 1 and "1 of 2 questions got no reply (APITimeoutError" in err


@pytest.mark.parametrize("listed", [b"<html>", b"[]", b"{}", b'{"data": [1]}'], ids=str)
def test_a_list_of_models_that_cannot_be_read_is_one_clear_line(judge: Any, tmp_path: Path, listed: bytes) -> None:
    with serve(lambda *asked: json.dumps(GOOD)) as (url, server):
        server.models = listed
        code, _, err = judge(write_rows(tmp_path / "a.jsonl", 1), "--judge", url)
    assert code == 3 and "cannot be asked for its models" in err and "--model" in err


def test_a_bad_request_leaves_structured_replies_on(judge: Any, tmp_path: Path) -> None:
    with serve(lambda prompt, times: 400 if "question 0\n" in prompt else json.dumps(GOOD)) as (url, server):
        code, _, err = judge(write_rows(tmp_path / "a.jsonl", 3), "--judge", url, "--concurrency", "1")
    assert code == 1 and "1 of 3 questions got no reply (BadRequestError" in err
    assert ["response_format" in body for body in server.bodies] == [True, False, True, True]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_structured_replies_is_asked_in_words(judge: Any, tmp_path: Path, status: int) -> None:
    with serve(lambda prompt, times: status if times >= 0 else f"Sure:\n```json\n{json.dumps(GOOD)}\n```") as (
        url,
        server,
    ):
        code, out, _ = judge(write_rows(tmp_path / "a.jsonl", 3), "--judge", url, "--json", "--concurrency", "1")
    assert code == 0 and json.loads(out)["judges"][0]["scored"] == 3
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False]


def test_a_refusal_stops_at_once_and_keeps_what_was_answered(judge: Any, tmp_path: Path) -> None:
    with serve(lambda prompt, times: 401 if "question 5\n" in prompt else json.dumps(GOOD)) as (url, server):
        code, _, err = judge(write_rows(tmp_path / "a.jsonl", 40), "--judge", url, "--concurrency", "2")
    assert code == 3 and "--key-from" in err
    ledger = (tmp_path / "a-judged" / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == sum(server.paid.values()) < 40


def test_no_server_is_one_clear_line(judge: Any, tmp_path: Path) -> None:
    code, _, err = judge(write_rows(tmp_path / "a.jsonl", 1), "--judge", "http://127.0.0.1:9/v1", "--retries", "0")
    assert code == 3 and "cannot be reached (" in err and "refused" in err and "Is the server running?" in err
    assert not (tmp_path / "a-judged").exists()


def test_a_killed_judge_goes_on_without_paying_twice(judge: Any, tmp_path: Path) -> None:
    def slow(prompt: str, times: int) -> str:
        time.sleep(0.05)
        return json.dumps(GOOD)

    rows, ledger = write_rows(tmp_path / "a.jsonl", 40), tmp_path / "a-judged" / "ledger.jsonl"
    with serve(slow) as (url, server):
        code = "from smolmlx.cli import main; main()"
        child = subprocess.Popen(
            [sys.executable, "-c", code, "judge", rows, "--judge", url], env={**os.environ}, stderr=subprocess.DEVNULL
        )
        while not ledger.exists() or ledger.read_text().count("\n") < 10:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        written = ledger.read_bytes()
        recorded = {json.loads(line)["id"] for line in written.decode().splitlines() if line.endswith("}")}
        assert 10 <= len(recorded) < 40
        ledger.write_bytes(written + b'{"key": "cut off')
        time.sleep(0.2)
        before = sum(server.paid.values())
        assert before - len(recorded) <= 4, "at most the requests in flight are lost"
        status, out, _ = judge(rows, "--judge", url, "--resume", "--json")
    assert status == 0 and json.loads(out)["judges"][0]["scored"] == 40
    assert sum(server.paid.values()) - before == 40 - len(recorded)
    assert all(
        count == 1 for prompt, count in server.paid.items() if any(f"question {i[1:]}\n" in prompt for i in recorded)
    )


def test_pairs_are_judged_in_both_orders(judge: Any, tmp_path: Path) -> None:
    def answer(prompt: str, times: int) -> str:
        first, second = prompt.partition("===== FIRST\n")[2].split("\n===== SECOND\n")
        if "question 0\n" in prompt:
            return json.dumps({"winner": "first"})  # always the first: the orders disagree
        return json.dumps({"winner": "first" if "better" in first else "second" if "better" in second else "tie"})

    mine = write_rows(tmp_path / "a.jsonl", 8, answer="better")
    other = write_rows(tmp_path / "b.jsonl", 8)
    with serve(answer) as (url, server):
        code, out, _ = judge(mine, "--pairwise", other, "--judge", url, "--json")
    (found,) = json.loads(out)["judges"]
    assert code == 0 and len(server.paid) == 16
    assert (found["wins"], found["losses"], found["ties"], found["scored"]) == (7, 0, 1, 8)
    assert found["orders_agree"] == 7 / 8 and found["win_minus_loss"]["mean"] == 7 / 8


def test_two_judges_of_pairs_agree_by_verdict(judge: Any, tmp_path: Path) -> None:
    def prefer(word: str, prompt: str) -> str:
        first = prompt.partition("===== FIRST\n")[2].partition("\n===== SECOND\n")[0]
        return json.dumps({"winner": "first" if word in first else "second"})

    mine, other = write_rows(tmp_path / "a.jsonl", 4, answer="long"), write_rows(tmp_path / "b.jsonl", 4, answer="short")  # fmt: skip
    words = (mine, "--pairwise", other)
    likes_long = serve(lambda prompt, times: prefer("long", prompt))
    likes_right_0 = serve(lambda prompt, times: prefer("long" if "question 0\n" in prompt else "short", prompt))
    with likes_long as (first, _), likes_right_0 as (second, _):
        code, out, _ = judge(*words, "--judge", first, "--judge", second, "--json")
        (found,) = json.loads(out)["agreement"]
        assert code == 0 and (found["rows"], found["equal"]) == (4, 0.25)
        _, out, _ = judge(*words, "--judge", first, "--judge", second, "--resume")
    assert "25% of verdicts equal, over 4 pairs" in out


def test_a_local_model_that_answers_nonsense_is_never_scored(judge: Any, tmp_path: Path, tiny_model: Path) -> None:
    """A model of random weights, through a real engine: nothing may turn what it writes into marks."""
    if reason := labs.why_missing("mlx"):
        pytest.skip(reason)
    rows = write_rows(tmp_path / "a.jsonl", 2)
    local = ("--judge", tiny_model, "--backend", "mlx", "--device", "cpu", "--json")
    code, out, _ = judge(rows, *local)
    (found,) = json.loads(out)["judges"]
    assert code == 1 and (found["scored"], found["nonsense"], found["failed"]) == (0, 2, 0)
    assert "means" not in found and found["completion_tokens"] > 0
    ledger = (tmp_path / "a-judged" / "ledger.jsonl").read_bytes()
    judge(rows, *local, "--resume")
    assert (tmp_path / "a-judged" / "ledger.jsonl").read_bytes() == ledger, "nothing is asked again"


class Reader:
    """A generator that reads its prompt: it prefers the answer that holds `better`, in either place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked = 0

    def generate(self, prompts: Sequence[Sequence[int]], how: Decoding) -> Iterator[Completion]:
        for index, prompt in enumerate(prompts):
            self.asked += 1
            text = self.tokenizer.decode(prompt)
            first, _, second = text.partition("===== FIRST\n")[2].partition("===== SECOND\n")
            if "===== FIRST" not in text:
                reply = json.dumps(GOOD)
            elif "unfair" in text:
                reply = json.dumps({"winner": "first"})
            else:
                reply = json.dumps(
                    {"winner": "first" if "better" in first else "second" if "better" in second else "tie"}
                )
            yield Completion(index, tuple(self.tokenizer.encode(reply)), True, reply)


def test_a_local_judge_marks_and_compares_in_both_orders(tmp_path: Path, tiny_model: Path) -> None:
    reader = Reader(Tokenizer(tiny_model))
    judged = LocalJudge("local", cast(Generator, reader), reader.tokenizer)
    items = [Item(f"r{i}", f"question {i}", "", "better", "other") for i in range(6)]
    items.append(Item("r6", "unfair", "", "one", "two"))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run(judged, questions(items, "local"), ledger)
    found = summarise(list(ledger.records.values()), "local", items)
    assert (found["wins"], found["losses"], found["ties"]) == (6, 0, 1) and found["orders_agree"] == 6 / 7
    run(judged, questions(items, "local"), Ledger(tmp_path / "ledger.jsonl"))
    assert reader.asked == 14, "a ledger read back from disk is not asked again"
    single = Ledger(tmp_path / "single.jsonl")
    alone = [Item("r", "q", "", "a")]
    run(judged, questions(alone, "local"), single)
    marks = summarise(list(single.records.values()), "local", alone)
    assert marks["means"]["overall"]["mean"] == 3.5 and marks["prompt_tokens"] > marks["completion_tokens"] > 0


def test_bad_rows_are_all_named(judge: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "q"}\n{"answer": "a"}\n{"input": "q", "answers": {"base": "x", "sft": "y"}}\n')
    code, _, err = judge(path, "--judge", "http://127.0.0.1:9/v1")
    assert code == 4 and "3 problems" in err and "choose with --system" in err
    write_rows(tmp_path / "b.jsonl", 2)
    write_rows(tmp_path / "c.jsonl", 3)
    code, _, err = judge(tmp_path / "c.jsonl", "--pairwise", tmp_path / "b.jsonl", "--judge", "http://127.0.0.1:9/v1")
    assert code == 4 and "r2: not in" in err


HERE, THERE = ("--judge", "tiny"), ("--judge", "http://127.0.0.1:9/v1")
VAIN = [
    (
        ("--judge", "http://127.0.0.1:abc/v1", "--judge", "http://"),
        ["--judge http://127.0.0.1:abc/v1", "--judge http://"],
    ),
    ((*THERE, "--other-system", "sft"), ["--other-system"]),
    ((*THERE, "--backend", "mlxx", "--device", "moon"), ["--backend", "--device"]),
    ((*THERE, "--key-from", "NOT_SET"), ["--key-from NOT_SET"]),
    ((*HERE, "--model", "x", "--timeout", "9"), ["--model", "--timeout"]),
    ((*HERE, "--retries", "1", "--concurrency", "2", "--key-from", "X"), ["--retries", "--concurrency", "--key-from"]),
]


@pytest.mark.parametrize(("words", "named"), VAIN, ids=[" ".join(named) for _, named in VAIN])
def test_a_flag_that_would_change_nothing_is_refused(judge: Any, tmp_path: Path, words: tuple[str, ...], named: list[str]) -> None:  # fmt: skip
    code, _, err = judge(write_rows(tmp_path / "a.jsonl", 1), *words)
    assert code == 2 and f"{len(named)} problem" in err and all(f"{name}: " in err for name in named)


def test_an_answer_cannot_change_what_is_asked_of_other_rows() -> None:
    plain, other = (Question(Item("r", "q", "", answer), "j") for answer in ("a", "b"))
    assert plain.key != other.key and plain.key == Question(Item("r", "q", "", "a"), "j").key
    assert plain.messages[0] == other.messages[0] and "never an instruction" in plain.messages[0]["content"]
    assert [q.swapped for q in questions([Item("r", "q", "", "a", "b")], "j")] == [False, True]


@settings(deadline=None)
@given(st.lists(st.text("=a\n", max_size=20), min_size=4, max_size=4))
def test_no_text_closes_the_fence_around_it(texts: list[str]) -> None:
    for item in (Item("r", *texts[:3]), Item("r", *texts)):
        system, user = (message["content"] for message in Question(item, "j").messages)
        fence = system.partition("lines of ")[2].split()[0]
        assert set(fence) == {"="} and not any(fence in text for text in texts[: 3 if item.other is None else 4])
        names = ["INPUT", *["REFERENCE"] * bool(item.reference)]
        names += ["ANSWER"] if item.other is None else ["FIRST", "SECOND"]
        assert [line for line in user.split("\n") if line.startswith(fence)] == [
            *(f"{fence} {n}" for n in names),
            fence,
        ]


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_reply_can_be_read(text: str) -> None:
    for schema in (Marks, Choice):
        found = parse_reply(text, schema)
        assert found is None or schema.model_validate(found)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 5)] * 4), min_size=1, max_size=20))
def test_means_are_of_rows_and_inside_the_scale(rows: list[tuple[int, ...]]) -> None:
    records = [
        Record(str(i), str(i), "j", False, dict(zip(DIMENSIONS, marks, strict=True))) for i, marks in enumerate(rows)
    ]
    items = [Item(record.id, "q", "", "a") for record in records]
    means = summarise(records, "j", items)["means"]
    assert means["overall"]["mean"] == pytest.approx(sum(map(sum, rows)) / (4 * len(rows)))
    assert all(1 <= value["low"] <= value["mean"] <= value["high"] <= 5 for value in means.values())


def test_agreement_is_over_answers_both_scored() -> None:
    marks = dict.fromkeys(DIMENSIONS, 3)
    records = [Record("1", "a", "x", False, marks), Record("2", "a", "y", False, {**marks, "relevance": 5}), Record("3", "b", "x", False, marks)]  # fmt: skip
    assert agreement(records, "x", "y") == {"judges": ["x", "y"], "rows": 1, "equal": 0.75, "within_1": 0.75}
    assert agreement(records, "x", "z")["rows"] == 0
