"""Finds stop strings in a text that comes in pieces, and holds back what may become one. Knows no tokens."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first of `stops`; never a part of one that turns out to be complete.

    Args:
        keep: Let that one through too.
    """

    __slots__ = ("_held", "_keep", "_stops", "found")

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._held = ""
        self.found = False
        """Whether one was met; nothing is let through any more."""

    def feed(self, text: str) -> str:
        """The text that may be shown now."""
        if not self._stops or not text:
            return text
        text = self._held + text
        found = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.found = True
            self._held = ""
            start, stop = min(found, key=lambda each: each[0])
            return text[: start + len(stop)] if self._keep else text[:start]
        shown = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
