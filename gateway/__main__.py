"""`python -m gateway --config FILE`: one gateway process."""

import argparse
import logging
import sys

import msgspec
import structlog
import uvicorn

from gateway.app import create_app
from gateway.config import ConfigError, GatewayConfig, ModelConfig, check_config, load_config

KEEP_ALIVE_S = 65
"""Longer than the idle time of the usual proxies and SDK pools, so that it is they who close."""
DRAIN_S = 30
"""How long open requests may go on after SIGTERM; no new connection is taken meanwhile."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        config = load_config(options.config)
        changes = {key: value for key in ("host", "port") if (value := getattr(options, key)) is not None}
        if options.engine is not None:
            changes["models"] = (
                msgspec.structs.replace(_only_model(config), engine=options.engine.rstrip("/")),
            )
        config = msgspec.structs.replace(config, **changes)
        check_config(config, "command line")
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    configure_logging(options.log_format)
    serve(config)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gateway", description="The OpenAI-compatible gateway.")
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML file with a [gateway] table")
    parser.add_argument("--host", help="address to listen on (default: the configuration's)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the configuration's)")
    parser.add_argument("--engine", metavar="URL", help="the engine's address (only with a single model)")
    parser.add_argument("--log-format", choices=("console", "json"), default="console")
    return parser.parse_args(arguments)


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
    """One line per event on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    renderer = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if style == "console" else "iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _only_model(config: GatewayConfig) -> ModelConfig:
    if len(config.models) != 1:
        raise ConfigError("--engine: the configuration has several models, each with its own engine.")
    return config.models[0]


if __name__ == "__main__":
    sys.exit(main())
