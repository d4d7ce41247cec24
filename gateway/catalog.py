"""Name -> adapter, for one base model: an explicit table first, then directory or URI templates.

Nothing is cached: a directory dropped in place is servable, and listed, at once.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from engine.protocol import AdapterRef
from gateway.config import TASK, ModelConfig, is_uri

CONFIG_FILE = "adapter_config.json"
"""What makes a directory an adapter."""
SHA256 = "#sha256="
"""In an entry of the table: what follows is the digest that `adapter_model.safetensors` must have."""
MAX_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """An adapter that is there to be used."""

    task: str
    created: int
    """When its configuration was last written, seconds since the epoch."""


class Catalog:
    """The adapters of one base model."""

    def __init__(self, model: ModelConfig) -> None:
        self._base = model.name
        self._table = model.table
        self._templates = model.adapters

    def find(self, task: str) -> AdapterRef | None:
        """The adapter called `<base>/<task>`, or None. Costs a `stat` or two."""
        if not is_safe_name(task):
            return None
        if task in self._table:
            place, _, sha256 = self._table[task].partition(SHA256)
            there = is_uri(place) or _is_adapter(place)
            return self._ref(task, place, sha256 or None) if there else None
        for template in self._templates:
            if is_uri(template):
                return self._ref(task, template.replace(TASK, quote(task, safe="")))
            if _is_adapter(place := template.replace(TASK, task)):
                return self._ref(task, place)
        return None

    def listed(self) -> list[ListedAdapter]:
        """Every adapter that lies in a local directory, by name. Reads the directories (slow on a slow disk)."""
        found: dict[str, ListedAdapter] = {}
        for task, place in self._places():
            if task in found or not is_safe_name(task):
                continue
            try:
                written = os.stat(os.path.join(place, CONFIG_FILE)).st_mtime
            except OSError:
                continue
            found[task] = ListedAdapter(task, int(written))
        return sorted(found.values(), key=lambda adapter: adapter.task)

    def _places(self) -> Iterator[tuple[str, str]]:
        yield from (
            (task, place.partition(SHA256)[0]) for task, place in self._table.items() if not is_uri(place)
        )
        for template in self._templates:
            if not is_uri(template):
                yield from ((t, place) for t, place in _scan(template) if t not in self._table)

    def _ref(self, task: str, uri: str, sha256: str | None = None) -> AdapterRef:
        return AdapterRef(name=f"{self._base}/{task}", uri=uri, sha256=sha256)


def is_safe_name(task: str) -> bool:
    """Whether a name from outside may become one component of a path."""
    return (
        bool(task)
        and task.isprintable()
        and not task.startswith(".")
        and "/" not in task
        and "\\" not in task
        and len(task.encode()) <= MAX_NAME_BYTES
    )


def _is_adapter(place: str) -> bool:
    return os.path.isfile(os.path.join(place, CONFIG_FILE))


def _scan(template: str) -> Iterator[tuple[str, str]]:
    """Every (task, directory) that fits the template, whether or not it is an adapter."""
    parts = Path(template).parts
    at = next(i for i, part in enumerate(parts) if TASK in part)
    before, after = parts[at].split(TASK)
    parent = Path(*parts[:at])
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for name in names:
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            yield name[len(before) : len(name) - len(after)], str(parent.joinpath(name, *parts[at + 1 :]))
