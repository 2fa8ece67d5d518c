"""A request's way through the router: a replica is leased, its response passed on as it comes.

Which replica, and how long it stays ours, is a lease of the fleet; nothing here knows Ray.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.cluster.options import ClusterOptions
from serving.errors import ApiError, Unavailable
from serving.http_metrics import HttpMetrics
from serving.sse import UNBUFFERED, finish, until_disconnected
from serving.wire import wire_of

log = logging.getLogger(__name__)

CHARGED = "charged_tokens"  # in a replica's report: what its client's account is charged
_ATTEMPTS = 3  # replicas tried before a client is told that they are lost; none after the first byte
_SILENCE_S = 60.0  # a replica fills its streams with comments; one that says nothing for this long is lost


class ReplicaLost(Exception):
    """A replica, or the way to it, has gone."""


_LOST = (ReplicaLost, aiohttp.ClientError, TimeoutError, OSError)  # what says so


@dataclass
class Lease:
    """A replica that is ours for one request: where it listens, and what it lets in."""

    url: str
    headers: Mapping[str, str]
    replica: str
    lost: "asyncio.Future[None]"  # raises ReplicaLost as soon as Ray knows
    report: Callable[[], Any]  # awaited after the answer: what it cost, in the words of the log; {} if unknown


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
    """One request's way through, for the access log and its client's account.

    What it cost is what its replica reports, also where the client left. Without a report it is what passed here: the
    prompt as it was estimated, and a token for each event, which has one or a few.
    """

    model: str
    n_prompt: int  # tokens, estimated
    estimate: int  # with those of the answer, at most
    report: dict[str, Any] = field(default_factory=dict)
    n_events: int = 0  # of a stream, passed on
    is_served: bool = False  # a whole answer was
    replica: str = "-"
    arrived: float = field(default_factory=time.perf_counter)
    lease_s: float = 0.0  # until a replica took it; the replica's own times come on top

    @property
    def n_tokens(self) -> int:
        if CHARGED in self.report:
            return int(self.report[CHARGED])
        return self.estimate if self.is_served else self.n_prompt + self.n_events if self.n_events else 0

    def log_fields(self) -> dict[str, Any]:
        told = {key: value for key, value in self.report.items() if key not in (CHARGED, "error")}
        if not told and (self.is_served or self.n_events):
            told = {"finish_reason": "error"}
        return {"model": self.model, "replica": self.replica, "lease_s": round(self.lease_s, 4), **told}


class _Events:
    """Counts the events of a stream, however its bytes are cut."""

    def __init__(self, mark: bytes) -> None:
        self._mark, self._tail = mark, b"\n"[: len(mark) - 1]  # as if a line had ended before the first

    def count(self, piece: bytes) -> int:
        seen = self._tail + piece
        self._tail = seen[max(0, len(seen) - len(self._mark) + 1) :]
        return seen.count(self._mark)


class RouterMetrics(HttpMetrics):
    def __init__(self) -> None:
        super().__init__()
        self.lost = self.counter("replica_lost", "Answers whose replica went away.", ["model_name"])
        self.rejected = self.counter("router_rejected", "Requests no replica had room for.", ["model_name"])
        self.lease = self.histogram("lease_wait_seconds", "From arrival to a replica that takes the request.")


class Traffic:
    """What is on its way through, so that a router can leave when it is over."""

    def __init__(self) -> None:
        self.draining = False
        self.n = 0
        self._ending = asyncio.Event()

    async def through(self, relay: Coroutine[Any, Any, None]) -> None:
        """Run a relay to its end, or to the end of the time there is. Raises Unavailable then."""
        self.n += 1
        task, ending = asyncio.ensure_future(relay), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({task, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Unavailable("the server is shutting down; try another", code="shutting_down")
            await task
        finally:
            self.n -= 1  # before anything is awaited: cancelling may come twice
            for each in (task, ending):
                each.cancel()
            await asyncio.gather(task, ending, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; wait for those there are, then end what is left with an error."""
        self.draining = True
        until = time.monotonic() + timeout_s
        while self.n and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._ending.set()
        while self.n:
            await asyncio.sleep(0.02)
        await asyncio.sleep(1)  # the last bytes are on their way, through Ray Serve and HAProxy, which end next


@dataclass(frozen=True)
class Lessor:
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
    that goes away ends the connection to the replica, which ends the generation there; what it cost is asked for then.
    """

    def __init__(
        self,
        request: Request,
        body: bytes,
        work: Relayed,
        lease: Lessor,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        options: ClusterOptions,
        traffic: "Traffic",
        streamed: bool,
    ) -> None:
        super().__init__()
        self._path, self._body, self._work, self._lease = request.scope["path"], body, work, lease
        self._wire = wire_of(self._path)
        self._session, self._metrics, self._options, self._streamed = session, metrics, options, streamed
        self._traffic = traffic
        self._sent = {"content-type": "application/json", "x-request-id": request.state.request_id}
        self._sent["x-mpt-salt"] = lease.salt
        if (trace := request.state.trace) is not None:
            self._sent |= trace.headers()
        self._started = self._written = self._ended = False  # sent: a head, a byte of an answer, the last byte
        # A whole answer is silent until it is there; whether its replica lives is what the lease knows.
        silence_s = max(_SILENCE_S, 4 * options.keep_alive_s) if streamed else None
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=silence_s)
        self._written_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send, self._state = send, scope.setdefault("state", {})
        relay = asyncio.create_task(self._traffic.through(self._relay()))
        beside = [asyncio.create_task(until_disconnected(receive))]
        if self._streamed and self._wire.keep_alive:
            beside.append(asyncio.create_task(self._keep_alive()))
        beside[0].add_done_callback(lambda _: self._ended or relay.cancel())
        await finish(relay, beside)
        if relay.cancelled():
            raise ClientDisconnect
        error = relay.exception()
        if error is None and (told := self._work.report.get("error")):
            self._state["error"] = told
        if error is not None:
            if not isinstance(error, ApiError) or not self._started:
                raise error
            self._state["error"] = error.code
            await self._write(self._wire.failure(self._wire.error(error)), more=False)

    async def _relay(self) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._attempt()
                return
            except _LOST as error:
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
                await self._answer(lease)
        except TimeoutError as error:
            if self._work.replica == "-":
                raise Unavailable("no replica was free before the deadline", code="queue_timeout") from error
            raise
        except Unavailable:
            self._metrics.rejected.labels(self._lease.model).inc()
            raise

    async def _answer(self, lease: Lease) -> None:
        """Pass an answer on, and note what it cost, also when the client goes, which cancels this."""
        answer = asyncio.ensure_future(self._pass_on(lease))
        is_lost = False
        try:
            await asyncio.wait({answer, lease.lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                lease.lost.result()
                raise ReplicaLost("its lease has ended")
            answer.result()
        except _LOST:
            is_lost = True
            raise
        finally:
            answer.cancel()  # before the report: the replica makes it when it sees that nobody is there
            await asyncio.gather(answer, return_exceptions=True)
            if not is_lost:
                self._work.report = await lease.report()

    async def _pass_on(self, lease: Lease) -> None:
        headers = {**self._sent, **lease.headers}
        url = lease.url + self._path
        async with self._session.post(url, data=self._body, headers=headers, timeout=self._timeout) as answer:
            if self._wire.media_type.startswith(answer.content_type):
                await self._begin(200, self._stream_headers())
                events = _Events(self._wire.mark)
                async for piece in answer.content.iter_any():
                    self._written = True
                    self._work.n_events += events.count(piece)
                    await self._write(piece)
                await self._write(b"", more=False)
                return
            body = await answer.read()
        if self._started:  # comments have been sent while it waited: its status can only be an event now
            await self._write(self._wire.failure(orjson.loads(body)), more=False)
            return
        kept = ("content-type", "retry-after", "x-should-retry")
        self._work.is_served = self._written = answer.status == 200
        await self._begin(answer.status, {name: answer.headers[name] for name in kept if name in answer.headers})
        await self._write(body, more=False)

    def _stream_headers(self) -> dict[str, str]:
        return {"content-type": self._wire.media_type, **UNBUFFERED}

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
                await self._begin(200, self._stream_headers())
                await self._write(self._wire.keep_alive)
            await asyncio.sleep(max(0.01, self._options.keep_alive_s - quiet_s))
