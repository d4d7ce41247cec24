"""Runs programs as child processes and ends them together. Knows nothing of engines, gateways or configuration."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STOP_GRACE_S = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LINE_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Program:
    """A command to run, and the name that its output carries."""

    name: str
    command: tuple[str, ...]


class Supervisor:
    """Child processes that live and die together: when one ends, or on SIGINT, SIGTERM or SIGHUP, all are ended.

    `show(name, line)` gets every line that a child writes, and the supervisor's own under the name `serve`.
    """

    def __init__(self, programs: Sequence[Program], show: Callable[[str, str], None]) -> None:
        self._programs = programs
        self._show = show
        self._stop = asyncio.Event()
        self._signal: signal.Signals | None = None
        self._children: list[asyncio.subprocess.Process] = []

    async def run(self) -> int:
        """Start the programs in order and wait. Returns 0 after a signal, else 1: no program should end by itself."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        readers: list[asyncio.Task[None]] = []
        waiters: list[asyncio.Task[None]] = []
        try:
            for program in self._programs:
                child = await self._start(program)
                readers.append(asyncio.create_task(self._read(program.name, child)))
                waiters.append(asyncio.create_task(self._await_end(program.name, child)))
            await self._stop.wait()
            if self._signal is not None:
                self._show("serve", f"stopping on {self._signal.name}")
        finally:
            # The last started goes first: a gateway stops asking before its engine stops answering.
            for child in reversed(self._children):
                await _end(child)
            await asyncio.gather(*waiters, *readers)
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return 0 if self._signal is not None else 1

    async def _start(self, program: Program) -> asyncio.subprocess.Process:
        # A group of its own: Ctrl-C in the terminal reaches the supervisor alone, which then ends all in order.
        child = await asyncio.create_subprocess_exec(
            *program.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            limit=_LINE_LIMIT,
        )
        self._children.append(child)
        return child

    async def _read(self, name: str, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:
                self._show(name, f"(a line of more than {_LINE_LIMIT} bytes was left out)")
                continue
            if not line:
                return
            self._show(name, line.decode(errors="replace").rstrip())

    async def _await_end(self, name: str, child: asyncio.subprocess.Process) -> None:
        status = await child.wait()
        if not self._stop.is_set():
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with status {status}"
            )
            self._show("serve", f"the {name} {how}; stopping everything")
            self._stop.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal is not None:
            for child in self._children:
                _signal_group(child, signal.SIGKILL)
        self._signal = signal.Signals(number)
        self._stop.set()


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask the child's process group to end; after `STOP_GRACE_S`, kill it."""
    _signal_group(child, signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            await child.wait()
    except TimeoutError:
        pass
    _signal_group(child, signal.SIGKILL)


def _signal_group(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
