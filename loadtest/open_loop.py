"""Load by a schedule: every request goes out at its time, whether or not earlier ones ended. Computes no metric.

Locust's users cannot do this: a user that waits for an answer sends nothing, so a stalled server slows its own load
and hides its stall. Here one greenlet walks the schedule and gives each request a greenlet of its own.
"""

from collections.abc import Sequence

import gevent
from gevent.pool import Group
from locust.clients import HttpSession
from locust.event import EventHook

from loadtest.plan import Stage
from loadtest.schedule import model_choice
from loadtest.user import RequestSource, go_direct


def run_open_loop(source: RequestSource, stage: Stage, due: Sequence[float], fired: EventHook) -> None:
    """Sends request k at `due[k]` seconds from now, until done or killed; a kill cuts off what is still running.

    Connections are kept and used again, the last one returned first; there are as many as requests in flight.
    """
    started = source.now()
    idle: list[HttpSession] = []
    opened: list[HttpSession] = []
    models = model_choice(source.plan, stage)
    running = Group()

    def send(number: int, model: str, at: float) -> None:
        if idle:
            client = idle.pop()
        else:
            client = HttpSession(source.plan.base_url, fired, None)
            go_direct(client, source.plan.base_url)
            opened.append(client)
        try:
            source.stream(client, stage, model, user=number, due=at)
        finally:
            idle.append(client)

    try:
        for number, offset in enumerate(due):
            at = started + offset
            gevent.sleep(max(0.0, at - source.now()))
            running.start(gevent.Greenlet(send, number, next(models), at))
        running.join()
    finally:
        running.kill()
        for client in opened:
            client.close()
