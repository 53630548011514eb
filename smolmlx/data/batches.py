"""From token rows to batches: shuffling, length-aware grouping, isolated packing and a small fixed set of shapes.

Order is a function of (seed, epoch) from numpy's generator, so every engine and every resumed run sees the same
batches. Each row is seen exactly once per epoch and no remainder is dropped.

Shapes: B rows of a micro-batch, T tokens of a row, S supervised positions of a micro-batch.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from smolmlx.data.store import IntArray, LongArray, TokenStore

IGNORE = -100
"""Target of a position that is not supervised."""
_MAX_SHAPES = 8
_ROUND = 16
_WINDOWS = (64, 6)  # micro-batches that are sorted together: little padding, and still shuffled


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, ready for any engine. Targets are shifted here, once."""

    ids: IntArray
    """[B, T]; padding behind each row."""
    targets: IntArray
    """[B, T]; the id that position t predicts, or IGNORE."""
    segments: IntArray
    """[B, T]; 0 is padding, documents of a row count from 1. A token attends to its own segment only."""
    positions: IntArray
    """[B, T]; position of a token inside its document."""
    index: IntArray
    """[S]; supervised positions in the flattened [B*T] batch, padded with 0."""
    labels: IntArray
    """[S]; targets at `index`, padded with 0."""
    weights: npt.NDArray[np.float32]
    """[S]; 1 for a supervised position, 0 for padding."""
    packed: bool
    """Whether any row holds more than one document, so that attention needs a mask."""

    @property
    def num_supervised(self) -> int:
        return int(self.weights.sum())

    @property
    def num_tokens(self) -> int:
        return int((self.segments > 0).sum())


@dataclass(frozen=True)
class BatchPlan:
    """Which rows go into which micro-batch of which step, and in what shape."""

    store: TokenStore
    rows: tuple[IntArray, ...] | None
    """Packed rows as document indices; None when each document is a row of its own."""
    batch_size: int
    accumulation: int
    seed: int
    shuffle: bool
    widths: tuple[int, ...]
    """The values T may take."""
    gather: int
    """S is a multiple of this."""
    pad_id: int
    sort_by: tuple[LongArray, ...] = ()
    """Sizes of each row that decide which rows share a batch, the weightiest first; the tokens of a row where empty."""

    @property
    def num_rows(self) -> int:
        return len(self.store) if self.rows is None else len(self.rows)

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(rows / (batch * accumulation)): no remainder is dropped."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def packed(self) -> bool:
        return self.rows is not None

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of an optimizer step (0-based, over all epochs)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self.epoch_order(epoch)
        chosen = order[within * self.accumulation : (within + 1) * self.accumulation]
        return [self.build(rows) for rows in chosen]

    def step_tokens(self, step: int) -> tuple[int, int]:
        """Return (supervised tokens, tokens) of a step without building its arrays."""
        documents = self.step_documents(step)
        return int(self.store.supervised[documents].sum()), int(self.store.lengths[documents].sum())

    def step_documents(self, step: int) -> LongArray:
        """Return the documents of a step, packed or not."""
        epoch, within = divmod(step, self.steps_per_epoch)
        chosen = self.epoch_order(epoch)[within * self.accumulation : (within + 1) * self.accumulation]
        return np.concatenate([self._documents(row) for rows in chosen for row in rows])

    def epoch_order(self, epoch: int) -> list[LongArray]:
        """Return the micro-batches of an epoch as arrays of row indices."""
        sizes = tuple(found.astype(np.int32).tobytes() for found in self.sort_by or (self.row_lengths,))
        return _epoch_order(sizes, self.batch_size, self.seed, epoch if self.shuffle else 0, self.shuffle)

    def evaluation(self) -> Iterator[Batch]:
        """Yield every row once, in order of length."""
        return (self.build(rows) for rows in self.epoch_order(0))

    @cached_property
    def row_lengths(self) -> LongArray:
        """Tokens of each row, packed or not."""
        if self.rows is None:
            return self.store.lengths
        return np.array([self.store.lengths[row].sum() for row in self.rows], np.int64)

    def digest(self) -> str:
        """Hash of the tokens and of the order of the first epoch."""
        digest = hashlib.sha256(self.store.key.encode())
        for rows in self.epoch_order(0):
            for row in rows:
                digest.update(self._documents(row).astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()[:16]

    def _documents(self, row: int) -> LongArray:
        return np.array([row], np.int64) if self.rows is None else self.rows[row].astype(np.int64)

    def build(self, rows: Sequence[int] | LongArray) -> Batch:
        """Lay rows into arrays of a shape from the fixed set; missing rows of a last batch are padding."""
        documents = [self._documents(int(row)) for row in rows]
        longest = max(int(self.store.lengths[found].sum()) for found in documents)
        width = self.widths[bisect.bisect_left(self.widths, longest)]
        shape = (self.batch_size, width)
        ids, targets = np.full(shape, self.pad_id, np.int32), np.full(shape, IGNORE, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.tile(np.arange(width, dtype=np.int32), (shape[0], 1))
        for slot, found in enumerate(documents):
            start = 0
            for segment, document in enumerate(found, 1):
                tokens, mask = self.store.row(int(document))
                end = start + len(tokens)
                ids[slot, start:end] = tokens
                targets[slot, start : end - 1] = np.where(mask[1:], tokens[1:], IGNORE)
                segments[slot, start:end] = segment
                positions[slot, start:end] = np.arange(len(tokens))
                start = end
            positions[slot, start:] = np.arange(width - start)
        index, labels, weights = _supervised(targets, self.gather)
        return Batch(ids, targets, segments, positions, index, labels, weights, any(len(d) > 1 for d in documents))


def _supervised(targets: IntArray, multiple: int) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    flat = targets.reshape(-1)
    found = np.flatnonzero(flat != IGNORE).astype(np.int32)
    size = max(1, math.ceil(len(found) / multiple)) * multiple
    index, labels, weights = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.float32)
    index[: len(found)] = found
    labels[: len(found)] = flat[found]
    weights[: len(found)] = 1.0
    return index, labels, weights


@lru_cache(maxsize=4)
def _epoch_order(sizes: tuple[bytes, ...], batch_size: int, seed: int, epoch: int, shuffle: bool) -> list[LongArray]:
    """Micro-batches of one epoch; a pure function of its arguments, kept for the few epochs in use."""
    keys = [np.frombuffer(found, np.int32) for found in sizes]
    size = len(keys[0])
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(size) if shuffle else np.arange(size)
    windows = [batch_size * count for count in _WINDOWS]
    if not shuffle:
        windows[0] = max(1, size)
    for key, window in zip(keys, windows, strict=False):
        for start in range(0, size, window):
            block = order[start : start + window]
            order[start : start + window] = block[np.argsort(key[block], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, size, batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if shuffle else batches


def plan_batches(
    store: TokenStore,
    *,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    pack_to: int | None = None,
    shuffle: bool = True,
    pad_id: int = 0,
) -> BatchPlan:
    """Choose packs, shapes and order for a store.

    Args:
        batch_size: a batch has no more rows than there are, so that none is of padding alone in every batch.
        pack_to: pack documents into rows of at most this many tokens; None keeps one document a row.
    """
    rows = pack(store.lengths, pack_to, seed) if pack_to else None
    batch_size = min(batch_size, max(1, len(store) if rows is None else len(rows)))
    lengths = store.lengths if rows is None else np.array([store.lengths[row].sum() for row in rows], np.int64)
    supervised = store.supervised if rows is None else np.array([store.supervised[row].sum() for row in rows], np.int64)
    widths = choose_widths(lengths)
    most = int(np.sort(supervised)[-batch_size:].sum())
    gather = max(32, math.ceil(most / _MAX_SHAPES / 32) * 32)
    return BatchPlan(store, rows, batch_size, accumulation, seed, shuffle, widths, gather, pad_id)


def choose_widths(lengths: LongArray, most: int = _MAX_SHAPES, multiple: int = _ROUND) -> tuple[int, ...]:
    """Choose at most `most` row widths, multiples of `multiple`, that waste the fewest padded tokens (dynamic programming).

    A compiled step is reused for every batch of the same shape, so the set is small and fixed for the whole run.
    """
    rounded, counts = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    if len(rounded) > 64:  # coarser candidates keep the search tiny for long rows
        step = multiple * math.ceil(len(rounded) / 64) * 2
        rounded, counts = np.unique(-(-lengths // step) * step, return_counts=True)
    size = len(rounded)
    total = np.concatenate([[0], np.cumsum(counts)])
    cost = np.full((most + 1, size + 1), np.inf)
    cost[:, 0] = 0
    back = np.zeros((most + 1, size + 1), np.int64)
    for used in range(1, most + 1):
        for end in range(1, size + 1):
            tried = cost[used - 1, :end] + rounded[end - 1] * (total[end] - total[:end])
            back[used, end] = int(np.argmin(tried))
            cost[used, end] = tried[back[used, end]]
    chosen, end = [], size
    for used in range(most, 0, -1):
        if end == 0:
            break
        chosen.append(int(rounded[end - 1]))
        end = int(back[used, end])
    return tuple(sorted(set(chosen)))


def pack(lengths: LongArray, capacity: int, seed: int) -> tuple[IntArray, ...]:
    """Put documents into rows of at most `capacity` tokens, best fit over a shuffled window; none is cut or lost.

    Best fit within windows of 4096 shuffled documents keeps the search short and the mix random.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, "encode_rows bounds every row"
    order = np.random.default_rng([seed, 0x9ACC]).permutation(len(lengths))
    packs: list[IntArray] = []
    for start in range(0, len(order), 4096):
        window = order[start : start + 4096]
        packs += _best_fit(window[np.argsort(-lengths[window], kind="stable")], lengths, capacity)
    return tuple(packs)


def _best_fit(documents: LongArray, lengths: LongArray, capacity: int) -> list[IntArray]:
    """Best-fit decreasing: each document goes where it leaves the least room."""
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins: list[list[int]] = []
    for document in documents:
        need = int(lengths[document])
        place = bisect.bisect_left(rooms, (need, -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(int(document))
        if room > need:
            bisect.insort(rooms, (room - need, chosen))
    return [np.array(found, np.int32) for found in bins]


def padded_tokens(plan: BatchPlan) -> int:
    """Tokens an epoch computes, padding included."""
    lengths, widths = plan.row_lengths, np.array(plan.widths)
    total = 0
    for rows in plan.epoch_order(0):
        total += plan.batch_size * int(widths[np.searchsorted(widths, lengths[rows].max())])
    return total
