"""From pairs to micro-batches in one layout for every engine: prompts once, both answers behind them.

Where prompts are not shared they are part of the tails, and the prefix is empty: one layout, one code path.

Shapes: B pairs of a micro-batch, P tokens of a prefix, A tokens of a tail, S supervised positions of the tails.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from smolmlx.data.batches import BatchPlan, choose_widths
from smolmlx.data.store import IntArray, LongArray, TokenStore

_MAX_WIDTHS = 4
"""Widths of prefixes and of tails; a compiled step is made for each combination that occurs."""
_MAX_LABEL_COUNTS = 2
_SHAPE_COST = 0.35
"""Steps that the compilation of one costs (MLX on a CPU: about 2 s beside 6 s, benchmarks/README.md); widths are chosen for one epoch."""
_MULTIPLE = 8  # of which widths are; tails are short


@dataclass(frozen=True, slots=True)
class PairBatch:
    """One micro-batch of pairs. Rows 2i and 2i + 1 of the tails are the chosen and the rejected answer of pair i."""

    pairs: LongArray
    """[B]; number of each pair in the data, -1 where a last micro-batch is filled up."""
    prefix: IntArray
    """[B, P]; what both answers share, padding in front, so that every tail begins at position P. P may be 0."""
    starts: IntArray
    """[B]; column of the first real token of each prefix."""
    tails: IntArray
    """[2B, A]; what follows the prefix, padding behind."""
    index: IntArray
    """[S]; positions in the flattened tails [2B*A] whose next token is supervised, padded with 0."""
    labels: IntArray
    """[S]; the supervised tokens, padded with 0."""
    weights: npt.NDArray[np.float32]
    """[S]; 1 for a supervised position, 0 for padding."""
    owners: IntArray
    """[S]; the row of the tails each position belongs to."""

    @property
    def real(self) -> npt.NDArray[np.float32]:
        """[B]; 1 for a pair, 0 where there is none."""
        return (self.pairs >= 0).astype(np.float32)

    @property
    def num_tokens(self) -> npt.NDArray[np.float32]:
        """[2B]; supervised tokens of each answer, at least 1."""
        return np.maximum(np.bincount(self.owners, self.weights, len(self.tails)), 1).astype(np.float32)


@dataclass(frozen=True)
class PairPlan:
    """Which pairs go into which micro-batch of which step, and in what shape."""

    order: BatchPlan
    """Decides order and counts; its rows are pairs, of the documents 2i and 2i + 1."""
    shared: bool
    """Whether a prompt is computed once for both answers."""
    prefixes: LongArray
    """[pairs]; how many tokens of each pair both answers share; 0 where prompts are not shared."""
    prefix_widths: tuple[int, ...]
    tail_widths: tuple[int, ...]
    label_counts: tuple[int, ...]
    """Sizes of S."""

    def apart(self) -> PairPlan:
        """Return the same steps with prompts that are not shared."""
        return _lay_out(self.order, None)

    def __len__(self) -> int:
        return self.order.num_rows

    def step(self, step: int) -> list[PairBatch]:
        """Return the micro-batches of an optimizer step (0-based, over all epochs)."""
        epoch, within = divmod(step, self.order.steps_per_epoch)
        size = self.order.accumulation
        return [self.build(rows) for rows in self.order.epoch_order(epoch)[within * size : (within + 1) * size]]

    def evaluation(self) -> Iterator[PairBatch]:
        """Yield every pair once, in the micro-batches of the first epoch."""
        return (self.build(rows) for rows in self.order.epoch_order(0))

    @cached_property
    def answer_tokens(self) -> LongArray:
        """[pairs, 2]; supervised tokens of the chosen and of the rejected answer."""
        return self.order.store.supervised.reshape(-1, 2)

    def padded_tokens(self) -> int:
        """Tokens an epoch computes, padding included."""
        shapes = (self.shape(rows) for rows in self.order.epoch_order(0))
        return sum(self.order.batch_size * (prefix + 2 * tail) for prefix, tail in shapes)

    def shape(self, rows: Sequence[int] | LongArray) -> tuple[int, int]:
        """Return (P, A) of a micro-batch."""
        prefixes = self.prefixes[rows]
        tails = self.order.store.lengths.reshape(-1, 2)[rows].max(axis=1) - prefixes
        prefix = _width(self.prefix_widths, int(prefixes.max())) if self.shared else 0
        return prefix, _width(self.tail_widths, int(tails.max()))

    def build(self, rows: Sequence[int] | LongArray) -> PairBatch:
        """Lay pairs into arrays of a shape from the fixed set."""
        size, (width, length) = self.order.batch_size, self.shape(rows)
        pad, store = self.order.pad_id, self.order.store
        prefix, starts = np.full((size, width), pad, np.int32), np.full(size, width, np.int32)
        tails, targets = np.full((2 * size, length), pad, np.int32), np.full((2 * size, length), -1, np.int32)
        for slot, pair in enumerate(rows):
            cut = int(self.prefixes[pair])
            starts[slot] = width - cut
            for side in (0, 1):
                ids, mask = store.row(2 * int(pair) + side)
                place = 2 * slot + side
                tails[place, : len(ids) - cut] = ids[cut:]
                targets[place, : len(ids) - cut - 1] = np.where(mask[cut + 1 :], ids[cut + 1 :], -1)
            prefix[slot, width - cut :] = ids[:cut]
        pairs = np.full(size, -1, np.int64)
        pairs[: len(rows)] = rows
        return PairBatch(pairs, prefix, starts, tails, *_supervised(targets, self.label_counts))


def _width(widths: tuple[int, ...], longest: int) -> int:
    return widths[bisect.bisect_left(widths, longest)]


def _supervised(
    targets: IntArray, sizes: tuple[int, ...]
) -> tuple[IntArray, IntArray, npt.NDArray[np.float32], IntArray]:
    """Return index, labels, weights and owners; targets are -1 where nothing is supervised."""
    flat = targets.reshape(-1)
    found = np.flatnonzero(flat >= 0)
    size = _width(sizes, len(found))
    index, labels, owners = (np.zeros(size, np.int32) for _ in range(3))
    weights = np.zeros(size, np.float32)
    index[: len(found)] = found
    labels[: len(found)] = flat[found]
    owners[: len(found)] = found // targets.shape[1]
    weights[: len(found)] = 1.0
    return index, labels, weights, owners


def prefix_lengths(store: TokenStore) -> LongArray:
    """[pairs]; the longest common beginning of both rows that leaves the token before the first supervised one to the tails.

    That token predicts the answer's first, so it is computed with each answer; all logits then come from the tails.
    """
    found = np.zeros(len(store) // 2, np.int64)
    for pair in range(len(found)):
        (chosen, first), (rejected, second) = store.row(2 * pair), store.row(2 * pair + 1)
        most = max(0, min(int(np.argmax(first[1:])), int(np.argmax(second[1:]))))
        differs = np.flatnonzero(chosen[:most] != rejected[:most])
        found[pair] = differs[0] if len(differs) else most
    return found


def plan_pairs(
    store: TokenStore,
    *,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    shared: bool = False,
    pad_id: int = 0,
) -> PairPlan:
    """Choose shapes and order for a store of pairs; every pair is seen exactly once an epoch."""
    batch_size = min(batch_size, max(1, len(store) // 2))  # as in plan_batches
    longest, common = store.lengths.reshape(-1, 2).max(axis=1), prefix_lengths(store)
    most = int(np.sort(store.supervised.reshape(-1, 2).sum(axis=1))[-batch_size:].sum())
    gather = max(32, math.ceil(most / 32) * 32)
    # Prompts and answers of one batch are alike in length; the order is the same whether prompts are shared or not.
    sort_by = common, longest - common
    rows = tuple(np.arange(len(store), dtype=np.int32).reshape(-1, 2))
    order = BatchPlan(store, rows, batch_size, accumulation, seed, shuffle, (), gather, pad_id, sort_by)
    return _lay_out(order, common if shared else None)


def _lay_out(order: BatchPlan, common: LongArray | None) -> PairPlan:
    """Choose widths for an order of pairs; `common` says how much each pair shares, None that prompts are not shared."""
    longest = order.store.lengths.reshape(-1, 2).max(axis=1)
    prefixes = np.zeros_like(longest) if common is None else common
    batches = order.epoch_order(0)
    # Widths fit the longest of each micro-batch of the first epoch, and the longest of all in any other.
    ends = [np.array([lengths[rows].max() for rows in batches]) for lengths in (prefixes, longest - prefixes)]
    tops = [int(lengths.max()) for lengths in (prefixes, longest - prefixes)]
    labels = np.array([order.store.supervised.reshape(-1, 2)[rows].sum() for rows in batches])
    label_counts = choose_widths(np.append(labels, order.gather), _MAX_LABEL_COUNTS, 32)
    sizes = np.array(label_counts)[np.searchsorted(label_counts, labels)]
    options = []
    for most in range(1, _MAX_WIDTHS + 1):
        widths = [choose_widths(np.append(end, top), most, _MULTIPLE) for end, top in zip(ends, tops, strict=True)]
        taken = np.array([np.array(w)[np.searchsorted(w, end)] for w, end in zip(widths, ends, strict=True)])
        shapes = len(np.unique([*taken, sizes], axis=1).T)
        options.append((float((taken[0] + 2 * taken[1]).sum()) * (1 + _SHAPE_COST * shapes / len(batches)), widths))
    prefix_widths, tail_widths = min(options)[1]
    order = replace(order, widths=(prefix_widths[-1] + 2 * tail_widths[-1],))
    return PairPlan(
        order, common is not None, prefixes, prefix_widths if common is not None else (), tail_widths, label_counts
    )
