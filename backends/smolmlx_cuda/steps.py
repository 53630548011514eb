"""Keys, values and choices of a batch of rows on PyTorch: what `smolmlx.generation.batching` schedules.

Each row's keys stand from column 0 on, so rows of different lengths need no moving: a row writes behind its own last
token, and the mask ends at its length. Padding is overwritten before it can be seen.

B places, H key-value heads, L columns, T tokens fed, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from smolmlx.generation.batching import GROWTH, PREFILL, Feed
from smolmlx.generation.sampling import Picks
from smolmlx_cuda.model import split_head


class Layout:
    """Where each row of a batch stands, shared by the stores of all layers."""

    def __init__(self, lengths: Sequence[int], device: Any) -> None:
        self.lengths, self.device = np.array(lengths, np.int64), device
        self.prepare(1)

    def prepare(self, num_new: int) -> None:
        """Set out for a forward pass that feeds `num_new` columns."""
        self.even = bool((self.lengths == self.lengths[0]).all())
        self.width = int(self.lengths.max()) + num_new
        # [B, T], on the host for the masks, on the device for the writes and the rotary embedding
        self.columns = self.lengths[:, None] + np.arange(num_new)
        self.positions = torch.from_numpy(self.columns).to(self.device)

    def mask(self, window: int | None = None) -> torch.Tensor:
        """Return [B, 1, T, width] flags: not later, and inside the window."""
        keys = torch.arange(self.width, device=self.device)
        queries = self.positions[:, None, :, None]
        seen = keys <= queries
        return seen if window is None else seen & (keys > queries - window)


class Shelf(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer's keys and values, [B, H, L, D], in the place of transformers' own."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.grow(self.layout.width, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self.layout
        self.grow(layout.width, key_states, value_states)
        assert self.keys is not None and self.values is not None
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if layout.even:
                start = int(layout.lengths[0])
                store[:, :, start : start + new.shape[2]] = new
            else:
                rows = torch.arange(store.shape[0], device=store.device)[:, None]
                store[rows, :, layout.positions] = new.transpose(1, 2)
        return self.keys[:, :, : layout.width], self.values[:, :, : layout.width]

    def grow(self, width: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for `width` columns, of the type and heads of `keys`."""
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= width:
            return
        missing = (width + GROWTH - 1) // GROWTH * GROWTH - have
        rows = len(self.layout.lengths)
        fresh = [a.new_zeros(rows, a.shape[1], missing, a.shape[3]) for a in (keys, values)]
        self.keys = fresh[0] if self.keys is None else torch.cat([self.keys, fresh[0]], dim=2)
        self.values = fresh[1] if self.values is None else torch.cat([self.values, fresh[1]], dim=2)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layout.width, 0

    def get_seq_length(self) -> int:
        return int(self.layout.lengths.max())

    def get_max_length(self) -> int:
        return -1


class TorchSteps:
    """A model's steps. `most` is 1 for models whose layers keep more than keys and values."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = split_head(model)
        self.device = model.device
        self.config = model.config.get_text_config(decoder=True)
        window = getattr(self.config, "sliding_window", None)
        self._types = set(getattr(self.config, "layer_types", None) or (["sliding_attention"] if window else []))
        kinds = DynamicCache(config=self.config).layers
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kinds)
        self.most = None if plain and self._types <= {"full_attention", "sliding_attention"} else 1
        self._num_layers = int(self.config.num_hidden_layers)
        self._vocabulary = int(self.config.vocab_size)

    @property
    def num_words(self) -> int:
        return (self._vocabulary + 31) // 32

    def open(self, num_places: int, prefix: Sequence[int]) -> None:
        self._busy = np.zeros(num_places, np.int64)
        self._layout = Layout([0] * num_places, self.device)
        self._cache: Any = self._shelves(self._layout)
        self._num_shared, self._shared = 0, None
        if len(prefix) and self.most is None:
            self._shared = self._prefill([prefix])
            self._num_shared = len(prefix)

    def _shelves(self, layout: Layout) -> Cache:
        return Cache(layers=[Shelf(layout) for _ in range(self._num_layers)])

    def _forward(self, ids: torch.Tensor, layout: Layout, cache: Any) -> torch.Tensor:
        """Return [B, T, D] hidden states (or logits) of the columns that `layout` is prepared for."""
        mask: Any = layout.mask()
        if "sliding_attention" in self._types:
            window = layout.mask(int(self.config.sliding_window))
            mask = {"full_attention": mask, "sliding_attention": window} if len(self._types) > 1 else window
        elif layout.even and ids.shape[1] == 1:
            mask = None  # all is seen; without a mask attention need not repeat keys for grouped heads
        found: torch.Tensor = self.body(
            input_ids=ids, attention_mask=mask, position_ids=layout.positions, past_key_values=cache, use_cache=True
        )
        return found

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Cache:
        """Return the cache of prompts of different lengths, of which the shared beginning is already known."""
        layout = Layout([self._num_shared] * len(prompts), self.device)
        cache = self._shelves(layout)
        if self._shared is not None:
            for shelf, shared in zip(cache.layers, self._shared.layers, strict=True):
                shelf.keys = shared.keys.repeat_interleave(len(prompts), dim=0)
                shelf.values = shared.values.repeat_interleave(len(prompts), dim=0)
        rests = [prompt[self._num_shared :] for prompt in prompts]
        width = max(map(len, rests))
        ids = torch.tensor([[*rest, *[0] * (width - len(rest))] for rest in rests], device=self.device)
        for start in range(0, width, PREFILL):
            part = ids[:, start : start + PREFILL]
            layout.prepare(part.shape[1])
            self._forward(part, layout, cache)
            layout.lengths += part.shape[1]
        return cache

    @torch.no_grad()
    def admit(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        heads = [prompt[:-1] for prompt in prompts]
        if self.most == 1:
            self._cache = DynamicCache(config=self.config)
            if heads[0]:
                ids = torch.tensor([list(heads[0])], device=self.device)
                self.body(input_ids=ids, past_key_values=self._cache, use_cache=True)
        elif longest := max(map(len, heads)):
            for shelf, fresh in zip(self._cache.layers, self._prefill(heads).layers, strict=True):
                shelf.grow(longest, fresh.keys, fresh.values)
                for row, place in enumerate(places):
                    length = len(heads[row])
                    shelf.keys[place, :, :length] = fresh.keys[row, :, :length]
                    shelf.values[place, :, :length] = fresh.values[row, :, :length]
        for place, head in zip(places, heads, strict=True):
            self._layout.lengths[place] = len(head)
            self._busy[place] = 1

    def release(self, place: int) -> None:
        self._busy[place] = self._layout.lengths[place] = 0

    def grow(self, num_places: int) -> None:
        self._busy = np.concatenate([self._busy, np.zeros(num_places, np.int64)])
        self._layout.lengths = np.concatenate([self._layout.lengths, np.zeros(num_places, np.int64)])
        for shelf in self._cache.layers if self.most is None else []:
            if shelf.keys is not None:
                shelf.keys = torch.cat([shelf.keys, shelf.keys.new_zeros(num_places, *shelf.keys.shape[1:])])
                shelf.values = torch.cat([shelf.values, shelf.values.new_zeros(num_places, *shelf.values.shape[1:])])

    def keep(self, places: Sequence[int]) -> None:
        index = torch.tensor(list(places), device=self.device)
        self._busy = self._busy[list(places)]
        self._layout.lengths = self._layout.lengths[list(places)]
        for shelf in self._cache.layers if self.most is None else []:
            if shelf.keys is not None:
                shelf.keys, shelf.values = shelf.keys[index], shelf.values[index]

    @torch.no_grad()
    def step(self, feed: Feed, picks: Callable[[], Picks]) -> torch.Tensor:
        if isinstance(feed, torch.Tensor):
            ids, counts = feed[:, None], self._busy
        else:
            counts = np.array([len(tokens) for tokens in feed])
            width = max(1, int(counts.max()))
            rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in feed]
            ids = torch.tensor(rows, device=self.device)
        self._layout.prepare(ids.shape[1])
        if self.most == 1:
            hidden = self.body(input_ids=ids, past_key_values=self._cache, use_cache=True)
        else:
            hidden = self._forward(ids, self._layout, self._cache)
        last = torch.from_numpy(np.maximum(counts, 1) - 1).to(self.device)
        logits = self.head(hidden[torch.arange(len(counts), device=self.device), last])
        self._layout.lengths = self._layout.lengths + counts
        return choose(logits, picks())

    def read(self, tokens: torch.Tensor) -> list[int]:
        found: list[int] = tokens.tolist()
        return found


def choose(logits: torch.Tensor, picks: Picks) -> torch.Tensor:
    """Return the next token of each row, as `generation.sampling.choose` does: [B, V] to [B]."""
    logits = logits.float()
    size = logits.shape[1]

    def put(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).to(logits.device)

    if picks.seen is not None:
        penalty = put(picks.penalty)[:, None]
        punished = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(_widen(put(picks.seen.view(np.int32)), size), punished, logits)
    if picks.allowed is not None:
        logits = logits.masked_fill(~_widen(put(picks.allowed.view(np.int32)), size), -torch.inf)
    best = logits.argmax(dim=1)
    if picks.greedy:
        return best
    drawn = picks.temperature > 0
    scaled = logits / put(np.where(drawn, picks.temperature, np.float32(1)))[:, None]
    weights = (scaled - scaled.amax(dim=1, keepdim=True)).exp()
    uniform = put(picks.uniform)[:, None]
    tokens = _first_above(weights, uniform)
    if picks.ordered.any():
        order = scaled.argsort(dim=1, descending=True, stable=True)
        most = np.where(picks.top_k > 0, picks.top_k, size).astype(np.int64)
        inside = _cut(
            weights.gather(1, order), put(most)[:, None], put(picks.top_p)[:, None], put(picks.min_p)[:, None]
        )
        placed = order.gather(1, _first_above(inside, uniform)[:, None])[:, 0]
        tokens = torch.where(put(picks.ordered), placed, tokens)
    return torch.where(put(drawn), tokens, best)


def _cut(weights: torch.Tensor, most: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set to 0 what top-k, top-p and min-p ([B, 1] each) leave out of weights in falling order: [B, V]."""
    weights = weights.masked_fill(torch.arange(weights.shape[1], device=weights.device) >= most, 0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    outside = weights.cumsum(dim=1) - weights >= top_p
    return weights.masked_fill(outside | (weights < min_p * weights[:, :1]), 0)


def _first_above(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first place at which the running sum passes uniform [B, 1] times the whole."""
    heights = weights.cumsum(dim=1)
    place = (heights <= uniform * heights[:, -1:]).sum(dim=1)
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).to(torch.uint8).argmax(dim=1)
    return torch.minimum(place, last)


def _widen(words: torch.Tensor, size: int) -> torch.Tensor:
    """Return [B, W] words of 32 tokens as [B, V] flags; words cover the whole vocabulary."""
    bits = words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32)
    return (bits & 1).reshape(words.shape[0], -1)[:, :size].bool()
