"""Wrong input on purpose: a clear message that says what to do, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from smolmlx.session import Session, StepResult

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{id: {tiny_model}}}\ndata: {{train: {chat_rows}, max_length: 256}}\n"
        "train: {batch_size: 4, max_steps: 2}\nlora: {r: 2}\n"
    )
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


GOOD = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]})
ASKED_ONLY = json.dumps({"messages": [{"role": "user", "content": "hi"}]})

BAD_ROWS = {
    "empty file": ("", "no rows"),
    "bad line": (f'{GOOD}\n{{"messages": [\n{GOOD}\n', "rows.jsonl:2: not valid JSON"),
    "unknown schema": ('{"foo": 1, "bar": 2}\n', "columns bar, foo"),
    "no assistant turn": (f"{ASKED_ONLY}\n{ASKED_ONLY}\n", "none of its 2 rows can be trained"),
    "two heads": (f"{ASKED_ONLY}\n", "see `smolmlx data inspect`: 1 problem"),
    "bad role": ('{"messages": [{"role": "robot", "content": "x"}]}\n', "unknown role 'robot'"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_exit_4(call: Call, recipe: Path, tmp_path: Path, name: str) -> None:
    text, said = BAD_ROWS[name]
    rows = write(tmp_path / "rows.jsonl", text)
    code, _, err = call("train", recipe, "--set", f"data.train={rows}")
    assert code == 4
    assert said in err
    assert not (tmp_path / "runs").exists()


def pair(prompt: object, chosen: object, rejected: object) -> str:
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})


ASKED_ELSE = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "red"}]
BAD_PAIRS = {
    "equal answers": (pair("hi", "red", "red"), "rows.jsonl:1: chosen and rejected are the same answer"),
    "empty side": (pair("hi", "red", " "), "rows.jsonl:1: rejected is empty"),
    "another prompt": (pair("hi", ASKED_ELSE, "blue"), "rows.jsonl:1: chosen begins with a user turn that is not the prompt's"),
    "no pairs at all": (GOOD, "stage dpo needs two"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_exit_4(call: Call, recipe: Path, tmp_path: Path, name: str) -> None:
    text, said = BAD_PAIRS[name]
    rows = write(tmp_path / "rows.jsonl", f"{text}\n")
    code, _, err = call("train", recipe, "--set", "stage=dpo", "--set", f"data.train={rows}")
    assert code == 4 and said in err
    assert not (tmp_path / "runs").exists()


def test_a_missing_sft_adapter_exits_2(call: Call, recipe: Path, pair_rows: Path, tmp_path: Path) -> None:
    code, _, err = call(
        "train", recipe, "--set", "stage=dpo", "--set", f"data.train={pair_rows}", "--set", "model.adapter=runs/notes-sft-*"
    )  # fmt: skip
    assert code == 2 and "no adapter here" in err and "smolmlx train notes/sft" in err
    assert not (tmp_path / "runs").exists()


def test_missing_file_exits_4(call: Call, recipe: Path) -> None:
    code, _, err = call("train", recipe, "--set", "data.train=nowhere.jsonl")
    assert code == 4 and "nowhere.jsonl: no such file" in err


def test_rows_longer_than_the_limit_are_an_error_when_most_are_lost(call: Call, recipe: Path) -> None:
    code, _, err = call("train", recipe, "--set", "data.max_length=8")
    assert code == 4
    assert "longer than max_length" in err and "data.overlong" in err


BAD_RECIPES = {
    "unknown key": ("train.learning_rte=1", "Did you mean 'learning_rate'?"),
    "wrong type": ("train.epochs=many", "train.epochs"),
    "impossible": ("lora.dora=true", "lora.dropout"),
    "unknown target": ("lora.targets=[q_prj]", "Did you mean 'q_proj'?"),
    "tied head": ("lora.targets=[lm_head]", "lm_head"),
    "nameless value": ("learning_rate", "expected key=value"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes_exit_2(call: Call, recipe: Path, name: str) -> None:
    override, said = BAD_RECIPES[name]
    for verb in ("plan", "train"):
        code, _, err = call(verb, recipe, "--set", override, "--set", "lora.dropout=0.1")
        assert code == 2
        assert said in err


def test_all_problems_of_a_recipe_are_told_at_once(call: Call, recipe: Path) -> None:
    code, _, err = call("plan", recipe, "--set", "train.learning_rte=1", "--set", "model.quantise=4bit")
    assert code == 2
    assert "2 problems" in err and "learning_rate" in err and "quantize" in err


@pytest.mark.parametrize(
    ("model", "exit_code", "said"),
    [
        ("missing/", 2, "no such model folder"),
        ("model.gguf", 2, "neither loaded nor trained"),
        ("empty", 2, "no config.json"),
        ("no-weights", 4, "no model*.safetensors weights"),
        ("cut", 4, "truncated"),
    ],
)
def test_bad_models(
    call: Call, recipe: Path, tiny_model: Path, tmp_path: Path, model: str, exit_code: int, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny_model, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for verb in ("plan", "train"):
        code, _, err = call(verb, recipe, "--set", f"model.id={tmp_path / model}")
        assert code == exit_code
        assert said in err
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_without_a_template_says_what_to_set(
    call: Call, recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    write(bare / "tokenizer_config.json", json.dumps(config))
    code, _, err = call("train", recipe, "--set", f"model.id={bare}")
    assert code == 2 and "model.chat_template" in err
    code, out, err = call("train", recipe, "--set", f"model.id={bare}", "--set", "model.chat_template=chatml", "--json")
    assert code == 0 and json.loads(out)["steps"] == 2, err


def test_a_template_that_rewrites_history_is_refused_or_trained_on_its_last_turn(
    call: Call, recipe: Path, assets: Path, tmp_path: Path
) -> None:
    config = json.loads((assets / "tokenizers" / "qwen3" / "tokenizer_config.json").read_text())
    template = write(tmp_path / "qwen3.jinja", config["chat_template"])
    command = ("train", recipe, "--set", f"model.chat_template={template}", "--json")
    code, _, err = call(*command)
    assert code == 4 and "data.history: last_turn" in err
    assert not (tmp_path / "runs").exists()
    code, out, err = call(*command, "--set", "data.history=last_turn")
    assert code == 0 and json.loads(out)["steps"] == 2, err


def test_cuda_without_a_gpu_exits_3_and_says_what_to_do(call: Call, recipe: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, _, err = call("train", recipe, "--backend", "cuda")
    assert code == 3 and "--device cpu" in err


def test_unknown_engine_and_command(call: Call, recipe: Path) -> None:
    code, _, err = call("train", recipe, "--backend", "mlxx")
    assert code == 3 and "Did you mean 'mlx'?" in err
    code, _, err = call("trian", recipe)
    assert code == 2 and "Did you mean 'train'?" in err


def test_an_adapter_for_another_base_exits_2(call: Call, recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    from smolmlx.models import make_model

    code, _, err = call("train", recipe)
    assert code == 0, err
    run = next((tmp_path / "runs").iterdir())
    config = json.loads((tiny_model / "config.json").read_text())
    other = shutil.copytree(tiny_model, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    make_model({**config, "intermediate_size": 2 * config["intermediate_size"]}, other, 0)
    code, _, err = call("generate", "--model", other, "--adapter", run / "adapter", "--prompt", "hi")
    assert code == 2 and "another base model" in err


def test_template_arguments(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    template = "{% if quiet is false %}LOUD{% endif %}{{ messages[0].content }}"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    write(model / "tokenizer_config.json", json.dumps({**config, "chat_template": template}))
    ask = ("generate", "--model", model, "--prompt", "red", "--max-tokens", "8", "--json")
    plain, loud = (call(*ask, *extra)[1] for extra in ((), ("--template-arg", "quiet=false")))
    assert json.loads(plain)["answers"][0]["answer"] != json.loads(loud)["answers"][0]["answer"]
    code, _, err = call(*ask, "--template-arg", "quiet")
    assert code == 2 and "--template-arg quiet: expected key=value" in err
    code, _, err = call(*ask, "--template-arg", "quiet=false", "--raw")
    assert code == 2 and "has no effect" in err


def test_a_file_in_place_of_the_runs_folder_exits_2(call: Call, recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "taken", "a file where the runs folder should be")
    code, _, err = call("train", recipe, "--out", tmp_path / "taken")
    assert code == 2 and "taken" in err and "is a file" in err


def test_a_read_only_place_for_runs_exits_1(call: Call, recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    if os.access(place, os.W_OK):  # root may write anywhere but where the kernel says no
        if sys.platform != "linux":
            pytest.skip("root may write everywhere here")
        place = Path("/sys")
    code, _, err = call("train", recipe, "--out", place)
    assert code == 1 and f"{place}{os.sep}" in err and "cannot write" in err and "choose another folder" in err


def test_ctrl_c_leaves_a_checkpoint_and_exits_130(recipe: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from smolmlx.cli import main; main()",
        "train",
        str(recipe),
        "--set",
        "train.max_steps=null",
        "--set",
        "train.epochs=100000",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "--resume" in err and "Traceback" not in err
    assert list(tmp_path.glob("runs/*/checkpoints/*/state.json"))


@pytest.mark.parametrize(
    ("steps", "moment", "said"),
    [
        (3, 0, ("before the first step of ", "nothing was trained there\nBegin again with: smolmlx train --resume ")),
        (3, 2, ("after step 2; a checkpoint is in ", "\nGo on with: smolmlx train --resume ")),
        (1, 1, ("after step 1, the last; ", " is trained\nNothing is left but the report: smolmlx report ")),
    ],
)
def test_ctrl_c_says_what_is_left_to_do(
    call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch, steps: int, moment: int, said: tuple[str, str]
) -> None:
    def record_step(session: Session, result: StepResult, real: Any = Session.record_step) -> None:
        real(session, result)
        if session.state.step == moment:
            signal.raise_signal(signal.SIGTERM)

    def attach(session: Session, *arguments: Any, real: Any = Session.attach) -> None:
        real(session, *arguments)
        if moment == 0:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "record_step", record_step)
        patch.setattr(Session, "attach", attach)
        code, _, err = call("train", recipe, "--set", f"train.max_steps={steps}")
    assert code == 130 and "interrupted " in err and all(part in err for part in said), err
    (run,) = Path("runs").iterdir()
    assert err.rstrip().endswith(str(run))
    code, _, err = call("train", "--resume", run)
    assert code == (2 if moment == steps else 0), err


def test_a_row_that_is_not_there_exits_2(call: Call, recipe: Path) -> None:
    code, _, err = call("plan", recipe, "--row", "9999")
    assert code == 2 and "--row 9999: the last row that is trained is 24" in err


@pytest.mark.parametrize(("knob", "said"), [("cuda={atention: eager}", "attention"), ("mlx={zzz: 1}", "mlx.zzz")])
def test_recipes_validate_asks_every_engine(call: Call, recipe: Path, tmp_path: Path, knob: str, said: str) -> None:
    pytest.importorskip("torch" if knob.startswith("cuda") else "mlx", reason="that engine is not installed")
    block = knob.replace("=", ": ")
    path = write(tmp_path / "knobs.yaml", f"{recipe.read_text()}\n{block}\n")
    code, out, err = call("recipes", "validate", path)
    assert code == 2 and said in err and "ok" not in out


@pytest.mark.parametrize("flag", [("--ood", "none.jsonl"), ("--train", "none.jsonl"), ("--max-tokens", "5")])
def test_flags_that_suite_loss_does_not_use_exit_2(
    call: Call, tiny_model: Path, chat_rows: Path, flag: tuple[str, str]
) -> None:
    code, _, err = call("eval", "--model", tiny_model, "--data", chat_rows, *flag)
    assert code == 2 and f"{flag[0]}: is for suite" in err


def test_a_base_of_nan_has_no_loss(call: Call, tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors")
    code, _, err = call("eval", "--model", base, "--data", chat_rows, "--suite", "loss")
    assert code == 1 and "base: the loss of a row is not a number" in err


@pytest.mark.parametrize(
    ("override", "expected", "said"),
    [
        ("train.epochs=.inf", 2, "train.epochs"),
        ("train.seed=9999999999", 2, "train.seed"),
        ("lora.r=true", 2, "lora.r"),
        ("data.train=[]", 2, "data.train"),
        ("data.train=foo/bar baz", 4, "not a hub id"),
        ("model.id=foo/bar baz", 2, "not a hub id"),
        ("evaluate.data=nowhere.jsonl", 4, "nowhere.jsonl"),
    ],
)
def test_what_is_refused_leaves_no_run_behind(
    call: Call, recipe: Path, tmp_path: Path, override: str, expected: int, said: str
) -> None:
    code, _, err = call("train", recipe, "--set", override)
    assert code == expected and said in err
    assert not (tmp_path / "runs").exists()


def test_task_registries_are_read_before_training(call: Call, recipe: Path, tmp_path: Path) -> None:
    row = {"input": "a", "output": "b", "task": "bullets", "style": "markdown", "gold": ["b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    for name, said in (("none.yaml", "evaluate.tasks_file: none.yaml: no such file"), ("mine.yaml", "version")):
        value = f"evaluate={{suite: research, data: rows.jsonl, tasks_file: {name}}}"
        code, _, err = call("train", recipe, "--set", value)
        assert code == 2 and said in err, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("knob", "said"), [("cuda.attention=flash_attention_2", "is for NVIDIA"), ("cuda.unsloth=on", "plain TRL")]
)
def test_knobs_that_need_a_gpu_are_refused_on_a_cpu(
    call: Call, recipe: Path, tmp_path: Path, knob: str, said: str
) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    code, _, err = call("train", recipe, "--backend", "cuda", "--device", "cpu", "--set", knob)
    assert code == 2 and knob.partition("=")[0] in err and said in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--lr", "1"), "Did you mean '--set train.learning_rate='?"),
        (("train", "--steps", "1"), "Did you mean '--max-steps'?"),
        (("train", "--rank", "1"), "Did you mean '--set lora.r='?"),
        (("inspect", "rows.jsonl"), "Did you mean 'data inspect'?"),
        (("adapter", "inspect", "one", "two"), "Several paths match the pattern; name one."),
    ],
)
def test_a_usage_error_names_the_cure(call: Call, words: tuple[str, ...], said: str) -> None:
    Path("two").mkdir()
    code, _, err = call(*words)
    assert code == 2 and said in err
