"""Prompts: fixed by the seed, never alike, never seen before."""

import pytest

from loadtest.prompts import TASK_INPUTS, WORDS, Prompts


def test_same_seed_and_nonce_give_the_same_prompts() -> None:
    one, two = Prompts("words", 64, 7, "n"), Prompts("words", 64, 7, "n")
    assert [one.text(i) for i in range(50)] == [two.text(i) for i in range(50)]


@pytest.mark.parametrize("kind", ["words", "tasks"])
def test_no_two_prompts_are_alike(kind) -> None:
    prompts = Prompts(kind, 8, 0, "n")
    numbers = [*range(3000), *range(len(WORDS) ** 2 - 5, len(WORDS) ** 2 + 500)]
    assert len({prompts.text(i) for i in numbers}) == len(numbers)


@pytest.mark.parametrize("kind", ["words", "tasks"])
def test_another_run_shares_no_prompt_and_parts_within_its_first_words(kind) -> None:
    first, second = Prompts(kind, 64, 0, "run one"), Prompts(kind, 64, 0, "run two")
    for index in range(100):
        assert first.text(index).split()[:6] != second.text(index).split()[:6]


def test_word_prompts_have_the_length_asked_for() -> None:
    for tokens in (16, 64, 256):
        assert {len(Prompts("words", tokens, 0, "n").text(i).split()) for i in range(20)} == {tokens}


def test_task_prompts_end_in_a_written_input() -> None:
    prompts = Prompts("tasks", 1, 0, "n")
    assert {prompts.text(i).partition("\n")[2] for i in range(1000)} == set(TASK_INPUTS)


def test_words_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS)


def test_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Prompts("words", 0, 0, "n")
