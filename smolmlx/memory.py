"""Memory: what a run is estimated to take, and what to say where it runs out, with the knobs that are still left to turn."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from smolmlx.errors import RunError

if TYPE_CHECKING:
    from smolmlx.backend import Decoding
    from smolmlx.plan import Plan


_LIVE_SCORES = 6
"""Arrays of a block's attention scores that stand side by side in its backward pass."""
_PROCESS_BYTES = 350_000_000
"""Python and an engine's libraries on a CPU, before a model is loaded."""


def estimate(plan: Plan) -> int:
    """Estimate peak training memory in bytes.

    Weights, float32 trainables with gradients and two moments, and the activations a backward pass keeps: per block and
    token about 10 widths and 4 inner widths. No engine keeps the attention's scores; on a CPU those of one block are
    whole for a moment, and the process itself counts. Good to about 30 %; `benchmarks/sft.py` compares.
    """
    config, wide = plan.model.config, 4 if plan.dtype == "float32" else 2
    width, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    heads = int(config.get("num_attention_heads", 1))
    row = max(plan.train.widths)
    tokens = plan.train.batch_size * row
    on_cpu = plan.capabilities.device == "cpu"
    scores = _LIVE_SCORES * heads * row * tokens * 4 if on_cpu else 0
    per_block = tokens * (10 * width + 4 * inner) * wide
    blocks = (
        per_block + plan.model.num_layers * tokens * width * wide
        if plan.recipe.train.gradient_checkpointing
        else per_block * plan.model.num_layers
    )
    head = plan.train.gather * int(config.get("vocab_size", 0)) * 4 * 2
    return weight_bytes(plan) + int(blocks + scores + head) + (_PROCESS_BYTES if on_cpu else 0)


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
    """Advice for a run, from its recipe's current values; what changes the result least comes first."""
    recipe, widest = plan.recipe, max(plan.train.widths)
    train = recipe.train
    knobs = []
    if train.batch_size > 1:
        share = _smallest_factor(train.batch_size)
        knobs.append(
            f"--set train.batch_size={train.batch_size // share} --set train.accumulation={train.accumulation * share} (as many rows a step)"
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
    kind = "pair" if plan.pairs is not None else "row"
    at = f"{train.batch_size} {kind}{'s' if train.batch_size > 1 else ''} of up to {widest} tokens"
    return _message(f"while training, with {at} at once", knobs)


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
    last = "a smaller model, or a machine with more memory"
    if not knobs:
        return f"out of memory {when}. What is left: {last}."
    return f"out of memory {when}. Turn one of these, first the first: {'; '.join([*knobs, last])}."


def _smallest_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)
