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
from smolmlx.errors import RecipeError
from smolmlx.rundir import RunDir

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
    assert code == 1 and "finished" in err


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
    assert code in (1, 2) and "Traceback" not in err


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
    pipelines.make_pairs(made, pairs, folder, backend.choose("cuda", "cpu"), silent)
    assert pipelines.is_done(pairs, folder) and not pipelines.is_done(dpo, folder)
    rows = Path(str(pipelines.load_stage(made, dpo, folder).recipe.data.train))
    assert rows == folder / "pairs" / "train.jsonl" and len(rows.read_text().splitlines()) == 10


def test_from_python(recipes: Path) -> None:
    """The last stage's run is returned."""
    run = smolmlx.train(
        recipes / "both.yaml", backend="cuda", device="cpu", out=recipes / "out", set={"sft.train.max_steps": 1}
    )
    assert run.path.name == "dpo" and run.report.steps == 2
    assert RunDir(run.path.parent / "sft").read_json("report.json")["steps"] == 1


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no stages": ({"stages": {}}, {}, "at least 1"),
    "both kinds": ({"stages": {"a": {"recipe": "sft.yaml", "pairs": {"rows": ["x"]}}}}, {}, "either `recipe` or `pairs`"),
    "nothing trains": ({"stages": {"a": {"pairs": {"rows": ["x"]}}}}, {}, "none of them trains"),
    "misspelt key": ({"stages": {"a": {"recpe": "sft.yaml"}}}, {}, "Did you mean 'recipe'?"),
    "misspelt recipe key": ({"stages": {"a": {"recipe": "sft.yaml", "set": {"lora.rank": 1}}}}, {}, "stages.a: lora.rank"),
    "no such recipe": ({"stages": {"a": {"recipe": "notes/sftt"}}}, {}, "Did you mean 'notes/sft'?"),
    "no such flaw": ({"stages": {"a": {"pairs": {"rows": ["x"], "issues": ["y"]}}, "b": {"recipe": "sft.yaml"}}}, {}, "stages.a: issue 'y'"),
    "samples of nothing": ({"stages": {"a": {"pairs": {"rows": ["x"], "samples": 4}}, "b": {"recipe": "sft.yaml"}}}, {}, "none stands before it"),
    "idle temperature": ({"stages": {"a": {"pairs": {"rows": ["x"], "temperature": 1}}}}, {}, "no effect without `samples`"),
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
        assert code == 2 and "a pipeline of several recipes" in err
    assert call("recipes", "validate", "both.yaml")[0] == 0
