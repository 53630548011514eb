"""The tokens every text metric counts, so that no two metrics split or filter words their own way."""

from __future__ import annotations

import re

_STOP = """
a an and are as at be because been being but by can could for from has have how if in into is it its may might more not
of on or rather should so such than that the their then there these this those to when where which while with
without would summary key points point limitation follow up question model models method methods system systems
"""
_FILLER = """
the a an is are was were be been being it its this that these those and or but in on at to for of with by from as can
may also more such each their which both about have has not no so when how
"""

STOP_WORDS = frozenset(_STOP.split())
"""Words that carry no content in a note: grammar, the template's own words, the field's commonplaces."""

FILLER_WORDS = frozenset(_FILLER.split())
"""Words that do not make a sentence specific (rubric and specificity)."""

MIN_CONTENT_LENGTH = 3

_CONTENT = re.compile(r"[a-z][a-z0-9_+-]*")
_RUBRIC = re.compile(r"\b[a-z]+\b")


def content_tokens(text: str) -> list[str]:
    """Return CT(text): lower-cased ASCII terms of three characters or more, stop words dropped, order and repeats kept.

    `follow-up` is one token and stays; accents and Greek split a word.
    """
    found: list[str] = _CONTENT.findall(text.lower())
    return [token for token in found if len(token) >= MIN_CONTENT_LENGTH and token not in STOP_WORDS]


def content_spans(text: str) -> list[tuple[int, int]]:
    """Return where the content tokens of a text lie; none where lower-casing changes its length."""
    lowered = text.lower()
    if len(lowered) != len(text):
        return []
    found = [match.span() for match in _CONTENT.finditer(lowered)]
    return [
        (start, end) for start, end in found
        if end - start >= MIN_CONTENT_LENGTH and lowered[start:end] not in STOP_WORDS
    ]  # fmt: skip


def rubric_tokens(text: str) -> list[str]:
    """Return RT(text): lower-cased words made of a to z only; one touching a digit, `_` or an accent is left out."""
    found: list[str] = _RUBRIC.findall(text.lower())
    return found


def word_count(text: str) -> int:
    """Return WC(text): the number of whitespace-separated pieces."""
    return len(text.split())


def specificity(text: str) -> float:
    """Return the share of rubric tokens that are not filler, in [0, 1]; 0 for a text without any."""
    tokens = rubric_tokens(text)
    return sum(token not in FILLER_WORDS for token in tokens) / len(tokens) if tokens else 0.0


def lexical_diversity(text: str) -> float:
    """Return distinct rubric tokens over all of them, in [0, 1]; 0 for a text without any."""
    tokens = rubric_tokens(text)
    return len(set(tokens)) / len(tokens) if tokens else 0.0
