"""Make activations again in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402

from smolmlx_mlx.lanes import in_this_stream  # noqa: E402
from smolmlx_mlx.lora import DropoutKeys  # noqa: E402


def checkpointed(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which uses `module`, so that its activations are made again in the backward pass.

    `mx.checkpoint` gives gradients to its arguments alone, so the module's weights must be among them. It calls the function
    twice, and the second call must drop what the first one dropped.
    """

    def call(*args: Any) -> Any:
        weights = module.trainable_parameters()
        keys = DropoutKeys()

        def inner(weights: Any, *args: Any) -> Any:
            module.update(weights)
            with keys:
                return function(*args)

        result = mx.checkpoint(in_this_stream(inner))(weights, *args)
        module.update(weights)  # the next use must not see the copies of this one
        return result

    return call


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass.

    Each block gets a class of its own, so no class of mlx-lm is changed.
    """
    for layer in model.layers:
        original = type(layer)

        def call(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> mx.array:
            block = checkpointed(self, lambda *inner_args: _original.__call__(self, *inner_args, **kwargs))
            found: mx.array = block(*args)
            return found

        layer.__class__ = type(f"Checkpointed{original.__name__}", (original,), {"__call__": call})
