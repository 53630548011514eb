"""What the PyTorch engine offers on this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smolmlx import memory
from smolmlx.backend import Capabilities, Generator, Loading, Trainer
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, nearest
from smolmlx.models import BaseModel
from smolmlx.plan import Plan
from smolmlx_cuda import unsloth

# Set before any of these libraries is imported; a user who set them keeps what was set.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
KNOBS = {"unsloth": ("auto", "on", "off"), "attention": ("sdpa", "eager", "flash_attention_2")}


def quiet() -> None:
    """Switch off telemetry and noise of the libraries below."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _prepare() -> None:
    """Do what must happen before transformers, trl and peft are imported."""
    quiet()
    # bitsandbytes asks for a package nothing here needs; PEFT reads a property that transformers renamed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    import torch

    unsloth.prepare("cuda" if torch.cuda.is_available() else "cpu")


class CudaBackend:
    """The engine behind `--backend cuda`."""

    name = "cuda"

    def capabilities(self, device: str | None = None) -> Capabilities:
        quiet()
        import torch

        found = pick_device(device)
        gpu = found == "cuda"
        eight_bit = gpu and importlib.util.find_spec("bitsandbytes") is not None
        wide = gpu and torch.cuda.is_bf16_supported()
        why_not = "It needs an NVIDIA GPU and bitsandbytes (pip install bitsandbytes)."
        return Capabilities(
            device=found,
            device_name=torch.cuda.get_device_name() if gpu else found.upper(),
            dtype="bfloat16" if wide else "float32",
            dtype_reason="the GPU computes in bfloat16" if wide else f"bfloat16 is slow or missing on {found}",
            dtypes=("float32", "bfloat16", "float16"),
            stages=("pretrain", "sft", "dpo"),
            methods=("lora", "full"),
            quantize=("none", "4bit", "8bit") if eight_bit else ("none",),
            optimizers=("adamw", "muon", *(("adamw_fused",) if gpu else ()), *(("adamw_8bit",) if eight_bit else ())),
            memory_bytes=torch.cuda.get_device_properties(0).total_memory if gpu else memory.host_bytes(),
            missing={
                "4bit": why_not, "8bit": why_not, "adamw_8bit": why_not,
                "adamw_fused": "torch's fused AdamW is for CUDA; use adamw.",
            },
        )  # fmt: skip

    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        refuse_processes()
        problems = []
        for key, value in knobs.items():
            if key not in KNOBS:
                problems.append(f"cuda.{key}: unknown key.{nearest(key, KNOBS)} Known: {', '.join(KNOBS)}.")
            elif value not in KNOBS[key] and not (key == "unsloth" and isinstance(value, bool)):
                problems.append(f"cuda.{key}: '{value}' is not one of {', '.join(KNOBS[key])}.")
        return problems

    def check_plan(self, plan: Plan) -> Sequence[str]:
        refuse_mlx_weights(plan.model, "model.quantize: 4bit")
        kind = str(plan.model.config.get("model_type"))
        if not has_architecture(kind):
            raise BackendError(f"{plan.model.name}: transformers has no causal language model of type '{kind}'.")
        return [*unsloth.check(plan), *_check_attention(plan)]

    def trainer(self) -> Trainer:
        _prepare()
        from smolmlx_cuda.trainer import TrlTrainer

        return TrlTrainer()

    def generator(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> Generator:
        _prepare()
        from smolmlx_cuda.generator import TorchGenerator

        return TorchGenerator(model, adapter, tokenizer, how)

    def versions(self) -> Mapping[str, str]:
        found = {}
        for name in ("torch", "transformers", "trl", "peft", "accelerate", "unsloth", "bitsandbytes"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found


def refuse_processes() -> None:
    """Each process of torchrun or accelerate would train the whole plan by itself.

    Raises:
        BackendError: there is more than one.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise BackendError(
            f"--backend cuda: launched as {count} processes (WORLD_SIZE), but a run is one process on one GPU so far. "
            "Start it without torchrun or accelerate launch; CUDA_VISIBLE_DEVICES chooses the GPU."
        )


def refuse_mlx_weights(base: BaseModel, setting: str) -> None:
    """Refuse weights that only mlx-lm reads.

    Args:
        setting: what quantizes a whole base here, as the user would write it.

    Raises:
        BackendError
    """
    if base.quantization:
        raise BackendError(
            f"{base.name}: its weights are quantized in MLX's format, which mlx-lm alone reads. Use --backend mlx, or the"
            f" original model with {setting}."
        )


def pick_device(device: str | None) -> str:
    """Return cuda, mps or cpu.

    Raises:
        BackendError: no CUDA, and no other device was asked for.
    """
    import torch

    if device in (None, "cuda", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        raise BackendError(
            "--backend cuda: no NVIDIA GPU is visible to torch"
            + (" (its build has no CUDA)" if not torch.version.cuda else " (check nvidia-smi and the driver)")
            + ". To run the PyTorch engine on the CPU, add --device cpu; on a Mac use --backend mlx."
        )
    if device == "mps":
        if torch.backends.mps.is_available():
            return "mps"
        raise BackendError("--device mps: torch sees no Metal device here. Use --device cpu.")
    if device == "cpu":
        return "cpu"
    raise BackendError(f"--device {device}: the PyTorch engine knows cuda, mps and cpu.")


def _check_attention(plan: Plan) -> Sequence[str]:
    if plan.recipe.cuda.get("attention") != "flash_attention_2":
        return []
    device = plan.capabilities.device
    if device != "cuda":
        return [f"cuda.attention: 'flash_attention_2' is for NVIDIA, this is {device}. Take sdpa."]
    if importlib.util.find_spec("flash_attn") is None:
        return ["cuda.attention: 'flash_attention_2' needs pip install flash-attn. Or take sdpa."]
    if plan.train.packed and plan.train.batch_size > 1:
        why = "keeps packed rows apart in batches of one alone"
        return [
            f"cuda.attention: 'flash_attention_2' {why}. Take sdpa, or train.batch_size: 1 with train.accumulation."
        ]
    if plan.dtype == "float32":
        return ["cuda.attention: 'flash_attention_2' computes in 16 bits, and the weights are float32. Take sdpa."]
    return []


def has_architecture(kind: str) -> bool:
    """Whether transformers has a causal language model of this type; it is imported only where its files do not say."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return False
    file = Path(found.origin).parent / "models" / kind / f"modeling_{kind}.py"
    if file.is_file() and "ForCausalLM(" in file.read_text(encoding="utf-8"):
        return True
    _prepare()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
