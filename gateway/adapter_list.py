"""The body of `GET /adapters`. Knows no engine and no HTTP."""

import msgspec

from engine.protocol import AdapterReport


class ModelAdapters(msgspec.Struct, frozen=True):
    """The adapters of one base."""

    model: str
    engine: AdapterReport | None
    """None while the engine does not answer."""
    unloaded: list[str]
    """Adapters in local directories that the engine knows nothing of: nobody asked for them, or not for long."""


class AdapterList(msgspec.Struct, frozen=True):
    """Every adapter of every base."""

    models: list[ModelAdapters]
