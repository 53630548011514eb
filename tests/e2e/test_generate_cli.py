"""`smolmlx generate` with constraints, and `smolmlx chat`, as they are typed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lab as labs

Call = Callable[..., tuple[int, str, str]]
WHERE = ("--device", "cpu")


@pytest.fixture(params=["mlx", "cuda"])
def engine(request: pytest.FixtureRequest) -> str:
    if (reason := labs.why_missing(request.param)) is not None:
        pytest.skip(reason)
    return str(request.param)


def test_schema_file_regex_choice(call: Call, tiny_model: Path, engine: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"type": "integer"}, "maxItems": 3}')
    base = ("generate", "--model", tiny_model, "--backend", engine, *WHERE, "--prompt", "red", "--max-tokens", 30)
    code, out, err = call(*base, "--schema", "s.json", "--json")
    (answer,) = json.loads(out)["answers"]
    assert code == 0 and isinstance(json.loads(answer["answer"]), list), err
    assert answer["prompt_tokens"] > 1 and answer["completion_tokens"] > 0 and answer["finished"]
    code, out, _ = call(*base, "--choice", "yes", "--choice", "no")
    assert code == 0 and out.strip() in ("yes", "no")
    code, out, err = call(*base, "--regex", "[a-c]{4}", "--temperature", 1)
    assert code == 0 and len(out.strip()) == 4 and "tokens/s" in err


def test_streamed_equals_whole(call: Call, tiny_model: Path, engine: str) -> None:
    base = ("generate", "--model", tiny_model, "--backend", engine, *WHERE, "--prompt", "red", "--max-tokens", 20)
    assert call(*base, "--stream")[1].strip() == call(*base)[1].strip()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--regex", "(?=a)b"), "look-ahead"),
        (("--regex", "a", "--choice", "b"), "--regex and --choice"),
        (("--schema", "nothing.json"), "no such file"),
        (("--stream", "--json"), "--stream"),
        (("--regex", ""), "empty text"),
        (("--choice", "yes", "--stop", "e"), "stop"),
        (("--raw", "--prompt", ""), "--prompt: 0 tokens"),
        (("--prompt", "red " * 3000), "the model's context is"),
        (("--raw", "--system", "Be brief."), "--system: has no effect with --raw"),
        (("--schema", '{"type": "object"}'), "Write the schema to a file"),
        (("--schema", '{"type": "object", "title": "' + "x" * 300 + '"}'), "Write the schema to a file"),
        (("--schema", "x" * 300), "no such file"),
        (("--temperature", "inf"), "temperature: got inf"),
    ],
)
def test_refusals_come_before_any_model(call: Call, tiny_model: Path, options: tuple[str, ...], said: str) -> None:
    code, out, err = call("generate", "--model", tiny_model, "--prompt", "red", *options)
    assert code == 2 and said in err and not out and "engine" not in err


def test_rows_that_do_not_fit_are_named(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "red " * times}]} for times in (1, 3000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = call("generate", "--model", tiny_model, "--input", "rows.jsonl")
    assert code == 4 and not out and "row 2: " in err and "row 1: " not in err


def test_chat(call: Call, tiny_model: Path, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = "red apple\n/adapter on\n/save talk.jsonl\n/reset\n/system Be brief.\ntwo plums\n/save talk.jsonl\n/nonsense\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = call("chat", "--model", tiny_model, "--backend", engine, *WHERE, "--max-tokens", 8)
    assert code == 0 and out.strip()
    assert "no adapter is loaded" in err and "forgotten" in err and "/nonsense: no such command" in err
    saved: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [turn["role"] for turn in saved[0]["messages"]] == ["user", "assistant"]
    assert [turn["role"] for turn in saved[1]["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("options", [("--seed", 7), ("--top-p", 0.5)], ids=str)
def test_chat_refuses_what_greedy_answers_ignore(call: Call, tiny_model: Path, options: tuple[str, object]) -> None:
    code, _, err = call("chat", "--model", tiny_model, *options)
    assert code == 2 and f"{options[0]}: has no effect at --temperature 0" in err


def test_chat_saves_no_conversation_without_an_answer(
    call: Call, tiny_model: Path, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/save talk.jsonl\n/system Be brief.\n/save talk.jsonl\n"))
    code, _, err = call("chat", "--model", tiny_model, "--backend", engine, *WHERE)
    assert code == 0 and err.count("there is no answer yet") == 2 and not (tmp_path / "talk.jsonl").exists()


def test_extremes_are_answered(call: Call, tiny_model: Path, engine: str) -> None:
    base = ("generate", "--model", tiny_model, "--backend", engine, *WHERE, "--prompt", "red", "--max-tokens", 8)
    plain = call(*base)[1]
    assert call(*base, "--temperature", "1e-45", "--top-k", 99999999999)[:2] == (0, plain)


def test_chat_takes_two_interrupts_to_leave(
    call: Call, tiny_model: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter([KeyboardInterrupt(), "/help", KeyboardInterrupt(), KeyboardInterrupt(), "/nonsense"])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("click.termui.visible_prompt_func", read)
    code, _, err = call("chat", "--model", tiny_model, "--backend", engine, *WHERE)
    assert code == 0 and err.count("Ctrl-D or /quit leaves") == 2 and "no such command" not in err
    assert next(typed) == "/nonsense"


def test_chat_ends_with_its_input(call: Call, tiny_model: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert call("chat", "--model", tiny_model, "--backend", engine, *WHERE)[0] == 0
