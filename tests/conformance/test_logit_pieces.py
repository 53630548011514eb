"""Logits made in pieces, each recomputed in the backward pass, train like logits made at once."""

from __future__ import annotations

import importlib

import pytest

import lab as labs

WHERE = {
    "mlx": ("smolmlx_mlx.step", ("_LOGIT_BYTES",)),
    "cuda": ("smolmlx_cuda.model", ("_LOGIT_BYTES", "_CPU_LOGIT_BYTES")),
}


def test_pieces(lab: labs.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    if lab.name not in WHERE:
        pytest.skip(f"{lab.name} makes all logits at once")
    plan = lab.plan(data__loss_on="all", train__batch_size=12, train__max_steps=3)
    assert min(batch.num_supervised for batch in plan.train.step(0)) > 64
    whole = labs.column(lab.train(plan), "loss")
    name, limits = WHERE[lab.name]
    for limit in limits:
        monkeypatch.setattr(importlib.import_module(name), limit, 1)  # 64 positions a piece, the least there is
    assert labs.column(lab.train(plan), "loss") == pytest.approx(whole, abs=1e-6)
