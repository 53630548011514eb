"""The numpy engine's loop: the whole of what an engine must do with a plan and a session."""

from __future__ import annotations

import numpy as np

from smolmlx.data.batches import Batch
from smolmlx.plan import Plan, initial_adapter
from smolmlx.session import Arrays, Session, StepResult
from toy_engine.model import Bigram, Dropout


class ToyTrainer:
    """Runs a plan's steps in numpy."""

    def fit(self, plan: Plan, session: Session) -> None:
        """Train until the session wants no more; see `backend.Trainer`."""
        engine = Engine(plan, session)
        session.attach(engine)
        while session.wants_step:
            with np.errstate(all="ignore"):  # a loss that is not a number is the session's to refuse
                result = engine.step(session.state.step, session.learning_rate)
            session.record_step(result)
            if session.wants_eval:
                session.record_eval(*engine.evaluate())
            if session.wants_checkpoint:
                session.save_checkpoint()


class Engine:
    """A loaded model with its moments; reads and writes weights for the session."""

    def __init__(self, plan: Plan, session: Session) -> None:
        self.plan = plan
        self.model = Bigram(session.base_folder, initial_adapter(plan), plan.scale, plan.recipe.lora.dora)
        self.exp_avg = {name: np.zeros_like(value) for name, value in self.model.adapter.items()}
        self.exp_avg_sq = {name: np.zeros_like(value) for name, value in self.model.adapter.items()}

    def step(self, step: int, learning_rate: float) -> StepResult:
        """Take one optimizer step over its micro-batches."""
        batches = self.plan.train.step(step)
        count = np.float32(max(1, sum(batch.num_supervised for batch in batches)))
        # Dropout of a step is a function of (seed, step) alone, so a resumed run draws the same.
        rng = np.random.default_rng([self.plan.recipe.train.seed, step])
        share = self.plan.recipe.lora.dropout
        dropout = Dropout(share, rng) if share else None
        nats, correct = 0.0, 0
        gradients = {name: np.zeros_like(value) for name, value in self.model.adapter.items()}
        for batch in batches:
            more, right, found = self.model.gradients(*flat(batch), batch.weights, dropout)
            nats, correct = nats + more, correct + right
            for name, gradient in found.items():
                gradients[name] += gradient / count
        norm = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values())))
        factor = np.float32(min(1.0, self.plan.recipe.train.max_grad_norm / (norm + 1e-6)))
        self._adamw({name: g * factor for name, g in gradients.items()}, learning_rate, step + 1)
        return StepResult(nats / float(count), norm, correct)

    def _adamw(self, gradients: Arrays, rate: float, time: int) -> None:
        """AdamW with bias correction (Loshchilov & Hutter 2019); vectors do not decay."""
        train = self.plan.recipe.train
        beta1, beta2 = train.betas
        for name, gradient in gradients.items():
            first = self.exp_avg[name] = beta1 * self.exp_avg[name] + (1 - beta1) * gradient
            second = self.exp_avg_sq[name] = beta2 * self.exp_avg_sq[name] + (1 - beta2) * gradient**2
            update = rate / (1 - beta1**time) * first / (np.sqrt(second / (1 - beta2**time)) + train.eps)
            value = self.model.adapter[name]
            decay = rate * train.weight_decay if value.ndim > 1 else 0.0
            self.model.adapter[name] = (value * (1 - decay) - update).astype(np.float32)

    def evaluate(self) -> tuple[float, int, int]:
        """Return (nats, supervised tokens, correct) over the whole validation set."""
        assert self.plan.validation is not None
        nats, tokens, correct = 0.0, 0, 0
        for batch in self.plan.validation.evaluation():
            losses, right = self.model.losses(*flat(batch))
            nats += float((losses * batch.weights).sum())
            tokens += batch.num_supervised
            correct += int((right * batch.weights).sum())
        return nats, tokens, correct

    def weights(self) -> Arrays:
        return dict(self.model.adapter)

    def optimizer(self) -> Arrays:
        moments = (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
        return {f"{name}.{kind}": value for kind, values in moments for name, value in values.items()}

    def load(self, weights: Arrays, optimizer: Arrays | None, step: int) -> None:
        self.model.adapter.update(weights)
        for name, value in (optimizer or {}).items():
            bare, _, kind = name.rpartition(".")
            getattr(self, kind)[bare] = value


def flat(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the token at each supervised position and the one that follows it: [S], [S]."""
    return batch.ids.reshape(-1)[batch.index], batch.labels
