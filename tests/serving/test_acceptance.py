"""What both servers must do, asked over HTTP alone: `mpt serve`, and `mpt cluster` on a local Ray."""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

import mpt
from mpt.errors import UserError
from mpt.generation import generate
from mpt.prompts import encode_chat
from serving.cluster import reload
from serving.ports import free_port
from tests.serving.otlp import Receiver, attributes, receiving
from tests.serving.servers import Server, running, serve_config

KEY, OTHER_KEY, SLOW_KEY = "sk-test-of-the-client", "sk-test-of-another", "sk-test-of-few-tokens"
NARROW_KEY, POOR_KEY = "sk-test-of-few-models", "sk-test-of-a-budget"
LEAVING_KEY, LEAVING_LIMIT = "sk-test-of-one-who-leaves", 20_000  # tokens a minute
KEYS = f"""# six clients
tester: {KEY}
{OTHER_KEY}
slow: {SLOW_KEY} requests_per_minute=5 tokens_per_minute=1000
leaving: {LEAVING_KEY} tokens_per_minute={LEAVING_LIMIT}
narrow: {NARROW_KEY} models=chat,base:loud
poor: {POOR_KEY} tokens_per_month=60
"""


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory) -> Path:
    return mpt.save(model, tmp_path_factory.mktemp("checkpoints") / "base", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> Path:
    """A folder with one adapter, `loud`, of rank 4 on two projections, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("adapters")
    copy = mpt.MPTForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["Wqkv", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / "loud")
    return folder


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Takes the spans of the servers, of routers and replicas too."""
    with pytest.MonkeyPatch.context() as patch, receiving() as found:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds
        yield found


@pytest.fixture(scope="module", params=["serve", "cluster"])
def server(request, checkpoint, adapters, receiver, tmp_path_factory) -> Iterator[Server]:
    """`base` and `chat` on the random model: byte tokens, 2,048 of context; five keys; spans go to the receiver."""
    folder = tmp_path_factory.mktemp(request.param)
    keys = folder / "keys"
    keys.write_text(KEYS)
    if request.param == "serve":
        options = [
            *("--model", f"base={checkpoint}", "--model", f"chat={checkpoint}", "--prompt-style", "chat=chatml"),
            *("--prompt-style", "base=none"),
            *("--adapter", f"base={adapters}", "--max-running", "8", "--max-waiting", "24", "--kv-gb", "0.064"),
            *("--api-key-file", str(keys), "--port", "0", "--docs"),
            *("--allow-adapter-loading", str(adapters), "--quota-store", str(folder / "quotas.sqlite")),
            *("--otel-endpoint", receiver.url),
        ]
    else:
        each = {
            "root": str(checkpoint),
            "max_running": 8,
            "max_waiting": 8,
            "kv_gb": 0.064,
            "num_cpus": 0.1,
            "threads": 1,
        }
        models = {
            "base": {**each, "adapters": str(adapters), "prompt_style": "none"},
            "chat": {**each, "prompt_style": "chatml"},
        }
        config = serve_config(
            folder,
            models,
            api_key_file=str(keys),
            docs=True,
            router_replicas=1,
            quota_store=str(folder / "quotas.sqlite"),
            otel_endpoint=receiver.url,
        )
        options = ["--config", str(config), "--port", str(free_port())]
    with running(request.param, *options) as server:
        yield server


@pytest.fixture(scope="module")
def url(server) -> str:
    return server.url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def ignoring_eos(**more: object) -> dict[str, object]:
    return {"ignore_eos": True, "skip_special_tokens": False, **more}


def post(url: str, body: object, path: str = "/v1/completions", key: str = KEY, **more) -> httpx.Response:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"Authorization": f"Bearer {key}", "content-type": "application/json", **more}
    return httpx.post(url + path, content=content, headers=headers, timeout=100)


def total(url: str, metric: str, model: str) -> float:
    """A metric of a model, over all its replicas."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=100).text
    lines = [line for line in text.splitlines() if line.startswith(f"{metric}{{") and f'model_name="{model}"' in line]
    return sum(float(line.split()[-1]) for line in lines)


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
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None} | {
        "finish_reason": "length", "stop_reason": None
    }  # fmt: skip
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:-1])


@pytest.mark.parametrize(
    ("path", "more", "last"),
    [
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 4}, '"type":"response.'),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}, '"message_stop"'),
        ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 4}}, '"done":true'),
    ],
)
def test_other_apis_stream_whole_and_refuse_in_their_shape(url, path, more, last):
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}{path}", json={"model": "chat", "stream": True, **more}, headers=headers)
    assert answer.status_code == 200 and last in answer.text.strip().splitlines()[-1]
    whole = httpx.post(f"{url}{path}", json={"model": "chat", "stream": False, **more}, headers=headers)
    assert whole.status_code == 200 and whole.headers["content-type"] == "application/json"
    refused = httpx.post(f"{url}{path}", json={"model": "none", **more}, headers=headers).json()
    said = refused["error"] if path == "/api/chat" else refused["error"]["message"]
    assert "`none`" in said
    unknown = httpx.post(f"{url}{path}", json={"model": "chat", "tempratur": 1, **more}, headers=headers).json()
    assert "tempratur" in str(unknown["error"])


def test_a_long_prompt_tells_how_far_it_is_read(url):
    body = {"model": "base", "prompt": "z" + "y" * 1700, "max_tokens": 3, "stream": True, **ignoring_eos()}
    for options in ({"include_usage": True}, {"include_usage": True, "include_progress": True}):
        lines = post(url, {**body, "stream_options": options}).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        if "include_progress" not in options:
            assert told == []
            continue
        # the first request left its prompt in the cache: one chunk, of the one token that must be read again
        assert [(each["processed"], each["total"], each["cached"]) for each in told] == [(1701, 1701, 1700)]
    fresh = {**body, "prompt": "x" * 1701, "n": 2, "stream_options": {"include_progress": True}}
    with ThreadPoolExecutor(2) as pool:  # another one beside it, so that it is read in chunks
        beside = pool.submit(post, url, {**body, "prompt": "q", "max_tokens": 300})
        lines = post(url, fresh).text.split("\n\n")
        beside.result()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    processed = [chunk["prompt_progress"]["processed"] for chunk in chunks if "prompt_progress" in chunk]
    assert processed == sorted(set(processed)) and processed[-1] == 1701 and processed[0] <= 1701


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


def test_models_say_what_they_are(client):
    card = client.models.retrieve("chat").model_dump()
    assert {"max_model_len": 2048, "prompt_style": "chatml", "licence": "unknown"}.items() <= card.items()
    assert [model.id for model in client.models.list()] == ["base", "base:loud", "chat"]


def test_metrics_count_what_happened(url, client):
    names = ("mpt_prompt_tokens_total", "mpt_generation_tokens_total", "mpt_inter_token_latency_seconds_count")
    before = [total(url, name, "chat") for name in names]
    for _ in range(3):
        client.completions.create(model="chat", prompt="12345", max_tokens=7, extra_body=ignoring_eos())
    after = [total(url, name, "chat") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3 * 5, 3 * 7, 3 * 6]
    assert total(url, "mpt_num_requests_running", "chat") == total(url, "mpt_kv_cache_usage_perc", "chat") == 0


def test_a_good_request_id_is_echoed_once(url):
    good = httpx.get(f"{url}/health", headers={"x-request-id": "abc-1.2_3"})
    assert good.headers.get_list("x-request-id") == ["abc-1.2_3"]
    answer = post(url, {"model": "base", "prompt": "a", "max_tokens": 1}, **{"x-request-id": "mine-7"})
    assert answer.json()["id"] == "cmpl-mine-7" and answer.headers.get_list("x-request-id") == ["mine-7"]
    assert httpx.get(f"{url}/nowhere").headers["x-request-id"]


def raw(url: str, *lines: bytes, body: bytes = b"") -> bytes:
    """What comes, until the server closes, for a head as it is."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=100) as connection:
        connection.sendall(b"\r\n".join([*lines, b"connection: close", b"", body]))
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


BEARER = f"authorization: Bearer {KEY}".encode()


@pytest.mark.parametrize("given", [b"a b", b"\xe9", b"\xff", b"x" * 1024, b"a\tb", b"", b"ok-1\r\nx-request-id: ok-2"])
def test_what_is_no_request_id_is_replaced_by_one(url, given):
    said = raw(url, b"GET /v1/models HTTP/1.1", b"host: localhost", BEARER, b"x-request-id: " + given)
    assert said.startswith(b"HTTP/1.1 200 ")
    (request_id,) = re.findall(rb"(?im)^x-request-id: (.*)\r$", said)
    assert re.fullmatch(rb"[A-Za-z0-9._-]{8,64}", request_id)


@pytest.mark.parametrize(
    "name",
    ["authorization", "host", "content-type", "x-unknown", "traceparent", "x-forwarded-for", "x-session-id",
     "serve_multiplexed_model_id", "x-request-timeout-seconds", "x-request-disconnect-disabled"],
)  # fmt: skip
def test_no_byte_of_a_header_makes_a_bug(url, name):
    for value in (b"\xff", b"\xe9 \xe9", b"-1", b"?1"):
        said = raw(url, b"GET /v1/models HTTP/1.1", b"host: localhost", BEARER, name.encode() + b": " + value)
        assert re.match(rb"HTTP/1.1 (200|400|401) ", said), said[:200]


def test_two_keys_are_none(url):
    said = raw(url, b"GET /v1/models HTTP/1.1", b"host: localhost", BEARER, b"authorization: Bearer other")
    assert said.startswith(b"HTTP/1.1 400 ") and b"duplicate_header" in said


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/base", "/"])
def test_head_is_get_without_its_body(url, path):
    heads = []
    for method in ("GET", "HEAD"):
        head, _, body = raw(url, f"{method} {path} HTTP/1.1".encode(), b"host: localhost", BEARER).partition(
            b"\r\n\r\n"
        )
        lines = [line.lower() for line in head.split(b"\r\n")]
        heads.append(sorted(line for line in lines if not line.startswith((b"date:", b"x-request-id:"))))
        assert bool(body) == (method == "GET")
    assert heads[0] == heads[1]


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_stop_their_generation(url, stream):
    """Eight of them: HAProxy with splicing misses one in four."""
    body = {"model": "base", "prompt": "a", "max_tokens": 2000, "stream": stream, **ignoring_eos()}
    headers = {"Authorization": f"Bearer {KEY}"}
    before, answered = total(url, "mpt_requests_cancelled_total", "base"), []
    for _ in range(8):
        with httpx.Client(timeout=0.15) as impatient:
            if stream:
                with impatient.stream(
                    "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=100
                ) as answer:
                    next(answer.iter_lines())
            else:
                with contextlib.suppress(httpx.ReadTimeout):
                    answered.append(impatient.post(f"{url}/v1/completions", json=body, headers=headers).text)
    assert not answered
    for _ in range(500):
        if total(url, "mpt_requests_cancelled_total", "base") == before + 8:
            break
        time.sleep(0.02)
    assert total(url, "mpt_requests_cancelled_total", "base") == before + 8
    assert total(url, "mpt_num_requests_running", "base") == total(url, "mpt_kv_cache_usage_perc", "base") == 0


def test_a_full_queue_is_503_with_retry_after(url):
    """Of 64 requests 32 find a place; each lasts longer than a client takes to send all of them."""
    body = {"model": "chat", "prompt": "a", "max_tokens": 1200, "n": 1, **ignoring_eos()}
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(url, body), range(64)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused and {answer.status_code for answer in refused} == {503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    served = [answer.json()["usage"]["completion_tokens"] for answer in answers if answer.status_code == 200]
    assert served == [1200] * len(served) and served
    assert post(url, {**body, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "code", "param"),
    [
        ("{", 400, "invalid_json", None),
        ('{"model":"base","prompt":"a","temperature":NaN}', 400, "invalid_json", None),
        ('{"model":"base","prompt":"a","n":"16"}', 400, "invalid_type", "n"),
        ('{"model":"base","prompt":"a","tempratur":1}', 400, "unknown_parameter", "tempratur"),
        ('{"model":"base","prompt":"a","tools":[{}]}', 400, "unsupported_parameter", "tools"),
        ('{"model":"base","prompt":7}', 400, "invalid_type", "prompt"),
        ('{"model":"base","prompt":[]}', 400, "invalid_value", "prompt"),
        ('{"model":"base","prompt":[true]}', 400, "invalid_type", "prompt[0]"),
        ('{"model":"base","prompt":[260]}', 400, "invalid_prompt", "prompt"),
        ('{"model":"base","prompt":"a","stop_token_ids":[260]}', 400, "invalid_value", "stop_token_ids"),
        ('{"model":"base","prompt":"a","max_tokens":2048}', 400, "context_length_exceeded", "prompt"),
        ('{"model":"other","prompt":"a"}', 404, "model_not_found", "model"),
        ('{"model":"base:other","prompt":"a"}', 404, "model_not_found", "model"),
        ('{"model":"base:../../etc","prompt":"a"}', 404, "model_not_found", "model"),
        ('{"model":"other:loud","prompt":"a"}', 404, "model_not_found", "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_body_is_refused_by_name(url, content, status, code, param, stream):
    if stream:
        content = content.replace("{", '{"stream":true,', 1) if len(content) > 1 else content
    answer = post(url, content)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"


def test_other_kinds_of_bodies_paths_and_methods(url):
    text = post(url, '{"model":"base","prompt":"a"}', **{"content-type": "text/plain"})
    assert (text.status_code, text.json()["error"]["code"]) == (415, "unsupported_media_type")
    headers = {"Authorization": f"Bearer {KEY}"}
    nowhere, method = httpx.get(f"{url}/v2", headers=headers), httpx.get(f"{url}/v1/completions", headers=headers)
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "unknown_url")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    slash = httpx.post(f"{url}/v1/completions/", headers={**headers, "host": "evil.example"}, json={})
    assert (slash.status_code, slash.json()["error"]["code"]) == (404, "unknown_url")
    padding = {f"x-padding-{k}": "p" * 8000 for k in range(5)}
    assert post(url, {"model": "base", "prompt": "a"}, **padding).status_code in (400, 431)  # HAProxy's, ours
    for body in (b'{"model":"base","prompt":"' + b"a" * (4 << 20) + b'"}', b"[" + b"{}," * 30_000 + b"{}]"):
        large = post(url, body)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


def test_tokens_there_and_back(url):
    made = post(url, {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}, "/tokenize").json()
    assert made["count"] == len(made["tokens"]) and made["max_model_len"] == 2048
    back = post(url, {"model": "chat", "tokens": made["tokens"]}, "/detokenize").json()["prompt"]
    assert back.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_an_adapter_is_asked_for_by_its_name(client, url, model, tokenizer, adapters):
    from peft import PeftModel

    copy = mpt.MPTForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    merged = PeftModel.from_pretrained(copy, adapters / "loud").merge_and_unload()
    ids = tokenizer.encode("The old man and the")
    ask = {"prompt": ids, "max_tokens": 20, "temperature": 0, "extra_body": ignoring_eos()}
    plain = tokenizer.decode(generate(model, ids, 20), False)
    adapted = tokenizer.decode(generate(merged, ids, 20), False)
    assert plain != adapted
    answer = client.completions.create(model="base:loud", **ask)
    assert (answer.choices[0].text, answer.model) == (adapted, "base:loud")
    assert client.completions.create(model="base", **ask).choices[0].text == plain
    card = client.models.retrieve("base:loud").model_dump()
    assert (card["parent"], card["max_model_len"]) == ("base", 2048)


def test_adapters_are_loaded_by_request_where_that_is_allowed_and_never_in_a_cluster(server, url):
    """`loud` is in the folder that `mpt serve` was told of, too."""
    for what in ("load", "unload"):
        answer = post(url, {"lora_name": "chat:late", "lora_path": "loud"}, f"/v1/{what}_lora_adapter", key="nobody")
        assert answer.status_code == 401
    loaded = post(url, {"lora_name": "chat:late", "lora_path": "loud"}, "/v1/load_lora_adapter")
    asked = post(url, {"model": "chat:late", "prompt": "a", "max_tokens": 1})
    unloaded = post(url, {"lora_name": "chat:late"}, "/v1/unload_lora_adapter")
    if server.kind == "serve":
        assert (loaded.status_code, asked.status_code, unloaded.status_code) == (200, 200, 200)
    else:
        assert (loaded.status_code, asked.status_code, unloaded.status_code) == (404, 404, 404)
        assert "folder" in loaded.json()["error"]["message"]
    assert post(url, {"model": "chat:late", "prompt": "a", "max_tokens": 1}).status_code == 404


def test_embeddings_are_the_mean_of_the_last_states(client, model, tokenizer):
    ids = tokenizer.encode("The old man and the")
    with torch.no_grad():
        mean = model.transformer(torch.tensor([ids])).last_hidden_state[0].double().mean(0)
    answer = client.embeddings.create(model="base", input=["The old man and the", "sea"])
    assert answer.data[0].embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1] and answer.usage.prompt_tokens == len(ids) + 3


def test_an_answer_follows_its_schema(client, url):
    schema = {"type": "object", "properties": {"dry": {"type": "boolean"}}, "required": ["dry"]}
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": {**schema, "additionalProperties": False}}}
    said = [{"role": "user", "content": "Is it dry?"}]
    answer = client.chat.completions.create(model="chat", messages=said, response_format=form, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content) in ({"dry": True}, {"dry": False})
    hostile = {"type": "integer", "multipleOf": 9_999_991}  # minutes to compile
    refused = post(url, {"model": "base", "prompt": "a", "structured_outputs": {"json": hostile}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs.json")


def test_a_clients_limits_are_told_and_kept(url):
    ask = {"model": "base", "prompt": "1234567890", "max_tokens": 10, **ignoring_eos()}
    first = post(url, ask, key=SLOW_KEY)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "5" and first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert first.headers["x-ratelimit-remaining-requests"] == "4"
    too_many = post(url, {**ask, "max_tokens": 1500}, key=SLOW_KEY)
    assert (too_many.status_code, too_many.headers["x-should-retry"]) == (429, "false")
    assert too_many.json()["error"]["type"] == "rate_limit_error"
    kept = int(post(url, ask, key=SLOW_KEY).headers["x-ratelimit-remaining-tokens"])
    assert kept >= 1000 - 2 * 2 * 20  # the refused one cost nothing, each served one about its 20 tokens
    answers = [post(url, ask, key=SLOW_KEY) for _ in range(4)]
    limited = [answer for answer in answers if answer.status_code == 429]
    assert limited and all(0 < int(answer.headers["retry-after"]) <= 60 for answer in limited)
    assert {answer.json()["error"]["code"] for answer in limited} == {"rate_limit_exceeded"}
    assert post(url, ask).status_code == 200  # another client's minute is its own


def served(url: str) -> float:
    """Tokens read and drawn, as the engines count them, once nothing runs any more."""
    while sum(total(url, "mpt_num_requests_running", model) for model in ("base", "chat")):
        time.sleep(0.02)
    counted = "mpt_prompt_tokens_total", "mpt_generation_tokens_total"
    return sum(total(url, metric, model) for metric in counted for model in ("base", "chat"))


def lines_of(server: Server, words: str, n: int) -> list[str]:
    """So many lines of the log that have these words, when they are there."""
    until = time.monotonic() + 100
    while len(found := [line for line in list(server.lines) if words in line]) < n and time.monotonic() < until:
        time.sleep(0.02)
    return found


def test_clients_that_leave_early_pay_for_what_was_computed(server, url):
    """Whatever they ask for and however they leave. Nothing else asks meanwhile, so that the engines count theirs."""
    headers = {"Authorization": f"Bearer {LEAVING_KEY}"}
    before = served(url)
    body = {"model": "base", "prompt": "abc", "max_tokens": 2000, "best_of": 8, "n": 1, **ignoring_eos()}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=0.2)
    said = [{"role": "user", "content": "Hi"}]
    streams = [
        ("/v1/completions", {"model": "base", "prompt": "abc", "max_tokens": 1500, "n": 2, **ignoring_eos()}),
        ("/v1/chat/completions", {"model": "chat", "messages": said, "max_tokens": 1500, **ignoring_eos()}),
        ("/v1/messages", {"model": "chat", "messages": said, "max_tokens": 1500}),
        ("/api/chat", {"model": "chat", "messages": said, "options": {"num_predict": 1500}}),
    ]
    for path, more in streams:
        with httpx.stream("POST", url + path, json={"stream": True, **more}, headers=headers, timeout=100) as answer:
            assert answer.status_code == 200
            for _ in zip(range(60), answer.iter_lines(), strict=False):
                pass
    lines = lines_of(server, "client=leaving", 5)
    charged = [int(re.search(r"charged_tokens=(\d+)", line)[1]) for line in lines]
    assert len(charged) == 5 and min(charged[1:]) > 20 and sum(charged) >= served(url) - before, lines
    assert all("finish_reason=abort" in line and "error=client_disconnected" in line for line in lines[:3]), lines
    left = httpx.get(f"{url}/v1/models", headers=headers).headers["x-ratelimit-remaining-tokens"]
    assert int(left) < LEAVING_LIMIT


def test_the_access_log_has_names_and_costs_but_no_keys_and_no_text(server, url):
    ask = {"model": "base", "prompt": "confidential", "max_tokens": 3, **ignoring_eos()}
    post(url, ask, **{"x-request-id": "logged-1"})
    post(url, ask, key=OTHER_KEY, **{"x-request-id": "logged-2"})
    named, hashed = lines_of(server, "request_id=logged-", 2)
    for part in ("client=tester", "model=base", "prompt_tokens=12", "completion_tokens=3", "finish_reason=length"):
        assert part in named
    assert "ttft_s=0." in named and "status=200" in named
    assert re.search(r"itl_s=(0\.|\de-05 )", named)  # 1e-05 where all its tokens were read at once
    assert "client=" in hashed and "client=tester" not in hashed
    everything = "".join(server.lines)
    assert "confidential" not in everything and not any(
        key in everything for key in (KEY, OTHER_KEY, SLOW_KEY, POOR_KEY)
    )


def test_a_key_uses_its_models_and_sees_no_others(url):
    """`narrow` has `chat`, and of `base` its adapter alone. The others are to it as models that are not there."""

    def ask(path: str, body: dict[str, object] | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {NARROW_KEY}"}
        return httpx.request("GET" if body is None else "POST", url + path, json=body, headers=headers, timeout=100)

    hello = [{"role": "user", "content": "Hi"}]
    assert [card["id"] for card in ask("/v1/models").json()["data"]] == ["base:loud", "chat"]
    assert [card["model"] for card in ask("/api/tags").json()["models"]] == ["base:loud", "chat"]
    assert ask("/v1/models/base:loud").status_code == ask("/v1/models/chat").status_code == 200
    completion = {"prompt": "a", "max_tokens": 1, "model": "base:loud"}
    assert ask("/v1/completions", completion).status_code == 200
    assert ask("/v1/chat/completions", {"model": "chat", "messages": hello, "max_tokens": 1}).status_code == 200
    of_base = {
        "/v1/models/base": None,
        "/api/show": {"model": "base"},
        "/v1/completions": {**completion, "model": "base"},
        "/v1/chat/completions": {"model": "base", "messages": hello, "stream": True},
        "/v1/embeddings": {"model": "base", "input": "a"},
        "/v1/responses": {"model": "base", "input": "a"},
        "/v1/messages": {"model": "base", "messages": hello, "max_tokens": 1},
        "/v1/messages/count_tokens": {"model": "base", "messages": hello},
        "/api/chat": {"model": "base", "messages": hello},
        "/api/generate": {"model": "base", "prompt": "a"},
        "/api/embed": {"model": "base", "input": "a"},
        "/api/embeddings": {"model": "base", "prompt": "a"},
        "/tokenize": {"model": "base", "prompt": "a"},
        "/detokenize": {"model": "base", "tokens": [10]},
    }
    for path, body in of_base.items():
        refused = ask(path, body)
        unknown = ask(path.replace("/base", "/none"), None if body is None else {**body, "model": "none"})
        assert refused.status_code == unknown.status_code == 404, (path, refused.text)
        assert refused.text.replace("`base`", "`none`", 1) == unknown.text, path
    assert ask("/v1/completions", {**completion, "model": "base:quiet"}).status_code == 404
    assert post(url, {"model": "base", "prompt": "a", "max_tokens": 1}).status_code == 200  # another key's are its own


def test_a_budget_of_tokens_is_kept_in_a_file(server, url):
    """10 tokens of prompt and 20 of answer are 30; in a cluster a router holds what the text may come to."""
    ask = {"model": "base", "prompt": "1234567890", "max_tokens": 20, **ignoring_eos()}
    assert post(url, ask, key=POOR_KEY).status_code == 200
    for _ in range(200):
        metrics = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {POOR_KEY}"}, timeout=100)
        assert metrics.status_code == 200  # nothing is charged for it
        refused = post(url, {**ask, "max_tokens": 100}, key=POOR_KEY)
        assert refused.status_code == 429
        if "30 are left" in refused.json()["error"]["message"]:
            break
        time.sleep(0.02)
    assert "30 are left of your tokens_per_month of 60" in refused.json()["error"]["message"]
    assert (refused.json()["error"]["code"], refused.headers["x-should-retry"]) == ("insufficient_quota", "false")
    assert 'mpt_rate_limited_total{kind="tokens_per_month"' in httpx.get(
        f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=100
    ).text  # fmt: skip
    assert post(url, {**ask, "max_tokens": 5}).status_code == 200


def test_every_process_says_what_it_takes(server, url):
    """The one of `mpt serve`; the router and both replicas of a cluster, told apart by `replica`."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=100).text
    commit = httpx.get(f"{url}/version", headers={"Authorization": f"Bearer {KEY}"}, timeout=100).json()["commit"]
    memory = [line for line in text.splitlines() if line.startswith("process_resident_memory_bytes")]
    builds = [line for line in text.splitlines() if line.startswith("mpt_build_info{")]
    assert len(memory) == len(builds) == (1 if server.kind == "serve" else 3)
    assert all(float(line.split()[-1]) > 10e6 for line in memory)
    assert all(f'commit="{commit}"' in line for line in builds)
    assert len({line.partition('replica="')[2] for line in memory}) == len(memory)


def test_a_trace_goes_through_to_the_replica(server, url, receiver):
    """W3C's example. In a cluster the replica's span is the child of the router's, which is its client's."""
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    ask = {"model": "base", "prompt": "confidential", "max_tokens": 3, **ignoring_eos()}
    sent = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": f"traced-{server.kind}"}
    assert post(url, ask, **sent).status_code == 200

    def is_ours(span) -> bool:
        return span.trace_id.hex() == trace and attributes(span)["mpt.request_id"] == sent["x-request-id"]

    spans = receiver.wait_for(is_ours, 2 if server.kind == "cluster" else 1)
    parents = {span.span_id.hex(): span.parent_span_id.hex() for span in spans}
    outermost = [span for span in spans if span.parent_span_id.hex() == parent]
    assert len(outermost) == 1 and all(each == parent or each in parents for each in parents.values())
    for span in spans:
        said = attributes(span)
        assert (span.name, said["gen_ai.usage.input_tokens"]) == ("text_completion base", 12)
        assert said["gen_ai.usage.output_tokens"] == 3
    for _ in range(200):
        if found := [line for line in list(server.lines) if f"request_id=traced-{server.kind}" in line]:
            break
        time.sleep(0.02)
    assert f"trace_id={trace}" in found[0]
    assert b"confidential" not in b"".join(receiver.raw)


def test_a_cluster_takes_its_changed_config_as_it_runs(server, url):
    if server.kind == "serve":
        pytest.skip("one process, which reads its options once")
    path = Path(server.process.args[server.process.args.index("--config") + 1])
    written, port = path.read_text(), httpx.URL(url).port

    def pages() -> int:
        return httpx.get(f"{url}/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code

    assert pages() == 200
    try:
        path.write_text(written.replace("docs: true", "docs: 1"))
        with pytest.raises(UserError, match="`docs` is 1; it takes true or false"):
            list(reload.ask(None, port))
        assert pages() == 200
        path.write_text(written.replace("docs: true", "docs: false"))
        told, *_ = list(reload.ask(None, port))
        assert told == "the routers take `docs` as they run" and pages() == 404
    finally:
        path.write_text(written)
        list(reload.ask(None, port))
    assert pages() == 200


def test_it_leaves_when_told(server):
    """Last: running answers end, meanwhile it is not ready, the exit code is 0. Eight samples give time to look."""
    body = {"model": "base", "prompt": "a", "max_tokens": 1900, "n": 8, "stream": True, **ignoring_eos()}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=100) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{server.url}/ready", timeout=100)).status_code == 200:
            pass
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "shutting_down")
        alive = httpx.get(f"{server.url}/health", timeout=100)
        assert (alive.status_code, alive.json()["status"]) == (503, "shutting down")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(100) == 0
