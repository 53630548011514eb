"""What a set of rows looks like to a tokenizer: lengths, what is trained, and one row cut where training starts and stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from smolmlx.data.chat import Tokenizer
from smolmlx.data.encode import TOO_LONG, Encoding, NothingToLearn, encode_example
from smolmlx.data.formats import Example, Source
from smolmlx.data.store import encode_source

Pieces = list[tuple[str, bool]]
"""Text in order, each piece with whether it is trained."""


def measure(source: Source, tokenizer: Tokenizer, how: Encoding, on_rows: Callable[[int], None]) -> dict[str, Any]:
    """Return lengths of a source's rows, what of them is trained, and which rows are affected."""
    # Tokenized without a limit, so that the lengths of the rows beyond it are known as well.
    store = encode_source(source, tokenizer, replace(how, max_length=2**31 - 1), on_rows=on_rows)
    lengths, fits = store.lengths, store.lengths <= how.max_length
    total = int(lengths[fits].sum())
    affected = Counter(store.account.reasons)
    if not fits.all():
        affected[TOO_LONG] = int((~fits).sum())
    return {
        "tokenizer": str(tokenizer.folder),
        "max_length": how.max_length,
        "lengths": {
            name: int(np.quantile(lengths, q, method="higher")) if len(lengths) else None
            for name, q in (("min", 0), ("median", 0.5), ("p90", 0.9), ("max", 1))
        },
        "trained_rows": int(fits.sum()),
        "tokens": total,
        "supervised_share": round(float(store.supervised[fits].sum()) / total, 4) if total else None,
        "affected_rows": dict(affected),
        "first": store.account.first,
    }


def example_pieces(example: Example, tokenizer: Tokenizer, how: Encoding) -> Pieces:
    """Return the pieces of a row; nothing where it has nothing to learn."""
    try:
        encoded = encode_example(example, tokenizer, how)
    except NothingToLearn:
        return []
    return pieces(encoded.ids, encoded.mask, tokenizer)


def pieces(ids: Sequence[int], mask: Sequence[bool], tokenizer: Tokenizer) -> Pieces:
    """Cut a row's text where training starts and stops."""
    found: Pieces = []
    shown = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[end - 1]:
            # Decoded from the start each time: some decoders strip what looks like a first space.
            text = tokenizer.decode(ids[:end], skip_special=False)
            found.append((text[shown:], bool(mask[end - 1])))
            shown = len(text)
    return found
