"""What every HTTP request passes: its id, the key check, rate limits, the security header, the access log.

An ASGI middleware around the whole app, so that no route can be reached beside it. Access is denied by default: only
the paths named here are open without a key.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from ipaddress import ip_address
from typing import Any, Literal, Protocol
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import limited_to
from serving.auth import Door
from serving.errors import ApiError, HeadersTooLarge, InternalError, RateLimited
from serving.front import wants_page
from serving.heads import Hosts, refusal_of
from serving.http_metrics import HttpMetrics
from serving.limits import Admission, RateLimiter
from serving.options import is_loopback
from serving.quotas import Account, QuotaBook
from serving.wire import respond

log = logging.getLogger("serving.access")
bugs = logging.getLogger(__name__)

GONE = "client_disconnected"  # what the log says in place of an error's code
_OPEN = frozenset({"/health", "/ready"})  # probes have no keys
_MAX_HEADERS = 32 << 10  # bytes; what servers commonly take
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # others are one label in metrics
_SILENT = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines


class Work(Protocol):
    """What a route leaves in `request.state.work`: for the access log and the client's account."""

    n_tokens: int  # that the client's account is charged

    def log_fields(self) -> dict[str, Any]: ...


class Gate:
    """log_format None neither logs nor counts: the router that sent the request here does. book: of clients' quotas.

    names_requests: send x-request-id, unless something around this app does. hosts: the names that it may be asked by,
    None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        door: Door,
        metrics: HttpMetrics,
        log_format: Literal["text", "json"] | None,
        book: QuotaBook,
        names_requests: bool = True,
        hosts: Hosts | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._app, self._door, self._metrics, self._log_format = app, door, metrics, log_format
        self._names_requests, self._hosts, self._book = names_requests, hosts, book
        self._limiter = limiter or RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, salt="", admission=None, models=None)
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
                state["error"] = refusal.code
                await respond(refusal, scope["path"])(scope, receive, send_on)
            else:
                with limited_to(state["models"]):
                    await self._app(scope, receive, send_on)
        except ClientDisconnect:
            state.setdefault("error", GONE)  # nobody to answer; logged as 499 unless the answer had begun
        except asyncio.CancelledError:  # what is around this app has seen it first
            state.setdefault("error", GONE)
            raise
        except Exception:
            bugs.exception("request %s failed", request_id)
            state["error"] = InternalError.code
            if status == 499:
                error = InternalError(f"internal error; request {request_id}")
                await respond(error, scope["path"])(scope, receive, send_on)
        finally:
            if state["admission"] is not None:
                n_tokens = state["work"].n_tokens if "work" in state else 0
                state["admission"].settle(n_tokens)
                state["account"].settle(n_tokens)
            if self._log_format is not None:
                self._record(scope, state, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope, headers: dict[bytes, str], state: dict[str, Any]) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MAX_HEADERS:
            return HeadersTooLarge(f"the headers are over the limit of {_MAX_HEADERS} bytes; send less")
        if (wrong := refusal_of(scope["headers"], self._hosts)) is not None:
            return wrong
        if scope["path"] in _OPEN or wants_page(scope):
            return None
        try:
            client = self._door.client(headers)
            state.update(salt=client.salt, client=client.name, models=client.models)
            state["account"] = Account(self._book, client.name, client.quotas)
            state["admission"] = self._limiter.admit(client.salt, client.limits)
        except RateLimited as error:
            self._metrics.rate_limited.labels(error.kind).inc()
            return error
        except ApiError as error:
            return error
        return None

    def _record(self, scope: Scope, state: dict[str, Any], status: int, total_s: float) -> None:
        """Count a response, and write its line in the access log."""
        route = getattr(scope.get("route"), "path", None)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http.labels(route or "unknown", method, str(status)).inc()
        error = state.get("error")
        if error is not None and status < 400:
            self._metrics.cut.labels(route or "unknown", error).inc()
        if scope["path"] in _SILENT or scope["path"].startswith("/demo/"):
            return
        work: Work | None = state.get("work")
        fields = {
            "request_id": state["request_id"],
            "method": scope["method"][:20],
            "path": route or shown(scope["path"]),
            "status": status,
            **({} if error is None else {"error": error}),
            **({**work.log_fields(), "charged_tokens": work.n_tokens} if work is not None else {}),
            "total_s": round(total_s, 4),
            "client": state.get("client", "-"),
            "peer": peer_of(scope),
            **({} if state.get("trace") is None else {"trace_id": state["trace"].trace_id}),
        }
        text = json.dumps(fields) if self._log_format == "json" else " ".join(f"{k}={v}" for k, v in fields.items())
        log.info("%s", text)


def peer_of(scope: Scope) -> str:
    """The address that a request came from.

    Of a proxy on this machine it is the one that the proxy has added to `X-Forwarded-For`. From anywhere else the
    header is what the client likes to say, and is not read.
    """
    peer = str((scope.get("client") or ("-",))[0])
    if not is_loopback(peer):
        return peer
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    last = given[-1].rpartition(",")[2].strip() if given else ""
    try:
        return str(ip_address(last))
    except ValueError:
        return peer


def shown(path: str) -> str:
    """A path that is no route, for one field of a line: short, and nothing in it ends the field or the line."""
    return quote(path[:100], safe="/:@!$&'()*+,;~")


def _limits_left(state: dict[str, Any], status: int) -> dict[str, str]:
    admission: Admission | None = state["admission"]
    return admission.headers() if admission is not None and status != 429 else {}  # an error brings its own
