"""What was counted for each adapter, kept for a bounded number of them. Knows no Prometheus and no clock."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

MAX_ADAPTERS = 200
"""Adapters with figures of their own: some 3,000 time series. Dashboards of more are read by nobody."""
OTHER_ADAPTER = "(other)"
"""The label under which the figures of all further adapters are added up."""


@dataclass(slots=True)
class Timing:
    """How often, and how many seconds in all."""

    count: int = 0
    seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def add(self, other: "Timing") -> None:
        self.count += other.count
        self.seconds += other.seconds


@dataclass(slots=True)
class Tally:
    """The figures of one adapter; they only grow."""

    requests: Counter[str] = field(default_factory=Counter)
    """Finished requests by how they ended."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue: Timing = field(default_factory=Timing)
    time_to_first_token: Timing = field(default_factory=Timing)
    inter_token: Timing = field(default_factory=Timing)

    def add(self, other: "Tally") -> None:
        self.requests.update(other.requests)
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.queue.add(other.queue)
        self.time_to_first_token.add(other.time_to_first_token)
        self.inter_token.add(other.inter_token)


class Tallies:
    """Figures by adapter. One more than `limit`, and those of the least recently used go to `OTHER_ADAPTER`.

    So sums over all adapters stay exact and no figure ever shrinks; an adapter that comes back starts at zero, which
    Prometheus takes for a restart. Names in parentheses and the empty one are no adapters and always stay.
    """

    def __init__(self, limit: int = MAX_ADAPTERS) -> None:
        self._limit = limit
        self._adapters: OrderedDict[str, Tally] = OrderedDict()
        self._others: dict[str, Tally] = {}

    def of(self, name: str) -> Tally:
        """The figures to count on, under this label."""
        if not name or name.startswith("("):
            return self._others.setdefault(name, Tally())
        if (tally := self._adapters.get(name)) is not None:
            self._adapters.move_to_end(name)
            return tally
        while len(self._adapters) >= self._limit:
            _, forgotten = self._adapters.popitem(last=False)
            self.of(OTHER_ADAPTER).add(forgotten)
        return self._adapters.setdefault(name, Tally())

    def all(self) -> list[tuple[str, Tally]]:
        """Every label with its figures. May be called from another thread."""
        return [*self._others.copy().items(), *self._adapters.copy().items()]
