"""Scoring rules, on hand-written answers."""

import pytest

from tuning.metrics import (
    bare_code,
    first_json,
    last_number,
    majority_share,
    mean_score,
    named_label,
    normalise,
    score,
)
from tuning.tasks import TASKS, Row


def judged(task: str, target: str, answer: str, references: list[str] | None = None) -> float:
    return score(TASKS[task], Row(id="x", fields={}, target=target, references=references or []), answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("travel", 1.0),
        (' "Travel." ', 1.0),
        ("The topic is travel.", 1.0),
        ("travel\nbecause it is about a trip", 1.0),
        ("kitchen and dining", 0.0),
        ("either travel or banking", 0.0),
        ("traveller", 0.0),
        ("", 0.0),
    ],
)
def test_label_is_accepted_alone_or_as_the_only_one_named(answer: str, expected: float) -> None:
    assert judged("clinc150_domain", "travel", answer) == expected


def test_label_spelt_with_spaces_for_underscores_counts() -> None:
    assert judged("clinc150_domain", "kitchen_and_dining", "Kitchen and Dining") == 1.0


def test_label_of_an_open_set_is_found_in_a_sentence() -> None:
    assert judged("banking77", "reverted_card_payment?", "Intent: reverted_card_payment?") == 1.0
    assert judged("banking77", "card_arrival", "card_arrival_time") == 0.0


def test_label_inside_a_longer_named_label_does_not_count() -> None:
    labels = ("License Grant", "Non-Transferable License", "Grant")
    assert named_label("It is a License Grant clause", labels) == "license grant"
    assert named_label("Grant, or Non-Transferable License", labels) is None
    assert named_label("nothing of the kind", labels) is None


def test_sql_differing_in_case_quotes_and_fences_is_exact() -> None:
    target = "SELECT A FROM t WHERE B = 'x y'"
    assert judged("wikisql", target, '```sql\nselect A from t\n where B = "x y";\n```') == 1.0
    assert judged("wikisql", target, "SELECT A FROM t WHERE B = 'x'") == 0.0


def test_sql_is_compared_whole_not_by_its_first_line() -> None:
    assert judged("wikisql", "SELECT A FROM t WHERE B = 1", "SELECT A\nFROM t WHERE B = 2") == 0.0


def test_sql_counts_when_talk_follows_it() -> None:
    target = "SELECT A FROM t"
    assert judged("wikisql", target, "SELECT A FROM t;\n\nThis query selects A.") == 1.0
    assert judged("wikisql", target, "SELECT A FROM t\n\nResult: 3") == 1.0
    assert judged("wikisql", "SELECT A FROM t WHERE B = 'x;y'", "SELECT A FROM t WHERE B = 'x;y'") == 1.0


def test_json_is_compared_parsed() -> None:
    target = '{"intent": "PlayMusic", "slots": {"artist": "Nina Simone", "year": "1965"}}'
    spaced = 'Sure: {"slots":{"year":"1965","artist":"nina  simone"},"intent":"PlayMusic"} Done.'
    assert judged("snips_json", target, spaced) == 1.0
    assert judged("snips_json", target, '{"intent": "PlayMusic", "slots": {}}') == 0.0
    assert judged("snips_json", target, "no json") == 0.0


def test_first_json_survives_junk_and_cut_off_objects() -> None:
    assert first_json('{oops} {"a": [1]} {"b": 2}') == {"a": [1]}
    assert first_json('{"a": ') is None
    assert first_json('{"a":' * 100_000) is None


def test_entity_f1_counts_repeated_and_wrong_kind_entities() -> None:
    target = '{"Chemical": ["aspirin"], "Disease": ["fever", "fever"]}'
    assert judged("bc5cdr", target, target) == 1.0
    assert judged("bc5cdr", target, '{"Chemical": ["aspirin"], "Disease": ["fever"]}') == pytest.approx(0.8)
    assert judged("bc5cdr", target, '{"Chemical": ["fever"], "Disease": []}') == 0.0
    assert judged("bc5cdr", target, '{"Chemical": "aspirin", "Disease": [{"x": 1}]}') == 0.0


def test_entity_f1_of_an_empty_row_wants_empty_json_not_silence() -> None:
    empty = '{"Chemical": [], "Disease": []}'
    assert judged("bc5cdr", empty, empty) == 1.0
    assert judged("bc5cdr", empty, "none") == 0.0


def test_text_takes_the_best_of_the_references() -> None:
    references = ["The Mill is a pub.", "A pub called The Mill."]
    assert judged("e2e_nlg", references[0], "a pub called the mill", references) == pytest.approx(1.0)
    assert 0 < judged("e2e_nlg", references[0], "The Mill is cheap.", references) < 1


def test_code_score_sees_flags_and_pipes() -> None:
    assert judged("nl2bash", "ls -l | wc", "```bash\nls -l | wc\n```") == pytest.approx(1.0)
    assert judged("nl2bash", "ls -l | wc", "ls l wc") < 1


def test_code_is_taken_out_of_its_wrapping() -> None:
    assert bare_code("Run this:\n```bash\n#!/bin/bash\n# lists\nls -l\n```\nIt lists.") == "ls -l"
    assert bare_code("#!/bin/bash\n\nls -l") == "ls -l"
    assert bare_code("```sh\ncut off") == "cut off"


@pytest.mark.parametrize(
    ("answer", "number"), [("so 3 + 4 = 7", 7), ("#### 1,234.50", 1234.5), ("-2.", -2), ("none", None)]
)
def test_last_number_is_read(answer: str, number: float | None) -> None:
    assert last_number(answer) == number


def test_number_wants_the_same_value_not_the_same_spelling() -> None:
    assert judged("gsm8k", "2*500=1000\n#### 1,000", "The answer is 1000.0") == 1.0
    assert judged("gsm8k", "#### 5", "I do not know") == 0.0


def test_normalise_keeps_the_first_line_without_its_wrapping() -> None:
    assert normalise('\n  "Hello,   World!" \nsecond') == "hello, world"
    assert normalise("") == ""


def test_mean_and_majority() -> None:
    rows = [Row(id=str(i), fields={}, target=target) for i, target in enumerate(("home", "home", "work"))]
    assert majority_share(rows) == pytest.approx(2 / 3)
    assert mean_score(TASKS["clinc150_domain"], rows, ["home", "work", "work"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no rows"):
        mean_score(TASKS["clinc150_domain"], [], [])
    with pytest.raises(ValueError, match="shorter"):
        mean_score(TASKS["clinc150_domain"], rows, ["home"])
