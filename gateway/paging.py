"""OpenAI's cursor pages. Knows nothing of what is on them."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import msgspec
from litestar import Request
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute

from gateway.errors import InvalidRequestError


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=HasId)


@dataclass(frozen=True, slots=True)
class PageWanted:
    """Which part of a list, ordered by id."""

    limit: int
    after: str | None = None
    """The last id of the page before; it may have been deleted meanwhile."""
    order: Literal["asc", "desc"] = "desc"

    def narrow(self, query: Select, column: InstrumentedAttribute[str]) -> Select:
        """The page's rows, and one more if there are more."""
        descends = self.order == "desc"
        if self.after is not None:
            query = query.where(column < self.after if descends else column > self.after)
        return query.order_by(column.desc() if descends else column).limit(self.limit + 1)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_wanted(request: Request, *, default: int, most: int) -> PageWanted:
    """What `limit`, `after` and `order` of the address say. Raises `InvalidRequestError`."""
    given = request.query_params
    limit = given.get("limit", str(default))
    if not limit.isascii() or not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= most:
        raise InvalidRequestError(f"Invalid 'limit': must be between 1 and {most}.", param="limit")
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("Invalid 'order': must be 'asc' or 'desc'.", param="order")
    return PageWanted(int(limit), given.get("after") or None, order)


def page_of(items: list[Item], wanted: PageWanted) -> Page:
    """Args: items: As `PageWanted.narrow` found them, in OpenAI's shape."""
    shown = items[: wanted.limit]
    return Page(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(items) > wanted.limit,
    )
