"""One training step: gradients of the loss, global clipping, the optimizer, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_map, tree_reduce  # noqa: E402

from smolmlx.data.batches import Batch  # noqa: E402
from smolmlx_mlx.lanes import Lanes  # noqa: E402
from smolmlx_mlx.losses import Losses, to_inputs  # noqa: E402
from smolmlx_mlx.optimizer import Optimizer  # noqa: E402

Inputs = tuple[mx.array, ...]


def clip(gradients: Any, most: float) -> tuple[Any, mx.array]:
    """Scale gradients so that their global norm is at most `most`; return them and the norm before (as torch does)."""
    # Row by row: MLX's CPU backend adds a whole array in float32, and the norm of an embedding came out 5e-4 too small.
    squares = tree_map(lambda g: mx.square(g).sum(axis=-1).sum(), gradients)
    norm = mx.sqrt(tree_reduce(mx.add, squares, mx.array(0.0)))
    factor = mx.minimum(most / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm


class Stepper:
    """Takes optimizer steps on a model, compiled once per shape."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, compiled: bool, lanes: Lanes | None = None, mixed: bool = False
    ) -> None:
        self.model = model
        self.losses = Losses(model, lanes, mixed)
        self.optimizer = optimizer
        wrap: Callable[..., Any] = self._compile if compiled else (lambda function: function)
        self._whole: Any = wrap(self._whole_step)
        self._gradients: Any = wrap(self._micro_step)
        self._update: Any = wrap(self._apply)
        self._evaluate: Any = wrap(lambda *inputs: self.losses(*inputs))

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Lists are read when the step runs, so `update` on the model and new moments are seen and written back.
        state = [self.model.state, list(self.optimizer.moments.values()), mx.random.state]
        compiled: Callable[..., Any] = mx.compile(function, inputs=state, outputs=state)
        return compiled

    def step(self, batches: Sequence[Batch], learning_rate: float) -> Inputs:
        """Take one step over micro-batches; return lazy (loss, gradient norm, correct)."""
        denominator = mx.array(float(max(1, sum(batch.num_supervised for batch in batches))))
        scalars = self.optimizer.scalars(learning_rate)
        if len(batches) == 1:
            result = self._whole(scalars, denominator, *to_inputs(batches[0]))
        else:
            loss, correct, gradients = self._gradients(denominator, *to_inputs(batches[0]))
            for batch in batches[1:]:
                mx.eval(loss, correct, gradients)
                more, right, extra = self._gradients(denominator, *to_inputs(batch))
                loss, correct, gradients = loss + more, correct + right, tree_map(mx.add, gradients, extra)
            result = (loss, self._update(gradients, scalars), correct)
        mx.async_eval(*result, self.model.trainable_parameters(), list(self.optimizer.moments.values()))
        return tuple(result)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Return (nats, correct) of one batch without gradients."""
        nats, correct = self._evaluate(*to_inputs(batch))
        return float(nats.item()), int(correct.item())

    def _micro_step(self, denominator: mx.array, *inputs: mx.array) -> tuple[mx.array, mx.array, Any]:
        def mean(*arguments: mx.array) -> tuple[mx.array, mx.array]:
            nats, correct = self.losses(*arguments)
            return nats / denominator, correct

        weights = self.model.trainable_parameters()
        (loss, correct), gradients = nn.value_and_grad(self.model, mean)(*inputs)
        self.model.update(weights)  # checkpointed parts leave the backward pass's copies in the model
        return loss, correct, gradients

    def _apply(self, gradients: Any, scalars: mx.array) -> mx.array:
        gradients, norm = clip(gradients, self.optimizer.train.max_grad_norm)
        self.model.update(self.optimizer.apply(self.model.trainable_parameters(), gradients, scalars))
        return norm

    def _whole_step(self, scalars: mx.array, denominator: mx.array, *inputs: mx.array) -> Inputs:
        loss, correct, gradients = self._micro_step(denominator, *inputs)
        return loss, self._apply(gradients, scalars), correct
