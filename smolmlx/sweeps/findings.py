"""What a sweep shows, in sentences that claim no more than its rows and its seeds do.

A setting differs from another in a score only where the paired bootstrap over rows (each row averaged over seeds) leaves
out 0, and no seed of the one, four at least, reaches any seed of the other: rows know nothing of seeds, and few seeds little
of rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from smolmlx.evals.bootstrap import bootstrap_difference
from smolmlx.evals.headlines import SUMMED_UP, label

MIN_SEEDS = 4
"""Seeds of each setting that a verdict takes. Of two settings that do not differ, all seeds of the one lie on one side of
all of the other's with probability 2 / C(2n, n): 1 in 3 for 2 seeds, 1 in 10 for 3, 1 in 35 for 4."""

Verdict = Literal["higher", "lower", "no difference shown", "too few seeds"]
"""too few seeds: they lie apart, and fewer than MIN_SEEDS may do so by chance."""
TOO_FEW: Literal["too few seeds"] = "too few seeds"
NOT_SHOWN: Literal["no difference shown"] = "no difference shown"
Scores = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
"""Setting -> metric -> seed -> one score per test row."""
Losses = Mapping[str, Sequence[float]]
"""Setting -> validation loss of each seed."""
Groups = Mapping[str, Sequence[str]]
"""Metric -> group of each row that it applies to, where rows have some; see `bootstrap_means`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One setting against another in one figure: setting - against."""

    setting: str
    against: str
    metric: str
    difference: float
    low: float | None
    """Interval over rows; None for a loss, which is one number a seed."""
    high: float | None
    num_seeds: int
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, slots=True)
class Best:
    """Which setting has the highest mean, and whether that is more than chance."""

    metric: str
    leader: str
    shown: bool
    """The leader is higher than every other setting."""
    shared: bool
    """Another setting has the same mean."""
    sentence: str


def compare_with_first(
    settings: Sequence[str], scores: Scores, losses: Losses, groups: Groups = MappingProxyType({})
) -> list[Comparison]:
    """Compare every setting with the first in validation loss and in each score both have."""
    found: list[Comparison | None] = []
    first, *others = settings
    for other in others:
        found.append(compare_losses(other, losses.get(other, ()), first, losses.get(first, ())))
        found += [compare_scores(metric, other, first, scores, groups) for metric in SUMMED_UP]
    return [comparison for comparison in found if comparison is not None]


def find_best(settings: Sequence[str], scores: Scores, groups: Groups = MappingProxyType({})) -> list[Best]:
    """Name the leader in each score, as the best only where it is shown to be higher than each of the others."""
    found = []
    for metric in SUMMED_UP:
        means = {name: _mean(scores[name][metric]) for name in settings if scores.get(name, {}).get(metric)}
        if len(means) < 2:
            continue
        leader = max(means, key=lambda name: means[name])
        against = [compare_scores(metric, leader, other, scores, groups) for other in means if other != leader]
        shown = all(c is not None and c.verdict == "higher" for c in against)
        leaders = [name for name in means if means[name] == means[leader]]
        name, mean = label(metric), f"mean {means[leader]:.3f}"
        if shown:
            said = f"{name}: {leader} is best ({mean}): higher than each of the other {len(against)} settings."
        elif len(leaders) > 1:
            said = f"{name}: no best setting is shown. {_listed(leaders)} share the highest {mean}."
        else:
            said = f"{name}: no best setting is shown. {leader} has the highest {mean}, but {_unclear(against)}."
        found.append(Best(metric, leader, shown, len(leaders) > 1, said))
    return found


def _unclear(against: Sequence[Comparison | None]) -> str:
    """Say to which settings a difference is not shown, and to which it would take more seeds."""
    few = [c.against for c in against if c is not None and c.verdict == TOO_FEW]
    same = [c.against for c in against if c is not None and c.verdict not in ("higher", TOO_FEW)]
    parts = [f"no difference is shown to {_listed(same)}"] if same or not few else []
    parts += [f"a verdict against {_listed(few)} takes {MIN_SEEDS} seeds"] if few else []
    return ", and ".join(parts)


def _mean(seeds: Mapping[int, Sequence[float]]) -> float:
    return statistics.fmean(statistics.fmean(rows) for rows in seeds.values())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "the others"


def compare_losses(setting: str, mine: Sequence[float], against: str, base: Sequence[float]) -> Comparison | None:
    """Compare validation losses, one a seed; None where a setting has none."""
    if not mine or not base:
        return None
    seeds = min(len(mine), len(base))
    spans = f"{_span(mine, '.4f')} against {_span(base, '.4f')}; {len(mine)} and {_number(len(base))}"
    verdict = _apart(mine, base)
    if verdict == NOT_SHOWN:
        said = f"no difference shown between {setting} and {against} ({spans})."
    elif verdict == TOO_FEW:
        said = f"no verdict on {setting} against {against}: it takes {MIN_SEEDS} seeds ({spans})."
    else:
        said = f"{setting} is {verdict} than {against} with every seed ({spans})."
    gap = statistics.fmean(mine) - statistics.fmean(base)
    return Comparison(setting, against, "val_loss", gap, None, None, seeds, verdict, f"validation loss: {said}")


def compare_scores(
    metric: str, setting: str, against: str, scores: Scores, groups: Groups = MappingProxyType({})
) -> Comparison | None:
    """Compare row by row over the seeds that both settings have; None where they have no rows in common."""
    mine, base = scores.get(setting, {}).get(metric, {}), scores.get(against, {}).get(metric, {})
    shared = sorted(set(mine) & set(base))
    if not shared or len({len(rows) for side in (mine, base) for rows in side.values()}) != 1:
        return None
    rows = [[statistics.fmean(row) for row in zip(*(side[seed] for seed in shared), strict=True)] for side in (mine, base)]  # fmt: skip
    seeds = [[statistics.fmean(side[seed]) for seed in shared] for side in (mine, base)]
    found = bootstrap_difference(*rows, groups=groups.get(metric, ()))
    apart = _apart(*seeds)
    verdict = apart if found.shows_difference else NOT_SHOWN
    evidence = f"95 % interval over {found.num_groups or found.num_rows} {'groups of rows' if found.num_groups else 'rows'} {found.low:+.3g} to {found.high:+.3g}"
    spans = f"seeds {_span(seeds[0], '.3f')} against {_span(seeds[1], '.3f')}"
    said = f"{label(metric)}, mean of {_number(len(shared))}: "
    if verdict == TOO_FEW:
        said += f"no verdict on {setting} against {against}: it takes {MIN_SEEDS} seeds ({found.mean:+.3g}, {evidence}; {spans})."
    elif verdict != NOT_SHOWN:
        said += f"{setting} is {verdict} than {against} by {abs(found.mean):.3g} ({evidence}; {spans})."
    else:
        why = ", since seeds overlap" if found.shows_difference else ""
        said += f"no difference shown between {setting} and {against}{why} ({found.mean:+.3g}, {evidence}; {spans})."
    return Comparison(setting, against, metric, found.mean, found.low, found.high, len(shared), verdict, said)


def _apart(mine: Sequence[float], base: Sequence[float]) -> Verdict:
    """Say on which side every seed of the one lies of every seed of the other."""
    if min(mine) <= max(base) and max(mine) >= min(base):
        return NOT_SHOWN
    if min(len(mine), len(base)) < MIN_SEEDS:
        return TOO_FEW
    return "higher" if min(mine) > max(base) else "lower"


def _number(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def _span(values: Sequence[float], style: str) -> str:
    return f"{min(values):{style}} to {max(values):{style}}"
