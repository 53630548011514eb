"""The research suite's figures on answers written here, and the whole of it on the numpy engine."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import lab as labs
import smolmlx
from run_folders import REPORT
from smolmlx import shelf
from smolmlx.backend import Decoding, choose
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.evals import research
from smolmlx.evals.headlines import RESEARCH
from smolmlx.evals.parsers import RetrievalResult, Triplet
from smolmlx.evals.research import Answered, ResearchRow, compare, random_answers
from smolmlx.evals.rows import Choice
from smolmlx.evals.run import Evaluation, Settings, System, describe_file, evaluate, write
from smolmlx.evals.suites import COPY_CONTROL, RANDOM_CONTROL, summarise_loss
from smolmlx.models import open_model
from smolmlx.reports import figures, page
from smolmlx.reports.boards import make_boards
from smolmlx.reports.folders import open_runs
from smolmlx.reports.rows import view_rows
from smolmlx.rundir import RunDir
from smolmlx.sweeps.definition import open_sweep
from smolmlx.sweeps.table import read_table, to_markdown
from smolmlx.tasks.registry import BUILT_IN, read_registry
from smolmlx.tasks.replies import render

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

    return research.read_rows(str(path), open_rows(str(path), settings), Choice())


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


def test_rows_by_id_are_answered_and_scored_alone(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 2)
    settings = Settings(str(path), suite="research", decoding=Decoding(max_tokens=70), ids=("qa-1", "bullets-0"))
    with labs.toy_installed():
        systems = [System("base", open_model(tiny_model))]
        made = evaluate(choose("toy", "cpu").backend, systems, Tokenizer(tiny_model), settings, meter)
        with pytest.raises(DataError, match=r"no row qa-9\. Did you mean 'qa-\d'"):
            evaluate(
                choose("toy", "cpu").backend, systems, Tokenizer(tiny_model), replace(settings, ids=("qa-9",)), meter
            )
    assert [row.id for row in made.research["test"].rows] == ["bullets-0", "qa-1"]
    assert made.loss["base"].num_rows == 2


def test_a_name_with_quotes_is_one_cell(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 2))
    name = 'the "best", so far'
    report = compare(found, {name: [Answered("", row.gold, True) for row in found]})
    assert {line["system"] for line in csv.DictReader(research.csv(report).splitlines())} == {name}


def test_rows_of_a_document_are_resampled_together(tmp_path: Path) -> None:
    found = [replace(row, document=f"d{i % 3}") for i, row in enumerate(rows(write_rows(tmp_path / "rows.jsonl", 6)))]
    right = [Answered("", row.gold, True) for row in found]
    report = compare(found, {"base": right, RANDOM_CONTROL: random_answers(found)})
    assert report.summary["base"]["valid"].num_groups == 3


def test_the_only_row_of_a_task_is_no_answer_to_itself(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 1))
    assert not any(one.value for one, row in zip(random_answers(found), found, strict=True) if row.task != "retrieval")


def test_rows_beyond_the_context_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 1))
    asking = research.Asking(Tokenizer(tiny_model), read_registry(), Decoding(max_tokens=90))
    lengths = [len(asking.request(row)[0]) for row in found]
    kept = research.fitting(found, asking, min(lengths) + 90)
    assert kept == [row for row, length in zip(found, lengths, strict=True) if length == min(lengths)]
    assert research.fitting(found, asking, None) == found
    with pytest.raises(DataError, match="context of 100 tokens"):
        research.fitting(found, asking, 100)


def test_rows_that_are_left_out_are_counted_and_not_written(tiny_model: Path, tmp_path: Path) -> None:
    path, base = write_rows(tmp_path / "rows.jsonl", 2), open_model(tiny_model)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "document": f"from {line['id']}"}) + "\n" for line in lines))
    how = Decoding(max_tokens=70)
    asking = research.Asking(Tokenizer(tiny_model), read_registry(), how)
    lengths = sorted(len(asking.request(row)[0]) for row in rows(path))
    narrow = replace(base, config={**base.config, "max_position_embeddings": lengths[4] + 70})
    settings = Settings(str(path), suite="research", decoding=how)
    with labs.toy_installed():
        made = evaluate(choose("toy", "cpu").backend, [System("base", narrow)], Tokenizer(tiny_model), settings, meter)
    write(made, tmp_path / "out")
    kept = made.files["test"].rows
    assert 0 < kept < 10 and made.files["test"].left_out == 10 - kept
    written = [json.loads(line) for line in (tmp_path / "out" / "test-answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [row.id for row in made.research["test"].rows]
    assert [row["group"] for row in written] == [f"from {row['id']}" for row in written]
    assert f"{10 - kept} left out" in (tmp_path / "out" / "results.md").read_text()
    (tmp_path / "out" / "ood-answers.jsonl").write_text("of an earlier evaluation")
    write(made, tmp_path / "out")
    assert not (tmp_path / "out" / "ood-answers.jsonl").exists()


def test_figures(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 6))
    right = [Answered("", row.gold, True) for row in found]
    wrong = [Answered("", RetrievalResult(0, "") if row.task == "retrieval" else (), False) for row in found]
    half = [
        Answered("", ("adam keeps  two moments.", "Other."), True) if row.task == "bullets" else one
        for row, one in zip(found, wrong, strict=True)
    ]
    report = compare(found, {"base": wrong, "tuned": right, "half": half, RANDOM_CONTROL: random_answers(found)})
    assert {name: i.mean for name, i in report.summary["tuned"].items()} == dict.fromkeys(research.METRICS, 1.0)
    assert all(i.mean == 0 for i in report.summary["base"].values())
    assert report.summary["tuned"]["index_accuracy"].num_rows == 6
    assert report.summary["tuned"]["valid"].num_rows == 24 and report.summary["tuned"]["ended"].num_rows == 6
    assert report.summary["tuned"]["set_f1"].num_rows == 18 and report.summary["tuned"]["rouge_l"].num_rows == 24
    # One of two points is right, in 6 of 18 rows of lists: F1 1/2 there, 0 in the others.
    assert report.summary["half"]["set_f1"].mean == pytest.approx(0.5 * 6 / 18)
    assert report.summary[RANDOM_CONTROL]["valid"].mean == 1
    named = {(d.system, d.control, d.metric) for d in report.differences}
    assert ("tuned", "base", "index_accuracy") in named and ("half", RANDOM_CONTROL, "set_f1") in named
    assert ("half", "tuned", "set_f1") in named and ("base", RANDOM_CONTROL, "valid") in named


def test_the_copy_control_answers_as_the_nearest_train_row_of_the_task(tmp_path: Path) -> None:
    found = rows(write_rows(tmp_path / "rows.jsonl", 5))
    train = [replace(row, gold=("copied",)) if row.id == "bullets-3" else row for row in found if row.task != "qa"]
    made = dict(zip((row.id for row in found), research.copied_answers(train, found), strict=True))
    assert made["bullets-3"].value == ("copied",) and "copied" in made["bullets-3"].text
    assert made["bullets-2"].value != ("copied",)
    assert not made["qa-0"].valid and made["qa-0"].text == ""  # train has no row of this task
    report = compare(
        found, {"base": list(made.values()), COPY_CONTROL: list(made.values()), RANDOM_CONTROL: random_answers(found)}
    )
    assert {d.control for d in report.differences} == {COPY_CONTROL, RANDOM_CONTROL}


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
    assert (report.summary["base"]["valid"].mean == 1) == constrained
    assert report.summary["copy control"]["set_f1"].mean == 1 and tree["files"]["train"]["rows"] == 15
    written = (tmp_path / "out" / "results.md").read_text()
    assert "random control" in written and "Rows: 15 of" in written
    assert len((tmp_path / "out" / "test-answers.jsonl").read_text().splitlines()) == 15


def test_from_python_as_from_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 2)
    (tmp_path / "mine.yaml").write_text(BUILT_IN.read_text().replace("max_tokens: 600", "max_tokens: 9"))
    with labs.toy_installed():
        model = smolmlx.load(tiny_model, backend="toy", device="cpu")
    how = {"ids": ["bullets-1"], "registry": tmp_path / "mine.yaml", "constrained": False, "max_tokens": 70}
    made = smolmlx.evaluate(model, str(path), "research", **how)
    assert [row.id for row in made.research["test"].rows] == ["bullets-1"] and not made.settings.constrained
    assert made.settings.registry == tmp_path / "mine.yaml"
    with pytest.raises(RecipeError, match=r"nowhere.yaml: cannot be read"):
        smolmlx.evaluate(model, str(path), "research", registry=tmp_path / "nowhere.yaml")


def write_scored(path: Path, out: Path, right: bool) -> None:
    """Leave in `out` what the suite writes of a base that fails and of a stage that answers rightly, or half so."""
    found = rows(path)
    wrong = [Answered("", RetrievalResult(None, "") if row.task == "retrieval" else (), False) for row in found]
    good = [
        Answered(render(row.task, row.gold, "json"), row.gold, True) if right or i % 3 else wrong[i]
        for i, row in enumerate(found)
    ]
    answers = {"base": wrong, "sft": good, RANDOM_CONTROL: random_answers(found)}
    settings = Settings(str(path), suite="research")
    outputs = {"test": {name: [one.text for one in made] for name, made in answers.items()}}
    files = {"test": describe_file(str(path), settings, len(found))}
    loss = {name: summarise_loss([(20.0, 10, 5)] * 8) for name in ("base", "sft")}
    report = {"test": compare(found, answers)}
    write(Evaluation(settings, loss=loss, research=report, outputs=outputs, files=files), out)


def test_the_report_takes_the_suites_own_figures(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    for name in ("one", "two"):
        write_scored(path, tmp_path / name, right=name == "one")
    lines = list(csv.DictReader((tmp_path / "one" / "results.csv").read_text().splitlines()))
    assert {(line["set"], line["metric"]) for line in lines} == {("test", m) for m in (*research.METRICS, "loss")}
    assert next(line["mean"] for line in lines if (line["system"], line["metric"]) == ("sft", "set_f1")) == "1.0"
    (alone,) = make_boards(open_runs([tmp_path / "one"]))
    assert [metric.key for metric in alone.metrics] == list(research.METRICS)
    assert "sft: index accuracy 100 % of 8 rows" in " ".join(figures.findings(alone))
    (row, *_) = view_rows(alone, 9)
    assert row["reference"] == render("bullets", tuple(GOLD["bullets"]), "json") and "Adam" not in row["input"]
    assert row["answers"][-1]["shown"] == "set F1 1.00" and not row["answers"][-1]["flaws"]
    (both,) = make_boards(open_runs([tmp_path / "one", tmp_path / "two"]))
    shown = {(c.system, c.against, c.metric): c.verdict for c in both.comparisons}
    assert shown["one", "base", "index_accuracy"] == "better" and shown["two", "one", "valid"] == "worse"
    assert {metric for _, _, metric in shown} == set(research.METRICS)
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    text = page.render(open_runs([tmp_path / "one"]))
    assert (
        all(metric.label in text for metric in RESEARCH)
        and "strict compliance" not in text
        and "score above base's" in text
    )


def test_a_sweep_compares_settings_in_the_suites_own_figures(tmp_path: Path) -> None:
    base = {"model": {"id": "tiny"}, "data": {"train": "rows.jsonl"}, "lora": {"r": 4}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = write_rows(tmp_path / "rows.jsonl")
    sweep = open_sweep(tmp_path / "base.yaml", "my", shelf.find, grid={"lora.r": [4, 8]}, seeds=4)
    for cell in sweep.cells:
        run = RunDir(tmp_path / "out" / cell.folder)
        run.path.mkdir(parents=True)
        run.write_json("plan.json", {})
        run.write_json("report.json", REPORT)
        (run.path / "recipe.yaml").write_text(yaml.safe_dump(base))
        run.write_json("outcome.json", {"status": "finished"})
        write_scored(path, run.path / "eval", right=cell.setting == "lora.r=8")
    made = read_table(sweep, tmp_path / "out")
    assert made.settings["lora.r=8"]["test.index_accuracy"].mean == 1
    compared = {c.metric: c.verdict for c in made.comparisons}
    assert compared["valid"] == compared["set_f1"] == compared["index_accuracy"] == "higher"
    assert "test.set_f1" not in to_markdown(made) and "| set F1 |" in to_markdown(made)
    (results,) = (tmp_path / "out").glob("lora.r=4-seed0/eval/results.json")
    tree = json.loads(results.read_text())
    del tree["sets"]["test"]["rows"]
    results.write_text(json.dumps(tree))
    with pytest.raises(RunError, match=r"results\.json: sets\.test\.rows: field required\. Remove it"):
        read_table(sweep, tmp_path / "out")


class meter:
    """Counts in silence."""

    def __init__(self, title: str, total: int) -> None: ...
    def __enter__(self) -> meter:
        return self

    def __exit__(self, *exception: object) -> None: ...
    def __call__(self, done: int) -> None: ...
