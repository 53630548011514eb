"""What is asked of every prompt before a model answers it, on the command line and from Python."""

from __future__ import annotations

from collections.abc import Sequence

from smolmlx.errors import DataError, SmolError


def check_lengths(
    prompts: Sequence[Sequence[int]], context: int | None, source: str, family: type[SmolError] = DataError
) -> None:
    """Refuse prompts without a token, and those that leave no room for an answer.

    Args:
        prompts: their tokens.
        context: most tokens of a prompt and its answer, where the model has such a bound.
        source: where the prompts come from, for the message.
        family: of the error; what was typed is no data.
    """
    wanted = "at least 1" if context is None else f"1 to {context - 1}, as the model's context is {context}"
    sizes = [len(prompt) for prompt in prompts]
    bad = [(n, size) for n, size in enumerate(sizes, 1) if not size or (context is not None and size >= context)]
    if bad and len(sizes) == 1:
        raise family(f"{source}: {sizes[0]} tokens; expected {wanted}.")
    if bad:
        raise family(f"{source}: prompts must have {wanted}", [f"row {n}: {size} tokens" for n, size in bad])
