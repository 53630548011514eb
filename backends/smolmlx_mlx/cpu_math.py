"""Fast exponentials for training on an x86 or Arm CPU.

MLX's CPU backend calls the scalar `expf` for every element, which makes softmax and SiLU cost more than the matrix
products of a small model. Here e^x is built from additions, multiplications and one shift, which MLX's compiled kernels
vectorize. On a GPU nothing of this is used. It can go once MLX vectorizes exp on the CPU.

B batch, H query heads, K key-value heads, T queries, U keys, D head width.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402

from smolmlx_mlx.lanes import in_this_stream  # noqa: E402

_LOG2_E = 1.44269504088896341
# ln 2 in two parts, so that x - n ln 2 is exact in float32 (Cody & Waite 1980).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
_ROUNDER = 12582912.0
_MASKED = -1e9


@mx.compile
def _rounded(x: mx.array) -> mx.array:
    return x * _LOG2_E + _ROUNDER


@mx.compile
def _scaled_power(x: mx.array, rounded: mx.array, power: mx.array) -> mx.array:
    """Return e^r 2^n with r = x - n ln 2 in +-ln(2)/2; the polynomial is that of Cephes' expf."""
    n = rounded - _ROUNDER
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    tail = (
        (((1.9875691500e-4 * r + 1.3981999507e-3) * r + 8.3334519073e-3) * r + 4.1665795894e-2) * r + 1.6666665459e-1
    ) * r + 5.0000001201e-1
    return (tail * r * r + r + 1.0) * power


def exp(x: mx.array) -> mx.array:
    """Return e^x of a float32 array, clamped to [e^-87, e^88]. Not differentiable: see the functions below."""
    x = mx.clip(x, -87.0, 88.0)
    rounded = _rounded(x)
    bits = mx.left_shift(mx.view(rounded, mx.int32), 23) + 0x3F800000
    return _scaled_power(x, rounded, mx.view(bits, mx.float32))


def sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(-x))


def _softmax(x: mx.array) -> mx.array:
    shifted = exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _logsumexp(x: mx.array) -> mx.array:
    most = x.max(axis=-1, keepdims=True)
    return (most + mx.log(exp(x - most).sum(axis=-1, keepdims=True))).squeeze(-1)


def _logsumexp_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent[..., None] * exp(x - output[..., None])


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * sigmoid(gate) * x


def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, x = primals
    # Without this mx.compile finds the sigmoid of the forward pass equal to this one and keeps it for the backward pass.
    (gate,) = mx.depends([gate], [cotangent])
    share = sigmoid(gate)
    silu = gate * share
    return cotangent * x * (share + silu * (1.0 - share)), cotangent * silu


def logsumexp(x: mx.array) -> mx.array:
    """Log of the summed exponentials over the last axis."""
    return _with_vjp(_logsumexp, _logsumexp_vjp)(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate) * x. Its backward pass makes the sigmoid again, which costs less than keeping it and its product."""
    return _with_vjp(_swiglu, _swiglu_vjp)(gate, x)


def _with_vjp(forward: Callable[..., mx.array], backward: Callable[..., Any]) -> Callable[..., mx.array]:
    function: Any = mx.custom_function(forward)
    function.vjp(in_this_stream(backward))
    return function  # type: ignore[no-any-return]


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Return what mlx-lm's `scaled_dot_product_attention` returns, [B, H, T, D], for float32 arrays.

    Args:
        queries: [B, H, T, D]; keys, values: [B, K, U, D]; mask: None, "causal", or a boolean or additive [..., T, U].
    """
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    bias = _bias(mask, length, keys.shape[2])
    if bias is not None and bias.ndim == 4:
        bias = bias[:, :, None]
    grouped = (queries * scale).reshape(batch, groups, heads // groups, length, width)
    mixed = _attend(bias)(grouped, keys[:, :, None], values[:, :, None])
    return mixed.reshape(batch, heads, length, width)


def _attend(bias: mx.array | None) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return the function from q [B, K, H/K, T, D], k and v [B, K, 1, U, D] to softmax(q k^T + bias) v.

    Its backward pass makes the shares [B, K, H/K, T, U] again: they are the largest array of a layer, and cheap beside its
    matrix products.
    """

    def shares(q: mx.array, k: mx.array) -> mx.array:
        scores = q @ k.swapaxes(-1, -2)
        return _softmax(scores if bias is None else scores + bias)

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return shares(q, k) @ v

    def backward(
        primals: tuple[mx.array, mx.array, mx.array], slope: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        (q,) = mx.depends([q], [slope])  # as in _swiglu_vjp
        share = shares(q, k)
        # sum_u share_u d_u = slope . output, for d = slope v^T (Dao et al. 2022, FlashAttention).
        at_scores = share * (slope @ v.swapaxes(-1, -2) - (slope * output).sum(axis=-1, keepdims=True))
        at_k = (at_scores.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)
        at_v = (share.swapaxes(-1, -2) @ slope).sum(axis=2, keepdims=True)
        return at_scores @ k, at_k, at_v

    function = mx.custom_function(forward)
    function.vjp(in_this_stream(backward))
    return function  # type: ignore[no-any-return]


def _bias(mask: Any, length: int, total: int) -> mx.array | None:
    """Turn any mask into numbers that are added to the scores."""
    if mask is None:
        return None
    if isinstance(mask, str):
        place = mx.arange(total - length, total)
        mask = place[:, None] >= mx.arange(total)[None]
    if mask.dtype == mx.bool_:
        return mx.where(mask, 0.0, _MASKED).astype(mx.float32)
    return mask


def use_fast_math(model: nn.Module) -> None:
    """Make the blocks of a float32 model use the functions above.

    mlx-lm's blocks call `scaled_dot_product_attention` and `swiglu` by name. Each such block gets a class of its own
    whose `__call__` is the same code with those names bound to ours, so nothing of mlx-lm is changed.
    """
    made: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        call = kind.__call__
        if isinstance(call, types.FunctionType) and set(call.__code__.co_names) & set(_REPLACED) and _takes_part(call):
            made.setdefault(kind, type(f"Fast{kind.__name__}", (kind,), {"__call__": _rebound(call)}))
            module.__class__ = made[kind]


def _takes_part(call: types.FunctionType) -> bool:
    return any(name in call.__globals__ for name in _REPLACED)


def _rebound(call: types.FunctionType) -> Callable[..., Any]:
    names = {
        name: _choosing(call.__globals__[name], ours) for name, ours in _REPLACED.items() if name in call.__globals__
    }
    fresh = types.FunctionType(
        call.__code__, {**call.__globals__, **names}, call.__name__, call.__defaults__, call.__closure__
    )
    fresh.__kwdefaults__ = call.__kwdefaults__
    return fresh


def _choosing(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ours for plain float32 work and theirs for everything else (16 bit, quantized caches, sinks)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        plain = all(a.dtype == mx.float32 for a in args if isinstance(a, mx.array))
        special = kwargs.get("sinks") is not None or getattr(kwargs.get("cache"), "bits", None) is not None
        return ours(*args, **kwargs) if plain and not special else theirs(*args, **kwargs)

    return call


_REPLACED: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": attention, "swiglu": swiglu}
