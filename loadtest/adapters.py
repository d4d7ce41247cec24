"""Which adapters a server offers, and which of them the stages use. Knows the OpenAI model list, no load."""

import fnmatch
from collections.abc import Sequence

import msgspec
import requests

from loadtest.plan import is_loopback
from loadtest.stream import error_message

SYNTHETIC_PATTERN = "*random*"
"""Adapters with such a task name carry no task; they come last in the order."""
_TIMEOUT_S = 15.0
_NO_SUCH_ROUTE = (404, 405, 501)


class CatalogError(Exception):
    """The server could not be asked, or does not offer what the run needs. The message is fit for the user."""


class NoModelListError(CatalogError):
    """The server answers, but has no model list."""


class Catalog(msgspec.Struct, frozen=True):
    """What `GET /v1/models` said."""

    bases: tuple[str, ...]
    adapters: dict[str, tuple[str, ...]]
    """Base model → names of its adapters (the entries whose `parent` it is), in the server's order."""
    server: str | None
    """The answer's `Server` header."""


def read_catalog(base_url: str, api_key: str | None) -> Catalog:
    """Asks the server.

    Raises CatalogError when it cannot be reached or answers with anything but a list of models, NoModelListError
    when it has no such route.
    """
    url = f"{base_url}/v1/models"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with requests.Session() as session:
            session.trust_env = not is_loopback(url)
            response = session.get(url, headers=headers, timeout=_TIMEOUT_S)
    except requests.RequestException as error:
        raise CatalogError(f"{url} cannot be reached: {type(error).__name__}: {error}") from error
    if response.status_code in _NO_SUCH_ROUTE:
        raise NoModelListError(f"{url} does not exist (HTTP {response.status_code})")
    try:
        body = response.json()
    except requests.JSONDecodeError as error:
        raise CatalogError(f"{url} answered HTTP {response.status_code} without JSON") from error
    if response.status_code != 200:
        raise CatalogError(f"{url} answered HTTP {response.status_code}: {error_message(body)}")
    return parse_catalog(body, response.headers.get("Server"))


def parse_catalog(body: object, server: str | None = None) -> Catalog:
    """Reads the body of `GET /v1/models`. Raises CatalogError when it is not a list of models."""
    entries = body.get("data") if isinstance(body, dict) else None
    if not isinstance(entries, list):
        raise CatalogError("the server's model list has no `data`")
    bases: list[str] = []
    adapters: dict[str, list[str]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            continue
        parent = entry.get("parent")
        if isinstance(parent, str) and parent:
            adapters.setdefault(parent, []).append(entry["id"])
        else:
            bases.append(entry["id"])
    return Catalog(tuple(bases), {base: tuple(names) for base, names in adapters.items()}, server)


def choose_model(catalog: Catalog, model: str | None) -> str:
    """The base model to load: the one asked for (a server need not list it), or the only one there is."""
    if model is not None:
        return model
    if len(catalog.bases) == 1:
        return catalog.bases[0]
    names = ", ".join(catalog.bases[:10]) or "none"
    raise CatalogError(f"which model? Name one with --model; the server lists {names}")


def order_adapters(
    offered: Sequence[str], patterns: Sequence[str] = (), listed: Sequence[str] | None = None
) -> list[str]:
    """The adapters in the order in which stages take them: real tasks first, each group by name.

    `listed` fixes names and order; `patterns` (fnmatch, on the whole name or the part after the last `/`) keep only
    what matches any. Raises CatalogError for a listed name that is not offered.
    """
    if listed is not None:
        by_task = {_task(name): name for name in offered} | {name: name for name in offered}
        missing = [name for name in listed if name not in by_task]
        if missing:
            raise CatalogError(f"the server does not offer the adapter {missing[0]!r}")
        return list(dict.fromkeys(by_task[name] for name in listed))
    kept = {
        name
        for name in offered
        if not patterns or any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(_task(name), p) for p in patterns)
    }
    return sorted(kept, key=lambda name: (is_synthetic(name), name))


def is_synthetic(adapter: str) -> bool:
    """Whether the name says that the adapter was never trained."""
    return fnmatch.fnmatch(_task(adapter), SYNTHETIC_PATTERN)


def _task(adapter: str) -> str:
    return adapter.rpartition("/")[2]
