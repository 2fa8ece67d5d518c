"""The real `openai` client over a real socket: completions, chat, streams, errors, disconnects, shutdown of streams."""

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import httpx
import openai
import pydantic
import pytest

from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from mpt.engine.request import Sampling, Started
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import listening

KEY = "sk-test-of-the-client"


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    """`base` and `chat` on the random model: byte tokens, 2,048 of context."""
    options = ServeOptions(models={}, api_keys=(KEY,), keep_alive_s=0.05)
    serving = Serving(options)
    for name, style in (("base", "none"), ("chat", "chatml")):
        engine = Engine(TorchBackend(model), tokenizer, context_length=2048, kv_bytes=1 << 26, max_running=8)
        engine.start()
        serving.endpoints[name] = Endpoint(
            name, name, engine, tokenizer, style, None, "Apache-2.0", model.config.vocab_size, 2048
        )
    yield serving
    for endpoint in serving.endpoints.values():
        endpoint.engine.close()


@pytest.fixture(scope="module")
def url(serving) -> Iterator[str]:
    with listening(make_app(serving), log_level="warning") as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def ignoring_eos(**more: object) -> dict[str, object]:
    return {"ignore_eos": True, "skip_special_tokens": False, **more}


def test_the_request_id_is_echoed_when_it_is_one(url):
    good = httpx.get(f"{url}/health", headers={"x-request-id": "abc-1.2_3"})
    bad = httpx.get(f"{url}/health", headers={"x-request-id": "a b"})
    assert good.headers["x-request-id"] == "abc-1.2_3" and bad.headers["x-request-id"] != "a b"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_generation(url, serving, stream):
    body = {"model": "base", "prompt": "a", "max_tokens": 2000, "stream": stream, **ignoring_eos()}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(timeout=0.3) as impatient:
        if stream:
            with impatient.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                impatient.post(f"{url}/v1/completions", json=body, headers=headers)
    engine = serving.endpoints["base"].engine
    for _ in range(200):
        if engine.stats().n_running == 0:
            break
        time.sleep(0.01)
    assert (engine.stats().n_running, engine.stats().kv_used_bytes) == (0, 0)


def test_a_stream_that_breaks_ends_in_an_error_not_in_done(client, serving, monkeypatch):
    """openai-python takes a stream that merely stops for a finished one; an error event makes it raise."""
    backend = serving.endpoints["base"].engine._backend
    forward = backend.forward

    def failing(work):
        if any(item.row.length > 5 for item in work):  # a text of one token can be read, so the model is not given up
            raise RuntimeError("a step that cannot be computed")
        return forward(work)

    stream = client.completions.create(
        model="base", prompt="a", max_tokens=50, temperature=0, stream=True, extra_body=ignoring_eos()
    )
    monkeypatch.setattr(backend, "forward", failing)
    with pytest.raises(openai.APIError, match="could not be computed") as broken:
        list(stream)
    assert broken.value.code == "internal_error"
    monkeypatch.setattr(backend, "forward", forward)
    assert client.completions.create(model="base", prompt="a", max_tokens=1).choices


def test_silence_is_filled_with_comments(url, serving, monkeypatch):
    backend = serving.endpoints["base"].engine._backend
    forward = backend.forward

    def slow(work):
        time.sleep(0.2)
        return forward(work)

    monkeypatch.setattr(backend, "forward", slow)
    body = {"model": "base", "prompt": "a", "max_tokens": 2, "stream": True, **ignoring_eos()}
    text = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}).text
    assert ": keep-alive\n\n" in text and text.endswith("data: [DONE]\n\n")


def test_a_full_queue_is_503_with_retry_after(url, serving, monkeypatch):
    engine = serving.endpoints["base"].engine
    monkeypatch.setattr(engine, "_max_waiting", 0)
    response = httpx.post(
        f"{url}/v1/completions", json={"model": "base", "prompt": "a"}, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) > 0


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rom"]
    degrees: Annotated[int, pydantic.Field(ge=-50, le=50)]
    dry: bool | None


SAID = [{"role": "user", "content": "How is the weather?"}]


def test_response_formats_of_the_client(client):
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}
    answer = client.chat.completions.create(model="chat", messages=SAID, response_format=form, seed=1)
    assert isinstance(Weather.model_validate_json(answer.choices[0].message.content), Weather)
    free = client.chat.completions.create(
        model="chat", messages=SAID, response_format={"type": "json_object"}, max_tokens=5
    )
    assert free.choices[0].message.content.lstrip().startswith("{")
    chosen = client.completions.create(model="base", prompt="a", extra_body={"structured_outputs": {"choice": ["x"]}})
    assert chosen.choices[0].text == "x"


def test_a_pydantic_model_is_parsed_whole_and_streamed(client):
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        answer = parse(model="chat", messages=SAID, response_format=Weather, seed=2)
        assert isinstance(answer.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(model="chat", messages=SAID, response_format=Weather, seed=2) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


async def test_cached_prompts_are_shared_within_a_key_only(serving):
    engine = serving.endpoints["base"].engine

    async def cached(salt: str) -> int:
        events = engine.generate([7] * 100, Sampling(max_tokens=1, temperature=0), request_id="x", salt=salt)
        started = [event async for event in events if isinstance(event, Started)]
        return started[0].cached_tokens

    assert [await cached("key a"), await cached("key a"), await cached("key b")] == [0, 99, 0]
