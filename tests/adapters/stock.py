"""Adapters made and loaded by stock PEFT and stock mlx-lm, on small random bases of several architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lab as labs
from smolmlx.adapters.hf_config import readable

LINEAR = ["q_proj", "k_proj", "down_proj"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
IDS = [3, 17, 42, 5, 60, 9, 1, 33, 2, 50]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma": ("gemma", {"head_dim": 8}),  # mlx-lm 0.32's own differs from transformers by 4e-4
    # mlx-lm 0.32 rounds the root of the width to bfloat16; of 64 that is exact.
    "gemma3-64": (
        "gemma3_text",
        {"head_dim": 8, "hidden_size": 64, "query_pre_attn_scalar": 8, "num_hidden_layers": 7, "sliding_window": 16},
    ),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 7, "sliding_window": 16},
    ),
    "mistral": ("mistral", {"tie_word_embeddings": False, "head_dim": 8}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 4}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"hidden_act": "gelu"}),  # with its usual tanh, mlx-lm 0.32 differs by 9e-4
    "qwen2-moe": (
        "qwen2_moe",
        {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
         "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "qwen3-moe": (
        "qwen3_moe",
        {"tie_word_embeddings": False, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4,
         "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gpt_neox": (
        "gpt_neox",  # mlx-lm's GELU is the tanh one, and its inner width four times the outer
        {"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 128,
         "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}},
    ),
    "lfm2": ("lfm2", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}),
    "glm": ("glm", {"head_dim": 8}),
    "ernie": ("ernie4_5", {"head_dim": 8}),
}  # fmt: skip


def make_base(name: str, folder: Path, **settings: Any) -> Path:
    """Save a random base with transformers, with a config that both libraries read; `settings` change that config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, extra = BASES[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **extra, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(readable(config), indent=2))
    return folder


def torch_base(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def train_peft(
    base: Path,
    out: Path,
    steps: int = 3,
    dtype: str = "float32",
    save_embedding_layers: bool | str = "auto",
    **config: Any,
) -> Path:
    """Train a LoRA with PEFT itself for a few steps and save it as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(torch_base(base), LoraConfig(**settings))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.tensor([IDS])
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(out, save_embedding_layers=save_embedding_layers)
    return out


def peft_logits(base: Path, adapter: Path | None) -> np.ndarray[Any, Any]:
    """Logits of stock transformers with stock PEFT."""
    import torch
    from peft import PeftModel

    model = torch_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(input_ids=torch.tensor([IDS])).logits[0].float().numpy()
    return found


def mlx_base(base: Path) -> Any:
    labs.import_mlx()
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    return load_model(base)[0]


def train_mlx(base: Path, out: Path, num_layers: int = -1, kind: str = "lora", **parameters: Any) -> Path:
    """Train an adapter with mlx-lm's own layers for a few steps and save it as mlx-lm does."""
    model = mlx_base(base)
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(5)
    settings = {"rank": 4, "scale": 2.5, "dropout": 0.0, **parameters}
    model.freeze()
    linear_to_lora_layers(model, num_layers, dict(settings), use_dora=kind == "dora")
    optimizer = optim.Adam(learning_rate=3e-2)
    ids = mx.array([IDS])

    def loss(inner: Any) -> Any:
        return nn.losses.cross_entropy(inner(ids[:, :-1]), ids[:, 1:], reduction="mean")

    model.train()
    step = nn.value_and_grad(model, loss)
    for _ in range(3):
        _, gradient = step(model)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings, "model": str(base)}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=4))
    return out


def mlx_logits(base: Path, adapter: Path | None) -> np.ndarray[Any, Any]:
    """Logits of stock mlx-lm with its own adapter loader."""
    model = mlx_base(base)
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    found: np.ndarray[Any, Any] = np.array(model(mx.array([IDS]))[0].astype(mx.float32))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Weights and config of an adapter folder."""
    names = ("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


Logits = Callable[[Path, Path | None], np.ndarray[Any, Any]]
LOGITS: Mapping[str, Logits] = {"peft": peft_logits, "mlx": mlx_logits}


def with_tokenizer(folder: Path, tokenizer: Path) -> Path:
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
