"""The front of a cluster: one OpenAI base URL over many models, each with its own replicas.

Who may ask, how much, and whether a body is well formed is settled here. The answer is computed by a replica, whose
HTTP response comes through byte by byte as it is (relaying through Ray's own streams costs ten times as much, see
docs/benchmarks.md). Which replica, and how long it stays ours, is a lease. Nothing here knows Ray: `Fleet` is all it
needs, and `serving/cluster/deployment.py` gives it.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import mpt
from mpt.engine.adapters import split_name
from serving.app import add_errors, as_json, versions
from serving.auth import Door
from serving.cluster.options import ClusterOptions
from serving.docs import add_docs
from serving.errors import ApiError, Forbidden, NotFound, Unavailable
from serving.gate import Gate, respond
from serving.intake import read_body
from serving.metrics import HttpMetrics
from serving.options import is_loopback
from serving.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, parse, prompts_of
from serving.routes import BODIES, ROUTES, EmbeddingRequest, add_routes
from serving.sse import KEEP_ALIVE, UNBUFFERED, event, finish, until_disconnected

log = logging.getLogger(__name__)

_ATTEMPTS = 3  # replicas tried before a client is told that they are lost; none after the first byte
_SILENCE_S = 60.0  # a replica fills its streams with comments; one that says nothing for this long is lost
_BYTES_PER_TOKEN = 4  # OpenAI's rule of thumb; what a client is charged until the replica has counted
_UNKNOWN_LENGTH = 256  # tokens charged meanwhile for a chat that sets no limit
_ANY_TOKEN = 1 << 31  # a vocabulary's size: the replica knows the real one
_PREFIX_CHARACTERS = 1024  # characters that decide which replica's cache a prompt may be in


class ReplicaLost(Exception):
    """A replica, or the way to it, has gone."""


@dataclass
class Lease:
    """A replica that is ours for one request: where it listens, and what it lets in."""

    url: str
    headers: Mapping[str, str]
    replica: str
    lost: "asyncio.Future[None]"  # raises ReplicaLost as soon as Ray knows
    report: Callable[[], Any]  # awaited after the answer: what it cost, as the replica's log would say


class Fleet(Protocol):
    """The replicas of every model."""

    def cards(self) -> dict[str, list[dict[str, Any]]]:
        """The entries for /v1/models of each served name, its adapters' too."""
        ...

    def lease(self, model: str, adapter: str | None, prefix: str) -> AbstractAsyncContextManager[Lease]:
        """A replica of a model. Raises Unavailable when too many wait already, and ReplicaLost."""
        ...

    async def runs(self) -> dict[str, dict[str, Any]]:
        """What computes each model that has a replica now, as its replica says (`Choice.as_json`)."""
        ...

    async def expositions(self) -> dict[str, str]:
        """Metrics of every process of the application, by its name."""
        ...

    async def not_ready(self) -> str | None: ...


@dataclass
class Relayed:
    """One request's way through, for the access log and its client's account."""

    model: str
    estimate: int  # tokens, until the replica has counted
    report: dict[str, Any] = field(default_factory=dict)
    replica: str = "-"
    arrived: float = field(default_factory=time.perf_counter)
    lease_s: float = 0.0  # until a replica took it; the replica's own times come on top

    @property
    def n_tokens(self) -> int:
        counted = [self.report.get(key) for key in ("prompt_tokens", "completion_tokens")]
        return sum(value for value in counted if isinstance(value, int)) if self.report else 0

    def log_fields(self) -> dict[str, Any]:
        return {"model": self.model, "replica": self.replica, "lease_s": round(self.lease_s, 4), **self.report}


class RouterMetrics(HttpMetrics):
    def __init__(self) -> None:
        super().__init__()
        self.lost = self.counter("replica_lost", "Answers whose replica went away.", ["model_name"])
        self.rejected = self.counter("router_rejected", "Requests no replica had room for.", ["model_name"])
        self.lease = self.histogram("lease_wait_seconds", "From arrival to a replica that takes the request.")


def make_router(fleet: Fleet, options: ClusterOptions, door: Door) -> FastAPI:
    """The ASGI app in front of a fleet; the same routes and errors as `serving.app.make_app`."""
    app = FastAPI(title="MPT", version=mpt.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # the redirect's host would be whatever the client's Host header says
    metrics = RouterMetrics()
    session, traffic = _Session(), Traffic()
    cards = fleet.cards

    def find(model: str) -> tuple[str, str | None]:
        if traffic.draining:
            raise Unavailable("the server is shutting down; try another", code="shutting_down")
        base, adapter = split_name(model)
        served = cards()
        if base not in served:
            known = ", ".join(f"`{name}`" for name in served)
            raise NotFound(f"no model `{model[:100]}` here; served: {known}", code="model_not_found", param="model")
        return base, adapter

    async def relay(request: Request, kind: type[BaseModel]) -> Response:
        raw = await read_body(request, options.max_body_bytes)
        asked: Any = parse(kind, raw)
        base, adapter = find(asked.model)
        work = Relayed(asked.model, _tokens(asked))
        request.state.admission.reserve(work.estimate)
        request.state.work = work
        streamed = bool(getattr(asked, "stream", False))
        lease = _Lessor(fleet, base, adapter, _prefix(asked), request.state.salt)
        return Relay(request, raw, work, lease, await session.get(), metrics, options, traffic, streamed)

    def relayed(kind: type[BaseModel]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            return await relay(request, kind)

        return answer

    async def adapter_loading(_: Request) -> Response:
        raise NotFound("a cluster loads no adapters by request; put them into the folder `adapters` of their model")

    async def batches() -> Response:
        raise NotFound(
            "a cluster keeps no files and runs no batches; answer the file with "
            "`mpt run-batch requests.jsonl results.jsonl --url` and this cluster's URL"
        )

    async def models() -> Response:
        runs = await fleet.runs()
        entries = [{**card, "runs": runs.get(name)} for name, found in cards().items() for card in found]
        return as_json({"object": "list", "data": entries})

    async def model(model: str) -> Response:
        base, _ = find(model)
        for card in cards()[base]:
            if card["id"] == model:
                return as_json({**card, "runs": (await fleet.runs()).get(base)})
        raise NotFound(f"no adapter `{model[:100]}` here", code="model_not_found", param="model")

    async def health() -> Response:
        return as_json({"status": "ok"})

    async def ready() -> Response:
        why = await fleet.not_ready()
        return as_json({"status": "ready"}) if why is None else respond(Unavailable(why, code="model_loading"))

    async def version() -> Response:
        return as_json(versions())

    async def scrape() -> Response:
        """Prometheus metrics of every router and replica, told apart by the label `replica`."""
        return Response(merged(await fleet.expositions()), headers={"content-type": CONTENT_TYPE_LATEST})

    functions: dict[str, Callable[..., Any]] = {
        "models": models, "model": model, "health": health, "ready": ready, "version": version, "metrics": scrape,
        "load_lora_adapter": adapter_loading, "unload_lora_adapter": adapter_loading,
    }  # fmt: skip
    functions |= {route.name: batches for route in ROUTES if route.path.startswith(("/v1/files", "/v1/batches"))}
    functions |= {route.name: relayed(route.body) for route in ROUTES if route.is_relayed and route.body}
    add_routes(app, functions)
    app.state.own_metrics = lambda: generate_latest(metrics.registry).decode()
    app.state.traffic = traffic
    add_errors(app, metrics)
    if options.replica_host == "loopback":
        app.add_middleware(_FromHereOnly)
    if options.docs:
        add_docs(app, *BODIES)
    app.add_middleware(  # Ray Serve, which is around this app, sends x-request-id
        Gate, door=door, metrics=metrics, log_format=options.log_format, names_requests=False
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class _FromHereOnly:
    """Refuses other machines: Ray binds a replica's port to every address, whatever the config's host is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope.get("client") or ("127.0.0.1", 0)
        if scope["type"] == "http" and not is_loopback(peer[0]):
            await respond(Forbidden("this server is for its own machine only"))(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Traffic:
    """What is on its way through, so that a router can leave when it is over."""

    def __init__(self) -> None:
        self.draining = False
        self._n = 0
        self._ending = asyncio.Event()

    async def through(self, relay: Coroutine[Any, Any, None]) -> None:
        """Run a relay to its end, or to the end of the time there is. Raises Unavailable then."""
        self._n += 1
        task, ending = asyncio.ensure_future(relay), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Unavailable("the server is shutting down; try another", code="shutting_down")
            await task
        finally:
            self._n -= 1  # before anything is awaited: cancelling may come twice
            for each in (task, ending):
                each.cancel()
            await asyncio.gather(task, ending, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; wait for those there are, then end what is left with an error."""
        self.draining = True
        until = time.monotonic() + timeout_s
        while self._n and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._ending.set()
        while self._n:
            await asyncio.sleep(0.02)
        await asyncio.sleep(1)  # the last bytes are on their way, through Ray Serve and HAProxy, which end next


class _Session:
    """One HTTP client for all replicas, made inside the event loop that uses it."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def get(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                auto_decompress=False,
                read_bufsize=1 << 16,
            )
        return self._session


@dataclass(frozen=True)
class _Lessor:
    fleet: Fleet
    model: str
    adapter: str | None
    prefix: str
    salt: str

    def __call__(self) -> AbstractAsyncContextManager[Lease]:
        return self.fleet.lease(self.model, self.adapter, self.prefix)


class Relay(Response):
    """A replica's response, passed on as it comes.

    A replica lost before the first byte is replaced by another; afterwards the stream ends in an error event. A client
    that goes away ends the connection to the replica, which ends the generation there.
    """

    def __init__(
        self,
        request: Request,
        body: bytes,
        work: Relayed,
        lease: _Lessor,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        options: ClusterOptions,
        traffic: "Traffic",
        streamed: bool,
    ) -> None:
        super().__init__()
        self._path, self._body, self._work, self._lease = request.scope["path"], body, work, lease
        self._session, self._metrics, self._options, self._streamed = session, metrics, options, streamed
        self._traffic = traffic
        self._sent = {"content-type": "application/json", "x-request-id": request.state.request_id}
        self._sent["x-mpt-salt"] = lease.salt
        self._started = self._written = self._ended = False  # sent: a head, a byte of a replica's, the last byte
        # A whole answer is silent until it is there; whether its replica lives is what the lease knows.
        silence_s = max(_SILENCE_S, 4 * options.keep_alive_s) if streamed else None
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=silence_s)
        self._written_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        relay = asyncio.create_task(self._traffic.through(self._relay()))
        beside = [asyncio.create_task(until_disconnected(receive))]
        if self._streamed:
            beside.append(asyncio.create_task(self._keep_alive()))
        beside[0].add_done_callback(lambda _: self._ended or relay.cancel())
        await finish(relay, beside)
        if relay.cancelled():
            raise ClientDisconnect
        if (error := relay.exception()) is not None:
            if not isinstance(error, ApiError) or not self._started:
                raise error
            await self._write(event(error.body()), more=False)

    async def _relay(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._attempt()
                return
            except (ReplicaLost, aiohttp.ClientError, TimeoutError, OSError) as error:
                self._metrics.lost.labels(self._lease.model).inc()
                log.warning(
                    "replica %s of %s lost in attempt %d: %r", self._work.replica, self._lease.model, attempt, error
                )
                if self._written:
                    break
        raise Unavailable("the replica that was answering has gone; ask again", code="replica_lost")

    async def _attempt(self) -> None:
        try:
            async with asyncio.timeout(self._options.request_timeout_s) as waiting, self._lease() as lease:
                waiting.reschedule(None)  # from here on the replica keeps the deadline
                self._work.replica, self._work.lease_s = lease.replica, time.perf_counter() - self._work.arrived
                self._metrics.lease.labels(self._lease.model).observe(self._work.lease_s)
                answer = asyncio.ensure_future(self._pass_on(lease))
                try:
                    await asyncio.wait({answer, lease.lost}, return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        lease.lost.result()
                        raise ReplicaLost("its lease has ended")
                    answer.result()
                finally:
                    answer.cancel()
                    await asyncio.gather(answer, return_exceptions=True)
                self._work.report = await lease.report()
        except TimeoutError as error:
            if self._work.replica == "-":
                raise Unavailable("no replica was free before the deadline", code="queue_timeout") from error
            raise
        except Unavailable:
            self._metrics.rejected.labels(self._lease.model).inc()
            raise

    async def _pass_on(self, lease: Lease) -> None:
        headers = {**self._sent, **lease.headers}
        url = lease.url + self._path
        async with self._session.post(url, data=self._body, headers=headers, timeout=self._timeout) as answer:
            if answer.content_type == "text/event-stream":
                await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", **UNBUFFERED})
                async for piece in answer.content.iter_any():
                    self._written = True
                    await self._write(piece)
                await self._write(b"", more=False)
                return
            body = await answer.read()
        if self._started:  # comments have been sent while it waited: its status can only be an event now
            await self._write(b"data: " + body + b"\n\n", more=False)
            return
        kept = ("content-type", "retry-after", "x-should-retry")
        await self._begin(answer.status, {name: answer.headers[name] for name in kept if name in answer.headers})
        await self._write(body, more=False)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        if not self._started:
            self._started = True
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, body: bytes, more: bool = True) -> None:
        self._written_at = time.monotonic()
        self._ended = not more  # what it cost is still to be heard of, even if the client leaves now
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _keep_alive(self) -> None:
        """Comments while a replica is waited for; afterwards the replica sends its own."""
        while not self._written:
            quiet_s = time.monotonic() - self._written_at
            if quiet_s >= self._options.keep_alive_s:
                await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", **UNBUFFERED})
                await self._write(KEEP_ALIVE)
            await asyncio.sleep(max(0.01, self._options.keep_alive_s - quiet_s))


def merged(expositions: Mapping[str, str]) -> bytes:
    """Metrics of several processes as one exposition, each sample with the process's name as `replica`."""
    families: dict[str, Metric] = {}
    for process, text in expositions.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                labels = {**sample.labels, "replica": process}
                family.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)

    class Found:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry()
    registry.register(Found())
    return generate_latest(registry)


def _tokens(asked: Any) -> int:
    """What a client is charged for a request until a replica has counted."""
    if isinstance(asked, ChatRequest):
        wanted = asked.max_completion_tokens or asked.max_tokens or _UNKNOWN_LENGTH
        return sum(_text_tokens(message.text()) for message in asked.messages) + (asked.n or 1) * wanted
    if isinstance(asked, CompletionRequest):
        prompts = prompts_of(asked.prompt, _ANY_TOKEN)
        wanted = DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        return _prompt_tokens(prompts) + len(prompts) * (asked.best_of or asked.n or 1) * wanted
    if isinstance(asked, EmbeddingRequest):
        return _prompt_tokens(prompts_of(asked.input, _ANY_TOKEN, "input"))
    return 0


def _prompt_tokens(prompts: list[str | list[int]]) -> int:
    return sum(_text_tokens(prompt) if isinstance(prompt, str) else len(prompt) for prompt in prompts)


def _text_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _prefix(asked: Any) -> str:
    """What decides which replica may have a prompt in its cache; the same in every turn of a conversation."""
    if isinstance(asked, ChatRequest):
        first = [message.text() for message in asked.messages[:2]]
        text = "\n".join(first)
    elif isinstance(asked, CompletionRequest):
        prompt = asked.prompt
        text = prompt if isinstance(prompt, str) else orjson.dumps(prompt).decode()
    else:
        return ""
    return hashlib.sha256(text[:_PREFIX_CHARACTERS].encode("utf-8", "replace")).hexdigest()[:16]
