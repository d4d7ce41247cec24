"""What a name stands for: aliases, splits, fallbacks. Pure; knows neither engines nor upstreams.

Names of our engines that the configuration says nothing more about are not known here.
"""

from hashlib import blake2b

from gateway.config import GatewayConfig
from gateway.errors import GatewayError, RequestTimeoutError


class Names:
    """The names that the configuration adds to those of our engines."""

    def __init__(self, config: GatewayConfig) -> None:
        self._aliases = config.aliases
        self._splits = config.splits
        self._fallbacks = config.fallbacks
        remote = (model.name for upstream in config.upstreams for model in upstream.models)
        self._known = {*remote, *self._aliases, *self._splits, *self._fallbacks}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def chain(self, name: str, who: str) -> list[str]:
        """The models to try, in this order: neither aliases nor splits, no model twice.

        The fallbacks of the name asked for come before those of what it stands for.

        Args:
            who: Gets the same arm of a split every time.
        """
        chain: list[str] = []
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop(0)
            if current in seen:
                continue
            seen.add(current)
            waiting.extend(self._fallbacks.get(current, ()))
            if (target := self._aliases.get(current)) is not None:
                waiting.insert(0, target)
            elif (shares := self._splits.get(current)) is not None:
                waiting.insert(0, arm_of(current, shares, who))
            else:
                chain.append(current)
        return chain


def arm_of(split: str, shares: dict[str, float], who: str) -> str:
    """One of the names, by weight; always the same for the same split and `who`."""
    digest = blake2b(f"{split}\0{who}".encode(errors="replace"), digest_size=8).digest()
    at = int.from_bytes(digest) / 2**64 * sum(shares.values())
    for name, share in shares.items():
        at -= share
        if at < 0:
            return name
    return next(name for name in reversed(shares) if shares[name] > 0)  # rounding


def another_may_do(error: GatewayError) -> bool:
    """Whether a fallback is worth a try: the model is at fault, not the request, and there is time left."""
    return (error.status == 429 or error.status >= 500) and error.code != RequestTimeoutError.code
