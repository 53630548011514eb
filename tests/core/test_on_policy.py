"""Pairs from a model's own answers: which answers make one, and what is written about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from judge_server import serve
from smolmlx.api import _silent as silent
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.evals.judge import DIMENSIONS
from smolmlx.evals.judging import EndpointJudge
from smolmlx.evals.notes import strict_compliance
from smolmlx.synth.flaws import NotesRow
from smolmlx.synth.on_policy import (
    LEFT_OUT_ALIKE,
    LEFT_OUT_NONE_BROKEN,
    LEFT_OUT_NONE_KEPT,
    LEFT_OUT_UNMARKED,
    ROUND,
    Draw,
    Sampling,
    Work,
    choose,
    drawing,
    judging,
    write_sampled,
)  # fmt: skip
from smolmlx.synth.pairs import read_notes_rows

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "data" / "notes"


@pytest.fixture(scope="module")
def rows() -> list[NotesRow]:
    return read_notes_rows([NOTES / "validation.jsonl"])


def fourth_bullet(answer: str) -> str:
    return answer.replace("\nLimitation:", "\n- One point more.\nLimitation:")


def off_topic(answer: str) -> str:
    """Keep the layout, and say something else."""
    lines = [
        line if line.endswith(":") else "- Rain fell there." if line.startswith("-") else "Rain fell there."
        for line in answer.split("\n")
    ]
    return "\n".join([*lines[:-1], "Did rain fall on the old town?"])


def test_a_broken_answer_loses_to_a_whole_one(rows: list[NotesRow]) -> None:
    row = rows[0]
    found = choose(row, [fourth_bullet(row.answer), row.answer, off_topic(row.answer)])
    assert found[:2] == (row.answer, fourth_bullet(row.answer))
    assert found[2] == ["Key Points: 4 bullets, 3 expected"]


def test_of_two_whole_answers_the_nearer_wins(rows: list[NotesRow]) -> None:
    row = rows[0]
    assert strict_compliance(off_topic(row.answer)).passed
    assert choose(row, [off_topic(row.answer), row.answer]) == (row.answer, off_topic(row.answer), ["content"])


def test_pairs_about_form_alone_leave_whole_answers_out(rows: list[NotesRow]) -> None:
    row = rows[0]
    assert choose(row, [off_topic(row.answer), row.answer], "form") == LEFT_OUT_NONE_BROKEN
    assert choose(row, [fourth_bullet(row.answer), row.answer], "form")[2] == ["Key Points: 4 bullets, 3 expected"]


def test_what_teaches_nothing_is_left_out(rows: list[NotesRow]) -> None:
    row = rows[0]
    assert choose(row, [row.answer, row.answer]) == LEFT_OUT_ALIKE
    assert choose(row, [fourth_bullet(row.answer), "nonsense"]) == LEFT_OUT_NONE_KEPT


def test_the_broken_answer_of_nearest_length_is_taken(rows: list[NotesRow]) -> None:
    row = rows[0]
    endless = fourth_bullet(row.answer) + " and so on" * 80
    assert choose(row, [row.answer, endless, fourth_bullet(row.answer)])[1] == fourth_bullet(row.answer)


def test_a_judge_ranks_what_keeps_the_rule(rows: list[NotesRow]) -> None:
    row = rows[0]
    whole, other, broken = row.answer, off_topic(row.answer), fourth_bullet(row.answer)
    marks = {(row.id, whole): 2.0, (row.id, other): 4.5}
    assert choose(row, [whole, other], marks=marks) == (other, whole, ["content"])
    assert choose(row, [whole, other, broken], marks=marks)[0] == other, (
        "a broken answer is rejected, whatever marks say"
    )
    assert choose(row, [whole, other], marks={**marks, (row.id, whole): 4.25}) == LEFT_OUT_ALIKE
    assert choose(row, [whole, other], marks={}) == LEFT_OUT_UNMARKED
    assert choose(row, [whole, broken], marks={})[0] == whole, "nothing to ask a judge"


def test_marks_come_from_a_judge_and_are_asked_for_once(rows: list[NotesRow], tmp_path: Path) -> None:
    """A judge that likes what is off the topic, at an address on this machine."""

    def reply(prompt: str, times: int) -> str:
        mark = 5 if "Rain fell there." in prompt.partition("ANSWER\n")[2] else 1
        return json.dumps(dict.fromkeys(DIMENSIONS, mark))

    sampling = Sampling("tiny", "", samples=2, judge="a judge")
    with serve(reply) as (url, server):
        for out in ("pairs", "pairs"):
            mark = judging(EndpointJudge(url, None, key="none"), tmp_path / "ledger.jsonl", silent)
            made = write_sampled([str(NOTES)], tmp_path / out, (4, 2), sampling, drawer(off_topic), mark)
        assert max(server.asked.values()) == 1 and made["sampling"]["judge"] == "a judge"
    found = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    assert len(found) == 4 and all("Rain fell there." in pair["chosen"] for pair in found)
    with serve(lambda prompt, times: 500) as (url, _), pytest.raises(RunError, match="got no marks"):
        judging(EndpointJudge(url, None, key="none", retries=0), tmp_path / "other.jsonl", silent)([(rows[0], "x")])


def drawer(flaw: Callable[[str], str]) -> Draw:
    """A model that answers each prompt once as its row does, and else with a flaw."""
    answers = {row.prompt: row.answer for row in read_notes_rows([NOTES / "train.jsonl", NOTES / "validation.jsonl"])}
    return lambda prompts, number, seed, work: [[answers[p], *[flaw(answers[p])] * (number - 1)] for p in prompts]


def test_files_name_what_was_drawn(tmp_path: Path) -> None:
    sampling = Sampling("tiny", "runs/x/adapter", samples=3, seed=5)
    made = write_sampled([str(NOTES)], tmp_path / "pairs", (20, 10), sampling, drawer(fourth_bullet))
    assert (made["files"]["train"]["pairs"], made["files"]["validation"]["pairs"]) == (20, 10)
    assert made["sampling"]["adapter"] == "runs/x/adapter" and made["sampling"]["samples"] == 3
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    first = pairs[0]
    assert first["issues"] == ["Key Points: 4 bullets, 3 expected"] and first["chosen"] != first["rejected"]
    cells = {(pair["topic"], pair["difficulty"]) for pair in pairs}
    assert len(cells) == 20 and len(made["files"]["train"]["topic"]) > 12  # one of each topic and difficulty in turn
    whole = write_sampled([str(NOTES)], tmp_path / "all", None, sampling, drawer(fourth_bullet))
    assert (whole["files"]["train"]["pairs"], whole["files"]["validation"]["pairs"]) == (400, 75)
    half = write_sampled([str(NOTES / "validation.jsonl")], tmp_path / "half", None, sampling, drawer(fourth_bullet))
    assert list(half["files"]) == ["validation"]


def test_no_more_is_drawn_than_a_number_of_pairs_takes(tmp_path: Path) -> None:
    asked: list[tuple[int, int, Work]] = []
    answer = drawer(fourth_bullet)

    def counted(prompts: Sequence[str], number: int, seed: int, work: Work) -> list[list[str]]:
        asked.append((len(prompts), seed, work))
        return answer(prompts, number, seed, work)

    made = write_sampled([str(NOTES)], tmp_path / "pairs", (ROUND + 10, 5), Sampling("tiny", "", samples=2), counted)
    assert (made["files"]["train"]["pairs"], made["files"]["validation"]["pairs"]) == (ROUND + 10, 5)
    assert [call[:2] for call in asked] == [(ROUND, 0), (ROUND, ROUND), (ROUND, 0)]  # train twice, with other draws
    assert asked[1][2] == Work(f"answers for train, {ROUND} of {ROUND + 10} pairs", 2 * ROUND, 2 * 400), "one bar"


def test_a_model_that_cannot_answer_is_found_out_early(tmp_path: Path) -> None:
    asked: list[int] = []

    def nonsense(prompts: Sequence[str], number: int, seed: int, work: Work) -> list[list[str]]:
        asked.append(len(prompts))
        return [["nonsense"] * number for _ in prompts]

    def refusal(sampling: Sampling) -> str:
        with pytest.raises(DataError) as caught:
            write_sampled([str(NOTES)], tmp_path / "pairs", (20, 10), sampling, nonsense)
        return str(caught.value)

    first = f"no on-policy pair for train ({LEFT_OUT_NONE_KEPT}: {2 * ROUND} rows). "
    assert refusal(Sampling("tiny", "")).startswith(f"{first}Pass --adapter with one trained on notes")
    assert asked == [ROUND, ROUND]
    assert refusal(Sampling("tiny", "a")) == f"{first}Train longer, or draw more --samples."
    with pytest.raises(DataError, match="no row is of that split"):
        write_sampled([str(NOTES / "train.jsonl")], tmp_path / "b", (4, 2), Sampling("t", ""), drawer(fourth_bullet))


def test_one_bar_over_all_rows_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def meter(label: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: told.append((label, done, total))

    def generate(generator: object, tokenizer: object, prompts: Sequence[str], how: object, on_done: Callable[[int], None]) -> list[str]:  # fmt: skip
        on_done(len(prompts))
        return list(prompts)

    monkeypatch.setattr("smolmlx.synth.on_policy.generate", generate)
    tokenizer = SimpleNamespace(encode=lambda text: text, prompt=lambda messages: messages[0]["content"])
    draw = drawing(None, tokenizer, Sampling("t", ""), meter)  # type: ignore[arg-type]
    assert draw(["a", "b"], 2, 0, Work("answers", 8, 20)) == [["a", "a"], ["b", "b"]]
    assert told == [("answers", 8, 20), ("answers", 12, 20)]


def test_what_is_refused(tmp_path: Path) -> None:
    sampling = Sampling("tiny", "")
    with pytest.raises(DataError, match=LEFT_OUT_ALIKE):
        write_sampled([str(NOTES)], tmp_path / "a", None, sampling, drawer(lambda answer: answer))
    with pytest.raises(DataError, match="held out"):
        write_sampled([str(NOTES / "test.jsonl")], tmp_path / "b", None, sampling, drawer(fourth_bullet))
    with pytest.raises(RecipeError, match="two answers"):
        write_sampled([str(NOTES)], tmp_path / "c", None, Sampling("tiny", "", samples=1), drawer(fourth_bullet))
    with pytest.raises(RecipeError, match="--counts"):
        write_sampled([str(NOTES)], tmp_path / "d", (1, 2, 3), sampling, drawer(fourth_bullet))
    assert not list(tmp_path.iterdir())


def test_options_of_the_other_kind_are_refused(call: Callable[..., tuple[int, str, str]]) -> None:
    for extra in (["--samples", "4"], ["--judge", "http://x/v1"], ["--adapter", "x"], ["--backend", "mlx"]):
        code, _, err = call("data", "pairs", NOTES, "out", *extra)
        assert code == 2 and "has no effect without --model" in err
    code, _, err = call("data", "pairs", NOTES, "out", "--model", "tiny", "--issue", "boilerplate")
    assert code == 2 and "pairs by rule" in err


def test_counts_and_rows_are_checked_before_the_model_is_loaded(call: Callable[..., tuple[int, str, str]]) -> None:
    """`no-such` is found out when the model is loaded."""
    late = ("--model", "tiny", "--backend", "no-such")
    assert "no-such" in call("data", "pairs", NOTES, "out", *late)[2]
    code, _, err = call("data", "pairs", NOTES, "out", "--counts", "1,2,3", *late)
    assert code == 2 and "--counts 1,2,3" in err and "no-such" not in err
    code, _, err = call("data", "pairs", NOTES / "test.jsonl", "out", *late)
    assert code == 4 and "are held out" in err and "--allow-test" not in err and "no-such" not in err
    for extra in (["--judge-model", "x"], ["--judge", "http://:0"]):
        code, _, err = call("data", "pairs", NOTES, "out", *late, *extra)
        assert code == 2 and extra[0] in err and "no-such" not in err


def test_a_judge_from_the_command_line(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*given: object) -> None:
        """Stand for an engine's generator; `drawing` is replaced too."""

    monkeypatch.setattr("smolmlx.cli.options.choose", lambda *given: SimpleNamespace(backend=SimpleNamespace(generator=load), device="cpu"))  # fmt: skip
    monkeypatch.setattr("smolmlx.synth.on_policy.drawing", lambda *given: drawer(off_topic))
    good = json.dumps(dict.fromkeys(DIMENSIONS, 4))
    with serve(lambda prompt, times: good) as (url, _):
        code, _, err = call("data", "pairs", NOTES, "out", "--model", "tiny", "--counts", "4,2", "--judge", url)
    assert code == 4 and LEFT_OUT_ALIKE in err, "all marks are equal"
    assert (tmp_path / "out" / "ledger.jsonl").is_file()


def test_ctrl_c_while_drawing_says_what_was_written(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    asked = ("data", "pairs", NOTES, "out", "--model", "tiny")
    with monkeypatch.context() as patch:
        patch.setattr("smolmlx.cli.options.choose", interrupted)
        code, _, err = call(*asked)
        assert code == 130 and err == "Interrupted: no pairs were written.\n" and not (tmp_path / "out").exists()
    assert call("data", "pairs", NOTES, "out", "--counts", "2,1")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("smolmlx.cli.options.choose", interrupted)
        code, _, err = call(*asked)
    assert code == 130 and "no pairs were written. What is in out stays as it is." in err
    assert (tmp_path / "out" / "train.jsonl").is_file()


def test_a_judge_is_asked_before_answers_are_drawn(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*given: object) -> None:
        raise AssertionError("the model is loaded before the judge is asked")

    monkeypatch.setattr("smolmlx.cli.options.choose", choose)
    with serve(lambda prompt, times: (404, {"error": {"message": "not served here"}})) as (url, server):
        asked = ("data", "pairs", NOTES, "out", "--model", "tiny", "--counts", "4,2", "--judge", url)
        code, _, err = call(*asked, "--judge-model", "gpt")
        assert code == 3 and "not served here" in err and "Check --judge-model" in err
        server.models = {"no": "list"}
        code, _, err = call(*asked)
        assert code == 3 and "Else pass --judge-model." in err
