"""mlx-lm's LoRA layer with a backward pass of its own, and dropout that a recomputed layer can repeat.

The backward pass lets go of a layer's activations before it goes on to the next. Left to itself MLX makes the adapters'
gradients last, since nothing but the optimizer waits for them, and keeps every layer's input and output gradients until
then. Here the gradient that goes on to the layer before depends on them.

T tokens (all leading axes), I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear  # noqa: E402

from smolmlx_mlx.lanes import in_this_stream  # noqa: E402


class EagerLoRALinear(LoRALinear):  # type: ignore[misc]
    """LoRA without dropout whose gradients of A and B are made as soon as they can be."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            y: mx.array = super().__call__(x)
            return y
        linear, scale = self.linear, self.scale

        def forward(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            return linear(x) + ((scale * (x @ a)) @ b).astype(x.dtype)

        def backward(
            primals: tuple[mx.array, mx.array, mx.array], slope: mx.array, output: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            x, a, b = primals
            low, low_slope = scale * (x @ a), scale * (slope @ b.T)  # [T, R]
            at_a, at_b = x.T @ low_slope, low.T @ slope  # [I, R], [R, O]
            _, (at_x,) = mx.vjp(linear, [x], [slope])
            at_x = at_x + (low_slope @ a.T).astype(x.dtype)
            (at_x,) = mx.depends([at_x], [at_a, at_b])
            return at_x, at_a.astype(a.dtype), at_b.astype(b.dtype)

        function = mx.custom_function(forward)
        function.vjp(in_this_stream(backward))
        # As a matrix, or every product would flatten its input and unflatten its result.
        result: mx.array = function(x.reshape(-1, x.shape[-1]), self.lora_a, self.lora_b)
        return result.reshape(*x.shape[:-1], -1)


class DropoutKeys:
    """Keys of the masks drawn while it is entered: new ones the first time, the same ones again after that.

    mx.checkpoint calls a function anew in the backward pass, where nn.Dropout alone would drop other elements.
    """

    _entered: DropoutKeys | None = None

    def __init__(self) -> None:
        self._drawn: list[mx.array] = []
        self._left: Iterator[mx.array] | None = None
        self._outer: DropoutKeys | None = None

    def __enter__(self) -> None:
        self._left = iter(self._drawn) if self._drawn else None
        self._outer, DropoutKeys._entered = DropoutKeys._entered, self

    def __exit__(self, *error: object) -> None:
        DropoutKeys._entered = self._outer

    @classmethod
    def next(cls) -> mx.array:
        """Return the key of the next mask, uint32 [2]."""
        keys = cls._entered
        if keys is None:
            return mx.random.randint(0, 2**31 - 1, (2,), mx.uint32)
        if keys._left is not None:
            return next(keys._left)
        cls._entered = keys._outer  # one that was entered before must give this key again, too
        key = cls.next()
        cls._entered = keys
        keys._drawn.append(key)
        return key


class KeyedDropout(nn.Dropout):  # type: ignore[misc]
    """nn.Dropout with masks from DropoutKeys."""

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        mask = mx.random.bernoulli(self._p_1, x.shape, DropoutKeys.next())
        return mask * x * (1 / self._p_1)
