"""The CPU's own attention and SiLU are MLX's, in value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("smolmlx_mlx.blas", reason="the MLX engine is not installed").ensure()
mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

import mlx.nn as nn  # noqa: E402

from smolmlx_mlx import cpu_math  # noqa: E402
from smolmlx_mlx.lanes import Lanes, lane_here  # noqa: E402
from smolmlx_mlx.model import PackedMask  # noqa: E402
from smolmlx_mlx.pairs import Behind, Prefix  # noqa: E402

BATCH, HEADS, GROUPS, WIDTH = 2, 6, 2, 16


@pytest.fixture(autouse=True)
def on_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def make_mask(name: str, length: int) -> tuple[Any, Any]:
    """Return what stands for a cache, and the mask: a word, or [B, 1, length, length]."""
    segments = mx.array([[1] * (length // 2) + [2] * (length - length // 2), [1] * length])
    cache = {
        "packed": PackedMask(segments), "window": PackedMask(segments), "prefix": Prefix(mx.array([0, length // 3]))
    }.get(name)  # fmt: skip
    if name == "keys":
        return None, mx.arange(length)[None] < length - 3
    if cache is None:
        return None, "causal" if name == "causal" else None
    return cache, cache.make_mask(length, window_size=40 if name == "window" else None)


@pytest.mark.parametrize("name", ["causal", "keys", "none", "packed", "prefix", "window"])
@pytest.mark.parametrize("length", [30, 192, 301])
def test_attention_is_that_of_mlx(name: str, length: int) -> None:
    cache, mask = make_mask(name, length)
    shapes = ((BATCH, HEADS, length, WIDTH), *2 * ((BATCH, GROUPS, length, WIDTH),))
    mx.random.seed(0)
    inputs = [mx.random.normal(shape) for shape in shapes]
    weights = mx.random.normal(shapes[0])

    def ours(q: Any, k: Any, v: Any) -> Any:
        return (cpu_math.attention(q, k, v, cache, 0.25, mask) * weights).sum()

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask) * weights).sum()

    compare(ours, theirs, inputs)


@pytest.mark.parametrize("length", [30, 200])
def test_answers_behind_one_prompt_are_those_of_mlx(length: int) -> None:
    """The prompt's keys and values, and their gradients, are shared by both of its answers."""
    mx.random.seed(0)
    kept, own = (1, GROUPS, 70, WIDTH), (2, GROUPS, length, WIDTH)
    inputs = [mx.random.normal(shape) for shape in ((2, HEADS, length, WIDTH), kept, own, kept, own)]
    weights = mx.random.normal(inputs[0].shape)

    def attend(function: Any) -> Any:
        def loss(q: Any, *parts: Any) -> Any:
            prefix = Prefix(mx.array([20]))
            prefix.keys, prefix.values = parts[0], parts[2]
            cache = Behind(prefix)
            k, v = cache.update_and_fetch(parts[1], parts[3])
            return (function(q, k, v, cache, cache.make_mask(length)) * weights).sum()

        return loss

    ours = attend(lambda q, k, v, cache, mask: cpu_math.attention(q, k, v, cache, 0.25, mask))
    theirs = attend(lambda q, k, v, _, mask: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask))
    compare(ours, theirs, inputs)


def compare(ours: Any, theirs: Any, inputs: list[Any]) -> None:
    places = list(range(len(inputs)))
    (value, found), (wanted, expected) = (mx.value_and_grad(f, argnums=places)(*inputs) for f in (ours, theirs))
    assert abs(value.item() - wanted.item()) < 1e-3
    for mine, other in zip(found, expected, strict=True):
        assert mx.allclose(mine, other, atol=2e-5).item()


def test_swiglu_is_that_of_mlx() -> None:
    mx.random.seed(0)
    gate, x = 8 * mx.random.normal((50, 40)), mx.random.normal((50, 40))
    own = mx.value_and_grad(lambda g, y: cpu_math.swiglu(g, y).sum(), argnums=(0, 1))(gate, x)
    mlx = mx.value_and_grad(lambda g, y: (g * mx.sigmoid(g) * y).sum(), argnums=(0, 1))(gate, x)
    assert mx.allclose(own[0], mlx[0], rtol=1e-5).item()
    assert all(mx.allclose(a, b, atol=1e-5).item() for a, b in zip(own[1], mlx[1], strict=True))


@pytest.mark.parametrize("columns", [1, 7, 50, 64])
def test_the_head_in_parts(columns: int) -> None:
    hidden, weight = mx.random.normal((9, 8)) * 3, mx.random.normal((50, 8))
    weight[3] = weight[41] = mx.ones(8) * 4  # tokens that tie
    labels = mx.array([0, 3, 41, 49, 7, 7, 12, 30, 44])
    hidden[1:3] = mx.ones(8)

    def usual(hidden: Any) -> Any:
        logits = hidden @ weight.T
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    nats, best, slope = cpu_math.head_losses(hidden, weight, labels, columns)
    assert mx.allclose(nats, usual(hidden), atol=1e-5)
    assert mx.allclose(slope, mx.grad(lambda h: usual(h).sum())(hidden), atol=1e-5)
    assert best.tolist() == mx.argmax(hidden @ weight.T, axis=-1).tolist() and best[1:3].tolist() == [3, 3]


def test_exp_is_that_of_numpy() -> None:
    x = np.concatenate([np.linspace(-87, 88, 200001), np.linspace(-1, 1, 20001)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.array(cpu_math.exp(mx.array(x))) / exact - 1).max() < 3e-7
    assert cpu_math.exp(mx.array(0.0)).item() == 1
    far = np.array(cpu_math.exp(mx.array([-3e38, -1e9, -mx.inf, mx.nan, 100, mx.inf])))
    assert (far[:3] < 2e-38).all() and np.isnan(far[3]) and (far[4:] > 1e38).all()


@pytest.mark.parametrize("offset", [0, 7])
def test_rotary_positions_are_those_of_mlx(offset: int) -> None:
    usual, model = nn.RoPE(16, base=1e5, scale=0.5), nn.Sequential(nn.RoPE(16, base=1e5, scale=0.5))
    cpu_math.use_fast_math(model)
    ours = model.layers[0]
    assert type(ours) is not nn.RoPE
    mx.random.seed(0)
    x, weights = mx.random.normal((2, 3, 30, 16)), mx.random.normal((2, 3, 30, 16))
    compare(
        lambda x: (ours(x, offset=offset) * weights).sum(), lambda x: (usual(x, offset=offset) * weights).sum(), [x]
    )
    assert mx.allclose(ours(x[:, :, :1], mx.array(offset)), usual(x[:, :, :1], offset), atol=1e-6).item()


def test_lanes_compile_to_the_same() -> None:
    """Each lane has arrays of a rank of its own while constants are met, so that mx.compile merges none of theirs."""
    mx.random.seed(0)
    gates = [4 * mx.random.normal((6, 40)) for _ in range(2)]
    lanes = Lanes(2)

    def summed(one: Any, two: Any) -> Any:
        return mx.concatenate(lanes.spread(lambda gate: cpu_math.swiglu(gate, gate), [(one,), (two,)])).sum()

    assert [lane_in(stream) for stream in lanes.streams] == [0, 1]
    plain = mx.value_and_grad(lambda *gates: sum((g * mx.sigmoid(g) * g).sum() for g in gates), argnums=(0, 1))(*gates)
    made = mx.compile(mx.value_and_grad(summed, argnums=(0, 1)))(*gates)
    assert mx.allclose(made[0], plain[0], rtol=1e-5).item()
    assert all(
        a.shape == b.shape and mx.allclose(a, b, atol=1e-5).item() for a, b in zip(made[1], plain[1], strict=True)
    )


def lane_in(stream: Any) -> int:
    with mx.stream(stream):
        return lane_here()
