"""What every HTTP request passes: its id, the key check, rate limits, the security header, the access log.

An ASGI middleware around the whole app, so that no route can be reached beside it. Access is denied by default: only
the paths named here are open without a key.
"""

import json
import logging
import re
import time
import uuid
from typing import Any, Literal, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.auth import Door
from serving.errors import ApiError, HeadersTooLarge, InternalError, RateLimited
from serving.limits import Admission, RateLimiter
from serving.metrics import HttpMetrics
from serving.wire import respond

log = logging.getLogger("serving.access")
bugs = logging.getLogger(__name__)

_OPEN = frozenset({"/health", "/ready"})  # probes have no keys
_MAX_HEADERS = 32 << 10  # bytes; what servers commonly take
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # others are one label in metrics
_SILENT = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


class Work(Protocol):
    """What a route leaves in `request.state.work`: for the access log and the client's account."""

    n_tokens: int  # read and written

    def log_fields(self) -> dict[str, Any]: ...


class Gate:
    """log_format None neither logs nor counts: the router that sent the request here does.

    names_requests: send x-request-id, unless something around this app does.
    """

    def __init__(
        self,
        app: ASGIApp,
        door: Door,
        metrics: HttpMetrics,
        log_format: Literal["text", "json"] | None,
        names_requests: bool = True,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._app, self._door, self._metrics, self._log_format = app, door, metrics, log_format
        self._names_requests = names_requests
        self._limiter = limiter or RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, salt="", admission=None)
        started, status = time.perf_counter(), 499  # unless a response begins, the client has gone

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {"x-content-type-options": "nosniff", **_limits_left(state, status)}
                if self._names_requests:
                    own["x-request-id"] = request_id
                extra = [(name.encode(), value.encode()) for name, value in own.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            try:
                await send(message)
            except Exception as error:  # the connection is broken, or what came over it is not HTTP
                raise ClientDisconnect from error

        try:
            refusal = self._refusal(scope, headers, state)
            if refusal is not None:
                await respond(refusal, scope["path"])(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except ClientDisconnect:
            pass  # nobody to answer; logged as 499
        except Exception:
            bugs.exception("request %s failed", request_id)
            if status == 499:
                error = InternalError(f"internal error; request {request_id}")
                await respond(error, scope["path"])(scope, receive, send_on)
        finally:
            if state["admission"] is not None:
                state["admission"].settle(state["work"].n_tokens if "work" in state else 0)
            if self._log_format is not None:
                self._record(scope, state, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope, headers: dict[bytes, str], state: dict[str, Any]) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADERS:
            return HeadersTooLarge(f"the headers are over the limit of {_MAX_HEADERS} bytes; send less")
        if scope["path"] in _OPEN:
            return None
        try:
            client = self._door.client(headers)
            state.update(salt=client.salt, client=client.name)
            state["admission"] = self._limiter.admit(client.salt, client.limits)
        except RateLimited as error:
            self._metrics.rate_limited.labels(error.kind).inc()
            return error
        except ApiError as error:
            return error
        return None

    def _record(self, scope: Scope, state: dict[str, Any], status: int, total_s: float) -> None:
        """Count a response, and write its line in the access log."""
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http.labels(route, method, str(status)).inc()
        if scope["path"] in _SILENT or scope["path"].startswith("/demo/"):
            return
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": route,
            "status": status,
            **(state["work"].log_fields() if "work" in state else {}),
            "total_s": round(total_s, 4),
            "client": state.get("client", "-"),
        }
        text = json.dumps(fields) if self._log_format == "json" else " ".join(f"{k}={v}" for k, v in fields.items())
        log.info("%s", text)


def _limits_left(state: dict[str, Any], status: int) -> dict[str, str]:
    admission: Admission | None = state["admission"]
    return admission.headers() if admission is not None and status != 429 else {}  # an error brings its own
