"""Connections that hold a place without using it, and how many places there are: uvicorn's protocols with clocks.

A connection waits for a request, works on one, or sends what its client does not read; each has its clock here. What
the app itself waits for, the rest of a body, it limits too (`bodies.py`). Where all places are taken, a new connection
gets the one of whoever has waited longest for a request, so silent ones keep nobody out. Where all of them work, it is
answered 503, but for probes.
"""

import asyncio
import contextlib
import fcntl
import logging
import resource
import socket
import struct
import sys
import termios
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mpt.errors import UserError
from serving.errors import Unavailable
from serving.wire import respond

log = logging.getLogger(__name__)

_MOST = 10_000  # connections by default, however many files may be open: silent ones take 5 KB each
_LEAST_READ = 16 << 10  # bytes that a client must take of what waits for it, within a write time-out
_MAX_HEAD = 64 << 10  # bytes of a head; the parser of a replica has no limit of its own
_SAY_AGAIN_S = 60.0
_PROBES = frozenset({"/health", "/ready", "/metrics"})


@dataclass(frozen=True)
class Clocks:
    """Seconds: for the head of a request; for a client to read something of what waits for it."""

    read_s: float = 60.0
    write_s: float = 60.0


def most_connections(asked: int | None) -> int:
    """How many may be open at once: three quarters of the files that a process may have, or fewer where asked for.

    Raises UserError where more are asked for.
    """
    n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = _MOST if n_files == resource.RLIM_INFINITY else n_files * 3 // 4
    if asked is not None and asked > room:
        raise UserError(
            f"--max-connections {asked} is over the {room} that this process may have, three quarters of its "
            f"{n_files} files; raise `ulimit -n`, or ask for fewer"
        )
    return asked or min(room, _MOST)


class Connections:
    """The connections of a server, counted. limit: None for no limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.n_open = 0
        self._waiting: dict[_Timed, None] = {}  # for a request, who waits longest first
        self._said_at = float("-inf")

    @property
    def are_full(self) -> bool:
        return self.limit is not None and self.n_open >= self.limit

    @property
    def all_work(self) -> bool:
        """Whether more connections work on a request than there are places."""
        return self.limit is not None and self.n_open - len(self._waiting) > self.limit

    def opened(self, connection: "_Timed") -> None:
        """Count one, and make room for it. One that finds none, not even to be told so, is closed."""
        self.n_open += 1
        if self.limit is not None and self.n_open > self.limit:
            self._say_so(self.limit)
            if (longest := next(iter(self._waiting), None)) is not None:
                del self._waiting[longest]
                longest.transport.abort()
            elif self.n_open > self.limit + max(8, self.limit // 8):
                connection.transport.abort()
        self._waiting[connection] = None

    def closed(self, connection: "_Timed") -> None:
        self.n_open -= 1
        self._waiting.pop(connection, None)

    def waits(self, connection: "_Timed") -> None:
        """A connection waits for a request, from now on."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def works(self, connection: "_Timed") -> None:
        self._waiting.pop(connection, None)

    def _say_so(self, limit: int) -> None:
        now = time.monotonic()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            log.warning(
                "all %d connections are open, %d of them without a request; whoever waits longest for one makes room",
                limit, len(self._waiting),
            )  # fmt: skip


class Crowded:
    """Answers 503 where all places are taken by requests; probes are answered as ever."""

    def __init__(self, app: ASGIApp, connections: Connections) -> None:
        self._app, self._connections = app, connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._connections.all_work and scope["path"] not in _PROBES:
            error = Unavailable("all connections of this server are in use; try again later", code="overloaded")
            error.headers = {**error.headers, "Connection": "close"}
            await respond(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


if TYPE_CHECKING:
    _Protocol = H11Protocol
else:
    _Protocol = object  # uvicorn's two protocols have the same methods and fields, and no class in common with them


class _Timed(_Protocol):
    """What is added to either of uvicorn's protocols."""

    clocks: Clocks
    places: Connections
    _clock: asyncio.TimerHandle | None = None  # for a head
    _begun = False  # a head has, and is not whole
    _n_head = 0  # bytes that came since
    _reading: asyncio.TimerHandle | None = None  # whether the client reads
    _n_unread = 0  # bytes that waited for it when last looked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._clock = self.loop.call_later(self.clocks.read_s, self._too_slow)
        self.places.opened(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._works():
            self._stop_clock()
            self.places.works(self)
        elif self._clock is None:
            self._clock = self.loop.call_later(self.clocks.read_s, self._too_slow)
        self._begun = self._clock is not None
        self._n_head = self._n_head + len(data) if self._begun else 0
        if self._n_head > _MAX_HEAD and (self.cycle is None or not self.cycle.more_body):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_reading()
        self.places.closed(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_reading()  # until here it has read
        self._see_that_it_is_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reading()
        self._see_that_it_is_read()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._see_that_it_is_read()
        if not self._works():  # else the next request was here already
            self.places.waits(self)

    def _works(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            if self._begun:
                self._say_too_slow()
            self.transport.close()
            self._see_that_it_is_read()

    def _say_too_slow(self) -> None:
        """Answer a head that has begun."""

    def _see_that_it_is_read(self) -> None:
        """Look again and again whether the client takes what waits for it, until nothing does that no one adds to."""
        if self._reading is None and self.transport.get_write_buffer_size():
            self._n_unread = _unread(self.transport)
            self._reading = self.loop.call_later(self.clocks.write_s, self._look)

    def _look(self) -> None:
        self._reading = None
        goes_on = self._works() and not self.flow.write_paused and not self.transport.is_closing()
        if goes_on or not self.transport.get_write_buffer_size():
            return  # the next pause will tell, or all is read
        if _unread(self.transport) > max(0, self._n_unread - _LEAST_READ):
            log.info("%s has read nothing for %.0f s; its connection is closed", self.client, self.clocks.write_s)
            at_once = struct.pack("ii", 1, 0)  # what waits in the kernel is dropped with it
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.transport.abort()
            return
        self._see_that_it_is_read()


def _unread(transport: asyncio.Transport) -> int:
    """Bytes that wait here and in the kernel, which asks for more only when a third of its megabytes has gone."""
    n_in_kernel = b""
    with contextlib.suppress(OSError):
        n_in_kernel = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return transport.get_write_buffer_size() + int.from_bytes(n_in_kernel, sys.byteorder)


class _TimedH11(_Timed, H11Protocol):
    def _say_too_slow(self) -> None:
        if self.conn.our_state is not h11.IDLE:
            return  # it is the rest of a body whose request has its answer
        said = b"The head of the request did not come in time."
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        head = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
        for event in (head, h11.Data(data=said), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")


class _TimedHttpTools(_Timed, HttpToolsProtocol):  # type: ignore[misc]  # _Timed is no H11Protocol, see above
    pass


def timed_protocol(
    clocks: Clocks, places: Connections, parser: Literal["h11", "httptools"] = "h11"
) -> type[asyncio.Protocol]:
    """The protocol of a server for `uvicorn.Config(http=...)`. h11 is strict, httptools fast."""
    base = _TimedH11 if parser == "h11" else _TimedHttpTools
    return type("TimedProtocol", (base,), {"clocks": clocks, "places": places})
