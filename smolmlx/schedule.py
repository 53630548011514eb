"""How many optimizer steps a run takes, the learning rate of each, and when something comes round."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from smolmlx.errors import RecipeError
from smolmlx.recipe import Train

MAX_STEPS = 100_000_000


def count_steps(train: Train, steps_per_epoch: int) -> int:
    """Return optimizer steps in all: whole epochs, a last partial one rounded up, or max_steps.

    Raises:
        RecipeError: more steps than a learning rate can be kept of for each.
    """
    whole = math.ceil(train.epochs * steps_per_epoch - 1e-9)
    steps = min(whole, train.max_steps) if train.max_steps else whole
    if steps > MAX_STEPS:
        raise RecipeError(f"train.epochs: {train.epochs:g} epochs are {steps:.3g} steps, more than {MAX_STEPS:,}.")
    return steps


def learning_rates(train: Train, steps: int) -> npt.NDArray[np.float64]:
    """Return the learning rate of each optimizer step.

    Step k below the warm-up w takes base*(k+1)/w; then constant, or linear or cosine towards min_lr_ratio, which
    the step after the last would have (as in transformers).
    """
    warmup = round(train.warmup * steps) if train.warmup < 1 else int(train.warmup)
    if train.warmup > 0:
        warmup = max(1, min(warmup, steps))
    k = np.arange(steps, dtype=np.float64)
    progress = np.clip((k - warmup) / max(1, steps - warmup), 0.0, 1.0)
    floor = train.min_lr_ratio
    decay = {
        "constant": np.ones(steps),
        "linear": 1.0 - (1.0 - floor) * progress,
        "cosine": floor + (1.0 - floor) * 0.5 * (1.0 + np.cos(np.pi * progress)),
    }[train.schedule]
    factor = np.where(k < warmup, (k + 1) / max(1, warmup), decay)
    return np.asarray(train.learning_rate * factor)


def moments(every: int | str | None, steps: int, steps_per_epoch: int) -> frozenset[int]:
    """Return the steps, counted from 1, at which `eval.every` or `save.every` comes round."""
    if every is None or every == "end":
        return frozenset()
    stride = steps_per_epoch if every == "epoch" else int(every)
    return frozenset(range(stride, steps + 1, stride))
