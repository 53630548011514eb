"""Use every core of a CPU: MLX's CPU backend runs a stream on one thread, so each core gets a stream and a share of the rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS


class Lanes:
    """CPU streams that work side by side. With one lane everything runs where it would anyway."""

    def __init__(self, count: int = 1) -> None:
        self.streams = [mx.new_stream(mx.cpu) for _ in range(count)] if count > 1 else [mx.default_stream(mx.cpu)]
        _LANES.update((str(stream), lane) for lane, stream in enumerate(self.streams))

    def __len__(self) -> int:
        return len(self.streams)

    def spread(self, function: Callable[..., Any], slices: list[tuple[Any, ...]]) -> list[Any]:
        """Call `function` on each tuple of arguments, in turn on the lanes; return the results in order."""
        if len(self) == 1:
            return [function(*arguments) for arguments in slices]
        results = []
        for i, arguments in enumerate(slices):
            with mx.stream(self.streams[i % len(self)]):
                results.append(function(*arguments))
        return results


_LANES: dict[str, int] = {}


def lane_here() -> int:
    """Return which lane the present stream is; 0 where there are none."""
    return _LANES.get(str(mx.default_stream(mx.default_device())), 0)


def in_this_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` bound to the present stream; MLX calls Python again in the backward pass, on the default one."""
    stream = mx.default_stream(mx.default_device())

    def call(*args: Any, **kwargs: Any) -> Any:
        with mx.stream(stream):
            return function(*args, **kwargs)

    return call


def open_lanes(rows: int) -> Lanes:
    """Return lanes for micro-batches of `rows` rows on the default device, and divide the BLAS's threads among them.

    One lane on a GPU, on macOS (Accelerate divides its work itself) and where the BLAS cannot be told its threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    count = min(cores, rows)
    if mx.default_device() != mx.cpu or count < 2 or not blas.set_threads(max(1, cores // count)):
        return Lanes()
    return Lanes(count)


def even_slices(length: int, parts: int) -> list[slice]:
    """Return at most `parts` slices of nearly the same size that cover `length`."""
    edges = np.linspace(0, length, min(parts, length) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]
