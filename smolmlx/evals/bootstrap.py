"""How sure a mean or a difference is: seeded percentile bootstrap (Efron, 1979) over rows, paired for a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
DRAWS = 10_000
MIN_ROWS = 6
"""With fewer rows even unanimous signs leave a two-sided sign test above 0.05 (2 / 2**5 = .0625)."""

_MAX_CELLS = 1 << 21
"""Resampled values held at once: 16 MiB of indices."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over rows and its bootstrap interval."""

    mean: float
    low: float
    high: float
    num_rows: int
    level: float = LEVEL

    @property
    def shows_difference(self) -> bool:
        """The interval leaves out 0, and there are rows enough for that to mean something."""
        return self.num_rows >= MIN_ROWS and (self.low > 0 or self.high < 0)


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64], *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return the mean of the values and its percentile interval.

    The same values, draws and seed give the same interval. Raises ValueError for no values or one that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or not rows.size or not np.isfinite(rows).all():
        raise ValueError(f"bootstrap_mean: expected one or more finite numbers, got an array of shape {rows.shape}")
    mean = float(rows.mean())
    tail = (1 - level) / 2
    low, high = np.quantile(_resampled_means(rows, draws, seed), [tail, 1 - tail])
    # Rounding may put the mean of equal values just outside its own resamples.
    return Interval(mean, min(float(low), mean), max(float(high), mean), rows.size, level)


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return the mean of first - second and its interval, resampling rows with both of their values."""
    if len(first) != len(second):
        raise ValueError(f"bootstrap_difference: paired values differ in number: {len(first)} and {len(second)}")
    paired = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap_mean(paired, draws=draws, seed=seed, level=level)


def difference_sentence(difference: Interval, metric: str, first: str, second: str) -> str:
    """Say what an interval of first - second shows, without a claim where it contains 0 or has under MIN_ROWS rows."""
    spread = f"{difference.level * 100:g} % interval {difference.low:+.3g} to {difference.high:+.3g}"
    evidence = f"{spread}, n={difference.num_rows}"
    if not difference.shows_difference:
        return f"{metric}: no difference shown between {first} and {second} ({difference.mean:+.3g}, {evidence})."
    direction = "higher" if difference.mean > 0 else "lower"
    return f"{metric}: {first} is {direction} than {second} by {abs(difference.mean):.3g} ({evidence})."


def _resampled_means(rows: npt.NDArray[np.float64], draws: int, seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_CELLS // rows.size)
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    return np.concatenate([rows[rng.integers(rows.size, size=(size, rows.size))].mean(axis=1) for size in sizes])
