"""What is decided before a stage starts: when requests are due, and which models they go to. Pure; knows no clock."""

import random
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate

from loadtest.plan import Arrivals, RunPlan, Stage


def arrival_times(kind: Arrivals, rate: float, seconds: float, seed: str) -> list[float]:
    """Seconds from the stage's start at which requests are due, before `seconds`; the same for the same seed.

    `constant`: every 1/rate; `poisson`: gaps drawn from the exponential distribution with that mean.
    """
    source = random.Random(seed)
    times: list[float] = []
    due = 0.0
    while True:
        due += 1 / rate if kind == "constant" else source.expovariate(rate)
        if due >= seconds:
            return times
        times.append(due)


def model_choice(plan: RunPlan, stage: Stage) -> Iterator[str]:
    """The models of a stage's requests, one after the other without end: the same for the same seed."""
    source = random.Random(f"{plan.seed}/{stage.title}")
    totals = list(accumulate(stage.weights or (1.0,) * len(stage.models)))
    while True:
        yield stage.models[bisect(totals, source.random() * totals[-1], hi=len(totals) - 1)]
