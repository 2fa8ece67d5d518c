"""The body of an HTTP request: its kind and coding, read under a limit of bytes and of time."""

import asyncio
import codecs
from collections.abc import AsyncGenerator
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from serving.aside import aside
from serving.encodings import TAKEN, unpacked
from serving.errors import BodyTimeout, TooLarge, UnsupportedMediaType
from serving.options import HttpOptions
from serving.protocol.body import parse
from serving.request_log import note_request
from serving.wire import OLLAMA, wire_of

Body = TypeVar("Body", bound=BaseModel)

_OF_MANY_TEXTS = frozenset({"/v1/embeddings", "/api/embed"})
_SLOWEST = 64 << 10  # bytes a second, of a body that takes longer than the time for any body


async def read(request: Request, kind: type[Body], options: HttpOptions, model: str | None = None) -> Body:
    """A request's body. model: what it means where it names none. Raises as `read_body` and `parse`."""
    raw = await read_body(request, options)
    return await aside(request, parse, kind, raw, model)


async def read_body(request: Request, options: HttpOptions) -> bytes:
    """The JSON of a request's body, unpacked. Raises UnsupportedMediaType, TooLarge, BodyTimeout and InvalidRequest."""
    _check_kind(request)
    coding = _coding(request)
    limit = options.max_embeddings_body_bytes if request.scope["path"] in _OF_MANY_TEXTS else options.max_body_bytes
    too_large = TooLarge(f"the body is over the limit of {limit} bytes; send less at once")
    raw = bytearray()
    async for piece in pieces_of(request, limit, options.read_timeout_s, too_large):
        raw += piece
    body = bytes(raw) if coding is None else await asyncio.to_thread(unpacked, bytes(raw), coding, limit)
    note_request(request, body)
    request.state.body_bytes = len(body)
    return body.removeprefix(codecs.BOM_UTF8)  # RFC 8259 allows to ignore one


async def pieces_of(request: Request, limit: int, timeout_s: float, too_large: TooLarge) -> AsyncGenerator[bytes, None]:
    """A body as it comes, of at most `limit` bytes, and a second more than timeout_s for every 64 KiB of it.

    Raises `too_large`, before a byte is read if the head says so, and BodyTimeout.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    began, n_bytes = asyncio.get_running_loop().time(), 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(began + timeout_s + n_bytes / _SLOWEST):
                piece = await anext(stream, None)
        except TimeoutError:
            message = f"{n_bytes} bytes of the body came in time, and not its end; send it again, and faster"
            raise BodyTimeout(message) from None
        if piece is None:
            return
        n_bytes += len(piece)
        if n_bytes > limit:
            raise too_large
        yield piece


def _check_kind(request: Request) -> None:
    """Raises UnsupportedMediaType for anything but JSON in UTF-8, the one encoding that JSON has.

    Clients of Ollama need not say that they send JSON, as with Ollama itself. A web page must: what it can send to
    another origin without being asked is anything but JSON, and has an `Origin`.
    """
    if wire_of(request.scope["path"]) is OLLAMA and "origin" not in request.headers:
        return
    given = request.headers.get("content-type", "")
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    charsets = [part.partition("=")[2].strip('"') for part in parameters if part.startswith("charset=")]
    if kind != "application/json" or not {"utf-8", "utf8", "us-ascii"}.issuperset(charsets):
        raise UnsupportedMediaType(f"content-type is `{given[:60]}`; send `application/json`, in UTF-8")


def _coding(request: Request) -> str | None:
    """The content-encoding of a body, None for none. Raises UnsupportedMediaType."""
    given = request.headers.get("content-encoding", "").strip().lower().removeprefix("x-")
    if given in ("", "identity"):
        return None
    if given not in TAKEN:
        error = UnsupportedMediaType(f"content-encoding is `{given[:60]}`; send one of {', '.join(TAKEN)}, or none")
        error.headers = {"Accept-Encoding": ", ".join(TAKEN)}
        raise error
    return given
