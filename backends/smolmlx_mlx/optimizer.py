"""AdamW with bias correction, and Muon for matrices, over MLX parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from smolmlx.recipe import Train  # noqa: E402

# Muon (Jordan et al. 2024): momentum, and the quintic that brings every singular value near 1 in five rounds.
_MOMENTUM, _ROUNDS = 0.95, 5
_A, _B, _C = 3.4445, -4.7750, 2.0315

Moments = dict[str, mx.array]


class Optimizer:
    """AdamW with bias correction (Loshchilov & Hutter 2019, as in torch); Muon for the paths in `matrices`.

    Parameters and moments are float32.
    """

    def __init__(
        self, parameters: Any, train: Train, matrices: Collection[str] = (), matrix_rate_ratio: float = 1.0
    ) -> None:
        self.train, self.matrix_rate_ratio = train, matrix_rate_ratio
        flat = tree_flatten(parameters)
        adam = [(path, value.shape) for path, value in flat if path not in matrices]
        self.exp_avg: Moments = {path: mx.zeros(shape, mx.float32) for path, shape in adam}
        self.exp_avg_sq: Moments = {path: mx.zeros(shape, mx.float32) for path, shape in adam}
        self.momentum: Moments = {path: mx.zeros(value.shape, mx.float32) for path, value in flat if path in matrices}
        self.steps = 0
        # Norms and biases are vectors; neither decays.
        self.decays = {path for path, value in flat if value.ndim > 1}

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments by name, in the very dicts that `apply` changes in place (mx.compile writes back into them)."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "momentum": self.momentum}

    def scalars(self, learning_rate: float) -> mx.array:
        """Return [learning rate, 1 - beta1^t, 1 - beta2^t] of the step about to be taken."""
        self.steps += 1
        beta1, beta2 = self.train.betas
        return mx.array([learning_rate, 1 - beta1**self.steps, 1 - beta2**self.steps], dtype=mx.float32)

    def apply(self, parameters: Any, gradients: Any, scalars: mx.array) -> Any:
        """Return new parameters; the moments are changed in place."""
        decay = self.train.weight_decay
        flat = dict(tree_flatten(gradients))
        fresh = []
        for path, value in tree_flatten(parameters):
            gradient = flat[path].astype(mx.float32)
            rate = scalars[0]
            if path in self.momentum:
                rate = rate * self.matrix_rate_ratio
                update = rate * self._muon(path, gradient)
            else:
                update = self._adam(path, gradient, scalars)
            kept = value * (1 - rate * decay) if decay and path in self.decays else value
            fresh.append((path, (kept - update).astype(value.dtype)))
        return tree_unflatten(fresh)

    def _adam(self, path: str, gradient: mx.array, scalars: mx.array) -> mx.array:
        beta1, beta2 = self.train.betas
        first = beta1 * self.exp_avg[path] + (1 - beta1) * gradient
        second = beta2 * self.exp_avg_sq[path] + (1 - beta2) * mx.square(gradient)
        self.exp_avg[path], self.exp_avg_sq[path] = first, second
        return (scalars[0] / scalars[1]) * first / (mx.sqrt(second) / mx.sqrt(scalars[2]) + self.train.eps)

    def _muon(self, path: str, gradient: mx.array) -> mx.array:
        self.momentum[path] = _MOMENTUM * self.momentum[path] + (1 - _MOMENTUM) * gradient
        return orthogonalized((1 - _MOMENTUM) * gradient + _MOMENTUM * self.momentum[path])  # Nesterov


def orthogonalized(matrix: mx.array) -> mx.array:
    """Return the matrix [n, m] with its singular values brought near 1, times sqrt(max(1, n/m))."""
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / (mx.sqrt(mx.square(x).sum(axis=-1).sum()) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.T if rows > columns else x) * max(1.0, rows / columns) ** 0.5
