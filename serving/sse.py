"""Streams of events that end honestly: as their API ends them only if all went well, else with one error event.

openai-python takes a stream that stops without `[DONE]` for a finished one, so silence is never an end.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ApiError, InternalError
from serving.wire import OPENAI, Wire

log = logging.getLogger(__name__)

Result = TypeVar("Result")

UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not hold events back


class EventStream(Response):
    """Sends chunks as they come, a comment where there are none for a while; stops them when the client goes away."""

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        *,
        request_id: str,
        keep_alive_s: float,
        wire: Wire = OPENAI,
    ) -> None:
        self.status_code, self.background = 200, None
        self._chunks, self._request_id, self._keep_alive_s, self._wire = chunks, request_id, keep_alive_s, wire
        self.body = b""
        self.init_headers({"content-type": wire.media_type, **UNBUFFERED})
        del self.headers["content-length"]
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            self._sent_at = time.monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer = asyncio.create_task(self._write(write, scope.setdefault("state", {})))
        beside = [asyncio.create_task(until_disconnected(receive))]
        if self._wire.keep_alive:
            beside.append(asyncio.create_task(self._keep_alive(write)))
        beside[0].add_done_callback(lambda _: writer.cancel())
        await finish(writer, beside)
        if writer.cancelled():
            raise ClientDisconnect
        writer.result()

    async def _write(self, write: Callable[..., Awaitable[None]], state: dict[str, Any]) -> None:
        """Write all events and how they end, which the access log is told in `state`."""
        wire = self._wire
        end = wire.end
        async with contextlib.aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    await write(wire.event(chunk))
            except ApiError as error:
                state["error"] = error.code
                end = wire.failure(wire.error(error))
            except Exception:
                log.exception("stream of request %s failed", self._request_id)
                state["error"] = InternalError.code
                end = wire.failure(wire.error(InternalError(f"internal error; request {self._request_id}")))
        await write(end, more=False)

    async def _keep_alive(self, write: Callable[..., Awaitable[None]]) -> None:
        self._sent_at = time.monotonic()
        while True:
            quiet_s = time.monotonic() - self._sent_at
            if quiet_s >= self._keep_alive_s:
                await write(self._wire.keep_alive)
            else:
                await asyncio.sleep(self._keep_alive_s - quiet_s)


async def finish(task: asyncio.Task[None], beside: Collection[asyncio.Task[None]]) -> None:
    """Wait until a task has ended, however it did; on leaving, neither it nor those beside it run any more."""
    try:
        await asyncio.wait({task})
    finally:
        for each in (task, *beside):
            if not each.cancelling():  # a second time would cut short what the first one made it do
                each.cancel()
        await asyncio.gather(task, *beside, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is cancelled when the client goes away; then raises ClientDisconnect.

    The body must have been read before.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await task


async def until_disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has gone; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
