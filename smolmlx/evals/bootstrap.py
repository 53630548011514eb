"""How sure a mean or a difference is: seeded percentile bootstrap (Efron, 1979), paired for a difference.

Rows are resampled; rows of one group (the rows of a concept, say) are not independent and are resampled together
(cluster bootstrap: Davison and Hinkley, 1997, section 3.8).
"""

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
_MAX_COLUMNS = 256
"""Columns whose resampled means are held at once: 20 MiB at 10,000 draws."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over rows and its bootstrap interval."""

    mean: float
    low: float
    high: float
    num_rows: int
    level: float = LEVEL
    num_groups: int = 0
    """Groups that were resampled whole; 0 where each row stands for itself."""

    @property
    def num_units(self) -> int:
        """Groups, or rows where each stands for itself: what was resampled."""
        return self.num_groups or self.num_rows

    @property
    def shows_difference(self) -> bool:
        """The interval leaves out 0, and there are rows (or groups) enough for that to mean something."""
        return self.num_units >= MIN_ROWS and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        """The mean and its interval, e.g. 0.153 [0.101, 0.210]; the mean alone where there was nothing to resample."""
        spread = f" [{self.low:.3f}, {self.high:.3f}]" if self.num_units > 1 else ""
        return f"{self.mean:.3f}{spread}"


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64], *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return the mean of the values and its percentile interval.

    The same values, draws and seed give the same interval. Raises ValueError for no values or one that is not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1:
        raise ValueError(f"bootstrap_mean: expected one or more finite numbers, got an array of shape {rows.shape}")
    return bootstrap_means(rows[:, None], draws=draws, seed=seed, level=level)[0]


def bootstrap_ratio(
    totals: Sequence[float], counts: Sequence[int], *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return sum(totals) / sum(counts) over rows and its interval, such as nats over tokens; rows are resampled whole.

    Raises ValueError as `bootstrap_mean`, and for a count that is not positive.
    """
    if len(totals) != len(counts) or not all(count > 0 for count in counts):
        raise ValueError(f"bootstrap_ratio: {len(totals)} totals and {len(counts)} counts, which must be positive")
    column = np.asarray(totals, dtype=np.float64)[:, None]
    weights = np.asarray(counts, dtype=np.float64)
    return bootstrap_means(column, weights, draws=draws, seed=seed, level=level)[0]


def bootstrap_means(
    columns: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64] | None = None,
    *,
    groups: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Interval]:
    """Return the interval of every column of [N, K] values over the same N rows.

    All columns are resampled alike, so that many cost little more than one. Raises ValueError as `bootstrap_mean`.

    Args:
        weights: [N] what each row counts in the denominator; left out, 1.
        groups: [N] which rows belong together; left out, or with a row that belongs nowhere (''), rows are resampled.
    """
    if columns.ndim != 2 or not columns.shape[0] or not np.isfinite(columns).all():
        raise ValueError(f"bootstrap_mean: expected one or more finite numbers, got an array of shape {columns.shape}")
    num_rows = columns.shape[0]
    weights = np.ones(num_rows) if weights is None else weights
    names = list(dict.fromkeys(groups)) if groups and all(groups) else []
    if names:
        places = {name: place for place, name in enumerate(names)}
        member = np.zeros((len(names), num_rows))
        member[[places[group] for group in groups], np.arange(num_rows)] = 1
        columns, weights = member @ columns, member @ weights
    tail = (1 - level) / 2
    found: list[Interval] = []
    for start in range(0, columns.shape[1], _MAX_COLUMNS):
        part = columns[:, start : start + _MAX_COLUMNS]
        lows, highs = np.quantile(_resampled_means(part, weights, draws, seed), [tail, 1 - tail], axis=0)
        means = part.sum(axis=0) / weights.sum()
        for mean, low, high in zip(means.tolist(), lows.tolist(), highs.tolist(), strict=True):
            # Rounding may put the mean of equal values just outside its own resamples.
            found.append(Interval(mean, min(low, mean), max(high, mean), num_rows, level, len(names)))
    return found


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    groups: Sequence[str] = (),
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Return the mean of first - second and its interval, resampling rows (or groups) with both of their values."""
    if len(first) != len(second):
        raise ValueError(f"bootstrap_difference: paired values differ in number: {len(first)} and {len(second)}")
    paired = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if paired.ndim != 1:
        raise ValueError(f"bootstrap_difference: expected numbers, got an array of shape {paired.shape}")
    return bootstrap_means(paired[:, None], groups=groups, draws=draws, seed=seed, level=level)[0]


def difference_sentence(difference: Interval, metric: str, first: str, second: str) -> str:
    """Say what an interval of first - second shows, without a claim where it contains 0 or has under MIN_ROWS rows."""
    spread = f"{difference.level * 100:g} % interval {difference.low:+.3g} to {difference.high:+.3g}"
    evidence = f"{spread}, n={difference.num_rows}" + (
        f" in {count_groups(difference.num_groups)}" if difference.num_groups else ""
    )
    if not difference.shows_difference:
        few = difference.num_units < MIN_ROWS
        reason = (
            f"; fewer than {MIN_ROWS} {'groups' if difference.num_groups else 'rows'} cannot show one" if few else ""
        )
        return (
            f"{metric}: no difference shown between {first} and {second} ({difference.mean:+.3g}, {evidence}{reason})."
        )
    direction = "higher" if difference.mean > 0 else "lower"
    return f"{metric}: {first} is {direction} than {second} by {abs(difference.mean):.3g} ({evidence})."


def count_groups(count: int) -> str:
    return f"{count} group{'s' * (count != 1)}"


def _resampled_means(
    columns: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], draws: int, seed: int
) -> npt.NDArray[np.float64]:
    """Return [draws, K] means; a resample is a row of counts, so that all columns share one product."""
    rng = np.random.default_rng(seed)
    size = columns.shape[0]
    block = max(1, _MAX_CELLS // size)
    means = []
    for start in range(0, draws, block):
        chosen = rng.integers(size, size=(min(block, draws - start), size))
        chosen += np.arange(len(chosen))[:, None] * size
        counts = np.bincount(chosen.ravel(), minlength=len(chosen) * size).reshape(len(chosen), size)
        means.append(counts @ columns / (counts @ weights)[:, None])
    return np.concatenate(means)
