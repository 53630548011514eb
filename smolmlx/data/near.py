"""Near duplicates in time linear in rows: MinHash sketches (rensa) in bands, and a bounded number of comparisons per band.

Similarity is the Jaccard index of word triples (Broder, 1997), estimated from 128 hashes: give or take .035 at .8. A pair
above the threshold shares a band with a probability of 99 % or more; a row meets at most 16 others per band, so rows that
all look alike cost no more than rows that do not.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt

from smolmlx.errors import BackendError, RecipeError

NUM_HASHES = 128
SHINGLE_WORDS = 3
THRESHOLD = 0.8
LOWEST_THRESHOLD = 0.5

_SEED = 1
_CHUNK = 4096
_MAX_MET = 16
"""Rows of one band that a row is compared with."""
_SURE = 0.99

Sketches = npt.NDArray[np.uint32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Matches:
    """For each query row: the earliest and the most similar row at or above the threshold, or -1."""

    earliest: Rows
    best: Rows
    similarity: npt.NDArray[np.float64]
    """Of `best`; 0 where there is none."""


def check_threshold(threshold: float) -> None:
    """Refuse a threshold at which most rows of one task would be alike.

    Raises:
        RecipeError
    """
    if not LOWEST_THRESHOLD <= threshold <= 1:
        raise RecipeError(
            f"--threshold {threshold:g}: expected a similarity from {LOWEST_THRESHOLD:g} to 1 (1: exact only)."
        )


def shingles(text: str) -> list[str]:
    """Return the word triples of a lower-cased text; its words together where it has fewer than three."""
    words = text.lower().split()
    if len(words) < SHINGLE_WORDS:
        return [" ".join(words)] if words else []
    return [" ".join(triple) for triple in zip(words, words[1:], words[2:], strict=False)]


def sketch(texts: Iterable[str], on_rows: Callable[[int], None] | None = None) -> Sketches:
    """Return one row of 128 hashes per text; a text without words gets a row that matches nothing but its like.

    Raises:
        BackendError: rensa is not installed.
    """
    minhash = _load_rensa().RMinHash
    flat = array("I")
    rows = 0
    for chunk in _chunks(texts):
        digests = minhash.digests_from_token_sets([shingles(text) for text in chunk], NUM_HASHES, _SEED)
        flat.extend(itertools.chain.from_iterable(digests))
        rows += len(chunk)
        if on_rows is not None:
            on_rows(rows)
    return np.frombuffer(flat, np.uint32).reshape(rows, NUM_HASHES) if rows else np.empty((0, NUM_HASHES), np.uint32)


def _load_rensa() -> ModuleType:
    try:
        import rensa
    except ImportError as error:
        raise BackendError("near duplicates need rensa: pip install 'smolmlx[dedupe]'. --threshold 1 looks for exact ones only.") from error  # fmt: skip
    module: ModuleType = rensa
    return module


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while chunk := list(itertools.islice(source, _CHUNK)):
        yield chunk


def band_shape(threshold: float) -> tuple[int, int]:
    """Return (bands, hashes per band): the longest bands that a pair at the threshold still shares with 99 %."""
    shapes = ((NUM_HASHES // width, width) for width in range(NUM_HASHES // 4, 0, -1))
    return next((b, width) for b, width in shapes if 1 - (1 - threshold**width) ** b >= _SURE)


def find_matches(index: Sketches, queries: Sketches | None = None, threshold: float = THRESHOLD) -> Matches:
    """Match each query with rows of `index`; without queries, each row of `index` with the rows before it."""
    asked = index if queries is None else queries
    found = Matches(np.full(len(asked), -1), np.full(len(asked), -1), np.zeros(len(asked)))
    bands, width = band_shape(threshold)
    for band in range(bands):
        columns = slice(band * width, (band + 1) * width)
        keys = _keys(index[:, columns])
        order = np.argsort(keys, kind="stable")  # rows of one key stay in the order of the file
        ranked = keys[order]
        wanted = keys if queries is None else _keys(queries[:, columns])
        start, stop = np.searchsorted(ranked, wanted, "left"), np.searchsorted(ranked, wanted, "right")
        for step in range(_MAX_MET):
            asking = np.flatnonzero(start + step < stop)
            met = order[start[asking] + step]
            if queries is None:
                earlier = met < asking
                asking, met = asking[earlier], met[earlier]
            if not len(asking):
                break
            _compare(index, asked, met, asking, threshold, found)
    return found


def _keys(columns: Sketches) -> npt.NDArray[np.uint64]:
    """Fold the hashes of a band into one number each (FNV-like, modulo 2**64)."""
    keys = np.full(len(columns), 14695981039346656037, np.uint64)
    for column in columns.T:
        keys = (keys ^ column) * np.uint64(1099511628211)
        keys ^= keys >> np.uint64(29)
    return keys


def _compare(index: Sketches, asked: Sketches, met: Rows, asking: Rows, threshold: float, found: Matches) -> None:
    for at in range(0, len(asking), _CHUNK):
        rows, others = asking[at : at + _CHUNK], met[at : at + _CHUNK]
        alike = (index[others] == asked[rows]).mean(axis=1)
        enough = alike >= threshold
        rows, others, alike = rows[enough], others[enough], alike[enough]
        first = (found.earliest[rows] < 0) | (others < found.earliest[rows])
        found.earliest[rows[first]] = others[first]
        better = alike > found.similarity[rows]
        found.best[rows[better]] = others[better]
        found.similarity[rows[better]] = alike[better]


def find_keepers(sketches: Sketches, threshold: float = THRESHOLD) -> tuple[Rows, npt.NDArray[np.float64]]:
    """Return, for each row, the kept row that stands for it (itself where it is kept) and their similarity.

    Rows are taken in order, so a row that is dropped is like an earlier row that is kept, never only like one dropped.
    """
    matches = find_matches(sketches, threshold=threshold)
    keeper, similarity = np.arange(len(sketches)), np.ones(len(sketches))
    for row in np.flatnonzero(matches.earliest >= 0):
        for other in (matches.earliest[row], matches.best[row]):
            kept = keeper[other]
            alike = float((sketches[row] == sketches[kept]).mean())
            if alike >= threshold:
                keeper[row], similarity[row] = kept, alike
                break
    return keeper, similarity
