"""Ends work whose client has gone. Servers tell it only to who reads `receive`; knows nothing of what the work is."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar.types import Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


async def while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of `work`, which is cancelled as soon as the client leaves. The body must have been read before.

    Raises:
        ClientGoneError: the client left; `work` has ended.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
