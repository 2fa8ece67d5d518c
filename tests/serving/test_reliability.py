"""What must not happen under stress: a request lost, one that pays for another, memory that grows, clocks."""

import ast
import asyncio
import gc
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch

import serving as serving_package
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.engine import Engine
from mpt.engine.errors import EngineFailed, EngineGone
from mpt.engine.request import Delta, Sampling
from mpt.errors import DeviceLost, EngineStopped
from mpt.generation import generate
from serving import quotas, request_log
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import listening, running_endpoint, running_engine


@pytest.fixture
def engine(model, tokenizer) -> Iterator[Engine]:
    options = {"context_length": 1024, "kv_bytes": 1 << 24, "max_running": 8}
    with running_engine(TorchBackend(model), tokenizer, **options) as engine:
        yield engine


async def tokens_of(engine: Engine, prompt: list[int], n: int, **sampling) -> list[int]:
    asked = Sampling(max_tokens=n, temperature=0, ignore_eos=True, **sampling)
    events = engine.generate(prompt, asked, request_id="x")
    return [token async for event in events if isinstance(event, Delta) for token in event.token_ids]


class OutOfMemory:
    """A device that has no memory for a certain row."""

    def __init__(self, backend: TorchBackend, monkeypatch, where: str, marked: int) -> None:
        self.n_times = 0
        original = getattr(backend, where)

        def refuse(*arguments):
            if where == "forward":
                if any(marked in item.tokens for item in arguments[0]):
                    self.n_times += 1
                    raise torch.OutOfMemoryError("CUDA out of memory")
            elif arguments[-1] > 256 and (arguments[0] is None) == (marked == 0):
                self.n_times += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*arguments)

        monkeypatch.setattr(backend, where, refuse)


@pytest.mark.parametrize(("where", "marked"), [("forward", 200), ("reserve", 0), ("reserve", 1)])
async def test_out_of_memory_costs_the_request_that_caused_it(engine, model, monkeypatch, where, marked):
    """In the step, when a row is made (0), when it grows (1): the others answer as if alone."""
    lack = OutOfMemory(engine._backend, monkeypatch, where, marked)
    prompt = [marked or 9] * (310 if (where, marked) == ("reserve", 0) else 250)
    others = [tokens_of(engine, [k, k + 1], 40) for k in range(5, 11)]
    *answers, error = await asyncio.gather(*others, tokens_of(engine, prompt, 60), return_exceptions=True)
    assert lack.n_times > 0 and isinstance(error, EngineFailed)
    assert answers == [generate(model, [k, k + 1], 40) for k in range(5, 11)]
    assert engine.failed is None and await tokens_of(engine, [3], 5) == generate(model, [3], 5)
    stats = engine.stats()
    assert (stats.n_running, stats.n_waiting, stats.kv_used_bytes) == (0, 0, 0)


FATAL = {
    "forward": (DeviceLost("a process of the model has failed"), "a process of the model has failed"),
    "forward, of CUDA": (torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile"), "triggered$"),
    "forward, of Triton": (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "illegal"),
    "forward, unheard of": (RuntimeError("the driver has a bad day"), "cannot read one token any more: the driver has"),
    "reserve": (torch.AcceleratorError("CUDA error: unspecified launch failure"), "unspecified launch failure"),
    "draw": (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "ECC"),
}


@pytest.mark.parametrize("where", FATAL)
async def test_a_lost_device_ends_everything_at_once(engine, monkeypatch, where):
    """Nobody waits for an engine that cannot compute any more, wherever it first shows."""
    error, words = FATAL[where]
    running = [asyncio.create_task(tokens_of(engine, [k], 900)) for k in range(3)]
    await asyncio.sleep(0.1)

    def lost(*_):
        raise error

    if where == "draw":  # where results are first waited for
        monkeypatch.setattr("mpt.engine.drawing.greedy", lost)
    else:
        monkeypatch.setattr(engine._backend, where.partition(",")[0], lost)
    ended = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 10)
    assert [type(each) for each in ended] == [EngineGone] * 3 and len({str(each) for each in ended}) == 1
    assert not engine.ready
    with pytest.raises(DeviceLost, match=words):
        raise engine.failed
    with pytest.raises(EngineGone):
        await tokens_of(engine, [1], 1)


async def test_a_lost_device_that_an_adapter_met_stops_an_idle_engine(engine):
    await tokens_of(engine, [1], 1)
    engine.stop_if_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert engine.failed is None and engine.ready
    engine.stop_if_lost(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    engine._thread.join(100)
    assert isinstance(engine.failed, DeviceLost)


async def test_a_bug_that_ends_the_engine_is_no_lost_device(engine, monkeypatch):
    def bug():
        raise KeyError("x")

    monkeypatch.setattr(engine._scheduler, "admit", bug)
    with pytest.raises(EngineGone):
        await asyncio.wait_for(tokens_of(engine, [1], 1), 10)
    assert type(engine.failed) is EngineStopped


@pytest.fixture(scope="module")
def url(model, tokenizer) -> Iterator[str]:
    options = {"context_length": 2048, "kv_bytes": 1 << 25, "max_waiting": 1000}
    with running_endpoint(model, tokenizer, **options) as endpoint:
        app = make_app(Serving(ServeOptions(models={}), endpoints={"base": endpoint}))
        with listening(app, log_level="critical", ws="none") as url:
            yield url


async def stream_text(client: httpx.AsyncClient, url: str, seed: int, n: int) -> str:
    body = {"model": "base", "prompt": "ab", "max_tokens": n, "stream": True, "ignore_eos": True, "seed": seed}
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        assert line == "" or line == "data: [DONE]"
    return text


async def test_hundreds_of_streams_at_once_are_all_whole(url):
    """Three hundred, in the order of a lottery; the same seed gives the same text whoever else is there."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=100, limits=limits) as client:
        seeds = [k % 10 for k in range(300)]
        random.Random(0).shuffle(seeds)
        texts = await asyncio.gather(*(stream_text(client, url, seed, 12) for seed in seeds))
        alone = {seed: await stream_text(client, url, seed, 12) for seed in range(10)}
    assert texts == [alone[seed] for seed in seeds]


async def test_a_slow_reader_holds_up_nobody_and_loses_nothing(url):
    """It reads nothing for a second of an answer much larger than the socket's buffers, then all of it."""
    body = json.dumps({
        "model": "base", "prompt": "ab", "max_tokens": 1500, "stream": True, "ignore_eos": True, "logprobs": 20
    }).encode()  # fmt: skip
    host, port = url.removeprefix("http://").split(":")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    slow.sendall(head.encode() + b"\r\nconnection: close\r\n\r\n" + body)
    async with httpx.AsyncClient(timeout=100) as client:
        started = time.monotonic()
        while time.monotonic() - started < 1:
            assert len(await stream_text(client, url, 1, 20)) > 0
    slow.settimeout(30)

    def rest() -> bytes:
        received = b""
        while piece := slow.recv(1 << 16):
            received += piece
        return received

    received = await asyncio.to_thread(rest)
    assert received.count(b"data: {") >= 1500 and b"data: [DONE]" in received


async def test_memory_stays_what_it_is(url):
    """After a warm-up, two hundred requests, a third of them abandoned: no growth beyond what a hundred make."""

    async def storm(n: int, seed: int) -> None:
        rng = random.Random(seed)
        async with httpx.AsyncClient(timeout=100) as client:
            for _ in range(n):
                body = {"model": "base", "prompt": "x" * rng.randint(1, 900), "max_tokens": 10, "stream": True}
                async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        if rng.random() < 0.05:
                            break

    process = psutil.Process()
    await storm(300, 0)  # the cache of prompts reaches its budget
    gc.collect()
    before = process.memory_info().rss
    await storm(200, 1)
    gc.collect()
    assert process.memory_info().rss - before < 24 << 20


def test_only_the_date_of_an_answer_looks_at_the_wall_clock():
    """Deadlines, rates and drains are on the monotonic clock, so a clock that jumps changes nothing.

    Budgets of days and months begin by the calendar, and what clients ask is written down with its date.
    """
    found, by_the_calendar = [], {Path(quotas.__file__), Path(request_log.__file__)}
    for path in sorted({*Path(serving_package.__file__).parent.glob("*.py")} - by_the_calendar):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.time":
                found.append((path.name, node.lineno))
            assert not (isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")), path
    lines = {(Path(serving_package.__file__).parent / name).read_text().splitlines()[n - 1] for name, n in found}
    assert all("created" in line for line in lines), lines
