"""What the MLX engine offers on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolmlx.backend import Capabilities, Generator, Loading, Trainer
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import nearest
from smolmlx.models import BaseModel

KNOBS: dict[str, type] = {}


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
