"""Out of memory: an engine's error becomes one message, with the knobs that are still left to turn."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from smolmlx.errors import RunError

if TYPE_CHECKING:
    from smolmlx.backend import Decoding
    from smolmlx.plan import Plan


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
    on_cpu = plan.capabilities.device == "cpu"  # where bfloat16 is slow, and quantized values are held whole
    if not (plan.full or on_cpu) and plan.dtype == "float32":
        knobs.append("--set model.dtype=bfloat16")
    if not (plan.full or on_cpu) and recipe.model.quantize != "4bit" and "4bit" in plan.capabilities.quantize:
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
