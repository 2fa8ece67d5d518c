"""The request log: off by default, loud where it is on, redacted, rotated, and its user's alone."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mpt.errors import UserError
from serving import request_log
from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.redaction import redacted, redacted_json
from serving.request_log import RequestLog
from tests.in_process import running_endpoint
from tests.serving.cluster.test_cluster import FakeFleet, Replica, whole

# Numbers of the ranges that regulators keep for fiction and tests: FCC 555-01xx, Ofcom 020 7946 0xxx, BNetzA 030 23125
# xxx; cards as their makers publish them for tests.
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"  # RFC 7519's kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to alice@example.com, please", "write to [email], please"),
        ("jürgen.o'neil+x@mail.example.co.uk!", "[email]!"),
        ("call +1 (202) 555-0143 or 202-555-0143", "call [phone] or [phone]"),
        ("(202) 555-0143, 202.555.0143", "[phone], [phone]"),
        ("+44 20 7946 0958 and 020 7946 0958", "[phone] and [phone]"),
        ("030/23125-000 oder 0049 30 23125000", "[phone] oder [phone]"),
        ("my number is 15551234567890", "my number is [number]"),
        ("card 4111 1111 1111 1111 and 378282246310005", "card [card] and [card]"),
        ("key sk-abcdefgh12345678 and hf_ABCDEFGH12345678", "key [key] and [key]"),
        ("ghp_0123456789abcdefABCDEF0123456789abcd AKIAIOSFODNN7EXAMPLE", "[key] [key]"),
        ("Authorization: Bearer abc.def-123_456", "Authorization: [key] [key]"),
        ("use Bearer abc.def-123_456 there", "use Bearer [key] there"),
        (f"a token like {JWT}.", "a token like [key]."),
        ("password=hunter22, OPENAI_API_KEY='0123abcd'", "password=[key], OPENAI_API_KEY='[key]'"),
        ("postgres://mpt:hunter2@db/x", "postgres://[key]@db/x"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nend", "[key]\nend"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE cut off", "[key]"),
    ],
)
def test_what_identifies_people_or_opens_doors_is_taken_out(text, expected):
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "In 2024, 1,234,567 people read 3.14159265 and 0.0001", "from 10:30 to 11:45 on 2026-11-27", "a@b and @home",
        "the risk-averse, asked-for task at 192.168.0.1:8000", "version 1.2.3-rc4 of 12 34",
        "tokens: 17, pass the salt",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text):
    assert redacted(text) == text


def test_a_long_text_is_read_in_time_and_cut_without_half_an_address():
    """Each of these made a pattern without bounds take minutes."""
    for text in ("a" * 200_000, "1 " * 100_000, "a@a." * 50_000, "eyJ" * 70_000, "+1(" * 70_000, "token:" * 40_000):
        redacted(text)
    at = 1000 - len("alice@ex")
    cut = redacted_json("x " * (at // 2) + "alice@example.com" + " y" * 5000, 1000)
    assert "alice" not in cut and cut.endswith("characters more]") and len(cut) < 1100


def test_a_bodys_names_and_token_ids_are_no_way_around():
    body = {
        "model": "m",
        "prompt": [[12, 13], [14]],
        "metadata": {"bob@example.org": 1, "api_key": "opensesame"},
    }
    found = redacted_json({**body, "echo": True, "stop": ["a"], "logit_bias": {"5": 1.5}}, 100)
    assert found == {
        "model": "m", "prompt": ["[2 token ids]", "[1 token ids]"], "metadata": {"[email]": 1, "api_key": "[key]"},
        "echo": True, "stop": ["a"], "logit_bias": {"5": 1.5},
    }  # fmt: skip


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=256, kv_bytes=1 << 22) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


async def ask(app, prompt: str = "alice@example.com", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = {"model": "base", "prompt": f"I am {prompt}", "max_tokens": 1}
        return await client.post("/v1/completions", json=body, headers={"authorization": "Bearer sk-1", **headers})


async def test_mpt_serve_writes_requests_where_it_is_told_to_and_nowhere_else(serving, tmp_path, caplog):
    path = tmp_path / "requests.jsonl"
    assert make_app(serving).state.request_log is None and not list(tmp_path.iterdir())
    options = ServeOptions(models={}, api_keys=("alice: sk-1",), log_requests=path)
    app = make_app(Serving(options, endpoints=serving.endpoints))
    assert "WHAT CLIENTS ASK IS WRITTEN" in caplog.text
    assert (await ask(app, **{"x-request-id": "r-1"})).status_code == 200
    await ask(app, authorization="Bearer sk-2")  # who has no key is not read
    app.state.request_log.flush()
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", line.pop("time"))
    body = {"model": "base", "prompt": "I am [email]", "max_tokens": 1}
    assert line.pop("n_bytes") > 0
    assert line == {"request_id": "r-1", "client": "alice", "path": "/v1/completions", "body": body}
    assert "alice@" not in caplog.text and path.stat().st_mode & 0o777 == 0o600


async def test_a_router_writes_them_and_its_replicas_do_not(tmp_path):
    replica = Replica(whole)
    fleet = FakeFleet([await replica.start()])
    options = ClusterOptions(models=TINY, log_requests=tmp_path / "requests.jsonl")
    app = make_router(fleet, options, Keys(["sk-1"], None))
    await ask(app, "+1 202 555 0143")
    app.state.request_log.flush()
    [line] = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert json.loads(line)["body"]["prompt"] == "I am [phone]"
    await replica.stop()


class Noted:
    """A request as the log sees it."""

    def __init__(self, number: int) -> None:
        self.state = type("State", (), {"request_id": f"r-{number}", "client": "c"})()
        self.scope = {"path": "/v1/completions"}


def test_two_processes_share_a_file_that_is_rotated(tmp_path, monkeypatch):
    """Each opens it anew, as another process would. Nothing is lost but what is older than all files hold."""
    monkeypatch.setattr(request_log, "MAX_FILE_BYTES", 2000)
    monkeypatch.setattr(request_log, "N_OLD_FILES", 40)
    path = tmp_path / "requests.jsonl"
    path.write_text("")
    path.chmod(0o644)
    logs = [RequestLog(path), RequestLog(path)]

    def write(which: int) -> None:
        for n in range(100):
            logs[which].note(Noted(100 * which + n), b'{"prompt": "a"}')

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.flush()
    files = [each for each in tmp_path.iterdir() if not each.name.endswith(".lock")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(each["request_id"] for each in lines) == sorted(f"r-{n}" for n in range(200))
    assert len(files) > 5 and all(file.stat().st_size <= 2000 for file in files)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_old_files_go_and_a_long_text_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_FILE_BYTES", 20_000)
    monkeypatch.setattr(request_log, "N_OLD_FILES", 2)
    log = RequestLog(tmp_path / "r.jsonl")
    for n in range(6):
        log.note(Noted(n), json.dumps({"prompt": "x " * 10_000}).encode())
    log.flush()
    assert {each.name for each in tmp_path.iterdir()} == {"r.jsonl", "r.jsonl.1", "r.jsonl.2", "r.jsonl.lock"}
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line)["body"]["prompt"].count("x") == 16_384 // 2


def test_what_is_no_json_or_too_long_is_named_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "_LONGEST_BODY", 100)
    log = RequestLog(tmp_path / "r.jsonl")
    for body in (b"alice@example.com", b'"' + b"x" * 200 + b'"', b"[" * 90 + b"]" * 10):
        log.note(Noted(0), body)
    log.flush()
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["n_bytes"], line["body"]) for line in lines] == [(17, None), (202, None), (100, None)]


def test_a_disk_that_is_full_or_slow_loses_lines_and_no_requests(tmp_path, monkeypatch, caplog):
    log = RequestLog(tmp_path / "r.jsonl")
    released = threading.Event()

    def full(line: bytes) -> None:
        released.wait(100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "_write", full)
    monkeypatch.setattr(request_log, "_MOST_WAITING", 1000)
    began = time.monotonic()
    for n in range(100):
        log.note(Noted(n), b'{"a": 1}' * 10)
    assert time.monotonic() - began < 15  # nobody waits for the disk
    released.set()
    log.flush()
    assert "requests are missing in the request log: more is asked" in caplog.text


def test_a_full_disk_is_told_and_what_comes_later_is_written(tmp_path, monkeypatch, caplog):
    log = RequestLog(tmp_path / "r.jsonl")

    def full(line: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as away:
        away.setattr(log, "_write", full)
        log.note(Noted(0), b'{"a": 1}')
        log.flush()
    assert "requests are missing in the request log" in caplog.text and "No space left" in caplog.text
    log.note(Noted(1), b'{"a": 1}')
    log.flush()
    assert [json.loads(line)["request_id"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["r-1"]


def test_a_file_that_cannot_be_written_is_told_at_start(tmp_path):
    with pytest.raises(UserError, match=r"`/proc/none/r.jsonl` \(log_requests\) cannot be written: No such file"):
        RequestLog(Path("/proc/none/r.jsonl"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"):
        RequestLog(tmp_path / "link")
