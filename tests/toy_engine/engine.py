"""What the numpy engine offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx.backend import Capabilities, Generator, Loading, Trainer
from smolmlx.data.chat import Tokenizer
from smolmlx.errors import BackendError
from smolmlx.models import BaseModel
from smolmlx.plan import Plan


class ToyBackend:
    """The engine behind `--backend toy`."""

    name = "toy"

    def capabilities(self, device: str | None = None) -> Capabilities:
        if device not in (None, "cpu"):
            raise BackendError(f"--device {device}: the toy engine knows cpu.")
        return Capabilities(
            device="cpu",
            device_name="numpy",
            dtype="float32",
            dtype_reason="numpy computes in float32",
            dtypes=("float32",),
            stages=("pretrain", "sft"),
            methods=("lora",),
            quantize=("none",),
            optimizers=("adamw",),
            missing={
                "dpo": "The toy compares no pairs; use --backend mlx or cuda.",
                "full": "The toy trains adapters; use --backend mlx or cuda.",
                "4bit": "numpy has no packed weights.",
                "8bit": "numpy has no packed weights.",
                "adamw_8bit": "numpy keeps moments in float32; use adamw.",
                "adamw_fused": "numpy fuses nothing; use adamw.",
                "muon": "The toy trains no whole matrices; use adamw.",
            },
        )

    def check(self, knobs: Mapping[str, Any]) -> Sequence[str]:
        return [f"toy.{key}: unknown key. The toy engine has no knobs." for key in knobs]

    def check_plan(self, plan: Plan) -> Sequence[str]:
        return []

    def trainer(self) -> Trainer:
        from toy_engine.trainer import ToyTrainer

        return ToyTrainer()

    def generator(self, model: BaseModel, adapter: Path | None, tokenizer: Tokenizer, how: Loading) -> Generator:
        from toy_engine.generator import ToyGenerator

        return ToyGenerator(model, adapter, tokenizer)

    def versions(self) -> Mapping[str, str]:
        return {"numpy": np.__version__}
