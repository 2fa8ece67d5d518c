"""How each API writes on the wire: its stream's events, how a stream ends, and what an error looks like.

Every route answers in the shape of the API it belongs to, its errors and those of the gate too; which one that is, the
path says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response

from serving.errors import ApiError


@dataclass(frozen=True)
class Wire:
    """One API. end: what follows the last event of a stream that went well; keep_alive: what fills silence, if any.

    mark: what each event of a stream has once, behind the end of a line.
    """

    media_type: str  # of streams
    event: Callable[[dict[str, Any]], bytes]
    error: Callable[[ApiError], dict[str, Any]]  # the body of an error
    failure: Callable[[dict[str, Any]], bytes]  # that body as the last event of a stream
    end: bytes = b""
    keep_alive: bytes = b": keep-alive\n\n"
    mark: bytes = b"\ndata: "


def _data(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def _named(payload: dict[str, Any]) -> bytes:
    return b"event: " + payload["type"].encode() + b"\n" + _data(payload)


def _line(payload: dict[str, Any]) -> bytes:
    return orjson.dumps(payload) + b"\n"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def _anthropic_error(error: ApiError) -> dict[str, Any]:
    kind = "api_error" if error.status == 500 else _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


_EVENTS = "text/event-stream; charset=utf-8"
OPENAI = Wire(_EVENTS, _data, lambda error: error.body(), _data, end=b"data: [DONE]\n\n")
RESPONSES = Wire(_EVENTS, _named, lambda error: error.body(), lambda body: _named({"type": "error", **body["error"]}))
ANTHROPIC = Wire(_EVENTS, _named, _anthropic_error, _named)
OLLAMA = Wire("application/x-ndjson", _line, lambda error: {"error": str(error)}, _line, keep_alive=b"", mark=b"\n")


def wire_of(path: str) -> Wire:
    """The API that a path belongs to."""
    if path.startswith("/v1/responses"):
        return RESPONSES
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return OLLAMA if path.startswith("/api/") else OPENAI


def respond(error: ApiError, path: str) -> Response:
    """An error as its HTTP response."""
    body = orjson.dumps(wire_of(path).error(error))
    return Response(body, error.status, headers=error.headers, media_type="application/json")
