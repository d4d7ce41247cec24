"""The tree of errors a caller may see, and OpenAI's envelope for them. Knows no request and no engine."""

import math

import msgspec
from litestar.exceptions import HTTPException

from engine.protocol import RejectCode, Rejected

MAX_MESSAGE = 2000
"""Characters of what another server says that are passed on."""
LORAX_STATUS = {"validation": 400, "overloaded": 429}
"""LoRAX's `error_type` -> HTTP status, where it came as an event of a stream."""


class GatewayError(Exception):
    """Something to tell the caller: HTTP status, and `message`, `type`, `param`, `code` of OpenAI's envelope."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s


class InvalidRequestError(GatewayError):
    status = 400
    type = "invalid_request_error"


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class AdapterInvalidError(InvalidRequestError):
    code = "adapter_invalid"


class GrammarInvalidError(InvalidRequestError):
    """What the answer shall follow cannot be used."""


class NotFoundError(GatewayError):
    status = 404
    type = "invalid_request_error"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class OverloadedError(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "slow_down"


class InternalError(GatewayError):
    code = "internal_error"


class UnavailableError(GatewayError):
    """The engine is not there: starting, lost, or shutting down."""

    status = 503
    code = "engine_unavailable"


class StorageUnavailableError(GatewayError):
    """The database or the file store is locked or gone."""

    status = 503
    code = "storage_unavailable"


class RequestTimeoutError(GatewayError):
    status = 504
    code = "request_timeout"


class UpstreamError(GatewayError):
    """What another server did, or said, instead of answering."""

    status = 502
    code = "upstream_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        again: bool = False,
        is_fault: bool = True,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.status = status or self.status
        self.type = type or self.type
        self.again = again
        """The same request may succeed when it is sent once more."""
        self.is_fault = is_fault
        """It speaks against the server's health, not against the request."""

    @property
    def data(self) -> bytes:
        """For an event of a stream."""
        return msgspec.json.encode(envelope(self))


class _HttpError(GatewayError):
    """What the web framework refused by itself: no such route, wrong method, body too large, ..."""

    def __init__(self, status: int, message: str, code: str | None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.type = "invalid_request_error" if status < 500 else "server_error"


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's four keys, always all of them."""

    message: str
    type: str
    param: str | None
    code: str | None


class Envelope(msgspec.Struct, frozen=True):
    """The body of every error response, and the data of an error event in a stream."""

    error: ErrorBody


def envelope(error: GatewayError) -> Envelope:
    return Envelope(ErrorBody(error.message, error.type, error.param, error.code))


def headers_of(error: GatewayError) -> dict[str, str]:
    """`retry-after` in whole seconds, where waiting helps."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_of_rejection(rejected: Rejected) -> GatewayError:
    """What the engine's refusal means to the caller."""
    message, retry_after_s = rejected.message, rejected.retry_after_s
    match rejected.code:
        case RejectCode.INVALID:
            return InvalidRequestError(message)
        case RejectCode.CONTEXT_LENGTH:
            return ContextLengthError(message)
        case RejectCode.ADAPTER_NOT_FOUND:
            return ModelNotFoundError(message, param="model")
        case RejectCode.ADAPTER_INVALID:
            return AdapterInvalidError(message, param="model")
        case RejectCode.OVERLOADED:
            return OverloadedError(message, retry_after_s=retry_after_s or 1.0)
        case RejectCode.GRAMMAR_INVALID:
            return GrammarInvalidError(message, param="response_format")
        case RejectCode.EXPIRED:
            return RequestTimeoutError(message)
        case RejectCode.UNAVAILABLE:
            return UnavailableError(message, retry_after_s=retry_after_s or 1.0)
        case RejectCode.INTERNAL:
            return InternalError(message)


class _Said(msgspec.Struct, frozen=True):
    """The error of an OpenAI-compatible server, as far as it keeps to the shape."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _OpenAISays(msgspec.Struct, frozen=True):
    error: _Said


class _LoraxSays(msgspec.Struct, frozen=True):
    error: str
    error_type: str | None = None


def upstream_error_of(body: bytes, status: int | None = None) -> tuple[UpstreamError, bool]:
    """What an upstream's error says, and whether its body has OpenAI's envelope (the Responses API's events: bare).

    Args:
        status: Of the response; None for an event in a stream.
    """
    said, shaped = (
        _Said(f"The upstream answered with status {status}." if status else "The upstream failed."),
        False,
    )
    for shape in (_OpenAISays, _LoraxSays, _Said):
        try:
            found = msgspec.json.decode(body, type=shape)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(found, _LoraxSays):
            said = _Said(found.error, code=found.error_type)
        else:
            said, shaped = (found.error if isinstance(found, _OpenAISays) else found), True
        break
    if status is None:
        status = 400 if said.type == "invalid_request_error" else LORAX_STATUS.get(str(said.code), 502)
    error = UpstreamError(
        said.message[:MAX_MESSAGE],
        status=status,
        type=_type_of(said.type, status),
        param=said.param,
        code=None if said.code is None else str(said.code),
        again=(status == 429 and said.code != "insufficient_quota") or status in (408, 409) or status >= 500,
        is_fault=status >= 500,
    )
    return error, shaped


def _type_of(said: str | None, status: int) -> str:
    if said and said != "error":
        return said
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_of_http_exception(error: HTTPException, method: str, path: str) -> GatewayError:
    """The framework's own refusals, in our words."""
    match error.status_code:
        case 404:
            return _HttpError(404, f"Invalid URL ({method} {path[:200]})", "unknown_url")
        case 405:
            return _HttpError(405, f"Not allowed to {method} on {path[:200]}.", "method_not_allowed")
        case 413:
            return _HttpError(413, "The request body is too large.", "request_too_large")
        case status:
            return _HttpError(status, error.detail, None)
