"""Memory: what a run is estimated to take, and what to say where it runs out, with the knobs that are still left to turn."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from smolmlx.errors import RecipeError, RunError

if TYPE_CHECKING:
    from smolmlx.backend import Decoding
    from smolmlx.plan import Plan


_LIVE_SCORES = 6
"""Arrays of a block's attention scores that stand side by side in its backward pass."""
_PROCESS_BYTES = 350_000_000
"""Python and an engine's libraries on a CPU, before a model is loaded."""
REFUSED_FACTOR = 2
"""Estimates are good to tens of percent: from the device's memory on a run is warned of, beyond this many times it is refused."""


def host_bytes() -> int | None:
    """Return the machine's memory; None where the system does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not set(names) <= set(os.sysconf_names):
        return None
    size, pages = map(os.sysconf, names)
    return size * pages


def keep_freed() -> None:
    """Tell glibc to reuse freed buffers instead of handing them back to the kernel.

    The CPU allocators of MLX and PyTorch are plain malloc, which maps every large buffer afresh and pays for its page faults.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc and hasattr(libc, "mallopt"):  # not with musl, nor on macOS
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest that glibc takes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def estimate(plan: Plan) -> int:
    """Estimate peak training memory in bytes.

    Weights, float32 trainables with gradients and two moments, and the activations a backward pass keeps: per block and
    token about 10 widths and 4 inner widths. No engine keeps the attention's scores; on a CPU those of one block are
    whole for a moment, and the process itself counts. Good to about 30 %, on a CPU too high for rows of thousands of tokens,
    whose scores are made in pieces; `benchmarks/sft.py` compares.
    """
    if plan.capabilities.device != "cpu":
        return _kept_bytes(plan)
    row = max(plan.train.widths)
    scores = _LIVE_SCORES * int(plan.model.config.get("num_attention_heads", 1)) * row * plan.train.batch_size * row * 4
    return _kept_bytes(plan) + scores + _PROCESS_BYTES


def _kept_bytes(plan: Plan) -> int:
    """Bytes of weights, moments, activations and logits, which no engine does without."""
    config, wide = plan.model.config, 4 if plan.dtype == "float32" else 2
    width, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    tokens = plan.train.batch_size * max(plan.train.widths)
    per_block = tokens * (10 * width + 4 * inner) * wide
    blocks = (
        per_block + plan.model.num_layers * tokens * width * wide
        if plan.recipe.train.gradient_checkpointing
        else per_block * plan.model.num_layers
    )
    head = plan.train.gather * int(config.get("vocab_size", 0)) * 4 * 2
    return weight_bytes(plan) + int(blocks + head)


def check(plan: Plan) -> str | None:
    """Return what to say of a run that may not fit its device; None where it fits, or the device's memory is not known.

    Raises:
        RecipeError: it cannot fit: weights, gradients and moments alone fill the device, or what is kept beside them is
            beyond `REFUSED_FACTOR` times the device's memory.
    """
    limit, bare = plan.capabilities.memory_bytes, weight_bytes(plan)
    if limit is None:
        return None
    if bare > limit:
        knobs = ["a smaller model", "train.method: lora" if plan.full else "a smaller lora.r"]
        knobs += ["model.quantize: 4bit"] if can_pack(plan) else []
        raise RecipeError(
            f"{plan.loaded.source}: weights, gradients and moments alone take {bare / 1e9:.1f} GB, the device has {limit / 1e9:.1f} GB. "
            f"Take {', '.join(knobs[:-1])} or {knobs[-1]}."
        )
    if plan.memory_bytes <= limit:
        return None
    text = f"needs about {plan.memory_bytes / 1e9:.1f} GB of memory, and the device has {limit / 1e9:.1f} GB. {_turn(_training_knobs(plan))}"
    if _kept_bytes(plan) > REFUSED_FACTOR * limit:
        raise RecipeError(f"{plan.loaded.source}: {text}")
    return text


def can_pack(plan: Plan) -> bool:
    """Whether a quantized base takes less memory: a CPU multiplies whole weights, so there its values are held unpacked."""
    return plan.capabilities.device != "cpu"


def weight_bytes(plan: Plan) -> int:
    """Bytes of the base weights and of float32 trainables with gradient and two moments."""
    wide = 4.0 if plan.dtype == "float32" else 2.0
    quantize = plan.recipe.model.quantize if can_pack(plan) else "none"
    per_weight = {"none": wide, "8bit": 1.1, "4bit": 0.6}[quantize]
    return int(plan.num_parameters * per_weight + plan.num_trainable * (12 if plan.full else 16))


@contextlib.contextmanager
def guard(ran_out: Callable[[Exception], bool], advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into a message.

    Args:
        ran_out: whether an engine's own error means that memory has run out.

    Raises:
        RunError: with the advice.
    """
    try:
        yield
    except MemoryError as error:
        raise RunError(advice()) from error
    except (RuntimeError, OSError) as error:
        full = error.errno == errno.ENOMEM if isinstance(error, OSError) else ran_out(error)
        if not full:
            raise
        raise RunError(advice()) from error


def training(plan: Plan) -> str:
    """Advice for a run that ran out."""
    rows, kind = plan.train.batch_size, "pair" if plan.pairs is not None else "row"
    at = f"{rows} {kind}{'s' if rows > 1 else ''} of up to {max(plan.train.widths)} tokens"
    return _message(f"while training, with {at} at once", _training_knobs(plan))


def _training_knobs(plan: Plan) -> list[str]:
    """Return what lowers a run's memory, from its recipe's current values; what changes the result least comes first."""
    recipe, widest = plan.recipe, max(plan.train.widths)
    train, rows = recipe.train, plan.train.batch_size
    knobs = []
    if rows > 1:
        share = _share_that_fits(plan)
        knobs.append(
            f"--set train.batch_size={rows // share} --set train.accumulation={train.accumulation * share} (as many rows a step)"
        )
    if not train.gradient_checkpointing:
        knobs.append("--set train.gradient_checkpointing=true (slower)")
    if plan.full and recipe.model.config is None:
        knobs.append("--set train.method=lora")
    if not plan.full and plan.dtype == "float32" and plan.capabilities.device != "cpu":  # where bfloat16 is slow
        knobs.append("--set model.dtype=bfloat16")
    if not plan.full and can_pack(plan) and recipe.model.quantize != "4bit" and "4bit" in plan.capabilities.quantize:
        knobs.append("--set model.quantize=4bit")
    if widest >= 128:
        knobs.append(f"--set data.max_length={widest // 2}")
    return knobs


def _share_that_fits(plan: Plan) -> int:
    """Return what to divide the batch by: once at least, and on until the estimate fits the device or one row is left."""
    rows, limit = plan.train.batch_size, plan.capabilities.memory_bytes
    share = _smallest_factor(rows)
    while limit is not None and share < rows and estimate(_with_batch(plan, rows // share)) > limit:
        share *= _smallest_factor(rows // share)
    return share


def _with_batch(plan: Plan, rows: int) -> Plan:
    """Return the plan with fewer rows at once, good enough for an estimate."""
    gather = math.ceil(plan.train.gather * rows / plan.train.batch_size)
    return replace(plan, train=replace(plan.train, batch_size=rows, gather=gather))


def loading(name: str, quantize: bool) -> str:
    """Advice for a model that does not fit.

    Args:
        quantize: whether the base could be quantized further.
    """
    return _message(f"while loading {name}", ["--quantize 4bit"] if quantize else [])


def answering(prompts: Sequence[Sequence[int]], how: Decoding, quantize: bool) -> str:
    """Advice for generation."""
    # A server's rows come later.
    rows, longest = min(how.batch_size, len(prompts) or how.batch_size), max(map(len, prompts), default=0)
    knobs = []
    if rows > 1:
        knobs.append(f"--batch-size {rows // 2} (in a recipe evaluate.batch_size)")
    if how.max_tokens > 64:
        knobs.append(f"--max-tokens {how.max_tokens // 2} (in a recipe evaluate.max_tokens, samples.max_tokens)")
    if quantize:
        knobs.append("--quantize 4bit (in a recipe model.quantize)")
    at = f"{rows} prompt{'s' if rows > 1 else ''} of up to {longest} tokens"
    return _message(f"while answering {at} at once, {how.max_tokens} tokens each", knobs)


def scoring(rows: int, width: int, quantize: bool) -> str:
    """Advice for scoring a batch."""
    knobs = []
    if rows > 1:
        knobs.append(f"--batch-size {rows // 2}")
    if quantize:
        knobs.append("--quantize 4bit (in a recipe model.quantize)")
    if width >= 128:
        knobs.append(f"data.max_length: {width // 2} in the recipe")
    return _message(f"while scoring {rows} row{'s' if rows > 1 else ''} of {width} tokens at once", knobs)


def _message(when: str, knobs: Sequence[str]) -> str:
    return f"out of memory {when}. {_turn(knobs)}"


def _turn(knobs: Sequence[str]) -> str:
    last = "a smaller model, or a machine with more memory"
    return f"Turn one of these, first the first: {'; '.join([*knobs, last])}." if knobs else f"What is left: {last}."


def _smallest_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)
