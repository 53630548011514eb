"""One training step: gradients of the loss, global clipping, the optimizer, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_map, tree_reduce  # noqa: E402

from smolmlx_mlx.optimizer import Optimizer  # noqa: E402

Inputs = tuple[mx.array | None, ...]
Objective = Callable[..., tuple[mx.array, mx.array]]
"""From a micro-batch's arrays to (summed loss, something to report); None stands for an array that is not needed."""


def clip(gradients: Any, most: float) -> tuple[Any, mx.array]:
    """Scale gradients so that their global norm is at most `most`; return them and the norm before (as torch does)."""
    # Row by row: MLX's CPU backend adds a whole array in float32, and the norm of an embedding came out 5e-4 too small.
    squares = tree_map(lambda g: mx.square(g).sum(axis=-1).sum(), gradients)
    norm = mx.sqrt(tree_reduce(mx.add, squares, mx.array(0.0)))
    factor = mx.minimum(most / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm


class Stepper:
    """Takes optimizer steps on a model, compiled once per shape."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, compiled: bool, objective: Objective) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        wrap: Callable[..., Any] = self._compile if compiled else (lambda function: function)
        self._whole: Any = wrap(self._whole_step)
        self._gradients: Any = wrap(self._micro_step)
        self._update: Any = wrap(self._apply)
        self._wrap = wrap
        self.forget_evaluation()

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Lists are read when the step runs, so `update` on the model and new moments are seen and written back.
        state = [self.model.state, list(self.optimizer.moments.values()), mx.random.state]
        compiled: Callable[..., Any] = mx.compile(function, inputs=state, outputs=state)
        return compiled

    def forget_evaluation(self) -> None:
        """Let go of what evaluation has compiled: a graph for each shape, of the size of tens of megabytes."""
        self._evaluate: Any = self._wrap(lambda *inputs: self.objective(*inputs))

    def step(
        self, batches: Sequence[Inputs], denominator: float, learning_rate: float
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """Take one step over micro-batches; return lazy (loss, gradient norm, the objective's extra of each).

        Args:
            batches: the objective's arguments for each micro-batch.
            denominator: what the summed loss of all of them is divided by.
        """
        divide_by = mx.array(denominator)
        scalars = self.optimizer.scalars(learning_rate)
        if len(batches) == 1:
            loss, norm, extra = self._whole(scalars, divide_by, *batches[0])
            extras = [extra]
        else:
            loss, extra, gradients = self._gradients(divide_by, *batches[0])
            extras = [extra]
            for inputs in batches[1:]:
                mx.eval(loss, extras, gradients)
                more, extra, added = self._gradients(divide_by, *inputs)
                loss, gradients = loss + more, tree_map(mx.add, gradients, added)
                extras.append(extra)
            norm = self._update(gradients, scalars)
        mx.async_eval(loss, norm, extras, self.model.trainable_parameters(), list(self.optimizer.moments.values()))
        return loss, norm, extras

    def evaluate(self, inputs: Inputs) -> tuple[mx.array, mx.array]:
        """Return lazy (summed loss, extra) of one micro-batch without gradients."""
        total, extra = self._evaluate(*inputs)
        return total, extra

    def _micro_step(self, denominator: mx.array, *inputs: mx.array | None) -> tuple[mx.array, mx.array, Any]:
        def mean(*arguments: mx.array | None) -> tuple[mx.array, mx.array]:
            total, extra = self.objective(*arguments)
            return total / denominator, extra

        weights = self.model.trainable_parameters()
        (loss, extra), gradients = nn.value_and_grad(self.model, mean)(*inputs)
        self.model.update(weights)  # checkpointed parts leave the backward pass's copies in the model
        return loss, extra, gradients

    def _apply(self, gradients: Any, scalars: mx.array) -> mx.array:
        gradients, norm = clip(gradients, self.optimizer.train.max_grad_norm)
        self.model.update(self.optimizer.apply(self.model.trainable_parameters(), gradients, scalars))
        return norm

    def _whole_step(
        self, scalars: mx.array, denominator: mx.array, *inputs: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        loss, extra, gradients = self._micro_step(denominator, *inputs)
        return loss, self._apply(gradients, scalars), extra
