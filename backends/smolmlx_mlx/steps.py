"""Keys, values and choices of a batch of rows on MLX: what `smolmlx.generation.batching` schedules.

Each row's keys stand from column 0 on, so rows of different lengths need no moving: a row writes behind its own last
token, and the mask ends at its length. Padding is overwritten before it can be seen.

B places, H key-value heads, L columns, T tokens fed, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from smolmlx.generation.batching import GROWTH, PREFILL, Feed
from smolmlx.generation.sampling import Picks
from smolmlx_mlx.device import mx
from smolmlx_mlx.model import split_head


class Layout:
    """Where each row of a batch stands, shared by the caches of all layers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.prepare(1)

    def prepare(self, num_new: int) -> None:
        """Set out for a forward pass that feeds `num_new` columns."""
        self.even = bool((self.lengths == self.lengths[0]).all())
        self.width = int(self.lengths.max()) + num_new
        self.offset = int(self.lengths[0]) if self.even else mx.array(self.lengths)
        self._masks: dict[int | None, Any] = {}
        self.columns = None if self.even else mx.array(self.lengths[:, None] + np.arange(num_new, dtype=np.int32))

    def mask(self, num_new: int, window: int | None) -> Any:
        """Return [B or 1, 1, T, width]: not later, and inside the window; None where all is seen."""
        if self.even and num_new == 1 and (window is None or self.width <= window):
            return None
        if window not in self._masks:
            place = self.lengths[:1] if self.even else self.lengths
            queries = place[:, None, None, None] + np.arange(num_new, dtype=np.int32)[:, None]
            keys = np.arange(self.width, dtype=np.int32)
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            self._masks[window] = mx.array(seen)
        return self._masks[window]


class Shelf:
    """One layer's keys and values, [B, H, L, D], in the place of mlx-lm's cache."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> Any:
        return self.layout.offset

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self.layout.mask(length, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        width = self.layout.width
        self.grow(width, keys, values)
        assert self.keys is not None and self.values is not None
        self.keys = self._write(self.keys, keys)
        self.values = self._write(self.values, values)
        return self.keys[:, :, :width], self.values[:, :, :width]

    def grow(self, width: int, keys: mx.array, values: mx.array) -> None:
        """Make room for `width` columns, of the type and heads of `keys`."""
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= width:
            return
        missing = (width + GROWTH - 1) // GROWTH * GROWTH - have
        rows = len(self.layout.lengths)
        fresh = [mx.zeros((rows, a.shape[1], missing, a.shape[3]), a.dtype) for a in (keys, values)]
        if self.keys is None:
            self.keys, self.values = fresh
        else:
            self.keys = mx.concatenate([self.keys, fresh[0]], axis=2)
            self.values = mx.concatenate([self.values, fresh[1]], axis=2)

    def _write(self, store: mx.array, new: mx.array) -> mx.array:
        if self.layout.even:
            start = int(self.layout.lengths[0])
            store[:, :, start : start + new.shape[2]] = new
        else:
            rows = mx.arange(store.shape[0])[:, None]
            store[rows, :, self.layout.columns] = new.transpose(0, 2, 1, 3)
        return store


class MlxSteps:
    """A model's steps. `most` is 1 for models whose layers keep more than keys and values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body, self.head, _ = split_head(model)
        kinds = make_prompt_cache(model)
        plain = all(type(c) is KVCache or (type(c) is RotatingKVCache and c.keep == 0) for c in kinds)
        self.most = None if plain else 1
        self._num_layers = len(kinds)
        self._vocabulary = int(self.model(mx.array([[1]])).shape[-1])

    @property
    def num_words(self) -> int:
        return (self._vocabulary + 31) // 32

    def open(self, num_places: int, prefix: Sequence[int]) -> None:
        self._busy = np.zeros(num_places, np.int32)
        self._layout = Layout([0] * num_places)
        self._caches: list[Any] = [Shelf(self._layout) for _ in range(self._num_layers)]
        self._num_shared, self._shared = 0, list[Any]()
        if len(prefix) and self.most is None:
            self._shared = self._prefill([prefix])
            self._num_shared = len(prefix)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Return caches of prompts of different lengths, of which the shared beginning is already known."""
        layout = Layout([self._num_shared] * len(prompts))
        caches = [Shelf(layout) for _ in range(self._num_layers)]
        if self._num_shared:
            for shelf, shared in zip(caches, self._shared, strict=True):
                shelf.keys = mx.repeat(shared.keys, len(prompts), axis=0)
                shelf.values = mx.repeat(shared.values, len(prompts), axis=0)
        rests = [prompt[self._num_shared :] for prompt in prompts]
        width = max(map(len, rests))
        ids = np.zeros((len(rests), width), np.int32)
        for row, rest in enumerate(rests):
            ids[row, : len(rest)] = rest
        for start in range(0, width, PREFILL):
            part = mx.array(ids[:, start : start + PREFILL])
            layout.prepare(part.shape[1])
            self.body(part, cache=caches)
            mx.eval([shelf.state for shelf in caches])
            layout.lengths += part.shape[1]
        return caches

    def admit(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        heads = [prompt[:-1] for prompt in prompts]
        if self.most == 1:
            self._caches = make_prompt_cache(self.model)
            for start in range(0, len(heads[0]), PREFILL):
                self.model(mx.array([list(heads[0][start : start + PREFILL])]), cache=self._caches)
                mx.eval([cache.state for cache in self._caches])
        elif longest := max(map(len, heads)):
            for shelf, fresh in zip(self._caches, self._prefill(heads), strict=True):
                shelf.grow(longest, fresh.keys, fresh.values)
                for row, place in enumerate(places):
                    length = len(heads[row])
                    shelf.keys[place, :, :length] = fresh.keys[row, :, :length]
                    shelf.values[place, :, :length] = fresh.values[row, :, :length]
                mx.eval(shelf.state)
        for place, head in zip(places, heads, strict=True):
            self._layout.lengths[place] = len(head)
            self._busy[place] = 1

    def release(self, place: int) -> None:
        self._busy[place] = self._layout.lengths[place] = 0

    def grow(self, num_places: int) -> None:
        self._busy = np.concatenate([self._busy, np.zeros(num_places, np.int32)])
        self._layout.lengths = np.concatenate([self._layout.lengths, np.zeros(num_places, np.int32)])
        for shelf in self._caches if self.most is None else []:
            if shelf.keys is not None:
                extra = [(0, num_places), (0, 0), (0, 0), (0, 0)]
                shelf.keys, shelf.values = mx.pad(shelf.keys, extra), mx.pad(shelf.values, extra)

    def keep(self, places: Sequence[int]) -> None:
        index = mx.array(list(places))
        self._busy = self._busy[list(places)]
        self._layout.lengths = self._layout.lengths[list(places)]
        for shelf in self._caches if self.most is None else []:
            if shelf.keys is not None:
                shelf.keys, shelf.values = shelf.keys[index], shelf.values[index]

    def step(self, feed: Feed, picks: Callable[[], Picks]) -> mx.array:
        if isinstance(feed, mx.array):
            ids, counts = feed[:, None], self._busy
        else:
            counts = np.array([len(tokens) for tokens in feed], np.int32)
            width = max(1, int(counts.max()))
            ids = mx.array([[*tokens, *[0] * (width - len(tokens))] for tokens in feed])
        self._layout.prepare(ids.shape[1])
        hidden = self.body(ids, cache=self._caches)
        last = mx.array(np.maximum(counts, 1) - 1)
        hidden = hidden[:, -1] if ids.shape[1] == 1 else hidden[mx.arange(len(counts)), last]
        logits = self.head(hidden)
        self._layout.lengths = self._layout.lengths + counts
        mx.async_eval(logits)
        tokens = choose(logits, picks())
        mx.async_eval(tokens)
        return tokens

    def read(self, tokens: mx.array) -> list[int]:
        found: list[int] = tokens.tolist()
        return found


def choose(logits: mx.array, picks: Picks) -> mx.array:
    """Return the next token of each row, as `generation.sampling.choose` does: [B, V] to [B]."""
    logits = logits.astype(mx.float32)
    size = logits.shape[1]
    if picks.seen is not None:
        penalty = mx.array(picks.penalty)[:, None]
        punished = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(_widen(picks.seen, size), punished, logits)
    if picks.allowed is not None:
        logits = mx.where(_widen(picks.allowed, size), logits, -mx.inf)
    best = mx.argmax(logits, axis=1)
    if picks.greedy:
        return best
    drawn = picks.temperature > 0
    scaled = logits / mx.array(np.where(drawn, picks.temperature, 1))[:, None]
    weights = mx.exp(scaled - scaled.max(axis=1, keepdims=True))
    uniform = mx.array(picks.uniform)[:, None]
    tokens = _first_above(weights, uniform)
    if picks.ordered.any():
        order = mx.argsort(-scaled, axis=1)
        inside = _cut(mx.take_along_axis(weights, order, axis=1), picks)
        placed = mx.take_along_axis(order, _first_above(inside, uniform)[:, None], axis=1)[:, 0]
        tokens = mx.where(mx.array(picks.ordered), placed, tokens)
    return mx.where(mx.array(drawn), tokens, best)


def _cut(weights: mx.array, picks: Picks) -> mx.array:
    """Set to 0 what top-k, top-p and min-p leave out of weights in falling order: [B, V]."""
    most = np.where(picks.top_k > 0, picks.top_k, weights.shape[1])
    weights = mx.where(mx.arange(weights.shape[1]) < mx.array(most)[:, None], weights, 0.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    outside = mx.cumsum(weights, axis=1) - weights >= mx.array(picks.top_p)[:, None]
    rare = weights < mx.array(picks.min_p)[:, None] * weights[:, :1]
    return mx.where(outside | rare, 0.0, weights)


def _first_above(weights: mx.array, uniform: mx.array) -> mx.array:
    """Return the first place at which the running sum passes uniform [B, 1] times the whole."""
    heights = mx.cumsum(weights, axis=1)
    place = (heights <= uniform * heights[:, -1:]).sum(axis=1)
    last = weights.shape[1] - 1 - mx.argmax(weights[:, ::-1] > 0, axis=1)
    return mx.minimum(place, last)


def _widen(words: Any, size: int) -> mx.array:
    """Return [B, W] words of 32 tokens as [B, V] flags; words cover the whole vocabulary."""
    bits = mx.array(words)[:, :, None] >> mx.arange(32, dtype=mx.uint32)
    return (bits & 1).reshape(words.shape[0], -1)[:, :size].astype(mx.bool_)
