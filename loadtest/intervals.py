"""How sure a figure is: intervals of percentiles, means and ratios. Pure; knows samples, no requests.

All intervals take their samples for independent. Requests that ran at the same time are not quite: a repeated run may
differ by more than an interval says, never expect it to differ by less.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 500


class Interval(msgspec.Struct, frozen=True):
    """Where the true value lies with `CONFIDENCE`; None: the samples do not bound that end."""

    low: float | None
    high: float | None

    @property
    def closed(self) -> bool:
        return self.low is not None and self.high is not None


def percentile_interval(ordered: Sequence[float], percent: float) -> Interval:
    """Interval of a percentile of `ordered` (ascending) from binomial order statistics: no distribution is assumed.

    The number of samples below the true percentile is binomial, so two ranks enclose it. An end is None when even the
    least or greatest sample does not: p50 needs 6 samples for both ends, p90 needs 36, p99 needs 368.
    """
    count, share, tail = len(ordered), percent / 100, (1 - CONFIDENCE) / 2
    if not 0 < share < 1:
        raise ValueError(f"{percent} is not between 0 and 100")
    low: float | None = None
    spread = math.sqrt(count * share * (1 - share))
    reached = 0.0
    for rank in range(max(0, int(count * share - 10 * spread - 1)), count):
        reached += _binomial(count, rank, share)
        if reached <= tail:
            low = ordered[rank]
        elif reached >= 1 - tail:
            return Interval(low, ordered[rank])
    return Interval(low, None)


def _binomial(count: int, hits: int, share: float) -> float:
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways + hits * math.log(share) + (count - hits) * math.log1p(-share))


def mean_interval(samples: Sequence[float], seed: int = 0) -> Interval:
    """Bootstrap interval of the mean; both ends None below two samples."""
    if len(samples) < 2:
        return Interval(None, None)
    values = np.asarray(samples, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(2 * DRAWS)])
    return _middle(means)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Samples that come in groups: the gaps of a request, the tokens of a second. Groups are drawn, not samples."""

    values: NDArray[np.float64]
    """[samples], ascending."""
    owners: NDArray[np.int64]
    """[samples], the group of each."""
    count: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> "Clusters":
        values = np.array([value for group in groups for value in group], dtype=np.float64)
        owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        order = np.argsort(values, kind="stable")
        return cls(values[order], owners[order], len(groups))


Statistic = Callable[[NDArray[np.float64], NDArray[np.int64]], float]
"""(samples ascending, how often each was drawn) → the figure; NaN when nothing was drawn."""


def mean_statistic(values: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
    drawn = weights.sum()
    return float(values @ weights / drawn) if drawn else math.nan


def percentile_statistic(percent: float) -> Statistic:
    def pick(values: NDArray[np.float64], weights: NDArray[np.int64]) -> float:
        reached = np.cumsum(weights)
        if not len(reached) or not reached[-1]:
            return math.nan
        return float(values[np.searchsorted(reached, reached[-1] * percent / 100)])

    return pick


def draw(clusters: Clusters, statistics: Sequence[Statistic], seed: int) -> NDArray[np.float64]:
    """[DRAWS, statistics]: every statistic of every bootstrap draw of the groups."""
    rng = np.random.default_rng(seed)
    drawn = np.full((DRAWS, len(statistics)), math.nan)
    if clusters.count < 2 or not len(clusters.values):
        return drawn
    for number in range(DRAWS):
        chosen = np.bincount(rng.integers(0, clusters.count, clusters.count), minlength=clusters.count)
        weights = chosen[clusters.owners]
        drawn[number] = [statistic(clusters.values, weights) for statistic in statistics]
    return drawn


def ratio_interval(before: NDArray[np.float64], after: NDArray[np.float64]) -> Interval:
    """Interval of after / before from the draws of each, [DRAWS] both, drawn with different seeds."""
    ratios = after[before > 0] / before[before > 0]
    return _middle(ratios[np.isfinite(ratios)])


def _middle(draws: NDArray[np.float64]) -> Interval:
    if len(draws) < DRAWS // 2:
        return Interval(None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))
