"""What a stage gives the stepper, and what it makes of the answer: tokens to learn, or pairs to compare."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from smolmlx.data.batches import Batch
from smolmlx.data.pair_batches import PairBatch
from smolmlx.plan import Plan
from smolmlx.references import Scored
from smolmlx.session import Session, StepResult
from smolmlx_mlx import device as devices
from smolmlx_mlx.device import mx as mx
from smolmlx_mlx.lanes import Lanes
from smolmlx_mlx.losses import Losses
from smolmlx_mlx.losses import to_inputs as token_inputs
from smolmlx_mlx.pairs import PairLosses
from smolmlx_mlx.pairs import to_inputs as pair_inputs
from smolmlx_mlx.step import Inputs, Stepper


@dataclass(frozen=True, slots=True)
class Made:
    """The micro-batches of one optimizer step."""

    inputs: list[Inputs]
    denominator: float
    batches: tuple[PairBatch, ...] = ()


def open_work(plan: Plan, session: Session, model: nn.Module, lanes: Lanes) -> TokenWork | PairWork:
    losses = Losses(model, lanes, plan.recipe.train.mixed_precision)
    return TokenWork(plan, session, losses) if plan.pairs is None else PairWork(plan, session, losses)


class TokenWork:
    """Pretraining and SFT: nats per supervised token."""

    def __init__(self, plan: Plan, session: Session, losses: Losses) -> None:
        self.plan, self.session, self.objective = plan, session, losses

    def make(self, step: int) -> Made:
        batches = self.plan.train.step(step)
        count = sum(batch.num_supervised for batch in batches)
        return Made([token_inputs(batch) for batch in batches], float(max(1, count)))

    def result(self, made: Made, loss: mx.array, norm: mx.array, extras: list[mx.array]) -> StepResult:
        correct = sum(int(extra.item()) for extra in extras)
        return StepResult(float(loss.item()), float(norm.item()), correct, devices.peak_bytes())

    def evaluate(self, stepper: Stepper) -> None:
        assert self.plan.validation is not None
        nats, tokens, correct = 0.0, 0, 0
        for batch in self.plan.validation.evaluation():
            more, right = self._score(stepper, batch)
            nats, tokens, correct = nats + more, tokens + batch.num_supervised, correct + right
        self.session.record_eval(nats, tokens, correct)

    def _score(self, stepper: Stepper, batch: Batch) -> tuple[float, int]:
        nats, correct = stepper.evaluate(token_inputs(batch))
        return float(nats.item()), int(correct.item())


class PairWork:
    """DPO: loss per pair."""

    def __init__(self, plan: Plan, session: Session, losses: Losses) -> None:
        assert plan.pairs is not None
        self.plan, self.session, self.pairs = plan, session, plan.pairs
        self.objective = PairLosses(losses, plan.recipe.dpo)

    def make(self, step: int) -> Made:
        batches = tuple(self.pairs.step(step))
        count = sum(float(batch.real.sum()) for batch in batches)
        return Made([pair_inputs(batch, self.session.reference_of(batch)) for batch in batches], count, batches)

    def result(self, made: Made, loss: mx.array, norm: mx.array, extras: list[mx.array]) -> StepResult:
        found = zip(made.batches, extras, strict=True)
        scored = Scored.collect((batch.pairs, np.array(extra)) for batch, extra in found)
        return StepResult(float(loss.item()), float(norm.item()), None, devices.peak_bytes(), scored)

    def evaluate(self, stepper: Stepper) -> None:
        assert self.plan.validation_pairs is not None
        batches = self.plan.validation_pairs.evaluation()
        self.session.record_pair_eval(Scored.collect((batch.pairs, self.score(stepper, batch)) for batch in batches))

    def score(self, stepper: Stepper, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of a micro-batch's answers, [2B]."""
        _, found = stepper.evaluate(pair_inputs(batch, np.zeros(len(batch.tails), np.float32)))
        return np.array(found)
