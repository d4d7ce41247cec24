"""A spending cap that is never passed. Knows dollars and who waits, no price, no request."""

import asyncio


class SpendingCap:
    """Lets a request go only when its worst case still fits under the cap beside all others under way.

    While others are under way it waits: they usually cost less than their worst case. A request that does not fit
    even alone is refused.
    """

    def __init__(self, cap: float, spent: float = 0.0) -> None:
        self.cap = cap
        self.spent = spent
        self._reserved = 0.0
        self._under_way = 0
        self._settled = asyncio.Condition()

    async def reserve(self, worst_case: float) -> bool:
        """True: the amount is set aside and must be settled. False: it would pass the cap."""
        if not worst_case:
            return True
        async with self._settled:
            await self._settled.wait_for(lambda: self._fits(worst_case) or not self._under_way)
            if not self._fits(worst_case):
                return False
            self._reserved += worst_case
            self._under_way += 1
            return True

    async def settle(self, worst_case: float, cost: float) -> None:
        """The request has ended and cost so much."""
        self.spent += cost
        if not worst_case:
            return
        async with self._settled:
            self._under_way -= 1
            self._reserved = self._reserved - worst_case if self._under_way else 0.0
            self._settled.notify_all()

    def _fits(self, amount: float) -> bool:
        return self.spent + self._reserved + amount <= self.cap
