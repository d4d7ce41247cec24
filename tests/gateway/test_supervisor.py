"""The supervisor with small Python programs as children."""

import asyncio
import os
import signal
import sys
import time

import pytest

from gateway import supervisor
from gateway.supervisor import Program, Supervisor

FOREVER = "import time; print('up'); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print('grandchild', child.pid)
time.sleep(60)
"""


def python(name: str, source: str) -> Program:
    return Program(name, (sys.executable, "-c", source))


class Seen:
    """What the supervisor showed."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))

    async def until(self, name: str, text: str) -> str:
        async with asyncio.timeout(20):
            while True:
                for shown, line in self.lines:
                    if shown == name and text in line:
                        return line
                await asyncio.sleep(0.01)


async def test_every_line_carries_its_programs_name():
    seen = Seen()
    status = await Supervisor([python("a", "print('one'); print('two')")], seen).run()
    assert status == 1, "a program that ends by itself is a failure"
    assert seen.lines[:2] == [("a", "one"), ("a", "two")] or ("a", "two") in seen.lines


async def test_standard_error_is_shown_too():
    seen = Seen()
    await Supervisor([python("a", "import sys; print('trouble', file=sys.stderr)")], seen).run()
    assert ("a", "trouble") in seen.lines


async def test_the_death_of_one_ends_the_other():
    seen = Seen()
    started = time.monotonic()
    programs = [python("lasting", FOREVER), python("dying", "import sys; sys.exit(3)")]
    assert await Supervisor(programs, seen).run() == 1
    assert time.monotonic() - started < 20
    assert ("serve", "the dying ended with status 3; stopping everything") in seen.lines


async def test_a_kill_is_named():
    seen = Seen()
    await Supervisor([python("a", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], seen).run()
    assert ("serve", "the a was killed by SIGKILL; stopping everything") in seen.lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_all_with_status_0(number: signal.Signals):
    seen = Seen()
    running = asyncio.create_task(Supervisor([python("a", FOREVER), python("b", FOREVER)], seen).run())
    await seen.until("a", "up")
    await seen.until("b", "up")
    os.kill(os.getpid(), number)
    assert await asyncio.wait_for(running, 20) == 0


async def test_a_child_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 0.2)
    seen = Seen()
    running = asyncio.create_task(Supervisor([python("a", STUBBORN)], seen).run())
    await seen.until("a", "up")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 10) == 0


async def test_a_second_signal_does_not_wait():
    seen = Seen()
    running = asyncio.create_task(Supervisor([python("a", STUBBORN)], seen).run())
    await seen.until("a", "up")
    os.kill(os.getpid(), signal.SIGTERM)
    await seen.until("serve", "stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 5) == 0


async def test_what_a_child_started_ends_too():
    seen = Seen()
    running = asyncio.create_task(Supervisor([python("a", PARENT)], seen).run())
    grandchild = int((await seen.until("a", "grandchild")).split()[1])
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 20)
    for _ in range(200):
        if not _lives(grandchild):
            return
        await asyncio.sleep(0.02)
    pytest.fail("the grandchild is still there")


async def test_a_program_that_does_not_exist_ends_those_before_it():
    seen = Seen()
    with pytest.raises(FileNotFoundError):
        await Supervisor([python("a", FOREVER), Program("b", ("/no/such/program",))], seen).run()


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
