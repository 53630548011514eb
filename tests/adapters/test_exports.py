"""Exports, loaded by the programs they are for; and that a wrong one does not pass. GGUF files: test_gguf.py."""

from __future__ import annotations

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
import stock
from safetensors.numpy import load_file
from stock import LINEAR, edit_config, with_tokenizer

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import verification
from smolmlx.adapters.card import card
from smolmlx.adapters.exports import Settings, Source, export
from smolmlx.errors import RecipeError, VerificationError
from smolmlx.models import open_model

for package in ("torch", "peft", "mlx_lm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: exports are checked by it", allow_module_level=True)


def test_hf_is_checked_by_both_libraries(tuned: Source, tmp_path: Path) -> None:
    done = export("hf", tuned, tmp_path / "out", Settings())
    assert [agreement.consumer.split()[0] for agreement in done.agreements] == ["transformers", "mlx-lm"]
    assert all(agreement.nats < 1e-6 and agreement.greedy == 1 for agreement in done.agreements)
    assert not any(path.name.startswith("adapter") for path in (tmp_path / "out").iterdir())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == tuned.base.config["rope_theta"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, tuned: Source, tmp_path: Path) -> None:
    done = export("hf", tuned, tmp_path / "out", Settings(dtype=dtype))
    assert done.precision == dtype and all(0 < agreement.nats < agreement.limit for agreement in done.agreements)


def test_mlx_quantized(tmp_path: Path, tiny_model: Path) -> None:
    base = with_tokenizer(
        stock.make_base("llama-tied", tmp_path / "base", vocab_size=320, hidden_size=128, intermediate_size=192),
        tiny_model,
    )
    adapter = stock.train_mlx(base, tmp_path / "adapter")
    done = export("mlx", Source("x", open_model(base), adapter), tmp_path / "out", Settings(quantize="8bit"))
    assert done.agreements[0].consumer.startswith("mlx-lm") and 0 < done.agreements[0].nats < 2e-2
    assert any(name.endswith(".scales") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_vllm_folders(tuned: Source, tmp_path: Path) -> None:
    """vLLM multiplies every module by alpha / r, so patterns must be gone from the adapter folder."""
    done = export("vllm", tuned, tmp_path / "out", Settings())
    assert len(done.agreements) == 2 and "vLLM itself" in done.unverified[0]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert len({(m.rank, m.scale) for m in adapters.read(tmp_path / "out" / "adapter").modules}) == 1
    assert "--lora-modules" in done.commands[1] and "--max-lora-rank 8" in done.commands[1]


def test_vllm_scale_of_one_pattern_for_all(tiny_model: Path, tmp_path: Path) -> None:
    """Every module has the same rank and scale, and yet not those that r and lora_alpha give."""
    adapter = stock.train_peft(
        tiny_model, tmp_path / "adapter", target_modules=LINEAR, r=8, lora_alpha=16, rank_pattern={".*": 4}
    )
    export("vllm", Source("x", open_model(tiny_model), adapter), tmp_path / "out", Settings())
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    (scale,) = {module.scale for module in adapters.read(tmp_path / "out" / "adapter").modules}
    assert not config["rank_pattern"] and config["lora_alpha"] / config["r"] == scale == 4


def test_vllm_takes_no_dora(tiny_model: Path, tmp_path: Path) -> None:
    adapter = stock.train_peft(tiny_model, tmp_path / "dora", target_modules=LINEAR, use_dora=True)
    done = export("vllm", Source("x", open_model(tiny_model), adapter), tmp_path / "out", Settings())
    assert not (tmp_path / "out" / "adapter").exists() and any("DoRA" in note for note in done.notes)


STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding, untied": ("llama-untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, tied": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "stacked experts": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": STACKED}),
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("engine", ["cuda", "mlx"])
def test_both_engines_load_more_than_linear_layers(
    kind: str, engine: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference, too, where the base that the adapter names has moved."""
    name, config = WIDE[kind]
    base = with_tokenizer(stock.make_base(name, tmp_path / "base", vocab_size=320), tiny_model)
    adapter = stock.train_peft(base, tmp_path / "adapter", **config)
    monkeypatch.setattr(verification, "reference_engine", lambda base, adapter: engine)
    moved = open_model(base.rename(tmp_path / "moved"), str(base))
    done = export("hf", Source("x", moved, adapter), tmp_path / "out", Settings())
    assert len(done.agreements) == 2 and done.agreements[0].reference.endswith(verification.library(engine))


def test_an_mlx_embedding_is_read_with_the_base(tiny_model: Path, tmp_path: Path) -> None:
    """Whether the base ties it to the head decides what it means, and that base is at hand."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    adapter = stock.train_mlx(base, tmp_path / "adapter", keys=["self_attn.v_proj", "model.embed_tokens"])
    moved = open_model(base.rename(tmp_path / "moved"), "moved")
    done = export("hf", Source("x", moved, adapter), tmp_path / "out", Settings())
    assert len(done.agreements) == 2


def test_what_cannot_be_loaded_apart_is_not_verified(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT's form cannot hold mlx-lm's DoRA with dropout; the merge can."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    adapter = stock.train_mlx(base, tmp_path / "adapter", kind="dora", keys=["self_attn.q_proj"], dropout=0.1)
    done = export("hf", Source("x", open_model(base), adapter), tmp_path / "out", Settings())
    assert not done.agreements and any("with DoRA" in text for text in done.unverified)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_second_program_that_lacks_the_model_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm has no OPT; transformers, which the export is for, has."""
    from transformers import OPTConfig, OPTForCausalLM

    settings = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    model = OPTForCausalLM(OPTConfig(vocab_size=320, num_attention_heads=4, **settings))
    model.save_pretrained(tmp_path / "base")
    base = with_tokenizer(tmp_path / "base", tiny_model)
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=["q_proj"])
    source = Source("opt", open_model(base), adapter)
    done = export("hf", source, tmp_path / "out", Settings())
    assert len(done.agreements) == 1 and any(text.startswith("mlx-lm: ") for text in done.unverified)
    with pytest.raises(VerificationError, match="does not load"):
        export("mlx", source, tmp_path / "mlx", Settings())


def test_a_wrong_merge_does_not_pass(tuned: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complaint this is for: an export that lost the fine-tune."""
    assert tuned.adapter is not None
    monkeypatch.setattr(Source, "terms", property(lambda self: []))
    with pytest.raises(VerificationError, match="does not agree"):
        export("hf", tuned, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_an_adapter_too_weak_for_a_precision_is_not_judged() -> None:
    rng = np.random.default_rng(0)
    bare = rng.standard_normal((12, 20)).astype(np.float32)
    coarse = bare + 0.1 * rng.standard_normal(bare.shape).astype(np.float32)
    for effect, told in ((0.0, False), (1e-4, False), (0.1, True)):
        tuned = bare + effect * rng.standard_normal(bare.shape).astype(np.float32)
        sample = verification.Sample(tuple(range(12)), 4, tuned, bare)
        found = verification.compare([sample], lambda ids, d=tuned - bare: coarse + d, ("a", "b"), "q4_k_m")  # type: ignore[misc]
        assert found.can_tell == told
        assert found.effect == 0 if effect == 0 else found.effect


def test_compare_finds_noise_and_nonsense() -> None:
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((12, 20)).astype(np.float32)
    sample = verification.Sample((1, *np.argmax(logits[:-1], axis=1).tolist()), 1, logits)
    same = verification.compare([sample], lambda ids: logits + 3, ("a", "b"), "float32")
    assert same.nats < 1e-12 and same.greedy == 1
    padded = np.pad(logits, ((0, 0), (0, 4)), constant_values=-99)
    assert verification.compare([sample], lambda ids: padded, ("a", "b"), "float32").nats < 1e-12
    for gap, share in ((1e-3, 1.0), (1e-1, 0.0)):  # a tie of two tokens, and none
        two = np.zeros((2, 20), dtype=np.float32)
        two[:, 3], two[:, 4] = 1 + gap, 1
        near = verification.Sample((1, 3), 1, two)
        assert (
            verification.compare(
                [near], lambda ids, two=two: two[:, [0, 1, 2, 4, 3, *range(5, 20)]], ("a", "b"), "q4_k_m"
            ).greedy
            == share
        )
    for wrong in (logits[:, ::-1], np.full_like(logits, np.nan), logits[:-1]):
        with pytest.raises(VerificationError):
            verification.compare([sample], lambda ids, wrong=wrong: wrong, ("a", "b"), "q4_k_m")  # type: ignore[misc]


def test_command_line(tuned: Source, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "from smolmlx.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, "export", *map(str, arguments)], capture_output=True, text=True
        )

    shown = run("hf", tuned.adapter, tmp_path / "merged")
    assert shown.returncode == 0 and shown.stdout.count("verified:") == 2 and "Next:" in shown.stdout, shown.stderr
    again = run("hf", tuned.adapter, tmp_path / "merged")
    assert again.returncode == 2 and "not empty" in again.stderr
    kind = run("gguf", tuned.adapter, tmp_path / "x.gguf", "--type", "q9", "--no-verify")
    assert kind.returncode == 2 and "q8_0" in kind.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    unfinished = run("hf", tmp_path / "run", tmp_path / "never")
    assert unfinished.returncode == 2 and "--resume" in unfinished.stderr


def test_what_has_no_effect_or_cannot_be_written_is_refused(
    tuned: Source, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    cases = [
        (["hf", tuned.adapter, "out", "--revision", "nonsense"], "--revision nonsense has no effect"),
        (["hf", tuned.base.folder, "out", "--revision", "nonsense"], "--revision nonsense has no effect"),
        (["hf", tuned.adapter, "out", "--model", "tiny", "--revision", "v2"], "--revision v2 has no effect: tiny"),
        (["hf", tuned.adapter, "out", "--private"], "--private has no effect"),
        (["gguf", tuned.adapter, "afile/x.gguf"], "afile is a file"),
        (["hf", tuned.adapter, "afile/deep/out"], "afile is a file"),
    ]
    (tmp_path / "afile").write_text("")
    for arguments, message in cases:
        code, _, err = call("export", *arguments)
        assert code == 2 and message in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_broken_tokenizer(tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    base = stock.make_base("llama-tied", tmp_path / "base", vocab_size=320)
    (base / "tokenizer.json").write_text("{")
    for extra in ([], ["--no-verify"]):
        code, _, err = call("export", "hf", base, "out", *extra)
        assert code == 4 and "tokenizer.json: not a tokenizer" in err, err


def no_engine(*arguments: object) -> None:
    raise AssertionError("an engine was asked")


@pytest.mark.parametrize("extra", [[], ["--no-verify"]])
@pytest.mark.parametrize("header", [b"[]", b'{"a": []}'])
def test_broken_weights(
    header: bytes, extra: list[str], tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    code, _, err = call("export", "hf", base, "out", *extra)
    assert code == 4 and "not a whole safetensors file" in err and "Fetch the file again" in err, err


BROKEN: dict[str, dict[str, Any]] = {
    "hidden_size: missing": {"hidden_size": None},
    "num_attention_heads: expected a positive integer, found 0": {"num_attention_heads": 0},
    "num_key_value_heads: expected a positive integer, found 0": {"num_key_value_heads": 0},
    "vocab_size: 640, but model.embed_tokens.weight is stored as": {"vocab_size": 640},
    "hidden_size: 4096, but model.embed_tokens.weight is stored as": {"hidden_size": 4096},
    "num_hidden_layers: 1, but the weights are of 2": {"num_hidden_layers": 1},
    "its weight files lack model.layers.2.input_layernorm.weight": {"num_hidden_layers": 3},
    "model_type: expected": {"model_type": None},
}


@pytest.mark.parametrize("message", BROKEN)
@pytest.mark.parametrize("target", ["hf", "mlx", "gguf"])
def test_a_config_that_is_not_of_the_weights(
    target: str,
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    """An engine would build the model of the config, defaults and all."""
    monkeypatch.setattr(verification, "make_samples", no_engine)
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    edit_config(base, **BROKEN[message])
    code, _, err = call("export", target, base, "out")
    assert code in (2, 4) and message in err and any(s in err for s in ("config.json", "Fetch the model again")), err


def test_a_config_of_a_model_type_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(verification, "make_samples", no_engine)
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for kind, missing in (("llama", "num_hidden_layers"), ("gpt_neox", "vocab_size")):
        (base / "config.json").write_text(json.dumps({"model_type": kind}))
        code, _, err = call("export", "hf", base, "out")
        assert code == 4 and f"{missing}: missing" in err, err


@pytest.mark.parametrize("extra", [[], ["--no-verify"]])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(
    extra: list[str], tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=64), tiny_model)
    code, _, err = call("export", "hf", base, "out", *extra)
    assert code == 4 and "the embedding has 64 rows" in err and "resize_token_embeddings" in err, err


@pytest.mark.parametrize(("target", "verify"), [("hf", True), ("mlx", True), ("mlx", False)])
def test_a_sliding_window_that_mlx_lm_lacks_is_named(
    target: str, verify: bool, tiny_model: Path, tmp_path: Path
) -> None:
    base = with_tokenizer(
        stock.make_base("mistral", tmp_path / "base", vocab_size=320, sliding_window=256, max_position_embeddings=512),
        tiny_model,
    )
    source = Source("x", open_model(base), None)
    done = export(target, source, tmp_path / "out", Settings(verify=verify))
    assert "beyond 256 tokens: mlx-lm has no sliding window for mistral" in done.unverified
    assert "not verified: beyond 256 tokens" in card(done, source)


def test_glm_is_not_for_mlx_lm(tiny_model: Path, tmp_path: Path) -> None:
    """mlx-lm rotates the whole head; transformers, which `export hf` is for, is not held up by that."""
    stock_base = stock.make_base("glm", tmp_path / "base", vocab_size=320)
    source = Source("x", open_model(with_tokenizer(stock_base, tiny_model)), None)
    with pytest.raises(RecipeError, match="rotates the whole head"):
        export("mlx", source, tmp_path / "mlx", Settings(verify=False))
    done = export("hf", source, tmp_path / "hf", Settings())
    assert len(done.agreements) == 1 and any("rotates the whole head" in text for text in done.unverified)


def test_a_type_that_was_not_compared_is_named_until_it_is(tiny_model: Path, tmp_path: Path) -> None:
    base = with_tokenizer(stock.make_base("ernie", tmp_path / "base", vocab_size=320), tiny_model)
    source = Source("x", open_model(base), None)
    done = export("hf", source, tmp_path / "hf", Settings(verify=False))
    assert any("ernie4_5" in note and "was not compared" in note for note in done.notes)
    done = export("hf", source, tmp_path / "asked", Settings())
    assert len(done.agreements) == 2 and not any("was not compared" in note for note in done.notes)


def test_quantizing_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    with pytest.raises(RecipeError, match="nothing would be quantized"):
        export("mlx", Source("x", open_model(base), None), tmp_path / "out", Settings(quantize="4bit"))
    assert not (tmp_path / "out").exists()


def test_drift_is_exit_5_and_keeps_nothing(
    tuned: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    """The adapter is merged a tenth too strong; without a check that is written, and it says that nothing was checked."""
    monkeypatch.setattr(Source, "terms", property(lambda source: [(source.adapter, 1.1)]))
    code, _, err = call("export", "hf", tuned.adapter, "out")
    assert code == 5 and "does not agree" in err and "--no-verify keeps it" in err
    assert not list(tmp_path.iterdir())
    code, out, err = call("export", "hf", tuned.adapter, "out", "--no-verify")
    assert code == 0 and "not verified: everything: --no-verify" in out, err


def test_what_is_not_installed_is_named(tuned: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only mlx-lm here: the folder is checked with it, and what transformers would say is not claimed."""
    monkeypatch.setattr(verification, "is_installed", lambda engine: engine == "mlx")
    done = export("hf", tuned, tmp_path / "out", Settings())
    assert [agreement.consumer.split()[0] for agreement in done.agreements] == ["mlx-lm"]
    assert "transformers: not installed" in done.unverified
    monkeypatch.setattr(verification, "is_installed", lambda engine: False)
    done = export("hf", tuned, tmp_path / "none", Settings())
    assert not done.agreements and any("neither torch" in text for text in done.unverified)
