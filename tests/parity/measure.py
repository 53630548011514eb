"""Train one plan on both engines and say how far apart they are (design/numerics.md).

Used by the tests, which hold the figures to their limits, and by publish.py, which writes them down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lab import Lab, column, make_lab, make_tiny, stop_at, write_chat, write_pairs, write_text
from smolmlx import models, rundir, stages
from smolmlx.backend import Loading

PAIR = ("mlx", "cuda")
LIMITS = {"loss": 2e-5, "mean": 5e-6, "norm": 5e-4}
"""Largest difference of a step's loss, mean difference of the loss, largest relative difference of the gradient norm."""
LOGITS = 1e-4

_PACKED = {"data__packing": "on", "data__max_length": 128, "train__batch_size": 2}
_PRETRAIN = {
    "stage": "pretrain",
    "train__method": "full",
    "train__weight_decay": 0.1,
    "train__warmup": 0.1,
    "train__min_lr_ratio": 0.1,
}
_DPO: dict[str, Any] = {"stage": "dpo", "train__max_steps": 50, "train__learning_rate": 3e-4}
DPO_CASES: dict[str, dict[str, Any]] = {
    "DPO, prompts shared": {**_DPO, "dpo": {"shared_prompt": True}},
    "DPO, prompts apart": {**_DPO, "dpo": {"shared_prompt": False}},
    "DPO, prompts shared, accumulation 4": {
        **_DPO,
        "dpo": {"shared_prompt": True},
        "train__accumulation": 4,
        "train__batch_size": 2,
    },
    "DPO, reference not cached": {**_DPO, "dpo": {"shared_prompt": True, "cache": False}},
    "RPO (SFT-mixed)": {**_DPO, "dpo": {"sft_weight": 0.5}},
    "IPO per token": {**_DPO, "dpo": {"loss": "ipo", "length_normalized": True, "beta": 1.0}},
    "ORPO": {**_DPO, "dpo": {"loss": "orpo"}},
}
"""Preference training, from an adapter that SFT has moved. What the other engine left in the cache is used, unless said."""
CASES: dict[str, dict[str, Any]] = {
    "SFT, LoRA": {},
    "SFT, LoRA, accumulation 4": {"train__accumulation": 4, "train__batch_size": 2},
    "SFT, LoRA, packed": _PACKED,
    "SFT, LoRA, packed, accumulation 4": {**_PACKED, "train__accumulation": 4},
    "SFT, LoRA, compiled": {"train__compile": True, "train__max_steps": 20},
    "SFT, LoRA, gradient checkpointing": {"train__gradient_checkpointing": True, "train__max_steps": 20},
    "SFT, DoRA": {"lora__dora": True, "train__max_steps": 20},
    "SFT, rsLoRA": {"lora__rslora": True, "train__max_steps": 20},
    "SFT, all weights": {"train__method": "full", "train__learning_rate": 3e-4, "train__weight_decay": 0.1},
    "pretraining, all weights": _PRETRAIN,
    "pretraining, all weights, accumulation 4": {**_PRETRAIN, "train__accumulation": 4, "train__max_steps": 20},
    "pretraining, Muon": {**_PRETRAIN, "train__optimizer": "muon", "train__muon_learning_rate": 0.003},
    **DPO_CASES,
}
"""What is compared -> how it differs from a LoRA run of 100 steps."""
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}


@dataclass(frozen=True)
class Figures:
    """How far two runs of one plan are apart."""

    steps: int
    loss: float
    mean: float
    norm: float
    val: float
    first: float
    last: float
    """Loss of the first and of the last step, to show that something was learned."""

    @property
    def within(self) -> bool:
        return self.loss <= LIMITS["loss"] and self.mean <= LIMITS["mean"] and self.norm <= LIMITS["norm"]


class Bench:
    """A model, rows and both engines in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_tiny(folder / "model", **SHAPE)
        self.chat, self.text = write_chat(folder / "chat.jsonl", 48), write_text(folder / "text.jsonl", 60)
        self.pairs = write_pairs(folder / "pairs.jsonl", 48)

    def lab(self, engine: str) -> Lab:
        return make_lab(engine, self.model, self.chat, self.folder / "runs")

    def changes(self, case: str) -> dict[str, Any]:
        found = {
            "train__max_steps": 100, "train__learning_rate": 1e-3, "train__schedule": "cosine", "train__max_grad_norm": 1.0,
            "lora__r": 8, "lora__alpha": 16, "eval__every": 50, "eval__keep_best": False, "data__validation_share": 0.1, **CASES[case],
        }  # fmt: skip
        if found.get("stage") == "pretrain":
            config = dict(models.open_model(self.model).config)
            found["model"] = {"config": config, "tokenizer": str(self.model), "dtype": "float32"}
            found |= {"data__train": str(self.text), "data__max_length": 48}
        if found.get("stage") == "dpo":
            found |= {"data__train": str(self.pairs), "model__adapter": str(self.adapter)}
        return found

    @cached_property
    def adapter(self) -> Path:
        """The adapter of a short SFT run, where preference training starts."""
        lab = self.lab(PAIR[0])
        plan = lab.plan(train__max_steps=20, train__learning_rate=1e-3, lora__r=8, lora__alpha=16)
        return lab.train(plan).adapter

    def run(self, engine: str, case: str) -> rundir.RunDir:
        lab = self.lab(engine)
        return lab.train(lab.plan(**self.changes(case)))

    def hand_over(self, case: str, step: int, first: str, second: str) -> rundir.RunDir:
        """Begin a run on one engine, stop it after `step`, and finish it on the other."""
        labs = {name: self.lab(name) for name in (first, second)}
        plans = {name: lab.plan(**self.changes(case)) for name, lab in labs.items()}
        run = labs[first].start(plans[first])
        try:
            labs[first].train(plans[first], run, stop_at(step))
        except stages.Interrupted:
            pass
        else:
            raise AssertionError("the run should have been interrupted")
        return labs[second].train(plans[second], run)

    def logits(
        self, engine: str, model: models.BaseModel, adapter: Path | None, ids: list[int]
    ) -> np.ndarray[Any, Any]:
        lab = self.lab(engine)
        generator = lab.choice.backend.generator(
            model, adapter, lab.plan().tokenizer, Loading(lab.choice.device, "float32")
        )
        return generator.logits(ids)


def apart(a: rundir.RunDir, b: rundir.RunDir) -> Figures:
    """Compare two runs step by step."""
    losses = [column(run, "loss") for run in (a, b)]
    norms = [column(run, "grad_norm") for run in (a, b)]
    vals = [column(run, "val_loss", "eval") for run in (a, b)]
    difference = np.abs(losses[0] - losses[1])
    return Figures(
        len(difference), float(difference.max()), float(difference.mean()), float((np.abs(norms[0] - norms[1]) / norms[1]).max()),
        float(np.abs(vals[0] - vals[1]).max()), float(losses[0][0]), float(losses[0][-1]),
    )  # fmt: skip
