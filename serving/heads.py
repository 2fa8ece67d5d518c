"""What the head of a request may say of whom it is for and from: once, and of a server without keys, its own name.

A page in a browser can have the name of its own site lead to 127.0.0.1 (DNS rebinding). Its requests are then of one
origin with the answers, which it may read; only the `Host` header tells where it thinks it is.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from serving.errors import ApiError, Forbidden, InvalidRequest
from serving.options import is_loopback

# Of two, a proxy and this server could mean different ones.
_ONCE = (b"authorization", b"x-api-key", b"host", b"content-type", b"content-encoding")
_OF_THIS_MACHINE = frozenset({"host.docker.internal", "host.containers.internal"})  # from inside a container


@dataclass(frozen=True)
class Hosts:
    """The names by which a server may be asked: its machine's own, and others that it was told."""

    others: Collection[str] = ()

    def has(self, host: str) -> bool:
        """Whether a `Host` header is one of them. Its port does not matter."""
        found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+?)\.?)(?::\d*)?", host.strip().lower())
        name = (found[1] or found[2]) if found else ""
        return (
            is_loopback(name)
            or name.endswith(".localhost")  # never in the public DNS: RFC 6761
            or name in _OF_THIS_MACHINE
            or name in {other.lower() for other in self.others}
        )


def refusal_of(headers: Iterable[tuple[bytes, bytes]], hosts: Hosts | None) -> ApiError | None:
    """Why a head is refused, None where it is not. hosts: None for a server that may have any name."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    for name in _ONCE:
        if len(values.get(name, ())) > 1:
            message = f"there are {len(values[name])} headers `{name.decode()}`; send one"
            return InvalidRequest(message, code="duplicate_header")
    given = values.get(b"host")
    if hosts is not None and given and not hosts.has(given[0].decode("latin-1")):  # browsers always send one
        return Forbidden(
            "the `Host` header is no name of this machine, and this server has no keys; ask for it as `localhost`, or "
            "start it with --allowed-host NAME (`allowed_hosts` in a cluster)",
            code="host_not_allowed",
        )
    return None
