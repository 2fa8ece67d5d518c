"""What Ray's config for HAProxy gets before HAProxy reads it: where Ray 2.60 has no setting for it.

Each line that is changed must be there; another version of Ray with another template is refused, by what is missing.
Nothing here starts anything (`haproxy.py` beside this file does).
"""

import json
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpt.errors import MachineRefused

# The head of a request must be whole by then, and so much of its body as HAProxy keeps; a silent connection is closed.
REQUEST_HEAD_S = 10
# Connections that one address may hold, of all there are: silent ones keep no other address out.
SHARE_OF_ONE_ADDRESS = 0.75
QUEUE_S = 30
RETRY_AFTER_S = 2
# What is no id of a request in `serving/gate.py` gets a new one from Ray, which would send back any other. Of two, Ray
# takes one and the gate the other. A byte that is no UTF-8 makes Ray answer 500.
REQUEST_ID = "^[A-Za-z0-9._-]{1,64}$"
# Headers by which Ray lets a client choose a replica, a time-out, or that nobody sees it leave.
RAYS_OWN = "^(serve[-_]multiplexed[-_]model[-_]id|x[-_]session[-_]id|x-request-(timeout-seconds|disconnect-disabled))$"
# A connection between client and server takes two files; HAProxy's own (listeners, checks, logs) are below this.
OWN_FILES = 200
# 16 KiB of buffer each way: 640 MB if all of them are busy at once.
MOST_CONNECTIONS = 20_000


@dataclass(frozen=True)
class Amendments:
    """What the config is changed to. Paths are absolute."""

    folder: Path  # where the error files are
    max_connections: int
    router_certificate: Path | None = None  # routers must prove that they hold its key
    metrics_host: str = "127.0.0.1"  # who may read HAProxy's own metrics: an address to listen on, or `*`


# The errors that HAProxy makes itself: status, reason, type and code as `serving.errors` has them, message.
ERRORS = (
    (400, "Bad Request", "invalid_request_error", "invalid_http", "this is no HTTP request that can be read"),
    (408, "Request Timeout", "invalid_request_error", "body_timeout", "the body did not come in time"),
    (500, "Internal Server Error", "server_error", "internal_error", "the proxy failed; ask again"),
    (502, "Bad Gateway", "server_error", "router_lost", "the router that was answering has gone; ask again"),
    (503, "Service Unavailable", "server_error", "no_router", "no router is there at the moment; ask again"),
    (504, "Gateway Timeout", "server_error", "router_timeout", "the router did not answer in time; ask again"),
)
_MAY_BE_ASKED_AGAIN = (502, 503, 504)


def max_connections(n_files: int | None = None) -> int:
    """How many connections HAProxy may hold, by the files that a process may open. Raises MachineRefused.

    n_files: the limit, by default this process's hard one, up to which HAProxy raises its own.
    """
    if n_files is None:
        n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    unlimited = n_files == resource.RLIM_INFINITY or n_files < 0
    found = MOST_CONNECTIONS if unlimited else min(MOST_CONNECTIONS, (n_files - OWN_FILES) // 2)
    if found < 100:
        raise MachineRefused(
            f"a process may open {n_files} files here, which is too few for HAProxy: each connection takes two, and "
            f"HAProxy itself {OWN_FILES}; raise the limit (`ulimit -Hn`) to 1024 or more"
        )
    return found


def error_body(kind: str, code: str, message: str) -> str:
    """OpenAI's error object, as `serving.errors.ApiError.body` writes it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}, separators=(",", ":"))


def write_error_files(folder: Path) -> None:
    """The answers of ERRORS as whole HTTP responses, which is how HAProxy reads them."""
    for status, reason, kind, code, message in ERRORS:
        body = error_body(kind, code, message)
        head = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", "Cache-Control: no-cache"]
        head += [f"Content-Length: {len(body)}", "Connection: close"]
        if status in _MAY_BE_ASKED_AGAIN:
            head.append(f"Retry-After: {RETRY_AFTER_S}")
        text = "\r\n".join([*head, "", body])
        (folder / f"{status}.http").write_text(text, encoding="ascii", newline="")


def amended(config: str, to: Amendments) -> str:
    """Ray's config with ours in it. Raises MachineRefused when it has not the lines that this version knows."""
    config = _replaced(config, r"^( +stats socket \S+ mode) 666 ", r"\1 600 ")
    config = _replaced(config, r"^( +maxconn) \d+$", rf"\1 {to.max_connections}", count=1)
    config = _replaced(config, r"^defaults\n    mode http$", "\\g<0>\n" + _defaults(to), count=1)
    # With `abortonclose`, HAProxy 2.8.25 that splices misses about one client in four that goes away while its answer
    # is still being made, and spins on the connection with a whole core until the answer is there (2026-11-21).
    config = _replaced(config, r"^ +option splice-re(quest|sponse)\n", "", count=2)
    config = _replaced(config, r"^( +errorfile (50[234])) \S+$", rf"\1 {to.folder}/\2.http", count=3)
    config = _replaced(config, r"^(frontend prometheus\n +bind )(?:\*|\[::\])?:", rf"\g<1>{to.metrics_host}:")
    config = _replaced(config, r"^(listen stats\n +bind )\*:", r"\g<1>127.0.0.1:")
    config = _replaced(config, r"^frontend http_frontend\n +bind .*$", "\\g<0>\n" + _frontend(to))
    nobody = _return(503, *ERRORS[4][2:], retry=True)
    if re.search(r"^ +use_backend ", config, re.MULTILINE):  # else there is no application yet, or none any more
        nobody = _return(404, "invalid_request_error", "unknown_url", "no application is at this URL", retry=False)
    plain = r"^(backend default_backend\n +)http-request return status 404 .*$"
    return _replaced(config, plain, lambda line: line[1] + nobody)


def _replaced(config: str, pattern: str, by: str | Callable[[re.Match[str]], str], count: int = 1) -> str:
    found, n = re.subn(pattern, by, config, flags=re.MULTILINE)
    if n != count:
        raise MachineRefused(
            f"Ray's config for HAProxy is not the one that is known here: {n} instead of {count} places of "
            f"`{pattern}`; install the version of Ray in constraints.txt"
        )
    return found


def _defaults(to: Amendments) -> str:
    lines = [
        f"timeout http-request {REQUEST_HEAD_S}s",
        f"timeout queue {QUEUE_S}s",
        "option http-buffer-request",  # what is in a buffer (16 KiB) can be sent to another router when the first dies
        "option http-ignore-probes",  # who has said nothing gets no 408, which it could take for a later answer
        "option tcpka",  # the kernel notices peers that went away without a word
        *(f"errorfile {status} {to.folder}/{status}.http" for status in (400, 408, 500)),
    ]
    if to.router_certificate is not None:
        lines.append(f"default-server ssl verify required ca-file {to.router_certificate}")
    return "\n".join(f"    {line}" for line in lines)


def _frontend(to: Amendments) -> str:
    lines = (
        "stick-table type ipv6 size 100k expire 5m store conn_cur",
        "tcp-request connection track-sc0 src",
        f"tcp-request connection reject if {{ sc_conn_cur(0) gt {int(SHARE_OF_ONE_ADDRESS * to.max_connections)} }}",
        f"http-request del-header x-request-id if !{{ req.fhdr(x-request-id) -m reg {REQUEST_ID} }}",
        "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
        f"http-request del-header {RAYS_OWN} -m reg",
    )
    return "\n".join(f"    {line}" for line in lines)


def _return(status: int, kind: str, code: str, message: str, retry: bool) -> str:
    body = error_body(kind, code, message).replace('"', '\\"')
    after = f" hdr Retry-After {RETRY_AFTER_S}" if retry else ""
    return f'http-request return status {status} content-type application/json string "{body}"{after}'
