"""One optimizer step: loss over supervised positions, global clipping, AdamW with bias correction, compiled.

B batch, T tokens, S supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten  # noqa: E402

from smolmlx.data.batches import Batch  # noqa: E402
from smolmlx.recipe import Train  # noqa: E402
from smolmlx_mlx import cpu_math  # noqa: E402
from smolmlx_mlx.model import PackedMask, split_head  # noqa: E402

# Logits beyond this are made in pieces, each recomputed in the backward pass.
_LOGIT_BYTES = 256 << 20
Inputs = tuple[mx.array, ...]


class Losses:
    """Sum of nats and count of correct targets of a micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body, self.head = split_head(model)
        self._logsumexp = (
            cpu_math.logsumexp if mx.default_device() == mx.cpu else (lambda logits: mx.logsumexp(logits, axis=-1))
        )

    def __call__(
        self, ids: mx.array, segments: mx.array | None, index: mx.array, labels: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return (nats, correct) over the supervised positions, both scalars.

        Args:
            ids: [B, T]; segments: [B, T] for packed rows, else None; index, labels, weights: [S].
        """
        losses, correct = self.positions(ids, segments, index, labels)
        return (losses * weights).sum(), (correct * weights).sum()

    def positions(
        self, ids: mx.array, segments: mx.array | None, index: mx.array, labels: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the nats of each supervised position and whether its target is the likeliest: [S], [S]."""
        cache = None if segments is None else [PackedMask(segments)] * len(self.model.layers)
        hidden = self.body(ids, cache)  # [B, T, D]
        hidden = hidden.reshape(-1, hidden.shape[-1])[index]  # [S, D]
        size = hidden.shape[0]
        rows = max(64, _LOGIT_BYTES // (4 * self._vocabulary()))
        if size <= rows:
            return self._piece(hidden, labels)
        piece = mx.checkpoint(self._piece)
        parts = [piece(hidden[i : i + rows], labels[i : i + rows]) for i in range(0, size, rows)]
        return mx.concatenate([p[0] for p in parts]), mx.concatenate([p[1] for p in parts])

    def _piece(self, hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
        labels = mx.stop_gradient(labels)  # mx.checkpoint would ask for a gradient of these indices
        logits = self.head(hidden).astype(mx.float32)  # [S, V]
        target = mx.take_along_axis(logits, labels[:, None], axis=-1).squeeze(-1)
        correct = target >= mx.stop_gradient(logits).max(axis=-1)
        return self._logsumexp(logits) - target, correct

    def _vocabulary(self) -> int:
        return int(self.model.args.vocab_size)


def to_inputs(batch: Batch) -> tuple[mx.array, mx.array | None, mx.array, mx.array, mx.array]:
    """Return the arrays of a batch that `Losses` takes."""
    segments = mx.array(batch.segments) if batch.packed else None
    return mx.array(batch.ids), segments, mx.array(batch.index), mx.array(batch.labels), mx.array(batch.weights)


class Optimizer:
    """AdamW with bias correction over a tree of float32 parameters (Loshchilov & Hutter 2019, as in torch)."""

    def __init__(self, parameters: Any, train: Train) -> None:
        self.train = train
        flat = tree_flatten(parameters)
        self.exp_avg = {path: mx.zeros(value.shape, mx.float32) for path, value in flat}
        self.exp_avg_sq = {path: mx.zeros(value.shape, mx.float32) for path, value in flat}
        self.steps = 0
        # Norms and biases are vectors; neither decays.
        self.decays = {path for path, value in flat if value.ndim > 1}

    @property
    def state(self) -> list[dict[str, mx.array]]:
        """The moments, in the very dicts that `apply` changes in place (mx.compile writes back into them)."""
        return [self.exp_avg, self.exp_avg_sq]

    def scalars(self, learning_rate: float) -> mx.array:
        """Return [learning rate, 1 - beta1^t, 1 - beta2^t] of the step about to be taken."""
        self.steps += 1
        beta1, beta2 = self.train.betas
        return mx.array([learning_rate, 1 - beta1**self.steps, 1 - beta2**self.steps], dtype=mx.float32)

    def apply(self, parameters: Any, gradients: Any, scalars: mx.array) -> Any:
        """Return new parameters; the moments are changed in place."""
        beta1, beta2 = self.train.betas
        rate, correction1, correction2 = scalars[0], scalars[1], mx.sqrt(scalars[2])
        decay = self.train.weight_decay
        flat = dict(tree_flatten(gradients))
        fresh = []
        for path, value in tree_flatten(parameters):
            gradient = flat[path].astype(mx.float32)
            first = beta1 * self.exp_avg[path] + (1 - beta1) * gradient
            second = beta2 * self.exp_avg_sq[path] + (1 - beta2) * mx.square(gradient)
            self.exp_avg[path], self.exp_avg_sq[path] = first, second
            update = (rate / correction1) * first / (mx.sqrt(second) / correction2 + self.train.eps)
            kept = value * (1 - rate * decay) if decay and path in self.decays else value
            fresh.append((path, (kept - update).astype(value.dtype)))
        return tree_unflatten(fresh)


def clip(gradients: Any, most: float) -> tuple[Any, mx.array]:
    """Scale gradients so that their global norm is at most `most`; return them and the norm before (as torch does)."""
    norm = mx.sqrt(tree_reduce(lambda total, g: total + mx.square(g).sum(), gradients, mx.array(0.0)))
    factor = mx.minimum(most / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * factor, gradients), norm


class Stepper:
    """Takes optimizer steps on a model, compiled once per shape."""

    def __init__(self, model: nn.Module, train: Train, compiled: bool) -> None:
        self.model = model
        self.losses = Losses(model)
        self.train = train
        self.optimizer = Optimizer(model.trainable_parameters(), train)
        wrap: Callable[..., Any] = self._compile if compiled else (lambda function: function)
        self._whole: Any = wrap(self._whole_step)
        self._gradients: Any = wrap(self._micro_step)
        self._update: Any = wrap(self._apply)
        self._evaluate: Any = wrap(lambda *inputs: self.losses(*inputs))

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Lists are read when the step runs, so `update` on the model and new moments are seen and written back.
        state = [self.model.state, self.optimizer.state, mx.random.state]
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
        mx.async_eval(*result, self.model.trainable_parameters(), self.optimizer.state)
        return tuple(result)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Return (nats, correct) of one batch without gradients."""
        nats, correct = self._evaluate(*to_inputs(batch))
        return float(nats.item()), int(correct.item())

    def _micro_step(self, denominator: mx.array, *inputs: mx.array) -> tuple[mx.array, mx.array, Any]:
        def mean(*arguments: mx.array) -> tuple[mx.array, mx.array]:
            nats, correct = self.losses(*arguments)
            return nats / denominator, correct

        (loss, correct), gradients = nn.value_and_grad(self.model, mean)(*inputs)
        return loss, correct, gradients

    def _apply(self, gradients: Any, scalars: mx.array) -> mx.array:
        gradients, norm = clip(gradients, self.train.max_grad_norm)
        self.model.update(self.optimizer.apply(self.model.trainable_parameters(), gradients, scalars))
        return norm

    def _whole_step(self, scalars: mx.array, denominator: mx.array, *inputs: mx.array) -> Inputs:
        loss, correct, gradients = self._micro_step(denominator, *inputs)
        return loss, self._apply(gradients, scalars), correct
