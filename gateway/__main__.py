"""`python -m gateway --config FILE`: one gateway process."""

import argparse
import logging
import sys

import msgspec
import structlog
import uvicorn

from gateway.app import create_app
from gateway.config import ConfigError, GatewayConfig, load_config

KEEP_ALIVE_S = 65
"""Longer than the idle time of the usual proxies and SDK pools, so that it is they who close."""
DRAIN_S = 30
"""How long open requests may go on after SIGTERM; no new connection is taken meanwhile."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway", description="The OpenAI-compatible gateway.")
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file with a [gateway] table")
    parser.add_argument("--host", help="instead of the file's")
    parser.add_argument("--port", type=int, help="instead of the file's")
    parser.add_argument("--engine", metavar="URL", help="instead of the file's, for its only model")
    parser.add_argument(
        "--log-format", choices=("console", "json"), help="default: console on a terminal, else json"
    )
    options = parser.parse_args(arguments)
    configure_logging(options.log_format or ("console" if sys.stderr.isatty() else "json"))
    try:
        serve(overridden(load_config(options.config), options.host, options.port, options.engine))
    except ConfigError as error:
        sys.exit(f"error: {error}")


def overridden(
    config: GatewayConfig, host: str | None, port: int | None, engine: str | None
) -> GatewayConfig:
    """The configuration with what the command line says. Raises `ConfigError` when `engine` is ambiguous."""
    if engine is not None and len(config.models) != 1:
        raise ConfigError("--engine needs a configuration with one model.")
    models = [msgspec.structs.replace(model, engine=engine or model.engine) for model in config.models]
    return msgspec.structs.replace(
        config,
        host=config.host if host is None else host,
        port=config.port if port is None else port,
        models=tuple(models),
    )


def serve(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is open."""
    log.info("gateway_starting", host=config.host, port=config.port, models=[m.name for m in config.models])
    uvicorn.run(
        create_app(config),
        host=config.host,
        port=config.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        workers=1,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )


def configure_logging(style: str) -> None:
    """One line per event on stderr: `console` for people, `json` for machines."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    console = style == "console"
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso"),
            _unchanged if console else structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if console
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _unchanged(logger, name, event):
    return event


if __name__ == "__main__":
    main()
