"""Intervals hold the truth as often as they say, and say when samples do not bound them."""

import numpy as np
import pytest

from loadtest.intervals import (
    Clusters,
    Interval,
    draw,
    mean_interval,
    mean_statistic,
    percentile_interval,
    percentile_statistic,
    ratio_interval,
)


@pytest.mark.parametrize(("percent", "fewest"), [(50, 6), (90, 36), (99, 368)])
def test_percentile_is_bounded_from_both_ends_only_with_samples_enough(percent: float, fewest: int) -> None:
    assert percentile_interval(range(fewest), percent).closed
    assert not percentile_interval(range(fewest - 1), percent).closed


def test_no_samples_bound_nothing() -> None:
    assert percentile_interval([], 50) == Interval(None, None)
    assert mean_interval([1.0]) == Interval(None, None)


@pytest.mark.parametrize("percent", [50, 90])
def test_percentile_interval_holds_the_truth_at_least_as_often_as_it_says(percent: float) -> None:
    rng = np.random.default_rng(7)
    truth = -np.log(1 - percent / 100)
    held = 0
    for _ in range(400):
        interval = percentile_interval(np.sort(rng.exponential(size=80)).tolist(), percent)
        assert interval.low is not None and interval.high is not None
        held += interval.low <= truth <= interval.high
    assert held / 400 > 0.93


def test_percentile_interval_narrows_with_samples() -> None:
    wide, narrow = (percentile_interval(np.linspace(0, 1, n).tolist(), 50) for n in (50, 5000))
    assert wide.low is not None and wide.high is not None
    assert narrow.low is not None and narrow.high is not None
    assert narrow.high - narrow.low < (wide.high - wide.low) / 5


def test_mean_interval_encloses_the_mean() -> None:
    interval = mean_interval([0.0, 1.0] * 50)
    assert interval.low is not None and interval.high is not None
    assert 0.38 < interval.low < 0.5 < interval.high < 0.62


def test_ratio_of_two_samples_of_one_kind_holds_one() -> None:
    rng = np.random.default_rng(3)
    before, after = (
        draw(Clusters.of([[v] for v in rng.exponential(size=200)]), [percentile_statistic(50)], seed)[:, 0]
        for seed in (1, 2)
    )
    interval = ratio_interval(before, after)
    assert interval.low is not None and interval.high is not None
    assert interval.low < 1 < interval.high
    doubled = ratio_interval(before, 2 * after)
    assert doubled.low is not None and doubled.low > 1


def test_samples_of_a_group_are_drawn_together() -> None:
    """A hundred alike gaps of each of two requests are two samples, not two hundred."""
    groups = [[1.0] * 100, [2.0] * 100]
    drawn = set(np.round(draw(Clusters.of(groups), [mean_statistic], 0)[:, 0], 6))
    assert drawn == {1.0, 1.5, 2.0}
