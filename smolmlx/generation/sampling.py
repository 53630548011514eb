"""How a token is chosen, stated once in numpy; engines do the same on their device, and tests compare.

A draw is one uniform number a row and step, made on the host from (seed, row), and the inverse of the distribution
function: so a sampled row depends on its seed and place alone, and both engines draw alike.

B rows, V tokens, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smolmlx.backend import Decoding, FloatArray
from smolmlx.generation.grammar import Words, unpack

_LARGEST = np.float32(1 - 2**-24)
"""Below 1 in float32, so that a draw never lies behind the last token."""
_GREEDY = 1e-5
"""Temperature below which a row is greedy, see `Decoding`."""


@dataclass(frozen=True, slots=True)
class Picks:
    """How each row of a batch chooses its next token."""

    temperature: FloatArray
    """[B]; 0 is greedy."""
    top_k: npt.NDArray[np.int32]
    """[B]; 0 is off."""
    top_p: FloatArray
    min_p: FloatArray
    penalty: FloatArray
    """[B]; 1 is off."""
    uniform: FloatArray
    """[B] draws in [0, 1)."""
    allowed: npt.NDArray[np.uint32] | None = None
    """[B, W] tokens that may come; None allows all."""
    seen: npt.NDArray[np.uint32] | None = None
    """[B, W] tokens that the penalty is for; None where no row has one."""

    @property
    def greedy(self) -> bool:
        return not self.temperature.any()

    @property
    def ordered(self) -> npt.NDArray[np.bool_]:
        """[B] whether a row's tokens must be sorted by likelihood."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


class Draws:
    """The uniform numbers of one row, from (seed, row)."""

    def __init__(self, seed: int, row: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, row])))

    def next(self) -> float:
        return float(min(np.float32(self._random.random()), _LARGEST))


def gather(
    hows: Sequence[Decoding], uniform: Sequence[float], allowed: Words | None = None, seen: Words | None = None
) -> Picks:
    """Return the picks of rows that are decoded each in its own way."""

    def column(name: str) -> FloatArray:
        return np.array([getattr(how, name) for how in hows], np.float32)

    heat = column("temperature")
    return Picks(
        temperature=np.where(heat < _GREEDY, np.float32(0), heat),
        top_k=np.array([min(how.top_k, np.iinfo(np.int32).max) for how in hows], np.int32),
        # A share that is 0 in float32 would leave out the likeliest token too.
        top_p=np.maximum(column("top_p"), np.finfo(np.float32).tiny),
        min_p=column("min_p"),
        penalty=column("repetition_penalty"),
        uniform=np.array(uniform, np.float32),
        allowed=allowed,
        seen=seen,
    )


def choose(logits: FloatArray, picks: Picks) -> npt.NDArray[np.int64]:
    """Return the next token of each row: [B, V] logits to [B]."""
    size = logits.shape[1]
    logits = logits.astype(np.float32)
    if picks.seen is not None:
        penalty = picks.penalty[:, None]
        punished = np.where(logits > 0, logits / penalty, logits * penalty)
        logits = np.where(widen(picks.seen, size), punished, logits)
    if picks.allowed is not None:
        logits = np.where(widen(picks.allowed, size), logits, -np.inf)
    tokens: npt.NDArray[np.int64] = logits.argmax(axis=1)
    for row in np.flatnonzero(picks.temperature > 0):
        tokens[row] = _draw(logits[row] / picks.temperature[row], picks, int(row))
    return tokens


def _draw(scaled: FloatArray, picks: Picks, row: int) -> int:
    weights = np.exp(scaled - scaled.max())
    order = np.arange(len(weights))
    if picks.ordered[row]:
        order = np.argsort(-scaled, kind="stable")
        weights = weights[order]
        if picks.top_k[row]:
            weights[picks.top_k[row] :] = 0
        weights = weights / weights.sum()
        outside = weights.cumsum() - weights >= picks.top_p[row]
        weights[outside | (weights < picks.min_p[row] * weights[0])] = 0
    heights = weights.cumsum()
    place = int((heights <= picks.uniform[row] * heights[-1]).sum())
    return int(order[min(place, int(np.flatnonzero(weights)[-1]))])


def widen(words: Words, size: int) -> npt.NDArray[np.bool_]:
    """Return [B, W] words as [B, V] flags; tokens beyond the words are not in the set."""
    flags = unpack(words)[:, :size]
    return np.pad(flags, ((0, 0), (0, size - flags.shape[1])))
