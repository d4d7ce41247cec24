"""The task table and the row loader."""

from pathlib import Path
from string import Formatter

import pytest

from tuning.metrics import score
from tuning.tasks import TASKS, Row, Task, load_rows


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_names_its_data_and_its_licence_and_fills_its_template(task: Task) -> None:
    assert task.source
    assert task.licence
    fields = {name: f"<{name}>" for _, name, _, _ in Formatter().parse(task.template) if name}
    system, user = task.messages(fields)
    assert system == {"role": "system", "content": task.instruction}
    assert user["role"] == "user"
    assert all(value in user["content"] for value in fields.values())


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.labels], ids=lambda task: task.name)
def test_a_right_label_scores_one_and_every_other_label_zero(task: Task) -> None:
    for label in task.labels:
        row = Row(id="x", fields={}, target=label)
        assert [score(task, row, other) for other in task.labels] == [float(o == label) for o in task.labels]


def test_messages_take_braces_in_a_field_as_they_are() -> None:
    assert TASKS["nl2bash"].messages({"request": "print {x}"})[1]["content"] == "print {x}"


def test_rows_load_with_and_without_references(tmp_path: Path) -> None:
    (tmp_path / "viggo.test.jsonl").write_text(
        '{"id": "a", "fields": {"mr": "inform(name[X])"}, "target": "X.", "references": ["X.", "It is X."]}\n'
        "\n"
        '{"id": "b", "fields": {"mr": "inform(name[Y])"}, "target": "Y.\\u2028"}\n',
        encoding="utf-8",
    )
    first, second = load_rows(tmp_path, "viggo", "test")
    assert first.accepted == ["X.", "It is X."]
    assert second.accepted == ["Y.\u2028"]


def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "viggo.train.jsonl").write_text('{"id": "a", "fields": {}, "target": "x"}\n{"id": 3}\n')
    with pytest.raises(ValueError, match=r"viggo\.train\.jsonl, line 2"):
        load_rows(tmp_path, "viggo", "train")
