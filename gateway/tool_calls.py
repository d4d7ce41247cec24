"""Function calls in the text of an answer, read as it comes, in each family's way of writing them. Knows no tokens.

Whatever pieces a text is fed in, what is read from it, put together, is the same.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

ToolFormat = Literal["hermes", "mistral", "llama3"]
ARGUMENTS = ("arguments", "parameters")
WHITE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call whose name is known; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallStart | ArgumentsPiece


@dataclass(frozen=True, slots=True)
class Syntax:
    """How calls are written: `opening`, objects with `separators` (and white space) around them, `closing`."""

    opening: str
    closing: str = ""
    separators: str = ""
    bare: bool = False
    """Calls may begin an answer without `opening`."""
    opening_is_special: bool = False
    """`opening` is a special token, no text to show."""
    certain: bool = True
    """What begins like a call is meant as one."""


SYNTAX: dict[ToolFormat, Syntax] = {
    "hermes": Syntax("<tool_call>", "</tool_call>"),
    "mistral": Syntax("[TOOL_CALLS]", separators="[,]", opening_is_special=True),
    "llama3": Syntax("<|python_tag|>", separators=";", bare=True, opening_is_special=True, certain=False),
}
FORCED = Syntax("", separators="[,]", bare=True)
"""An answer that a grammar made a call, or a list of them, whatever the family."""


def format_of_template(source: str) -> ToolFormat | None:
    """The way of writing calls that a chat template teaches; None for one we cannot read."""
    if "<tool_call>" in source and "<function=" not in source:
        return "hermes"
    if "[TOOL_CALLS]" in source and "[ARGS]" not in source:
        return "mistral"
    if "<|python_tag|>" in source or '{"name": function name, "parameters"' in source:
        return "llama3"
    return None


class ToolCallReader:
    """One answer's text, told apart into calls and what is none.

    Args:
        names: The functions there are. A bare object with another name is no call.
        single: Read the first call and drop the others.
    """

    def __init__(self, syntax: Syntax, names: Collection[str], *, single: bool = False) -> None:
        self._syntax = syntax
        self._names = names if syntax.bare else None
        self._single = single
        self._read = self._read_text
        self._rest = ""
        """Fed but not read yet."""
        self._held = ""
        """Read from the opening on, to be shown if no call comes of it."""
        self._may_be_bare = syntax.bare
        self._skips_white = False
        """White space between a call and the text after it belongs to neither."""
        self._object: _CallObject | None = None
        self._begun = False
        """The object under way has been given out as a call."""
        self.calls = 0
        self.complete = 0
        """Of the calls, how many have all their arguments."""

    def feed(self, text: str) -> list[Event]:
        self._rest += text
        events: list[Event] = []
        while self._rest and self._read(events):
            pass
        return events

    def finish(self, *, cut_off: bool) -> list[Event]:
        """What is left when no more text comes; `cut_off` is a call's beginning not shown as text."""
        left, self._rest = self._held + self._rest, ""
        if self._begun or self._read == self._read_after:
            return []
        if cut_off and self._syntax.certain and self._read != self._read_text:
            return []
        return _content(left.rstrip(WHITE) if self.calls else left)

    # Each of these reads what it can of the rest, says whether it got on, and leaves its successor in `_read`.

    def _read_text(self, events: list[Event]) -> bool:
        if self._skips_white:
            self._rest = self._rest.lstrip(WHITE)
            if not self._rest:
                return False
            self._skips_white = False
        if self._may_be_bare:
            first = self._rest.lstrip(WHITE)[:1]
            if not first:
                return False
            self._may_be_bare = False
            if first in "{" + self._syntax.separators:
                self._read = self._read_opened
                return True
        opening = self._syntax.opening
        if not opening:
            events += _content(self._rest)
            self._rest = ""
            return False
        before, found, after = self._rest.partition(opening)
        if found:
            events += _content(before.rstrip(WHITE))
            self._held = "" if self._syntax.opening_is_special else opening
            self._rest = after
            self._read = self._read_opened
            return True
        certain = before[: len(before) - _overlap(before, opening)].rstrip(WHITE)
        events += _content(certain)
        self._rest = before[len(certain) :]
        return False

    def _read_opened(self, events: list[Event]) -> bool:
        rest = self._rest.lstrip(WHITE + self._syntax.separators)
        self._held += self._rest[: len(self._rest) - len(rest)]
        self._rest = rest
        if not rest:
            return False
        if rest[0] == "{":
            self._open_object()
        else:
            self._give_back(events)
        return True

    def _read_object(self, events: list[Event]) -> bool:
        call = self._object
        assert call is not None
        taken = call.feed(self._rest)
        self._held += self._rest[:taken]
        self._rest = self._rest[taken:]
        if call.started:
            self._give_out(call, events)
        if not (call.done or call.broken):
            return False
        if call.started:
            self._begun = False
            self._read = self._read_after
        else:
            self._give_back(events)
        return True

    def _read_after(self, events: list[Event]) -> bool:
        closing = self._syntax.closing
        self._rest = self._rest.lstrip(WHITE + self._syntax.separators)
        if not self._rest or (closing != self._rest and closing.startswith(self._rest)):
            return False
        if self._rest[0] == "{":
            self._open_object()
        else:
            self._rest = self._rest.removeprefix(closing)
            self._skips_white = True
            self._read = self._read_text
        return True

    def _open_object(self) -> None:
        self._object = _CallObject(self._names)
        self._read = self._read_object

    def _give_out(self, call: "_CallObject", events: list[Event]) -> None:
        fresh, closed = call.take_arguments(), call.arguments_closed
        self._held = ""
        if not self._begun:
            self._begun = True
            self.calls += 1
            if self._is_kept:
                events.append(CallStart(self.calls - 1, call.name or ""))
        if self._is_kept and fresh:
            events.append(ArgumentsPiece(self.calls - 1, fresh))
        if self._is_kept and closed and self.complete < self.calls:
            self.complete = self.calls

    @property
    def _is_kept(self) -> bool:
        return self.calls == 1 or not self._single

    def _give_back(self, events: list[Event]) -> None:
        events += _content(self._held)
        self._held = ""
        self._read = self._read_text


class _CallObject:
    """`{"name": ..., "arguments": {...}}`, fed character by character; `parameters` means the same.

    Other keys are skipped. Arguments may be JSON in a string. Inside the arguments only brackets and strings are
    followed: what a model gets wrong in there is shown to whoever asked, as OpenAI does.
    """

    __slots__ = (
        "_fresh",
        "_has_arguments",
        "_inside",
        "_key",
        "_names",
        "_state",
        "_string",
        "arguments_closed",
        "broken",
        "done",
        "name",
    )

    def __init__(self, names: Collection[str] | None) -> None:
        self._names = names
        self._state = self._at_open
        self._key = ""
        self._string: list[str] = []
        """Of the string under way, between its quotes."""
        self._inside = _Nest()
        self._fresh: list[str] = []
        """Arguments not taken yet."""
        self._has_arguments = False
        self.arguments_closed = False
        self.name: str | None = None
        self.done = False
        self.broken = False
        """It is no call, or no JSON."""

    @property
    def started(self) -> bool:
        """The name is known, and that arguments follow or that there are none."""
        return self.name is not None and (self._has_arguments or self.done)

    def feed(self, text: str) -> int:
        """How many characters belong to the object, or were needed to see that it is none."""
        for position, character in enumerate(text):
            self._state(character)
            if self.done or self.broken:
                return position + 1
        return len(text)

    def take_arguments(self) -> str:
        """Of the JSON text of the arguments, what is new."""
        fresh = "".join(self._fresh)
        self._fresh.clear()
        return fresh

    def _at_open(self, character: str) -> None:
        self._state = self._at_key
        self.broken = character != "{"

    def _at_key(self, character: str) -> None:
        if character == '"':
            self._state = self._in_key
        elif character == "}":
            self._end()
        else:
            self.broken = character not in WHITE

    def _in_key(self, character: str) -> None:
        if (key := self._read_string(character)) is not None:
            self._key = key
            self._state = self._at_colon

    def _at_colon(self, character: str) -> None:
        if character == ":":
            self._state = self._at_value
        else:
            self.broken = character not in WHITE

    def _at_value(self, character: str) -> None:
        if character in WHITE:
            return
        if self._is_arguments:
            self.broken = self._has_arguments or character not in '{"n'
            if character == "{":
                self._has_arguments = True
                self._fresh.append(character)
        elif self._key == "name":
            self.broken = self.name is not None or character != '"'
        else:
            self.broken = character in "]},:"
        if character == '"':
            self._state = self._in_string
        elif character in "{[":
            self._inside = _Nest()
            self._state = self._in_nest
        else:
            self._state = self._in_scalar

    def _in_string(self, character: str) -> None:
        if (text := self._read_string(character)) is None:
            return
        self._state = self._after_value
        if self._key == "name":
            self.broken = not text or not (self._names is None or text in self._names)
            self.name = None if self.broken else text
        elif self._is_arguments:
            self._fresh.append(text)
            self._has_arguments = self.arguments_closed = True

    def _in_nest(self, character: str) -> None:
        if self._is_arguments:
            self._fresh.append(character)
        if self._inside.closes_with(character):
            self._state = self._after_value
            self.arguments_closed = self.arguments_closed or self._is_arguments

    def _in_scalar(self, character: str) -> None:
        if character in ",}" or character in WHITE:
            self._state = self._after_value
            self._after_value(character)

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._state = self._at_key
        elif character == "}":
            self._end()
        else:
            self.broken = character not in WHITE

    def _end(self) -> None:
        self.done = self.name is not None
        self.broken = not self.done
        if not self._has_arguments:
            self._fresh.append("{}")
            self.arguments_closed = True

    def _read_string(self, character: str) -> str | None:
        """The string, once its closing quote has come."""
        is_escaped = len(self._string) > 0 and self._string[-1] == "\\"
        if character == '"' and not is_escaped:
            quoted, self._string = "".join(self._string), []
            try:
                text: str = json.loads(f'"{quoted}"', strict=False)
                text.encode()  # half a surrogate pair could not be sent on
            except ValueError:
                self.broken = True
                return None
            return text
        # An escape is kept as one item, so that the last item alone tells whether the next character is escaped.
        if is_escaped:
            self._string[-1] += character
        else:
            self._string.append(character)
        return None

    @property
    def _is_arguments(self) -> bool:
        return self._key in ARGUMENTS


class _Nest:
    """Brackets within brackets, and strings in them."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self) -> None:
        self._depth = 1
        self._in_string = self._escaped = False

    def closes_with(self, character: str) -> bool:
        """Whether this is the bracket that closes the outermost."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _overlap(text: str, opening: str) -> int:
    """How many characters at the end of `text` are a beginning of `opening`."""
    for length in range(min(len(opening) - 1, len(text)), 0, -1):
        if text.endswith(opening[:length]):
            return length
    return 0
