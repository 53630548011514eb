"""Scores of one output against its reference, and the arithmetic of losses: small formulas with no task in them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from smolmlx.evals.text import content_tokens

_ROUGE = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """How one output's content tokens relate to its reference and input; every value is in [0, 1]."""

    precision: float
    recall: float
    f1: float
    """0 where the output or the reference has no content token."""
    key_term_recall: float
    """Share of the reference's distinct terms that the output names."""
    unsupported: float
    """Share of the output's tokens found neither in the input nor in the reference; 1 for an empty output."""

    @property
    def content_alignment(self) -> float:
        """0.60 F1 + 0.25 key-term recall + 0.15 (1 - unsupported)."""
        return 0.60 * self.f1 + 0.25 * self.key_term_recall + 0.15 * (1.0 - self.unsupported)


def reference_overlap(output: str, reference: str, source: str) -> Overlap:
    """Compare an output with its reference; `source` is the input the output was made from."""
    made, wanted = content_tokens(output), content_tokens(reference)
    shared = (Counter(made) & Counter(wanted)).total()
    terms = set(wanted)
    supported = terms | set(content_tokens(source))
    return Overlap(
        precision=shared / len(made) if made else 0.0,
        recall=shared / len(wanted) if wanted else 0.0,
        f1=2 * shared / (len(made) + len(wanted)) if made and wanted else 0.0,
        key_term_recall=len(terms & set(made)) / len(terms) if terms else 0.0,
        unsupported=sum(token not in supported for token in made) / len(made) if made else 1.0,
    )


def is_formulaic(output: str, boilerplate: Iterable[str]) -> bool:
    """Say whether any boilerplate phrase occurs in the output, in any case; an empty phrase never does."""
    lowered = output.lower()
    return any(phrase.lower() in lowered for phrase in boilerplate if phrase)


def set_f1(predicted: Iterable[Hashable], expected: Iterable[Hashable]) -> float:
    """Return F1 of two sets, in [0, 1]; two empty sets agree (1)."""
    left, right = set(predicted), set(expected)
    if not left and not right:
        return 1.0
    return 2 * len(left & right) / (len(left) + len(right))


def rouge_tokens(text: str) -> list[str]:
    """Return lower-cased runs of ASCII letters and digits, unstemmed, as Google's rouge-score splits."""
    found: list[str] = _ROUGE.findall(text.lower())
    return found


def rouge_n(output: str, reference: str, n: int = 1) -> float:
    """Return ROUGE-N F1 (Lin, 2004), in [0, 1]; 0 where either side has no n-gram."""
    made, wanted = (_ngrams(rouge_tokens(text), n) for text in (output, reference))
    total = made.total() + wanted.total()
    return 2 * (made & wanted).total() / total if total else 0.0


def rouge_l(output: str, reference: str) -> float:
    """Return ROUGE-L F1 from the longest common subsequence, in [0, 1]; 0 where either side is empty."""
    made, wanted = rouge_tokens(output), rouge_tokens(reference)
    total = len(made) + len(wanted)
    return 2 * common_subsequence(made, wanted) / total if total else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, bit-parallel over `right` (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for position, token in enumerate(right):
        where[token] = where.get(token, 0) | 1 << position
    full = (1 << len(right)) - 1
    row = full
    for token in left:
        matches = row & where.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(right) - row.bit_count()


def token_weighted_mean(parts: Iterable[tuple[float, int]]) -> float:
    """Return sum / count over (sum, count) pairs, such as (sum of nats, supervised tokens) per row or rank.

    A pair holds a sum, not a mean: a mean of 2.0 over 10 tokens is (20.0, 10). Raises ValueError where no token counts.
    """
    sums, counts = [], 0
    for total, count in parts:
        sums.append(total)
        counts += count
    if counts <= 0:
        raise ValueError("token_weighted_mean: no tokens were counted, so there is no mean")
    return math.fsum(sums) / counts


def perplexity(nats: float) -> float:
    """Return exp of a mean cross-entropy in nats per token; infinity where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def dpo_loss(d: float, beta: float = 0.1) -> float:
    """Return -log sigmoid(beta d) in nats; d = [logp(c) - ref(c)] - [logp(r) - ref(r)] (Rafailov et al., 2023)."""
    x = beta * d
    return math.log1p(math.exp(-abs(x))) + max(-x, 0.0)
