"""The figures, against numbers worked out by hand."""

import random
import statistics

import pytest

from loadtest.metrics import distribution, model_figures, percentile, stage_figures, ticks_missed, tpot
from loadtest.plan import Stage
from tests.loadtest.rows import BASE, ended, row


def test_latencies_of_two_requests() -> None:
    # sent 11: tokens 11.2, 11.3, 11.5 → TTFT .2, streaming .3, TPOT .15; sent 12: 12.4, 12.5, 12.6 → .4, .2, .1
    figures = stage_figures(BASE, ended(), [row(11.0, [11.2, 11.3, 11.5]), row(12.0, [12.4, 12.5, 12.6])])
    assert figures.measured == 2
    assert figures.ttft.average == pytest.approx(0.3)
    assert figures.ttft.p50 == pytest.approx(0.3)
    assert figures.streaming.average == pytest.approx(0.25)
    assert figures.total.average == pytest.approx(0.55)
    assert figures.tpot.average == pytest.approx(0.125)
    assert figures.stream_rate == pytest.approx((2 + 2) / (0.3 + 0.2))
    assert figures.inter_chunk.samples == 4
    assert figures.inter_chunk.average == pytest.approx(0.125)
    assert figures.output_rate == pytest.approx(6 / 10)
    assert figures.request_rate == pytest.approx(2 / 10)
    assert figures.tokens_per_event == 1
    assert figures.users_in_flight == pytest.approx((0.5 + 0.6) / 10)


def test_total_time_ends_with_the_stream_not_with_the_last_text() -> None:
    figures = stage_figures(BASE, ended(), [row(11.0, [11.5], done=11.75)])
    assert figures.total.average == pytest.approx(0.75)
    assert figures.streaming.average == 0


def test_failures_lower_no_latency_and_are_counted() -> None:
    refused = row(11.0, [], outcome="failed", done=None, headers=11.001, status=429, completion_tokens=None)
    broken = row(12.0, [12.1], outcome="failed", done=12.2)
    figures = stage_figures(BASE, ended(), [refused, broken, row(11.0, [12.0, 13.0])])
    assert (figures.measured, figures.failed, figures.incomplete) == (1, 2, 0)
    assert figures.ttft.samples == 1
    assert figures.ttft.average == pytest.approx(1.0)
    assert figures.output_rate == pytest.approx(0.2)


def test_ramp_cold_and_unfinished_requests_are_in_no_latency() -> None:
    rows = [
        row(9.5, [9.9, 10.5]),
        row(11.0, [15.0], cold=True),
        row(19.0, [19.5], outcome="incomplete", done=None, completion_tokens=None),
        row(12.0, [12.5]),
        row(0.1, [0.2], phase="warmup", cold=True),
    ]
    figures = stage_figures(BASE, ended(), rows)
    assert (figures.measured, figures.set_aside, figures.incomplete, figures.failed) == (1, 2, 1, 0)
    assert figures.ttft.average == pytest.approx(0.5)


def test_throughput_counts_tokens_by_the_time_they_arrived() -> None:
    rows = [
        row(9.0, [9.5, 10.5]),  # one token before the window, one inside
        row(
            19.0, [19.5, 20.5], outcome="incomplete", done=None, completion_tokens=None
        ),  # one inside, one after
        row(12.0, [13.0, 14.0], completion_tokens=6),  # three tokens an event, both inside
    ]
    figures = stage_figures(BASE, ended(), rows)
    # the cut-off one has no usage: the measured ratio of 3 tokens an event stands in for it
    assert figures.tokens_per_event == 3
    assert figures.output_rate == pytest.approx((1 + 3 + 6) / 10)


def test_users_in_flight_counts_requests_that_cross_the_window() -> None:
    rows = [
        row(5.0, [6.0, 15.0]),
        row(15.0, [16.0], outcome="incomplete", done=None, completion_tokens=None),
    ]
    assert stage_figures(BASE, ended(), rows).users_in_flight == pytest.approx(1.0)


def test_answers_of_one_token_have_no_tpot_and_are_counted() -> None:
    figures = stage_figures(BASE, ended(), [row(11.0, [11.5]), row(12.0, [12.5, 12.7])])
    assert (figures.single_token, figures.tpot.samples) == (1, 1)
    assert figures.tpot.average == pytest.approx(0.2)


def test_many_tokens_in_one_event_have_no_tpot() -> None:
    assert tpot(row(11.0, [11.5], completion_tokens=9)) is None


def test_stream_that_came_in_a_burst_does_not_outweigh_the_others() -> None:
    figures = stage_figures(BASE, ended(), [row(11.0, [11.5, 11.50001]), row(12.0, [12.5, 13.5])])
    assert figures.stream_rate == pytest.approx(2.0, rel=1e-3)


def test_answer_without_text_has_a_total_time_but_no_ttft_of_zero() -> None:
    figures = stage_figures(BASE, ended(), [row(11.0, [], completion_tokens=1)])
    assert (figures.measured, figures.empty) == (1, 1)
    assert figures.ttft.average is None
    assert figures.total.average == pytest.approx(1.0)


def test_without_usage_events_are_counted_and_said_so() -> None:
    figures = stage_figures(BASE, ended(), [row(11.0, [11.5, 12.0, 12.5], completion_tokens=None)])
    assert figures.uncounted == 1
    assert figures.output_tokens == 3
    assert figures.stream_rate == pytest.approx(2.0)


def test_cached_share_is_over_all_prompt_tokens() -> None:
    rows = [row(11.0, [12.0], prompt_tokens=30, cached_tokens=0), row(12.0, [13.0], cached_tokens=8)]
    assert stage_figures(BASE, ended(), rows).cached_share == pytest.approx(8 / 40)


def test_stage_stopped_in_its_ramp_has_no_figures() -> None:
    figures = stage_figures(BASE, ended(10.0, 9.4), [row(9.0, [9.2])])
    assert figures.measured == 0
    assert figures.output_rate is None
    assert figures.users_in_flight is None


@pytest.mark.parametrize(("samples", "given"), [(1, 0), (2, 1), (9, 1), (10, 2), (99, 2), (100, 3)])
def test_percentiles_only_where_a_sample_lies_beyond(samples: int, given: int) -> None:
    figures = distribution(float(i) for i in range(samples))
    assert sum(p is not None for p in (figures.p50, figures.p90, figures.p99)) == given


def test_percentiles_by_hand() -> None:
    ordered = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert percentile(ordered, 50) == 30
    assert percentile(ordered, 90) == pytest.approx(46)
    assert percentile(ordered, 100) == 50
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_percentiles_agree_with_the_standard_library() -> None:
    draw = random.Random(1)
    samples = [draw.expovariate(3) for _ in range(257)]
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    figures = distribution(samples)
    assert [figures.p50, figures.p90, figures.p99] == pytest.approx([cuts[49], cuts[89], cuts[98]])


def test_models_are_pooled_over_stages_with_their_cold_start_apart() -> None:
    one = Stage(mode="2 adapters", users=1, models=("m/a", "m/b"), adapters=2)
    two = Stage(mode="2 adapters", users=2, models=("m/a", "m/b"), adapters=2)
    common = {"mode": "2 adapters", "model": "m/a"}
    rows = [
        row(0.0, [0.9], phase="warmup", cold=True, users=1, **common),
        row(11.0, [11.1], users=1, **common),
        row(31.0, [31.3], users=2, **common),
        row(32.0, [], users=2, outcome="failed", done=None, **common),
    ]
    a, b = model_figures(rows, [(one, ended()), (two, ended(30.0, 40.0))])
    assert (a.model, a.measured, a.failed) == ("m/a", 2, 1)
    assert a.cold_ttft_s == pytest.approx(0.9)
    assert a.ttft.average == pytest.approx(0.2)
    assert (b.model, b.measured, b.cold_ttft_s) == ("m/b", 0, None)


def test_stall_counts_for_every_tick_it_swallowed() -> None:
    assert ticks_missed(0.0, 0.01) == [0.0]
    assert ticks_missed(0.004, 0.01) == [0.004]
    assert ticks_missed(0.035, 0.01) == pytest.approx([0.035, 0.025, 0.015, 0.005])
    one_stall_in_ten_seconds = [0.0] * 800 + ticks_missed(2.0, 0.01)
    assert percentile(sorted(one_stall_in_ten_seconds), 99) > 1.8
