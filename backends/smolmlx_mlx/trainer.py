"""The training loop of the MLX engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from smolmlx import memory
from smolmlx.data.pair_batches import PairBatch
from smolmlx.plan import Plan
from smolmlx.session import Arrays, Session
from smolmlx_mlx import device as devices
from smolmlx_mlx.device import mx as mx
from smolmlx_mlx.lanes import open_lanes
from smolmlx_mlx.memory import ran_out
from smolmlx_mlx.model import add_lora, from_mlx, load_base, read_arrays, to_tree, write_weights
from smolmlx_mlx.optimizer import Optimizer
from smolmlx_mlx.recompute import checkpoint_layers
from smolmlx_mlx.step import Stepper
from smolmlx_mlx.work import PairWork, open_work

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
        session.attach(engine, engine.score)
        engine.stepper.forget_evaluation()  # the reference is made
        work = engine.work
        made = work.make(session.state.step) if session.wants_step else None
        while session.wants_step and made is not None:
            # Dropout of a step is a function of (seed, step) alone, so a resumed run draws the same.
            mx.random.seed(_step_seed(plan.recipe.train.seed, session.state.step))
            loss, norm, extras = engine.stepper.step(made.inputs, made.denominator, session.learning_rate)
            upcoming = session.state.step + 1
            following = work.make(upcoming) if upcoming < plan.steps else None  # made while the device works
            mx.eval(loss, norm, extras)
            session.record_step(work.result(made, loss, norm, extras))
            made = following
            if mx.get_cache_memory() > _CACHE_BYTES:
                mx.clear_cache()
            if session.wants_eval:
                engine.evaluate()
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
        self.work = open_work(plan, session, self.model, open_lanes(recipe.train.batch_size))
        self.stepper = Stepper(self.model, optimizer, compiled, self.work.objective)

    def evaluate(self) -> None:
        """Score the whole validation set."""
        self.model.eval()
        self.work.evaluate(self.stepper)
        self.model.train()

    def score(self, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of a micro-batch's answers, [2B], without dropout."""
        assert isinstance(self.work, PairWork)
        self.model.eval()
        found = self.work.score(self.stepper, batch)
        self.model.train()
        return found

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
