"""What the MLX engine offers on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolmlx.backend import Capabilities, Generator, Loading, Trainer
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError, nearest
from smolmlx.models import BaseModel
from smolmlx.plan import Plan

KNOBS: dict[str, type] = {}
GROUP = 64
"""Weights that share one scale of a quantized layer."""


class MlxBackend:
    """The engine behind `--backend mlx`."""

    name = "mlx"

    def capabilities(self, device: str | None = None) -> Capabilities:
        from smolmlx_mlx import blas
        from smolmlx_mlx import device as devices

        found = devices.use(device)
        fast = blas.ensure()
        gpu = found == "gpu"
        notes = []
        if not fast.fast:
            notes.append(f"MLX uses {fast.name}: 14 times slower than it need be. {blas.ADVICE}.")
        if not devices.can_compile():
            notes.append("no C++ compiler, so the training step is not compiled and is slower: apt-get install g++.")
        return Capabilities(
            device=found,
            device_name=devices.name(),
            dtype="bfloat16" if gpu else "float32",
            dtype_reason="the GPU computes in bfloat16" if gpu else "bfloat16 is slow on this CPU",
            dtypes=("float32", "bfloat16", "float16"),
            stages=("pretrain", "sft", "dpo"),
            methods=("lora", "full"),
            quantize=("none", "4bit", "8bit"),
            optimizers=("adamw", "muon"),
            memory_bytes=devices.memory_bytes(),
            compiles=devices.can_compile(),
            notes=tuple(notes),
            missing={
                "adamw_8bit": "MLX has no 8-bit Adam; adapters' moments are small, so use adamw.",
                "adamw_fused": "The compiled step is fused already; use adamw.",
            },
        )

    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        return [
            f"mlx.{key}: unknown key.{nearest(key, KNOBS)} The MLX engine has no knobs of its own yet."
            for key in knobs
            if key not in KNOBS
        ]

    def check_plan(self, plan: Plan) -> Sequence[str]:
        kind = str(plan.model.config.get("model_type"))
        if not has_architecture(kind, plan.model.config):
            raise BackendError(f"{plan.model.name}: mlx-lm has no model of type '{kind}'. Try --backend cuda.")
        stored, quantize = plan.model.quantization, plan.recipe.model.quantize
        if stored and plan.full:
            return ["train.method: full: this base is stored quantized, and such weights are frozen. Use lora."]
        if stored and quantize != "none":
            return [f"model.quantize: '{quantize}': this base is stored quantized already. Set model.quantize: none."]
        layers = plan.model.linear_shapes().items()
        odd = [name for name, (width, _) in layers if width % GROUP] if quantize != "none" else []
        return [odd_layers(quantize, odd)] if odd else []

    def trainer(self) -> Trainer:
        from smolmlx_mlx.trainer import MlxTrainer

        return MlxTrainer()

    def generator(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> Generator:
        from smolmlx_mlx.generator import MlxGenerator

        return MlxGenerator(model, adapter, tokenizer, how)

    def versions(self) -> Mapping[str, str]:
        from smolmlx_mlx import blas

        fast = blas.ensure()
        return {"mlx": version("mlx"), "mlx-lm": version("mlx-lm"), "blas": f"{fast.name} {fast.path or ''}".strip()}


def has_architecture(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has a model of this type; it is imported only where its files do not say."""
    found = importlib.util.find_spec("mlx_lm")
    if found is None or found.origin is None:
        return False
    if (Path(found.origin).parent / "models" / f"{kind}.py").is_file():
        return True
    from mlx_lm.utils import _get_classes

    try:
        _get_classes({"model_type": kind, **config})  # knows types that go by another's name, such as mistral
    except ValueError:
        return False
    return True


def odd_layers(quantize: str, odd: Sequence[str]) -> str:
    """Say which layers cannot be quantized."""
    return (
        f"model.quantize: '{quantize}' needs layers whose input width is a multiple of {GROUP}; {odd[0]} and "
        f"{len(odd) - 1} more are not. Set model.quantize: none."
    )
