"""The training loop of the MLX engine."""

from __future__ import annotations

import numpy as np
from mlx.utils import tree_flatten

from smolmlx import memory
from smolmlx.plan import Plan
from smolmlx.session import Arrays, Session, StepResult
from smolmlx_mlx import device as devices
from smolmlx_mlx.device import mx as mx
from smolmlx_mlx.lanes import open_lanes
from smolmlx_mlx.memory import ran_out
from smolmlx_mlx.model import add_lora, checkpoint_layers, from_mlx, load_base, read_arrays, to_tree, write_weights
from smolmlx_mlx.optimizer import Optimizer
from smolmlx_mlx.step import Stepper

# Free cached buffers beyond this many bytes; clearing on every step would throw away what the next one needs.
_CACHE_BYTES = 2 << 30


class MlxTrainer:
    """Runs a plan's steps with mlx-lm's model and our compiled step."""

    def fit(self, plan: Plan, session: Session) -> None:
        """Train until the session wants no more; see `backend.Trainer`."""
        devices.use(plan.capabilities.device)
        with memory.guard(ran_out, lambda: memory.training(plan)), devices.limits():
            self._fit(plan, session)

    def _fit(self, plan: Plan, session: Session) -> None:
        engine = Engine(plan, session)
        session.attach(engine)
        batches = plan.train.step(session.state.step) if session.wants_step else []
        while session.wants_step:
            # Dropout of a step is a function of (seed, step) alone, so a resumed run draws the same.
            mx.random.seed(_step_seed(plan.recipe.train.seed, session.state.step))
            loss, norm, correct = engine.stepper.step(batches, session.learning_rate)
            upcoming = session.state.step + 1
            batches = plan.train.step(upcoming) if upcoming < plan.steps else []  # made while the device works
            mx.eval(loss, norm, correct)
            session.record_step(
                StepResult(float(loss.item()), float(norm.item()), int(correct.item()), devices.peak_bytes())
            )
            if mx.get_cache_memory() > _CACHE_BYTES:
                mx.clear_cache()
            if session.wants_eval:
                session.record_eval(*engine.evaluate())
            if session.wants_checkpoint:
                session.save_checkpoint()


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


class Engine:
    """A loaded model with its stepper; reads and writes weights for the session."""

    def __init__(self, plan: Plan, session: Session) -> None:
        recipe = plan.recipe
        self.plan = plan
        self.model = load_base(session.base_folder, plan.model.config, plan.dtype, recipe.model.quantize)
        if plan.full:
            self.model.unfreeze()
        else:
            add_lora(self.model, plan.targets, recipe.lora.r, plan.scale, recipe.lora.dropout, recipe.lora.dora)
        if recipe.train.gradient_checkpointing:
            checkpoint_layers(self.model)
        self.model.train()
        compiled = recipe.train.compile and devices.can_compile()
        parameters = self.model.trainable_parameters()
        matrices = {path for path, value in tree_flatten(parameters) if plan.trains_with_muon(path, value.ndim)}
        optimizer = Optimizer(parameters, recipe.train, matrices, plan.muon_ratio)
        lanes = open_lanes(recipe.train.batch_size)
        self.stepper = Stepper(self.model, optimizer, compiled, lanes, recipe.train.mixed_precision)

    def evaluate(self) -> tuple[float, int, int]:
        """Return (nats, supervised tokens, correct) over the whole validation set."""
        assert self.plan.validation is not None
        self.model.eval()
        nats, tokens, correct = 0.0, 0, 0
        for batch in self.plan.validation.evaluation():
            more, right = self.stepper.evaluate(batch)
            nats, tokens, correct = nats + more, tokens + batch.num_supervised, correct + right
        self.model.train()
        return nats, tokens, correct

    def weights(self) -> Arrays:
        return read_arrays(self.model.trainable_parameters())

    def optimizer(self) -> Arrays:
        found: Arrays = {}
        for kind, moments in self.stepper.optimizer.moments.items():
            for path, value in moments.items():
                array = np.array(value)
                found[f"{from_mlx(path)}.{kind}"] = (
                    np.ascontiguousarray(array.T) if path.endswith((".lora_a", ".lora_b")) else array
                )
        return found

    def load(self, weights: Arrays, optimizer: Arrays | None, step: int) -> None:
        write_weights(self.model, weights)
        if optimizer is None:
            return
        for kind, moments in self.stepper.optimizer.moments.items():
            named = {
                name.removesuffix(f".{kind}"): value for name, value in optimizer.items() if name.endswith(f".{kind}")
            }
            moments.update(dict(to_tree(named)))
        self.stepper.optimizer.steps = step
