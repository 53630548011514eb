"""Conversion, judged by the two libraries themselves: logits agree, and the way back gives the same bytes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stock

from smolmlx import backend
from smolmlx.adapters import adapter as adapters
from smolmlx.adapters.convert import convert
from smolmlx.adapters.merge import merge
from smolmlx.data.chat import Tokenizer
from smolmlx.data.tokenizer_training import train_tokenizer
from smolmlx.errors import DataError, RecipeError
from smolmlx.models import open_model

for package in ("torch", "peft", "mlx_lm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: its own loader is the judge here", allow_module_level=True)

# PEFT 0.21 warns so for patterns of target_parameters, and applies them.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
LINEAR = ["q_proj", "v_proj", "down_proj"]
DENSE = (
    "mistral",
    "olmo2",
    "granite",
    "cohere",
    "cohere2",
    "stablelm",
    "starcoder2",
    "smollm3",
    "gemma3-64",
)
PEFT_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama-tied", {"target_modules": LINEAR}),
    "rslora": ("llama-tied", {"target_modules": LINEAR, "use_rslora": True}),
    "dora": ("llama-untied", {"target_modules": LINEAR, "use_dora": True}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "regex": ("qwen2", {"target_modules": r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    "full paths": ("gemma2", {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]}),
    "last layers": ("llama-tied", {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "excluded": ("phi3", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "patterns": (
        "llama-untied",
        {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"q_proj": 5}},
    ),
    "patterns, rslora": (
        "qwen2", {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 1}},
    ),
    "patterns, dora": ("qwen3", {"target_modules": LINEAR, "use_dora": True, "rank_pattern": {"v_proj": 3}}),
    "tied embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied embedding of its own rank": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "rank_pattern": {"embed_tokens": 2},
         "alpha_pattern": {"embed_tokens": 6}},
    ),
    "embedding, untied": ("llama-untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "untied head": ("qwen3", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "experts": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts, ranks": (
        "qwen3-moe",
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
         "rank_pattern": {"experts.gate_up_proj": 2, "v_proj": 3}},
    ),
    "one expert weight, router": (
        "qwen3-moe", {"target_modules": ["q_proj", "gate"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    **{f"all-linear, {name}": (name, {"target_modules": "all-linear"}) for name in DENSE},
    **{
        f"experts, {name}": (
            name,
            {"target_modules": "all-linear", "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        )
        for name in ("qwen2-moe", "olmoe")
    },
    "float16": ("llama-tied", {"target_modules": LINEAR, "dtype": "float16"}),
    "bfloat16, patterns": (
        "llama-tied", {"target_modules": LINEAR, "dtype": "bfloat16", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ),
}  # fmt: skip
MLX_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all of every block": ("llama-tied", {}),
    "last layer": ("qwen2", {"num_layers": 1, "keys": ["self_attn.q_proj", "mlp.up_proj"]}),
    "dora": ("qwen3", {"kind": "dora", "keys": ["self_attn.q_proj", "mlp.down_proj"]}),
    "gemma2, rank 3, scale 20": ("gemma2", {"rank": 3, "scale": 20.0}),
    "phi3": ("phi3", {"scale": 0.7}),
    "tied embedding": ("llama-tied", {"keys": ["self_attn.v_proj", "model.embed_tokens"]}),
    "untied head and embedding": ("llama-untied", {"keys": ["self_attn.v_proj", "model.embed_tokens", "lm_head"]}),
    "experts and router": ("qwen3-moe", {}),
    **{f"all of {name}": (name, {}) for name in (*DENSE, "qwen2-moe", "olmoe")},
    "half of the stacked experts": ("qwen3-moe", {"keys": ["mlp.switch_mlp.up_proj", "self_attn.q_proj"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: stock.make_base(name, folder / name) for name in stock.BASES}


def there_and_back(base: Path, adapter: Path, other: str, tmp_path: Path) -> None:
    """Convert, compare logits through both stock loaders, convert back, compare bytes."""
    first = adapters.detect(adapter)
    converted = convert(adapter, tmp_path / "there", other, open_model(base))
    assert converted.form == other and not converted.restored
    plain, mine = stock.LOGITS[first](base, None), stock.LOGITS[first](base, adapter)
    assert np.abs(mine - plain).max() > 1e-2, "the adapter does nothing, so nothing is compared"
    np.testing.assert_allclose(stock.LOGITS[other](base, tmp_path / "there"), mine, atol=1e-4, rtol=0)
    back = convert(tmp_path / "there", tmp_path / "back", base=open_model(base))
    assert back.restored, back.notes
    assert stock.files(tmp_path / "back") == stock.files(adapter)


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_adapters_of_peft(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config = PEFT_KINDS[kind]
    there_and_back(bases[name], stock.train_peft(bases[name], tmp_path / "peft", **config), "mlx", tmp_path)


@pytest.mark.parametrize("kind", MLX_KINDS)
def test_adapters_of_mlx_lm(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config = MLX_KINDS[kind]
    there_and_back(bases[name], stock.train_mlx(bases[name], tmp_path / "mlx", **config), "peft", tmp_path)


@pytest.mark.parametrize("kind", ["patterns", "patterns, dora", "experts, ranks", "tied embedding"])
def test_without_its_note_a_file_still_means_the_same(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """What mlx-lm saves after training on carries no note of where it came from."""
    from safetensors.numpy import load_file, save_file

    name, config = PEFT_KINDS[kind]
    adapter = stock.train_peft(bases[name], tmp_path / "peft", **config)
    base = open_model(bases[name])
    convert(adapter, tmp_path / "mlx", "mlx", base)
    weights = tmp_path / "mlx" / "adapters.safetensors"
    save_file(load_file(weights), weights)
    again = convert(tmp_path / "mlx", tmp_path / "back", "peft", base)
    assert not again.restored
    np.testing.assert_allclose(
        stock.peft_logits(bases[name], tmp_path / "back"), stock.peft_logits(bases[name], adapter), atol=1e-4, rtol=0
    )


def test_a_changed_scale_is_not_undone(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["llama-tied"], tmp_path / "peft", target_modules=LINEAR)
    convert(adapter, tmp_path / "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"]["scale"] *= 2
    path.write_text(json.dumps(config))
    again = convert(tmp_path / "mlx", tmp_path / "back")
    assert not again.restored and "changed" in again.notes[0]
    doubled = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert doubled["lora_alpha"] == 24


@pytest.mark.parametrize("kind", ["patterns", "patterns, dora", "tied embedding", "experts, ranks"])
def test_the_mlx_engine_loads_what_peft_wrote(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Ranks and scales that differ from module to module were once taken for one."""
    train_tokenizer(["some text"], 300, tmp_path / "tokenizer")
    name, config = PEFT_KINDS[kind]
    adapter = stock.train_peft(bases[name], tmp_path / "peft", **config)
    how = backend.Loading("cpu", "float32")
    engine = backend.load("mlx").generator(open_model(bases[name]), adapter, Tokenizer(tmp_path / "tokenizer"), how)
    np.testing.assert_allclose(engine.logits(stock.IDS), stock.peft_logits(bases[name], adapter), atol=1e-4, rtol=0)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bias": ("llama-tied", {"target_modules": LINEAR, "bias": "all"}, "bias"),
    "pissa": ("llama-tied", {"target_modules": LINEAR, "init_lora_weights": "pissa"}, "init_lora_weights"),
    "olora": ("llama-tied", {"target_modules": LINEAR, "init_lora_weights": "olora"}, "init_lora_weights"),
    "lora bias": ("llama-tied", {"target_modules": LINEAR, "lora_bias": True}, "lora_bias"),
    "token rows": ("llama-tied", {"target_modules": LINEAR, "trainable_token_indices": [1]}, "trainable_token_indices"),
    "replication": (
        "llama-tied",
        {"target_modules": LINEAR, "layer_replication": [(0, 2), (1, 2)]},
        "layer_replication",
    ),
    "whole head": ("qwen3", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "dora dropout": ("qwen3", {"target_modules": LINEAR, "use_dora": True, "lora_dropout": 0.1}, "lora_dropout"),
    "half of a tie": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}, "ensure_weight_tying"),
    "whole tied embedding": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "modules_to_save",
    ),
    **{
        f"a tie under {key}": (
            "llama-tied",
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, key: {"embed_tokens": 2}},
            "its tied head's 3 .* mlx-lm has one for both",
        )
        for key in ("rank_pattern", "alpha_pattern")
    },
    "dora embedding": ("qwen3", {"target_modules": ["embed_tokens"], "use_dora": True}, "per column"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, config, word = REFUSED[kind]
    adapter = stock.train_peft(bases[name], tmp_path / "peft", steps=1, **config)
    with pytest.raises(RecipeError, match=word):
        convert(adapter, tmp_path / "mlx", "mlx", open_model(bases[name]))
    assert not (tmp_path / "mlx").exists()


def test_other_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", steps=1, target_modules=LINEAR)
    with pytest.raises(RecipeError, match="made for another base"):
        convert(adapter, tmp_path / "mlx", "mlx", open_model(bases["phi3"]))


@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_experts_of_a_model_with_other_names_are_refused(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Mixtral's blocks have different names in the two libraries; the result loaded and did something else."""
    base = bases["mixtral"]
    if form == "peft":
        targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
        adapter = stock.train_peft(base, tmp_path / "adapter", steps=1, **targets)
    else:
        adapter = stock.train_mlx(base, tmp_path / "adapter")
    advice = {"peft": "merge_and_unload", "mlx": "mlx_lm.fuse"}[form]
    for make in (
        lambda: convert(adapter, tmp_path / "out", base=open_model(base)),
        lambda: merge(open_model(base), [(adapter, 1.0)], tmp_path / "out"),
    ):
        with pytest.raises(RecipeError, match=rf"\(mixtral\), so they are neither .*{advice}"):
            make()


@pytest.mark.parametrize("num_layers", [1, 0, -1, 2, 99])
def test_blocks_as_mlx_lm_counts_them(num_layers: int, bases: dict[str, Path], tmp_path: Path) -> None:
    """Tensors of block 0 under num_layers 1 were converted and merged, though mlx-lm refuses them."""
    base = bases["llama-tied"]
    adapter = stock.train_mlx(base, tmp_path / "adapter", keys=["self_attn.q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": num_layers}))
    if num_layers != 1:
        stock.mlx_logits(base, adapter)
        convert(adapter, tmp_path / "peft", base=open_model(base))
        return
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.q_proj.lora_a: not an adapter parameter"):
        stock.mlx_logits(base, adapter)
    with pytest.raises(DataError, match=r"layers\.0\.self_attn.q_proj: .* not among the last 1 of 2"):
        convert(adapter, tmp_path / "peft", base=open_model(base))


def test_blocks_counted_by_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter alone looks right: its only block may be the last."""
    base = bases["llama-tied"]
    adapter = stock.train_mlx(base, tmp_path / "adapter", num_layers=1, keys=["self_attn.q_proj"])
    weights = adapter / "adapters.safetensors"
    from safetensors.numpy import load_file, save_file

    save_file({name.replace("layers.1", "layers.0"): value for name, value in load_file(weights).items()}, weights)
    with pytest.raises(RecipeError, match="not among the last 1 of 2"):
        merge(open_model(base), [(adapter, 1.0)], tmp_path / "merged")


def test_embedding_needs_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", steps=1, target_modules=["embed_tokens"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "somebody/model"}))
    with pytest.raises(RecipeError, match="--base MODEL"):
        convert(adapter, tmp_path / "mlx")


def test_full_weights_of_mlx_lm_are_not_an_adapter_for_peft(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "full"
    folder.mkdir()
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 1}')
    with pytest.raises(RecipeError, match="full"):
        convert(folder, tmp_path / "out")


def test_partial_dora(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    adapter = stock.train_peft(bases["qwen3"], tmp_path / "peft", steps=1, target_modules=LINEAR, use_dora=True)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "magnitude" in name))
    save_file(tensors, path)
    with pytest.raises(DataError, match="magnitude"):
        convert(adapter, tmp_path / "mlx")
