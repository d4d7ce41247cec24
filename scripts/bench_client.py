"""The benchmarks' client: users that each send their next request when their last answer is complete. Knows HTTP only."""

import asyncio
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from loadtest.prompts import WORDS


class BenchError(Exception):
    """A server or an answer is not what it must be; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: its prompt, and the fields that choose model and adapter."""

    prompt: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The times of one request, in seconds of `time.perf_counter`."""

    sent_s: float
    times_s: list[float]
    """When each event with text came."""
    tokens: int
    prompt_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one event and the next."""
        return [later - earlier for earlier, later in pairwise(self.times_s)]

    def tokens_between(self, start_s: float, end_s: float) -> float:
        """Tokens that came in this time; those of a request are spread evenly over its events."""
        return self.tokens * sum(start_s <= each < end_s for each in self.times_s) / len(self.times_s)


async def closed_loop(
    url: str,
    name: str,
    work: Iterable[Question],
    users: int,
    output_tokens: int,
    *,
    answers: list[Answer] | None = None,
    failures: list[str] | None = None,
) -> list[Answer]:
    """Put all questions, `users` at a time. Answers are added to `answers` as they come.

    Raises:
        BenchError, aiohttp.ClientError: an answer is an error; with `failures` it is put there instead.
    """
    waiting = iter(work)
    found = [] if answers is None else answers
    timeout = aiohttp.ClientTimeout(total=900)
    # A connection for each request: llama.cpp closes it after a stream, in a race with the next request.
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout, read_bufsize=2**20
    ) as session:

        async def user() -> None:
            for question in waiting:
                try:
                    found.append(await _ask(session, url, name, question, output_tokens))
                except (BenchError, aiohttp.ClientError, TimeoutError) as error:
                    if failures is None:
                        raise
                    failures.append(str(error) or type(error).__name__)
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(user() for _ in range(users)))
    return found


async def _ask(
    session: aiohttp.ClientSession, url: str, name: str, question: Question, output_tokens: int
) -> Answer:
    body = question.fields | {
        "prompt": question.prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise BenchError(f"{name} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip() or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise BenchError(f"{name} failed in a stream: {event['error']}")
            usage = event.get("usage") or usage
            if event.get("choices") and event["choices"][0].get("text"):
                times.append(time.perf_counter())
    if not times or not usage:
        raise BenchError(f"{name} sent no {'text' if usage else 'usage'}")
    return Answer(sent, times, usage["completion_tokens"], usage["prompt_tokens"])


def random_prompt(tokenizer: Tokenizer, rng: random.Random, tokens: int) -> str:
    """Random words, cut to this many tokens."""
    text = " ".join(rng.choice(WORDS) for _ in range(tokens))
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids[:tokens])


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank, of sorted values."""
    return round(values[round(share * (len(values) - 1))], 4)
