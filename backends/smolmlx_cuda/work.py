"""What a stage gives TRL's loop, and what it makes of the answer: tokens to learn, or pairs to compare."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from smolmlx.data.pair_batches import PairBatch
from smolmlx.plan import Plan
from smolmlx.references import Scored
from smolmlx.session import Session, StepResult
from smolmlx_cuda.model import Losses, to_inputs
from smolmlx_cuda.pairs import PairLosses
from smolmlx_cuda.pairs import to_inputs as pair_inputs

Inputs = dict[str, torch.Tensor]
Extras = list[tuple[Inputs, torch.Tensor]]
"""Of each micro-batch of a step: its inputs, and what its loss reports beside itself."""


def open_work(plan: Plan, session: Session, losses: Losses) -> TokenWork | PairWork:
    return TokenWork(plan, session, losses) if plan.pairs is None else PairWork(plan, session, losses)


class TokenWork:
    """Pretraining and SFT: nats per supervised token."""

    def __init__(self, plan: Plan, session: Session, losses: Losses) -> None:
        self.plan, self.session, self.totals = plan, session, losses.totals

    def inputs(self, step: int, micro: int) -> Inputs:
        """Return a micro-batch; one missing at an epoch's end has no supervised token."""
        batches = self.plan.train.step(step)
        total = sum(batch.num_supervised for batch in batches)
        present = micro < len(batches)
        inputs = to_inputs(batches[micro if present else 0])
        if not present:
            inputs["weights"] = torch.zeros_like(inputs["weights"])
        inputs["denominator"] = torch.tensor(float(max(1, total)))
        return inputs

    def result(self, loss: float, norm: float, extras: Extras, peak: int) -> StepResult:
        return StepResult(loss, norm, sum(int(correct) for _, correct in extras), peak)

    def evaluate(self, device: str) -> None:
        """Score the whole validation set and hand it to the session."""
        assert self.plan.validation is not None
        nats, tokens, correct = 0.0, 0, 0
        for batch in self.plan.validation.evaluation():
            more, right = self.totals(_to(to_inputs(batch), device))
            nats, tokens, correct = nats + float(more), tokens + batch.num_supervised, correct + int(right)
        self.session.record_eval(nats, tokens, correct)


class PairWork:
    """DPO: loss per pair."""

    def __init__(self, plan: Plan, session: Session, losses: Losses) -> None:
        assert plan.pairs is not None
        self.plan, self.session, self.pairs = plan, session, plan.pairs
        self.losses = PairLosses(losses, plan.recipe.dpo)
        self.totals = self.losses.totals

    def inputs(self, step: int, micro: int) -> Inputs:
        """Return a micro-batch; one missing at an epoch's end has no pair."""
        batches = self.pairs.step(step)
        total = sum(float(batch.real.sum()) for batch in batches)
        present = micro < len(batches)
        batch = batches[micro if present else 0]
        inputs = pair_inputs(batch)
        inputs["reference"] = torch.from_numpy(self.session.reference_of(batch))
        if not present:
            inputs["real"] = torch.zeros_like(inputs["real"])
            inputs["pairs"] = torch.full_like(inputs["pairs"], -1)
        inputs["denominator"] = torch.tensor(total)
        return inputs

    def result(self, loss: float, norm: float, extras: Extras, peak: int) -> StepResult:
        scored = Scored.collect((inputs["pairs"].cpu().numpy(), found.cpu().numpy()) for inputs, found in extras)
        return StepResult(loss, norm, None, peak, scored)

    def evaluate(self, device: str) -> None:
        """Score all validation pairs and hand them to the session."""
        assert self.plan.validation_pairs is not None
        batches = self.plan.validation_pairs.evaluation()
        self.session.record_pair_eval(Scored.collect(self._scores(batches, device)))

    def _scores(
        self, batches: Iterator[PairBatch], device: str
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        return ((batch.pairs, self.score(batch, device)) for batch in batches)

    def score(self, batch: PairBatch, device: str) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of a micro-batch's answers, [2B]."""
        found: npt.NDArray[np.float32] = self.losses.log_probs(_to(pair_inputs(batch), device)).float().cpu().numpy()
        return found


def _to(inputs: Inputs, device: str) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}
