"""`GatewayConfig`: the `[gateway]` table of the TOML file. Knows nothing of HTTP."""

import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

TASK = "{task}"
POSTGRES = ("postgresql", "postgres")


class ConfigError(Exception):
    """The configuration cannot be used; the message names the file, the key and what to change."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One base model and where its adapters are found."""

    name: str
    """The public name, e.g. `smollm2-135m`; an adapter is `<name>/<task>`."""
    engine: str
    """Address of the engine, e.g. `http://127.0.0.1:8100`."""
    adapters: tuple[str, ...] = ()
    """Templates with `{task}`, tried in this order: directories (listed by scanning) or URIs (passed on unseen)."""
    table: dict[str, str] = {}
    """Explicit task names, each a directory or a URI; they go before the templates."""
    tool_format: Literal["auto", "hermes", "mistral", "llama3"] = "auto"
    """How the model writes function calls; `auto` reads it off its chat template."""


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a gateway must be told. Local paths are absolute once `load_config` has read them."""

    models: tuple[ModelConfig, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_mib: float = 8
    """A larger request body is refused with 413."""
    request_timeout_s: float = 600
    """A request still unfinished after this long is aborted."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API from a browser; none by default."""
    runtime_adapters: bool = False
    """Whether requests may load and unload adapters, as with vLLM; what may be read is the engine's to say."""
    database: str = "loraland.db"
    """An SQLite file, made when it is first needed, or a `postgresql://` URL."""
    files: str = "loraland-files"
    """Where the contents of files are kept: a directory, or a URL that fsspec can write to."""


def load_config(path: str | Path) -> GatewayConfig:
    """Read the `[gateway]` table of a TOML file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or out of range.
    """
    path = Path(path)
    try:
        document = msgspec.toml.decode(path.read_bytes())
        if "gateway" not in document:
            raise ConfigError(f"{path}: there is no [gateway] table.")
        config = msgspec.convert(document["gateway"], GatewayConfig)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{path}: [gateway]: {error}") from error
    check_config(config, f"{path}: [gateway]")
    root = path.absolute().parent
    models = tuple(
        msgspec.structs.replace(
            model,
            engine=model.engine.rstrip("/"),
            adapters=tuple(_absolute(template, root) for template in model.adapters),
            table={task: _absolute(place, root) for task, place in model.table.items()},
        )
        for model in config.models
    )
    return msgspec.structs.replace(
        config,
        models=models,
        database=_absolute(config.database, root),
        files=_absolute(config.files, root),
    )


def check_config(config: GatewayConfig, source: str) -> None:
    """Ranges and names.

    Raises:
        ConfigError: a value cannot be used; `source` is named as where it came from.
    """
    try:
        _check(config)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def is_uri(place: str) -> bool:
    """Whether `place` is a URI other than `file://`, which only the engine can look into."""
    return "://" in place and not place.startswith("file://")


def _absolute(place: str, root: Path) -> str:
    if is_uri(place):
        return place
    return os.path.normpath(root / Path(place.removeprefix("file://")).expanduser())


def _check(config: GatewayConfig) -> None:
    names = [model.name for model in config.models]
    if not names:
        raise ConfigError("models: at least one [[gateway.models]] is needed.")
    for name in names:
        if not name or name.startswith("/") or name.endswith("/") or not name.isprintable():
            raise ConfigError(f"models: {name!r} cannot be a model's name.")
        if names.count(name) > 1:
            raise ConfigError(f"models: the name {name!r} is used twice.")
    for model in config.models:
        address = urlsplit(model.engine)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ConfigError(f"models: the engine of {model.name!r} must be an http:// address.")
        for template in model.adapters:
            if template.count(TASK) != 1:
                raise ConfigError(f"models: the template {template!r} must hold {TASK} exactly once.")
    if is_uri(config.database) and urlsplit(config.database).scheme not in POSTGRES:
        raise ConfigError("database: must be a path, or a postgresql:// URL.")
    for key, place in (("database", config.database), ("files", config.files)):
        if not place:
            raise ConfigError(f"{key}: must not be empty.")
    _check_range("port", config.port, 0, 65535)
    _check_range("max_body_mib", config.max_body_mib, 0.001, 1024)
    _check_range("request_timeout_s", config.request_timeout_s, 0.1, 86400)


def _check_range(key: str, value: Any, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}: must lie between {low} and {high}, not {value}.")
