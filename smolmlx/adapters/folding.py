"""Bring adapters of many ranks and scales to the one rank and scale that mlx-lm has, so that it can be undone to the bit.

A module's scale goes into B (times scale / common scale) and both factors are padded with zeros to the largest rank.
Multiplying rounds; dividing brings every value back to within one step of its last bit, nearly always, and the steps are
kept: two bits a value.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from smolmlx.adapters.tensors import WIDTHS, Words, from_floats, to_floats

# alpha = scale * rank and back again may differ in the last bit of a double.
_SAME = 1e-12
_STEPS, _BITS = np.zeros(1, np.uint8), np.ones(1, np.uint8)


def common_scale(scales: Sequence[float]) -> float:
    """Return the scale that leaves most modules as they are; never zero unless all are."""
    counts = Counter(scale for scale in scales if scale) or Counter(scales)
    return max(counts, key=lambda scale: (counts[scale], scale))


def factor(scale: float, common: float) -> float:
    """Return what B is multiplied by; exactly 1 where nothing has to be done."""
    found = scale / common if common else 1.0
    return 1.0 if abs(found - 1) < _SAME else found


def folded_dtype(dtype: str, by: float) -> str:
    """A 16-bit B would lose bits by scaling, so it becomes float32; powers of two are kept where they are exact."""
    return dtype if by == 1.0 else "F32"


def fold(words: Words, dtype: str, by: float) -> Words:
    """Return B times `by`, as words of `folded_dtype`."""
    if by == 1.0:
        return words
    with np.errstate(all="ignore"):
        return from_floats(to_floats(words, dtype) * np.float32(by), "F32")


def unfold(words: Words, dtype: str, by: float) -> Words:
    """Return folded B divided by `by`, rounded to words of `dtype`; the inverse of `fold` up to `difference`."""
    if by == 1.0:
        return words
    with np.errstate(all="ignore"):
        return from_floats(words.view(np.float32) / np.float32(by), dtype)


def difference(original: Words, folded: Words, dtype: str, by: float) -> Words | None:
    """Return, as bytes, what makes `unfold(folded)` the original again, or None where it already is.

    One bit a value for a step up, then one for a step down; where a step is longer (infinities, NaNs, values too small
    to divide), the bits that differ, compressed. The first byte says which.
    """
    steps = np.subtract(original, unfold(folded, dtype, by))  # unsigned: one down is the largest word
    up, down = steps == 1, steps == np.iinfo(steps.dtype).max
    masks = np.packbits(up.reshape(-1)), np.packbits(down.reshape(-1))
    if np.count_nonzero(steps) == np.count_nonzero(up) + np.count_nonzero(down):
        return np.concatenate((_STEPS, *masks)) if masks[0].any() or masks[1].any() else None
    return np.concatenate((_BITS, np.frombuffer(zlib.compress(steps.tobytes(), 1), np.uint8)))


def mend(words: Words, dtype: str, packed: Words) -> Words:
    """Apply a `difference`. One of another length than the tensor's is left out."""
    flat, count = words.reshape(-1), -(-words.size // 8)
    if packed.size == 1 + 2 * count and packed[0] == _STEPS[0]:
        up, down = (np.unpackbits(part, count=words.size) for part in np.split(packed[1:], 2))
        return (flat + up - down).astype(words.dtype).reshape(words.shape)
    limit = words.size * WIDTHS[dtype]
    try:
        raw = zlib.decompressobj().decompress(packed[1:].tobytes(), limit)
    except zlib.error:
        return words
    return (flat + np.frombuffer(raw, words.dtype)).reshape(words.shape) if len(raw) == limit else words


def pad(words: Words, axis: int, size: int) -> Words:
    """Append zeros along an axis."""
    missing: list[tuple[int, Any]] = [(0, 0)] * words.ndim
    missing[axis] = (0, size - words.shape[axis])
    return words if words.shape[axis] == size else np.pad(words, missing)
