"""Responses that are kept, to be read again and gone on from. Knows nothing of what is in them.

In memory: they end with the process, and another gateway process does not have them.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response and what it answered."""

    id: str
    body: bytes
    """As it was sent."""
    input_items: list[dict[str, Any]]
    """Of its own request, without those of the responses before it."""
    input_bytes: int
    previous_id: str | None


class ResponseStore:
    """Bounded by bytes: the one not used for longest goes first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._max_bytes = max_bytes
        self._bytes = 0

    async def save(self, response: StoredResponse) -> None:
        self._kept[response.id] = response
        self._bytes += _size(response)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    async def find(self, response_id: str) -> StoredResponse | None:
        response = self._kept.get(response_id)
        if response is not None:
            self._kept.move_to_end(response_id)
        return response

    async def delete(self, response_id: str) -> bool:
        """Whether there was one."""
        response = self._kept.pop(response_id, None)
        if response is not None:
            self._bytes -= _size(response)
        return response is not None


def _size(response: StoredResponse) -> int:
    return len(response.body) + response.input_bytes
