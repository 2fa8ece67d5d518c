"""The socket that a server listens on. Imports nothing heavy: a taken port is told before anything is loaded."""

import socket

from mpt.errors import UserError


def listen(host: str, port: int, cure: str = "choose another --port or --host") -> socket.socket:
    """A bound socket, which takes no connection before `listen`. port: 0 takes a free one. Raises UserError.

    cure: the next step where it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port}: {reason}; {cure}") from error
    return listener


def url_of(listener: socket.socket, *, shown: bool = False) -> str:
    """`url_at` of a bound socket."""
    return url_at(*listener.getsockname()[:2], shown=shown)


def url_at(host: str, port: int, *, shown: bool = False) -> str:
    """Where a server is reached. shown: from this machine, also where it listens on every address."""
    if shown and host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
