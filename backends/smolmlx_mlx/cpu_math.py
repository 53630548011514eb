"""Exponentials, attention, the head's loss and rotary positions for training on an x86 or Arm CPU, faster than MLX's own.

MLX's CPU backend calls the scalar `expf` for every element, which makes softmax and SiLU cost more than the matrix
products of a small model. Here e^x is built from additions, multiplications and one cast, which MLX's compiled kernels
vectorize. On a GPU nothing of this is used. It can go once MLX vectorizes exp on the CPU.

B batch, H query heads, K key-value heads, G = H/K, T queries, U keys, D head width.
"""

from __future__ import annotations

import functools
import itertools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models import activations  # noqa: E402

from smolmlx_mlx.lanes import in_this_stream, lane_here  # noqa: E402
from smolmlx_mlx.recompute import checkpointed  # noqa: E402

_LOG2_E = 1.44269504088896341
# ln 2 in two parts, so that x - n ln 2 is exact in float32 (Cody & Waite 1980).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Adding 1.5 * 2^23 rounds to an integer.
_ROUNDER = 12582912.0
# e^r = 1 + r + ... within 1.1e-7 for r in +-ln(2)/2: the minimax polynomial of degree 5, found by Lawson's iteration.
_POLYNOMIAL = 0.49999230307863973, 0.16667115389401865, 0.04189033177728144, 0.008312501314872144
_MASKED = -1e9
_BLOCK = 96
"""Queries of causal attention that are looked at together."""


@mx.compile
def _power_bits(x: mx.array) -> mx.array:
    """Return the bits of 2^n for n = x log2(e) rounded."""
    n = (x * _LOG2_E + _ROUNDER) - _ROUNDER
    return ((n + 127.0) * 8388608.0).astype(mx.int32)


@mx.compile
def _scaled_power(x: mx.array, power: mx.array) -> mx.array:
    """Return e^r 2^n with r = x - n ln 2 in +-ln(2)/2. The order of operations keeps it one kernel (at most 11 deep)."""
    # As above with the factors exchanged: if it were the same, mx.compile would keep n instead of making it twice.
    n = (_LOG2_E * x + _ROUNDER) - _ROUNDER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    square, (c2, c3, c4, c5) = r * r, _POLYNOMIAL
    return (((c5 * r + c4) * (square * square) + (c3 * r + c2) * square) + (r + 1.0)) * power


def _exp(x: mx.array) -> mx.array:
    x = mx.where(x < -87.0, -87.0, mx.where(x > 88.0, 88.0, x))  # as a loop faster than a minimum, and NaN stays NaN
    return _scaled_power(x, mx.view(_power_bits(x), mx.float32))


def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + _exp(-x))


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with arrays whose rank is the lane's own while it runs.

    mx.compile makes one broadcast of all equal scalars to one shape, in the stream of the first. In another stream that is an
    array to read, not a constant, and a loop that reads it is not vectorized.
    """

    def call(*arrays: mx.array) -> Any:
        axes = tuple(range(lane_here()))
        if not axes:
            return function(*arrays)
        results = function(*(mx.expand_dims(array, axes) for array in arrays))
        if isinstance(results, tuple):
            return tuple(mx.squeeze(result, axes) for result in results)
        return mx.squeeze(results, axes)

    return call


@_apart
def exp(x: mx.array) -> mx.array:
    """Return e^x of a float32 array, clamped to [e^-87, e^88]. Not differentiable: see the functions below."""
    return _exp(x)


def _logsumexp(x: mx.array) -> mx.array:
    most = x.max(axis=-1, keepdims=True)
    return (most + mx.log(exp(x - most).sum(axis=-1, keepdims=True))).squeeze(-1)


def _logsumexp_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent[..., None] * exp(x - output[..., None])


@_apart
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * x


def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, x = primals
    # Without this mx.compile finds the sigmoid of the forward pass equal to this one and keeps it for the backward pass.
    (gate,) = mx.depends([gate], [cotangent])
    slopes: tuple[mx.array, mx.array] = _swiglu_slopes(gate, x, cotangent)
    return slopes


@_apart
def _swiglu_slopes(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    share = _sigmoid(gate)
    silu = gate * share
    return cotangent * x * (share + silu * (1.0 - share)), cotangent * silu


def logsumexp(x: mx.array) -> mx.array:
    """Log of the summed exponentials over the last axis."""
    return _with_vjp(_logsumexp, _logsumexp_vjp)(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate) * x. Its backward pass makes the sigmoid again, which costs less than keeping it and its product."""
    return _with_vjp(_swiglu, _swiglu_vjp)(gate, x)


def _with_vjp(forward: Callable[..., mx.array], backward: Callable[..., Any]) -> Callable[..., mx.array]:
    made: Callable[..., mx.array] = mx.custom_function(forward)
    made.vjp(in_this_stream(backward))  # type: ignore[attr-defined]
    return made


def head_losses(
    hidden: mx.array, weight: mx.array, labels: mx.array, columns: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the nats of each label, the likeliest token, and d nats / d hidden: [S], [S], [S, D].

    Goes through the vocabulary `columns` tokens at a time with a running maximum (Milakov & Gimelshein 2018, "Online normalizer
    calculation for softmax"), so that products have many rows and their results stay near the caches.

    Args:
        hidden: [S, D]; weight: [V, D], of a head without a bias; labels: [S].
    """
    rows = hidden.shape[0]
    most, total, mixed = mx.full((rows, 1), -mx.inf), mx.zeros((rows, 1)), mx.zeros_like(hidden)
    best = mx.zeros(rows, mx.int32)
    for start in range(0, weight.shape[0], columns):
        part = weight[start : start + columns]
        (near,) = mx.depends([hidden], [mixed])  # or MLX would begin the logits of all parts
        logits = near @ part.T
        found = mx.argmax(logits, axis=-1)
        highest = mx.take_along_axis(logits, found[:, None], axis=-1)
        best = mx.where(highest[:, 0] > most[:, 0], found.astype(mx.int32) + start, best)
        peak = mx.maximum(most, highest)
        power, shrink = exp(logits - peak), exp(most - peak)
        total, mixed, most = total * shrink + _sum(power), mixed * shrink + power @ part, peak
    own = weight[labels]
    target = (hidden * own).sum(axis=-1)
    return (most + mx.log(total))[:, 0] - target, best, mixed / total - own


class JoinedCache(ABC):
    """A layer's cache whose keys and values are joined from parts, which `attention` joins anew for the gradients."""

    parts: tuple[mx.array, ...]
    """Parts of the keys, then as many of the values."""

    @staticmethod
    @abstractmethod
    def join(*parts: mx.array) -> mx.array:
        """Return the keys, or the values, of their parts."""


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """Return what mlx-lm's `scaled_dot_product_attention` returns, [B, H, T, D], for float32 arrays.

    Args:
        queries: [B, H, T, D]; keys, values: [B, K, U, D]; mask: None, "causal", or a boolean or additive [..., T, U].
        cache: may say `is_causal`.
    """
    batch, heads, length, width = queries.shape
    groups, total = keys.shape[1:3]
    shared = heads // groups
    bias = _bias(mask, length, total)
    if bias is not None:
        bias = mx.repeat(mx.broadcast_to(bias, (*bias.shape[:-2], length, total)), shared, axis=-2)
    is_causal = mask == "causal" if isinstance(mask, str) else getattr(cache, "is_causal", False)
    edges = [*range(0, max(1, length - _BLOCK // 2), _BLOCK), length] if is_causal else [0, length]
    # Rows from start to stop, and the keys that they may see.
    blocks = [
        (start * shared, stop * shared, total - length + stop if is_causal else total)
        for start, stop in itertools.pairwise(edges)
    ]
    parts, join = (cache.parts, cache.join) if isinstance(cache, JoinedCache) else ((keys, values), _alone)
    grouped = (queries * scale).reshape(batch, groups, shared, length, width).swapaxes(2, 3).flatten(2, 3)
    mixed, _ = _attend(bias, blocks, join, shared)(grouped, *parts)  # [B, T, K, G, D], as the next layer reads it
    return mixed.transpose(0, 2, 3, 1, 4).reshape(batch, heads, length, width)


def _alone(part: mx.array) -> mx.array:
    return part


def _attend(
    bias: mx.array | None, blocks: list[tuple[int, int, int]], join: Callable[..., mx.array], shared: int
) -> Callable[..., mx.array]:
    """Return the function from q [B, K, T G, D] and the parts of k and v [B, K, U, D] to (softmax(q k^T + bias) v, the logarithms of
    its sums); G = `shared` heads use the same keys, and their queries of one position follow each other.

    Its backward pass makes the shares [B, K, T G, U] again from the logarithms (Dao et al. 2022, FlashAttention): they are
    the largest array of a layer, and cheap beside its matrix products.
    """

    def joined(parts: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        half = len(parts) // 2
        return join(*parts[:half]), join(*parts[half:])

    def make_scores(q: mx.array, k: mx.array, start: int, stop: int) -> mx.array:
        """Return q k^T + bias of a block, [B, K, t, u]."""
        scores = q @ k.swapaxes(-1, -2)
        return scores if bias is None else scores + bias[..., start:stop, : k.shape[2]]

    def forward(q: mx.array, *parts: mx.array) -> tuple[mx.array, mx.array]:
        k, v = joined(parts)
        mixed, logs = [], []
        for start, stop, seen in blocks:
            scores = make_scores(q[:, :, start:stop], k[:, :, :seen], start, stop)
            most = scores.max(axis=-1, keepdims=True)
            power = exp(scores - most)
            total = _sum(power)
            mixed.append((power @ v[:, :, :seen]) / total)
            logs.append(most + mx.log(total))
        together = mx.unflatten(mx.concatenate(mixed, axis=2), 2, (-1, shared)).transpose(0, 2, 1, 3, 4)
        return mx.contiguous(together), mx.concatenate(logs, axis=2)

    def backward(
        primals: tuple[mx.array, ...], slopes: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        q, *parts = mx.depends(list(primals), [slopes[0]])  # as in _swiglu_vjp
        k, v = joined(parts)
        slope, output = (array[0].transpose(0, 2, 1, 3, 4).flatten(2, 3) for array in (slopes, outputs))
        drawn = _sum(slope * output)  # sum_u share_u d_u, for d = slope v^T
        at_q, at_k, at_v = [], mx.zeros_like(k), mx.zeros_like(v)
        for start, stop, seen in blocks:
            here, near, k_seen, v_seen = (
                q[:, :, start:stop],
                slope[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
            )
            share = exp(make_scores(here, k_seen, start, stop) - outputs[1][:, :, start:stop])
            at_scores = share * (near @ v_seen.swapaxes(-1, -2) - drawn[:, :, start:stop])
            at_q.append(at_scores @ k_seen)
            rest = [(0, 0), (0, 0), (0, k.shape[2] - seen), (0, 0)]
            at_k = at_k + mx.pad(at_scores.swapaxes(-1, -2) @ here, rest)
            at_v = at_v + mx.pad(share.swapaxes(-1, -2) @ near, rest)
        _, at_parts = mx.vjp(lambda *parts: list(joined(parts)), parts, [at_k, at_v])
        return mx.concatenate(at_q, axis=2), *at_parts

    function = mx.custom_function(forward)
    function.vjp(in_this_stream(backward))
    return function  # type: ignore[no-any-return]


def _sum(x: mx.array) -> mx.array:
    """Return the sum over the last axis, which is kept: as a product, since MLX's own sum is several times slower."""
    return x @ mx.ones((x.shape[-1], 1))


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


class _Rope(nn.RoPE):  # type: ignore[misc]
    """Rotary positions that turn gradients back as they turned the input.

    On a CPU MLX composes its own of slices, whose gradients are arrays of zeros to write into, and makes the angles anew in each layer.
    """

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        plain = isinstance(offset, int) and x.dtype == mx.float32 and x.shape[-1] == self.dims
        if self.traditional or not plain or x.shape[-2] < 2:
            y: mx.array = super().__call__(x, offset)
            return y
        cos, sin = _angles(self.dims, self.base, self.scale, int(offset), x.shape[-2])
        return _with_vjp(lambda x: _turn(x, cos, sin), lambda primal, slope, output: _turn(slope, cos, -sin))(x)


def _turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate each pair (x_i, x_(i + D/2)) of [..., T, D]; cos, sin: [T, D/2]."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@functools.lru_cache(64)
def _angles(dims: int, base: float, scale: float, offset: int, length: int) -> tuple[mx.array, mx.array]:
    """Return the cosines and sines of the angles of `length` positions from `offset`, [T, D/2] each."""
    angles = np.outer(np.arange(offset, offset + length) * scale, base ** (-np.arange(0, dims, 2) / dims))
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def use_fast_math(model: nn.Module) -> None:
    """Make the blocks of a float32 model use the functions above.

    mlx-lm's blocks call `scaled_dot_product_attention` and `swiglu` by name. Each such block gets a class of its own
    whose `__call__` is the same code with those names bound to ours, so nothing of mlx-lm is changed.
    """
    made: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind is nn.RoPE:
            module.__class__ = _Rope
        call = kind.__call__
        if isinstance(call, types.FunctionType) and set(call.__code__.co_names) & set(_REPLACED) and _takes_part(call):
            usual = call.__globals__.get("swiglu") is activations.swiglu and _is_same(call, _usual_feed_forward)
            ours = _feed_forward if usual else _rebound(call)
            made.setdefault(kind, type(f"Fast{kind.__name__}", (kind,), {"__call__": ours}))
            module.__class__ = made[kind]


def _takes_part(call: types.FunctionType) -> bool:
    return any(name in call.__globals__ for name in _REPLACED)


def _usual_feed_forward(self: Any, x: mx.array) -> mx.array:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _feed_forward(self: Any, x: mx.array) -> mx.array:
    """Like `_usual_feed_forward`, but what goes into the last layer is made again for its gradients: kept, it would be the widest array of a layer."""
    gate, up = self.gate_proj(x), self.up_proj(x)

    def down(gate: mx.array, up: mx.array) -> mx.array:
        return self.down_proj(_either_swiglu(gate, up))

    return (checkpointed(self.down_proj, down) if self.training else down)(gate, up)


def _is_same(one: types.FunctionType, other: Any) -> bool:
    """Whether two functions are the same code; names of the globals they use count, what these stand for does not."""
    a, b = one.__code__, other.__code__
    return (a.co_code, a.co_names, a.co_varnames, a.co_consts) == (b.co_code, b.co_names, b.co_varnames, b.co_consts)


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
_either_swiglu = _choosing(activations.swiglu, swiglu)
