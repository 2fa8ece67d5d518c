"""Connections that hold a place without using it: silent ones, idle ones, and those whose client does not read."""

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from unittest.mock import Mock

import pytest

from mpt.errors import UserError
from serving.connections import Clocks, Connections, Crowded, most_connections, timed_protocol
from tests.in_process import listening

LIMIT = 4
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
PIECE = bytes(256 << 10)


class Running:
    """An app whose paths answer at once, wait to be let go, send without end, or send one large answer."""

    def __init__(self) -> None:
        self.n_waiting, self.go = 0, threading.Event()
        self.left = threading.Event()  # the client of /endless has gone

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/wait":
            self.n_waiting += 1
            await asyncio.to_thread(self.go.wait)
            self.n_waiting -= 1
        if scope["path"] == "/endless":
            while (await self._next(receive, send))["type"] != "http.disconnect":
                pass
            self.left.set()
            return
        body = PIECE * 40 if scope["path"] == "/large" else b"done"
        await send({"type": "http.response.body", "body": body})

    async def _next(self, receive, send) -> dict[str, object]:
        received = asyncio.ensure_future(receive())
        while not received.done():
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            await asyncio.sleep(0)
        return await received


@pytest.fixture
def app() -> Iterator[Running]:
    running = Running()
    yield running
    running.go.set()


@pytest.fixture(params=["h11", "httptools"])
def places(request, app) -> Iterator[Connections]:
    found = Connections(LIMIT)
    protocol = timed_protocol(Clocks(read_s=30, write_s=0.3), found, request.param)
    with listening(
        Crowded(app, found), http=protocol, timeout_keep_alive=1, lifespan="off", log_level="critical"
    ) as url:
        found.port = int(url.rpartition(":")[2])
        yield found
        app.go.set()


@contextmanager
def connected(places: Connections, said: bytes = b"", buffer: int | None = None) -> Iterator[socket.socket]:
    with closing(socket.socket()) as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", places.port))
        connection.sendall(said)
        yield connection


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not in 30 s")


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def rest(connection: socket.socket) -> int:
    """How many bytes come until the server closes."""
    n_bytes = 0
    while piece := connection.recv(1 << 20):
        n_bytes += len(piece)
        time.sleep(0.01)
    return n_bytes


def test_silent_connections_make_room_for_others_the_oldest_first(places, caplog):
    with ExitStack() as opened, caplog.at_level(logging.WARNING, "serving.connections"):
        silent = [opened.enter_context(connected(places)) for _ in range(LIMIT)]
        until(lambda: places.n_open == LIMIT)
        assert places.are_full and not caplog.records
        for n in range(2):
            asking = opened.enter_context(connected(places, HEALTH))
            assert asking.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert is_closed(silent[n])
        assert len(caplog.records) == 1 and f"all {LIMIT} connections" in caplog.text
        for each in silent[2:]:
            each.sendall(HEALTH)
            assert each.recv(1000).startswith(b"HTTP/1.1 200 ")
    until(lambda: places.n_open == 0)


def test_beyond_what_can_be_told_so_a_connection_is_closed():
    """Where all work, eight above the limit may still be told; the next is aborted."""
    places = Connections(LIMIT)
    made = [Mock() for _ in range(LIMIT + 9)]
    for each in made:
        places.opened(each)
        places.works(each)
    assert [each.transport.abort.called for each in made] == [False] * (LIMIT + 8) + [True]


def test_a_silent_connection_ends_by_itself(app):
    places = Connections(LIMIT)
    protocol = timed_protocol(Clocks(read_s=0.3), places)
    with listening(Crowded(app, places), http=protocol, lifespan="off", log_level="critical") as url:
        places.port = int(url.rpartition(":")[2])
        with connected(places) as silent:
            assert is_closed(silent)


def test_a_connection_between_two_requests_makes_room_too_and_one_at_work_never(places, app):
    with ExitStack() as opened:
        work = opened.enter_context(connected(places, b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n"))
        until(lambda: app.n_waiting == 1)
        idle = opened.enter_context(connected(places, HEALTH))
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        for _ in range(LIMIT - 1):
            opened.enter_context(connected(places))
        assert is_closed(idle)
        app.go.set()
        until(lambda: b"done" in work.recv(1000))


def test_where_all_work_others_get_503_and_probes_their_answer(places, app):
    with ExitStack() as opened:
        for _ in range(LIMIT):
            opened.enter_context(connected(places, b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n"))
        until(lambda: app.n_waiting == LIMIT)
        with connected(places, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n") as refused:
            said = refused.recv(4000)
            assert said.startswith(b"HTTP/1.1 503 ") and b"retry-after" in said.lower() and b'"overloaded"' in said
            assert is_closed(refused)
        until(lambda: places.n_open == LIMIT)
        with connected(places, HEALTH) as probe:
            assert probe.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_reads_nothing_loses_its_stream(places, app):
    with connected(places, b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n", buffer=4096):
        assert app.left.wait(100)
        until(lambda: places.n_open == 0)


def test_a_client_that_reads_slowly_keeps_its_stream(places, app):
    """A quarter of a megabyte in every 50 ms, for four times as long as one may read nothing."""
    with connected(places, b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n", buffer=1 << 18) as slow:
        for _ in range(24):
            time.sleep(0.05)
            left = 1 << 18
            while left > 0:
                piece = slow.recv(left)
                assert piece, "it was cut off"
                left -= len(piece)
        assert not app.left.is_set()
    assert app.left.wait(100)


@pytest.mark.parametrize("more", [b"", b"connection: close\r\n"])
def test_an_answer_that_nobody_reads_ends_with_its_connection(places, more):
    with connected(places, b"GET /large HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n", buffer=4096) as connection:
        assert connection.recv(4) == b"HTTP"
        until(lambda: places.n_open == 0)
        with pytest.raises(ConnectionResetError):
            rest(connection)


def test_a_large_answer_that_is_read_slowly_comes_whole(places):
    with connected(places, b"GET /large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", buffer=1 << 18) as slow:
        assert rest(slow) > len(PIECE) * 40


def test_a_head_without_an_end_is_not_kept(places):
    """h11 says why; httptools itself would take all of it."""
    head = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(10_000))
    with connected(places, b"GET / HTTP/1.1\r\nhost: x\r\n") as connection, pytest.raises(ConnectionError):
        connection.sendall(head)


def test_the_limit_is_three_quarters_of_the_files_there_may_be():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
    try:
        assert (most_connections(None), most_connections(7)) == (300, 7)
        with pytest.raises(UserError, match=r"--max-connections 301 is over the 300 .* `ulimit -n`"):
            most_connections(301)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
