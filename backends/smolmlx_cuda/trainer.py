"""TRL's SFTTrainer, told what to do: our batches in our order, our schedule, our loss, our checkpoints.

TRL owns the loop (and with it devices, precision and distribution); a callback hands each step to the session.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from smolmlx import memory
from smolmlx.data.pair_batches import PairBatch
from smolmlx.plan import Plan
from smolmlx.session import Arrays, Session
from smolmlx_cuda import unsloth
from smolmlx_cuda.memory import ran_out
from smolmlx_cuda.model import Losses, add_lora, load_base, read_weights, to_numpy, trainable, write_weights
from smolmlx_cuda.optimizer import make_optimizer
from smolmlx_cuda.work import Extras, Inputs, PairWork, open_work


class TrlTrainer:
    """Runs a plan's steps through TRL."""

    def fit(self, plan: Plan, session: Session) -> None:
        """Train until the session wants no more; see `backend.Trainer`."""
        if plan.capabilities.device == "cpu":
            memory.keep_freed()
        with memory.guard(ran_out, lambda: memory.training(plan)):
            engine = Engine(plan, session)
            session.attach(engine, engine.score)
            if session.wants_step:
                with tempfile.TemporaryDirectory(prefix="smolmlx-trl-") as scratch:
                    engine.run(scratch)


class Engine:
    """A loaded model with its optimizer; reads and writes weights for the session."""

    def __init__(self, plan: Plan, session: Session) -> None:
        self.plan, self.session = plan, session
        self.device = plan.capabilities.device
        fast, why = unsloth.decide(plan)
        session.note(f"PyTorch path: {why}")
        self.model = unsloth.load(session.base_folder, plan) if fast else self._load(plan, session)
        self.model.train()
        self.work = open_work(plan, session, Losses(self.model, plan.recipe.train.mixed_precision))
        self.parameters = trainable(self.model)
        self.adam = make_optimizer(plan, self.parameters)

    def _load(self, plan: Plan, session: Session) -> Any:
        attention = str(plan.recipe.cuda.get("attention", "sdpa"))
        base = load_base(session.base_folder, plan.dtype, self.device, plan.recipe.model.quantize, attention)
        return base.requires_grad_(True) if plan.full else add_lora(base, plan)

    def run(self, scratch: str) -> None:
        """Let TRL run the steps that are left."""
        plan, start = self.plan, self.session.state.step
        rates = plan.learning_rates / plan.recipe.train.learning_rate
        schedule = LambdaLR(self.adam, lambda k: float(rates[min(start + k, plan.steps - 1)]))
        watch = Watch(self)
        accumulation = plan.recipe.train.accumulation
        work = [{"step": step, "micro": micro} for step in range(start, plan.steps) for micro in range(accumulation)]
        trainer = PlannedTrainer(
            self, watch,
            model=self.model,
            args=one_gpu(self._arguments(scratch, plan.steps - start)),
            train_dataset=Dataset.from_list(work),
            data_collator=self.collate,
            processing_class=PreTrainedTokenizerFast(tokenizer_file=str(plan.tokenizer.folder / "tokenizer.json"), **special_tokens(plan)),
            optimizers=(self.adam, schedule),
            callbacks=[watch],
        )  # fmt: skip
        # TRL patches the model's forward; our loss goes through the body and the head, which stay as they are.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()

    def _arguments(self, scratch: str, steps: int) -> SFTConfig:
        train = self.plan.recipe.train
        return SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=1,  # one item of the data set is a whole micro-batch
            gradient_accumulation_steps=train.accumulation,
            learning_rate=train.learning_rate,
            max_grad_norm=0.0,  # clipped by Watch, which also reports the norm
            **_checkpointing(train.gradient_checkpointing),
            use_cpu=self.device == "cpu",
            bf16=False,  # Losses does it where it is asked for; here it would round float32 adapters
            fp16=False,
            seed=train.seed,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=self.device == "cuda",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )

    def collate(self, items: Sequence[dict[str, int]]) -> Inputs:
        """Turn one (step, micro-batch) into tensors."""
        (item,) = items
        return self.work.inputs(item["step"], item["micro"])

    def evaluate(self) -> None:
        """Score the whole validation set."""
        self.model.eval()
        with torch.no_grad():
            self.work.evaluate(self.device)
        self.model.train()

    def score(self, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of a micro-batch's answers, [2B], without dropout."""
        assert isinstance(self.work, PairWork)
        self.model.eval()
        with torch.no_grad():
            found = self.work.score(batch, self.device)
        self.model.train()
        return found

    def weights(self) -> Arrays:
        return read_weights(self.model)

    def optimizer(self) -> Arrays:
        found: Arrays = {}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state.get(parameter, {}).items():
                if key != "step" and torch.is_tensor(value):
                    found[f"{name}.{key}"] = (
                        value.detach().cpu().numpy() if value.dtype == torch.uint8 else to_numpy(value)
                    )
        return found

    def load(self, weights: Arrays, optimizer: Arrays | None, step: int) -> None:
        write_weights(self.model, weights)
        if optimizer is None:
            return
        for name, parameter in self.parameters.items():
            entry: dict[str, Any] = {
                key.rpartition(".")[2]: torch.from_numpy(np.array(value)).to(parameter.device)
                for key, value in optimizer.items()
                if key.rpartition(".")[0] == name
            }
            entry["step"] = torch.tensor(float(step)) if "exp_avg" in entry else step
            self.adam.state[parameter] = entry


class PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose loss and order come from the plan."""

    def __init__(self, engine: Engine, watch: Watch, **options: Any) -> None:
        self.engine, self.watch = engine, watch
        super().__init__(**options)
        # The loss is already divided by the supervised tokens (or pairs) of the whole step; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, 1  # the denominator travels with each micro-batch

    def compute_loss(
        self, model: Any, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, extra = self.engine.work.totals(inputs)
        loss = total / inputs["denominator"]
        self.watch.add(loss.detach(), inputs, extra)
        return (loss, {}) if return_outputs else loss


class Watch(TrainerCallback):  # type: ignore[misc]
    """Seeds, clips, and hands every finished step to the session."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loss: torch.Tensor | float = 0.0
        self.norm: torch.Tensor | float = 0.0
        self.extras: Extras = []

    def add(self, loss: torch.Tensor, inputs: Inputs, extra: torch.Tensor) -> None:
        self.loss = self.loss + loss
        self.extras.append((inputs, extra))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Dropout of a step is a function of (seed, step) alone, so a resumed run draws the same.
        seed = np.random.SeedSequence([self.engine.plan.recipe.train.seed, self.engine.session.state.step])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        self.loss, self.extras = 0.0, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        most = self.engine.plan.recipe.train.max_grad_norm
        self.norm = torch.nn.utils.clip_grad_norm_(list(self.engine.parameters.values()), most)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        engine, session = self.engine, self.engine.session
        peak = peak_bytes(engine.device)
        session.record_step(engine.work.result(float(self.loss), float(self.norm), self.extras, peak))
        if session.wants_eval:
            engine.evaluate()
        if session.wants_checkpoint:
            session.save_checkpoint()
        control.should_training_stop = not session.wants_step
        return control


def peak_bytes(device: str) -> int:
    """Most memory held: by torch's allocator on a GPU, by the process on a CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_gpu(args: SFTConfig) -> SFTConfig:
    """Keep Trainer from copying the model to every GPU it sees (DataParallel): a plan's micro-batch is not split.

    Not run on a machine with more than one GPU by this project.
    """
    args._n_gpu = min(1, args.n_gpu)
    return args


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """TRL checkpoints by default; transformers renamed the switch, and warns about the old name when it is given."""
    new = "activation_checkpointing" in SFTConfig.__dataclass_fields__
    return {"activation_checkpointing" if new else "gradient_checkpointing": wanted}


def special_tokens(plan: Plan) -> dict[str, str]:
    """Return the pad and eos token that TRL asks for; it never tokenizes here."""
    tokenizer = plan.tokenizer
    first = tokenizer.eos_ids[0] if tokenizer.eos_ids else 0
    eos = tokenizer.special("eos_token") or str(tokenizer.fast.id_to_token(first))
    return {"eos_token": eos, "pad_token": tokenizer.special("pad_token") or eos}
