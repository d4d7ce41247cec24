"""The harness as people start it, against a server whose times are known."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

import psutil
import pytest
import requests
from typer.testing import CliRunner

from loadtest.record import ROWS_FILE, RequestRow, RunRecord, read_rows, read_run
from loadtest.run import app

MOCK = Path(__file__).with_name("mock_server.py")
TTFT_MS, ITL_MS, TOKENS = 40.0, 10.0, 6

pytestmark = pytest.mark.slow


@contextmanager
def mock(*options: object) -> Iterator[str]:
    command = [sys.executable, str(MOCK), "--ttft-ms", TTFT_MS, "--itl-ms", ITL_MS, *options]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def start(url: str, out: Path, *options: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "loadtest",
        "--base-url",
        url,
        "--out",
        out,
        "--max-tokens",
        TOKENS,
        *options,
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )


def loaded(
    url: str, out: Path, *options: object, env: dict[str, str] | None = None
) -> tuple[int, str, RunRecord, list[RequestRow]]:
    """Exit code, output, run and rows."""
    process = start(url, out, *options, env=env)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said, read_run(out), read_rows((out / ROWS_FILE).read_bytes().splitlines())


class Whole:
    """A run of six stages that goes well."""

    def __init__(self, directory: Path) -> None:
        adapters = "random-1,viggo,boolq"
        with mock("--adapters", adapters) as url:
            options = [
                "--stages",
                "base,1,3",
                "--users",
                "1,4",
                "--stage-seconds",
                1.6,
                "--ramp-seconds",
                0.4,
            ]
            self.code, self.said, self.run, self.rows = loaded(
                f"{url}/v1/", directory, *options, env={"OPENAI_API_KEY": "sk-secret"}
            )
            self.seen = requests.get(f"{url}/seen", timeout=10).json()
        self.page = (directory / "report.html").read_text()
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.measured = [
            row
            for row in self.rows
            if row.phase == "load" and row.outcome == "completed" and row.sent >= self.end(row).steady_from
        ]

    def end(self, row: RequestRow):
        stages = self.run.plan.stages
        return next(
            e
            for e in self.run.stages
            if (stages[e.stage].mode, stages[e.stage].users) == (row.mode, row.users)
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def test_known_latencies_are_recovered_within_milliseconds(whole: Whole) -> None:
    ttft = [(row.first_content or 0) - row.sent for row in whole.measured]
    gaps = [gap for row in whole.measured for gap in row.gaps]
    assert len(ttft) > 30
    assert TTFT_MS - 0.5 < median(ttft) * 1000 < TTFT_MS + 12
    assert median(gaps) * 1000 == pytest.approx(ITL_MS, abs=3)
    assert mean(gaps) * 1000 == pytest.approx(ITL_MS, abs=2)


def test_opening_role_chunk_is_not_taken_for_the_first_token(whole: Whole) -> None:
    headers = median((row.headers or 0) - row.sent for row in whole.measured)
    assert headers * 1000 < TTFT_MS / 2


def test_times_of_a_row_are_in_order(whole: Whole) -> None:
    for row in whole.measured:
        times = [row.scheduled, row.sent, row.headers, row.first_content, row.last_content, row.done]
        assert None not in times
        assert times == sorted(t for t in times if t is not None)
        assert len(row.gaps) == row.events - 1 == TOKENS - 1


def test_counts_come_from_usage(whole: Whole) -> None:
    assert {(row.prompt_tokens, row.cached_tokens, row.completion_tokens) for row in whole.measured} == {
        (40, 8, TOKENS)
    }


def test_locust_counts_and_times_every_request_to_its_end(whole: Whole) -> None:
    for end in whole.run.stages:
        stage = whole.run.plan.stages[end.stage]
        ours = [
            row
            for row in whole.rows
            if (row.mode, row.users, row.phase) == (stage.mode, stage.users, "load")
            and row.outcome != "incomplete"
        ]
        assert end.locust_requests == len(ours) > 0
        assert end.locust_failures == 0
        average = mean((row.done or 0) - row.sent for row in ours) * 1000
        assert end.locust_average_ms == pytest.approx(average, abs=0.5)


def test_load_is_closed_loop_with_the_users_asked_for(whole: Whole) -> None:
    for end in whole.run.stages:
        stage = whole.run.plan.stages[end.stage]
        rows = [r for r in whole.rows if (r.mode, r.users, r.phase) == (stage.mode, stage.users, "load")]
        assert {row.user for row in rows} == set(range(stage.users))
        for user in range(stage.users):
            mine = sorted((row for row in rows if row.user == user), key=lambda row: row.sent)
            for before, after in itertools.pairwise(mine):
                assert before.done is not None and before.done <= after.sent


def test_users_start_one_after_the_other_over_the_ramp(whole: Whole) -> None:
    end = whole.run.stages[1]
    first = [min(r.sent for r in whole.rows if (r.mode, r.users, r.user) == ("base", 4, u)) for u in range(4)]
    assert [t - end.started for t in first] == pytest.approx([0, 0.1, 0.2, 0.3], abs=0.09)


def test_requests_cut_off_at_the_end_are_incomplete_not_failed(whole: Whole) -> None:
    outcomes = Counter(row.outcome for row in whole.rows)
    assert outcomes["failed"] == 0
    assert 0 < outcomes["incomplete"] <= sum(stage.users for stage in whole.run.plan.stages)
    assert whole.code == 0


def test_each_model_is_warmed_up_once_and_only_that_is_cold(whole: Whole) -> None:
    warm = [row for row in whole.rows if row.phase == "warmup"]
    assert [row.model for row in warm] == ["mock", "mock/boolq", "mock/viggo", "mock/random-1"]
    assert all(row.cold for row in warm)
    assert not any(row.cold for row in whole.rows if row.phase == "load")


def test_adapters_are_drawn_from_all_of_the_stage(whole: Whole) -> None:
    of_three = Counter(row.model for row in whole.rows if row.mode == "3 adapters" and row.phase == "load")
    assert set(of_three) == {"mock/boolq", "mock/viggo", "mock/random-1"}
    assert min(of_three.values()) > sum(of_three.values()) / 10
    assert {row.model for row in whole.rows if row.mode == "1 adapter"} == {"mock/boolq"}


def test_no_prompt_is_sent_twice(whole: Whole) -> None:
    prompts = [request["body"]["messages"][0]["content"] for request in whole.seen["requests"]]
    assert len(set(prompts)) == len(prompts) > 30


def test_only_what_openai_knows_is_sent_unless_asked(whole: Whole) -> None:
    for request in whole.seen["requests"]:
        assert set(request["body"]) == {"model", "stream", "messages", "max_tokens", "stream_options"}
        assert request["authorization"] == "Bearer sk-secret"


def test_api_key_is_written_nowhere(whole: Whole) -> None:
    assert "sk-secret" not in whole.said
    assert not [name for name, content in whole.files.items() if b"sk-secret" in content]


def test_users_keep_their_connection(whole: Whole) -> None:
    users = sum(stage.users for stage in whole.run.plan.stages)
    warm_ups = 3
    assert whole.seen["connections"] <= users + warm_ups < len(whole.seen["requests"])


def test_output_has_a_line_for_each_stage_and_the_table(whole: Whole) -> None:
    assert [line for line in whole.said.splitlines() if line.startswith("[")] == [
        line for n in range(1, 7) for line in whole.said.splitlines() if line.startswith(f"[{n}/6] ")
    ]
    assert sum(line.strip().startswith("3 adapters") for line in whole.said.splitlines()) == 2
    assert "report.html" in whole.said
    assert "1 of the 3 adapters are random" in whole.page
    assert set(whole.files) == {"report.html", "requests.jsonl", "run.json"}


def test_failures_are_told_apart_and_leave_the_rest_measured(tmp_path: Path) -> None:
    options = [
        "--users",
        2,
        "--stages",
        "base",
        "--stage-seconds",
        4,
        "--ramp-seconds",
        0.1,
        "--fail-on-error",
    ]
    with mock("--drop-every", 3, "--fail-every", 4, "--cut-every", 5, "--error-every", 7) as url:
        code, said, run, rows = loaded(url, tmp_path, *options)
    failed = [row for row in rows if row.outcome == "failed" and row.phase == "load"]
    errors = {(row.status, (row.error or "").split(":")[0]) for row in failed}
    assert errors == {
        (None, "ConnectionError"),
        (500, "HTTP 500"),
        (200, "the stream broke"),
        (200, "engine_lost"),
    }
    assert any("tired: the mock is tired" in (row.error or "") for row in failed)
    assert run.stages[0].locust_failures == len(failed)
    assert any(row.outcome == "completed" for row in rows)
    assert code == 1
    assert f"{len(failed)} failed" in said


def test_stage_in_which_everything_fails_fails_the_run(tmp_path: Path) -> None:
    options = [
        "--users",
        1,
        "--stages",
        "base",
        "--stage-seconds",
        0.8,
        "--ramp-seconds",
        0.1,
        "--no-warm-up",
    ]
    with mock("--fail-every", 1) as url:
        code, said, _, rows = loaded(url, tmp_path, *options)
    assert code == 1
    assert "no request measured" in said
    assert len(rows) < 10, "a refusing server is not hammered"


def test_model_that_answers_no_warm_up_ends_the_run_at_once_with_its_error(tmp_path: Path) -> None:
    with mock("--fail-every", 1) as url:
        code, said, run, rows = loaded(url, tmp_path, "--stages", "base", "--stage-seconds", 60)
    assert code == 1
    assert (len(rows), len(run.stages)) == (1, 0)
    assert "every warm-up request failed" in said
    assert "the mock is tired" in said


def test_completions_endpoint_with_forced_length(tmp_path: Path) -> None:
    options = ["--users", 1, "--stages", "base", "--stage-seconds", 0.8, "--ramp-seconds", 0.1]
    options += [
        "--endpoint",
        "completions",
        "--ignore-eos",
        "--temperature",
        0,
        "--no-usage",
        "--prompts",
        "tasks",
    ]
    with mock() as url:
        code, said, _, rows = loaded(url, tmp_path, *options)
        body = requests.get(f"{url}/seen", timeout=10).json()["requests"][-1]["body"]
    assert code == 0
    assert set(body) == {"model", "stream", "prompt", "max_tokens", "ignore_eos", "temperature"}
    assert body["prompt"].startswith("Reference ")
    assert {row.completion_tokens for row in rows} == {None}
    assert "no usage" in said


def test_open_loop_sends_on_time_and_counts_from_the_schedule(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'about = "x"\nadapters = ["base"]\nrates = [20]\narrivals = "constant"\nseconds = 2\nramp_seconds = 0.5\n'
        f"output_tokens = [{TOKENS}, {TOKENS}]\n"
    )
    out = tmp_path / "out"
    with mock("--ttft-ms", 400) as url:
        command = [sys.executable, "-m", "loadtest.run_experiment", file, "--url", url, "--out", out]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    load = [row for row in read_rows((out / ROWS_FILE).read_bytes().splitlines()) if row.phase == "load"]
    due = [row.scheduled for row in sorted(load, key=lambda row: row.scheduled)]
    assert [b - a for a, b in itertools.pairwise(due)] == pytest.approx([0.05] * (len(due) - 1), abs=1e-4)
    assert len(due) == 39  # a client with one request at a time would have sent four
    assert 0 <= median(row.sent - row.scheduled for row in load) < 0.02
    assert "20 requests/s asked for" in " ".join(done.stdout.split())
    assert "open loop" in (out / "report.html").read_text()


def test_interrupt_ends_cleanly_and_still_reports(tmp_path: Path) -> None:
    with mock() as url:
        process = start(url, tmp_path, "--users", "2", "--stages", "base", "--stage-seconds", 60)
        wait_for_rows(tmp_path, 30)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped early" in said
    assert "total ms" in said
    rows = read_rows((tmp_path / ROWS_FILE).read_bytes().splitlines())
    assert not any(row.outcome == "failed" for row in rows)
    assert 0 < read_run(tmp_path).stages[0].steady_until < 60


def test_load_process_that_stood_still_says_so(tmp_path: Path) -> None:
    with mock() as url:
        process = start(
            url, tmp_path, "--users", "2", "--stages", "base", "--stage-seconds", 3, "--ramp-seconds", 0.2
        )
        wait_for_rows(tmp_path, 15)
        (load,) = psutil.Process(process.pid).children()
        load.suspend()
        time.sleep(0.6)
        load.resume()
        said, _ = process.communicate(timeout=20)
    assert "the client was the bottleneck: its event loop was" in " ".join(said.split())
    assert read_run(tmp_path).stages[0].loop_lag_ms[2] > 500


def test_load_ends_when_the_harness_is_killed(tmp_path: Path) -> None:
    with mock() as url:
        process = start(url, tmp_path, "--users", "1", "--stages", "base", "--stage-seconds", 60)
        wait_for_rows(tmp_path, 5)
        process.kill()
        process.communicate()
        time.sleep(2.5)
        before = len(requests.get(f"{url}/seen", timeout=10).json()["requests"])
        time.sleep(0.5)
        assert len(requests.get(f"{url}/seen", timeout=10).json()["requests"]) == before


@pytest.fixture(scope="module")
def plain_mock() -> Iterator[str]:
    with mock() as url:
        yield url


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--base-url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--base-url", "nonsense"], "cannot be reached"),
        (["--stages", "7"], "the server offers none"),
        (["--ramp-seconds", "20"], "--stage-seconds must be more"),
        (["--stage-seconds", "nan"], "--stage-seconds must be more"),
        (["--stages", "base", "--users", "many"], "'many'"),
        (["--adapters-file", os.devnull, "--stages", "1"], "the server offers none"),
        (["--temperature", "nan"], "--temperature"),
    ],
)
def test_bad_options_are_refused_by_name(
    plain_mock: str, tmp_path: Path, options: list[str], says: str
) -> None:
    result = CliRunner().invoke(app, ["--base-url", plain_mock, "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def wait_for_rows(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    path = directory / ROWS_FILE
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            json.loads(path.read_bytes().splitlines()[0])
            return
        time.sleep(0.05)
    raise TimeoutError(f"no {count} rows in {path}")
