"""Where a request belongs in a trace: W3C's `traceparent` of its client, and spans of OpenTelemetry where they are on.

A valid `traceparent` names the trace in the log line (`trace_id`), and goes on to the replica that answers; one that is
invalid is ignored, as the specification asks. Spans are off unless there is an endpoint for them: `--otel-endpoint`, or
OpenTelemetry's own `OTEL_EXPORTER_OTLP_ENDPOINT`. They have the attributes of its conventions for generative AI, and no
text of a prompt or an answer, no key and no client's name.

Source: https://www.w3.org/TR/trace-context/, https://opentelemetry.io/docs/specs/semconv/gen-ai/.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mpt
from mpt.errors import UserError
from mpt.extras import install

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z0-9][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"  # printable, no comma, no equals sign
_MEMBER = re.compile(f"({_KEY})=({_VALUE})")
_MOST_MEMBERS = 32
_SAMPLED = 1
_SILENT = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by machines
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
# What the access log says of a request, by the attribute that says the same.
_ATTRIBUTES = {
    "gen_ai.request.model": "model",
    "gen_ai.response.model": "model",
    "gen_ai.usage.input_tokens": "prompt_tokens",
    "gen_ai.usage.output_tokens": "completion_tokens",
    "mpt.queue_s": "queue_s",
    "mpt.time_to_first_token_s": "ttft_s",
    "mpt.lease_s": "lease_s",
    "mpt.replica": "replica",
}


@dataclass(frozen=True)
class TraceContext:
    """A trace, and the span in it that asks. state: what other systems say of it, as it came."""

    trace_id: str
    parent_id: str
    flags: int
    state: str = ""

    def headers(self) -> dict[str, str]:
        """What says this to the next server."""
        found = {"traceparent": f"00-{self.trace_id}-{self.parent_id}-{self.flags:02x}"}
        return {**found, "tracestate": self.state} if self.state else found


def trace_context(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """The context in a request's headers, None where there is none that is valid."""
    given = [(name.lower(), value.decode("latin-1").strip()) for name, value in headers]
    parents = [value for name, value in given if name == b"traceparent"]
    found = _PARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not (trace_id.strip("0") and parent_id.strip("0")):
        return None
    known = (
        int(flags, 16) if version == "00" else int(flags, 16) & _SAMPLED
    )  # other bits of a later version are its own
    return TraceContext(trace_id, parent_id, known, _state([value for name, value in given if name == b"tracestate"]))


def _state(values: list[str]) -> str:
    """The one value of all `tracestate` headers; none where it is not valid, which leaves the trace as it is."""
    members = [member.strip() for value in values for member in value.split(",") if member.strip()]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in found if match}
    return ",".join(members) if len(keys) == len(members) <= _MOST_MEMBERS else ""


class Traced:
    """ASGI middleware around the gate: leaves the context in `state.trace` of a request, and makes a span if asked."""

    def __init__(self, app: ASGIApp, spans: "Spans | None") -> None:
        self._app, self._spans = app, spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = trace_context(scope["headers"])
        state: dict[str, Any] = scope.setdefault("state", {})
        state["trace"] = context
        if self._spans is None or scope["path"] in _SILENT:
            await self._app(scope, receive, send)
            return
        span, status = self._spans.start(context), 0
        state["trace"] = self._spans.context_of(span, context)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            self._spans.end(span, scope, status)


class Spans:
    """Makes spans and sends them over OTLP (HTTP, protobuf), from a thread of its own."""

    def __init__(self, endpoint: str | None) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        of_this = {"service.version": mpt.__version__}
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            of_this["service.name"] = "mpt"
        exporter = OTLPSpanExporter(
            endpoint=None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces", timeout=2
        )
        provider = TracerProvider(resource=Resource.create(of_this))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("mpt", mpt.__version__)

    def start(self, parent: TraceContext | None) -> "Span":
        """A span of this server in its client's trace, or in a new one."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        context = Context()
        if parent is not None:
            remote = trace.SpanContext(
                int(parent.trace_id, 16),
                int(parent.parent_id, 16),
                is_remote=True,
                trace_flags=trace.TraceFlags(parent.flags),
                trace_state=trace.TraceState.from_header([parent.state]),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
        return self._tracer.start_span("request", context, kind=trace.SpanKind.SERVER)

    def context_of(self, span: "Span", parent: TraceContext | None) -> TraceContext:
        """What the next server is told: this span as the one that asks."""
        own = span.get_span_context()
        state = "" if parent is None else parent.state
        return TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", int(own.trace_flags), state)

    def end(self, span: "Span", scope: Scope, status: int) -> None:
        """Say what became of a request. status: of its response, 0 where its client went before there was one."""
        from opentelemetry.trace import StatusCode

        route = getattr(scope.get("route"), "path", "unknown")
        work = scope["state"].get("work")
        fields = {} if work is None else work.log_fields()
        operation = _OPERATIONS.get(route)
        span.update_name(f"{operation} {fields['model']}" if operation and fields else f"{scope['method']} {route}")
        said: dict[str, Any] = {"http.request.method": scope["method"], "http.route": route}
        if status:
            said["http.response.status_code"] = status
        if operation:
            said |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "mpt", **_said_by(fields)}
        if status >= 500 or not status:
            said["error.type"] = str(status or 499)
            span.set_status(StatusCode.ERROR)
        span.set_attributes({**said, "mpt.request_id": scope["state"].get("request_id", "-")})
        span.end()


def _said_by(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: fields[key] for name, key in _ATTRIBUTES.items() if fields.get(key, "-") != "-"}
    if (reasons := fields.get("finish_reason", "-")) != "-":
        found["gen_ai.response.finish_reasons"] = reasons.split(",")
    return found


def check_endpoint(endpoint: str | None) -> None:
    """Raises UserError for what is no URL."""
    if endpoint is not None and not re.fullmatch(r"https?://\S+", endpoint):
        raise UserError(
            f"the endpoint of spans, `{endpoint}` (otel_endpoint), is no URL; "
            "give http://HOST:4318, where OTLP is taken over HTTP"
        )


def spans_to(endpoint: str | None) -> Spans | None:
    """What makes spans, None where nobody asked for them. Raises UserError where they were asked for and cannot be."""
    if endpoint is None and not any(os.environ.get(name) for name in _VARIABLES):
        return None
    check_endpoint(endpoint)
    try:
        return Spans(endpoint)
    except ModuleNotFoundError as error:
        missing = f"spans need `{error.name}`; {install('otel')}"
        if endpoint is not None:
            raise UserError(f"otel_endpoint: {missing}") from error
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set and no spans are sent: %s", missing)
        return None
