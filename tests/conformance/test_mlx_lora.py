"""The MLX engine's LoRA layer: the gradients of mlx-lm's, made in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mlx_lora = pytest.importorskip("smolmlx_mlx.lora", reason="needs MLX")
import mlx.core as mx  # noqa: E402 - after the engine has loaded its BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.lora import LoRALinear  # noqa: E402


class Net(nn.Module):  # type: ignore[misc]
    """Two adapted layers, one of them with a bias, or both quantized."""

    def __init__(self, quantized: bool, eager: bool) -> None:
        super().__init__()
        mx.random.seed(3)
        self.layers = [nn.Linear(64, 128, bias=True), nn.Linear(128, 64, bias=False)]
        if quantized:
            self.layers = [layer.to_quantized(group_size=32, bits=8) for layer in self.layers]
        self.layers = [LoRALinear.from_base(layer, r=4, scale=1.7) for layer in self.layers]
        for layer in self.layers:
            layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
            layer.__class__ = mlx_lora.EagerLoRALinear if eager else LoRALinear
            layer.linear.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = mx.tanh(layer(x))
        return x


def gradients(net: Net, compiled: bool) -> tuple[float, dict[str, Any], Any]:
    x = mx.array(np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32))

    def loss(weights: Any, x: mx.array) -> mx.array:
        net.update(weights)
        return mx.square(net(x)).sum()

    function = mx.value_and_grad(loss, argnums=(0, 1))
    value, (found, at_x) = (mx.compile(function) if compiled else function)(net.trainable_parameters(), x)
    return value.item(), {name: np.array(array) for name, array in tree_flatten(found)}, np.array(at_x)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_mlx_lm(quantized: bool, compiled: bool) -> None:
    value, found, at_x = gradients(Net(quantized, eager=True), compiled)
    wanted_value, wanted, wanted_at_x = gradients(Net(quantized, eager=False), compiled)
    assert value == pytest.approx(wanted_value, rel=1e-6)
    assert set(found) == set(wanted) == {f"layers.{i}.lora_{side}" for i in (0, 1) for side in "ab"}
    for name, array in wanted.items():
        assert np.abs(array).max() > 1e-3
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(at_x, wanted_at_x, rtol=1e-4, atol=1e-5)


def test_sixteen_bit_activations_keep_their_type() -> None:
    layer = LoRALinear.from_base(nn.Linear(8, 8, bias=False), r=2, scale=2.0)
    layer.linear.set_dtype(mx.bfloat16)
    layer.__class__ = mlx_lora.EagerLoRALinear
    x = mx.ones((1, 3, 8), mx.bfloat16)
    at_x, at_b = mx.grad(lambda x, b: _with(layer, b)(x).astype(mx.float32).sum(), argnums=(0, 1))(x, layer.lora_b)
    assert (layer(x).dtype, at_x.dtype, at_b.dtype) == (mx.bfloat16, mx.bfloat16, mx.float32)


def _with(layer: Any, b: mx.array) -> Any:
    layer.lora_b = b
    return layer
