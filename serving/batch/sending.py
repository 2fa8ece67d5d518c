"""Sends the requests of a batch, several at once, and tries again what was refused for the moment only.

The same over a connection to a server and into an app of this process: both are an `httpx.AsyncClient`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import orjson

from serving.batch.lines import Line, answered, new_id

# A request that is refused for the moment is sent again after each of these, or after what `Retry-After` says.
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_S = 120.0
_FOR_NOW = frozenset({429, 502, 503, 504})
_FOR_GOOD = frozenset({"request_timeout", "adapter_damaged"})  # codes of our 503 that another try would give again


class ServerLost(Exception):
    """Nobody answers any more."""


class Sender:
    """Sends lines to one server.

    gives_up: raise ServerLost where it is away for longer than all waits together; else go on trying until cancelled.
    """

    def __init__(self, client: httpx.AsyncClient, *, gives_up: bool) -> None:
        self._client, self._gives_up = client, gives_up
        self._last_answer = float("-inf")  # when any request was last answered

    async def send(self, line: Line, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """The result of a request. Raises ServerLost."""
        began, n_tries = time.monotonic(), 0
        while True:
            request_id = new_id("req_")
            response, why = await self._post(line, {**(headers or {}), "x-request-id": request_id})
            if response is not None and not _is_for_now(response):
                self._last_answer = time.monotonic()
                return answered(line, response.status_code, request_id, _body(response))
            told = _retry_after(response)
            if not (response is not None and response.status_code == 429 and told):  # a limit says when it lets in
                if n_tries >= len(_WAITS_S) and response is not None and self._last_answer > began:
                    return answered(line, response.status_code, request_id, _body(response))  # only this one fails
                if n_tries >= len(_WAITS_S) and self._gives_up:
                    raise ServerLost(why)
                n_tries += 1
            await asyncio.sleep(max(told, _WAITS_S[min(n_tries, len(_WAITS_S)) - 1]))

    async def _post(self, line: Line, headers: dict[str, str]) -> tuple[httpx.Response | None, str]:
        """The response, or none; and what is to be said of it where it is none that stays."""
        try:
            body = orjson.dumps(line.body)
            headers = {**headers, "content-type": "application/json"}
            response = await self._client.post(line.url.removeprefix("/v1"), content=body, headers=headers)
        except httpx.HTTPError as error:
            return None, f"{type(error).__name__}: {error}".rstrip(": ")
        return response, f"{response.status_code} {response.text[:200]}"


def _is_for_now(response: httpx.Response) -> bool:
    if response.status_code not in _FOR_NOW or response.headers.get("x-should-retry") == "false":
        return False
    body = _body(response)
    error = body.get("error") if isinstance(body, dict) else None
    return not (isinstance(error, dict) and error.get("code") in _FOR_GOOD)


def _retry_after(response: httpx.Response | None) -> float:
    """Seconds the server asks to wait, 0 where it does not say."""
    text = "" if response is None else response.headers.get("retry-after", "")
    return min(float(text), _LONGEST_WAIT_S) if text.isascii() and text.isdigit() else 0.0


def _body(response: httpx.Response) -> Any:
    """What it holds; its text where that is no JSON."""
    try:
        return response.json()
    except ValueError:
        return response.text


async def send_all(
    lines: Iterator[Line],
    send: Callable[[Line], Awaitable[dict[str, Any]]],
    done: Callable[[dict[str, Any]], None],
    n_at_once: int,
) -> None:
    """Send lines, so many at once, and tell `done` of each result as it comes. Raises what either raises, alone.

    lines: read in a thread, since they may be long, and many of them skipped.
    """
    reading = asyncio.Lock()  # one iterator for all workers: each takes what comes next

    async def work() -> None:
        while True:
            async with reading:
                line = await asyncio.to_thread(next, lines, None)
            if line is None:
                return
            done(await send(line))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(n_at_once):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
