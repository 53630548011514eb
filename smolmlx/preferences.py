"""What preference training minimises and reports, written once for every engine's arrays.

A pair enters as the log-probabilities of its two answers, summed over their supervised tokens, under the policy and
under the reference. N pairs; all arrays here are [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smolmlx.errors import RunError
from smolmlx.recipe import Dpo

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ops:
    """The functions a loss needs beyond + - * /, of one array library."""

    log_sigmoid: Callable[[Any], Any]
    """log(1 / (1 + e^-x)), exact for large |x|."""
    log1m_exp: Callable[[Any], Any]
    """log(1 - e^x) for x < 0."""
    clip_at_zero: Callable[[Any], Any]
    """max(x, 0)."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities in nats; arrays of any library, [N] each."""

    chosen: Any
    rejected: Any
    ref_chosen: Any
    ref_rejected: Any
    chosen_tokens: Any
    """Supervised tokens of the chosen answer, as floats."""
    rejected_tokens: Any


def pair_losses(how: Dpo, ops: Ops, pairs: Pairs) -> Any:
    """Return the loss of each pair, [N].

    dpo: Rafailov et al. 2023, equation 7, with the label smoothing of their appendix; ipo: Azar et al. 2023,
    equation 17; hinge: Zhao et al. 2023 (SLiC); orpo: Hong et al. 2024, equations 6 and 7; sft_weight: Pang et al. 2024
    (iterative RPO), equation 4.
    """
    if how.loss == "orpo":
        return _orpo(how, ops, pairs)
    margin = log_ratio_margin(how, pairs)
    loss = {"dpo": _dpo, "ipo": _ipo, "hinge": _hinge}[how.loss](how, ops, margin)
    if how.sft_weight:
        loss = loss - how.sft_weight * (pairs.chosen / pairs.chosen_tokens)
    return loss


def log_ratio_margin(how: Dpo, pairs: Pairs) -> Any:
    """Return d = [logp(c) - ref(c)] - [logp(r) - ref(r)], each bracket per token where lengths are normalised; [N]."""
    chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    if how.length_normalized:
        return chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
    return chosen - rejected


def _dpo(how: Dpo, ops: Ops, margin: Any) -> Any:
    right = -ops.log_sigmoid(how.beta * margin)
    if not how.label_smoothing:
        return right
    return (1 - how.label_smoothing) * right - how.label_smoothing * ops.log_sigmoid(-how.beta * margin)


def _ipo(how: Dpo, ops: Ops, margin: Any) -> Any:
    away = margin - 1 / (2 * how.beta)
    return away * away


def _hinge(how: Dpo, ops: Ops, margin: Any) -> Any:
    return ops.clip_at_zero(1 - how.beta * margin)


def _orpo(how: Dpo, ops: Ops, pairs: Pairs) -> Any:
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (ops.log1m_exp(chosen) - ops.log1m_exp(rejected))
    return -chosen - how.beta * ops.log_sigmoid(log_odds)


def _log1m_exp(x: Floats) -> Floats:
    return np.log(-np.expm1(np.minimum(x, -1e-7)))


NUMPY = Ops(lambda x: -np.logaddexp(0.0, -x), _log1m_exp, lambda x: np.maximum(x, 0.0))


def start_loss(how: Dpo) -> float:
    """Return the loss of a policy that equals its reference, without the SFT part: ln 2 for dpo."""
    nothing = np.zeros(1)
    same = Pairs(nothing, nothing, nothing, nothing, nothing + 1, nothing + 1)
    return float(pair_losses(how.model_copy(update={"sft_weight": 0.0}), NUMPY, same)[0])


def metrics(how: Dpo, pairs: Pairs) -> dict[str, float]:
    """Return what a row of metrics.jsonl says of pairs, means over them.

    Rewards are beta (logp - ref); accuracy is the share of pairs whose chosen answer has the higher reward. `kl` is the
    mean of ref - logp per answer token: an estimate of KL(reference || policy) in nats per token, as far as the answers
    are such as the reference gives. Without a reference (orpo) the log-probabilities per token stand in for rewards.
    """
    found = {"chosen_logp": pairs.chosen, "rejected_logp": pairs.rejected}
    if how.loss == "orpo":
        better = pairs.chosen / pairs.chosen_tokens > pairs.rejected / pairs.rejected_tokens
    else:
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        if how.length_normalized:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        found |= {"chosen_reward": how.beta * chosen, "rejected_reward": how.beta * rejected}
        found["margin"] = how.beta * (chosen - rejected)
        better = chosen > rejected
    values = {name: float(np.mean(value)) for name, value in found.items()}
    values["accuracy"] = float(np.mean(better))
    if how.loss != "orpo":
        drift = (pairs.ref_chosen - pairs.chosen) + (pairs.ref_rejected - pairs.rejected)
        values["kl"] = float(drift.sum() / (pairs.chosen_tokens + pairs.rejected_tokens).sum())
    return values


_ROUNDING, _WIDE_ROUNDING = 1e-4, 5e-3
"""Nats for each nat of an answer (for each token, where it has fewer nats than tokens).

Measured in float32 on the embedded model, 24 pairs of 145 tokens and 190 to 495 nats an answer: up to 8e-7 between batch
sizes and 1.4e-5 between engines, 1.8e-5 for each token. An adapter one step of 1e-4 away: 1.4e-4 to 1.8e-3.
"""
_NO_GRADIENT = 1e-4
"""Of a margin, by the weights. Measured as above: 2e-5 of pairs of equal answers, 52 of others."""


def rounding_room(log_probs: npt.NDArray[np.floating], tokens: npt.NDArray[np.floating], dtype: str) -> Floats:
    """Return by how many nats rounding may move the log-probability of answers: weights in 16 bits or fewer by more."""
    share = _ROUNDING if dtype == "float32" else _WIDE_ROUNDING
    return np.asarray(share * np.maximum(np.abs(log_probs), tokens))


def least_gradient(how: Dpo) -> float:
    """Return the gradient norm up to which a first step is rounding alone: nothing would be trained."""
    slopes = {"dpo": how.beta / 2 * (1 - 2 * how.label_smoothing), "ipo": 1 / how.beta, "hinge": how.beta}
    return _NO_GRADIENT * slopes.get(how.loss, 0.0)


def check_start(how: Dpo, pairs: Pairs, dtype: str, *, made: bool = False) -> None:
    """Hold a policy that has not moved to what must be true of it: it gives each answer what the reference gives it.

    The loss is then a tie's but for its slope at the tie (1/beta for ipo, beta for hinge, beta/2 for dpo) times the rounding of
    two answers. Answers are compared and not the loss, for a mean hides differences that cancel.

    Args:
        dtype: what the weights are stored in; decides how exact that must be.
        made: the reference was made by this very run, in the same shapes; in float32 the loss is then a tie's to 1e-5, for each
            nat that the loss falls by.

    Raises:
        RunError: the reference does not belong to these weights or rows.
    """
    apart = [np.abs(pairs.chosen - pairs.ref_chosen), np.abs(pairs.rejected - pairs.ref_rejected)]
    rooms = [
        rounding_room(pairs.ref_chosen, pairs.chosen_tokens, dtype),
        rounding_room(pairs.ref_rejected, pairs.rejected_tokens, dtype),
    ]
    with np.errstate(invalid="ignore"):
        loss = float(np.mean(pair_losses(how.model_copy(update={"sft_weight": 0.0}), NUMPY, pairs)))
    slope = max(1.0, how.beta, 1 / how.beta if how.loss == "ipo" else 0.0)
    tied = not made or dtype != "float32" or abs(loss - start_loss(how)) <= 1e-5 * slope
    if tied and (np.stack(apart) <= np.stack(rooms)).all():  # false for what is not a number
        return
    raise RunError(
        f"before the first step the loss is {loss:.6f} instead of {start_loss(how):.6f}, and the log-probability of an answer is "
        f"{np.max(apart):.2g} nats from the reference's: the reference's log-probabilities are not those of the start weights. Delete "
        "the run's start/reference_*.safetensors, set dpo.cache: false, and start again; if it stays, please report it."
    )
