"""What the server says when it cannot answer: one class a row of the error contract, in OpenAI's body.

The engine's errors are translated here; nothing else decides a status.
"""

import logging
from typing import Any

from mpt.engine.errors import (
    EngineError,
    EngineGone,
    Overloaded,
    PromptTooLong,
    RequestTimeout,
    ShuttingDown,
    Unsupported,
)
from mpt.errors import MPTError

log = logging.getLogger(__name__)


class ApiError(MPTError):
    """An answer other than 200. Subclasses fix status and type; `code` says which case of them it is."""

    status = 500
    type = "server_error"
    code = "internal_error"
    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, **numbers: int) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.param, self.numbers = param, numbers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object; `numbers` stand beside the four fields every client knows."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code, **self.numbers}
        return {"error": error}


class InvalidRequest(ApiError):
    """The caller's fault: a field, its value, its size."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ApiError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"
    headers = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(ApiError):
    status, type, code = 403, "invalid_request_error", "forbidden"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "unknown_url"


class MethodNotAllowed(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class BodyTimeout(ApiError):
    """The body did not come in time."""

    status, type, code = 408, "invalid_request_error", "body_timeout"
    headers = {"Connection": "close"}  # noqa: RUF012  (the rest of it may still come)


class Conflict(ApiError):
    """Not as things are: a model that is in use cannot be unloaded."""

    status, type, code = 409, "invalid_request_error", "model_busy"


class TooLarge(ApiError):
    headers = {"Connection": "close"}  # noqa: RUF012
    status, type, code = 413, "invalid_request_error", "request_too_large"


class HeadersTooLarge(ApiError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class UnsupportedMediaType(ApiError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class RateLimited(ApiError):
    """A client is over its requests or tokens per minute."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.kind, self.headers = kind, headers


class InternalError(ApiError):
    """Our bug: the message carries the request's id and nothing else."""

    headers = {"x-should-retry": "false"}  # noqa: RUF012  (the same request would fail again)


class Unavailable(ApiError):
    """Not now: overloaded, queue_timeout, shutting_down, model_loading, model_load_failed, engine_stopped ..."""

    status, code = 503, "overloaded"
    headers = {"Retry-After": "2"}  # noqa: RUF012


def adapter_damaged(error: MPTError) -> Unavailable:
    """An adapter that cannot be read. The log says why, with a path, which clients need not know."""
    log.error("an adapter cannot be used: %s", error)
    return Unavailable("this adapter cannot be read here; ask who runs the server", code="adapter_damaged")


def from_engine(error: EngineError, *, started: bool = False) -> ApiError:
    """The engine's error as the server says it. started: whether the request had left the queue."""
    if isinstance(error, PromptTooLong):
        return InvalidRequest(str(error), code="context_length_exceeded")
    if isinstance(error, Unsupported):
        return InvalidRequest(str(error), code="unsupported_value")
    if isinstance(error, Overloaded):
        return Unavailable(str(error), code="overloaded")
    if isinstance(error, ShuttingDown):
        return Unavailable(str(error), code="shutting_down")
    if isinstance(error, EngineGone):
        return Unavailable(str(error), code="engine_stopped")
    if isinstance(error, RequestTimeout):
        return Unavailable(str(error), code="request_timeout" if started else "queue_timeout")
    return InternalError(str(error))
