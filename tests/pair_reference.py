"""Losses of preference training with their gradients in closed form, in numpy: what every engine is held to.

Written from the papers, apart from smolmlx/preferences.py. c and r are summed log-probabilities of the chosen and the
rejected answer, one pair at a time; returned are the loss and its slopes by c and by r.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from smolmlx.preferences import Pairs
from smolmlx.recipe import Dpo

Triple = tuple[float, float, float]
KINDS: list[dict[str, Any]] = [
    {}, {"beta": 0.5}, {"label_smoothing": 0.1}, {"length_normalized": True, "beta": 2.0}, {"sft_weight": 0.7},
    {"loss": "ipo"}, {"loss": "ipo", "length_normalized": True, "sft_weight": 0.3}, {"loss": "hinge"}, {"loss": "hinge", "sft_weight": 1.0},
    {"loss": "orpo"}, {"loss": "orpo", "beta": 1.5},
]  # fmt: skip


def some_pairs(count: int = 64) -> Pairs:
    """Pairs whose log-probabilities are apart from the reference's by some nats, both ways."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(2, 90, (2, count)).astype(np.float64)
    refs = -tokens * rng.uniform(0.3, 2.0, (2, count))
    moved = np.minimum(refs + rng.normal(0, 12, (2, count)), -0.05 * tokens)
    return Pairs(moved[0], moved[1], refs[0], refs[1], tokens[0], tokens[1])


def columns(pairs: Pairs) -> tuple[Any, ...]:
    """Return the arrays of pairs in the order that `one_pair` takes them."""
    return (
        pairs.chosen,
        pairs.rejected,
        pairs.ref_chosen,
        pairs.ref_rejected,
        pairs.chosen_tokens,
        pairs.rejected_tokens,
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_pair(how: Dpo, c: float, r: float, ref_c: float, ref_r: float, tokens_c: float, tokens_r: float) -> Triple:
    """Return (loss, d loss / d c, d loss / d r)."""
    if how.loss == "orpo":
        return orpo(how.beta, c / tokens_c, r / tokens_r, tokens_c, tokens_r)
    per_c, per_r = (1 / tokens_c, 1 / tokens_r) if how.length_normalized else (1.0, 1.0)
    d = (c - ref_c) * per_c - (r - ref_r) * per_r
    z = how.beta * d
    if how.loss == "dpo":
        smooth = how.label_smoothing
        loss = -(1 - smooth) * math.log(sigmoid(z)) - smooth * math.log(sigmoid(-z))
        slope = how.beta * (-(1 - smooth) * sigmoid(-z) + smooth * sigmoid(z))
    elif how.loss == "ipo":
        loss, slope = (d - 1 / (2 * how.beta)) ** 2, 2 * (d - 1 / (2 * how.beta))
    else:
        loss, slope = max(0.0, 1 - z), -how.beta if z < 1 else 0.0
    return (
        loss - how.sft_weight * c / tokens_c,
        slope * per_c - how.sft_weight / tokens_c,
        -slope * per_r,
    )


def orpo(weight: float, mean_c: float, mean_r: float, tokens_c: float, tokens_r: float) -> Triple:
    """Nats of the chosen answer, less the weighted log-sigmoid of the log odds ratio (Hong et al. 2024)."""

    def log_odds(mean: float) -> float:
        return mean - math.log(1 - math.exp(mean))

    ratio = log_odds(mean_c) - log_odds(mean_r)
    outer = -weight * sigmoid(-ratio)
    # d log_odds / d mean = 1 / (1 - e^mean)
    slope_c, slope_r = outer / (1 - math.exp(mean_c)), -outer / (1 - math.exp(mean_r))
    return -mean_c - weight * math.log(sigmoid(ratio)), (slope_c - 1) / tokens_c, slope_r / tokens_r
