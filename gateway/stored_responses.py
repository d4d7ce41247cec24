"""Responses that clients asked to keep, by id. Knows nothing of what is in them."""

from collections.abc import Callable
from dataclasses import dataclass
from time import time

from sqlalchemy import delete, or_, select

from gateway.storage import Storage
from gateway.tables import StoredResponse

MAX_CHAIN = 1000
"""Responses that may hang on one another."""


@dataclass(frozen=True, slots=True)
class KeptResponse:
    id: str
    payload: bytes
    """JSON."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    previous_id: str | None = None
    """The response that this one answers on."""


class StoredResponses:
    """Every method raises `StorageUnavailableError` when the database is locked or gone.

    An owner sees only what is its own; what has expired is not there.
    """

    def __init__(self, storage: Storage, now: Callable[[], float] = time) -> None:
        self._storage = storage
        self._now = now

    async def put(self, response: KeptResponse, owner: str = "") -> None:
        """Keep a response, instead of what was kept under its id."""
        row = StoredResponse(
            id=response.id,
            owner=owner,
            created_at=response.created_at,
            expires_at=response.expires_at,
            previous_id=response.previous_id,
            payload=response.payload.decode(),
        )
        async with self._storage.writing() as session:
            await session.merge(row)

    async def get(self, response_id: str, owner: str = "") -> KeptResponse | None:
        chain = await self._read(response_id, owner, 1)
        return chain[0] if chain else None

    async def chain(self, response_id: str, owner: str = "") -> list[KeptResponse]:
        """A response and those it hangs on, the first of the conversation first; empty when there is none.

        The list begins later where an earlier one was deleted or has expired.
        """
        return (await self._read(response_id, owner, MAX_CHAIN))[::-1]

    async def delete(self, response_id: str, owner: str = "") -> bool:
        """Whether it was there."""
        async with self._storage.writing() as session:
            found = await session.scalars(
                delete(StoredResponse)
                .where(StoredResponse.id == response_id, StoredResponse.owner == owner)
                .returning(StoredResponse.id)
            )
            return found.first() is not None

    async def delete_expired(self) -> None:
        async with self._storage.writing() as session:
            await session.execute(delete(StoredResponse).where(StoredResponse.expires_at <= self._now()))

    async def _read(self, response_id: str, owner: str, limit: int) -> list[KeptResponse]:
        found: list[KeptResponse] = []
        wanted: str | None = response_id
        async with self._storage.reading() as session:
            while wanted is not None and len(found) < limit:
                row = await session.scalar(
                    select(StoredResponse).where(
                        StoredResponse.id == wanted,
                        StoredResponse.owner == owner,
                        or_(StoredResponse.expires_at.is_(None), StoredResponse.expires_at > self._now()),
                    )
                )
                if row is None:
                    break
                found.append(
                    KeptResponse(
                        row.id, row.payload.encode(), row.created_at, row.expires_at, row.previous_id
                    )
                )
                wanted = row.previous_id
        return found
