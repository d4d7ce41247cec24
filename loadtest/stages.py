"""Runs the stages of a plan with Locust, inside the load process, and says what happened. Computes no metric.

Reads a `RunPlan` (JSON) from standard input; writes `loadtest.record.Message`s, one a line, to standard output.
SIGTERM ends the running stage early and cleanly; so does the end of the parent process.
"""

import logging
import os
import signal
import sys
from time import perf_counter, process_time

import gevent
import msgspec
from gevent.event import Event
from locust import User
from locust.clients import HttpSession
from locust.env import Environment
from locust.event import EventHook

from loadtest.metrics import percentile, ticks_missed
from loadtest.open_loop import run_open_loop
from loadtest.plan import RunPlan, Stage
from loadtest.record import Message, StageEnded, StageStarted, Trouble
from loadtest.schedule import arrival_times
from loadtest.user import RequestSource, go_direct, stage_user

LAG_INTERVAL_S = 0.01
SETTLE_S = 0.3
"""Between stages: lets the server notice the requests that were cut off."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=RunPlan)
    epoch = perf_counter()
    stop = Event()
    gevent.signal_handler(signal.SIGTERM, stop.set)
    gevent.spawn(_stop_with_parent, os.getppid(), stop)
    source = RequestSource(plan, os.environ.get(plan.api_key_env), _say, epoch)
    for number, stage in enumerate(plan.stages):
        if stop.is_set():
            break
        _say(StageStarted(stage=number, at=source.now()))
        if plan.warm_up and not _warm_up(source, stage, stop):
            break
        _say(_run_stage(source, number, stage, stop))
        stop.wait(SETTLE_S)


def _warm_up(source: RequestSource, stage: Stage, stop: Event) -> bool:
    """False when the run should end here: told to stop meanwhile, or every request failed.

    Uses a session of its own, outside Locust's statistics.
    """
    with HttpSession(source.plan.base_url, EventHook(), None) as client:
        go_direct(client, source.plan.base_url)
        asking = gevent.spawn(source.warm_up, client, stage)
        gevent.wait([asking, stop], count=1)
    if stop.is_set():
        asking.kill()
        return False
    if not asking.get():
        _say(Trouble(message=f"{stage.title}: every warm-up request failed, the run ended there."))
        return False
    return True


def _run_stage(source: RequestSource, number: int, stage: Stage, stop: Event) -> StageEnded:
    plan = source.plan
    users: list[type[User]] = [stage_user(source, stage)] if stage.rate is None else []
    environment = Environment(user_classes=users, host=plan.base_url)

    @environment.events.user_error.add_listener
    def give_up(exception: BaseException, **_: object) -> None:
        _say(Trouble(message=f"The load process broke: {type(exception).__name__}: {exception}"))
        stop.set()

    runner = environment.create_local_runner()
    probe = SelfProbe()
    started = source.now()
    steady_from = started + plan.ramp_seconds
    load: gevent.Greenlet | None = None
    if stage.rate is None:
        runner.start(stage.users, spawn_rate=stage.users)
    else:
        due = arrival_times(plan.arrivals, stage.rate, plan.stage_seconds, f"{plan.seed}/{stage.title}")
        load = gevent.spawn(run_open_loop, source, stage, due, environment.events.request)
    stop.wait(plan.ramp_seconds)
    probe.start()
    stop.wait(max(0.0, started + plan.stage_seconds - source.now()))
    steady_until = source.now()
    probe.stop()
    spawned = runner.user_count
    if load is not None:
        load.kill()
        if load.exception is not None:
            give_up(load.exception)
    runner.quit()
    total = environment.stats.total
    return StageEnded(
        stage=number,
        started=round(started, 6),
        steady_from=round(steady_from, 6),
        steady_until=round(steady_until, 6),
        interrupted=stop.is_set(),
        spawned_users=spawned,
        client_cpu_share=round(probe.cpu_share, 4),
        loop_lag_ms=probe.lag_ms,
        locust_requests=total.num_requests,
        locust_failures=total.num_failures,
        locust_average_ms=round(total.avg_response_time, 3),
    )


class SelfProbe:
    """Watches the load process while it measures: its CPU share, and how late its event loop wakes sleepers."""

    def __init__(self) -> None:
        self.cpu_share = 0.0
        self._late: list[float] = []

    def start(self) -> None:
        self._started, self._cpu_started = perf_counter(), process_time()
        self._watcher = gevent.spawn(self._watch)

    def stop(self) -> None:
        self._watcher.kill()
        elapsed = perf_counter() - self._started
        self.cpu_share = (process_time() - self._cpu_started) / elapsed if elapsed > 0 else 0.0

    @property
    def lag_ms(self) -> tuple[float, float, float]:
        """p50, p99, maximum."""
        late = sorted(self._late) or [0.0]
        p50, p99, most = (round(percentile(late, percent) * 1000, 3) for percent in (50, 99, 100))
        return (p50, p99, most)

    def _watch(self) -> None:
        while True:
            before = perf_counter()
            gevent.sleep(LAG_INTERVAL_S)
            late = max(0.0, perf_counter() - before - LAG_INTERVAL_S)
            self._late += ticks_missed(late, LAG_INTERVAL_S)


_encoder = msgspec.json.Encoder()


def _say(message: Message) -> None:
    try:
        sys.stdout.buffer.write(_encoder.encode(message) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The harness was killed. Raised in a user's greenlet it would be one more error of that user, who goes on.
        os._exit(1)


def _stop_with_parent(parent: int, stop: Event) -> None:
    while os.getppid() == parent:
        gevent.sleep(1.0)
    stop.set()
