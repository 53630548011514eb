"""How fast this machine trains and answers, on the paths that `train` and `generate` take; medians of repeats in turn."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smolmlx import stages
from smolmlx.backend import Choice, Decoding, Generator
from smolmlx.plan import Plan
from smolmlx.session import Event

WARM_UP = 3
"""First steps of a training that are left out: an engine traces and compiles in them."""
STEPS_ONLY: Mapping[str, Any] = {
    "train.epochs": 1e6, "data.validation": None, "data.validation_share": 0.0,
    "eval": {}, "save": {"every": None}, "samples": {}, "evaluate": None, "loggers": [],
}  # fmt: skip
"""What turns a recipe into its training steps alone; max_steps is set beside it."""

OnRun = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class TrainingSpeed:
    """Of one way to train."""

    tokens_per_second: float
    """Median over the repeats; tokens of the rows, padding not counted."""
    supervised_per_second: float
    seconds_per_step: float
    peak_bytes: int | None
    """Highest of all repeats, as the engine reports it; on a CPU that of the whole process so far."""
    repeats: tuple[float, ...]
    """Tokens per second of each repeat."""


@dataclass(frozen=True, slots=True)
class AnswerSpeed:
    """Of answers in batches of one size."""

    tokens_per_second: float
    """Generated tokens, the prompts' processing inside the time; median over the repeats."""
    repeats: tuple[float, ...]


def measure_training(
    plans: Mapping[str, Plan], choice: Choice, repeats: int, on_run: OnRun = lambda name, turn: None
) -> dict[str, TrainingSpeed]:
    """Train each plan `repeats` times, in turn, each time anew in a folder that goes; the first WARM_UP steps do not count.

    Args:
        plans: name -> a plan of more than WARM_UP steps, without evaluation, samples or checkpoints (STEPS_ONLY).
    """
    found: dict[str, list[list[Mapping[str, Any]]]] = {name: [] for name in plans}
    for turn, name in itertools.product(range(repeats), plans):
        on_run(name, turn)
        found[name].append(_train(plans[name], choice))
    return {name: _summarise(turns) for name, turns in found.items()}


def _train(plan: Plan, choice: Choice) -> list[Mapping[str, Any]]:
    steps: list[Mapping[str, Any]] = []

    def keep(event: Event) -> None:
        if event.kind == "step":
            steps.append(event.values)

    with tempfile.TemporaryDirectory(prefix="smolmlx-bench-") as folder:
        stages.train(plan, choice, stages.start_run(plan, Path(folder), "bench"), keep)
    return steps


def _summarise(turns: Sequence[Sequence[Mapping[str, Any]]]) -> TrainingSpeed:
    def rate(of: str) -> tuple[float, ...]:
        return tuple((t[-1][of] - t[WARM_UP - 1][of]) / sum(step["seconds"] for step in t[WARM_UP:]) for t in turns)

    tokens, supervised = rate("num_tokens"), rate("num_supervised")
    seconds = statistics.median(step["seconds"] for turn in turns for step in turn[WARM_UP:])
    peaks = [step["peak_bytes"] for turn in turns for step in turn if step["peak_bytes"]]
    return TrainingSpeed(
        statistics.median(tokens), statistics.median(supervised), seconds, max(peaks, default=None), tokens
    )


def measure_answers(
    generator: Generator, vocabulary: int, prompt_tokens: int, max_tokens: int, batch_sizes: Sequence[int], repeats: int
) -> dict[int, AnswerSpeed]:
    """Answer a batch of random prompts of each size `repeats` times, in turn, after one that does not count.

    Args:
        vocabulary: token ids are drawn below it; prompts have from half of `prompt_tokens` to all of them.
    """
    dice = np.random.default_rng(0)
    lengths = [max(1, prompt_tokens - i * prompt_tokens // (2 * size)) for size in batch_sizes for i in range(size)]
    drawn = iter(dice.integers(0, vocabulary, length).tolist() for length in lengths)
    prompts = {size: list(itertools.islice(drawn, size)) for size in batch_sizes}
    found: dict[int, list[float]] = {size: [] for size in batch_sizes}
    for turn, size in itertools.product(range(repeats + 1), batch_sizes):
        began = time.perf_counter()
        made = generator.generate(prompts[size], Decoding(max_tokens=max_tokens, batch_size=size))
        count = sum(len(answer.ids) for answer in made)
        if turn:
            found[size].append(count / (time.perf_counter() - began))
    return {size: AnswerSpeed(statistics.median(rates), tuple(rates)) for size, rates in found.items()}
