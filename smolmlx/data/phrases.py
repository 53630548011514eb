"""Whether texts stand word for word inside other texts: rolling hashes of words, so that no text is kept.

A phrase is known by the hashes of its first and of its last 2**k words, 2**k the largest power that fits: the two windows
cover it whole. Cost is linear in words, times the number of powers; equal means equal but for case, white space and
punctuation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

MIN_WORDS = 5
"""Shorter phrases, such as "Yes" or "I do not know", stand in any long text with no harm done."""

Words = npt.NDArray[np.uint64]
Key = tuple[int, int, int]
"""(words, hash of the first window, hash of the last window); in this process only, as Python salts its hashes."""

_WORD = re.compile(r"\w+")
_ASCII_GAPS = {code: " " for code in range(128) if not _WORD.match(chr(code))}
_LOW_BITS = np.uint64((1 << 20) - 1)


def hash_words(text: str) -> Words:
    """Return one hash per word."""
    lower = text.lower()
    # The same words either way; of ASCII text they are found in half the time.
    words = lower.translate(_ASCII_GAPS).split() if lower.isascii() else _WORD.findall(lower)
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def phrase_keys(phrases: Sequence[Words]) -> list[Key | None]:
    """Return what each phrase is looked for by; None where it is shorter than `MIN_WORDS`."""
    lengths = np.array([len(words) for words in phrases])
    joined, starts = _join(phrases)
    found: list[Key | None] = [None] * len(phrases)
    for width, rolled in _windows(joined, int(lengths.max(initial=0))):
        for at in np.flatnonzero((lengths >= max(width, MIN_WORDS)) & (lengths < 2 * width)):
            length, start = int(lengths[at]), int(starts[at])
            found[at] = (length, int(rolled[start]), int(rolled[start + length - width]))
    return found


class Phrases:
    """Phrases to look for."""

    def __init__(self) -> None:
        # Width of the window -> first window -> length -> last windows: a place meets each length once at most.
        self._known: dict[int, dict[int, dict[int, set[int]]]] = {}

    def add(self, keys: Iterable[Key | None]) -> None:
        for key in keys:
            if key is not None:
                length, first, last = key
                known = self._known.setdefault(1 << (length.bit_length() - 1), {})
                known.setdefault(first, defaultdict(set))[length].add(last)

    def search(self, texts: Sequence[Words]) -> Iterator[tuple[Key, int]]:
        """Yield each phrase that stands in a text, with the text's index."""
        if not self._known:
            return
        joined, starts = _join(texts)
        for width, rolled in _windows(joined, max(self._known)):
            known = self._known.get(width)
            if known is None:
                continue
            maybe = np.zeros(int(_LOW_BITS) + 1, bool)
            maybe[np.fromiter(known, np.uint64, len(known)) & _LOW_BITS] = True
            for at in np.flatnonzero(maybe[rolled & _LOW_BITS]).tolist():
                first = int(rolled[at])
                for length, lasts in known.get(first, {}).items():
                    end = at + length - width
                    if end < len(rolled) and (last := int(rolled[end])) in lasts:
                        yield (length, first, last), int(np.searchsorted(starts, at, "right")) - 1


def _join(texts: Sequence[Words]) -> tuple[Words, npt.NDArray[np.int64]]:
    """Put texts behind each other, a word that nothing else has after each; return where each begins."""
    ends = np.random.default_rng(0).integers(1 << 63, size=len(texts), dtype=np.uint64)
    parts = [part for text, end in zip(texts, ends, strict=True) for part in (text, [end])]
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    return np.concatenate(parts, dtype=np.uint64) if parts else np.empty(0, np.uint64), starts


def _windows(words: Words, longest: int) -> Iterator[tuple[int, Words]]:
    """Yield (words in a window, hash of the window at each word) for 1, 2, 4, ... up to `longest`."""
    width, rolled = 1, words
    while width <= longest and len(rolled):
        yield width, rolled
        rolled = (rolled[:-width] * np.uint64(0x9E3779B97F4A7C15) + rolled[width:]) * np.uint64(0xC2B2AE3D27D4EB4F)
        rolled ^= rolled >> np.uint64(29)
        width *= 2
