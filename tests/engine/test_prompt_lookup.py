"""What is guessed from what came before."""

import pytest

from engine.prompt_lookup import propose


@pytest.mark.parametrize(
    ("tokens", "ngram", "count", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, 2, (3, 4)),
        ([1, 2, 3, 1, 2, 9, 1, 2], 2, 2, (9, 1)),  # the latest
        ([5, 5, 5], 1, 4, (5,)),
        ([1, 2, 3], 2, 4, ()),
        ([1, 2], 2, 4, ()),
        ([1, 2, 1], 1, 0, ()),
        ([256, 1, 256 * 256], 1, 3, ()),  # the same bytes across a border are no match
        ([0, 0, 1, 0, 0], 2, 8, (1, 0, 0)),
    ],
)
def test_it_proposes_what_followed(tokens, ngram, count, expected):
    assert propose(tokens, ngram, count) == expected
