"""An uploaded file: a multipart body straight into the file store. Knows no database."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from litestar import Request
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from gateway.disconnect import ClientGoneError
from gateway.errors import GatewayError, InvalidRequestError
from gateway.file_store import FileStore
from gateway.tables import FilePurpose

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
SHORTEST_LIFE_S, LONGEST_LIFE_S = 3600, 2_592_000
"""What OpenAI allows for `expires_after`: an hour to thirty days."""
PURPOSES = [purpose.value for purpose in FilePurpose if purpose is not FilePurpose.BATCH_OUTPUT]


class FileTooLargeError(GatewayError):
    status = 413
    type = "invalid_request_error"
    code = "file_too_large"


@dataclass(slots=True)
class Upload:
    """What came: the form's fields, and of the file all but its contents."""

    filename: str | None = None
    size: int = 0
    """In bytes."""
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def purpose(self) -> str:
        """Raises `InvalidRequestError`."""
        purpose = self.fields.get("purpose")
        if purpose is None:
            raise InvalidRequestError("Missing required parameter: 'purpose'.", param="purpose")
        if purpose not in PURPOSES:
            raise InvalidRequestError(
                f"Invalid 'purpose': {purpose[:50]!r} is not one of {', '.join(PURPOSES)}.", param="purpose"
            )
        return purpose

    @property
    def expires_after_s(self) -> int | None:
        """None for a file that is kept until it is deleted. Raises `InvalidRequestError`."""
        anchor = self.fields.get("expires_after[anchor]")
        seconds = self.fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise InvalidRequestError("'expires_after[anchor]' must be 'created_at'.", param="expires_after")
        if seconds is None or not seconds.isascii() or not seconds.isdecimal() or len(seconds) > 9:
            raise InvalidRequestError("'expires_after[seconds]' must be an integer.", param="expires_after")
        return check_life_s(int(seconds), "expires_after")


def check_life_s(seconds: int, param: str) -> int:
    """How long a file is to be kept. Raises `InvalidRequestError` out of range."""
    if not SHORTEST_LIFE_S <= seconds <= LONGEST_LIFE_S:
        raise InvalidRequestError(
            f"Invalid '{param}': 'seconds' must be between {SHORTEST_LIFE_S} and {LONGEST_LIFE_S}.",
            param=param,
        )
    return seconds


async def receive_upload(request: Request, store: FileStore, file_id: str, max_bytes: int) -> Upload:
    """Write the form's `file` to the store under `file_id`; nothing is left there when this raises.

    Raises:
        GatewayError: a form that is malformed or lacks something, a file of more than `max_bytes`, a store that is gone.
        ClientGoneError: the client left before the end.
    """
    upload = Upload()
    async with store.writing(file_id) as writer:
        try:
            async for segment, data in _parts(request):
                if segment.name == "file":
                    await writer.write(data)
                    if writer.size > max_bytes:
                        raise FileTooLargeError(
                            f"The file is too large: this server takes at most {max_bytes / 2**20:g} MiB.",
                            param="file",
                        )
                    upload.filename = segment.filename or "file"
                else:
                    _add_to_field(upload, segment.name or "", data)
        except MultipartError as error:
            raise InvalidRequestError(f"The form is malformed: {error}") from error
        if upload.filename is None:
            raise InvalidRequestError("Missing required parameter: 'file'.", param="file")
        upload.size = writer.size
        _ = upload.purpose, upload.expires_after_s  # while the contents can still be discarded
    return upload


async def _parts(request: Request) -> AsyncIterator[tuple[MultipartSegment, bytes]]:
    """Each segment with each piece of its contents, the first of which is empty. Raises `MultipartError`."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise InvalidRequestError(
            "A file is uploaded as multipart/form-data, with the fields 'file' and 'purpose'."
        )
    segment: MultipartSegment | None = None
    with PushMultipartParser(options["boundary"], max_segment_count=MAX_FIELDS) as parser:
        async for chunk in _body(request):
            for event in parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    segment = event
                    yield segment, b""
                elif event is not None and segment is not None:
                    yield segment, bytes(event)


async def _body(request: Request) -> AsyncIterator[bytes]:
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        if message["body"]:
            yield message["body"]
        if not message.get("more_body"):
            return


def _add_to_field(upload: Upload, name: str, data: bytes) -> None:
    text = upload.fields.get(name, "") + data.decode(errors="replace")
    if len(text) > MAX_FIELD_BYTES:
        raise InvalidRequestError(f"The form's field {name[:50]!r} is too long.", param=name[:50])
    upload.fields[name] = text
