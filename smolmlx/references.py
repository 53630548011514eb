"""Log-probabilities of every answer under the policy that training starts from: made once, kept, and used by any engine.

They are what the policy is compared with, so no second model is held while training. A run keeps its own copy, for a
resume; the user's cache keeps one by content, for the next run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from smolmlx.data.pair_batches import PairBatch, PairPlan, plan_pairs
from smolmlx.data.store import cache_folder
from smolmlx.errors import DataError, RunError
from smolmlx.models import read_header
from smolmlx.plan import Plan
from smolmlx.preferences import Pairs
from smolmlx.rundir import RunDir, usual_mode, writing

Floats = npt.NDArray[np.float64]
ScoreBatch = Callable[[PairBatch], npt.NDArray[np.float32]]
"""Gives the summed log-probability of each row of a micro-batch's tails, [2B], nats, without dropout."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of some pairs' answers."""

    pairs: npt.NDArray[np.int64]
    """[N]; the number of each pair in the data."""
    log_probs: Floats
    """[N, 2]; chosen and rejected, summed over supervised tokens, nats."""

    @staticmethod
    def collect(batches: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]) -> Scored:
        """Join the pairs [B] and scores [2B] of micro-batches, leaving out what only fills them up."""
        numbers, found = [], []
        for pairs, scores in batches:
            real = pairs >= 0
            numbers.append(pairs[real])
            found.append(scores.astype(np.float64).reshape(-1, 2)[real])
        return Scored(np.concatenate(numbers), np.concatenate(found))


@dataclass(frozen=True, slots=True)
class References:
    """[pairs, 2] for the train and the validation pairs; None where a loss needs no reference, or there are none."""

    train: Floats | None = None
    validation: Floats | None = None


def of_batch(reference: Floats | None, batch: PairBatch) -> npt.NDArray[np.float32]:
    """Return the reference's log-probabilities in the order of a micro-batch's tails, [2B]; zeros where there are none."""
    found = np.zeros((len(batch.pairs), 2), np.float32)
    if reference is not None:
        real = batch.pairs >= 0
        found[real] = reference[batch.pairs[real]]
    return found.reshape(-1)


def compare(plan: PairPlan, reference: Floats | None, scored: Scored) -> Pairs:
    """Put an engine's log-probabilities beside the reference's."""
    tokens = plan.answer_tokens[scored.pairs].astype(np.float64)
    known = np.zeros((len(scored.pairs), 2)) if reference is None else reference[scored.pairs]
    both = (scored.log_probs, known, tokens)
    return Pairs(*(array[:, side] for array in both for side in (0, 1)))


def obtain(plan: Plan, run: RunDir, score: ScoreBatch, note: Callable[[str], None]) -> References:
    """Return the reference's log-probabilities: the run's own, the cache's, or made now with `score`.

    Raises:
        DataError: a file that belongs to another model, adapter, template or rows.
    """
    if plan.recipe.dpo.loss == "orpo":
        return References()
    found = {}
    for name, pairs in (("train", plan.pairs), ("validation", plan.validation_pairs)):
        if pairs is not None:
            found[name] = _obtain(plan, pairs, run.start / f"reference_{name}.safetensors", score, note)
    return References(**found)


def _obtain(plan: Plan, pairs: PairPlan, own: Path, score: ScoreBatch, note: Callable[[str], None]) -> Floats:
    content = content_hash(plan, pairs)
    shared = cache_folder() / "references" / f"{_file_hash(plan, content)}.safetensors"
    if own.is_file():
        return _read(own, content, len(pairs))
    if plan.recipe.dpo.cache and shared.is_file():
        log_probs = _read(shared, content, len(pairs))
        note(f"reference: log-probabilities of {len(pairs)} pairs from {shared}")
    else:
        began = time.perf_counter()
        log_probs = measure(pairs, score)
        note(f"reference: log-probabilities of {len(pairs)} pairs made in {time.perf_counter() - began:.1f} s")
        if plan.recipe.dpo.cache:
            _write(shared, content, log_probs)
    _write(own, content, log_probs)
    return log_probs


def measure(pairs: PairPlan, score: ScoreBatch) -> Floats:
    """Score every pair once, in the shapes of the first epoch: [pairs, 2]."""
    scored = Scored.collect((batch.pairs, score(batch)) for batch in pairs.evaluation())
    found = np.zeros((len(pairs), 2))
    found[scored.pairs] = scored.log_probs
    return found


def content_hash(plan: Plan, pairs: PairPlan) -> str:
    """Hash of the base model, the start adapter, the template and the rows, in tokens.

    New LoRA weights change nothing (B is zero), so their seed does not count.
    """
    start = plan.start.content_hash() if plan.start else "base"
    parts = (plan.model.fingerprint(), start, plan.tokenizer.fingerprint(), pairs.order.store.key)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _file_hash(plan: Plan, content: str) -> str:
    """Add how numbers are rounded: alike on every engine in float32, each in its own way in 16 bits and quantized."""
    quantize = plan.recipe.model.quantize
    exact = plan.dtype == "float32" and quantize == "none"
    rounding = "float32" if exact else f"{plan.dtype} {quantize} {plan.backend} {plan.capabilities.device}"
    return hashlib.sha256(f"{content} {rounding}".encode()).hexdigest()[:24]


def _write(path: Path, content: str, log_probs: Floats) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{time.monotonic_ns()}")
        save_file({"log_probs": log_probs}, temporary, metadata={"content": content})
        usual_mode(temporary)
        temporary.replace(path)


def _read(path: Path, content: str, pairs: int) -> Floats:
    try:
        metadata = read_header(path).get("__metadata__", {})
        ((_, info),) = deserialize(path.read_bytes())
        found = np.frombuffer(info["data"], "<f8").reshape(info["shape"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete the file; it will be made again.") from error
    if metadata.get("content") != content or found.shape != (pairs, 2):
        raise DataError(
            f"{path}: log-probabilities of another model, adapter, template or rows (content {metadata.get('content')}, this run's is "
            f"{content}). Delete the file; it will be made again."
        )
    return np.array(found)


_SAME, _SAME_ROUNDED = 1e-3, 0.05
"""Room for rounding, nats for each 10 nats of an answer: in float32, and in 16 bits."""


def check_sharing(plan: Plan, score: ScoreBatch) -> None:
    """Score two pairs with their prompt computed once and twice; a model whose layers do more than attend may differ.

    Raises:
        RunError: the log-probabilities differ by more than rounding.
    """
    pairs = plan.pairs
    if pairs is None or not pairs.shared:
        return
    apart = plan_pairs(pairs.order.store, batch_size=pairs.order.batch_size, pad_id=pairs.order.pad_id)
    rows = pairs.order.epoch_order(0)[0][:2]
    advice = "Set dpo.shared_prompt: false."
    try:
        one, two = (score(layout.build(rows))[: 2 * len(rows)] for layout in (pairs, apart))
    except (AttributeError, TypeError) as error:
        raise RunError(f"this model cannot compute a prompt once for two answers ({error}). {advice}") from error
    room = (_SAME if plan.dtype == "float32" else _SAME_ROUNDED) * max(1.0, float(np.abs(two).max()) / 10)
    if not np.abs(one - two).max() <= room:
        raise RunError(
            f"this model gives other log-probabilities where a prompt is computed once for both answers ({one.tolist()} instead of "
            f"{two.tolist()}). {advice}"
        )
