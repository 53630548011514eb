"""Logits made in pieces train like logits made at once; rows spread over the cores train like rows on one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lab as labs

WHERE = {
    "mlx": ("smolmlx_mlx.losses", ("_CPU_PIECE", "_GPU_PIECE")),
    "cuda": ("smolmlx_cuda.model", ("_LOGIT_BYTES", "_CPU_LOGIT_BYTES")),
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pieces(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    if lab.name not in WHERE:
        pytest.skip(f"{lab.name} makes all logits at once")
    plan = lab.plan(data__loss_on="all", train__batch_size=12, train__max_steps=3, train__method=method)
    assert min(batch.num_supervised for batch in plan.train.step(0)) > 64
    whole = lab.train(plan)
    name, limits = WHERE[lab.name]
    for limit in limits:
        monkeypatch.setattr(importlib.import_module(name), limit, 1)  # the fewest positions a piece may have
    pieces = lab.train(plan)
    assert labs.column(pieces, "loss") == pytest.approx(labs.column(whole, "loss"), abs=2e-6)
    # The loss of three steps hides a head without its gradient; the norm of the first step does not.
    assert labs.column(pieces, "grad_norm") == pytest.approx(labs.column(whole, "grad_norm"), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"train__gradient_checkpointing": True}, {"stage": "pretrain"}, {"data__packing": "on"}]
)
def test_lanes(lab: labs.Lab, text_rows: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    if lab.name != "mlx":
        pytest.skip(f"{lab.name} leaves the cores to its library")
    lanes = importlib.import_module("smolmlx_mlx.lanes")
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(lanes.blas, "set_threads", lambda _: True)
    if changes.get("stage"):
        changes = changes | {"data__train": str(text_rows), "train__method": "full"}
    plan = lab.plan(train__max_steps=3, train__batch_size=4, **changes)
    assert len(lanes.open_lanes(4)) == 3
    spread = lab.train(plan)
    monkeypatch.setattr(lanes.blas, "set_threads", lambda _: False)
    assert len(lanes.open_lanes(4)) == 1
    alone = lab.train(plan)
    assert labs.column(spread, "loss") == pytest.approx(labs.column(alone, "loss"), abs=2e-6)
    assert labs.column(spread, "grad_norm") == pytest.approx(labs.column(alone, "grad_norm"), rel=1e-5)


def test_the_norm_of_a_large_gradient_is_not_lost_in_rounding() -> None:
    step = pytest.importorskip("smolmlx_mlx.step")
    gradient = np.random.default_rng(0).normal(size=(6144, 256)).astype(np.float32)
    _, norm = step.clip({"embed_tokens": step.mx.array(gradient)}, 1.0)
    assert float(norm) == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-5)
