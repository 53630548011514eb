"""Outputs that need no model, scored like a model's: what copying from train, or any train output, would earn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smolmlx.evals.text import content_tokens

_DECIMALS = 12
"""Similarities closer than this are a tie: summation order must not choose the row."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The train row nearest to one test row."""

    row: int
    similarity: float
    """TF-IDF cosine over content tokens, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class _Index:
    """Unit-length TF-IDF rows as postings: those of token t lie at starts[t] to starts[t + 1]."""

    vocabulary: Mapping[str, int]
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    num_rows: int

    def idf(self, token: str) -> float:
        """Return ln((1 + N) / (1 + df)) + 1, with df = 0 for a token that train does not have."""
        position = self.vocabulary.get(token)
        df = 0 if position is None else int(self.starts[position + 1] - self.starts[position])
        return math.log((1 + self.num_rows) / (1 + df)) + 1


def nearest_rows(train_inputs: Sequence[str], test_inputs: Sequence[str]) -> tuple[Neighbour, ...]:
    """Return, for each test input, the train input of highest TF-IDF cosine; the earliest of equals.

    Weights are count * (ln((1 + N) / (1 + df)) + 1) over content tokens, df from train. Postings keep the cost near the
    number of shared tokens. An input that shares no token with train gets row 0 at similarity 0.
    """
    if not train_inputs:
        raise ValueError("nearest_rows: no train rows to search")
    index = _build(train_inputs)
    return tuple(_nearest(index, Counter(content_tokens(text))) for text in test_inputs)


def nearest_copy(
    train_inputs: Sequence[str], train_outputs: Sequence[str], test_inputs: Sequence[str]
) -> tuple[str, ...]:
    """Return, for each test input, the output of the train row whose input is nearest (`nearest_rows`)."""
    if len(train_inputs) != len(train_outputs):
        raise ValueError(f"nearest_copy: {len(train_inputs)} train inputs but {len(train_outputs)} train outputs")
    return tuple(train_outputs[neighbour.row] for neighbour in nearest_rows(train_inputs, test_inputs))


def random_reference(train_outputs: Sequence[str], references: Sequence[str], *, seed: int = 0) -> tuple[str, ...]:
    """Return, for each test reference, a seeded train output other than it; the next one where the draw equals it.

    Only where every train output equals the reference is it returned.
    """
    if not train_outputs:
        raise ValueError("random_reference: no train outputs to draw from")
    total = len(train_outputs)
    draws = np.random.default_rng(seed).integers(total, size=len(references)).tolist()
    return tuple(
        next((other for other in _cycle(train_outputs, draw) if other != own), own)
        for draw, own in zip(draws, references, strict=True)
    )


def _cycle(values: Sequence[str], start: int) -> Iterator[str]:
    return (values[(start + step) % len(values)] for step in range(len(values)))


def _build(texts: Sequence[str]) -> _Index:
    vocabulary: dict[str, int] = {}
    cells: list[tuple[int, int, int]] = []
    for row, text in enumerate(texts):
        for token, count in Counter(content_tokens(text)).items():
            cells.append((vocabulary.setdefault(token, len(vocabulary)), row, count))
    tokens, rows, counts = np.asarray(sorted(cells), dtype=np.int64).reshape(-1, 3).T
    df = np.bincount(tokens, minlength=len(vocabulary))
    weights = counts * (np.log((1 + len(texts)) / (1 + df)) + 1)[tokens]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=len(texts)))
    starts = np.concatenate([[0], np.cumsum(df)])
    return _Index(vocabulary, starts, rows, weights / lengths[rows], len(texts))


def _nearest(index: _Index, counts: Mapping[str, int]) -> Neighbour:
    query = {token: count * index.idf(token) for token, count in counts.items()}
    length = math.sqrt(math.fsum(weight**2 for weight in query.values()))
    scores = np.zeros(index.num_rows)
    for token, weight in query.items():
        position = index.vocabulary.get(token)
        if position is not None:
            postings = slice(index.starts[position], index.starts[position + 1])
            # A row holds a token once, so no index repeats and += is safe.
            scores[index.rows[postings]] += weight / length * index.weights[postings]
    scores = np.minimum(scores.round(_DECIMALS), 1.0)
    row = int(scores.argmax())
    return Neighbour(row, float(scores[row]))
