"""The tree of errors a caller may see, and OpenAI's envelope for them. Knows no request and no engine."""

import math

import msgspec
from litestar.exceptions import HTTPException

from engine.protocol import RejectCode, Rejected


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
