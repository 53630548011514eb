"""Merged models: judged by transformers and mlx-lm beside base and adapter, and bit by bit against float64."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stock
from safetensors.numpy import load_file, save_file

import lab as labs
from smolmlx.adapters import adapter as adapters
from smolmlx.adapters import hf_config
from smolmlx.adapters.analysis import analyze, effective_rank
from smolmlx.adapters.base import Weights, dequantize
from smolmlx.adapters.merge import merge
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.models import open_model, write_base

for package in ("torch", "peft", "mlx_lm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: its own loader is the judge here", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama-tied", {"target_modules": LINEAR}),
    "tied, embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied, whole embedding": (
        "llama-tied",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "untied, dora": ("llama-untied", {"target_modules": LINEAR, "use_dora": True}),
    "untied head": ("qwen3", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "whole norm and head": ("qwen3", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "patterns, rslora": ("qwen2", {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "fused projections": ("phi3", {"target_modules": "all-linear"}),
    "experts": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: stock.make_base(name, folder / name) for name in stock.BASES}


@pytest.fixture(scope="module")
def quantized(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied base, quantized to 4 bits by mlx-lm itself."""
    model = stock.mlx_base(bases["llama-tied"])
    from mlx_lm.utils import quantize_model, save_config, save_model

    config = json.loads((bases["llama-tied"] / "config.json").read_text())
    model, config = quantize_model(model, config, group_size=32, bits=4)
    out = tmp_path_factory.mktemp("quantized") / "base"
    save_model(out, model)
    save_config(config, out / "config.json")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_merged_peft_adapter_speaks_as_the_adapter(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config = KINDS[kind]
    adapter = stock.train_peft(bases[name], tmp_path / "peft", **config)
    done = merge(open_model(bases[name]), [(adapter, 1.0)], tmp_path / "merged")
    assert done.dtype == "float32" and done.lost < 1e-3 and not done.erased
    wanted = stock.peft_logits(bases[name], adapter)
    np.testing.assert_allclose(stock.peft_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "kind"), [("llama-tied", "lora"), ("qwen3", "dora"), ("qwen3-moe", "lora")])
def test_merged_mlx_adapter_speaks_as_the_adapter(name: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_mlx(bases[name], tmp_path / "mlx", kind=kind)
    merge(open_model(bases[name]), [(adapter, 1.0)], tmp_path / "merged")
    wanted = stock.mlx_logits(bases[name], adapter)
    np.testing.assert_allclose(stock.peft_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


def test_quantized_base(quantized: Path, tmp_path: Path) -> None:
    adapter = stock.train_mlx(quantized, tmp_path / "mlx", keys=["self_attn.q_proj", "mlp.up_proj"])
    done = merge(open_model(quantized), [(adapter, 1.0)], tmp_path / "merged", dtype="float32")
    assert "quantized" in done.notes[0]
    assert not {"quantization", "quantization_config"} & set(json.loads((tmp_path / "merged/config.json").read_text()))
    wanted = stock.mlx_logits(quantized, adapter)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(stock.peft_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize_as_mlx_does(bits: int) -> None:
    mx = labs.import_mlx()
    weight = mx.random.normal((6, 128), key=mx.random.key(bits))
    packed = mx.quantize(weight, group_size=32, bits=bits)
    theirs = np.array(mx.dequantize(*packed, group_size=32, bits=bits))
    ours = dequantize(*(np.array(part) for part in packed), bits, 32)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [("float32", 2**-23), ("float16", 2**-10), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("base", ["llama-untied", "llama-tied", "4-bit"])
def test_within_one_rounding_step(
    base: str, dtype: str, step: float, bases: dict[str, Path], quantized: Path, tmp_path: Path
) -> None:
    """Of every weight that is adapted; a tied head and embedding are adapted as one."""
    folder = quantized if base == "4-bit" else bases[base]
    config: dict[str, Any] = {
        "target_modules": [*LINEAR, "embed_tokens"],
        "ensure_weight_tying": base != "llama-untied",
    }
    trained_on = bases["llama-tied"] if base == "4-bit" else folder
    adapter = stock.train_peft(trained_on, tmp_path / "peft", save_embedding_layers=base != "4-bit", **config)
    merge(open_model(folder), [(adapter, 1.0)], tmp_path / "merged", dtype=dtype)
    found = adapters.read(adapter)
    before, after = Weights(open_model(folder)), Weights(open_model(tmp_path / "merged"))
    assert after.tied == (base != "llama-untied") and not after.quantized
    for module in found.modules:
        a, b = (factor.astype(np.float64) for factor in found.factors(module))
        stored = before.find(f"{module.path}.weight")
        assert stored is not None
        change = module.scale * (a @ b if module.kind == "embedding" else (a @ b).T)
        wanted = before.floats(stored) + change
        got = after.floats(after.find(stored) or stored)
        assert (np.abs(got - wanted) <= step * np.abs(wanted) + 1e-6).all()
        assert np.abs(change).max() > 1e-3
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == dtype


def test_gemma_3_keeps_its_two_kinds_of_position(tmp_path: Path) -> None:
    """transformers nests them by kind of layer; mlx-lm knows other names, and took its defaults."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    base = stock.make_base("gemma3-64", tmp_path / "base", rope_parameters=rope)
    config = json.loads((base / "config.json").read_text())
    plain = {
        name: value
        for name, value in config.items()
        if name not in ("rope_theta", "rope_local_base_freq", "rope_scaling")
    }
    (base / "config.json").write_text(json.dumps(plain))
    merge(open_model(base), [], tmp_path / "merged")
    wanted = stock.peft_logits(base, None)
    for logits in stock.LOGITS.values():
        np.testing.assert_allclose(logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


FULL, SLIDING = "full_attention", "sliding_attention"
TRANSFORMERS_5: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {}),
    "lfm2": ("lfm2", {}),
    "exaone4": ("exaone4", {}),
    "exaone4, of no period": ("exaone4", {"layer_types": [FULL, SLIDING, SLIDING, FULL]}),
    "exaone4, no window": ("exaone4", {"sliding_window": None, "sliding_window_pattern": None, "layer_types": [FULL] * 4}),
    "cohere2, every second": ("cohere2", {"layer_types": [SLIDING, FULL] * 2, "sliding_window": 4}),
    "cohere2, all in full": ("cohere2", {"layer_types": [FULL] * 4, "sliding_window": 4}),
    "gemma3, every third": (
        "gemma3-64", {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "sliding_window": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMERS_5)
def test_both_libraries_read_the_configs_of_transformers_5(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers saves values under new names only; mlx-lm does not load then, or takes its defaults."""
    name, settings = TRANSFORMERS_5[kind]
    monkeypatch.setattr(stock, "readable", lambda config: config)  # as transformers saves it
    base = stock.make_base(name, tmp_path / "base", **settings)
    merge(open_model(base), [], tmp_path / "merged")
    wanted = stock.peft_logits(base, None)
    for logits in stock.LOGITS.values():
        np.testing.assert_allclose(logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "gemma2", "starcoder2", "phi3", "cohere2", "exaone4", "gemma3-64"]
)
def test_a_window_that_mlx_lm_ignores_is_known(name: str, tmp_path: Path) -> None:
    """With a window shorter than the prompt, logits differ exactly where a note says so."""
    settings = {"use_sliding_window": True, "max_window_layers": 0} if name == "qwen2" else {}
    base = stock.make_base(name, tmp_path / "base", sliding_window=4, **settings)
    config = json.loads((base / "config.json").read_text())
    off = float(np.abs(stock.peft_logits(base, None) - stock.mlx_logits(base, None)).max())
    said = hf_config.ignored_window(config)
    assert (said is not None) == (off > 1e-3)
    assert said is None or said.startswith("beyond 4 tokens")
    assert hf_config.ignored_window({**config, "max_position_embeddings": 4}) is None


def test_what_mlx_lm_computes_otherwise_is_named(tmp_path: Path) -> None:
    """No config makes both agree on these; a whole rotated head and a period do."""
    for name, settings in (("glm", {}), ("cohere2", {"layer_types": [FULL, SLIDING] * 2, "sliding_window": 4})):
        base = stock.make_base(name, tmp_path / name, **settings)
        config = json.loads((base / "config.json").read_text())
        assert np.abs(stock.peft_logits(base, None) - stock.mlx_logits(base, None)).max() > 0.05
        assert hf_config.mlx_difference(config) and hf_config.mlx_difference(config) in hf_config.limits(config)
    whole = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    base = stock.make_base("glm", tmp_path / "whole", rope_parameters=whole)
    assert hf_config.mlx_difference(json.loads((base / "config.json").read_text())) is None
    np.testing.assert_allclose(stock.peft_logits(base, None), stock.mlx_logits(base, None), atol=1e-4, rtol=0)


def test_a_merge_names_a_type_that_was_not_compared(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    base = stock.make_base("ernie", tmp_path / "base")
    adapter = stock.train_peft(base, tmp_path / "adapter", target_modules=["q_proj"])
    code, out, err = call("adapter", "merge", adapter, "out", "--model", base)
    assert code == 0 and "ernie4_5" in out + err and "not compared" in " ".join((out + err).split()), err


def test_erased_change_is_reported(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["llama-untied"], tmp_path / "peft", target_modules=LINEAR)
    base = open_model(bases["llama-untied"])
    done = merge(base, [(adapter, 1e-3)], tmp_path / "merged", dtype="bfloat16")
    assert len(done.erased) == 6 and done.lost > 0.05
    assert done.lost > merge(base, [(adapter, 1.0)], tmp_path / "more", dtype="bfloat16").lost


def test_sharded_base(bases: dict[str, Path], tmp_path: Path) -> None:
    import torch

    sharded = tmp_path / "sharded"
    model = stock.torch_base(bases["qwen2"]).to(torch.float32)
    model.save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "config.json").write_bytes((bases["qwen2"] / "config.json").read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 2
    adapter = stock.train_peft(bases["qwen2"], tmp_path / "peft", target_modules=LINEAR)
    merge(open_model(sharded), [(adapter, 1.0)], tmp_path / "merged")
    merge(open_model(bases["qwen2"]), [(adapter, 1.0)], tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "whole"))
    assert set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_index_that_leaves_the_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((bases["qwen2"] / name).read_bytes())
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a file of this folder"):
        Weights(open_model(folder))


def test_linear_combination(bases: dict[str, Path], tmp_path: Path) -> None:
    """X6: two adapters together are the sum of their changes, and a coefficient of 0 switches one off."""
    base = open_model(bases["llama-tied"])
    one = stock.train_peft(bases["llama-tied"], tmp_path / "one", target_modules=["q_proj", "up_proj"])
    two = stock.train_mlx(bases["llama-tied"], tmp_path / "two", keys=["self_attn.q_proj"], scale=1.0)
    merge(base, [(one, 0.5), (two, -1.5)], tmp_path / "both")
    merge(base, [(one, 1.0)], tmp_path / "first")
    merge(base, [(two, 1.0)], tmp_path / "second")
    merge(base, [(one, 1.0), (two, 0.0)], tmp_path / "off")
    plain, both, first, second, off = (
        load_file(folder / "model.safetensors")
        for folder in (bases["llama-tied"], *(tmp_path / name for name in ("both", "first", "second", "off")))
    )
    for name in plain:
        wanted = plain[name] + 0.5 * (first[name] - plain[name]) - 1.5 * (second[name] - plain[name])
        np.testing.assert_allclose(both[name], wanted, atol=1e-5)
        np.testing.assert_array_equal(off[name], first[name])


ONE_SIDE: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head of another scale": {
        "target_modules": ["q_proj", "embed_tokens"],
        "ensure_weight_tying": True,
        "rank_pattern": {"embed_tokens": 2},
    },
}


@pytest.mark.parametrize("side", ONE_SIDE)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tie_is_kept_or_refused(side: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["llama-tied"], tmp_path / "adapter", **ONE_SIDE[side])
    base = open_model(bases["llama-tied"])
    with pytest.raises(RecipeError, match="--untie"):
        merge(base, [(adapter, 1.0)], tmp_path / "refused")
    done = merge(base, [(adapter, 1.0)], tmp_path / "merged", untie=True)
    assert not done.tied
    wanted = stock.peft_logits(bases["llama-tied"], adapter)
    for logits in stock.LOGITS.values():
        np.testing.assert_allclose(logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


def test_an_embedding_of_mlx_lm_changes_a_tied_head_too(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's leaves the head alone, so the two together give two weights."""
    base = open_model(bases["llama-tied"])
    theirs = stock.train_mlx(bases["llama-tied"], tmp_path / "mlx", keys=["self_attn.v_proj", "model.embed_tokens"])
    assert merge(base, [(theirs, 1.0)], tmp_path / "alone").tied
    wanted = stock.mlx_logits(bases["llama-tied"], theirs)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "alone", None), wanted, atol=1e-4, rtol=0)
    other = stock.train_peft(bases["llama-tied"], tmp_path / "peft", **ONE_SIDE["embedding"])
    assert merge(base, [(theirs, 1.0), (other, 0.0)], tmp_path / "off").tied
    merge(base, [(theirs, 1.0), (other, 1.0)], tmp_path / "both", untie=True)
    alone, both = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    np.testing.assert_array_equal(both["lm_head.weight"], alone["model.embed_tokens.weight"])
    assert not np.array_equal(both["model.embed_tokens.weight"], alone["model.embed_tokens.weight"])


def test_dora_on_an_embedding(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's magnitude is per column, which was taken for one per row; mlx-lm's is per row."""
    config = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    adapter = stock.train_peft(bases["llama-untied"], tmp_path / "peft", **config)
    for look in (
        lambda: merge(open_model(bases["llama-untied"]), [(adapter, 1.0)], tmp_path / "out"),
        lambda: analyze(adapter),
    ):
        with pytest.raises(RecipeError, match=r"embed_tokens: DoRA on an embedding: .* per column"):
            look()
    theirs = stock.train_mlx(
        bases["llama-untied"], tmp_path / "mlx", kind="dora", keys=["self_attn.q_proj", "model.embed_tokens"]
    )
    merge(open_model(bases["llama-untied"]), [(theirs, 1.0)], tmp_path / "merged")
    wanted = stock.mlx_logits(bases["llama-untied"], theirs)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


def stored_as(source: Path, folder: Path, kind: type[np.generic]) -> Path:
    """Write a base with its weights in another type."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.astype(kind) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_base_of_float64(bases: dict[str, Path], tmp_path: Path) -> None:
    """It came out as it was, the adapter left out, and was called float32."""
    base = stored_as(bases["qwen2"], tmp_path / "base", np.float64)
    adapter = stock.train_peft(bases["qwen2"], tmp_path / "peft", target_modules=LINEAR)
    assert merge(open_model(base), [(adapter, 1.0)], tmp_path / "merged").dtype == "float32"
    merge(open_model(bases["qwen2"]), [(adapter, 1.0)], tmp_path / "wanted")
    merged, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wanted"))
    assert all(np.array_equal(merged[name], wanted[name]) and merged[name].dtype == np.float32 for name in wanted)


def test_a_base_of_another_type_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = stored_as(bases["qwen2"], tmp_path / "base", np.int8)
    adapter = stock.train_peft(bases["qwen2"], tmp_path / "peft", target_modules=LINEAR)
    with pytest.raises(RecipeError, match="stored as I8"):
        merge(open_model(base), [(adapter, 1.0)], tmp_path / "merged")


def test_tied_weight_stored_as_the_head_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """mlx-lm and llama.cpp fail on such a folder; the merged one has the embedding."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_bytes((bases["llama-tied"] / "config.json").read_bytes())
    tensors = load_file(bases["llama-tied"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = stock.train_peft(bases["llama-tied"], tmp_path / "peft", target_modules=LINEAR)
    merge(open_model(folder), [(adapter, 1.0)], tmp_path / "merged")
    wanted = stock.peft_logits(bases["llama-tied"], adapter)
    np.testing.assert_allclose(stock.mlx_logits(tmp_path / "merged", None), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "qwen3"])
def test_a_config_that_does_not_say_whether_it_is_tied(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Configs of transformers 4 leave out what is the type's default, which is tied for Gemma and Cohere."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(bases[name] / "model.safetensors")
    config = json.loads((bases[name] / "config.json").read_text())
    tied = config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    done = merge(open_model(folder), [], tmp_path / "merged")
    assert done.tied == tied == (name != "qwen3")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] == tied


def test_a_tie_to_an_embedding_of_another_name_is_refused(tmp_path: Path) -> None:
    save_file({"transformer.word_embeddings.weight": np.ones((8, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "tie_word_embeddings": true}')
    with pytest.raises(RecipeError, match="not called embed_tokens"):
        merge(open_model(tmp_path), [], tmp_path / "out")


def test_full_weights_of_mlx_lm(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    tensors = load_file(bases["qwen3"] / "model.safetensors")
    trained = {name: value * 1.5 for name, value in tensors.items() if "q_proj" in name}
    save_file(trained, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2}')
    merge(open_model(bases["qwen3"]), [(folder, 1.0)], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(np.array_equal(merged[name], trained.get(name, tensors[name])) for name in tensors)


def test_float16_overflow_is_an_error(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", target_modules=LINEAR)
    with pytest.raises(RecipeError, match=r"--weight 1e\+07: brings .* beyond the range of float16"):
        merge(open_model(bases["qwen3"]), [(adapter, 1e7)], tmp_path / "merged", dtype="float16")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e8}))
    with pytest.raises(RunError, match="bfloat16"):
        merge(open_model(bases["qwen3"]), [(adapter, 1.0)], tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_other_weights_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Same architecture, other numbers: nothing in the shapes would tell."""
    other = stock.make_base("llama-tied", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: values + 1 for name, values in weights.items()}, other / "model.safetensors")
    folder = stock.train_peft(bases["llama-tied"], tmp_path / "adapter", target_modules=LINEAR)
    write_base(open_model(bases["llama-tied"]), folder)
    with pytest.raises(RecipeError, match="made for another base model"):
        merge(open_model(other), [(folder, 1.0)], tmp_path / "out")
    merge(open_model(bases["llama-tied"]), [(folder, 1.0)], tmp_path / "out")


def test_an_adapter_of_other_shapes_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Rows too many were once cut, and rows of a larger vocabulary dropped, without a word."""
    wide = stock.make_base("llama-tied", tmp_path / "wide", num_key_value_heads=4, vocab_size=72)
    base = open_model(bases["llama-tied"])
    heads = stock.train_peft(wide, tmp_path / "heads", target_modules=["q_proj", "v_proj"])
    tokens = stock.train_peft(wide, tmp_path / "tokens", target_modules=["embed_tokens"], ensure_weight_tying=True)
    for folder, word in (
        (heads, r"v_proj.*\[32, 32\], the base's is \[16, 32\]"),
        (tokens, r"embed_tokens.*\[72, 32\], the base's is \[64, 32\]"),
        (tokens, "saved beside the adapter"),
    ):
        with pytest.raises(RecipeError, match=word):
            merge(base, [(folder, 1.0)], tmp_path / "out")
        with pytest.raises(RecipeError, match=word):
            analyze(folder, base)


def test_another_number_of_experts_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    more = stock.make_base("qwen3-moe", tmp_path / "more", num_experts=6)
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapter = stock.train_peft(more, tmp_path / "peft", **config)
    with pytest.raises(RecipeError, match="6 experts, the base has 4"):
        merge(open_model(bases["qwen3-moe"]), [(adapter, 1.0)], tmp_path / "out")


def test_a_trained_copy_of_the_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="trained or resized"):
        merge(open_model(bases["qwen3"]), [(adapter, 1.0)], tmp_path / "out")


def test_never_beside_other_files(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", target_modules=LINEAR)
    with pytest.raises(RecipeError, match="not empty"):
        merge(open_model(bases["qwen3"]), [(adapter, 1.0)], adapter)


@pytest.mark.parametrize("kind", ["tied", "untied, dora", "experts"])
def test_analysis_against_numpy(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Every figure again, from the merged weights."""
    name, config = KINDS[kind]
    adapter = stock.train_peft(bases[name], tmp_path / "peft", **config)
    merge(open_model(bases[name]), [(adapter, 1.0)], tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (bases[name], tmp_path / "merged"))
    changes = {change.weight: change for change in analyze(adapter, open_model(bases[name]))}
    assert set(changes) >= {key for key in before if not np.array_equal(before[key], after[key])}
    for key, change in changes.items():
        if np.array_equal(before[key], after[key]):  # an expert that no token reached
            assert change.frobenius == change.effective_rank == 0
            continue
        old, new = before[key].astype(np.float64), after[key].astype(np.float64)
        delta = new - old
        assert change.frobenius == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        assert change.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(old), rel=1e-4)
        assert change.largest == pytest.approx(np.abs(delta).max(), rel=1e-3)
        assert change.cosine == pytest.approx((old * new).sum() / np.linalg.norm(old) / np.linalg.norm(new), rel=1e-5)
        if kind != "untied, dora":
            values = np.linalg.svd(delta, compute_uv=False)
            shares = values[values > 1e-6 * values[0]] / values.sum()
            assert change.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=2e-2)


def test_effective_rank_of_known_matrices() -> None:
    eye = np.eye(5, 3, dtype=np.float32)
    assert effective_rank(eye, eye.T) == pytest.approx(3)
    assert effective_rank(eye[:, :1], eye.T[:1]) == pytest.approx(1)
    assert effective_rank(eye, np.zeros((3, 4), np.float32)) == 0
