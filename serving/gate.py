"""What every HTTP request passes: its id, the key check, the security header, the access log.

An ASGI middleware around the whole app, so that no route can be reached beside it. Access is denied by default: only
the paths named here are open without a key.
"""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import Keys, fingerprint
from serving.errors import ApiError, InternalError, Unauthorized
from serving.metrics import Metrics

log = logging.getLogger("serving.access")
bugs = logging.getLogger(__name__)

_OPEN = frozenset({"/health", "/ready"})  # probes have no keys
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # others are one label in metrics
_SILENT = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


class Gate:
    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics, log_format: str) -> None:
        self._app, self._keys, self._metrics, self._log_format = app, keys, metrics, log_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, salt="")
        started, status = time.perf_counter(), 499  # unless a response begins, the client has gone

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers, state)
            if refusal is not None:
                await respond(refusal)(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except ClientDisconnect:
            pass  # nobody to answer; logged as 499
        except Exception:
            bugs.exception("request %s failed", request_id)
            if status == 499:
                await respond(InternalError(f"internal error; request {request_id}"))(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http.labels(route, method, str(status)).inc()
            if scope["path"] not in _SILENT:
                self._log(scope, state, route, status, time.perf_counter() - started)

    def _refusal(self, path: str, headers: dict[bytes, str], state: dict[str, Any]) -> ApiError | None:
        if not self._keys.required or path in _OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            return Unauthorized("no API key was sent; send `Authorization: Bearer KEY`", code="missing_api_key")
        if not self._keys.accepts(key):
            return Unauthorized("the API key is not one of this server's", code="invalid_api_key")
        state["salt"] = state["client"] = fingerprint(key)
        return None

    def _log(self, scope: Scope, state: dict[str, Any], route: str, status: int, total_s: float) -> None:
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": route,
            "status": status,
            **(state["job"].log_fields() if "job" in state else {}),
            "total_s": round(total_s, 4),
            "client": state.get("client", "-"),
        }
        text = json.dumps(fields) if self._log_format == "json" else " ".join(f"{k}={v}" for k, v in fields.items())
        log.info("%s", text)


def respond(error: ApiError) -> Response:
    """An error as its HTTP response."""
    body = json.dumps(error.body()).encode()
    return Response(body, error.status, headers=error.headers, media_type="application/json")
