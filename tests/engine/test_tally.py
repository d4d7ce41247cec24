"""Figures by adapter: bounded, and their sums exact."""

from hypothesis import given
from hypothesis import strategies as st

from engine.tally import OTHER_ADAPTER, Tallies


def test_the_least_recently_used_adapter_gives_its_figures_to_the_others():
    tallies = Tallies(limit=2)
    for name, tokens in (("a", 1), ("b", 2), ("a", 4), ("c", 8), ("", 16), ("(merged)", 32)):
        tallies.of(name).generated_tokens += tokens
    assert {name: tally.generated_tokens for name, tally in tallies.all()} == {
        "a": 5,
        "c": 8,
        OTHER_ADAPTER: 2,
        "": 16,
        "(merged)": 32,
    }


@given(st.lists(st.sampled_from("abcdefgh")), st.integers(1, 4))
def test_no_figure_is_lost_and_the_number_of_labels_is_bounded(names: list[str], limit: int):
    tallies, others = Tallies(limit), 0
    for name in names:
        tally = tallies.of(name)
        tally.requests["stop"] += 1
        tally.queue.observe(0.5)
        found = dict(tallies.all())
        assert len(found) <= limit + 1
        if OTHER_ADAPTER in found:
            assert found[OTHER_ADAPTER].requests["stop"] >= others, "a counter never shrinks"
            others = found[OTHER_ADAPTER].requests["stop"]
    assert sum(tally.requests["stop"] for _, tally in tallies.all()) == len(names)
    assert sum(tally.queue.seconds for _, tally in tallies.all()) == len(names) / 2
