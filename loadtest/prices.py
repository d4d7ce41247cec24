"""What a request costs: a price a token, or a machine's price an hour. Knows no request, no server."""

from pathlib import Path

import msgspec

MILLION = 1_000_000
PRICES_SEEN = "spring 2026"


class TokenPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """US dollars for a million tokens."""

    prompt: float
    output: float
    cached_prompt: float | None = None
    """For prompt tokens that the server took from its cache; as `prompt` when None."""

    def cost(self, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        """Dollars for one request; `cached_tokens` are a part of `prompt_tokens`."""
        cached_price = self.prompt if self.cached_prompt is None else self.cached_prompt
        fresh = prompt_tokens - cached_tokens
        return (fresh * self.prompt + cached_tokens * cached_price + output_tokens * self.output) / MILLION


LIST_PRICES = {
    "gpt-4": TokenPrice(prompt=30, output=60),
    "gpt-4-turbo": TokenPrice(prompt=10, output=30),
    "gpt-4o": TokenPrice(prompt=2.5, output=10, cached_prompt=1.25),
    "gpt-4o-mini": TokenPrice(prompt=0.15, output=0.6, cached_prompt=0.075),
    "gpt-4.1": TokenPrice(prompt=2, output=8, cached_prompt=0.5),
    "gpt-4.1-mini": TokenPrice(prompt=0.4, output=1.6, cached_prompt=0.1),
    "gpt-4.1-nano": TokenPrice(prompt=0.1, output=0.4, cached_prompt=0.025),
    "gpt-3.5-turbo": TokenPrice(prompt=0.5, output=1.5),
}
"""OpenAI's list prices as `PRICES_SEEN` had them. Prices change: a prices file overrides them."""


def read_prices(path: Path) -> dict[str, TokenPrice]:
    """A TOML file with a table for each model: `["gpt-4"]`, `prompt = 30`, `output = 60`, `cached_prompt = 15`.

    Raises OSError, or msgspec.DecodeError (a ValueError) for anything else or a negative price.
    """
    prices = msgspec.toml.decode(path.read_bytes(), type=dict[str, TokenPrice])
    for model, price in prices.items():
        if min(price.prompt, price.output, price.cached_prompt or 0) < 0:
            raise msgspec.ValidationError(f"{path.name}: a price of {model} is negative")
    return prices


def price_of(model: str, prices: dict[str, TokenPrice]) -> TokenPrice | None:
    """The model's own price, or that of the model it is a dated version of (`gpt-4-0613` of `gpt-4`)."""
    for known in sorted(prices, key=len, reverse=True):
        version = model.removeprefix(f"{known}-")
        if model == known or (version != model and version[:1].isdecimal()):
            return prices[known]
    return None
