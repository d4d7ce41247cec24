"""`python -m engine --config FILE`: wires the engine together and serves it until a signal comes."""

import argparse
import asyncio
import functools
import hashlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from aiohttp import web

from engine.config import ConfigError, EngineConfig, check_config, load_config
from engine.protocol import AdapterRef, ModelFacts

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.loop import EngineLoop
    from engine.server import EngineServer

log = structlog.get_logger()


def main() -> int:
    arguments = parse_arguments()
    configure_logging(arguments.log_format)
    try:
        config = load_config(arguments.config)
        changes = {key: value for key in ("host", "port") if (value := getattr(arguments, key)) is not None}
        config = msgspec.structs.replace(config, **changes)
        check_config(config, "command line")
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    # A thread that wants the interpreter waits so long for one that computes: with the usual 5 ms, loading an adapter
    # would hold up every step several times.
    sys.setswitchinterval(0.0005)
    return asyncio.run(serve(config, fake=arguments.fake))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine", description="Serve one base model and its adapters."
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file with an [engine] table")
    parser.add_argument("--host", help="address to listen on (default: the configuration's)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the configuration's)")
    parser.add_argument(
        "--fake", action="store_true", help="serve the real tokenizer but compute nothing real"
    )
    parser.add_argument("--log-format", choices=("console", "json"), default="console")
    return parser.parse_args()


def configure_logging(style: str) -> None:
    """One line per event on standard error."""
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


async def serve(config: EngineConfig, *, fake: bool = False) -> int:
    """Listen at once, load the model beside it, and stop on SIGINT or SIGTERM. Returns the exit code."""
    from engine.server import EngineServer

    server = EngineServer()
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    engine = None
    main_loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        main_loop.add_signal_handler(name, stop.set)
    try:
        try:
            await web.TCPSite(runner, config.host, config.port).start()
        except OSError as error:
            log.error(
                "cannot_listen", host=config.host, port=config.port, reason=error.strerror or str(error)
            )
            return 1
        log.info("engine_listening", host=config.host, port=config.port, model=config.model)
        crashed = asyncio.Event()

        def crash() -> None:
            main_loop.call_soon_threadsafe(crashed.set)
            main_loop.call_soon_threadsafe(stop.set)

        # A pool of its own: asyncio waits for its default one at the end, however long the model takes.
        loader = ThreadPoolExecutor(1, "model-loader")
        loading = main_loop.run_in_executor(loader, load, config, server, crash, fake)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return 0
        try:
            engine = loading.result()
        except LoadError as error:
            log.error("model_not_loaded", reason=str(error))
            return 1
        # Its OpenMP threads must end with it: with more of those than cores none spins at a barrier any more, and
        # every step takes half as long again.
        loader.shutdown(wait=False)
        await stopping
        return 1 if crashed.is_set() else 0
    finally:
        if engine is not None:
            await asyncio.to_thread(engine.stop)
            await asyncio.sleep(0)
        await runner.cleanup()


class LoadError(Exception):
    """The model cannot be served; the message says why."""


def load(
    config: EngineConfig, server: "EngineServer", on_crash: Callable[[], None], fake: bool
) -> "EngineLoop":
    """Load the model (in a thread) and attach a started loop to the server. Raises `LoadError`."""
    from engine.adapter import read_adapter
    from engine.checkpoint import CheckpointError, open_checkpoint
    from engine.disk_cache import DiskCache
    from engine.grammar import GrammarCompiler
    from engine.host_adapter import AdapterError
    from engine.loop import EngineLoop, ModelLimits
    from engine.peft import largest_file
    from engine.sources import Limits, Sources
    from engine.spec import SpecError

    try:
        checkpoint = open_checkpoint(config.model)
        checkpoint.served_as(config.quantization)
        if fake:
            from engine.fake_runner import FakeRunner

            log.warning("fake_engine", note="tokens are made up; nothing is computed")
            runner, item_bytes = FakeRunner(num_blocks=4096, step_s=0.005), 2
        else:
            from engine.kernels import CompileError
            from engine.runner import DTYPES, ModelRunner

            try:
                runner = ModelRunner(checkpoint, config, ProgressLog())
            except CompileError as error:
                raise LoadError(f"The native kernels cannot be had: {error}") from error
            except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as the latter
                reason = str(error).partition("\n")[0]
                raise LoadError(
                    f"The model could not be set up with kv_cache_mib = {config.kv_cache_mib}: {reason}"
                ) from error
            item_bytes = DTYPES[config.dtype].itemsize
    except (CheckpointError, SpecError) as error:
        raise LoadError(str(error)) from error
    spec = checkpoint.spec
    max_model_len = min(config.max_model_len, spec.max_position_embeddings)

    sources = Sources(
        config.adapter_sources,
        DiskCache(adapter_directory(config), config.adapter_disk_mib * 2**20),
        Limits(largest_file(spec), allow_private=config.adapter_allow_private),
        config.adapter_recheck_s,
    )
    engine = EngineLoop(
        runner,
        config,
        ModelLimits(spec.vocab_size, max_model_len, spec.eos_token_ids),
        server.deliver,
        read_adapter=functools.partial(read_adapter, spec=spec, sources=sources),
        version_of=sources.version_of,
        device_bytes=lambda adapter: adapter.device_bytes(item_bytes),
        on_crash=on_crash,
        grammars=GrammarCompiler(checkpoint.files["tokenizer.json"], spec.vocab_size, spec.eos_token_ids),
    )
    facts = model_facts(config, checkpoint, engine.scheduler.max_len)
    for uri in config.adapter_pinned:
        try:
            engine.pin(AdapterRef(f"{config.name}/{uri.rstrip('/').rpartition('/')[2]}", uri))
        except AdapterError as error:
            raise LoadError(f"adapter_pinned: {error}") from error
    engine.start()
    server.attach(engine, facts, checkpoint.files, sources.side_files)
    log.info("engine_ready", model=config.name, max_model_len=facts.max_model_len)
    return engine


def adapter_directory(config: EngineConfig) -> Path:
    """Where remote adapters are kept on disk."""
    if config.adapter_disk_dir:
        return Path(config.adapter_disk_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraland" / "adapters"


def model_facts(config: EngineConfig, checkpoint: "Checkpoint", max_model_len: int) -> ModelFacts:
    """What gateways are told; its digest covers the facts, the files and the weights."""
    facts = ModelFacts(
        name=config.name,
        root=checkpoint.root,
        max_model_len=max_model_len,
        vocab_size=checkpoint.spec.vocab_size,
        eos_token_ids=list(checkpoint.spec.eos_token_ids),
        dtype=config.dtype,
        files=sorted(checkpoint.files),
        digest=checkpoint.digest,
        quantization=checkpoint.served_as(config.quantization),
    )
    digest = hashlib.sha256(msgspec.json.encode(facts))
    for name in facts.files:
        digest.update(hashlib.sha256(checkpoint.files[name]).digest())
    return msgspec.structs.replace(facts, digest=digest.hexdigest())


class ProgressLog:
    """Logs the loading of layers about once a second."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_s >= 1.0 or done == total:
            self._last_s = now
            log.info("loading", layers=f"{done}/{total}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that reads a model or an adapter cannot be interrupted, and would be waited for
