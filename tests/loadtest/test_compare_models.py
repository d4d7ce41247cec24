"""Two models on the same examples: the right one wins, nothing is paid for twice, and the cap holds."""

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from loadtest.answer_journal import Answer, Asked
from loadtest.compare_models import app
from loadtest.contest_report import ContestRecord
from tests.loadtest.paid_server import OUTPUT_TOKENS, PROMPT_TOKENS, PaidServer, paid_server

COUNT = 12
LABELS = ["Album", "Animal", "Artist"]
COST = (PROMPT_TOKENS * 30 + OUTPUT_TOKENS * 60) / 1e6
"""Of one answer of gpt-4."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"id": f"r{n}", "fields": {"text": f"text <b>{n}</b>"}, "target": LABELS[n % 3]} for n in range(COUNT)
    ]
    (folder / "dbpedia.test.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return folder


@pytest.fixture
def server() -> Iterator[PaidServer]:
    with paid_server(answers={f"text <b>{n}</b>": LABELS[n % 3] for n in range(COUNT - 2)}) as running:
        yield running


def run(server: PaidServer, data: Path, *options: object, left: str = "ours") -> tuple[int, str, Path]:
    out = data.parent / "out"
    arguments = ["--task", "dbpedia", "--left", left, "--right", "gpt-4", "--left-url", server.url]
    arguments += ["--data", data, "--out", out, *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split()), out


def record(out: Path) -> ContestRecord:
    return msgspec.json.decode((out / "compare.json").read_bytes(), type=ContestRecord)


def test_quality_winners_tokens_and_cost_are_reported(server: PaidServer, data: Path) -> None:
    code, said, out = run(server, data, "--left-gpu-hour", 2)
    assert code == 0, said
    contest = record(out).tasks[0]
    assert contest.left.quality == 0
    assert contest.right.quality == pytest.approx(10 / 12)
    assert (contest.wins, contest.ties, contest.losses) == (0, 2, 10)
    assert contest.difference_interval.high is not None and contest.difference_interval.high < 0
    assert contest.chance == pytest.approx(2 / 2**10)
    assert contest.right.cost_of_1000 == pytest.approx(1000 * COST)
    assert contest.left.cost_of_1000 is not None and 0 < contest.left.cost_of_1000 < 2
    assert (contest.right.prompt_tokens, contest.right.output_tokens) == (PROMPT_TOKENS, OUTPUT_TOKENS)
    assert contest.right.ttft.p50 is not None and contest.right.total.p50 is not None
    assert 0 < contest.right.ttft.p50 <= contest.right.total.p50
    assert record(out).spent == pytest.approx(COUNT * COST)
    assert "gpt-4 is better than ours" in said


def test_both_sides_get_the_same_messages(server: PaidServer, data: Path) -> None:
    run(server, data)
    asked = {
        model: {str(b["messages"]) for b in server.asked if b["model"] == model and b["max_tokens"] > 1}
        for model in ("ours", "gpt-4")
    }
    assert asked["ours"] == asked["gpt-4"] and len(asked["ours"]) == COUNT
    assert {b["temperature"] for b in server.asked} == {0}


def test_the_second_run_asks_nothing_again(server: PaidServer, data: Path) -> None:
    run(server, data)
    asked = len(server.asked)
    code, said, out = run(server, data)
    assert code == 0 and len(server.asked) == asked
    assert "all 12 answers are there" in said
    assert record(out).spent == pytest.approx(COUNT * COST)


def test_other_parameters_are_other_questions(server: PaidServer, data: Path) -> None:
    run(server, data)
    asked = len(server.asked)
    run(server, data, "--right-body", '{"temperature": 0.5}')
    assert len(server.asked) == asked + COUNT
    assert server.asked[-1]["temperature"] == 0.5


def test_a_run_cut_short_goes_on_and_pays_for_no_answer_twice(server: PaidServer, data: Path) -> None:
    server.die_after = COUNT + 1 + 5
    code, said, out = run(server, data, "--concurrency", 1)
    assert code == 1
    assert "the model is gone" in said and "goes on where this ended" in said
    assert record(out).tasks[0].right.answered == 5
    journal = out / "answers.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"type":"answer","key":"cut o')
    server.die_after = None
    code, said, out = run(server, data)
    assert code == 0, said
    paid = [body["messages"][-1]["content"] for body in server.asked if body["model"] == "gpt-4"]
    assert len(paid) == len(set(paid)) == COUNT
    assert record(out).spent == pytest.approx(COUNT * COST)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_spending_cap_is_never_passed(server: PaidServer, data: Path, concurrency: int) -> None:
    cap = 6 * COST + 0.01
    code, said, out = run(server, data, "--max-spend", cap, "--concurrency", concurrency)
    assert code == 1 and "spending cap" in said
    billed = sum(body["model"] == "gpt-4" for body in server.asked)
    assert 0 < billed * COST <= cap
    assert record(out).spent <= cap
    asked = len(server.asked)
    assert run(server, data, "--max-spend", cap, "--concurrency", concurrency)[0] == 1
    assert (len(server.asked) - asked) * COST + billed * COST <= cap, "the cap is over all runs"


def test_what_may_have_been_paid_for_counts_against_the_cap(server: PaidServer, data: Path) -> None:
    out = data.parent / "out"
    out.mkdir()
    lost = Asked(key="a request of a run that was killed", worst_cost=4.999)
    (out / "answers.jsonl").write_bytes(msgspec.json.encode(lost) + b"\n")
    code, said, _ = run(server, data)
    assert code == 1 and "$4.9990 are spent" in said
    assert not any(body["model"] == "gpt-4" for body in server.asked)


def test_rate_limits_are_waited_for_and_count_in_no_latency(server: PaidServer, data: Path) -> None:
    server.refuse_first, server.retry_after = 4, "0.4"
    code, said, out = run(server, data, "--left-gpu-hour", 1)
    assert code == 0, said
    answers = journal_answers(out)
    assert max(answer.attempts for answer in answers) > 1 or server.refused == 4
    assert all(answer.total_s is not None and answer.total_s < 0.35 for answer in answers)
    assert server.refused == 4


def test_no_more_requests_at_once_than_asked_for(server: PaidServer, data: Path) -> None:
    server.delay_s = 0.01
    run(server, data, "--concurrency", 3)
    assert server.most_at_once == 3


def test_broken_answers_are_no_zeroes_and_are_asked_again(server: PaidServer, data: Path) -> None:
    server.cut_every = 5
    code, said, out = run(server, data)
    assert code == 0 and "answers failed, in no figure" in said
    contest = record(out).tasks[0]
    assert contest.left.failed and contest.answered_by_both < COUNT
    server.cut_every = 0
    assert run(server, data)[0] == 0
    assert record(out).tasks[0].answered_by_both == COUNT


def test_a_wrong_key_ends_it_at_once_in_words(
    server: PaidServer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "right"
    monkeypatch.setenv("SOME_KEY", "wrong")
    code, said, out = run(server, data, "--left-key-env", "SOME_KEY")
    assert code == 1 and "that key is wrong" in said
    monkeypatch.setenv("SOME_KEY", "right")
    assert run(server, data, "--left-key-env", "SOME_KEY", "--right-key-env", "SOME_KEY")[0] == 0
    assert b"right" not in re.sub(rb'"(right|side":"right)"|right', b"", (out / "answers.jsonl").read_bytes())


def test_page_shows_outputs_beside_each_other_and_fetches_nothing(server: PaidServer, data: Path) -> None:
    html = (run(server, data)[2] / "compare.html").read_text()
    assert html.count("<article") == COUNT
    assert "text &lt;b&gt;3&lt;/b&gt;" in html and "text <b>" not in html
    assert "dunno" in html and "Album" in html
    assert not re.search(r'(src|href)="(?!#)', html) and "url(http" not in html


def test_paper_scores_stand_beside_ours(server: PaidServer, data: Path) -> None:
    quality = data.parent / "quality.csv"
    quality.write_text(
        "task,metric,base_model,base_score\ndbpedia,accuracy,gpt-4,0.965\nviggo,rouge,gpt-4,0.374\n"
    )
    said, out = run(server, data, "--paper-quality", quality)[1:]
    assert "0.965 accuracy" in said
    assert [r.score for r in record(out).tasks[0].references] == [0.965]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--task", "poetry"], "there is no task 'poetry'"),
        (["--task", "viggo"], "no viggo.test.jsonl"),
        (["--right-body", "[]"], "--right-body is not a JSON object"),
        (["--right-body", '{"model": "x"}'], "cannot change model"),
        (["--right-body", '{"max_tokens": null}'], "nothing else bounds its cost"),
        (["--right-url", "ftp://x"], "not an http:// or https:// address"),
        (["--right-url", "https://api.openai.com/v1"], "OPENAI_API_KEY"),
    ],
)
def test_bad_options_are_refused_by_name(
    server: PaidServer, data: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], why: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, said, _ = run(server, data, *options)
    assert code == 2 and why in said
    assert not server.asked


def journal_answers(out: Path) -> list[Answer]:
    lines = (out / "answers.jsonl").read_bytes().splitlines()
    entries = [msgspec.json.decode(line, type=Answer | Asked) for line in lines]
    return [entry for entry in entries if isinstance(entry, Answer)]
