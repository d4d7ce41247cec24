"""A circuit breaker: when an upstream is left alone, and who may try it again. Knows no clock and no network."""

from dataclasses import dataclass


@dataclass(slots=True)
class Breaker:
    """Closed until `limit` failures in a row, then open for `pause_s`, then half-open: one request probes.

    Every `now` is in seconds of one clock.
    """

    limit: int
    pause_s: float
    failures: int = 0
    """In a row."""
    open_until: float | None = None
    """None while closed."""
    probing: bool = False

    def refusal_s(self, now: float) -> float | None:
        """None: go ahead, and report how it went. Otherwise in how many seconds asking again makes sense."""
        if self.open_until is None:
            return None
        if now < self.open_until:
            return self.open_until - now
        if self.probing:
            return self.pause_s
        self.probing = True
        return None

    def answered(self) -> None:
        """An answer began. It closes the circuit, but a failure in its midst opens it again at once."""
        self.open_until = None
        self.probing = False

    def succeeded(self) -> None:
        """An answer came whole."""
        self.answered()
        self.failures = 0

    def failed(self, now: float) -> None:
        self.failures += 1
        self.probing = False
        if self.failures >= self.limit:
            self.open_until = now + self.pause_s

    def abandoned(self) -> None:
        """The client left before anything was learnt; the next request probes."""
        self.probing = False
