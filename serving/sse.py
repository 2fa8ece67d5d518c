"""Server-sent events that end honestly: `[DONE]` only if all went well, else one error event.

openai-python takes a stream that stops without `[DONE]` for a finished one, so silence is never an end.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ApiError, InternalError

log = logging.getLogger(__name__)

_DONE, _KEEP_ALIVE = b"data: [DONE]\n\n", b": keep-alive\n\n"


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class EventStream(Response):
    """Sends chunks as they come, several a write when the client is slow; stops them when the client goes away."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], *, request_id: str, keep_alive_s: float) -> None:
        self.status_code, self.background = 200, None
        self._chunks, self._request_id, self._keep_alive_s = chunks, request_id, keep_alive_s
        self.body = b""
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        ready: asyncio.Queue[bytes | None] = asyncio.Queue()
        producer = asyncio.create_task(self._produce(ready))
        watcher = asyncio.create_task(until_disconnected(receive))
        watcher.add_done_callback(lambda _: producer.cancel())
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(ready.get(), self._keep_alive_s)
                except TimeoutError:
                    piece = _KEEP_ALIVE
                pieces = []
                while piece is not None:
                    pieces.append(piece)
                    if ready.empty():
                        break
                    piece = ready.get_nowait()
                await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": piece is not None})
                if piece is None:
                    return
        finally:
            producer.cancel()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await producer

    async def _produce(self, ready: "asyncio.Queue[bytes | None]") -> None:
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    ready.put_nowait(event(chunk))
            ready.put_nowait(_DONE)
        except ApiError as error:
            ready.put_nowait(event(error.body()))
        except Exception:
            log.exception("stream of request %s failed", self._request_id)
            ready.put_nowait(event(InternalError(f"internal error; request {self._request_id}").body()))
        finally:
            ready.put_nowait(None)


async def until_disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has gone; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
