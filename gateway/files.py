"""`/v1/files` as OpenAI has it: upload, list, look at, read, delete. Knows no batch."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from urllib.parse import quote

import msgspec
from litestar import Request, delete, get, post
from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.disconnect import ClientGoneError, while_connected
from gateway.errors import GatewayError
from gateway.paging import page_of, page_wanted
from gateway.routes import json_answer
from gateway.stored_files import StoredFiles
from gateway.tables import StoredFile, new_id
from gateway.upload import receive_upload

MOST_FILES = 10_000
"""On a page."""


class NoSuchFileError(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "file_not_found"

    def __init__(self, file_id: str, param: str = "file_id") -> None:
        super().__init__(f"No such File object: {file_id[:100]}", param=param)


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: None = None


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "file"
    deleted: bool = True


@post("/v1/files", status_code=200, request_max_body_size=None)
async def create_file(request: Request) -> ASGIApp:
    """Take a file; its contents go to the store as they come."""
    files = _files(request)
    file_id = new_id("file-")
    upload = await receive_upload(request, files.store, file_id, request.app.state.max_file_bytes)
    now = int(time.time())
    life_s = upload.expires_after_s
    file = StoredFile(
        id=file_id,
        filename=upload.filename or "file",
        purpose=upload.purpose,
        bytes=upload.size,
        created_at=now,
        expires_at=None if life_s is None else now + life_s,
    )
    await files.add(file)
    return json_answer(_shown(file))


@get("/v1/files")
async def list_files(request: Request) -> ASGIApp:
    """A page of the files, latest first."""
    wanted = page_wanted(request, default=MOST_FILES, most=MOST_FILES)
    found = await _files(request).page(wanted, request.query_params.get("purpose"))
    return json_answer(page_of([_shown(file) for file in found], wanted))


@get("/v1/files/{file_id:str}")
async def retrieve_file(request: Request) -> ASGIApp:
    """What is known of one file."""
    return json_answer(_shown(await _find(request)))


@get("/v1/files/{file_id:str}/content")
async def retrieve_file_content(request: Request) -> ASGIApp:
    """Its contents."""
    file = await _find(request)
    chunks = _files(request).chunks(file)
    # Until the first of it is here, an error is an HTTP error.
    first = await anext(chunks, b"")
    return FileBody(file, first, chunks)


@delete("/v1/files/{file_id:str}", status_code=200)
async def delete_file(request: Request) -> ASGIApp:
    """Delete one file, unless a batch still reads it."""
    file_id = str(request.path_params["file_id"])
    if not await _files(request).delete(file_id):
        raise NoSuchFileError(file_id)
    return json_answer(FileDeleted(id=file_id))


FILE_ROUTES = [create_file, list_files, retrieve_file, retrieve_file_content, delete_file]


class FileBody:
    """The contents of a file as an ASGI response."""

    def __init__(self, file: StoredFile, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        self._file = file
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError):
            await while_connected(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        name = quote(self._file.filename, safe="")
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(self._file.bytes).encode()),
            (b"content-disposition", f"attachment; filename*=UTF-8''{name}".encode()),
        ]
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for data in self._rest:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _find(request: Request) -> StoredFile:
    file_id = str(request.path_params["file_id"])
    file = await _files(request).get(file_id)
    if file is None:
        raise NoSuchFileError(file_id)
    return file


def _files(request: Request) -> StoredFiles:
    return request.app.state.files


def _shown(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )
