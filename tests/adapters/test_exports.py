"""Exports, loaded by the programs they are for; and that a wrong one does not pass."""

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

from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import gguf_model, gguf_vocab, verification
from smolmlx.adapters.card import card
from smolmlx.adapters.exports import Settings, Source, export
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError, RunError, VerificationError
from smolmlx.models import embedded_folder, open_model

for package in ("torch", "peft", "mlx_lm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: exports are checked by it", allow_module_level=True)

LINEAR = ["q_proj", "k_proj", "down_proj"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed")
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: it is the judge here"
)


def with_tokenizer(folder: Path, tokenizer: Path) -> Path:
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A PEFT adapter with two ranks, trained on the tiny byte-level model."""
    folder = tmp_path_factory.mktemp("tuned")
    adapter = stock.train_peft(tiny_model, folder / "adapter", target_modules=LINEAR, rank_pattern={"q_proj": 2})
    return Source("tuned", open_model(tiny_model), adapter)


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


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
GGUF_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama-tied", "llama-untied", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3")},
    "llama, llama3 positions": ("llama-untied", {"rope_parameters": LLAMA3}),
    "llama, linear positions": (
        "llama-tied", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
}  # fmt: skip


@needs_gguf
@needs_llama
@pytest.mark.parametrize("name", GGUF_BASES)
def test_gguf_of_each_architecture(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """float32: llama.cpp gives the ids, the logits and the greedy tokens of base and adapter in transformers."""
    kind, settings = GGUF_BASES[name]
    base = with_tokenizer(stock.make_base(kind, tmp_path / "base", vocab_size=320, **settings), tiny_model)
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=LINEAR)
    done = export("gguf", Source(name, open_model(base), adapter), tmp_path / "out.gguf", Settings(kind="f32"))
    assert done.agreements[0].nats < 1e-6 and done.agreements[0].greedy == 1 and (tmp_path / "out.gguf").is_file()


@needs_gguf
@needs_llama
def test_gguf_of_gemma_3_as_its_config_was_before_transformers_5(tiny_model: Path, tmp_path: Path) -> None:
    base = with_tokenizer(stock.make_base("gemma3", tmp_path / "base", vocab_size=320), tiny_model)
    edit_config(base, rope_parameters=None, rope_theta=300.0, rope_local_base_freq=50.0)
    done = export("gguf", Source("x", open_model(base), None), tmp_path / "out.gguf", Settings(kind="f32"))
    assert done.agreements[0].nats < 1e-6


@needs_gguf
@needs_llama
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_k_m"])
def test_gguf_types(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320, hidden_size=256), tiny_model)
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=LINEAR)
    done = export("gguf", Source("x", open_model(base), adapter), tmp_path / "out", Settings(kind=kind))
    assert (tmp_path / "out" / f"model-{kind}.gguf").is_file() and 0 < done.agreements[0].nats < done.agreements[
        0
    ].limit


@needs_gguf
@needs_llama
def test_llama_cpp_quantizes_in_silence(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It tells of every tensor, which nobody asked, unless it fails."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320, hidden_size=256), tiny_model)
    how = Settings(kind="q6_k", verify=False)
    capfd.readouterr()
    done = export("gguf", Source("x", open_model(base), None), tmp_path / "out.gguf", how)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "") and "tensor(s) required fallback" in done.notes[0]
    with pytest.raises(RunError, match="failed to open GGUF file"):
        gguf_model.quantize(tmp_path / "none.gguf", tmp_path / "never.gguf", "q6_k")


@needs_gguf
def test_gguf_says_what_rounding_takes(tiny_model: Path, tmp_path: Path) -> None:
    """bfloat16 takes as much in a GGUF as in a folder; float32 takes nothing."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    source = Source(
        "x", open_model(base), stock.train_peft(base, tmp_path / "adapter", target_modules=LINEAR, lora_alpha=1)
    )

    def notes(target: str, **how: Any) -> list[str]:
        done = export(target, source, tmp_path / f"{target}{how}", Settings(verify=False, **how))
        return [note.removeprefix("bfloat16 ").removeprefix("bf16 ").partition(";")[0] for note in done.notes]

    assert notes("gguf", kind="bf16") == notes("hf", dtype="bfloat16") and "off by" in notes("gguf", kind="q8_0")[0]
    assert not notes("gguf", kind="f32")


@needs_gguf
@needs_llama
def test_gguf_of_a_sentencepiece_model(assets: Path, tmp_path: Path) -> None:
    base = assets / "models" / "stories260k"
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=LINEAR)
    done = export("gguf", Source("stories", open_model(base), adapter), tmp_path / "out.gguf", Settings(kind="f32"))
    assert done.agreements[0].greedy == 1 and done.agreements[0].num_tokens > 64
    assert any("hard texts" in note for note in done.notes)


@needs_gguf
@needs_llama
def test_gguf_of_the_embedded_model(tmp_path: Path) -> None:
    base = open_model(embedded_folder(), "tiny")
    adapter = stock.train_peft(base.folder, tmp_path / "adapter", target_modules=LINEAR, steps=2)
    done = export("gguf", Source("tiny", base, adapter), tmp_path / "out.gguf", Settings(kind="f32"))
    assert done.agreements[0].greedy == 1


@needs_gguf
@needs_llama
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen3"])
def test_real_tokenizers_in_llama_cpp(name: str, assets: Path, tmp_path: Path) -> None:
    size = len(json.loads((assets / "tokenizers" / name / "tokenizer.json").read_text())["model"]["vocab"]) + 300
    base = with_tokenizer(
        stock.make_base("llama-tied", tmp_path / "base", vocab_size=size, hidden_size=16, num_hidden_layers=1),
        assets / "tokenizers" / name,
    )
    done = export("gguf", Source(name, open_model(base), None), tmp_path / "out.gguf", Settings(kind="f16"))
    assert any("same ids from llama.cpp" in note for note in done.notes) and done.agreements


@needs_gguf
@needs_llama
def test_gguf_says_that_llama_cpp_does_not_normalize(tiny_model: Path, tmp_path: Path) -> None:
    """With NFC in the tokenizer, a decomposed text is cut otherwise: in the output and on the card, checked or not."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    edit_tokenizer(base, normalizer={"type": "NFC"})
    source = Source("x", open_model(base), None)
    done = export("gguf", source, tmp_path / "out.gguf", Settings(kind="f32"))
    assert gguf_vocab.NFC_NOTE in done.notes and gguf_vocab.NFC_NOTE in card(done, source)
    assert any("hard texts in NFC" in note for note in done.notes)
    import llama_cpp

    llama: Any = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    cut = {text: llama.tokenize(text.encode(), add_bos=False) for text in ("Café", "Cafe\u0301")}
    llama.close()
    ours = Tokenizer(base).encode("Cafe\u0301")
    assert cut["Café"] == ours != cut["Cafe\u0301"]
    unchecked = export("gguf", source, tmp_path / "other.gguf", Settings(kind="f32", verify=False))
    assert gguf_vocab.NFC_NOTE in unchecked.notes
    edit_tokenizer(base, normalizer=None)
    done = export("gguf", source, tmp_path / "plain.gguf", Settings(kind="f32"))
    assert gguf_vocab.NFC_NOTE not in done.notes


@needs_gguf
@needs_llama
def test_a_normalizer_that_went_unseen_does_not_pass(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard text is decomposed, so that llama.cpp's other ids show."""
    monkeypatch.setattr(gguf_vocab, "normalizes", lambda folder: False)
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    edit_tokenizer(base, normalizer={"type": "NFC"})
    with pytest.raises(VerificationError, match="cuts"):
        export("gguf", Source("x", open_model(base), None), tmp_path / "out.gguf", Settings(kind="f32"))


@needs_gguf
@needs_llama
def test_a_wrong_gguf_does_not_pass(tuned: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k left in transformers' order: the file loads and talks, and is wrong."""
    monkeypatch.setitem(gguf_model.ARCHITECTURES, "llama", gguf_model.Architecture("llama", interleaved=False))
    with pytest.raises(VerificationError, match="nats per token"):
        export("gguf", tuned, tmp_path / "out.gguf", Settings(kind="f32"))
    assert not list(tmp_path.iterdir())
    done = export("gguf", tuned, tmp_path / "out.gguf", Settings(kind="f32", verify=False))
    assert done.unverified == ["everything: --no-verify"] and (tmp_path / "out.gguf").is_file()


@needs_gguf
@needs_llama
def test_a_wrong_pre_tokenizer_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_vocab, "_pre_name", lambda tree, folder: "llama-bpe")
    tiny = Source("tiny", open_model(embedded_folder()), None)
    with pytest.raises(VerificationError, match="cuts"):
        export("gguf", tiny, tmp_path / "out.gguf", Settings(kind="f32"))


@needs_gguf
@needs_llama
def test_a_wrong_bos_flag_does_not_pass(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bos, eos = gguf_vocab.adds_special(Tokenizer(assets / "models" / "stories260k"))
    monkeypatch.setattr(gguf_model, "adds_special", lambda tokenizer: (not bos, eos))
    source = Source("stories", open_model(assets / "models" / "stories260k"), None)
    with pytest.raises(VerificationError, match="adds BOS and EOS"):
        export("gguf", source, tmp_path / "out.gguf", Settings(kind="f32"))


def test_a_wrong_merge_does_not_pass(tuned: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complaint this is for: an export that lost the fine-tune."""
    assert tuned.adapter is not None
    monkeypatch.setattr(Source, "terms", property(lambda self: []))
    with pytest.raises(VerificationError, match="does not agree"):
        export("hf", tuned, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "how"),
    [
        ("hf", Settings(dtype="bfloat16")),
        ("mlx", Settings(quantize="4bit")),
        pytest.param("gguf", Settings(kind="q8_0"), marks=[needs_gguf, needs_llama]),
    ],
    ids=["bfloat16", "4bit", "q8_0"],
)
def test_a_lost_adapter_does_not_pass_as_rounding(
    target: str, how: Settings, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its change is below the limit: the bare base is nearer; for 4 bits, whose noise is larger, the merge is judged."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320, hidden_size=128), tiny_model)
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=LINEAR, lora_alpha=0.7)
    source = Source("x", open_model(base), adapter)
    done = export(target, source, tmp_path / "honest", how)
    assert done.agreements[0].can_tell and 0 < (done.agreements[-1].effect or 0) < done.agreements[-1].limit
    monkeypatch.setattr(Source, "terms", property(lambda self: []))
    with pytest.raises(VerificationError, match="is not in it" if target != "mlx" else "does not agree"):
        export(target, source, tmp_path / "lost", how)
    assert not (tmp_path / "lost").exists()


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


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_vocabularies_that_llama_cpp_would_cut_differently(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, tiny_model)
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    edit_tokenizer(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]})
    with pytest.raises(RecipeError, match="not known here"):
        gguf_vocab.read_vocabulary(folder, 320)
    edit_tokenizer(folder, pre_tokenizer=None)
    with pytest.raises(RecipeError, match=r"tokenizer\.model"):
        gguf_vocab.read_vocabulary(folder, 320)
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\x01junk")
    with pytest.raises(RecipeError, match="not a SentencePiece model"):
        gguf_vocab.read_vocabulary(folder, 320)


@pytest.mark.parametrize("name", ["Lowercase", "NFKC"])
def test_normalizers_that_llama_cpp_lacks_are_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path, tiny_model)
    edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": name}]})
    with pytest.raises(RecipeError, match=f"normalizer {name}: llama.cpp does not normalize"):
        gguf_vocab.read_vocabulary(folder, 320)
    edit_tokenizer(folder, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    assert gguf_vocab.read_vocabulary(folder, 320).model == "gpt2"


SENTENCEPIECE = ("tokenizer.json", "tokenizer.model")


def test_sentencepiece_models_that_llama_cpp_would_cut_differently(assets: Path, tmp_path: Path) -> None:
    stories = assets / "models" / "stories260k"
    for name in SENTENCEPIECE:
        shutil.copyfile(stories / name, tmp_path / name)
    assert gguf_vocab.read_vocabulary(tmp_path, 512).model == "llama"
    tree = json.loads((stories / "tokenizer.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "a Unigram tokenizer": {"model": {"type": "Unigram", "vocab": [[t, 0.0] for t in tree["model"]["vocab"]]}},
        "normalizer Precompiled": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        "pre-tokenizer Whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    }
    for message, change in changes.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps({**tree, **change}))
        with pytest.raises(RecipeError, match=message):
            gguf_vocab.read_vocabulary(tmp_path, 512)


def test_a_tokenizer_model_of_unigram_is_refused(assets: Path, tmp_path: Path) -> None:
    """Protobuf takes the last of two values, so a trainer_spec at the end says what the model is."""
    stories = assets / "models" / "stories260k"
    for number, name in ((1, "Unigram"), (3, "word")):
        written = (stories / "tokenizer.model").read_bytes() + bytes([0x12, 2, 0x18, number])
        (tmp_path / "tokenizer.model").write_bytes(written)
        with pytest.raises(RecipeError, match=f"a {name} model"):
            gguf_vocab.read_pieces(tmp_path)


@pytest.mark.parametrize("change", ["renamed", "longer", "shorter"])
def test_a_stale_tokenizer_model_is_refused(change: str, assets: Path, tmp_path: Path) -> None:
    stories = assets / "models" / "stories260k"
    shutil.copyfile(stories / "tokenizer.model", tmp_path / "tokenizer.model")
    tree = json.loads((stories / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    index = vocab.pop(last) if change != "longer" else len(vocab)
    if change != "shorter":
        vocab["▁other"] = index
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match=f"not of the same tokenizer as tokenizer.json: id {index} "):
        gguf_vocab.read_vocabulary(tmp_path, 512)


def test_pieces_as_sentencepiece_reads_them(assets: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed to compare with")
    folder = assets / "models" / "stories260k"
    known = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = gguf_vocab.read_pieces(folder)
    assert [(text, score) for text, score, _ in pieces] == [
        (known.id_to_piece(i), known.get_score(i)) for i in range(known.get_piece_size())
    ]


GEMMA2 = {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 64}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "bert"}, "model_type bert"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({**GEMMA2, "query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 128}, "sliding_window: 64"),
        ({**GEMMA2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**GEMMA2, "attn_logit_softcapping": None}, "attn_logit_softcapping: None"),
        ({**GEMMA2, "sliding_window": None}, "sliding_window: None"),
        ({"model_type": "llama", "rope_scaling": "x"}, "rope_scaling: 'x'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: None"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size: None"),
        ({"model_type": "llama", "rms_norm_eps": "x"}, "rms_norm_eps: 'x'"),
    ],
)
def test_models_that_would_be_others_in_llama_cpp(config: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        gguf_model.find_architecture({"hidden_size": 32, "num_attention_heads": 4, **config})


def test_quantizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(BackendError, match="llama-quantize"):
        gguf_model.quantize(tmp_path / "a", tmp_path / "b", "q4_k_m")


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
    "model.layers.2.mlp.up_proj.weight: missing": {"num_hidden_layers": 3},
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


@needs_gguf
def test_heads_that_do_not_fit_the_weights(
    tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    edit_config(base, num_attention_heads=3)
    code, _, err = call("export", "gguf", base, "out", "--no-verify")
    assert code == 4 and "q_proj.weight has 32 rows" in err and "num_attention_heads" in err, err


@pytest.mark.parametrize("extra", [[], ["--no-verify"]])
def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(
    extra: list[str], tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=64), tiny_model)
    code, _, err = call("export", "hf", base, "out", *extra)
    assert code == 4 and "the embedding has 64 rows" in err and "resize_token_embeddings" in err, err


@needs_gguf
@needs_llama
def test_an_added_token_that_no_text_gives_may_lie_beyond_the_embedding(tiny_model: Path, tmp_path: Path) -> None:
    """Gemma 3's text models have an image token behind the last row."""
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    edit_tokenizer(base, added_tokens=[*added, {**added[-1], "id": 320, "content": "<image>"}])
    source = Source("x", open_model(base), None)
    assert len(export("hf", source, tmp_path / "out", Settings()).agreements) == 2
    assert len(export("gguf", source, tmp_path / "out.gguf", Settings(kind="f32")).agreements) == 1


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
