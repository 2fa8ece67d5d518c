"""Bodies that come compressed: gzip, deflate and zstd, none of them unpacked further than a limit."""

import zlib

import zstandard

from serving.errors import InvalidRequest, TooLarge

TAKEN = ("gzip", "deflate", "zstd")
_STEP = 1 << 20  # bytes unpacked at once
_MAX_WINDOW = 8 << 20  # bytes; what RFC 8878 asks decoders of zstd to take


def unpacked(raw: bytes, coding: str, limit: int) -> bytes:
    """What a body in one of the codings of `TAKEN` holds. Raises TooLarge over the limit, and InvalidRequest."""
    try:
        body = _zstd(raw, limit) if coding == "zstd" else _zlib(raw, coding, limit)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        message = f"the body is not in `{coding}`, its content-encoding: {error}"
        raise InvalidRequest(message, code="invalid_encoding") from None
    if len(body) > limit:
        raise TooLarge(f"the body, unpacked from `{coding}`, is over the limit of {limit} bytes; send less at once")
    return body


def _zlib(raw: bytes, coding: str, limit: int) -> bytes:
    """At most limit + 1 bytes of a gzip member, or of what goes by deflate: a zlib stream, or the bare data of one."""
    has_head = len(raw) > 1 and raw[0] & 15 == zlib.DEFLATED and int.from_bytes(raw[:2]) % 31 == 0  # RFC 1950
    bits = zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS
    stream = zlib.decompressobj(bits)
    body = stream.decompress(raw, limit + 1)
    if len(body) <= limit and not stream.eof:
        raise EOFError("it ends too soon")
    if stream.unused_data:
        raise EOFError(f"{len(stream.unused_data)} bytes follow its end")
    return body


def _zstd(raw: bytes, limit: int) -> bytes:
    """At most a step more than the limit. One that ends too soon gives what it has, which is no JSON."""
    body = bytearray()
    with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(raw, read_across_frames=True) as reader:
        while len(body) <= limit and (piece := reader.read(_STEP)):
            body += piece
    return bytes(body)
