"""Budgets of tokens that last: a day's, a month's, or all there will be, of each named key, kept in a database.

Unlike the limits of a minute (`limits.py`) they survive a restart, and hold for all servers and routers that share the
database: a file of SQLite by default, else Postgres through SQLAlchemy (the extra `postgres`). An account is the name
of a key, so a new key of the same name goes on with the budget of the old one.

A request first holds what it may come to, and is charged what it has come to when it ends. A hold of a process that
died runs out by itself. Where the database is away, keys with a budget get 503 and others notice nothing; what has been
served meanwhile is charged when it is back. All of it runs in threads of its own, never on the event loop.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from mpt.errors import UserError
from mpt.extras import install
from serving.errors import RateLimited, Unavailable
from serving.options import without_password

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # how long a request waits for the database
_AGAIN_S = 1.0  # between two tries to charge what has been served
_FORGOTTEN_S = 86400.0  # a hold that ran out so long ago is deleted
_HOLDERS = 4  # requests that ask at the same time

_TABLES = (
    "CREATE TABLE IF NOT EXISTS mpt_quota_use (account VARCHAR(128) NOT NULL, period VARCHAR(16) NOT NULL, "
    "tokens BIGINT NOT NULL, PRIMARY KEY (account, period))",
    "CREATE TABLE IF NOT EXISTS mpt_quota_holds (id VARCHAR(32) PRIMARY KEY, account VARCHAR(128) NOT NULL, "
    "tokens BIGINT NOT NULL, expires_at DOUBLE PRECISION NOT NULL)",
)
# Adds tokens to an account's period. With 0 it locks the account's row in Postgres, so that two routers do not both
# find room for their requests; SQLite lets one write at a time anyway.
_ADD = (
    "INSERT INTO mpt_quota_use (account, period, tokens) VALUES (:account, :period, :tokens) "
    "ON CONFLICT (account, period) DO UPDATE SET tokens = mpt_quota_use.tokens + excluded.tokens"
)
_USED = "SELECT tokens FROM mpt_quota_use WHERE account = :account AND period = :period"
_HELD = "SELECT COALESCE(SUM(tokens), 0) FROM mpt_quota_holds WHERE account = :account AND expires_at > :now"
_HOLD = "INSERT INTO mpt_quota_holds (id, account, tokens, expires_at) VALUES (:id, :account, :tokens, :expires_at)"
_LET_GO = "DELETE FROM mpt_quota_holds WHERE id = :id"
_FORGET = "DELETE FROM mpt_quota_holds WHERE expires_at < :before"


@dataclass(frozen=True)
class Quotas:
    """What a client may use, prompts and answers; None is without limit. Days and months are those of UTC."""

    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    tokens_total: int | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) is not None for each in fields(self))


NO_QUOTAS = Quotas()


class QuotaExceeded(RateLimited):
    """A client has used up a budget that no minute brings back."""

    type, code = "insufficient_quota", "insufficient_quota"


class StoreAway(Exception):
    """The database does not answer."""


class Rows(Protocol):
    """A transaction."""

    def read(self, statement: str, values: Mapping[str, Any]) -> int:
        """The one number that a statement selects, 0 where there is none."""
        ...

    def write(self, statement: str, values: Mapping[str, Any]) -> int:
        """How many rows a statement has changed."""
        ...


# -- the two databases ---------------------------------------------------------------------------------------------


class _SqliteRows:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def read(self, statement: str, values: Mapping[str, Any]) -> int:
        row = self._connection.execute(statement, dict(values)).fetchone()
        return 0 if row is None else int(row[0])

    def write(self, statement: str, values: Mapping[str, Any]) -> int:
        return self._connection.execute(statement, dict(values)).rowcount


class Sqlite:
    """A file of this machine. Raises UserError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.shown = f"`{path}`"
        self._path, self._local = path, threading.local()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # its log and index get the same mode
            with self.transaction() as rows:
                for table in _TABLES:
                    rows.write(table, {})
        except (OSError, StoreAway) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"quotas cannot be kept in `{path}`: {why}; give another file with --quota-store"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[Rows]:
        """One that is alone in writing. Raises StoreAway."""
        try:
            if not hasattr(self._local, "connection"):
                connection = sqlite3.connect(self._path, timeout=_PATIENCE_S, isolation_level=None)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                self._local.connection = connection
            connection = self._local.connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield _SqliteRows(connection)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreAway(str(error)) from error


class Sql:
    """A database of Postgres by its URL. Raises UserError for a URL that is none, or without SQLAlchemy.

    One that is away now is waited for: it may start beside this server.
    """

    def __init__(self, url: str) -> None:
        try:
            import sqlalchemy
            from sqlalchemy.exc import ArgumentError, SQLAlchemyError
        except ModuleNotFoundError as error:
            raise UserError(f"a quota store in Postgres needs `{error.name}`; {install('postgres')}") from error
        try:
            parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
            waits = {"connect_timeout": 3, "options": "-c statement_timeout=4000 -c lock_timeout=4000"}
            self._engine = sqlalchemy.create_engine(
                parsed, connect_args=waits, pool_pre_ping=True, pool_size=_HOLDERS + 1
            )
        except (ArgumentError, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--quota-store {without_password(url)} cannot be used: {error}") from None
        self.shown = f"`{parsed.render_as_string(hide_password=True)}`"
        self._text, self._error = sqlalchemy.text, SQLAlchemyError
        self._has_tables = False
        try:
            with self.transaction():
                pass
        except StoreAway as error:
            log.warning("%s does not answer yet, and until it does keys with quotas get 503: %s", self.shown, error)

    @contextmanager
    def transaction(self) -> Iterator[Rows]:
        """Raises StoreAway."""
        try:
            with self._engine.begin() as connection:
                rows = _SqlRows(connection, self._text)
                if not self._has_tables:
                    rows.write("SELECT pg_advisory_xact_lock(20261127)", {})  # two that create a table would meet
                    for table in _TABLES:
                        rows.write(table, {})
                yield rows
            self._has_tables = True
        except self._error as error:
            raise StoreAway(str(error).splitlines()[0]) from error


class _SqlRows:
    def __init__(self, connection: Any, text: Callable[[str], Any]) -> None:
        self._connection, self._text = connection, text

    def read(self, statement: str, values: Mapping[str, Any]) -> int:
        row = self._connection.execute(self._text(statement), dict(values)).first()
        return 0 if row is None else int(row[0])

    def write(self, statement: str, values: Mapping[str, Any]) -> int:
        return int(self._connection.execute(self._text(statement), dict(values)).rowcount)


def default_file() -> Path:
    """Where quotas are kept if nobody says: the user's state folder (XDG)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mpt" / "quotas.sqlite"


def open_store(place: str | None) -> Sqlite | Sql:
    """The database at a path, or at a `postgresql://` URL; the default file without either. Raises UserError."""
    if place is None or "://" not in place:
        return Sqlite(default_file() if place is None else Path(place).expanduser())
    if place.split("://")[0] not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UserError(f"--quota-store {without_password(place)} is neither a file nor a postgresql:// URL")
    return Sql(place.replace("postgres://", "postgresql://", 1))


# -- holding and charging ------------------------------------------------------------------------------------------


def hold(rows: Rows, account: str, quotas: Quotas, n_tokens: int, seconds: float, now: float) -> str:
    """Hold tokens of an account for so long, and say by which id. Raises QuotaExceeded."""
    rows.write(_ADD, {"account": account, "period": "total", "tokens": 0})
    held = rows.read(_HELD, {"account": account, "now": now})
    for name, period, begins_again in _periods(now):
        limit: int | None = getattr(quotas, name)
        if limit is None:
            continue
        used = rows.read(_USED, {"account": account, "period": period}) + held
        if used + n_tokens > limit:
            raise _exceeded(name, limit, used, n_tokens, begins_again, now)
    row = {"id": uuid.uuid4().hex, "account": account, "tokens": n_tokens, "expires_at": now + seconds}
    rows.write(_HOLD, row)
    return str(row["id"])


def charge(rows: Rows, account: str, hold_id: str, n_tokens: int, now: float) -> None:
    """Let go of a hold and add what its request has come to; nothing if that was done before."""
    rows.write(_ADD, {"account": account, "period": "total", "tokens": 0})
    if not rows.write(_LET_GO, {"id": hold_id}):
        return
    for _, period, _ in _periods(now):
        rows.write(_ADD, {"account": account, "period": period, "tokens": n_tokens})
    rows.write(_FORGET, {"before": now - _FORGOTTEN_S})


def _periods(now: float) -> list[tuple[str, str, datetime | None]]:
    """Of each quota: its name, the period that now lies in, and when the next one begins."""
    at = datetime.fromtimestamp(now, UTC)
    day = at.replace(hour=0, minute=0, second=0, microsecond=0)
    month = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    return [
        ("tokens_per_day", f"{at:%Y-%m-%d}", day + timedelta(days=1)),
        ("tokens_per_month", f"{at:%Y-%m}", month),
        ("tokens_total", "total", None),
    ]


def _exceeded(
    name: str, limit: int, used: int, n_tokens: int, begins_again: datetime | None, now: float
) -> QuotaExceeded:
    headers = {"x-should-retry": "false"}
    then = "ask who runs the server for more"
    if begins_again is not None:
        headers["retry-after"] = str(max(1, round(begins_again.timestamp() - now)))
        then = f"it begins again at {begins_again:%Y-%m-%d %H:%M} UTC"
    return QuotaExceeded(
        f"the request may come to {n_tokens} tokens, and {max(0, limit - used)} are left of your {name} of {limit}; "
        f"lower max_tokens, or {then}",
        name,
        headers,
    )


class Account:
    """One request's part of its client's budgets; without any, it does nothing."""

    def __init__(self, book: "QuotaBook", name: str, quotas: Quotas) -> None:
        self._book, self._name, self._quotas = book, name, quotas
        self._hold_id: str | None = None

    async def hold(self, n_tokens: int) -> None:
        """Hold what the request may come to. Raises QuotaExceeded, and Unavailable where the database is away."""
        if self._quotas:
            self._hold_id = await self._book.hold(self._name, self._quotas, n_tokens)

    def settle(self, n_tokens: int) -> None:
        """Charge what it has come to, soon."""
        if self._hold_id is not None:
            self._book.settle(self._name, self._hold_id, n_tokens)
            self._hold_id = None


class QuotaBook:
    """The accounts of all clients of one process. longest_s: what a request may take, for which it holds tokens.

    several_machines: other processes count for the same accounts elsewhere, so a file is refused.
    """

    def __init__(
        self,
        place: str | None,
        longest_s: float,
        clock: Callable[[], float] = time.time,
        *,
        several_machines: bool = False,
    ) -> None:
        self._place, self._longest_s, self._clock = place, longest_s + 60, clock
        self._several_machines = several_machines
        self._store: Sqlite | Sql | None = None
        self._lock = threading.Lock()
        self._holders = ThreadPoolExecutor(_HOLDERS, "quota holds")
        self._unsettled: queue.SimpleQueue[tuple[str, str, int] | None] = queue.SimpleQueue()
        self._settler: threading.Thread | None = None

    def open(self) -> Sqlite | Sql:
        """The database, opened when it is first needed: the key file may name a quota later. Raises UserError."""
        with self._lock:
            if self._store is None:
                if self._several_machines and (self._place is None or "://" not in self._place):
                    raise UserError(
                        "keys have quotas, and routers of several machines cannot share a file: give `quota_store` the "
                        "postgresql:// URL of a database that all of them reach"
                    )
                self._store = open_store(self._place)
                log.info("quotas are kept in %s", self._store.shown)
                self._settler = threading.Thread(target=self._settle_all, name="quota charges", daemon=True)
                self._settler.start()
                atexit.register(self.close)
            return self._store

    async def hold(self, account: str, quotas: Quotas, n_tokens: int) -> str:
        """As `hold`, in a thread. Raises QuotaExceeded, and Unavailable where the database is away."""
        asked = self._holders.submit(self._hold, account, quotas, n_tokens)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.shield(asyncio.wrap_future(asked))
        except (StoreAway, UserError, TimeoutError) as error:
            asked.add_done_callback(lambda done: self._let_go(account, done))
            log.warning("the quota store does not answer: %s", error)
            message = "the quotas of this key cannot be read now; try again soon"
            raise Unavailable(message, code="quota_store_unavailable") from None
        except asyncio.CancelledError:
            asked.add_done_callback(lambda done: self._let_go(account, done))
            raise

    def settle(self, account: str, hold_id: str, n_tokens: int) -> None:
        """Charge in a thread of its own, again and again until it is written."""
        self._unsettled.put((account, hold_id, n_tokens))

    def close(self) -> None:
        """Write what is not written yet, for a few seconds at most."""
        self._holders.shutdown(wait=False, cancel_futures=True)
        if self._settler is not None and self._settler.is_alive():
            self._unsettled.put(None)
            self._settler.join(_PATIENCE_S)
            if self._settler.is_alive():
                log.error("the quota store is away: what was served last is not charged")

    def _hold(self, account: str, quotas: Quotas, n_tokens: int) -> str:
        with self.open().transaction() as rows:
            return hold(rows, account, quotas, n_tokens, self._longest_s, self._clock())

    def _let_go(self, account: str, done: "Future[str]") -> None:
        """Of a hold that came when nobody waited any more."""
        if not done.cancelled() and done.exception() is None:
            self.settle(account, done.result(), 0)

    def _settle_all(self) -> None:
        while (row := self._unsettled.get()) is not None:
            account, hold_id, n_tokens = row
            while True:
                try:
                    with self.open().transaction() as rows:
                        charge(rows, account, hold_id, n_tokens, self._clock())
                    break
                except StoreAway as error:
                    log.warning(
                        "%d tokens of %s are charged when the quota store is back: %s", n_tokens, account, error
                    )
                    time.sleep(_AGAIN_S)
