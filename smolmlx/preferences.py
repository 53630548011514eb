"""What preference training minimises and reports, written once for every engine's arrays.

A pair enters as the log-probabilities of its two answers, summed over their supervised tokens, under the policy and
under the reference. N pairs; all arrays here are [N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


_TOLERANCE = {"float32": 1e-5}
_WIDE_TOLERANCE = 2e-2
"""For 16-bit and quantized weights, whose sums depend on the shape of a batch."""


def check_start(how: Dpo, pairs: Pairs, dtype: str) -> Mapping[str, float]:
    """Hold a policy that has not moved to what must be true of it: the loss of a tie, and no margin.

    Args:
        dtype: what the weights are stored in; decides how exact that must be.

    Raises:
        RunError: the reference does not belong to these weights or rows.
    """
    values = metrics(how, pairs)
    loss = float(np.mean(pair_losses(how.model_copy(update={"sft_weight": 0.0}), NUMPY, pairs)))
    # Away from the tie, ipo's loss falls by 1/beta for each nat of margin, the others' by at most beta.
    room = _TOLERANCE.get(dtype, _WIDE_TOLERANCE) * max(1.0, how.beta, 1 / how.beta if how.loss == "ipo" else 0.0)
    if abs(loss - start_loss(how)) > room or abs(values["margin"]) > 2 * room:
        raise RunError(
            f"before the first step the loss is {loss:.6f} instead of {start_loss(how):.6f} and the margin {values['margin']:.2g} instead "
            "of 0: the reference's log-probabilities are not those of the start weights. Delete the run's start/reference_*.safetensors, "
            "set dpo.cache: false, and start again; if it stays, please report it."
        )
    return {**values, "loss": loss}
