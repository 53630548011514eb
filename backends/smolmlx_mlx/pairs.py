"""Preference pairs: log-probabilities of both answers behind a prompt that is computed once, and their loss.

The body reads the prompts, and what each layer's attention made of them (keys and values, with their gradients) is what
the answers attend to, as in generation with a cache. Prompts are padded in front, so every answer begins at the same
position and the rotary positions need no offset per row.

B pairs, P tokens of a prefix, A tokens of a tail, S supervised positions, D width, K key-value heads, H head width.
"""

from __future__ import annotations

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from smolmlx.data.pair_batches import PairBatch  # noqa: E402
from smolmlx.preferences import Ops, Pairs, pair_losses  # noqa: E402
from smolmlx.recipe import Dpo  # noqa: E402
from smolmlx_mlx.cpu_math import JoinedCache  # noqa: E402
from smolmlx_mlx.lanes import even_slices  # noqa: E402
from smolmlx_mlx.losses import Losses  # noqa: E402
from smolmlx_mlx.step import Inputs  # noqa: E402

OPS = Ops(
    log_sigmoid=nn.log_sigmoid,
    log1m_exp=lambda x: mx.log(-mx.expm1(mx.minimum(x, -1e-7))),
    clip_at_zero=lambda x: mx.maximum(x, 0.0),
)


class Prefix:
    """Stands where mlx-lm expects a layer's cache while prompts are read, and keeps their keys and values."""

    offset = 0
    is_causal = True

    def __init__(self, starts: mx.array) -> None:
        """starts: [B]; column of each prompt's first real token."""
        self.starts = starts
        self.keys = self.values = mx.array(0.0)  # [B, K, P, H] once the layer has run

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return [B, 1, P, P]: real, not later, inside the window; padding sees itself, for a row of nothing is not a number."""
        place = mx.arange(length)
        seen = (place[None] >= self.starts[:, None])[:, None, None, :]
        return (seen & _not_later(place, place, window_size)) | (place[:, None] == place[None])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Behind(JoinedCache):
    """Stands where mlx-lm expects a layer's cache while both answers of each prompt are read."""

    is_causal = True

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.offset = int(prefix.keys.shape[2])

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return [2B, 1, A, P+A]: real, not later, inside the window."""
        place = mx.arange(self.offset + length)
        seen = mx.repeat(place[None] >= self.prefix.starts[:, None], 2, axis=0)[:, None, None, :]
        return seen & _not_later(place[self.offset :], place, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put the prompt's keys and values before those of its two answers: [2B, K, P+A, H]."""
        self.parts = self.prefix.keys, keys, self.prefix.values, values
        return self.join(*self.parts[:2]), self.join(*self.parts[2:])

    @staticmethod
    def join(*parts: mx.array) -> mx.array:
        before, own = parts
        return mx.concatenate([mx.repeat(before, 2, axis=0), own], axis=2)


def _not_later(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    mask = queries[:, None] >= keys[None]
    return mask & (queries[:, None] < keys[None] + window) if window else mask


class PairLosses:
    """Summed loss of a micro-batch of pairs, and the log-probabilities it is made of."""

    def __init__(self, losses: Losses, how: Dpo) -> None:
        self.losses, self.how = losses, how

    def __call__(
        self, reference: mx.array, tokens: mx.array, real: mx.array, *inputs: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Return (sum over the pairs, log-probabilities [2B]).

        Args:
            reference, tokens: [2B], in the order of the tails; real: [B]; inputs: as `log_probs` takes them.
        """
        found = self.log_probs(*inputs)
        pairs = Pairs(*(array[side::2] for array in (found, reference, tokens) for side in (0, 1)))
        return (pair_losses(self.how, OPS, pairs) * real).sum(), found

    def log_probs(
        self, prefix: mx.array | None, starts: mx.array | None, tails: mx.array, index: mx.array, labels: mx.array,
        weights: mx.array, owners: mx.array,
    ) -> mx.array:  # fmt: skip
        """Return the log-probability of each row's supervised tokens, [2B], nats; see `PairBatch` for the arguments."""
        rows = even_slices(tails.shape[0] // 2, len(self.losses.lanes))
        parts = [
            (None, None, tails[2 * r.start : 2 * r.stop])
            if prefix is None or starts is None
            else (prefix[r], starts[r], tails[2 * r.start : 2 * r.stop])
            for r in rows
        ]
        hidden = mx.concatenate(self.losses.lanes.spread(self._hidden, parts))
        nats, _ = self.losses.score(hidden[index], labels)
        return mx.zeros(tails.shape[0]).at[owners].add(-nats * weights)

    def _hidden(self, prefix: mx.array | None, starts: mx.array | None, tails: mx.array) -> mx.array:
        """Return [2B*A, D]."""
        cache = None
        if prefix is not None and starts is not None:
            kept = [Prefix(starts) for _ in self.losses.model.layers]
            self.losses.body(prefix, kept)  # only keys and values are used; MLX computes no more than that
            cache = [Behind(layer) for layer in kept]
        hidden: mx.array = self.losses.body(tails, cache)
        return hidden.reshape(-1, hidden.shape[-1])


def to_inputs(batch: PairBatch, reference: npt.NDArray[np.float32]) -> Inputs:
    """Return the arrays of a micro-batch that `PairLosses` takes."""
    shared = batch.prefix.shape[1] > 0
    return (
        mx.array(reference), mx.array(batch.num_tokens), mx.array(batch.real),
        mx.array(batch.prefix) if shared else None, mx.array(batch.starts) if shared else None,
        *(mx.array(a) for a in (batch.tails, batch.index, batch.labels, batch.weights, batch.owners)),
    )  # fmt: skip
