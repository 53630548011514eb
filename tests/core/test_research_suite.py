"""The research suite's figures on answers written here, and the whole of it on the numpy engine."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lab as labs
from smolmlx.backend import Decoding, Loading, choose
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError
from smolmlx.evals import research
from smolmlx.evals.parsers import RetrievalResult, Triplet
from smolmlx.evals.research import RANDOM, Answered, ResearchRow, compare, random_answers
from smolmlx.evals.run import Settings, System, evaluate, write
from smolmlx.models import open_model
from smolmlx.tasks.registry import read_registry

GOLD = {
    "bullets": ["Adam keeps two moments.", "They decay."],
    "qa": [{"question": "What decays?", "answer": "The moments."}],
    "triplets": [{"subject": "Adam", "relation": "keeps", "object": "moments"}],
    "retrieval": {"index": 1, "reasoning": "it says so"},
    "rephrase": "Two moments are kept by Adam.",
}
FIELDS = {"retrieval": {"question": "What?", "passages": "Passage 1:\nred\n\nPassage 2:\nblue\n\nPassage 3:\ngreen"}}


def write_rows(path: Path, count: int = 8) -> Path:
    """Write rows as `data augment` does, of five tasks."""
    registry = read_registry()
    with path.open("w") as file:
        for i in range(count):
            for task, gold in GOLD.items():
                style = next(iter(registry.task(task).styles))
                prompt = registry.prompt(task, FIELDS.get(task, {"passage": labs.sentence(i)}), style)
                turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": json.dumps(gold)}]
                file.write(
                    json.dumps({"messages": turns, "id": f"{task}-{i}", "task": task, "style": style, "gold": gold})
                    + "\n"
                )
    return path


def rows(path: Path) -> list[ResearchRow]:
    settings = Settings(str(path), suite="research")
    from smolmlx.evals.run import open_rows

    return research.read_rows(str(path), open_rows(str(path), settings), None)


def test_reads_what_augment_writes(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 1))
    assert [row.task for row in found] == list(GOLD)
    assert found[2].gold == (Triplet("Adam", "keeps", "moments"),)
    assert found[3].gold == RetrievalResult(1, "it says so") and found[3].num_passages == 3


def test_other_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="data augment"):
        rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize("change", [{"gold": None}, {"gold": [{"no": "question"}]}, {"task": ["qa"]}, {"task": "poem"}])
def test_bad_rows_are_named_by_line(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 1)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    path.write_text("\n".join([*lines, "{"]) + "\n")
    with pytest.raises(DataError) as error:
        rows(path)
    assert "rows.jsonl:2" in str(error.value) and f"rows.jsonl:{len(lines) + 1}" in str(error.value)


def test_packed_rows_are_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 1)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert rows(tmp_path / "rows.jsonl.gz") == [replace(row) for row in rows(path)]


def test_rows_of_a_document_are_resampled_together(tmp_path: Path) -> None:
    found = [replace(row, document=f"d{i % 3}") for i, row in enumerate(rows(write_rows(tmp_path / "rows.jsonl", 6)))]
    right = [Answered("", row.gold, True) for row in found]
    report = compare(found, {"base": right, RANDOM: random_answers(found)})
    assert report.summary["base"]["valid"].num_groups == 3


def test_the_only_row_of_a_task_is_no_answer_to_itself(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 1))
    assert not any(one.value for one, row in zip(random_answers(found), found, strict=True) if row.task != "retrieval")


def test_prompts_beyond_the_context_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 1))
    with labs.toy_installed():
        generator = choose("toy", "cpu").backend.generator(
            open_model(tiny_model), None, Tokenizer(tiny_model), Loading("cpu")
        )
    with pytest.raises(DataError, match="do not fit the model's context of 100 tokens"):
        research.answer(
            generator, Tokenizer(tiny_model), read_registry(), found, Decoding(max_tokens=90),
            constrained=True, on_done=lambda done: None, context=100,
        )  # fmt: skip


def test_figures(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 6))
    right = [Answered("", row.gold, True) for row in found]
    wrong = [Answered("", RetrievalResult(0, "") if row.task == "retrieval" else (), False) for row in found]
    half = [
        Answered("", ("adam keeps  two moments.", "Other."), True) if row.task == "bullets" else one
        for row, one in zip(found, wrong, strict=True)
    ]
    report = compare(found, {"base": wrong, "tuned": right, "half": half, RANDOM: random_answers(found)})
    assert {name: i.mean for name, i in report.summary["tuned"].items()} == dict.fromkeys(research.METRICS, 1.0)
    assert all(i.mean == 0 for i in report.summary["base"].values())
    assert report.summary["tuned"]["index_accuracy"].num_rows == 6
    assert report.summary["tuned"]["set_f1"].num_rows == 18 and report.summary["tuned"]["rouge_l"].num_rows == 24
    # One of two points is right, in 6 of 18 rows of lists: F1 1/2 there, 0 in the others.
    assert report.summary["half"]["set_f1"].mean == pytest.approx(0.5 * 6 / 18)
    assert report.summary[RANDOM]["valid"].mean == 1
    named = {(d.system, d.control, d.metric) for d in report.differences}
    assert ("tuned", "base", "index_accuracy") in named and ("half", RANDOM, "set_f1") in named
    assert ("half", "tuned", "set_f1") in named and ("base", RANDOM, "valid") in named


def test_the_copy_control_answers_as_the_nearest_train_row_of_the_task(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 5))
    train = [replace(row, gold=("copied",)) if row.id == "bullets-3" else row for row in found if row.task != "qa"]
    made = dict(zip((row.id for row in found), research.copied_answers(train, found), strict=True))
    assert made["bullets-3"].value == ("copied",) and "copied" in made["bullets-3"].text
    assert made["bullets-2"].value != ("copied",)
    assert not made["qa-0"].valid and made["qa-0"].text == ""  # train has no row of this task
    report = compare(
        found, {"base": list(made.values()), research.COPY: list(made.values()), RANDOM: random_answers(found)}
    )
    assert {d.control for d in report.differences} == {research.COPY, RANDOM}


def test_random_control_chooses_any_passage_or_none(tmp_path: Path) -> None:
    found = [row for row in rows(write_rows(tmp_path / "rows.jsonl", 200)) if row.task == "retrieval"]
    places = [one.value.index for one in random_answers(found) if isinstance(one.value, RetrievalResult)]
    assert set(places) == {0, 1, 2, None} and 0.15 < places.count(1) / len(places) < 0.35


@pytest.mark.parametrize("constrained", [True, False])
def test_on_an_engine(tiny_model: Path, tmp_path: Path, constrained: bool) -> None:
    """An untrained model: with constraints every list and choice keeps to its schema, freely almost none does."""
    path = write_rows(tmp_path / "rows.jsonl", 3)
    tokenizer, base = Tokenizer(tiny_model), open_model(tiny_model)
    settings = Settings(
        str(path), suite="research", train=str(path), decoding=Decoding(max_tokens=70), constrained=constrained
    )
    with labs.toy_installed():
        made = evaluate(choose("toy", "cpu").backend, [System("base", base)], tokenizer, settings, meter)
    write(made, tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tree["suite"] == "research" and tree["sets"]["test"]["n"] == 15
    assert tree["systems"]["base"]["perplexity"] > 1
    report = made.research["test"]
    valid = [v for v, task in zip(report.scores["base"]["valid"], report.tasks, strict=True) if task != "rephrase"]
    assert (sum(v or 0 for v in valid) == len(valid)) == constrained
    assert report.summary["copy control"]["set_f1"].mean == 1 and tree["files"]["train"]["rows"] == 15
    assert "random control" in (tmp_path / "out" / "results.md").read_text()
    assert len((tmp_path / "out" / "test-answers.jsonl").read_text().splitlines()) == 15


class meter:
    """Counts in silence."""

    def __init__(self, title: str, total: int) -> None: ...
    def __enter__(self) -> meter:
        return self

    def __exit__(self, *exception: object) -> None: ...
    def __call__(self, done: int) -> None: ...
