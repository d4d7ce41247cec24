"""Wires the gateway together, once. Knows no request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import structlog
from litestar import Litestar, Request, Response
from litestar.config.cors import CORSConfig
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp

from gateway.access_log import CLIENT_GONE, AccessLog, record_of
from gateway.batch_worker import BatchWorker
from gateway.batches import BATCH_ROUTES
from gateway.config import GatewayConfig
from gateway.disconnect import ClientGoneError
from gateway.embeddings import create_embeddings
from gateway.errors import GatewayError, InternalError, envelope, error_of_http_exception, headers_of
from gateway.file_store import FileStore
from gateway.files import FILE_ROUTES
from gateway.inner_request import InnerAnswer, post_inner
from gateway.lorax_routes import LORAX_ROUTES
from gateway.metrics import Metrics
from gateway.relay import RemoteModels
from gateway.responses import RESPONSES_ROUTES
from gateway.routes import ROUTES
from gateway.routing import Names
from gateway.served_model import ServedModels
from gateway.storage import Storage
from gateway.stored_batches import StoredBatches
from gateway.stored_files import StoredFiles
from gateway.stored_responses import StoredResponses
from gateway.vllm_routes import VLLM_ROUTES

HANDLERS = [
    *ROUTES,
    *RESPONSES_ROUTES,
    *VLLM_ROUTES,
    *LORAX_ROUTES,
    create_embeddings,
    *FILE_ROUTES,
    *BATCH_ROUTES,
]
"""Of every address, whatever its origin."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def create_app(config: GatewayConfig) -> ASGIApp:
    """The gateway as an ASGI application. Its lifespan keeps one connection to every engine, and works on batches."""
    metrics = Metrics()

    @asynccontextmanager
    async def engines(app: Litestar) -> AsyncIterator[None]:
        # No cookies: an upstream's would travel with everybody's requests.
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            app.state.models = ServedModels(config, session)
            app.state.remote = RemoteModels(config, session)
            clients = [asyncio.create_task(model.client.run()) for model in app.state.models]
            try:
                yield
            finally:
                # The server has waited for open requests; what is left of them is aborted with the socket.
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    @asynccontextmanager
    async def stored(app: Litestar) -> AsyncIterator[None]:
        async def ask(path: str, body: bytes, request_id: str) -> InnerAnswer:
            return await post_inner(served, path, body, request_id)

        storage = Storage(config.database)
        app.state.files = files = StoredFiles(storage, FileStore(config.files))
        app.state.max_file_bytes = int(config.max_file_mib * 2**20)
        app.state.batches = batches = StoredBatches(storage, config.batch_lease_s)
        app.state.responses = responses = StoredResponses(storage)
        app.state.batch_worker = worker = BatchWorker(
            ask,
            batches,
            files,
            responses,
            concurrency=config.batch_concurrency,
            lease_s=config.batch_lease_s,
            max_line_bytes=int(config.max_body_mib * 2**20),
        )
        work = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await storage.close()

    app = Litestar(
        route_handlers=HANDLERS,
        lifespan=[engines, stored],
        exception_handlers={
            GatewayError: _on_gateway_error,
            HTTPException: _on_http_exception,
            ClientGoneError: _on_client_gone,
            Exception: _on_unexpected,
        },
        request_max_body_size=int(config.max_body_mib * 2**20),
        cors_config=_cors(config),
        openapi_config=None,
        logging_config=None,
    )
    app.state.metrics = metrics
    app.state.names = Names(config)
    served = AccessLog(app, metrics)
    return served


def _cors(config: GatewayConfig) -> CORSConfig | None:
    if not config.cors_allow_origins:
        return None
    return CORSConfig(
        allow_origins=list(config.cors_allow_origins), expose_headers=["x-request-id", "x-loraland-model"]
    )


def _on_gateway_error(request: Request, error: GatewayError) -> Response:
    record_of(request.scope).error = error.code
    return Response(
        msgspec.json.encode(envelope(error)),
        status_code=error.status,
        media_type="application/json",
        headers=headers_of(error),
    )


def _on_http_exception(request: Request, error: HTTPException) -> Response:
    known = error_of_http_exception(error, request.method, request.url.path)
    if known.status >= 500:
        log.error("request_failed", request_id=record_of(request.scope).request_id, exc_info=error)
    return _on_gateway_error(request, known)


def _on_client_gone(request: Request, error: ClientGoneError) -> Response:
    """Nobody reads it; the status is for the access log."""
    return Response(b"", status_code=CLIENT_GONE)


def _on_unexpected(request: Request, error: Exception) -> Response:
    log.error("request_failed", request_id=record_of(request.scope).request_id, exc_info=error)
    return _on_gateway_error(request, InternalError("The server had an error while processing your request."))
