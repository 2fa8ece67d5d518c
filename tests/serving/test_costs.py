"""Whoever asks pays for what was computed for him, and for nothing else: what the gate settles when all is over."""

import asyncio
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from aiohttp import web
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpt.backends.torch_backend import TorchBackend
from serving import wire
from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.relay import _Events
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.errors import Unavailable
from serving.limits import Admission
from serving.options import ServeOptions
from tests.in_process import listening, running_endpoint
from tests.serving.cluster.test_cluster import CHUNK, FakeFleet, Replica, broken, cut, stream, whole

BODY = {"model": "base", "prompt": "ab", "ignore_eos": True}


@pytest.fixture
def settled(monkeypatch) -> list[int]:
    """What each request came to."""
    found: list[int] = []
    monkeypatch.setattr(Admission, "settle", lambda _, n_tokens: found.append(n_tokens))
    return found


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    """Its KV cache holds less than its context."""
    size = 1536 * TorchBackend(model).bytes_per_token
    with running_endpoint(model, tokenizer, context_length=2048, kv_bytes=size, max_waiting=3) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def app(serving) -> FastAPI:
    return make_app(serving)


class Narrow(H11Protocol):
    """Connections that hold little of what is not read: 2.5 MB otherwise, over loopback."""

    def connection_made(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


@pytest.fixture(scope="module")
def url(app) -> Iterator[str]:
    with listening(app, log_level="critical", ws="none", http=Narrow) as url:
        yield url


def until(condition) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def post(url: str, path: str = "/v1/completions", **body) -> httpx.Response:
    return httpx.post(url + path, json={**BODY, **body}, timeout=100)


def test_an_answer_costs_what_its_usage_says(url, settled):
    for body in ({"max_tokens": 7}, {"max_tokens": 5, "n": 2, "best_of": 3}, {"max_tokens": 4, "prompt": ["a", "bcd"]}):
        usage = post(url, **body).json()["usage"]
        assert settled.pop() == usage["total_tokens"] > 8
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 9, "stream": True}) as answer:
        answer.read()
    until(lambda: settled)
    assert settled == [2 + 9]


def test_embeddings_cost_their_prompts_also_those_that_wait_for_others(url, settled):
    body = {"model": "base", "input": ["abc"] * 3}
    assert httpx.post(f"{url}/v1/embeddings", json=body).status_code == 200
    assert settled == [9]


def test_a_search_with_beams_costs_every_step_of_every_beam(url, settled):
    """One beam in the first step, three in the others."""
    assert post(url, max_tokens=5, n=3, use_beam_search=True, temperature=0).status_code == 200
    assert settled == [2 + 1 + 3 * 4]


def test_what_is_refused_costs_nothing(url, serving, settled):
    limit = serving.endpoints["base"].engine.longest_request
    assert limit < 2048
    assert post(url, max_tokens=limit).status_code == 400  # the engine's own refusal, when it has been counted
    assert post(url, n=4, max_tokens=3).status_code == 503
    assert post(url, max_tokens=3, temperature=-1).status_code == 400
    assert settled == [0, 0, 0]


def request_of(url: str, body: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_a_stream_that_nobody_reads_costs_what_was_drawn_for_it(url, serving, settled):
    """All of it, though most never left: its client reads no byte, and leaves when it is made."""
    body = b'{"model":"base","prompt":"ab","ignore_eos":true,"stream":true,"logprobs":20,"n":3,"max_tokens":480}'
    engine = serving.endpoints["base"].engine
    n_before = engine.stats().n_steps
    with request_of(url, body):
        until(lambda: engine.stats().n_steps > n_before and not engine.stats().n_running)
        time.sleep(0.5)  # the last events are on their way to who counts them
    until(lambda: settled)
    assert settled == [2 + 3 * 480]


def test_a_client_that_leaves_pays_for_the_beams_there_were(url, serving, settled):
    body = b'{"model":"base","prompt":"ab","use_beam_search":true,"n":2,"temperature":0,"max_tokens":1500}'
    engine = serving.endpoints["base"].engine
    n_before = engine.stats().n_steps
    with request_of(url, body):
        until(lambda: engine.stats().n_steps > n_before + 10)
    until(lambda: settled)
    assert 2 + 1 + 2 * 4 < settled[0] < 2 + 1 + 2 * 1499  # what all steps cost


# -- in a cluster, without Ray -------------------------------------------------------------------------------------


async def asked(fleet: FakeFleet, **body) -> httpx.Response:
    app = make_router(fleet, ClusterOptions(models=TINY), Keys((), None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post("/v1/completions", json={"model": "m", "prompt": "12345", "max_tokens": 9, **body})


class Untold(FakeFleet):
    """Its replicas report nothing."""

    async def report(self):
        return {}


@pytest.mark.parametrize(
    ("fleet", "answers", "body", "cost"),
    [
        (FakeFleet, [whole], {}, 7),  # as it reports
        (FakeFleet, [stream], {"stream": True}, 7),
        (FakeFleet, [broken, whole], {}, 7),  # the one that was lost before its first byte costs nothing
        (FakeFleet, [broken], {}, 0),
        (Untold, [whole], {}, 2 + 9),  # five bytes are about two tokens; what was reserved stays
        (Untold, [stream], {"stream": True}, 2 + 3 + 1),  # three events and their end
        (FakeFleet, [cut], {"stream": True}, 2 + 3),  # a replica that is lost reports nothing
    ],
)
async def test_a_router_charges_what_was_reported_or_else_what_passed(fleet, answers, body, cost, settled):
    replicas = [Replica(answer) for answer in answers]
    await asked(fleet([await replica.start() for replica in replicas]), **body)
    assert settled == [cost]
    for replica in replicas:
        await replica.stop()


@pytest.mark.parametrize(
    ("fleet", "streamed", "cost"),
    [(FakeFleet, True, 7), (FakeFleet, False, 7), (Untold, True, 2 + 1), (Untold, False, 0)],
)
async def test_a_client_that_leaves_a_router_pays(fleet, streamed, cost, settled):
    """Its replica is left before it is asked what that cost: it knows when it sees that nobody is there."""
    left = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        if streamed:
            await answer.prepare(request)
            await answer.write(CHUNK)
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.005)
        left.set()
        return answer

    class Watched(fleet):
        async def report(self):
            await asyncio.wait_for(left.wait(), 10)
            return await super().report()

    replica = Replica(endless)
    router = make_router(Watched([await replica.start()]), ClusterOptions(models=TINY), Keys((), None))
    with listening(router, log_level="critical", ws="none") as url:
        body = b'{"model":"m","prompt":"12345","max_tokens":9,"stream":%s}' % (b"true" if streamed else b"false")
        with request_of(url, body) as connection:
            if streamed:
                assert await asyncio.to_thread(connection.recv, 1000)
                await asyncio.sleep(0.1)
            while not replica.n_asked:
                await asyncio.sleep(0.005)
        while not settled:
            await asyncio.sleep(0.005)
    assert settled == [cost]
    await replica.stop()


@pytest.mark.parametrize("api", [wire.OPENAI, wire.RESPONSES, wire.ANTHROPIC, wire.OLLAMA])
def test_events_are_counted_however_they_are_cut(api):
    events = [{"type": "x", "text": "data: \n\ndata: " * k} for k in range(3)]
    sent = b"".join(api.event(event) + api.keep_alive for event in events)
    sent += api.failure(api.error(Unavailable("gone")) | {"type": "error"}) + api.end
    for size in (1, 2, 5, 7, 1000):
        counter = _Events(api.mark)
        found = sum(counter.count(sent[at : at + size]) for at in range(0, len(sent), size))
        assert found == 4 + (api is wire.OPENAI)
