"""The state of a training run and every decision about it that is not arithmetic.

When to evaluate, save and stop, what is best, how far we are: decided here once. An engine computes steps and hands
numbers over, so both engines behave alike and either can go on where the other stopped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from smolmlx import references
from smolmlx.data.pair_batches import PairBatch
from smolmlx.errors import DataError, RecipeError, RunError
from smolmlx.plan import Plan
from smolmlx.preferences import NUMPY, Pairs, check_start, least_gradient, metrics, pair_losses
from smolmlx.recipe import build, flatten
from smolmlx.recipe import read as read_recipe
from smolmlx.references import References, ScoreBatch, Scored
from smolmlx.rundir import RunDir, publish, usual_mode, write_text
from smolmlx.signposts import listed

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
_LEARNED = ("stage", "model", "data", "train", "lora", "dpo", "eval")
_FREE = (
    "model.dtype", "train.gradient_checkpointing", "train.mixed_precision", "train.compile", "dpo.shared_prompt", "dpo.cache",
)  # fmt: skip
"""Keys of a recipe's `_LEARNED` sections that a checkpoint does not depend on; see `Plan.fingerprint`."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: `step`, `eval`, `checkpoint` or `note`."""

    kind: str
    step: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an engine reports of one optimizer step."""

    loss: float
    """Mean over the whole step: nats per supervised token, or the loss per pair (dpo)."""
    grad_norm: float
    """Global norm before clipping."""
    num_correct: int | None = None
    """Supervised targets at the argmax, where it costs nothing to count."""
    peak_bytes: int | None = None
    scored: Scored | None = None
    """Stage dpo: log-probabilities of the step's answers, from before its update."""


@dataclass(slots=True)
class State:
    """Everything besides weights and moments that a resumed run needs; engine-neutral JSON.

    Random numbers need no state: dropout of step k is drawn from (seed, k), row order from (seed, epoch).
    """

    step: int = 0
    """Optimizer steps done."""
    num_tokens: int = 0
    num_supervised: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all sittings."""
    best_loss: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    """Evaluations since the best one."""
    stopped: bool = False
    """Early stopping has struck."""
    plan: str = ""
    """Fingerprint of the plan; another plan cannot continue this run."""


class Weights(Protocol):
    """How a session reads and writes an engine's weights, as float32 numpy under canonical (PEFT or HF) names."""

    def weights(self) -> Arrays: ...
    def optimizer(self) -> Arrays:
        """`<name>.exp_avg` and `<name>.exp_avg_sq`, oriented like the weights."""

    def load(self, weights: Arrays, optimizer: Arrays | None, step: int) -> None: ...


@dataclass
class Session:
    """One run of one stage."""

    plan: Plan
    run: RunDir
    on_event: Callable[[Event], None] = lambda event: None
    state: State = field(default_factory=State)
    interrupted: bool = False
    """Set from a signal handler; the engine's loop sees `wants_step` turn false."""
    references: References = field(default_factory=References)
    """Stage dpo: what the start policy gives each answer."""
    _engine: Weights | None = None
    _saved_step: int = -1
    _clock: float = 0.0

    def attach(self, engine: Weights, score: ScoreBatch | None = None) -> None:
        """Bring the engine's weights to where the run stands: the start, or the last checkpoint.

        Args:
            score: stage dpo: asked for the reference's log-probabilities where none are kept.

        Raises:
            RunError: the checkpoint is broken, or the start is not what it must be.
            RecipeError: the checkpoint belongs to another plan.
        """
        self._engine = engine
        checkpoint = self.run.last_checkpoint()
        if checkpoint is not None:  # before anything of this plan is written into the run
            self.state = self._read_own_state(checkpoint)
        start = self.run.start / self.plan.weights_name
        if start.is_file() and (checkpoint is None or self.plan.pairs is not None):
            engine.load(load_arrays(start), None, 0)  # full training of an existing model starts from its own weights
        if self.plan.pairs is not None:
            assert score is not None, "an engine that offers dpo scores pairs"
            self._prepare_pairs(score, fresh=checkpoint is None)
        if checkpoint is not None:
            weights = _load_saved(checkpoint / self.plan.weights_name)
            moments = _load_saved(checkpoint / "optimizer.safetensors")
            _check_moments(checkpoint, weights, moments, self.state.step)
            engine.load(weights, moments, self.state.step)
            self._saved_step = self.state.step
        self.state.plan = self.plan.fingerprint()
        self._trim_metrics()
        self._clock = time.perf_counter()

    def _read_own_state(self, checkpoint: Path) -> State:
        state = read_state(checkpoint)
        if state.plan != self.plan.fingerprint():
            raise RecipeError(
                f"{checkpoint}: made by another plan: {what_changed(self.run, self.plan)}, or start a new run."
            )
        if state.step > self.plan.steps:
            raise RunError(
                f"{checkpoint}: state.json says step {state.step}, and the run has {self.plan.steps}. Delete this checkpoint folder to go "
                "on from the one before."
            )
        return state

    def _prepare_pairs(self, score: ScoreBatch, fresh: bool) -> None:
        """Get the reference, and hold a run that begins to what must be true before its first step (numerics.md)."""
        plan = self.plan
        assert plan.pairs is not None
        references.check_sharing(plan, score)
        self.references = references.obtain(plan, self.run, score, self.note)
        if fresh and self.references.train is not None:
            scored = Scored.collect((batch.pairs, score(batch)) for batch in plan.pairs.step(0))
            self._check_start(scored, made=self.references.made)

    def _check_start(self, scored: Scored, made: bool) -> None:
        plan = self.plan
        exact = plan.dtype if plan.recipe.model.quantize == "none" else plan.recipe.model.quantize
        check_start(plan.recipe.dpo, self._compare(scored), exact, made=made)

    def _check_first(self, result: StepResult, scored: Scored) -> None:
        """Hold the first step over pairs to what the reference says, and to a gradient that is one."""
        if self.references.train is not None and not _drops(self.plan):
            self._check_start(scored, made=False)  # training computes it by other code than scoring does
        if result.grad_norm <= least_gradient(self.plan.recipe.dpo):
            raise RunError(
                f"the gradient of the first step is nothing but rounding ({result.grad_norm:.2g}): nothing would be trained. "
                "Check lora.targets and dpo, and whether the two answers of each pair differ."
            )

    def _compare(self, scored: Scored, *, validation: bool = False) -> Pairs:
        plan, known = self.plan.pairs, self.references.train
        if validation:
            plan, known = self.plan.validation_pairs, self.references.validation
        assert plan is not None
        return references.compare(plan, known, scored)

    def reference_of(self, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Return the reference's log-probabilities of a train micro-batch, in the order of its tails: [2B]."""
        return references.of_batch(self.references.train, batch)

    @property
    def base_folder(self) -> Path:
        """Folder of the base weights: the model's own, or the run's for a model made from scratch."""
        return self.plan.model.folder if self.plan.recipe.model.config is None else self.run.start

    @property
    def wants_step(self) -> bool:
        return self.state.step < self.plan.steps and not self.interrupted and not self.state.stopped

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step about to be taken."""
        return float(self.plan.learning_rates[self.state.step])

    def record_step(self, result: StepResult) -> None:
        """Count a finished step and write its row.

        Raises:
            RunError: the loss is not a number; a checkpoint of the step before is kept.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        supervised, tokens = self.plan.train.step_tokens(self.state.step)
        values: dict[str, Any] = {
            "loss": result.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": result.grad_norm,
            "num_tokens": self.state.num_tokens + tokens,
            "num_supervised": self.state.num_supervised + supervised,
            "epoch": (self.state.step + 1) / self.plan.train.steps_per_epoch,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "samples_per_second": len(self.plan.train.step_documents(self.state.step)) / seconds,
            "peak_bytes": result.peak_bytes,
        }
        if result.num_correct is not None:
            values["accuracy"] = result.num_correct / max(1, supervised)
        if result.scored is not None:
            values |= metrics(self.plan.recipe.dpo, self._compare(result.scored))
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise RunError(self._not_finite(f"the loss is {result.loss} with gradient norm {result.grad_norm}"))
        if result.scored is not None and not self.state.step:
            self._check_first(result, result.scored)
        self.state.step += 1
        self.state.num_tokens += tokens
        self.state.num_supervised += supervised
        self.state.seconds += seconds
        self._write("step", values)

    def _not_finite(self, what: str) -> str:
        last = self.run.last_checkpoint()
        kept = f" The last checkpoint is {last}." if last else ""
        rate = self.plan.learning_rates[min(self.state.step, self.plan.steps - 1)]
        knobs = [f"Lower train.learning_rate (now {rate:g})"]
        knobs += [] if self.plan.recipe.train.warmup else ["add train.warmup"]
        knobs += [] if self.plan.dtype == "float32" else ["set model.dtype: float32"]
        return f"step {self.state.step + 1}: {what}. {listed(knobs, 'or')}.{kept}"

    def _finite_weights(self) -> Arrays:
        """Return the engine's weights, which a step whose loss was still a number may have thrown out of all bounds."""
        assert self._engine is not None
        weights = self._engine.weights()
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise RunError(self._not_finite("weights are no longer numbers"))
        return weights

    @property
    def wants_eval(self) -> bool:
        return self.plan.validation is not None and self.state.step in self.plan.eval_steps

    def record_eval(self, nats: float, tokens: int, correct: int) -> None:
        """Take a token-weighted evaluation over the whole validation set; keep the weights if it is the best."""
        loss = nats / max(1, tokens)
        perplexity = math.exp(min(loss, 700.0))
        self._take_eval(loss, {"val_perplexity": perplexity, "val_accuracy": correct / max(1, tokens)})

    def record_pair_eval(self, scored: Scored) -> None:
        """Take the log-probabilities of all validation pairs; keep the weights if their loss is the best."""
        pairs = self._compare(scored, validation=True)
        loss = float(np.mean(pair_losses(self.plan.recipe.dpo, NUMPY, pairs)))
        self._take_eval(loss, {f"val_{name}": value for name, value in metrics(self.plan.recipe.dpo, pairs).items()})

    def _take_eval(self, loss: float, values: Mapping[str, float]) -> None:
        if not math.isfinite(loss):
            raise RunError(self._not_finite(f"the validation loss is {loss}"))
        better = self.state.best_loss is None or loss < self.state.best_loss
        if better:
            self.state.best_loss, self.state.best_step, self.state.bad_evals = loss, self.state.step, 0
            if self.plan.recipe.eval.keep_best:
                weights = self._finite_weights()
                with publish(self.run.checkpoints / "best") as folder:
                    save_arrays(weights, folder / self.plan.weights_name)
        else:
            self.state.bad_evals += 1
        patience = self.plan.recipe.eval.patience
        self.state.stopped = patience is not None and self.state.bad_evals >= patience
        self._write("eval", {"val_loss": loss, **values, "best": better})
        self._clock = time.perf_counter()

    @property
    def wants_checkpoint(self) -> bool:
        return self.state.step in self.plan.save_steps or (self.interrupted and self.state.step != self._saved_step)

    def save_checkpoint(self) -> None:
        """Write weights, moments and state in one rename; drop checkpoints beyond `save.keep_last`."""
        assert self._engine is not None
        target = self.run.checkpoint(self.state.step)
        weights = self._finite_weights()
        with publish(target) as folder:
            save_arrays(weights, folder / self.plan.weights_name)
            save_arrays(self._engine.optimizer(), folder / "optimizer.safetensors")
            write_text(folder / "state.json", json.dumps(asdict(self.state), indent=2) + "\n")
        self._saved_step = self.state.step
        for old in self.run.list_checkpoints()[: -self.plan.recipe.save.keep_last]:
            shutil.rmtree(old)
        self.on_event(Event("checkpoint", self.state.step, {"path": str(target)}))
        self._clock = time.perf_counter()

    def final_weights(self) -> Arrays:
        """Return the weights to leave behind: the best evaluated ones, or the last."""
        best = self.run.checkpoints / "best" / self.plan.weights_name
        if self.plan.recipe.eval.keep_best and self.state.best_step is not None and best.is_file():
            return _load_saved(best)
        return self._finite_weights()

    def note(self, text: str) -> None:
        self.on_event(Event("note", self.state.step, {"text": text}))

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        row = {"step": self.state.step, "kind": kind, **values}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.on_event(Event(kind, self.state.step, values))

    def _trim_metrics(self) -> None:
        """Drop rows of steps that will be taken again."""
        rows = [row for row in read_metrics(self.run) if row["step"] <= self.state.step]
        if rows or self.run.metrics.exists():
            write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def what_changed(run: RunDir, plan: Plan) -> str:
    """Say in which recipe keys, else in which part, a plan differs from the one a run was begun with, and the way back."""
    path = run.path / "recipe.yaml"
    new = flatten(plan.recipe)
    old = flatten(build(read_recipe(path), source=str(path), folder=run.path).recipe) if path.is_file() else new
    keys = [key for key in {**new, **old} if key.partition(".")[0] in _LEARNED and key not in _FREE]
    if keys := [key for key in keys if old.get(key) != new.get(key)]:
        changes = ", ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys)
        return f"{changes}. Go on with the old values (leave out --set)"
    tree = run.read_json("plan.json") if (run.path / "plan.json").is_file() else {}
    parts = {
        "the model's weights": (tree.get("model", {}).get("fingerprint"), plan.model.fingerprint()),
        "the tokenizer or its chat template": (tree.get("template"), plan.tokenizer.fingerprint()),
        "the train rows": (tree.get("data_hash"), plan.train.digest()),
    }
    found = [name for name, (before, now) in parts.items() if tree and before != now]
    named = " and ".join(found[:2]) or "the validation rows, the start adapter or the run's recipe.yaml"
    return f"{named} changed. Put back what was there"


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a last line cut by a kill is left out.

    Raises:
        RunError: another line is broken.
    """
    if not run.metrics.is_file():
        return []
    rows = []
    *whole, cut = run.metrics.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate([*whole, *([cut] if cut else [])], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number > len(whole):
                break
            raise RunError(f"{run.metrics}:{number}: not a line of metrics ({error}). Was it edited?") from error
        if not isinstance(row, dict) or not {"kind", "step"} <= set(row):
            raise RunError(f"{run.metrics}:{number}: not a line of metrics: no 'kind' and 'step'. Was it edited?")
        rows.append(row)
    return rows


def write_csv(run: RunDir) -> None:
    """Write metrics.csv, one row per step and evaluation, from metrics.jsonl."""
    rows = read_metrics(run)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(run.path / "metrics.csv", text.getvalue())


def read_state(checkpoint: Path) -> State:
    """Read state.json of a checkpoint.

    Raises:
        RunError: broken, or written by a newer version.
    """
    try:
        tree = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        state = State(**{item.name: tree[item.name] for item in fields(State)})
        if type(state.step) is not int or state.step < 0:
            raise ValueError(f"step {state.step!r}")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{checkpoint}: state.json is broken ({error!r}). Delete this checkpoint folder to go on from the one before."
        ) from error


def _check_moments(checkpoint: Path, weights: Arrays, moments: Arrays, step: int) -> None:
    """Refuse optimizer moments of which some are missing: an engine would begin those again from zero, without a word."""
    kinds: dict[str, set[str]] = {}
    for name in moments:
        weight, _, kind = name.rpartition(".")
        kinds.setdefault(weight, set()).add(kind)
    both = {"exp_avg", "exp_avg_sq"}
    lacking = [name for name in weights if name not in kinds or kinds[name] & both not in (set(), both)]
    if step and lacking:
        raise RunError(
            f"{checkpoint}: optimizer.safetensors lacks the moments of {lacking[0]} ({len(lacking)} such weights). Delete this checkpoint "
            "folder to go on from the one before."
        )


def save_arrays(arrays: Arrays, path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata={"format": "pt"})
    usual_mode(path)


def load_arrays(path: Path) -> Arrays:
    """Read a safetensors file as numpy arrays, half precision (float16, bfloat16) widened to float32.

    Raises:
        DataError: missing or broken.
    """
    try:
        found = sorted(
            deserialize(path.read_bytes()), key=lambda item: item[0]
        )  # its own order changes from run to run
        return {name: _to_array(info) for name, info in found}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fetch the file again, or train it again.") from error


def _load_saved(path: Path) -> Arrays:
    """Read a file of a checkpoint; see `load_arrays`.

    Raises:
        RunError: missing or broken.
    """
    try:
        return load_arrays(path)
    except DataError as error:
        raise RunError(
            f"{path}: cannot be read ({error.__cause__}). Delete this checkpoint folder to go on from the one before."
        ) from error


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


def _to_array(info: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[Any]]:
    raw = np.frombuffer(info["data"], _NUMPY[info["dtype"]])
    if info["dtype"] == "BF16":  # numpy has no bfloat16: its 16 bits are the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    elif info["dtype"] == "F16":
        raw = raw.astype(np.float32)
    return raw.reshape(info["shape"]).copy()


def _drops(plan: Plan) -> bool:
    """Whether anything is dropped out in training, so that its forward pass is not that of scoring."""
    return plan.recipe.lora.dropout > 0 or any(value for key, value in plan.model.config.items() if "dropout" in key)
