"""Recipes of several stages: what is refused before anything runs, what one stage hands to the next, going on later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lab as labs
import smolmlx
from smolmlx import backend, pipelines, shelf
from smolmlx.api import _silent as silent
from smolmlx.data_stages import Augment
from smolmlx.errors import RecipeError
from smolmlx.rundir import RunDir
from smolmlx.tasks.registry import BUILT_IN

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipes(tiny_model: Path, chat_rows: Path, pair_rows: Path, tmp_path: Path) -> Path:
    """SFT and DPO recipes of two steps, and a pipeline of both, in a folder."""
    sft: dict[str, Any] = {
        "model": {"id": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows), "max_length": 128},
        "train": {"batch_size": 4, "max_steps": 2, "compile": False, "learning_rate": 1e-2},
        "lora": {"r": 4},
    }
    dpo = {**sft, "stage": "dpo", "data": {"train": str(pair_rows), "max_length": 128}}
    dpo = {key: value for key, value in dpo.items() if key != "lora"}
    for name, tree in {
        "sft": sft, "dpo": dpo,
        "both": {"description": "two stages", "stages": {"sft": {"recipe": "sft.yaml"}, "dpo": {"recipe": "dpo.yaml"}}},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return tmp_path


def opened(tree: dict[str, Any], folder: Path, sets: dict[str, Any] | None = None) -> pipelines.Pipeline:
    """Open a pipeline whose file lies beside its recipes."""
    (folder / "p.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return pipelines.open_pipeline(folder / "p.yaml", "p", shelf.find, sets)


def test_a_stage_goes_on_with_the_adapter_before_it(recipes: Path, call: Call) -> None:
    code, out, err = call("train", "both.yaml", "--backend", "cuda", "--device", "cpu", "--set", "dpo.dpo.beta=0.3")
    assert code == 0, err
    (folder,) = (recipes / "runs").glob("both-*")
    assert str(folder.name) in out and "stage 2/2, dpo" in err
    sft, dpo = RunDir(folder / "sft"), RunDir(folder / "dpo")
    assert (sft.start / "adapter_model.safetensors").read_bytes() != (
        sft.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert (
        labs.stages.load_arrays(dpo.start / "adapter_model.safetensors").keys()
        == labs.stages.load_arrays(sft.adapter / "adapter_model.safetensors").keys()
    )
    recorded = yaml.safe_load((dpo.path / "recipe.yaml").read_text())
    assert recorded["model"]["adapter"] == str(sft.adapter) and recorded["dpo"]["beta"] == 0.3
    assert dpo.read_json("env.json")["origins"]["model.adapter"] == "the stage before"
    first = next(row for row in labs.numbers(dpo) if row["kind"] == "step")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # the policy is its own reference
    code, _, err = call("train", "--resume", folder)
    assert code == 2 and "finished" in err


def test_going_on_skips_what_is_done(recipes: Path, call: Call) -> None:
    """A pipeline that stopped between its stages; the first keeps its files."""
    engine = ("--backend", "cuda", "--device", "cpu")
    made = pipelines.open_pipeline(recipes / "both.yaml", "both", shelf.find)
    folder = pipelines.start(made, recipes / "runs")
    whole, _, _ = call("train", "sft.yaml", *engine, "--out", "elsewhere")
    assert whole == 0
    (run,) = (recipes / "elsewhere").glob("sft-*")
    run.rename(folder / "sft")
    before = {path: path.stat().st_mtime_ns for path in (folder / "sft").rglob("*") if path.is_file()}
    code, out, err = call("train", "both.yaml", "--resume", *engine, "--json")
    assert code == 0, err
    assert "stage 1/2, sft: done before" in err and list(json.loads(out)["stages"]) == ["dpo"]
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "sft").rglob("*") if path.is_file()}
    code, _, err = call("train", "--resume", folder, "--set", "dpo.dpo.beta=1")
    assert code == 2 and "finished" in err


def test_a_stage_that_has_not_begun_can_be_set_on_going_on(recipes: Path, chat_rows: Path, call: Call) -> None:
    engine = ("--backend", "cuda", "--device", "cpu")
    file = yaml.safe_load((recipes / "both.yaml").read_text())
    file["stages"]["dpo"] = {"recipe": "sft.yaml", "set": {"data.train": "nowhere.jsonl"}}
    (recipes / "both.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    code, _, err = call("train", "both.yaml", *engine, "--max-steps", 1)
    (folder,) = (recipes / "runs").glob("both-*")
    assert code == 4 and f"Go on with: smolmlx train --resume runs/{folder.name}" in err.replace("\n", " "), err
    code, _, err = call("train", "--resume", folder, "--set", "sft.lora.r=2")
    assert code == 2 and "--set sft.lora.r: this stage has begun" in err
    code, _, err = call("train", "--resume", folder, "--set", "dpo.lora.rank=2")
    assert code == 2 and "stages.dpo: lora.rank: unknown key" in err
    code, out, err = call(
        "train", "--resume", folder, "--set", f"dpo.data.train={chat_rows}", "--max-steps", 2, "--json"
    )
    assert code == 0 and list(json.loads(out)["stages"]) == ["dpo"], err
    assert json.loads(out)["stages"]["dpo"]["steps"] == 2
    with pytest.raises(RecipeError, match="--max-steps: every stage that trains has begun"):
        pipelines.change(pipelines.reopen(folder), folder, {}, 3)
    assert pipelines.reopen(folder).stages[1].values == {"data.train": str(chat_rows), "train.max_steps": 2}


def test_full_training_hands_on_the_model(recipes: Path) -> None:
    tree = yaml.safe_load((recipes / "sft.yaml").read_text())
    tree["train"]["method"] = "full"
    del tree["lora"]
    (recipes / "full.yaml").write_text(yaml.safe_dump(tree))
    file = {
        "stages": {"first": {"recipe": "full.yaml"}, "then": {"recipe": "sft.yaml"}, "last": {"recipe": "dpo.yaml"}}
    }
    made = opened(file, recipes)
    then = pipelines.load_stage(made, made.stages[1], recipes / "run").recipe
    assert then.model.id == str(recipes / "run" / "first" / "model") and then.model.adapter is None
    last = pipelines.load_stage(made, made.stages[2], recipes / "run").recipe
    assert last.model.id == then.model.id, "an adapter goes with the base it was trained on"
    assert last.model.adapter == str(recipes / "run" / "then" / "adapter")


def test_an_adapter_is_handed_on_with_how_its_base_was_loaded(recipes: Path) -> None:
    sft = {"recipe": "sft.yaml", "set": {"model.revision": "abc", "model.quantize": "4bit"}}
    stages = {
        "sft": sft,
        "dpo": {"recipe": "dpo.yaml"},
        "own": {"recipe": "dpo.yaml", "set": {"model.quantize": "8bit"}},
    }
    made = opened({"stages": stages}, recipes)
    dpo, own = (pipelines.load_stage(made, stage, recipes / "run").recipe.model for stage in made.stages[1:])
    assert (dpo.revision, dpo.quantize) == ("abc", "4bit") and (own.revision, own.quantize) == ("abc", "8bit")


def test_a_stage_goes_on_with_the_template_before_it(recipes: Path, call: Call) -> None:
    (recipes / "other.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    engine = ("--backend", "cuda", "--device", "cpu", "--max-steps", "1")
    code, _, err = call("train", "both.yaml", *engine, "--set", "sft.model.chat_template=other.jinja")
    assert code == 0, err
    (folder,) = (recipes / "runs").glob("both-*")
    sft, dpo = (RunDir(folder / name).read_json("plan.json") for name in ("sft", "dpo"))
    assert sft["template"] == dpo["template"]
    code, out, _ = call("plan", "dpo.yaml", "--set", f"model.adapter={folder / 'sft'}", "--set", "model.chat_template=chatml", "--json", *engine[:4])  # fmt: skip
    assert code == 0 and any("not what the adapter in" in note for note in json.loads(out)["notes"])


def test_pairs_are_made_between_stages_and_named_by_their_stage(tmp_path: Path) -> None:
    file = {
        "stages": {
            "pairs": {"pairs": {"rows": ["data/notes"], "counts": [10, 5], "seed": 3}},
            "dpo": {
                "recipe": "notes/dpo",
                "set": {"data.train": "{pairs}/train.jsonl", "data.validation": "{pairs}/validation.jsonl"},
            },
        }
    }
    made = opened(file, tmp_path)
    folder = pipelines.start(made, tmp_path / "runs")
    pairs, dpo = pipelines.reopen(folder).stages
    assert pipelines.reopen(folder) == made
    assert not pipelines.is_done(pairs, folder)
    pipelines.make(made, pairs, folder, backend.choose("cuda", "cpu"), silent)
    assert pipelines.is_done(pairs, folder) and not pipelines.is_done(dpo, folder)
    rows = Path(str(pipelines.load_stage(made, dpo, folder).recipe.data.train))
    assert rows == folder / "pairs" / "train.jsonl" and len(rows.read_text().splitlines()) == 10


@pytest.fixture
def documents(recipes: Path) -> Path:
    """A pipeline from documents to a scored adapter, and six documents for it."""
    folder = recipes / "papers"
    folder.mkdir()
    for number in range(6):
        text = " ".join(labs.sentence(number * 50 + i) for i in range(50))
        (folder / f"{number}.txt").write_text(text)
    tree = yaml.safe_load((recipes / "sft.yaml").read_text())
    tree["data"] = {"train": "{}", "max_length": 512}
    tree["evaluate"] = {"suite": "research", "data": "{}", "max_tokens": 4, "limit": 2}
    (recipes / "tuned.yaml").write_text(yaml.safe_dump(tree))
    files = {"data.train": "{rows}/train.jsonl", "evaluate.data": "{rows}/test.jsonl"}
    stages = {
        "chunks": {"chunk": {"documents": "nowhere", "words": 50, "overlap": 10, "shares": [0.5, 0.25, 0.25]}},
        "rows": {"augment": {"chunks": "{chunks}", "model": tree["model"]["id"], "tasks": ["continuation"]}},
        "sft": {"recipe": "tuned.yaml", "set": files},
    }
    (recipes / "papers.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return folder


def test_from_documents_to_a_scored_adapter(recipes: Path, documents: Path, call: Call) -> None:
    engine = ("--backend", "cuda", "--device", "cpu")
    code, _, err = call("train", "papers.yaml", *engine)
    assert code == 4 and "chunks.documents: nowhere: no such file" in err and "--set chunks.documents=PATH" in err
    assert not (recipes / "runs").exists()
    told = ("--set", f"chunks.documents={documents}", "--set", "rows.tasks_file=mine.yaml")
    code, _, err = call("train", "papers.yaml", *engine, *told)
    assert code == 4 and "rows.tasks_file: mine.yaml: no such file" in err and not (recipes / "runs").exists()
    (recipes / "mine.yaml").write_text(BUILT_IN.read_text().replace("name: smolmlx-research", "name: mine"))
    code, out, err = call(
        "train", "papers.yaml", *engine, *told, "--set", "sft.evaluate.tasks_file=mine.yaml", "--json"
    )
    assert code == 0, err
    made = json.loads(out)["stages"]
    folder = Path(json.loads(out)["folder"])
    assert made["chunks"]["documents"] == 6 and made["rows"]["rows"] > 3 and made["rows"]["seed"] == 0
    assert '"prompt_version": "mine/' in (folder / "rows" / "train.jsonl").read_text()
    assert made["sft"]["evaluation"]["suite"] == "research" and (folder / "sft" / "adapter").is_dir()
    (folder / "rows" / "manifest.json").unlink()  # as if it had been stopped there
    (folder / "sft").rename(recipes / "sft-before")
    rows = (folder / "rows" / "train.jsonl").read_bytes()
    code, out, err = call("train", "--resume", folder, *engine, "--json")
    assert code == 0 and "chunks: done before" in err and list(json.loads(out)["stages"]) == ["rows", "sft"], err
    assert (folder / "rows" / "train.jsonl").read_bytes() == rows
    assert "jobs accepted" in err
    assert not pipelines.is_done(pipelines.reopen(folder).stages[1], recipes)
    (folder / "rows" / "test.jsonl").unlink()  # as if none had been accepted for it
    (folder / "sft").rename(recipes / "sft-again")
    code, _, err = call("train", "--resume", folder, *engine)
    assert code == 4 and "stage rows: no row was accepted for test: more documents or tasks" in err


def test_documents_are_found_before_a_folder_is_made(recipes: Path, documents: Path, call: Call) -> None:
    (recipes / "blank").mkdir()
    code, _, err = call("train", "papers.yaml", "--set", "chunks.documents=blank")
    assert code == 4 and "chunks.documents: blank: no document in this folder" in err
    assert not (recipes / "runs").exists()


def test_splits_without_a_share_are_missed_before_anything_runs(recipes: Path, documents: Path) -> None:
    file = yaml.safe_load((recipes / "papers.yaml").read_text())
    train = {"chunks.shares": [1, 0]}
    with pytest.raises(
        RecipeError, match=r"stages.sft.evaluate.data: \{rows\}/test.jsonl: that stage makes train alone"
    ):
        opened(file, recipes, train)
    made = opened(file, recipes, {**train, "sft.evaluate": None})
    assert made.stages[2].values == {"data.train": "{rows}/train.jsonl", "evaluate": None}


def test_too_few_documents_are_said_in_the_words_of_the_pipeline(recipes: Path, documents: Path, call: Call) -> None:
    code, _, err = call("train", "papers.yaml", "--backend", "cuda", "--device", "cpu", "--set", f"chunks.documents={documents / '1.txt'}")  # fmt: skip
    assert code == 4 and "so 3 are needed" in err and "--set 'chunks.shares=[1,0]'" in err


def test_rows_of_failed_jobs_are_no_whole_stage(tmp_path: Path) -> None:
    stage = pipelines.Stage("rows", Augment(chunks="chunks"))
    (tmp_path / "rows").mkdir()
    for failed in (1, 0):
        (tmp_path / "rows" / "manifest.json").write_text(json.dumps({"jobs": {"failed": failed}}))
        assert pipelines.is_done(stage, tmp_path) == (not failed)


def test_from_python(recipes: Path) -> None:
    """The last stage's run is returned."""
    run = smolmlx.train(
        recipes / "both.yaml", backend="cuda", device="cpu", out=recipes / "out", set={"sft.train.max_steps": 1}
    )
    assert run.path.name == "dpo" and run.report.steps == 2
    assert RunDir(run.path.parent / "sft").read_json("report.json")["steps"] == 1
    assert smolmlx.load(run.path.parent, backend="cuda", device="cpu").adapter == run.adapter
    (run.path / "report.json").unlink()
    with pytest.raises(RecipeError, match="this pipeline is not finished"):
        smolmlx.load(run.path.parent)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no stages": ({"stages": {}}, {}, "at least 1"),
    "both kinds": ({"stages": {"a": {"recipe": "sft.yaml", "pairs": {"rows": ["x"]}}}}, {}, "one of `recipe`, `pairs`, `chunk`"),
    "nothing trains": ({"stages": {"a": {"pairs": {"rows": ["x"]}}}}, {}, "none of them trains"),
    "misspelt key": ({"stages": {"a": {"recpe": "sft.yaml"}}}, {}, "Did you mean 'recipe'?"),
    "misspelt recipe key": ({"stages": {"a": {"recipe": "sft.yaml", "set": {"lora.rank": 1}}}}, {}, "stages.a: lora.rank"),
    "no such recipe": ({"stages": {"a": {"recipe": "notes/sftt"}}}, {}, "Did you mean 'notes/sft'?"),
    "no such flaw": ({"stages": {"a": {"pairs": {"rows": ["x"], "issues": ["y"]}}, "b": {"recipe": "sft.yaml"}}}, {}, "stages.a: issue 'y'"),
    "samples of nothing": ({"stages": {"a": {"pairs": {"rows": ["x"], "samples": 4}}, "b": {"recipe": "sft.yaml"}}}, {}, "none stands before it"),
    "idle temperature": ({"stages": {"a": {"pairs": {"rows": ["x"], "temperature": 1}}}}, {}, "no effect without `samples`"),
    "two kinds of data": ({"stages": {"a": {"chunk": {"documents": "x"}, "augment": {"chunks": "x"}}}}, {}, "one of `recipe`, `pairs`, `chunk`"),
    "no documents": ({"stages": {"a": {"chunk": {"words": 5}}}}, {}, "stages.a.chunk.documents: Field required"),
    "bad overlap": ({"stages": {"a": {"chunk": {"documents": "x", "words": 5}}}}, {}, "stages.a: --overlap 100: expected 0 to 4"),
    "bad shares": ({"stages": {"a": {"chunk": {"documents": "x", "shares": [1]}}}}, {}, "stages.a: shares 1: give two or three"),
    "no such task": ({"stages": {"a": {"augment": {"chunks": "x", "tasks": ["bulets"]}}}}, {}, "Did you mean 'bullets'?"),
    "no such server": ({"stages": {"a": {"augment": {"chunks": "x", "server": "http://x:99999"}}}}, {}, "expected an address such as"),
    "idle adapter": ({"stages": {"a": {"augment": {"chunks": "x", "server": "http://x", "adapter": "y"}}}}, {}, "no effect with `server`"),
    "misspelt key of data": ({"stages": {"a": {"chunk": {"documents": "x"}}, "b": {"recipe": "sft.yaml"}}}, {"a.word": 2}, "stages.a: word: unknown key of a pipeline. Did you mean 'words'?"),
    "no such stage": ({"stages": {"rows": {"chunk": {"documents": "x"}}, "b": {"recipe": "sft.yaml", "set": {"data.train": "{row}/train.jsonl"}}}}, {}, "stages.b.data.train: {row}: no earlier stage of this name. Did you mean 'rows'?"),
    "no such stage of data": ({"stages": {"chunks": {"chunk": {"documents": "x"}}, "b": {"augment": {"chunks": "{chunk}"}}}}, {}, "stages.b.chunks: {chunk}: no earlier stage of this name. Did you mean 'chunks'?"),
    "a later stage": ({"stages": {"b": {"augment": {"chunks": "{chunks}"}}, "chunks": {"chunk": {"documents": "x"}}}}, {}, "{chunks}: no earlier stage"),
    "no such stage in a list": ({"stages": {"a": {"pairs": {"rows": ["data/notes", "{x}"]}}}}, {}, "stages.a.rows: {x}: no earlier"),
    "a split that no pairs have": ({"stages": {"a": {"pairs": {"rows": ["x"], "counts": [9, 0]}}, "b": {"recipe": "sft.yaml", "set": {"data.validation": "{a}/validation.jsonl"}}}}, {}, "makes train alone"),
    "key of another kind": ({"stages": {"a": {"augment": {"chunk": "x"}}}}, {}, "stages.a.augment.chunk: unknown key of a pipeline. Did you mean 'chunks'?"),
    "key of no kind": ({"stages": {"a": {"augment": {"chunks": "x"}}}}, {"a.layout": "alpaca"}, "layout: unknown key of a pipeline. Known: chunks, model, "),
    "no list": ({"stages": {"a": {"augment": {"chunks": "x"}}}}, {"a.tasks": "continuation"}, "stages.a: tasks: expected a list: write [continuation]."),
    "misspelt stage": ({"stages": {"chunks": {"chunk": {"documents": "x"}}, "b": {"recipe": "sft.yaml"}}}, {"chunk.documents": "y"}, "Did you mean 'chunks.documents'?"),
    "odd name": ({"stages": {"a/b": {"recipe": "sft.yaml"}}}, {}, "a stage's name is its folder"),
    "set where nothing trains": ({"stages": {"a": {"pairs": {"rows": ["x"]}}}}, {"lora.r": 2}, "none of them trains"),
    "set without stage": ({"stages": {"a": {"recipe": "sft.yaml"}}}, {"lora.r": 2}, "e.g. a.lora.r"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_before_anything_runs(recipes: Path, name: str) -> None:
    tree, sets, said = WRONG[name]
    with pytest.raises(RecipeError) as caught:
        opened(tree, recipes, sets)
    assert said in str(caught.value)


def test_other_verbs_say_what_a_pipeline_is(recipes: Path, call: Call) -> None:
    for verb in ("plan", "eval"):
        code, _, err = call(verb, "both.yaml", *(("--model", "tiny") if verb == "eval" else ()))
        assert code == 2 and "a pipeline of several recipes" in err and "sft.yaml, " in err
    assert "(research/tiny)" in call("plan", "research/pipeline")[2]
    assert call("recipes", "validate", "both.yaml")[0] == 0
