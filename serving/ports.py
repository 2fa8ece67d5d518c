"""A port for what is started in a moment."""

import contextlib
import random
import socket

_PORTS = 10_000, 30_000  # Ray gives its routers those from 30,000; Linux gives outgoing connections those from 32,768


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on.

    The kernel's own choice lies among those that any outgoing connection may take before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
