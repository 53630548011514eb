"""`smolmlx export` without an engine: what is refused before the work starts, what is printed, and cards."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_cli_adapter import save_adapter

from smolmlx.adapters import exports, gguf_model
from smolmlx.adapters.card import card
from smolmlx.adapters.exports import Export, Source
from smolmlx.adapters.verification import Agreement, describe
from smolmlx.cli.export import command
from smolmlx.models import BaseModel, embedded_folder, open_model, write_base
from smolmlx.plan import FROM_CONFIG
from smolmlx.rundir import RunDir

Call = Callable[..., tuple[int, str, str]]
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed")


def no_work(*arguments: object, **named: object) -> None:
    raise AssertionError("the work began")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf", "e1.gguf"), "export hf writes a folder, no .gguf file. Name it e1. For a GGUF file: smolmlx export gguf."),
        (("mlx", "e1.GGUF"), "export mlx writes a folder"),
        (("vllm", "e1.safetensors"), "export vllm writes a folder, no .safetensors file"),
        (("gguf", "e1.bin"), "Name it e1.gguf, or e1 for a folder"),
        (("gguf", "out", "--type", "q5"), "Did you mean 'q5_k_s' or 'q5_k_m'?"),
        (("gguf", "out", "--type", "FP16"), "Did you mean 'f16'?"),
        (("gguf", "out", "--type", ""), "expected f32,"),
        (("hf", "out", "--push", "bad name!"), "--push bad name!: not a repository's name"),
    ],
)  # fmt: skip
def test_what_is_refused_before_the_work(
    arguments: tuple[str, ...], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:  # fmt: skip
    if "--push" in arguments:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it knows what names are")
    monkeypatch.setattr(exports, "prepare", no_work)
    target, *rest = arguments
    code, out, err = call("export", target, tiny_model, *rest)
    assert code == 2 and message in err and not out, err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here, in which not even root can write")
@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_an_out_that_cannot_be_written(
    target: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """It was found out after minutes of checks."""
    monkeypatch.setattr(exports, "prepare", no_work)
    for out in ("/proc/foo", "/proc/foo/deep"):
        code, _, err = call("export", target, tiny_model, out)
        assert code == 2 and f"{out}: cannot be written" in err and "--out" not in err, err


@needs_gguf
def test_a_gguf_by_any_case(tiny_model: Path, tmp_path: Path, call: Call) -> None:
    import gguf

    code, _, err = call("export", "gguf", tiny_model, "e4.GGUF", "--type", "F32", "--no-verify")
    assert code == 0 and (tmp_path / "e4.GGUF").is_file(), err
    assert gguf.GGUFReader(tmp_path / "e4.GGUF").fields["general.name"].contents() == "model"
    write_base(BaseModel("me/base", tiny_model, "abc", {}), adapter := save_adapter(tmp_path / "adapter", tiny_model))
    code, _, err = call("export", "gguf", adapter, "folder", "--type", "Q8_0", "--no-verify")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["README.md", "model-q8_0.gguf"], err
    made = gguf.GGUFReader(tmp_path / "folder" / "model-q8_0.gguf")
    assert made.fields["general.name"].contents() == "base fine-tuned"


def test_next_lines_can_be_pasted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    base = shutil.copytree(tiny_model, tmp_path / "a base")
    adapter = save_adapter(tmp_path / "adapter", base)
    for target, program in (("hf", None), ("mlx", "mlx_lm.generate"), ("vllm", "vllm"), ("gguf", "llama-cli")):
        if target == "gguf" and importlib.util.find_spec("gguf") is None:
            continue
        code, out, err = call("export", target, adapter, f"my {target}", "--no-verify")
        lines = [line.removeprefix("Next: ") for line in out.splitlines() if line.startswith("Next: ")]
        assert code == 0 and lines and all(f"my {target}" in " ".join(shlex.split(line)[2:]) for line in lines), out
        assert program is None or f"{program} is not on the PATH here. It comes with" in err
        assert target != "vllm" or str(base) in shlex.split(lines[1])


def test_the_adapter_for_vllm_names_the_base_that_was_passed(tiny_model: Path, tmp_path: Path, call: Call) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_model, base_model_name_or_path="/gone/base", revision="v9")
    code, _, err = call("export", "vllm", adapter, "out", "--no-verify", "--model", tiny_model)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert code == 0 and config["base_model_name_or_path"] == str(tiny_model) and config["revision"] is None, err


def test_help_has_all_types_and_examples() -> None:
    for name in command.commands:
        shown = CliRunner().invoke(command, [name, "--help"], terminal_width=200).output
        assert "Examples:" in shown and f"smolmlx export {name} " in shown
        assert name != "gguf" or all(kind in shown for kind in (*gguf_model.PLAIN_TYPES, *gguf_model.K_TYPES))


@pytest.mark.parametrize(("typed", "meant"), [("hg", "hf"), ("GGUF", "gguf"), ("vlm", "vllm")])
def test_a_misspelt_target(typed: str, meant: str, call: Call) -> None:
    code, _, err = call("export", typed, "a", "b")
    assert code == 2 and f"no such command 'export {typed}'. Did you mean '{meant}'?" in err


def make_full_run(folder: Path, tiny_model: Path, model: dict[str, str | None]) -> BaseModel:
    """Leave a whole model and a plan, as full training does."""
    run = RunDir(folder)
    shutil.copytree(tiny_model, run.model)
    run.write_json("plan.json", {"model": model})
    return open_model(run.model)


def test_a_card_says_what_was_tuned(tiny_model: Path, tmp_path: Path) -> None:
    """Only a hub id is named as the base; the last part of a path, `model` for most, tells nobody anything."""

    def text(base: BaseModel, adapter: Path | None = None) -> str:
        return card(Export("hf", tmp_path / "out-v1.2", "float32"), Source("x", base, adapter))

    tiny, hub = open_model(embedded_folder()), BaseModel("me/base", tiny_model, "abc", {})
    adapters = {name: save_adapter(tmp_path / name, tiny_model) for name in ("tiny", "hub", "other")}
    write_base(BaseModel("tiny", tiny_model, None, {}), adapters["tiny"])
    write_base(hub, adapters["hub"])
    full = make_full_run(tmp_path / "full", tiny_model, {"id": "me/base", "revision": "abc"})
    fresh = make_full_run(tmp_path / "fresh", tiny_model, {"id": FROM_CONFIG, "revision": None})
    tuned = "Fine-tuned from me/base, and exported with smolmlx (float32)."
    cases = [
        (text(tiny, adapters["tiny"]), "", "Fine-tuned from `tiny`, smolmlx's own model, and exported"),
        (text(tiny, adapters["other"]), "", "Fine-tuned from the local model `model`, and exported"),
        (text(open_model(tiny_model), adapters["hub"]), "me/base", tuned),
        (text(hub, adapters["other"]), "me/base", tuned),
        (text(full), "me/base", tuned),
        (text(fresh), "", "This is the local model `fresh`, exported with smolmlx"),
        (text(hub), "me/base", "This is me/base, exported with smolmlx"),
        (
            text(BaseModel("merged", tiny_model, None, {})),
            "",
            "This is the local model `merged`, exported with smolmlx",
        ),
    ]
    for found, base, sentence in cases:
        assert sentence in found and "# out-v1.2\n" in found, found
        assert (f'base_model: "{base}"' in found) if base else ("base_model" not in found), found


def test_a_low_precision_is_not_called_the_same_model() -> None:
    def say(limit: float) -> str:
        return describe(Agreement("mlx-lm 1", "base", 0.11, 1.0, 0.815, 320, limit))

    assert say(2e-2).startswith(
        "verified: mlx-lm 1 against base: mean KL divergence 0.11 nats per token (limit 0.02), 81.5%"
    )
    assert "verified" not in say(2.0) and say(2.0).startswith("not broken, but not the same model: ")
