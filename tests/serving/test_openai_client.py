"""The real `openai` client over a real socket: completions, chat, streams, errors, disconnects, shutdown of streams."""

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch
import uvicorn

from mpt.generation import generate
from mpt.prompts import encode_chat
from serving.app import Serving, make_app
from serving.backend import TorchBackend
from serving.endpoints import Endpoint
from serving.engine import Engine
from serving.options import ServeOptions
from serving.request import Sampling, Started

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(serving), port=port, log_level="warning", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def ignoring_eos(**more: object) -> dict[str, object]:
    return {"ignore_eos": True, "skip_special_tokens": False, **more}


def test_a_completion_is_the_naive_loops_text(client, model, tokenizer):
    prompt = "The old man and the"
    answer = client.completions.create(
        model="base", prompt=prompt, max_tokens=20, temperature=0, extra_body=ignoring_eos()
    )
    ids = tokenizer.encode(prompt)
    expected = generate(model, ids, 20)
    assert answer.choices[0].text == tokenizer.decode(expected, False)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    assert answer.id.startswith("cmpl-")


def test_prompts_times_samples_are_indexed_in_order(client, model, tokenizer):
    prompts = [[10, 11, 12], [20, 21]]
    answer = client.completions.create(
        model="base", prompt=prompts, n=2, max_tokens=6, temperature=0, extra_body=ignoring_eos()
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [tokenizer.decode(generate(model, prompt, 6), False) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert answer.usage.prompt_tokens == 5  # each prompt once
    assert answer.usage.completion_tokens == 24


def test_echo_scores_the_prompt_from_one_forward_pass(client, model, tokenizer):
    """What lm-evaluation-harness asks: ids, one token more, the log-probability of every token but the first."""
    ids = tokenizer.encode("scored text")
    answer = client.completions.create(
        model="base", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0, extra_body=ignoring_eos()
    )
    scored = answer.choices[0].logprobs
    whole = [*ids, *generate(model, ids, 1)]
    with torch.no_grad():
        truth = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    assert scored.token_logprobs[0] is None
    for at in range(1, len(whole)):
        assert scored.token_logprobs[at] == pytest.approx(float(truth[at - 1, whole[at]]), abs=1e-4)
    assert max(scored.top_logprobs[-1].values()) == scored.token_logprobs[-1]  # is_greedy compares with `!=`
    assert scored.text_offset[: len(ids)] == list(range(len(ids)))
    assert answer.choices[0].text.startswith("scored text")


def test_scoring_alone_generates_nothing(client, tokenizer):
    answer = client.completions.create(model="base", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == "abc"
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == 3


def test_a_chat_answer_and_its_logprobs(client, model, tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    answer = client.chat.completions.create(
        model="chat", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2,
        extra_body=ignoring_eos(),
    )  # fmt: skip
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = generate(model, encode_chat(tokenizer, "chatml", plain), 5)
    entries = answer.choices[0].logprobs.content
    assert [bytes(entry.bytes) for entry in entries] == [tokenizer.token_bytes(token) for token in expected]
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == tokenizer.decode(expected, False)


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_adds_up_to_the_whole_answer(client, seed):
    """Random bytes, so characters are split across tokens all the time."""
    ask = {"model": "base", "prompt": "ünï", "max_tokens": 60, "seed": seed, "extra_body": ignoring_eos()}
    whole = client.completions.create(**ask).choices[0].text
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_stream_has_openais_order(url):
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **ignoring_eos()}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [httpx.Response(200, content=event).json() for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:-1])


def test_best_of_returns_the_likeliest(client):
    ask = {"model": "base", "prompt": "a", "max_tokens": 8, "seed": 3, "logprobs": 0, "extra_body": ignoring_eos()}
    drawn = client.completions.create(**ask, n=5).choices
    best = client.completions.create(**ask, n=1, best_of=5).choices
    means = {choice.text: sum(choice.logprobs.token_logprobs) / 8 for choice in drawn}
    assert [choice.text for choice in best] == [max(means, key=means.__getitem__)]


def test_stop_strings_never_show(client):
    ask = {"model": "base", "prompt": "q", "max_tokens": 40, "temperature": 0, "extra_body": ignoring_eos()}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[7:9]
    chunks = list(client.completions.create(**ask, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own_classes(client, url):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found" and "`base`" in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt="a" * 2000, max_tokens=100)
    assert long.value.code == "context_length_exceeded" and "2100" in long.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="base", prompt="a", extra_body={"tempratur": 1})
    assert unknown.value.code == "unknown_parameter" and unknown.value.param == "tempratur"
    with pytest.raises(openai.BadRequestError, match="completions"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.AuthenticationError) as wrong:
        openai.OpenAI(base_url=f"{url}/v1", api_key="sk-other", max_retries=0).models.list()
    assert wrong.value.code == "invalid_api_key"


def test_every_route_but_the_probes_needs_a_key(url):
    for path in ("/v1/models", "/metrics", "/docs", "/version", "/tokenize", "/nowhere"):
        response = httpx.get(url + path)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", path
        assert response.headers["x-request-id"] and response.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200


def test_the_request_id_is_echoed_when_it_is_one(url):
    good = httpx.get(f"{url}/health", headers={"x-request-id": "abc-1.2_3"})
    bad = httpx.get(f"{url}/health", headers={"x-request-id": "a b"})
    assert good.headers["x-request-id"] == "abc-1.2_3" and bad.headers["x-request-id"] != "a b"


def test_models_say_what_they_are(client):
    card = client.models.retrieve("chat").model_dump()
    assert {"max_model_len": 2048, "prompt_style": "chatml", "licence": "Apache-2.0"}.items() <= card.items()
    assert [model.id for model in client.models.list()] == ["base", "chat"]


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
    forward, n_steps = backend.forward, 0

    def failing(work):
        nonlocal n_steps
        n_steps += 1
        if n_steps > 5:
            raise RuntimeError("the device is lost")
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


def test_metrics_count_what_happened(url, client):
    headers = {"Authorization": f"Bearer {KEY}"}

    def value(name: str) -> float:
        lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model_name="chat"'))

    names = ("mpt_prompt_tokens_total", "mpt_generation_tokens_total", "mpt_inter_token_latency_seconds_count")
    before = [value(name) for name in names]
    for _ in range(3):
        client.completions.create(model="chat", prompt="12345", max_tokens=7, extra_body=ignoring_eos())
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3 * 5, 3 * 7, 3 * 6]
    assert value("mpt_num_requests_running") == value("mpt_kv_cache_usage_ratio") == 0


def test_a_full_queue_is_503_with_retry_after(url, serving, monkeypatch):
    engine = serving.endpoints["base"].engine
    monkeypatch.setattr(engine, "_max_waiting", 0)
    response = httpx.post(
        f"{url}/v1/completions", json={"model": "base", "prompt": "a"}, headers={"Authorization": f"Bearer {KEY}"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) > 0


async def test_cached_prompts_are_shared_within_a_key_only(serving):
    engine = serving.endpoints["base"].engine

    async def cached(salt: str) -> int:
        events = engine.generate([7] * 100, Sampling(max_tokens=1, temperature=0), request_id="x", salt=salt)
        started = [event async for event in events if isinstance(event, Started)]
        return started[0].cached_tokens

    assert [await cached("key a"), await cached("key a"), await cached("key b")] == [0, 99, 0]
