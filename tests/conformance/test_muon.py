"""Muon: what it does to a matrix, and which weights it trains, on every engine that has it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lab as labs

Orthogonalize = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def orthogonalize(engine: str) -> Orthogonalize:
    """Return an engine's function, from numpy to numpy."""
    if engine == "toy":
        pytest.skip("the toy engine has AdamW alone")
    module = importlib.import_module(f"smolmlx_{engine}.optimizer")
    array = labs.import_mlx().array if engine == "mlx" else importlib.import_module("torch").from_numpy
    return lambda matrix: np.asarray(module.orthogonalized(array(matrix)))


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_singular_values_come_near_one(orthogonalize: Orthogonalize, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    # From the largest singular value down to a tenth of it; five rounds cannot raise one that is almost zero.
    matrix = ((left * np.linspace(5.0, 0.5, min(shape))) @ right).astype(np.float32)
    made = orthogonalize(matrix) / max(1.0, shape[0] / shape[1]) ** 0.5
    values = np.linalg.svd(made, compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.3
    # The same singular vectors: the result turns the matrix into a symmetric one.
    turned = made.T @ matrix
    assert np.abs(turned - turned.T).max() < 1e-2 * np.abs(turned).max()


def test_size_of_the_gradient_does_not_matter(orthogonalize: Orthogonalize) -> None:
    matrix = np.random.default_rng(1).standard_normal((8, 12)).astype(np.float32)
    assert orthogonalize(matrix * 1000) == pytest.approx(orthogonalize(matrix), abs=1e-4)


def test_blocks_matrices_have_momentum_and_the_rest_adams_moments(lab: labs.Lab, text_rows: Path) -> None:
    if lab.name == "toy":
        pytest.skip("the toy engine has AdamW alone")
    changes = {"data__train": str(text_rows), "train__method": "full", "train__optimizer": "muon"}
    plan = lab.plan(stage="pretrain", train__max_steps=3, save__every=1, **changes)
    run = lab.train(plan)
    checkpoint = max((run.path / "checkpoints").iterdir())
    arrays = labs.session.load_arrays(checkpoint / "optimizer.safetensors")
    kinds: dict[str, set[str]] = {}
    for name in arrays:
        weight, _, kind = name.rpartition(".")
        kinds.setdefault(weight, set()).add(kind)
    for weight, found in kinds.items():
        matrix = ".layers." in weight and "norm" not in weight
        assert found == ({"momentum"} if matrix else {"exp_avg", "exp_avg_sq"}), weight
    assert sum("momentum" in found for found in kinds.values()) == 2 * 7
    losses = labs.column(run, "loss")
    assert losses[-1] < losses[0]
