"""`mpt serve`: the app on uvicorn with its engines in the same process, from loading to a clean exit.

HTTP answers at once (`/ready` says 503) while the models load in a thread; with `--load on-request` the server is ready
when it has seen that each can be loaded (`lifecycle.py`). On SIGTERM, SIGINT or SIGHUP new requests get 503, running
ones may finish for `drain_s` seconds, then streams end with an error event and the process leaves with 0, even while a
model is loading. A second signal leaves at once. When an engine has stopped for good the process drains in the same
way, and leaves with the exit code of `EngineStopped`: whoever runs it starts it again, and no client meets a server
that only fails.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.responses import RedirectResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.app import make_app
from serving.batch.service import BatchService
from serving.connections import Clocks, Connections, Crowded, most_connections, timed_protocol
from serving.endpoints import Serving
from serving.heads import Hosts
from serving.listening import url_of
from serving.logs import process_age_s, set_up_logging
from serving.options import ServeOptions, is_loopback

log = logging.getLogger(__name__)

_LAST_BYTES_S = 5.0  # for clients that read slowly, when the engines have ended every answer
_LOOK_S = 0.2  # between two looks at whether the engines still run


def serve(options: ServeOptions, listener: socket.socket) -> None:
    """Serve on a bound socket until told to stop. Raises MPTError if a model cannot be loaded."""
    set_up_logging()
    gc.freeze()  # what has been imported stays: with it a collection, after an unload, stops everybody for 0.5 s
    connections = Connections(most_connections(options.max_connections))
    serving = Serving(options, loading=set(options.models), connections=connections)
    is_open = is_loopback(options.host) and not (options.api_keys or options.api_key_file)
    app = make_app(serving, hosts=Hosts(options.allowed_hosts) if is_open else None)
    if options.demo:
        _mount_demos(app, url_of(listener))
    server = _Server(serving, app)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure


class _Server(uvicorn.Server):
    """uvicorn, but signals drain before they stop, and a model that cannot be loaded stops it."""

    def __init__(self, serving: Serving, app: FastAPI) -> None:
        options = serving.options
        clocks = Clocks(options.read_timeout_s, options.write_timeout_s)
        config = uvicorn.Config(
            Crowded(app, serving.connections),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `X-Forwarded-For` is read in the gate, which takes addresses only
            timeout_graceful_shutdown=1,  # every answer has been sent by then
            h11_max_incomplete_event_size=64 << 10,
            http=timed_protocol(clocks, serving.connections),  # of h11, which bounds what it buffers of a head
            timeout_keep_alive=math.ceil(options.idle_timeout_s),
            ws="none",  # there is nothing to upgrade to, and the gate sees HTTP only
        )
        super().__init__(config)
        self._serving = serving
        self._batches: BatchService | None = app.state.batches
        self.failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:
            self._tasks.append(asyncio.create_task(self._load(sockets[0])))

    async def _load(self, listener: socket.socket) -> None:
        serving = self._serving
        try:
            if serving.options.load == "on-request":
                await serving.lifecycle.check_all()
                log.info("%d models, each loaded when it is first asked for", len(serving.options.models))
                serving.loading.clear()
            at_start = [each for each in serving.options.models if each in serving.loading]
            async for name in serving.lifecycle.load_at_start(at_start):
                serving.loading.discard(name)
                self._tasks.append(asyncio.create_task(serving.endpoints[name].grammars.prepare()))
        except BaseException as error:
            self.failure = error
            if isinstance(error, Exception):
                await self._drain()  # models that were loaded before may be answering
            self.should_exit = True
            return
        auth = "with keys" if serving.options.api_keys or serving.options.api_key_file else "without keys"
        if (batches := self._batches) is not None:
            batches.resume()
        log.info("ready after %.1f s on %s, %s", process_age_s(), url_of(listener), auth)
        shown = url_of(listener, shown=True)
        demos = f"; the demos are at {shown}/demo/" if serving.options.demo else ""
        log.info("to look at it and try it, open %s/ in a browser%s", shown, demos)
        self._tasks.append(asyncio.create_task(self._unload_idle()))
        await self._leave_when_one_stops()

    async def _unload_idle(self) -> None:
        while not self._serving.draining:
            await self._serving.lifecycle.unload_idle()
            await asyncio.sleep(_LOOK_S)

    async def _leave_when_one_stops(self) -> None:
        while not self._serving.draining:
            if (lost := self._serving.lifecycle.lost) is not None:
                self.failure = lost
                await self._drain()
                return
            for name, endpoint in self._serving.endpoints.items():
                if (why := endpoint.engine.failed) is not None:
                    self.failure = type(why)(f"`{name}` has stopped: {why}; start the server again")
                    await self._drain()
                    return
            await asyncio.sleep(_LOOK_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._serving.draining:
            self.should_exit = self.force_exit = True
            return
        self._serving.draining = True
        asyncio.get_event_loop().call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        self._serving.leave()
        engines = [endpoint.engine for endpoint in self._serving.endpoints.values()]
        if self._batches is not None:
            await self._batches.stop()
        log.info("shutting down; running requests may take %.0f s more", self._serving.options.drain_s)
        await asyncio.gather(*(engine.drain(self._serving.options.drain_s) for engine in engines))
        await self._send_the_rest()
        if (self._serving.loading or self._serving.lifecycle.n_opening) and self.failure is None:
            _leave_at_once()
        self.should_exit = True

    async def _send_the_rest(self) -> None:
        """Wait until the last answers are sent; then close what would hold up the process and gets no answer.

        That is whoever is still sending a request, and the open pages of the demos, which listen as long as they live.
        """
        await asyncio.sleep(0.05)  # the last events are on their way to the sockets
        until = time.monotonic() + _LAST_BYTES_S
        while any(map(_is_answering, self.server_state.connections)) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            if isinstance(connection, H11Protocol):
                connection.transport.close()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """A terminal that is closed (SIGHUP) ends the server as the other signals do, unless it is to be ignored."""
        with super().capture_signals():
            before = signal.getsignal(signal.SIGHUP)
            if before is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)


def _is_answering(connection: object) -> bool:
    """Whether an answer to a whole request is on its way over a connection of uvicorn's."""
    if not isinstance(connection, H11Protocol) or connection.cycle is None:
        return False
    cycle = connection.cycle
    if cycle.more_body or cycle.scope["path"].startswith("/demo/"):
        return False
    return not cycle.response_complete or connection.transport.get_write_buffer_size() > 0


def _leave_at_once() -> None:
    """End the process with 0, though a thread loads a model: nothing interrupts it, and it has written nothing."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _mount_demos(app: FastAPI, url: str) -> None:
    """The Spaces under /demo, asking this server over HTTP as anybody would."""
    from demos import server as demos  # the command line's stage may compose others

    app.add_route("/demo", lambda _: RedirectResponse("/demo/"), include_in_schema=False)
    demos.mount(app, url)
