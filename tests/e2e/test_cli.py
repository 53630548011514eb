"""The command line as a user types it, on a tiny model: train on each engine, hand over, generate, evaluate, plan real data."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lab as labs
from smolmlx.models import make_model

Call = Callable[..., tuple[int, str, str]]
FORMATS = {
    "fastchat_sharegpt.json": "sharegpt",
    "gsm8k_prompt_completion.jsonl": "prompt-completion",
    "preference_messages.jsonl": "preference",
    "self_instruct_alpaca.jsonl": "alpaca",
    "taskmaster_messages.jsonl": "messages",
}


@pytest.fixture
def recipe(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {chat_rows}, max_length: 256, validation_share: 0.2}}\n"
        "train: {batch_size: 4, epochs: 2, learning_rate: 1e-2}\nlora: {r: 4}\nsave: {every: 2}\n"
        "samples: {prompts: [red apple], max_tokens: 8}\n"
    )
    return path


ENGINES = {"mlx": ("--backend", "mlx"), "cuda": ("--backend", "cuda", "--device", "cpu"), "auto": ()}


def installed(name: str) -> None:
    reason = labs.why_missing({"auto": "mlx"}.get(name, name))
    if reason is not None and name != "auto":
        pytest.skip(reason)


@pytest.mark.parametrize("name", ENGINES)
def test_train_generate_eval(
    call: Call, recipe: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path, name: str
) -> None:
    installed(name)
    code, out, err = call("train", recipe, *ENGINES[name])
    assert code == 0, err
    run = next((tmp_path / "runs").iterdir())
    for file in ("recipe.yaml", "plan.json", "env.json", "metrics.jsonl", "metrics.csv", "samples.md", "report.json"):
        assert (run / file).is_file(), file
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "adapter" / "tokenizer.json").is_file()
    assert str(run.relative_to(tmp_path)) in out and "Next: smolmlx generate" in out
    adapter = ("--model", tiny_model, "--adapter", run / "adapter")
    code, out, err = call("generate", *adapter, "--prompt", "red apple", "--max-tokens", 5, "--json", *ENGINES[name])
    assert code == 0 and json.loads(out)["answers"], err
    asked = ("--prompt", "red apple", "--max-tokens", 5, "--json", *ENGINES[name])
    (both,) = json.loads(call("generate", *adapter, *asked, "--before-after")[1])["answers"]
    (bare,) = json.loads(call("generate", "--model", tiny_model, *asked)[1])["answers"]
    assert (both["answer"], both["before"]) == (json.loads(out)["answers"][0]["answer"], bare["answer"])
    code, _, err = call("generate", "--model", tiny_model, *asked, "--before-after")
    assert code == 2 and "Pass --adapter A" in err and "--stream" not in err
    code, out, err = call("eval", *adapter, "--data", chat_rows, "--suite", "loss", "--json", *ENGINES[name])
    assert code == 0, err
    systems = json.loads(out)["systems"]
    base, trained = (systems[key]["loss"] for key in systems)
    assert trained < base


def test_a_run_is_handed_from_one_engine_to_the_other(call: Call, recipe: Path, tmp_path: Path) -> None:
    installed("mlx")
    installed("cuda")
    code, out, err = call("train", recipe, "--backend", "mlx", "--json")
    assert code == 0, err
    whole = json.loads(out)
    run = next((tmp_path / "runs").iterdir())
    (run / "report.json").unlink()  # as if it had been killed after its second-to-last checkpoint
    shutil.rmtree(sorted((run / "checkpoints").glob("0*"))[-1])
    code, out, err = call("train", "--resume", run, "--backend", "cuda", "--device", "cpu", "--json")
    assert code == 0, err
    resumed = json.loads(out)
    assert resumed["last_val_loss"] == pytest.approx(whole["last_val_loss"], abs=2e-5)
    assert resumed["steps"] == whole["steps"]
    assert resumed["final_loss"] == pytest.approx(whole["final_loss"], abs=2e-5)
    assert resumed["best_val_loss"] == pytest.approx(whole["best_val_loss"], abs=2e-5)


@pytest.fixture(scope="module")
def smollm_like(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's real tokenizer and vocabulary size on a model narrow enough to draw in a moment."""
    real = assets / "tokenizers" / "smollm2-135m-instruct"
    folder: Path = shutil.copytree(real, tmp_path_factory.mktemp("smollm") / "model")
    config: dict[str, Any] = json.loads((real / "config.json").read_text())
    small = {"hidden_size": 18, "intermediate_size": 24, "num_hidden_layers": 1}
    make_model({**config, **small}, folder, 0)
    return folder


@pytest.mark.parametrize("file", FORMATS)
def test_plan_on_real_data(call: Call, assets: Path, smollm_like: Path, tmp_path: Path, file: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{id: {smollm_like}}}\ndata: {{train: {assets / 'data' / file}, max_length: 2048}}\n")
    code, out, err = call("plan", recipe, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["format"] == FORMATS[file]
    assert 0 < found["supervised"] < found["tokens"]
    assert found["recipe"]["data.max_length"] == {"value": 2048, "origin": "recipe"}
    code, out, _ = call("plan", recipe)
    assert code == 0 and "«" in out and "<|im_end|>»" in out


def test_recipes_and_doctor(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("recipes", "ls")
    assert code == 0 and "quickstart" in out
    code, out, _ = call("recipes", "cp", "quickstart", tmp_path / "mine.yaml")
    assert code == 0 and (tmp_path / "mine.yaml").is_file()
    code, _, err = call("recipes", "cp", "quickstart", tmp_path / "mine.yaml")
    assert code == 2 and "already there" in err
    code, _, err = call("recipes", "validate", tmp_path / "mine.yaml", "notes/sft")
    assert code == 0, err
    code, out, _ = call("doctor", "--json")
    assert code == 0 and all({"name", "passed", "summary"} <= set(engine) for engine in json.loads(out)["engines"])


def test_python_api(recipe: Path, chat_rows: Path, tmp_path: Path) -> None:
    import smolmlx

    engine = "mlx" if labs.why_missing("mlx") is None else "cuda"
    run = smolmlx.train(recipe, backend=engine, device="cpu", set={"train.max_steps": 2}, out=tmp_path / "api")
    assert run.report.steps == 2 and run.adapter is not None
    model = smolmlx.load(run)
    assert len(model.generate(["red apple", "two plums"], max_tokens=4)) == 2
    assert len(smolmlx.evaluate(model, str(chat_rows)).loss) == 2
    assert len(smolmlx.load(run.path, backend=engine, device="cpu").generate(["red"], max_tokens=2)) == 1
    if labs.why_missing("cuda") is None:
        other = smolmlx.load(run.path, backend="cuda", device="cpu")
        assert other.backend.name == "cuda", "what is asked for wins over what was trained with"


def test_a_run_is_loaded_the_way_it_was_trained(call: Call, chat_rows: Path, tmp_path: Path) -> None:
    """An adapter that was trained on a 4-bit base answers on the same base, engine and device."""
    installed("mlx")
    import smolmlx

    model = labs.make_tiny(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    tree: dict[str, Any] = {
        "model": {"id": str(model), "quantize": "4bit"},
        "data": {"train": str(chat_rows), "max_length": 256},
        "train": {"batch_size": 4, "max_steps": 1, "compile": False},
        "lora": {"r": 2},
    }
    (tmp_path / "my.yaml").write_text(json.dumps(tree))
    code, out, err = call("train", tmp_path / "my.yaml", "--backend", "mlx", "--device", "cpu")
    assert code == 0, err
    words = out.partition("Next: ")[2].split()
    said = " ".join(words[:-2])
    assert said.endswith("--quantize 4bit --backend mlx --device cpu") and words[-2] == "--prompt"
    code, out, err = call(*words[1:-1], "red apple", "--max-tokens", 3, "--json")
    assert code == 0 and json.loads(out)["answers"], err
    folder = next((tmp_path / "runs").iterdir())
    run = smolmlx.train(tree, backend="mlx", device="cpu", out=tmp_path / "api")
    for source in (folder, run):
        loaded = smolmlx.load(source)
        assert (loaded.loading.quantize, loaded.loading.device, loaded.loading.dtype) == ("4bit", "cpu", "float32")
        assert loaded.backend.name == "mlx"
    assert smolmlx.load(folder, quantize="none").loading.quantize == "none"


def test_an_interrupted_evaluation_goes_on_without_training(call: Call, recipe: Path, chat_rows: Path) -> None:
    evaluate = (
        "--set",
        f"evaluate.data={chat_rows}",
        "--set",
        "evaluate.suite=loss",
        "--backend",
        "cuda",
        "--device",
        "cpu",
    )
    installed("cuda")
    code, out, err = call("train", recipe, *evaluate, "--json")
    assert code == 0, err
    whole = json.loads(out)
    run = Path(whole["run"])
    metrics = (run / "metrics.jsonl").read_bytes()
    code, _, err = call("train", "--resume", run)
    assert code == 2 and "finished" in err
    shutil.rmtree(run / "eval")  # what a kill while the base answers leaves behind
    code, _, err = call("train", "notes/sft", "--resume", run)
    assert code == 2 and "not a run of 'notes/sft'" in err
    code, out, err = call("train", recipe, "--resume", "--json")
    assert code == 0, err
    assert (
        "engine cuda" in err and "at its evaluation" in err
    )  # the engine it was begun on, though mlx comes first here
    assert json.loads(out)["evaluation"] == whole["evaluation"]
    assert (run / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("scored", [False, True])
def test_ctrl_c_in_the_last_step(
    call: Call, recipe: Path, chat_rows: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """All steps are done then: nothing is left, or the evaluation alone."""

    def stop(display: object, kind: str, step: int, values: object) -> None:
        if (kind, step) == ("step", 2):
            signal.raise_signal(signal.SIGINT)

    evaluate = ["--set", f"evaluate.data={chat_rows}", "--set", "evaluate.suite=loss"] if scored else []
    installed("cuda")
    with monkeypatch.context() as patch:
        patch.setattr("smolmlx.console.TrainingDisplay.__call__", stop)
        code, _, err = call("train", recipe, "--max-steps", 2, *evaluate, "--backend", "cuda", "--device", "cpu")
    (run,) = Path("runs").iterdir()
    assert code == 130 and f"interrupted after step 2, the last; {run} is trained" in err
    assert ("Go on with: smolmlx train --resume" in err) == scored
    assert (f"Nothing is left but the report: smolmlx report {run}" in err) != scored
    code, _, err = call("train", "--resume", run)
    assert (code, "at its evaluation" in err) == ((0, True) if scored else (2, False))


@pytest.mark.parametrize("keep", ["true", "false"])
def test_the_summary_names_the_loss_of_the_weights_that_are_kept(
    call: Call, recipe: Path, tmp_path: Path, keep: str
) -> None:
    """Trained on answers that the validation rows contradict, so that their loss soon rises."""
    for file, answer in (("train", "red"), ("validation", "stone river stone river")):
        row = json.dumps({"prompt": "red green blue", "completion": answer}) + "\n"
        (tmp_path / f"{file}.jsonl").write_text(row * 8)
    files = ("data.train=train.jsonl", "data.validation=validation.jsonl", "data.validation_share=0")
    sets = (*files, "eval.every=1", "train.epochs=8", "samples.prompts=[]", f"eval.keep_best={keep}")
    code, out, err = call("train", recipe, *(part for text in sets for part in ("--set", text)))
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    best, last = (f"{report[key]:.4f}" for key in ("best_val_loss", "last_val_loss"))
    assert report["best_step"] < report["steps"] and best != last
    said = f"best {best} at step {report['best_step']}; kept: the last, {last} at step {report['steps']}"
    assert (said in out) == (keep == "false") and f"{best} at step {report['best_step']}" in out


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_run_asks_for_no_engine_by_itself(call: Call, recipe: Path, name: str) -> None:
    installed(name)
    code, first, err = call("train", recipe, *ENGINES[name])
    assert code == 0, err
    (run,) = Path("runs").iterdir()
    (run / "report.json").unlink()
    code, out, err = call("train", "--resume", run)
    assert code == 0 and "as the run began" in err and "asked for" not in err, err
    following = out.partition("Next: ")[2]
    if name == "auto":
        assert "--backend" not in following and following == first.partition("Next: ")[2]
    elif name == "cuda" and labs.why_missing("mlx") is None:
        assert "--backend cuda --device cpu" in following


@pytest.mark.parametrize("key", ["data", "train", "ood"])
def test_missing_evaluation_rows_are_found_before_training(call: Call, recipe: Path, chat_rows: Path, key: str) -> None:
    files = {"data": str(chat_rows), key: "nowhere.jsonl"}
    sets = [part for name, path in files.items() for part in ("--set", f"evaluate.{name}={path}")]
    code, _, err = call("train", recipe, *sets, "--set", "evaluate.suite=notes")
    assert code == 4 and "nowhere.jsonl" in err
    assert not Path("runs").exists()


def test_out_is_refused_where_a_run_has_its_own_folder(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code, _, err = call("train", "--resume", tmp_path / "run", "--out", tmp_path / "elsewhere")
    assert code == 2 and "--out has no effect with --resume" in err


def test_smoke_recipe(call: Call, tmp_path: Path) -> None:
    """Every stage of the notes once, with nothing made before."""
    installed("mlx")
    code, out, err = call("train", "notes/smoke", "--json", *ENGINES["mlx"])
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(json.loads(out)["stages"]) == ["sft", "pairs", "dpo"]
    rows = [json.loads(line) for line in (folder / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and rows[0]["grad_norm"] > 0.01
    results = json.loads((folder / "dpo" / "eval" / "results.json").read_text())
    assert {"base", "sft", "dpo"} <= set(results["sets"]["test"]["systems"])


def test_a_resume_that_cannot_be_honoured_exits_2(
    call: Call, recipe: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what changed since the run was begun, or where it was begun."""
    installed("cuda")
    for words in ((), ("nosuch",)):
        code, _, err = call("train", "--resume", *words)
        assert code == 2 and "no unfinished run" in err
    shutil.copy(chat_rows, tmp_path / "mine.jsonl")
    (tmp_path / "recipes").mkdir()
    recipe = recipe.rename(tmp_path / "recipes" / recipe.name)
    mine = ("--set", "data.train=mine.jsonl", "--backend", "cuda", "--device", "cpu")
    code, out, err = call("train", recipe, *mine, "--json")
    assert code == 0, err
    run = (tmp_path / json.loads(out)["run"]).resolve()
    code, _, err = call("train", "--resume", run / "checkpoints")
    assert code == 2 and "not a run folder" in err
    (run / "report.json").unlink()
    code, _, err = call("train", "--resume", run, "--set", "lora.dropout=0.5")
    assert code == 2 and "lora.dropout was 0.0, is 0.5. Go on with the old values (leave out --set)" in err
    rows = (tmp_path / "mine.jsonl").read_text()
    (tmp_path / "mine.jsonl").write_text(rows.partition("\n")[2])
    code, _, err = call("train", "--resume", run)
    assert code == 2 and "another plan: the train rows changed" in err
    (tmp_path / "mine.jsonl").write_text(rows)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("train", "--resume", run)
    assert code == 4 and f"The run was begun in {tmp_path.resolve()}; resume from there." in err


def test_the_next_command_of_a_plan_trains_that_plan(call: Call, recipe: Path) -> None:
    installed("cuda")
    code, out, err = call(
        "plan", recipe, "--set", "lora.r=3", "--set", "samples.prompts=[a b]", "--backend", "cuda", "--device", "cpu"
    )
    assert code == 0, err
    assert out.replace("\n", " ").rstrip().endswith("--device cpu --set lora.r=3 --set 'samples.prompts=[a b]'")
