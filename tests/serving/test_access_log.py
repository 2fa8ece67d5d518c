"""What the access log and the metrics say of each request, however it ended."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator

import httpx
import pytest
from aiohttp import web
from fastapi import FastAPI

from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import Kept, make_router
from serving.endpoints import Serving
from serving.gate import peer_of
from serving.options import ServeOptions
from tests.in_process import listening, running_endpoint
from tests.serving.cluster.test_cluster import CHUNK, FakeFleet, Replica, broken, cut, stream

BODY = {"model": "base", "prompt": "ab", "ignore_eos": True, "max_tokens": 2000}
KEY = {"authorization": "Bearer sk-1"}


@pytest.fixture
def lines() -> Iterator[list[dict]]:
    """What the access log has written."""
    found: list[dict] = []
    log = logging.getLogger("serving.access")
    handler = logging.Handler()
    handler.emit = lambda record: found.append(json.loads(record.getMessage()))
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    options = ServeOptions(models={}, api_keys=("sk-1",), log_format="json", request_timeout_s=0.5)
    with running_endpoint(model, tokenizer, context_length=2048, kv_bytes=1 << 25) as endpoint:
        yield Serving(options, endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def app(serving) -> FastAPI:
    return make_app(serving)


def router(fleet: FakeFleet, kept: Kept | None = None) -> FastAPI:
    return make_router(fleet, ClusterOptions(models=TINY, log_format="json"), Keys(["sk-1"], None), kept=kept)


async def ask(app: FastAPI, path: str = "/v1/completions", headers: dict | None = KEY, **body) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, json={**BODY, **body}, headers=headers, timeout=100)


def cut_short(app: FastAPI, error: str) -> float:
    """Answers that had begun and ended in an error."""
    labels = {"path": "/v1/completions", "error": error}
    return app.state.metrics.registry.get_sample_value("mpt_stream_errors_total", labels) or 0


async def test_a_deadline_that_passes_is_told_by_name(app, serving, monkeypatch, lines):
    backend = serving.endpoints["base"].engine._backend
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda work: time.sleep(0.001) or forward(work))  # 2 s for 2,000 tokens
    for streamed, status in ((False, 503), (True, 200)):
        answer = await ask(app, stream=streamed)
        assert answer.status_code == status and "request_timeout" in answer.text
    for line, status in zip(lines, (503, 200), strict=True):
        assert (line["status"], line["error"], line["finish_reason"]) == (status, "request_timeout", "timeout")
        assert 2 < line["charged_tokens"] < 2002
    assert cut_short(app, "request_timeout") == 1  # the other one had not begun


def test_a_client_that_leaves_is_told_apart(app, lines):
    before = cut_short(app, "client_disconnected")
    asked = {"json": {**BODY, "stream": True}, "headers": KEY}
    with (
        listening(app, log_level="critical", ws="none") as url,
        httpx.stream("POST", f"{url}/v1/completions", **asked) as answer,
    ):
        next(answer.iter_lines())
    assert (lines[0]["status"], lines[0]["error"], lines[0]["finish_reason"]) == (200, "client_disconnected", "abort")
    assert cut_short(app, "client_disconnected") == before + 1


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (cut, 200, {"error": "replica_lost", "finish_reason": "error", "replica": "r1"}),
        (broken, 503, {"error": "replica_lost", "replica": "r3"}),
        (stream, 200, {"finish_reason": "stop", "prompt_tokens": 3, "charged_tokens": 7}),
    ],
)
async def test_a_router_tells_how_an_answer_ended(answer, status, told, lines):
    replica = Replica(answer)
    await ask(router(FakeFleet([await replica.start()])), model="m", stream=True)
    assert lines[0]["status"] == status and told.items() <= lines[0].items()
    assert ("error" in lines[0]) == ("error" in told)
    await replica.stop()


async def test_a_router_tells_what_its_replica_knows_of_the_end(lines):
    """The replica's error event passes through as any other; its report says that it was one."""

    class Late(FakeFleet):
        async def report(self):
            return {"finish_reason": "timeout", "error": "request_timeout", "charged_tokens": 5}

    replica = Replica(stream)
    await ask(router(Late([await replica.start()])), model="m", stream=True)
    assert (lines[0]["error"], lines[0]["finish_reason"], lines[0]["status"]) == ("request_timeout", "timeout", 200)
    await replica.stop()


async def test_answers_that_a_leaving_router_ends_are_told(lines):
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(CHUNK)
        await asyncio.sleep(60)
        return answer

    replica, kept = Replica(endless), Kept()
    app = router(FakeFleet([await replica.start()]), kept)
    asked = asyncio.create_task(ask(app, model="m", stream=True))
    while not replica.n_asked:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    await kept.traffic.drain(0.0)
    assert "shutting_down" in (await asked).text and lines[0]["error"] == "shutting_down"
    await replica.stop()


@pytest.mark.parametrize("make", [lambda app: app, lambda _: router(FakeFleet([]))])
async def test_a_refused_request_is_told_with_its_path_and_peer(app, make, lines):
    for path, shown in (
        ("/v1/completions", "/v1/completions"),
        ("/nowhere", "/nowhere"),
        ("/a%20b%0Astatus=200%22", "/a%20b%0Astatus%3D200%22"),
        ("/" + "x" * 300, "/" + "x" * 99),
    ):
        lines.clear()
        assert (await ask(make(app), path, headers=None)).status_code == 401
        told = {"status": 401, "error": "missing_api_key", "path": shown, "peer": "127.0.0.1", "client": "-"}
        assert told.items() <= lines[0].items()


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", [b"203.0.113.9"], "192.0.2.7"),  # from elsewhere it is what anybody likes to say
        ("127.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("::1", [b"198.51.100.1, 203.0.113.9"], "203.0.113.9"),  # the proxy adds its own at the end
        ("127.0.0.1", [b"198.51.100.1", b"203.0.113.9"], "203.0.113.9"),
        ("127.0.0.1", [b"203.0.113.9 status=200"], "127.0.0.1"),
        ("127.0.0.1", [b"\xe9"], "127.0.0.1"),
        ("127.0.0.1", [], "127.0.0.1"),
    ],
)
def test_only_a_proxy_on_this_machine_says_who_asks(peer, forwarded, expected):
    headers = [(b"x-forwarded-for", value) for value in forwarded]
    assert peer_of({"client": (peer, 1), "headers": headers}) == expected
    assert peer_of({"client": None, "headers": headers}) == "-"


async def test_an_alert_sees_the_first_replica_that_is_lost():
    """As a change: the series is there before."""
    kept = Kept()
    router(FakeFleet([]), kept)
    assert 'mpt_replica_lost_total{model_name="m"} 0.0' in kept.exposition()
