"""`smolmlx adapter` as typed: results on stdout, notes on stderr, exit codes."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_adapter_files import PATHS, make_mlx, make_peft

import lab as labs
from smolmlx import api
from smolmlx.adapters.convert import convert
from smolmlx.adapters.exports import uniform_adapter
from smolmlx.adapters.merge import merge
from smolmlx.data.chat import Tokenizer
from smolmlx.models import BASE_FILE, open_model, write_base

Call = Callable[..., tuple[int, str, str]]


def smolmlx(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from smolmlx.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def save_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """Save a random PEFT adapter that fits a base."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    tensors = {}
    for path, (width_in, width_out) in open_model(base).linear_shapes().items():
        if path.endswith(("q_proj", "up_proj")):
            tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((4, width_in), np.float32)
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.05 * rng.standard_normal((width_out, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tree = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**tree, "base_model_name_or_path": str(base), **config}))
    return folder


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter that fits the tiny model, as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_adapter(folder / "adapter", tiny_model)
    return folder


def test_inspect_a_run(trained: Path) -> None:
    shown = smolmlx("adapter", "inspect", trained)
    assert shown.returncode == 0 and "LoRA" in shown.stdout and "q_proj (2)" in shown.stdout
    tree = json.loads(smolmlx("adapter", "inspect", trained, "--json").stdout)
    assert (
        tree["ranks"] == {"4": 4} and tree["scales"] == {"2.0": 4} and tree["layers"] == [0, 1] and not tree["problems"]
    )


def test_convert_there_and_back(trained: Path, tmp_path: Path) -> None:
    there = smolmlx("adapter", "convert", trained, tmp_path / "mlx", "--to", "mlx")
    assert there.returncode == 0 and "4 modules" in there.stdout, there.stderr
    back = smolmlx("adapter", "convert", tmp_path / "mlx", tmp_path / "peft")
    assert back.returncode == 0 and "byte for byte" in back.stdout
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (trained / "adapter" / name).read_bytes()


def test_exit_codes(trained: Path, tmp_path: Path) -> None:
    same = smolmlx("adapter", "convert", trained, tmp_path / "out", "--to", "peft")
    assert same.returncode == 2 and "already in peft format" in same.stderr
    used = smolmlx("adapter", "convert", trained, trained)
    assert used.returncode == 2 and "not empty" in used.stderr
    broken = make_peft(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"12345678")
    for verb in (["inspect"], ["analyze"], ["convert"], ["merge"]):
        out = [tmp_path / "never"] if verb[0] in ("convert", "merge") else []
        shown = smolmlx("adapter", *verb, broken, *out)
        assert shown.returncode == 4 and "Traceback" not in shown.stderr, shown.stderr
    assert not (tmp_path / "never").exists()
    nameless = smolmlx("adapter", "merge", make_mlx(tmp_path / "nameless"), tmp_path / "never")
    assert nameless.returncode == 2 and "--model M" in nameless.stderr
    uneven = smolmlx("adapter", "merge", trained, tmp_path / "never", "--weight", 1, "--weight", 2)
    assert uneven.returncode == 2 and "--weight" in uneven.stderr
    for verb, out, flag in (("merge", ["never"], "model"), ("convert", ["never"], "base"), ("analyze", [], "model")):
        idle = smolmlx("adapter", verb, trained, *(tmp_path / name for name in out), "--revision", "nonsense")
        assert idle.returncode == 2 and f"has no effect without --{flag}" in idle.stderr
        local = [f"--{flag}", "tiny", "--revision", "v1"]
        idle = smolmlx("adapter", verb, trained, *(tmp_path / name for name in out), *local)
        assert idle.returncode == 2 and "--revision v1: has no effect: tiny lies on this machine" in idle.stderr
    for weight in ("nan", "1e200", "1e37"):
        wrong = smolmlx("adapter", "merge", trained, tmp_path / "never", "--weight", weight, "--dtype", "float16")
        assert wrong.returncode == 2 and f"--weight {float(weight):g}" in wrong.stderr
    assert not (tmp_path / "never").exists()


def test_a_base_that_the_adapter_names_and_nobody_has(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It said that there is no such folder, of a folder that nobody had typed."""
    gone = save_adapter(tmp_path / "gone", tiny_model, base_model_name_or_path="/gone/base")
    for verb in (["adapter", "merge"], ["export", "hf"]):
        shown = smolmlx(*verb, gone, tmp_path / "never")
        assert shown.returncode == 2 and "/gone/base: no such model folder" in shown.stderr
        assert f"the base that {gone / 'adapter_config.json'} names. Pass --model M" in shown.stderr


def test_a_base_that_moved_is_found_by_the_name_noted_beside_it(
    call: Call, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "report.json").write_text("{}")
    edit_config(run / "adapter", base_model_name_or_path="/gone/base")
    assert call("adapter", "merge", run, "never")[0] == 2
    assert "Pass another copy: --model M to merge, analyze and export, --base M" in call("adapter", "inspect", run)[2]
    write_base(open_model(tiny_model), run / "adapter")
    assert call("adapter", "merge", run, "merged")[0] == 0
    assert call("adapter", "inspect", run)[2] == ""
    _, table, _ = call("adapter", "analyze", run, "--json")
    assert all(row["relative"] for row in json.loads(table)["weights"])
    assert api._locate(run)[0].folder == tiny_model
    note = json.loads((run / "adapter" / BASE_FILE).read_text())
    (run / "adapter" / BASE_FILE).write_text(json.dumps({**note, "weights": "others"}))
    assert "/gone/base: no such model folder" in call("adapter", "merge", run, "never")[2]


def test_several_adapters_need_their_weights(call: Call, trained: Path, tmp_path: Path) -> None:
    """A pattern that met two runs added both up in silence."""
    code, _, err = call("adapter", "merge", trained, trained, "out")
    assert code == 2 and f"2 adapters would be added up: {trained}, {trained}. Pass --weight for each" in err
    code, _, err = call("adapter", "merge", trained, trained, "out", "--weight", 1, "--weight", 0.5)
    assert code == 0 and f"added up: 1 x {trained}/adapter, 0.5 x {trained}/adapter" in err


def test_a_weight_of_0_switches_an_adapter_off(call: Call, trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It said that weights were changed."""
    code, out, _ = call("adapter", "merge", trained, "off", "--weight", 0)
    assert code == 0 and "off: 0 weights changed" in out
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "off", tiny_model))
    assert all(np.array_equal(merged[name], base[name]) for name in base)


def test_a_broken_tokenizer_is_named_where_it_lies(call: Call, trained: Path, tmp_path: Path) -> None:
    """The message named a temporary folder that was gone."""
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    (adapter / "tokenizer.json").write_text("{")
    code, _, err = call("adapter", "merge", adapter, "out")
    assert code == 4 and f"DataError: {adapter}/tokenizer.json: not a tokenizer" in err
    code, _, err = call("adapter", "inspect", adapter)
    assert code == 0 and f"problem: {adapter}/tokenizer.json: not a tokenizer" in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_where_nothing_may_be_written(call: Call, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lone = Path(shutil.copytree(trained / "adapter", tmp_path / "lone"))
    for verb in ("convert", "merge"):
        code, _, err = call("adapter", verb, trained, "file")
        assert code == 2 and "file: already there, as a file. Choose another OUT" in err
        code, _, err = call("adapter", verb, trained, "lone/deep/out")
        assert code == 2 and f"lies inside an adapter's folder, {lone}" in err
        code, _, err = call("adapter", verb, trained, "file/out")
        assert code == 1 and err.rstrip().endswith("Free some space, or choose another folder.")


def test_what_is_no_adapter_points_to_what_is(call: Call, trained: Path, tmp_path: Path) -> None:
    for stage in ("sft", "dpo"):
        shutil.copytree(trained, tmp_path / "pipe" / stage)
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "config.json").write_text("{}")
    weights = trained / "adapter" / "adapter_model.safetensors"
    said = {
        "pipe": "not an adapter's folder itself. Pass one that lies in it: pipe/dpo/adapter or pipe/sft/adapter.",
        "full": "holds a whole model and no adapter. Pass it where a model is taken: full/model.",
        "nope": "no such folder. Pass a finished run's folder, an adapter's, or (to export) a model's.",
        str(weights): f"a file. Pass the folder it lies in, {trained}/adapter.",
        __file__: "a file. Pass a finished run's folder",
    }
    for source, words in said.items():
        for verb in (["adapter", "inspect"], ["adapter", "merge"], ["export", "hf"]):
            code, _, err = call(*verb, source, *(["out"] if verb[1] != "inspect" else []))
            assert code == 2 and f"{source}: {words}" in err


def test_a_wrong_rank_is_one_problem(call: Call, trained: Path, tmp_path: Path) -> None:
    peft, mlx = Path(shutil.copytree(trained / "adapter", tmp_path / "peft")), tmp_path / "mlx"
    convert(peft, mlx)
    edit_config(peft, r=3)
    edit_config(mlx, lora_parameters={"rank": 3, "scale": 2.0, "dropout": 0.0})
    for folder in (peft, mlx):
        code, _, err = call("adapter", "inspect", folder)
        assert code == 4 and "1 problem\n" in err and "do not fit rank 3. The same holds for 3 other modules." in err


def test_a_template_without_a_tokenizer_is_said_to_be_left_out(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", tiny_model)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    notes = merge(open_model(tiny_model), [(folder, 1.0)], tmp_path / "merged").notes
    assert any(f"{folder / 'chat_template.jinja'} is left out" in note for note in notes)


def test_merge_brings_tokenizer_template_and_eos(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = smolmlx("adapter", "merge", trained, tmp_path / "merged", "--dtype", "float16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_changed"] == 4
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    } <= names
    assert not any(name.startswith("adapter") for name in names)
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    found = generation["eos_token_id"]
    assert set(Tokenizer(tiny_model).eos_ids) <= set(found if isinstance(found, list) else [found])
    assert Tokenizer(tmp_path / "merged").template_text == Tokenizer(tiny_model).template_text
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {np.dtype(np.float16)} and "lm_head.weight" not in merged


def test_a_trained_template_wins_over_the_bases(tiny_model: Path, tmp_path: Path) -> None:
    """A chat_template.jinja wins over tokenizer_config.json, so the base's must not come beside the adapter's."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    adapter = save_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, adapter / name)
    merge(open_model(base), [(adapter, 1.0)], tmp_path / "merged")
    trained, merged = Tokenizer(adapter), Tokenizer(tmp_path / "merged")
    assert merged.template_text == trained.template_text
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert set(trained.eos_ids) <= set(np.atleast_1d(generation["eos_token_id"]).tolist())


def test_a_converted_adapter_still_knows_its_base(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", adapter)
    write_base(open_model(tiny_model), adapter)
    convert(adapter, tmp_path / "mlx")
    uniform_adapter(adapter, tmp_path / "work", tmp_path / "uniform", open_model(tiny_model))
    for name in ("mlx", "uniform"):
        assert (tmp_path / name / BASE_FILE).read_bytes() == (adapter / BASE_FILE).read_bytes()
    merge(open_model(tiny_model), [(tmp_path / "mlx", 1.0)], tmp_path / "merged")
    assert not (tmp_path / "merged" / BASE_FILE).exists()


@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_a_conversion_names_the_base_that_was_passed(
    form: str, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    convert(trained / "adapter", adapter, fresh=True) if form == "mlx" else shutil.copytree(
        trained / "adapter", adapter
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("model", "base_model_name_or_path"):
        config.pop(key, None)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    convert(adapter, tmp_path / "out", base=open_model(tiny_model))
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


def test_analyze_as_table_csv_and_chart(trained: Path, tmp_path: Path) -> None:
    shown = smolmlx("adapter", "analyze", trained, "--csv", tmp_path / "a.csv")
    assert shown.returncode == 0 and "effective rank" in shown.stdout, shown.stderr
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(float(row["relative"]) > 0 and 1 <= float(row["effective_rank"]) <= 4 for row in rows)
    alone = make_peft(tmp_path / "alone")
    tree = json.loads(smolmlx("adapter", "analyze", alone, "--json").stdout)
    assert [row["weight"] for row in tree["weights"]] == list(PATHS) and tree["weights"][0]["relative"] is None
    assert not (trained / "weight_changes.json").exists(), "not a finished run"
    (trained / "report.json").write_text("{}")
    chart = smolmlx("adapter", "analyze", trained, "--chart", tmp_path / "a.svg")
    kept = json.loads((trained / "weight_changes.json").read_text())["weights"]
    assert [row["relative"] for row in kept] == [float(row["relative"]) for row in rows]
    assert {(row["layer"], row["module"]) for row in kept} == {(i, n) for i in (0, 1) for n in ("q_proj", "up_proj")}
    if importlib.util.find_spec("vl_convert") is None:
        assert chart.returncode == 3 and "smolmlx[report]" in chart.stderr
    else:
        assert chart.returncode == 0 and (tmp_path / "a.svg").read_text().startswith("<svg")


def test_the_table_says_what_is_missing_and_fits_80_columns(
    call: Call, trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call("adapter", "analyze", trained)
    assert code == 0 and "need the base" not in err
    assert out.split("\n")[1].startswith("0.mlp.up_proj ") and "0.self_attn.q_proj " in out
    lone = save_adapter(tmp_path / "lone", tiny_model, base_model_name_or_path="hub/base")
    code, out, err = call("adapter", "analyze", lone)
    assert code == 0 and "||dW||/||W|| and cosine need the base, hub/base. It is not here: pass --model M." in err


def test_a_refused_analysis_leaves_the_runs_table_alone(
    call: Call, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Another base of the same shapes gave figures, and its table took the place of the right one."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "report.json").write_text("{}")
    write_base(open_model(tiny_model), run / "adapter")
    (run / "weight_changes.json").write_text("kept")
    code, _, err = call("adapter", "analyze", run, "--chart", "a.jpg")
    assert code == 2 and "--chart a.jpg: charts are written as .svg or .png" in err
    code, _, err = call("adapter", "analyze", run, "--model", labs.make_tiny(tmp_path / "other", seed=2))
    assert code == 2 and f"made for another base model, {tiny_model}" in err
    assert (run / "weight_changes.json").read_text() == "kept"
