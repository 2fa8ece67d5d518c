"""Who may ask: API keys, kept as hashes, compared in constant time, a file of them read again when it changes.

A key is written on a line of its own, alone or with a name for the logs and limits of its own:

    sk-0123456789abcdef
    alice: sk-abcdef0123456789 requests_per_minute=60 tokens_per_minute=100000
    bob: sk-9876543210fedcba models=mpt-7b,mpt-7b-chat:mine tokens_per_day=1000000 tokens_per_month=20000000
"""

import hashlib
import hmac
import logging
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from mpt.errors import UserError
from mpt.options import MODEL_NAME, split_name
from serving.errors import Unauthorized
from serving.limits import NO_LIMITS, Limits
from serving.options import HttpOptions
from serving.quotas import NO_QUOTAS, QuotaBook, Quotas

log = logging.getLogger(__name__)

Headers = Mapping[bytes, str]
FORM = (
    "`[NAME:] KEY [models=NAME,NAME:ADAPTER] [requests_per_minute=N] [tokens_per_minute=N] [tokens_per_day=N] "
    "[tokens_per_month=N] [tokens_total=N]`"
)
_MODEL = re.compile(f"{MODEL_NAME.pattern}(:{MODEL_NAME.pattern})?")
_OF_A_MINUTE = frozenset(each.name for each in fields(Limits))
_NUMBERS = frozenset(each.name for kind in (Limits, Quotas) for each in fields(kind))


@dataclass(frozen=True)
class Client:
    """Who asks. name: in logs, never the key. salt: cached prompts are shared only within one.

    models: what this client may use, an adapter as `model:adapter`; None is everything.
    """

    name: str
    salt: str
    limits: Limits = NO_LIMITS
    models: frozenset[str] | None = None
    quotas: Quotas = NO_QUOTAS


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

    @property
    def have_quotas(self) -> bool:
        return any(client.quotas for client in (*self._given.values(), *self._from_file.values()))

    def note_unknown(self, served: Collection[str]) -> None:
        """Warn of keys for models that are not served: nothing else would tell of a typing error."""
        for client in (*self._given.values(), *self._from_file.values()):
            missing = sorted(each for each in client.models or () if split_name(each)[0] not in served)
            if missing:
                shown = ", ".join(f"`{each}`" for each in missing)
                log.warning("the key of %s names %s, and served are: %s", client.name, shown, ", ".join(served))

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
                lines = self._file.read_text(encoding="utf-8-sig").splitlines()
                self._stamp = (stat.st_mtime_ns, stat.st_size)
                self._from_file = _read_lines(lines, f"`{self._file}`", self._default, self._n_servers)
        except (OSError, UnicodeDecodeError, UserError) as error:
            if first and isinstance(error, UserError):
                raise
            if first:
                why = getattr(error, "strerror", None) or error
                raise UserError(f"the key file `{self._file}` cannot be read: {why}") from error
            log.warning("keys stay as they were: %s", error)  # being replaced, or wrong: those read last stay valid
            return
        if first and not self._from_file:
            raise UserError(f"the key file `{self._file}` holds no key; write one per line")


def keys_of(options: HttpOptions) -> Keys:
    """The keys a server was told to take. Raises UserError."""
    limits = Limits(options.requests_per_minute, options.tokens_per_minute)
    return Keys(options.api_keys, options.api_key_file, limits)


def book_of(keys: Keys, options: HttpOptions, *, several_machines: bool = False) -> QuotaBook:
    """The quotas of these keys; their database is opened if there are any, or if it is named. Raises UserError."""
    book = QuotaBook(options.quota_store, options.request_timeout_s, several_machines=several_machines)
    if keys.have_quotas or options.quota_store is not None:
        book.open()
    return book


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
        try:
            clients[_digest(key)] = _client(name, key, options, default, n_servers)
        except ValueError:
            raise UserError(f"line {number} of {where} is not {FORM}") from None
        except UserError as error:
            raise UserError(f"line {number} of {where}: {error}") from None
    return clients


def _client(name: str | None, key: str, options: list[str], default: Limits, n_servers: int) -> Client:
    """Raises ValueError for what is no option, UserError for one with a value out of range.

    Each of n_servers lets through its share of a minute's limits; quotas are counted together.
    """
    models: frozenset[str] | None = None
    numbers: dict[str, int] = {}
    for option in options:
        what, _, value = option.partition("=")
        if what in numbers or (what == "models" and models is not None):
            raise UserError(f"`{what}` is there twice")
        if what == "models":
            models = frozenset(value.split(","))
            if wrong := [each for each in models if not _MODEL.fullmatch(each)]:
                raise UserError(f"`models` names `{wrong[0][:64]}`, which is no model; write models=NAME,NAME:ADAPTER")
        elif what in _NUMBERS and value.isdecimal() and int(value):
            numbers[what] = int(value)
            if what in _OF_A_MINUTE:
                numbers[what] = _share(what, int(value), n_servers)
        else:
            raise ValueError(what)
    limits = {each.name: numbers.pop(each.name, getattr(default, each.name)) for each in fields(Limits)}
    return Client(name or fingerprint(key), fingerprint(key), Limits(**limits), models, Quotas(**numbers))


def _share(what: str, value: int, n_servers: int) -> int:
    if value < n_servers:
        raise UserError(
            f"{what} is {value}, and each of {n_servers} routers lets through its share; give at least {n_servers}, or "
            "`router_replicas: 1`"
        )
    return value // n_servers


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
