"""Adapters added and removed while the gateway runs, as people do with vLLM: name -> place. Knows no HTTP and no files.

They are gone when the gateway ends, and each gateway has its own: a template of the configuration is the lasting way.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine.protocol import AdapterRef

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
"""`org/name` as vLLM writes a repository of the Hugging Face hub."""


@dataclass(frozen=True, slots=True)
class RuntimeAdapter:
    """One of them, under the name that requests give as `model`."""

    name: str
    base: str
    ref: AdapterRef
    created: int
    """Seconds since the epoch."""


class RuntimeAdapters:
    """What has been added and not been removed."""

    def __init__(self) -> None:
        self._adapters: dict[str, RuntimeAdapter] = {}

    def __iter__(self) -> Iterator[RuntimeAdapter]:
        return iter(list(self._adapters.values()))

    def find(self, name: str) -> RuntimeAdapter | None:
        return self._adapters.get(name)

    def add(self, name: str, base: str, ref: AdapterRef) -> None:
        """Under a name in use it takes the other's place; requests under way keep what they have."""
        self._adapters[name] = RuntimeAdapter(name, base, ref, int(time.time()))

    def remove(self, name: str) -> bool:
        """Whether there was one."""
        return self._adapters.pop(name, None) is not None


def reference(name: str, base: str, path: str) -> AdapterRef:
    """What to ask of the engine, which alone decides whether it may be read.

    Args:
        path: A directory on the engine's machine, a URI, or `org/name` on the Hugging Face hub.
    """
    uri = f"hf://{path}" if HUB_NAME.fullmatch(path) else path
    return AdapterRef(name=f"{base}/{name.removeprefix(f'{base}/')}", uri=uri)
