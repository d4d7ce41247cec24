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


class UpstreamModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of an upstream."""

    name: str
    """The public name."""
    remote: str = ""
    """The upstream's name of it; empty: the public one."""
    input_usd_per_million: float = 0.0
    """Price of a million tokens read."""
    output_usd_per_million: float = 0.0
    """Price of a million tokens written."""


class UpstreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One other OpenAI-compatible server."""

    name: str
    """For messages, logs and metrics."""
    url: str
    """What an SDK would be given as base URL, e.g. `https://api.openai.com/v1`."""
    models: tuple[UpstreamModelConfig, ...] = ()
    api_key_env: str = ""
    """The environment variable that holds the key; empty: the upstream asks for none."""
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 120.0
    """Until the first event of a stream. An answer in one piece has `request_timeout_s`."""
    idle_timeout_s: float = 60.0
    """Between two pieces of an answer."""
    retries: int = 2
    max_retry_wait_s: float = 10.0
    """Who asks for a longer pause, with Retry-After, is not tried again: the client is told."""
    breaker_failures: int = 5
    breaker_pause_s: float = 30.0


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a gateway must be told. Local paths are absolute once `load_config` has read them."""

    models: tuple[ModelConfig, ...] = ()
    upstreams: tuple[UpstreamConfig, ...] = ()
    aliases: dict[str, str] = {}
    """Name -> the name it stands for."""
    splits: dict[str, dict[str, float]] = {}
    """Name -> the names it stands for, each with its share."""
    fallbacks: dict[str, tuple[str, ...]] = {}
    """Name -> the names to try, in this order, when it fails."""
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
    max_file_mib: float = 512
    """A larger upload is refused with 413."""
    batch_concurrency: int = 16
    """Requests of batches that may be under way together."""
    batch_lease_s: float = 15
    """How long a batch is left to a gateway that has gone silent before another takes it over."""


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
    if not names and not config.upstreams:
        raise ConfigError("models: at least one [[gateway.models]] or [[gateway.upstreams]] is needed.")
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
    for upstream in config.upstreams:
        _check_upstream(upstream)
    _check_names(config)
    _check_range("port", config.port, 0, 65535)
    _check_range("max_body_mib", config.max_body_mib, 0.001, 1024)
    _check_range("request_timeout_s", config.request_timeout_s, 0.1, 86400)
    _check_range("max_file_mib", config.max_file_mib, 0.001, 2**20)
    _check_range("batch_concurrency", config.batch_concurrency, 1, 1024)
    _check_range("batch_lease_s", config.batch_lease_s, 0.5, 3600)


def _check_upstream(upstream: UpstreamConfig) -> None:
    name = upstream.name
    address = urlsplit(upstream.url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(f"upstreams: the url of {name!r} must be an http:// or https:// address.")
    if upstream.api_key_env and not os.environ.get(upstream.api_key_env):
        raise ConfigError(f"upstreams: {name!r} needs its key in the environment: {upstream.api_key_env}.")
    for key in ("connect_timeout_s", "first_byte_timeout_s", "idle_timeout_s"):
        _check_range(f"upstreams: {name!r}: {key}", getattr(upstream, key), 0.01, 86400)
    for key in ("max_retry_wait_s", "breaker_pause_s"):
        _check_range(f"upstreams: {name!r}: {key}", getattr(upstream, key), 0, 86400)
    _check_range(f"upstreams: {name!r}: retries", upstream.retries, 0, 100)
    _check_range(f"upstreams: {name!r}: breaker_failures", upstream.breaker_failures, 1, 1_000_000)
    for model in upstream.models:
        for key in ("input_usd_per_million", "output_usd_per_million"):
            _check_range(f"upstreams: {model.name!r}: {key}", getattr(model, key), 0, 1e9)


def _check_names(config: GatewayConfig) -> None:
    """Every name has one meaning, leads to something, and not back to itself."""
    bases = [model.name for model in config.models]
    remote = [model.name for upstream in config.upstreams for model in upstream.models]
    given = [*bases, *remote, *config.aliases, *config.splits]
    labels = [upstream.name for upstream in config.upstreams]
    for name in (*given, *labels):
        if not name or not name.isprintable() or name != name.strip("/ "):
            raise ConfigError(f"{name!r} cannot be a name.")
        if given.count(name) > 1 or labels.count(name) > 1:
            raise ConfigError(f"the name {name!r} is used twice.")
    targets = {name: [target] for name, target in config.aliases.items()}
    for name, shares in config.splits.items():
        targets[name] = list(shares)
        for target, share in shares.items():
            _check_range(f"splits: {name!r}: {target!r}", share, 0, 1e9)
        if sum(shares.values()) <= 0:
            raise ConfigError(f"splits: {name!r} needs a share above 0.")

    def is_known(name: str) -> bool:
        return name in given or name.rpartition("/")[0] in bases

    for name, following in [*targets.items(), *config.fallbacks.items()]:
        for each in (name, *following):
            if not is_known(each):
                raise ConfigError(
                    f"{name!r} leads to {each!r}, which is no model, upstream's model, alias or split."
                )
    for name in targets:
        _check_leads_on(name, targets, ())


def _check_leads_on(name: str, targets: dict[str, list[str]], before: tuple[str, ...]) -> None:
    if name in before:
        raise ConfigError(f"aliases or splits lead in a circle: {' -> '.join((*before, name))}.")
    for target in targets.get(name, ()):
        _check_leads_on(target, targets, (*before, name))


def _check_range(key: str, value: Any, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}: must lie between {low} and {high}, not {value}.")
