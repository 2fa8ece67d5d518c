"""Who may ask: API keys, kept as hashes, compared in constant time, a file of them read again when it changes.

A key is written on a line of its own, alone or with a name for the logs and limits of its own:

    sk-0123456789abcdef
    alice: sk-abcdef0123456789 requests_per_minute=60 tokens_per_minute=100000
"""

import hashlib
import hmac
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mpt.errors import UserError
from serving.errors import Unauthorized
from serving.limits import NO_LIMITS, Limits
from serving.options import HttpOptions

log = logging.getLogger(__name__)

Headers = Mapping[bytes, str]


@dataclass(frozen=True)
class Client:
    """Who asks. name: in logs, never the key. salt: cached prompts are shared only within one."""

    name: str
    salt: str
    limits: Limits = NO_LIMITS


class Door(Protocol):
    """Lets a request in or raises Unauthorized."""

    def client(self, headers: Headers) -> Client: ...


class Keys:
    """The keys a server accepts; with none, everybody is let in as one client."""

    def __init__(
        self, lines: Iterable[str], file: Path | None, default: Limits = NO_LIMITS, n_servers: int = 1
    ) -> None:
        """default: for clients without limits of their own. n_servers: how many share what the lines say."""
        self._default, self._n_servers = default, n_servers
        self._given = _read_lines(lines, "a key given", default, n_servers)
        self._file, self._stamp = file, (0, 0)
        self._from_file: dict[bytes, Client] = {}
        self._lock = threading.Lock()
        if file is not None:
            self._refresh(first=True)

    @property
    def required(self) -> bool:
        return bool(self._given) or self._file is not None

    def client(self, headers: Headers) -> Client:
        """The client of an `Authorization: Bearer` header. Raises Unauthorized."""
        if not self.required:
            return Client("-", "", self._default)
        key = bearer(headers)
        self._refresh()
        digest, found = _digest(key), None
        for known, client in [*self._given.items(), *self._from_file.items()]:  # all of them, whichever it is
            if hmac.compare_digest(known, digest):
                found = client
        if found is None:
            raise Unauthorized("the API key is not one of this server's", code="invalid_api_key")
        return found

    def _refresh(self, first: bool = False) -> None:
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            with self._lock:
                if (stat.st_mtime_ns, stat.st_size) == self._stamp:
                    return
                lines = self._file.read_text(encoding="utf-8").splitlines()
                self._stamp = (stat.st_mtime_ns, stat.st_size)
                self._from_file = _read_lines(lines, f"`{self._file}`", self._default, self._n_servers)
        except (OSError, UnicodeDecodeError, UserError) as error:
            if first and isinstance(error, UserError):
                raise
            if first:
                raise UserError(f"the key file `{self._file}` cannot be read: {error}") from error
            log.warning("keys stay as they were: %s", error)  # being replaced, or wrong: those read last stay valid
            return
        if first and not self._from_file:
            raise UserError(f"the key file `{self._file}` holds no key; write one per line")


def keys_of(options: HttpOptions) -> Keys:
    """The keys a server was told to take. Raises UserError."""
    limits = Limits(options.requests_per_minute, options.tokens_per_minute)
    return Keys(options.api_keys, options.api_key_file, limits)


def bearer(headers: Headers) -> str:
    """The key of an `Authorization: Bearer KEY` header, or of Anthropic's `x-api-key`. Raises Unauthorized."""
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    key = key.strip()
    if not key and (key := headers.get(b"x-api-key", "").strip()):
        return key
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("no API key was sent; send `Authorization: Bearer KEY`", code="missing_api_key")
    return key


def fingerprint(key: str) -> str:
    """How a key without a name is called, and the salt of its cache: the first 8 hex digits of its sha256."""
    return _digest(key).hex()[:8]


def _read_lines(lines: Iterable[str], where: str, default: Limits, n_servers: int) -> dict[bytes, Client]:
    """Clients by the hash of their key. Raises UserError, which never shows a key."""
    clients: dict[bytes, Client] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name = words.pop(0)[:-1] if words[0].endswith(":") and len(words) > 1 else None
        key, *options = words
        numbers: dict[str, int] = {}
        for option in options:
            what, equals, value = option.partition("=")
            if what not in ("requests_per_minute", "tokens_per_minute") or not equals or not value.isdigit():
                raise UserError(
                    f"line {number} of {where} is not `[NAME:] KEY [requests_per_minute=N] [tokens_per_minute=N]`"
                )
            if 0 < int(value) < n_servers:
                raise UserError(
                    f"line {number} of {where}: {what} is {value}, and each of {n_servers} routers lets through its "
                    f"share; give at least {n_servers}, or `router_replicas: 1`"
                )
            numbers[what] = int(value) // n_servers
        limits = Limits(
            numbers.get("requests_per_minute", default.requests_per_minute),
            numbers.get("tokens_per_minute", default.tokens_per_minute),
        )
        clients[_digest(key)] = Client(name or fingerprint(key), fingerprint(key), limits)
    return clients


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
