"""Budgets that last: counted by hand on a clock of the test's own, in SQLite and in a real Postgres where one is."""

import asyncio
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mpt.errors import UserError
from serving import quotas
from serving.app import make_app
from serving.auth import Keys, book_of
from serving.cluster.options import TINY, ClusterOptions
from serving.endpoints import Serving
from serving.errors import Unavailable
from serving.options import ServeOptions, without_password
from serving.ports import free_port
from serving.quotas import QuotaBook, QuotaExceeded, Quotas, Sql, Sqlite, StoreAway, charge, hold, open_store
from tests.in_process import running_endpoint

NOON = 1764244800.0  # 2025-11-27 12:00 UTC
DAY = 86400.0
POSTGRES = shutil.which("postgres") and shutil.which("initdb", path="/usr/lib/postgresql/15/bin:" + os.environ["PATH"])


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a Postgres of this test's own."""
    if not POSTGRES:
        pytest.skip("there is no Postgres here")
    folder = Path(tempfile.mkdtemp())  # pytest's own lie in folders that another user cannot enter
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port, bin_folder = free_port(), Path(os.path.realpath(POSTGRES)).parent
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "user": user, "cwd": "/"}
    made = [bin_folder / "initdb", "-D", folder / "data", "-U", "mpt", "-A", "trust", "-N"]
    subprocess.run(made, check=True, **quiet)
    started = [bin_folder / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-F"]
    process = subprocess.Popen([*started, "-c", "listen_addresses=127.0.0.1"], **quiet)
    url = f"postgresql://mpt@127.0.0.1:{port}/postgres"
    try:
        until = time.monotonic() + 100
        while True:
            try:
                with Sql(url).transaction():
                    break
            except StoreAway:
                assert time.monotonic() < until
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # without waiting for its clients
        process.wait(100)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where quotas are kept; of Postgres, emptied."""
    if request.param == "sqlite":
        return str(tmp_path / "quotas.sqlite")
    url: str = request.getfixturevalue("postgres")
    with Sql(url).transaction() as rows:
        for table in ("mpt_quota_use", "mpt_quota_holds"):
            rows.write(f"DELETE FROM {table}", {})
    return url


def used(store: Sqlite | Sql, account: str, period: str) -> int:
    with store.transaction() as rows:
        return rows.read(quotas._USED, {"account": account, "period": period})


def spend(store: Sqlite | Sql, limits: Quotas, n_tokens: int, now: float, account: str = "alice") -> None:
    with store.transaction() as rows:
        held = hold(rows, account, limits, n_tokens, 600, now)
    with store.transaction() as rows:
        charge(rows, account, held, n_tokens, now)


def test_days_and_months_begin_again_and_a_total_does_not(place: str) -> None:
    store = open_store(place)
    limits = Quotas(tokens_per_day=100, tokens_per_month=150, tokens_total=240)
    spend(store, limits, 100, NOON)
    with pytest.raises(QuotaExceeded, match=r"0 are left of your tokens_per_day of 100.*2025-11-28 00:00 UTC") as day:
        spend(store, limits, 1, NOON)
    assert day.value.headers == {"x-should-retry": "false", "retry-after": str(12 * 3600)}
    assert (day.value.status, day.value.code, day.value.type) == (429, "insufficient_quota", "insufficient_quota")
    with pytest.raises(QuotaExceeded, match="may come to 51 tokens, and 50 are left of your tokens_per_month"):
        spend(store, limits, 51, NOON + DAY)
    spend(store, limits, 50, NOON + DAY)
    with pytest.raises(QuotaExceeded, match=r"0 are left of your tokens_per_month of 150.*2025-12-01 00:00 UTC"):
        spend(store, limits, 1, NOON + 2 * DAY)
    spend(store, limits, 90, NOON + 4 * DAY)  # December
    with pytest.raises(QuotaExceeded, match=r"0 are left of your tokens_total of 240.*ask who runs the server"):
        spend(store, limits, 1, NOON + 40 * DAY)
    spend(store, limits, 5, NOON, account="bob")  # another account has its own
    again = open_store(place)  # as after a restart
    assert [used(again, "alice", each) for each in ("2025-11-27", "2025-11", "2025-12", "total")] == [100, 150, 90, 240]


def test_what_is_held_counts_until_it_is_settled_or_runs_out(place: str) -> None:
    store, limits = open_store(place), Quotas(tokens_per_day=100)
    with store.transaction() as rows:
        first = hold(rows, "alice", limits, 60, 600, NOON)
    with store.transaction() as rows:
        with pytest.raises(QuotaExceeded, match="40 are left"):
            hold(rows, "alice", limits, 41, 600, NOON)
        hold(rows, "alice", limits, 40, 600, NOON)  # of a process that dies
    for _ in range(2):  # the second finds it charged: its answer was lost on the way
        with store.transaction() as rows:
            charge(rows, "alice", first, 25, NOON)
    assert used(store, "alice", "2025-11-27") == 25
    with store.transaction() as rows:
        with pytest.raises(QuotaExceeded, match="35 are left"):
            hold(rows, "alice", limits, 36, 600, NOON + 599)
        hold(rows, "alice", limits, 75, 600, NOON + 601)


def test_two_servers_never_promise_the_same_tokens(place: str) -> None:
    """400 tokens in requests of 30: 13 fit, whoever asks, and however many ask at once."""
    open_store(place)
    books = [QuotaBook(place, 600) for _ in range(2)]

    def ask(n: int) -> bool:
        try:
            asyncio.run(books[n % 2].hold("alice", Quotas(tokens_total=400), 30))
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(40))) == 13
    for book in books:
        book.close()


def test_a_database_that_comes_later_is_waited_for() -> None:
    pytest.importorskip("sqlalchemy")
    book = QuotaBook(f"postgresql://mpt@127.0.0.1:{free_port()}/quotas", 600)
    book.open()
    with pytest.raises(quotas.Unavailable, match="cannot be read now"):
        asyncio.run(book.hold("alice", Quotas(tokens_total=1), 1))
    book.close()


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("this is no database, " * 100)
    urls = "mysql://root:secret@db/x", "postgresql://mpt:secret@db:port/x"
    for place in (*urls, str(tmp_path / "file"), "/proc/no/q"):
        with pytest.raises(UserError, match="quota") as wrong:
            open_store(place)
        assert "secret" not in str(wrong.value)
    assert without_password("postgresql://a:b@c/d?password=e&sslmode=require") == "postgresql://a@c/d?sslmode=require"
    assert without_password("postgresql://a:b/w@c/d") == "postgresql://a@c/d"  # SQLAlchemy takes `/` in one
    keys = Keys(["alice: sk-a tokens_total=5"], None)
    with pytest.raises(UserError, match="routers of several machines"):
        book_of(keys, ClusterOptions(models=TINY, replica_host="node"), several_machines=True)


async def test_quotas_that_a_key_file_gains_later_are_in_no_file_of_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would give the whole quota; the key is refused until there is a database for all."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    keys = Keys(["alice: sk-a"], None)
    book = book_of(keys, ClusterOptions(models=TINY, replica_host="node"), several_machines=True)
    with pytest.raises(Unavailable) as refused:
        await book.hold("alice", Quotas(tokens_total=5), 1)
    assert refused.value.code == "quota_store_unavailable"
    book.close()
    assert list(tmp_path.iterdir()) == []


def test_its_file_is_its_users_alone(tmp_path: Path) -> None:
    store = Sqlite(tmp_path / "state" / "quotas.sqlite")
    spend(store, Quotas(tokens_total=5), 1, NOON)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}


# -- over HTTP -----------------------------------------------------------------------------------------------------

POOR, RICH = {"authorization": "Bearer sk-poor"}, {"authorization": "Bearer sk-rich"}


@pytest.fixture
def ask(model, tokenizer, tmp_path: Path) -> Iterator[Callable[..., httpx.Response]]:
    """Ask a server whose quotas lie in `quotas.sqlite`; every call begins with the server as after a restart."""
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 24) as endpoint:

        async def send(requests: list[tuple[str, str, dict[str, str], object]]) -> list[httpx.Response]:
            options = ServeOptions(
                models={}, api_keys=("poor: sk-poor tokens_per_month=60", "sk-rich"),
                quota_store=str(tmp_path / "quotas.sqlite"),
            )  # fmt: skip
            app = make_app(Serving(options, endpoints={"base": endpoint}))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                work = [client.request(*each[:2], headers=each[2], json=each[3], timeout=100) for each in requests]
                return await asyncio.gather(*work)

        yield lambda *requests: asyncio.run(send(list(requests)))


def completion(n_tokens: int, **more: object) -> dict[str, object]:
    return {
        "model": "base",
        "prompt": "0123456789",
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


def month_of(path: Path) -> int:
    """What the key has used, once everything is written."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        with sqlite3.connect(path) as database:
            if not database.execute("SELECT COUNT(*) FROM mpt_quota_holds").fetchone()[0]:
                rows = database.execute("SELECT tokens FROM mpt_quota_use WHERE length(period) = 7").fetchall()
                return sum(row[0] for row in rows)
        time.sleep(0.01)
    raise AssertionError("a hold is left")


def test_a_quota_is_charged_what_was_served_and_outlives_the_server(ask, tmp_path: Path) -> None:
    path = tmp_path / "quotas.sqlite"
    [first] = ask(("POST", "/v1/completions", POOR, completion(20, return_token_ids=True)))
    assert first.status_code == 200 and month_of(path) == 30
    end = first.json()["choices"][0]["token_ids"][4:5]
    [stopped] = ask(("POST", "/v1/completions", POOR, completion(20, stop_token_ids=end)))
    n_more = stopped.json()["usage"]["total_tokens"]
    assert n_more < 30 and month_of(path) == 30 + n_more  # not what was held
    [refused] = ask(("POST", "/v1/chat/completions", POOR, {"model": "base", "messages": []}))
    assert refused.status_code == 400 and month_of(path) == 30 + n_more
    over, rich = ask(
        ("POST", "/v1/completions", POOR, completion(40)), ("POST", "/v1/completions", RICH, completion(40))
    )
    assert (over.status_code, over.json()["error"]["code"]) == (429, "insufficient_quota")
    assert over.headers["x-should-retry"] == "false" and rich.status_code == 200
    assert month_of(path) == 30 + n_more


def test_while_the_store_is_away_others_are_answered_and_what_was_served_is_charged(ask, tmp_path, monkeypatch) -> None:
    """Another process has the file for itself. What waits for it is a thread: `/health` is answered meanwhile."""
    path = tmp_path / "quotas.sqlite"
    ask(("POST", "/v1/completions", POOR, completion(10)))
    assert month_of(path) == 20
    monkeypatch.setattr(quotas, "_PATIENCE_S", 0.3)
    away = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    away.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(Sqlite, "__init__", lambda self, path: vars(self).update(
        shown="", _path=path, _local=threading.local()
    ))  # fmt: skip
    poor, rich, health = ask(
        ("POST", "/v1/completions", POOR, completion(10)),
        ("POST", "/v1/completions", RICH, completion(10)),
        ("GET", "/health", {}, None),
    )
    assert (poor.status_code, poor.json()["error"]["code"]) == (503, "quota_store_unavailable")
    assert poor.headers["retry-after"]
    assert rich.status_code == health.status_code == 200
    assert max(rich.elapsed, health.elapsed) < poor.elapsed
    book = QuotaBook(str(path), 600)
    book.open()
    away.execute("COMMIT")
    held = asyncio.run(book.hold("poor", Quotas(tokens_per_month=60), 10))
    away.execute("BEGIN EXCLUSIVE")
    book.settle("poor", held, 7)
    away.execute("COMMIT")
    book.close()
    assert month_of(path) == 27
