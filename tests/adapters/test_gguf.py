"""GGUF files, loaded by llama.cpp; and that a wrong one, or one that llama.cpp would read otherwise, does not pass."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock
from stock import LINEAR, edit_config, with_tokenizer

from smolmlx.adapters import gguf_model, gguf_vocab
from smolmlx.adapters.card import card
from smolmlx.adapters.exports import Settings, Source, export
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, RecipeError, RunError, VerificationError
from smolmlx.models import embedded_folder, open_model

for package in ("torch", "peft", "mlx_lm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: exports are checked by it", allow_module_level=True)


needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed")


needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: it is the judge here"
)


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


@needs_gguf
def test_heads_that_do_not_fit_the_weights(
    tiny_model: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    base = with_tokenizer(stock.make_base("llama-tied", tmp_path / "base", vocab_size=320), tiny_model)
    edit_config(base, num_attention_heads=3)
    code, _, err = call("export", "gguf", base, "out", "--no-verify")
    assert code == 4 and "32 wide with 3 heads" in err and "config.json" in err, err


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
