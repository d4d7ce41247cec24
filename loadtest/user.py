"""A Locust user that streams completions and times every event. Knows one stage, not the run; computes no metric.

`HttpUser`, because its streams hand over bytes as they arrive; `FastHttpUser` collects 1,024 of them first, which
ruins the time to the first token. Locust times a streamed request at its headers, so the true total time is put
into its report before it is made: one request event a request, with the time the user waited.
"""

import json
import random
from collections.abc import Callable
from http.client import HTTPException
from itertools import pairwise
from time import perf_counter

import gevent
from locust import HttpUser, constant, task
from locust.clients import HttpSession
from requests import RequestException
from urllib3.exceptions import HTTPError

from loadtest.plan import RunPlan, Stage, is_loopback
from loadtest.prompts import Prompts
from loadtest.record import Outcome, RequestRow
from loadtest.schedule import model_choice
from loadtest.stream import CompletionStream, error_message

READ_BYTES = 65536
CONNECT_TIMEOUT_S = 10.0
WARM_UP_TOKENS = 2
PAUSE_AFTER_FAILURE_S = 0.25
"""Keeps a server that refuses at once from being asked thousands of times a second."""


class RequestSource:
    """Hands every request of a run its number, prompt and clock, and keeps its row. Shared by all users."""

    def __init__(
        self, plan: RunPlan, api_key: str | None, keep: Callable[[RequestRow], None], epoch: float
    ) -> None:
        self.plan = plan
        self._keep = keep
        self._epoch = epoch
        self._prompts = Prompts(
            plan.prompt_kind,
            plan.prompt_tokens,
            plan.seed,
            plan.nonce,
            most=plan.prompt_tokens_most,
            shared_tokens=plan.shared_prefix_tokens,
        )
        self._next_index = 0
        self._seen: set[str] = set()
        self._path = "/v1/chat/completions" if plan.endpoint == "chat" else "/v1/completions"
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def now(self) -> float:
        """Seconds since the run's start."""
        return perf_counter() - self._epoch

    def warm_up(self, client: HttpSession, stage: Stage) -> bool:
        """A short request to each model of the stage that the run has not asked yet, one after the other.

        False when there were such models and every request failed.
        """
        unasked = [model for model in stage.models if model not in self._seen]
        outcomes = [self.stream(client, stage, model, user=0, warm_up=True) for model in unasked]
        return not unasked or "completed" in outcomes

    def stream(
        self,
        client: HttpSession,
        stage: Stage,
        model: str,
        *,
        user: int,
        warm_up: bool = False,
        due: float | None = None,
    ) -> Outcome:
        """Sends one request and reads its stream to the end, or until the greenlet is killed. Keeps one row.

        `due`: when the schedule of an open loop wanted it sent, on the clock of `now`.
        """
        index = self._next_index
        self._next_index += 1
        cold = model not in self._seen
        self._seen.add(model)
        body = self._body(model, index, warm_up)
        heard = CompletionStream()
        outcome: Outcome = "incomplete"
        status: int | None = None
        error: str | None = None
        headers: float | None = None
        sent = self.now()
        scheduled = sent if due is None else due
        try:
            with client.post(
                self._path,
                data=body,
                headers=self._headers,
                name=stage.title,
                stream=True,
                catch_response=True,
                timeout=(CONNECT_TIMEOUT_S, self.plan.timeout_s),
            ) as response:
                headers = self.now()
                status = response.status_code or None
                try:
                    if response.error is not None:
                        headers = None
                        error = f"{type(response.error).__name__}: {response.error}"
                    elif status != 200:
                        error = f"HTTP {status}: {_refusal(response.content)}"
                    else:
                        while piece := response.raw.read1(READ_BYTES, decode_content=True):
                            heard.feed(piece, self.now())
                        heard.close(self.now())
                        error = heard.error
                except (HTTPError, HTTPException, RequestException, OSError) as broken:
                    error = f"the stream broke: {type(broken).__name__}: {broken}"
                finally:
                    if response.raw is not None:
                        response.close()
                outcome = "failed" if error else "completed"
                response.request_meta.update(  # pyright: ignore[reportAttributeAccessIssue]
                    response_time=((heard.done_at or self.now()) - scheduled) * 1000,
                    response_length=heard.completion_tokens or 0,
                )
                if error:
                    response.failure(error)
                else:
                    response.success()
        finally:
            times = heard.event_times
            self._keep(
                RequestRow(
                    run=self.plan.run,
                    mode=stage.mode,
                    users=stage.users,
                    phase="warmup" if warm_up else "load",
                    index=index,
                    user=user,
                    model=model,
                    adapter=model if stage.adapters else None,
                    cold=cold,
                    scheduled=round(scheduled, 6),
                    sent=round(sent, 6),
                    headers=_microseconds(headers),
                    first_content=_microseconds(times[0]) if times else None,
                    last_content=_microseconds(times[-1]) if times else None,
                    done=_microseconds(heard.done_at),
                    prompt_tokens=heard.prompt_tokens,
                    cached_tokens=heard.cached_tokens,
                    completion_tokens=heard.completion_tokens,
                    events=len(times),
                    gaps=tuple(round(b - a, 6) for a, b in pairwise(times)),
                    outcome=outcome,
                    status=status,
                    error=error,
                    finish_reason=heard.finish_reason,
                )
            )
        return outcome

    def _body(self, model: str, index: int, warm_up: bool) -> bytes:
        plan = self.plan
        text = self._prompts.text(index, model)
        body: dict = {"model": model, "stream": True}
        if plan.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        limit = plan.max_tokens
        if plan.max_tokens_least is not None:
            limit = random.Random(f"{plan.seed}/limit/{index}").randint(plan.max_tokens_least, limit)
        body[plan.max_tokens_field] = min(limit, WARM_UP_TOKENS) if warm_up else limit
        if plan.ask_usage:
            body["stream_options"] = {"include_usage": True}
        if plan.temperature is not None:
            body["temperature"] = plan.temperature
        if plan.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()


def stage_user(source: RequestSource, stage: Stage) -> type[HttpUser]:
    """The user class of a stage. User k of n starts k/n of the ramp after the first: a line, not a burst."""
    models = model_choice(source.plan, stage)
    arrivals = iter(range(stage.users))

    class StageUser(HttpUser):
        host = source.plan.base_url
        wait_time = constant(source.plan.think_seconds)

        def on_start(self) -> None:
            go_direct(self.client, source.plan.base_url)
            self.number = next(arrivals)
            gevent.sleep(source.plan.ramp_seconds * self.number / stage.users)

        @task
        def ask(self) -> None:
            if source.stream(self.client, stage, next(models), user=self.number) == "failed":
                gevent.sleep(PAUSE_AFTER_FAILURE_S)

    return StageUser


def go_direct(client: HttpSession, url: str) -> None:
    """Keeps proxies and `.netrc` out of the way to a server on this machine."""
    client.trust_env = not is_loopback(url)


def _refusal(content: bytes | None) -> str:
    try:
        return error_message(json.loads(content or b""))
    except ValueError:
        return error_message((content or b"").decode(errors="replace"))


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
