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

from smolmlx.data.pair_batches import PairBatch, PairPlan
from smolmlx.data.store import TokenStore, cache_folder
from smolmlx.errors import DataError, RunError
from smolmlx.models import read_header
from smolmlx.plan import Plan
from smolmlx.preferences import Pairs, rounding_room
from smolmlx.rundir import RunDir, usual_mode, write_text, writing
from smolmlx.weight_files import weight_files

Floats = npt.NDArray[np.float64]
_DIGEST_BYTES = 16
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
    made: bool = False
    """Those of the train pairs were made by this process, in the shapes of its first epoch."""


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

    A file that is broken is made again, and `note` told so.

    Raises:
        DataError: a file that belongs to another model, adapter, template or rows.
        RunError: a score is not a number.
    """
    if plan.recipe.dpo.loss == "orpo":
        return References()
    assert plan.pairs is not None
    train, made = _obtain(plan, plan.pairs, run.start / "reference_train.safetensors", score, note)
    validation = None
    if plan.validation_pairs is not None:
        own = run.start / "reference_validation.safetensors"
        validation, _ = _obtain(plan, plan.validation_pairs, own, score, note)
    return References(train, validation, made)


def _obtain(
    plan: Plan, pairs: PairPlan, own: Path, score: ScoreBatch, note: Callable[[str], None]
) -> tuple[Floats, bool]:
    """Return log-probabilities, and whether they were made now."""
    content = content_hash(plan, pairs)
    changed = "The rows, the model or the template changed since this run began. Start a new run."
    kept = _read(own, content, len(pairs), note, changed)
    if kept is not None:
        return kept, False
    shared = cache_folder() / "references" / f"{_file_hash(plan, content)}.safetensors"
    again = "Delete the file; it will be made again."
    log_probs = _read(shared, content, len(pairs), note, again) if plan.recipe.dpo.cache else None
    made = log_probs is None
    if log_probs is not None:
        note(f"reference: log-probabilities of {len(pairs)} pairs from {shared}")
    else:
        began = time.perf_counter()
        log_probs = measure(pairs, score)
        note(f"reference: log-probabilities of {len(pairs)} pairs made in {time.perf_counter() - began:.1f} s")
        if plan.recipe.dpo.cache:
            _write(shared, content, log_probs)
    _write(own, content, log_probs)
    return log_probs, made


def measure(pairs: PairPlan, score: ScoreBatch) -> Floats:
    """Score every pair once, in the shapes of the first epoch: [pairs, 2].

    Raises:
        RunError: a score is not a number.
    """
    scored = Scored.collect((batch.pairs, score(batch)) for batch in pairs.evaluation())
    found = np.zeros((len(pairs), 2))
    found[scored.pairs] = scored.log_probs
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
        raise RunError(
            f"the start weights give the answers of {len(bad)} of {len(pairs)} pairs a log-probability that is not a number "
            f"(pair {bad[0] + 1}: {found[bad[0]].tolist()}). Set model.dtype: float32; if it stays, the model's or the adapter's "
            "weights are damaged."
        )
    return found


def content_hash(plan: Plan, pairs: PairPlan) -> str:
    """Hash of the base model, the start adapter and the rows as tokens, which the template has made.

    New LoRA weights change nothing (B is zero), so their seed does not count.
    """
    start = plan.start.content_hash() if plan.start else "base"
    weights = [_weights_hash(path) for path in weight_files(plan.model.folder)]
    parts = (plan.model.fingerprint(), *weights, start, _rows_hash(pairs.order.store))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _rows_hash(store: TokenStore) -> str:
    """Hash of what is scored, whatever files and options it came from."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for array in (store.offsets, store.ids, store.mask):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _weights_hash(path: Path) -> str:
    """Hash of a whole file, kept in the cache until the file changes: gigabytes are read once, not in every run."""
    known = path.stat()
    name = f"{path.resolve()} {known.st_size} {known.st_mtime_ns} {known.st_ctime_ns}"
    kept = cache_folder() / "weights" / hashlib.sha256(name.encode()).hexdigest()[:24]
    if kept.is_file() and len(found := kept.read_text(encoding="utf-8")) == 2 * _DIGEST_BYTES:
        return found
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()
    write_text(kept, found)
    return found


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


def _read(path: Path, content: str, pairs: int, note: Callable[[str], None], advice: str) -> Floats | None:
    """Return kept log-probabilities; None where there are none, or none that can be used.

    Args:
        advice: what to do about those of something else.

    Raises:
        DataError: they are whole, and of something else.
    """
    if not path.is_file():
        return None
    try:
        metadata = read_header(path).get("__metadata__", {})
        ((_, info),) = deserialize(path.read_bytes())
        found = np.frombuffer(info["data"], "<f8").reshape(info["shape"])
    except (OSError, ValueError, KeyError, SafetensorError, DataError):
        note(f"reference: {path} is broken, and is made again")
        return None
    if metadata.get("content") != content or found.shape != (pairs, 2):
        raise DataError(
            f"{path}: log-probabilities of another model, adapter, template or rows (content {metadata.get('content')}, this run's is "
            f"{content}). {advice}"
        )
    if not np.isfinite(found).all():
        note(f"reference: {path} holds values that are not numbers, and is made again")
        return None
    return np.array(found)


def check_sharing(plan: Plan, score: ScoreBatch) -> None:
    """Score two pairs with their prompt computed once and twice; a model whose layers do more than attend may differ.

    Raises:
        RunError: the log-probabilities differ by more than rounding.
    """
    pairs = plan.pairs
    if pairs is None or not pairs.shared:
        return
    rows = pairs.order.epoch_order(0)[0][:2]
    advice = "Set dpo.shared_prompt: false."
    together, alone = pairs.build(rows), pairs.apart().build(rows)
    try:
        one, two = (score(batch)[: 2 * len(rows)] for batch in (together, alone))
    except (AttributeError, TypeError) as error:
        raise RunError(f"this model cannot compute a prompt once for two answers ({error}). {advice}") from error
    room = rounding_room(two, alone.num_tokens[: 2 * len(rows)], plan.dtype)
    if not (np.abs(one - two) <= room).all():
        raise RunError(
            f"this model gives other log-probabilities where a prompt is computed once for both answers ({one.tolist()} instead of "
            f"{two.tolist()}). {advice}"
        )
