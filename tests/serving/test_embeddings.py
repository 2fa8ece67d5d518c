"""Embeddings: the mean of the last hidden states of one plain forward, whatever shares the step."""

import asyncio
import base64
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from mpt.backends.capabilities import ONNX
from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.mpt.engine.test_engine import greedy


@pytest.fixture
def serving(model, tokenizer, request) -> Iterator[Serving]:
    options = {"kv_bytes": 1 << 24, "prefill_chunk": 16, "max_running": 4} | getattr(request, "param", {})
    engine = Engine(TorchBackend(model), tokenizer, context_length=2048, **options)
    engine.start()
    endpoint = Endpoint("base", "base", engine, tokenizer, "none", None, "Apache-2.0", 260, 2048)
    logits_only = TorchBackend(model)
    logits_only.capabilities = ONNX  # as onnxruntime: logits and nothing else
    without = Engine(logits_only, tokenizer, context_length=2048, kv_bytes=1 << 20)
    other = Endpoint("other", "other", without, tokenizer, "none", None, "Apache-2.0", 260, 2048)
    yield Serving(ServeOptions(models={}), endpoints={"base": endpoint, "other": other})
    engine.close()


async def ask(serving: Serving, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        return await client.post("/v1/embeddings", json={"model": "base", **body})


def direct(model, ids: list[int]) -> list[float]:
    with torch.no_grad():
        mean = model.transformer(torch.tensor([ids])).last_hidden_state[0].double().mean(0)
    return (mean / mean.norm()).tolist()


TEXTS = ["Hello", "a longer text than one chunk of sixteen tokens, twice over", "é😀", "Hello", "x"]


async def test_texts_and_ids_become_the_mean_of_one_forwards_states(serving, model, tokenizer):
    answer = (await ask(serving, input=TEXTS)).json()
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3, 4] and answer["object"] == "list"
    for entry, tokens in zip(answer["data"], ids, strict=True):
        assert entry["embedding"] == pytest.approx(direct(model, tokens), abs=1e-5)
        assert np.linalg.norm(entry["embedding"]) == pytest.approx(1, abs=1e-6)
    n_tokens = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    again = (await ask(serving, input=ids, encoding_format="base64")).json()  # prompts it has seen are read anew
    for entry, first in zip(again["data"], answer["data"], strict=True):
        assert np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") == pytest.approx(first["embedding"], abs=1e-5)
    one = (await ask(serving, input=ids[0])).json()["data"]
    assert len(one) == 1 and one[0]["embedding"] == pytest.approx(direct(model, ids[0]), abs=1e-5)


@pytest.mark.parametrize("serving", [{"max_waiting": 80}], indirect=True)
async def test_more_texts_than_the_queue_holds_are_embedded_in_turn(serving, model):
    """LangChain and LlamaIndex send hundreds of texts at once; the queue here holds 80 sequences."""
    ids = [[5 + k % 200, 6] for k in range(150)]
    answer = (await ask(serving, input=ids)).json()
    assert [entry["index"] for entry in answer["data"]] == list(range(150))
    for k in (0, 63, 64, 149):
        assert answer["data"][k]["embedding"] == pytest.approx(direct(model, ids[k]), abs=1e-5)


@pytest.mark.parametrize("serving", [{"kv_bytes": 1 << 20}], indirect=True)
async def test_an_embedding_that_was_sent_back_is_read_from_its_beginning(serving, model, monkeypatch):
    """A chat of 250 tokens grows out of its block while a long text is read beside it, and takes its memory."""
    engine = serving.endpoints["base"].engine
    ids = [5 + k % 200 for k in range(700)]
    assert engine._backend.bytes_per_token == 1024  # so that there is room for 1,024 tokens
    forward, both_are_here = engine._backend.forward, threading.Event()

    def wait_for_both(work):
        assert both_are_here.wait(100)
        return forward(work)

    async def chat() -> None:
        async for _ in engine.generate([7] * 250, greedy(100), request_id="chat"):
            pass

    while not engine.ready:
        await asyncio.sleep(0.001)
    monkeypatch.setattr(engine._backend, "forward", wait_for_both)
    talking = asyncio.create_task(chat())
    while not engine.stats().n_running:
        await asyncio.sleep(0.001)
    asking = asyncio.create_task(ask(serving, input=ids))
    while not engine.stats().n_waiting:
        await asyncio.sleep(0.001)
    both_are_here.set()
    answer = (await asking).json()
    await talking
    assert answer["data"][0]["embedding"] == pytest.approx(direct(model, ids), abs=1e-5)
    assert engine.stats().n_preemptions > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [260]}, "input"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a" * 3000}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": "other"}, "model"),
        ({}, "input"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_name(serving, body, param):
    answer = await ask(serving, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_the_openai_client_reads_both_encodings(serving, model, tokenizer):
    transport = httpx.ASGITransport(make_app(serving))
    async with httpx.AsyncClient(transport=transport) as http:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http)
        expected = direct(model, tokenizer.encode("Hello"))
        for asked in ({}, {"encoding_format": "float"}):
            answer = await client.embeddings.create(model="base", input="Hello", **asked)
            assert answer.data[0].embedding == pytest.approx(expected, abs=1e-5)
            assert answer.usage.total_tokens == 5
