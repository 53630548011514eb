"""Loss at supervised positions: logits are made there alone, in pieces, and the rows of a batch on every core.

B batch, T tokens, S supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from smolmlx_mlx import blas

blas.ensure()

import mlx.core as mx  # noqa: E402 - after the BLAS
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from smolmlx.data.batches import Batch  # noqa: E402
from smolmlx_mlx import cpu_math  # noqa: E402
from smolmlx_mlx.lanes import Lanes, even_slices  # noqa: E402
from smolmlx_mlx.model import PackedMask, split_head  # noqa: E402
from smolmlx_mlx.recompute import checkpointed  # noqa: E402

# Bytes of logits that are made at once. On a CPU a piece should stay near the caches.
_GPU_PIECE, _CPU_PIECE = 256 << 20, 8 << 20
_CPU_ROWS, _FEWEST_COLUMNS = 2048, 256  # of a piece that goes through the vocabulary in parts
Pair = tuple[mx.array, mx.array]


class Losses:
    """Sum of nats and count of correct targets of a micro-batch; `mixed` makes them with the weights in bfloat16."""

    def __init__(self, model: nn.Module, lanes: Lanes | None = None, mixed: bool = False) -> None:
        self.model = model
        self.mixed = mixed
        self.lanes = lanes or Lanes()
        self.body, self.head, self._owner = split_head(model)
        on_cpu = mx.default_device() == mx.cpu
        self._logsumexp = cpu_math.logsumexp if on_cpu else (lambda logits: mx.logsumexp(logits, axis=-1))
        self._exp = cpu_math.exp if on_cpu else mx.exp
        self._piece_rows = max(16, (_CPU_PIECE if on_cpu else _GPU_PIECE) // (4 * int(model.args.vocab_size)))
        self._on_cpu = on_cpu

    def __call__(
        self, ids: mx.array, segments: mx.array | None, index: mx.array, labels: mx.array, weights: mx.array
    ) -> Pair:
        """Return (nats, correct) over the supervised positions, both scalars.

        Args:
            ids: [B, T]; segments: [B, T] for packed rows, else None; index, labels, weights: [S].
        """
        wide = self.model.trainable_parameters()
        if self.mixed:
            self.model.update(tree_map(lambda weight: weight.astype(mx.bfloat16), wide))
        losses, correct = self.positions(ids, segments, index, labels)
        self.model.update(wide)
        return (losses * weights).sum(), (correct * weights).sum()

    def positions(self, ids: mx.array, segments: mx.array | None, index: mx.array, labels: mx.array) -> Pair:
        """Return the nats of each supervised position and whether its target is the likeliest: [S], [S]."""
        shares = even_slices(ids.shape[0], len(self.lanes))
        parts = [(ids[rows], None if segments is None else segments[rows]) for rows in shares]
        hidden = mx.concatenate(self.lanes.spread(self._hidden, parts))
        return self.score(hidden[index], labels)

    def score(self, hidden: mx.array, labels: mx.array) -> Pair:
        """Return the nats of each label and whether it is the likeliest: [S], [S].

        Args:
            hidden: [S, D], what the body gives at the positions before the labels [S].
        """
        size = hidden.shape[0]
        count = max(len(self.lanes), -(-size // (_CPU_ROWS if self._by_columns() else self._piece_rows)))
        pieces = [(hidden[rows], labels[rows]) for rows in even_slices(size, count)]
        piece, done = self._piece(count), list[Pair]()

        def in_turn(hidden: mx.array, labels: mx.array) -> Pair:
            if len(done) >= len(self.lanes):  # logits of one piece a core: MLX would begin them all
                hidden = mx.depends(hidden, mx.stop_gradient(done[-len(self.lanes)][0]))
            done.append(piece(hidden, labels))
            return done[-1]

        self.lanes.spread(in_turn, pieces)
        return mx.concatenate([p[0] for p in done]), mx.concatenate([p[1] for p in done])

    def _hidden(self, ids: mx.array, segments: mx.array | None) -> mx.array:
        """Return [B*T, D]."""
        cache = None if segments is None else [PackedMask(segments)] * len(self.model.layers)
        hidden: mx.array = self.body(ids, cache)
        return hidden.reshape(-1, hidden.shape[-1])

    def _piece(self, count: int) -> Callable[[mx.array, mx.array], Pair]:
        """Return the function from hidden [s, D] and labels [s] to losses [s] and correct [s], for `count` pieces in all."""
        if self.model.training and self._head_is_frozen():
            return self._with_slope
        if not self.model.training or count <= len(self.lanes):
            return self._plain
        return checkpointed(self._owner, self._plain)

    def _head_is_frozen(self) -> bool:
        paths = (path for path, _ in tree_flatten(self.model.trainable_parameters()))
        return self.body is not self.model and not any("lm_head" in path or "embed_tokens" in path for path in paths)

    def _by_columns(self) -> bool:
        """Whether a piece goes through the vocabulary in parts: in training, with a frozen head of plain weights on a CPU."""
        owner = self._owner
        plain = type(owner) in (nn.Embedding, nn.Linear) and "bias" not in owner and owner.weight.dtype == mx.float32
        return self._on_cpu and self.model.training and plain and self._head_is_frozen()

    def _plain(self, hidden: mx.array, labels: mx.array) -> Pair:
        labels = mx.stop_gradient(labels)  # mx.checkpoint would ask for a gradient of these indices
        logits = self.head(hidden).astype(mx.float32)  # [s, V]
        target = mx.take_along_axis(logits, labels[:, None], axis=-1).squeeze(-1)
        return self._logsumexp(logits) - target, _at_argmax(mx.stop_gradient(logits), labels)

    def _with_slope(self, hidden: mx.array, labels: mx.array) -> Pair:
        """Like `_plain`, with d loss / d hidden made at once, so that no logits are kept or made twice."""
        make = self._in_parts if self._by_columns() else self._at_once

        @mx.custom_function
        def losses(hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            nats, correct, slope = make(hidden, labels)
            # What waits for the nats waits for the last use of the logits.
            return mx.depends(nats, slope), correct, slope

        @losses.vjp
        def backward(primals: Pair, cotangents: list[mx.array], outputs: list[mx.array]) -> Pair:
            slope = outputs[2]
            return (cotangents[0][:, None] * slope).astype(slope.dtype), mx.zeros_like(primals[1])

        nats, correct, _ = losses(hidden, labels)
        return nats, correct

    def _in_parts(self, hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        columns = max(_FEWEST_COLUMNS, _CPU_PIECE // (4 * hidden.shape[0]))
        nats, best, slope = cpu_math.head_losses(hidden, self._owner.weight, labels, columns)
        return nats, best == labels, slope

    def _at_once(self, hidden: mx.array, labels: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        logits = self.head(hidden)
        wide = logits.astype(mx.float32)
        total = self._logsumexp(wide)
        target = mx.take_along_axis(wide, labels[:, None], axis=-1)
        shares = self._exp(wide - total[:, None])
        at_target = mx.take_along_axis(shares, labels[:, None], axis=-1)
        rest = mx.put_along_axis(shares, labels[:, None], at_target - 1.0, axis=-1).astype(logits.dtype)
        _, (slope,) = mx.vjp(self.head, [hidden], [rest])
        return total - target.squeeze(-1), _at_argmax(wide, labels), slope


def _at_argmax(logits: mx.array, labels: mx.array) -> mx.array:
    """Whether each label [s] is where its logits [s, V] are highest: one token of those that tie, so that equal logits earn nothing."""
    return mx.argmax(logits, axis=-1).astype(labels.dtype) == labels


def to_inputs(batch: Batch) -> tuple[mx.array, mx.array | None, mx.array, mx.array, mx.array]:
    """Return the arrays of a batch that `Losses` takes."""
    segments = mx.array(batch.segments) if batch.packed else None
    return mx.array(batch.ids), segments, mx.array(batch.index), mx.array(batch.labels), mx.array(batch.weights)
