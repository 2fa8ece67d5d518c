"""Other APIs say what a chat says: the same text, and errors in their own shape wherever they arise."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from serving.app import make_app
from serving.dialects.kept_responses import KeptResponses
from serving.endpoints import Serving
from serving.errors import NotFound
from serving.options import ServeOptions
from serving.routes import ROUTES
from tests.in_process import listening, running_endpoint

KEY = "sk-of-a-dialect"
HEADERS = {"authorization": f"Bearer {KEY}"}
HI = [{"role": "user", "content": "Hi"}]
DRAW = {"temperature": 0}


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=512, kv_bytes=1 << 24) as endpoint:
        yield Serving(ServeOptions(models={}, api_keys=(KEY, "sk-other")), endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def url(serving) -> Iterator[str]:
    with listening(make_app(serving), log_level="warning") as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def said(client) -> str:
    """What a chat says to HI in eight tokens."""
    answer = client.chat.completions.create(model="base", messages=HI, max_tokens=8, **DRAW)
    return str(answer.choices[0].message.content)


def post(url: str, path: str, body: dict[str, Any], headers: dict[str, str] = HEADERS) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "base", **body}, headers=headers)


BODIES = {
    "/v1/responses": {"input": "Hi", "max_output_tokens": 8, **DRAW},
    "/v1/messages": {"messages": HI, "max_tokens": 8, **DRAW},
    "/api/chat": {"messages": HI, "options": {"num_predict": 8, **DRAW}},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 8, **DRAW}},
}


def text_in(path: str, answer: dict[str, Any]) -> str:
    if path == "/v1/responses":
        return str(answer["output"][0]["content"][0]["text"])
    if path == "/v1/messages":
        return "".join(block["text"] for block in answer["content"])
    return str(answer["response"] if path == "/api/generate" else answer["message"]["content"])


@pytest.mark.parametrize("path", BODIES)
def test_each_api_says_what_a_chat_says(url, said, path):
    answer = post(url, path, {**BODIES[path], "stream": False})
    assert answer.status_code == 200, answer.text
    assert text_in(path, answer.json()) == said


@pytest.mark.parametrize("path", BODIES)
def test_each_stream_says_what_a_chat_says_and_ends_as_its_api_ends(url, said, path):
    answer = post(url, path, {**BODIES[path], "stream": True})
    if path.startswith("/api/"):
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert "".join(text_in(path, line) for line in lines) == said
        assert lines[-1]["eval_count"] == 8 and lines[-1]["done_reason"] == "length"
        return
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    data = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [each["type"] for each in data]
    if path == "/v1/messages":
        assert data[0]["type"] == "message_start" and data[-1]["type"] == "message_stop"
        assert "".join(each["delta"]["text"] for each in data if each["type"] == "content_block_delta") == said
        assert data[-2]["delta"]["stop_reason"] == "max_tokens" and data[-2]["usage"]["output_tokens"] == 8
        assert data[0]["message"]["usage"]["input_tokens"] + data[0]["message"]["usage"]["cache_read_input_tokens"] > 0
    else:
        assert [each["sequence_number"] for each in data] == list(range(len(data)))
        assert "".join(each["delta"] for each in data if each["type"] == "response.output_text.delta") == said
        assert data[-1]["type"] == "response.incomplete"
        assert data[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
        assert text_in(path, data[-1]["response"]) == said


CALL = {"id": "toolu_1", "type": "tool_use", "name": "look", "input": {}}
CALLED = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
# A field of another API, and how a chat says the same.
SAME = {
    "a penalty of Ollama": (
        "/api/chat",
        {"messages": HI, "stream": False, "options": {"num_predict": 8, "repeat_penalty": 5, **DRAW}},
        {"messages": HI, "repetition_penalty": 5},
    ),
    "the beginning of an answer": (
        "/v1/messages",
        {"messages": [*HI, {"role": "assistant", "content": "He"}], "max_tokens": 8, **DRAW},
        {
            "messages": [*HI, {"role": "assistant", "content": "He"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "a call that failed": (
        "/v1/messages",
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": [CALL]},
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "gone", "is_error": True}],
                },
            ],
            "max_tokens": 8,
            **DRAW,
        },
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                {"role": "tool", "content": "error: gone", "tool_call_id": "toolu_1"},
            ]
        },
    ),
}


def n_read(answer: dict[str, Any]) -> int:
    """Tokens of the prompt."""
    if "usage" in answer:
        return int(answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"])
    return int(answer["prompt_eval_count"])


@pytest.mark.parametrize("what", SAME)
def test_a_field_of_another_api_does_what_it_does_in_a_chat(url, said, what):
    path, asked, chat = SAME[what]
    answer, whole = post(url, path, asked), post(url, "/v1/chat/completions", {**chat, "max_tokens": 8, **DRAW})
    expected = whole.json()["choices"][0]["message"]["content"]
    assert text_in(path, answer.json()) == expected != said
    assert n_read(answer.json()) == whole.json()["usage"]["prompt_tokens"]


def test_anthropics_stop_sequences_end_an_answer_and_are_named(url, said):
    stop = said[2:4]
    answer = post(url, "/v1/messages", {**BODIES["/v1/messages"], "stop_sequences": [stop]}).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert text_in("/v1/messages", answer) == said[: said.index(stop)]


ERRORS = {  # what each API's clients look for
    "/v1/responses": lambda body: body["error"]["message"],
    "/v1/messages": lambda body: body["error"]["message"] if body["type"] == "error" else None,
    "/api/chat": lambda body: body["error"],
    "/api/generate": lambda body: body["error"],
}


@pytest.mark.parametrize("path", BODIES)
def test_errors_have_the_shape_of_their_api(url, path):
    wrong_key = post(url, path, BODIES[path], {"authorization": "Bearer sk-wrong"})
    unknown_model = post(url, path, {**BODIES[path], "model": "none"})
    unknown_field = post(url, path, {**BODIES[path], "tempratur": 1})
    long = "a" * 600
    prompt = {"input": long, "prompt": long, "messages": [{"role": "user", "content": long}]}
    too_long = post(url, path, {name: prompt.get(name, value) for name, value in BODIES[path].items()})
    wrong_method = httpx.get(f"{url}{path}", headers=HEADERS)
    for answer, status, word in (
        (wrong_key, 401, "key"),
        (unknown_model, 404, "`none`"),
        (unknown_field, 400, "tempratur"),
        (too_long, 400, "context"),
        (wrong_method, 405, "GET"),
    ):
        assert answer.status_code == status, answer.text
        assert word in ERRORS[path](answer.json())


@pytest.mark.parametrize(
    ("path", "more", "field"),
    [
        ("/v1/responses", {"input": "a" * 600}, "input"),
        ("/v1/responses", {"input": [{"role": "user", "content": None}]}, "input"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}, "text.format"),
        ("/api/chat", {"format": {"type": "odd"}}, "format"),
    ],
)
def test_errors_call_fields_as_the_client_did(url, path, more, field):
    answer = post(url, path, {**BODIES[path], **more})
    said = ERRORS[path](answer.json())
    assert answer.status_code == 400 and "messages" not in said and "response_format" not in said
    if path == "/v1/responses":
        assert answer.json()["error"]["param"] == field
    else:
        assert f"`{field}`" in said


def test_anthropics_own_header_is_a_key(url):
    answer = post(url, "/v1/messages", BODIES["/v1/messages"], {"x-api-key": KEY})
    assert answer.status_code == 200
    wrong = post(url, "/v1/messages", BODIES["/v1/messages"], {"x-api-key": "sk-wrong"})
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_breaks_ends_with_an_error_of_its_api(url, serving, monkeypatch, path):
    backend = serving.endpoints["base"].engine._backend
    forward = backend.forward

    def failing(work):
        if any(item.row.length > 5 for item in work):
            raise RuntimeError("a step that cannot be computed")
        return forward(work)

    monkeypatch.setattr(backend, "forward", failing)
    text = post(url, path, {**BODIES[path], "stream": True}).text
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    if path == "/v1/responses":
        assert last["type"] == "response.failed" and "could not be computed" in last["response"]["error"]["message"]
    else:
        assert "could not be computed" in ERRORS[path](last)


# -- responses that are kept ---------------------------------------------------------------------------------------


def test_a_response_goes_on_from_an_earlier_one(client):
    """What the model reads is the conversation as a chat would send it; instructions are of one response alone."""
    first = client.responses.create(model="base", input="Hi", instructions="Be kind.", max_output_tokens=4, **DRAW)
    second = client.responses.create(
        model="base", input="And?", previous_response_id=first.id, max_output_tokens=4, **DRAW
    )
    messages = [*HI, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And?"}]
    whole = client.chat.completions.create(model="base", messages=messages, max_tokens=4, **DRAW)
    assert second.output_text == whole.choices[0].message.content
    assert second.usage.input_tokens == whole.usage.prompt_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
        client.responses.retrieve(first.id)
    client.responses.create(model="base", input="So?", previous_response_id=second.id, max_output_tokens=1)


def test_a_streamed_response_is_kept_too_and_one_that_is_not_to_be_stored_is_not(client):
    *_, last = client.responses.create(model="base", input="Hi", max_output_tokens=2, stream=True)
    kept = last.response
    assert client.responses.retrieve(kept.id).output_text == kept.output_text and kept.store
    lost = client.responses.create(model="base", input="Hi", max_output_tokens=2, store=False)
    assert lost.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="base", input="And?", previous_response_id=lost.id)


def test_another_key_finds_no_response_of_this_one(client, url):
    mine = client.responses.create(model="base", input="Hi", max_output_tokens=1)
    theirs = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-other", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        theirs.responses.retrieve(mine.id)


def test_the_least_recently_used_responses_go_first():
    kept = KeptResponses(max_kept=2)
    for name in ("a", "b"):
        kept.add("me", {"id": name}, [])
    kept.get("me", "a")
    kept.add("me", {"id": "c"}, [])
    assert kept.get("me", "a") and kept.get("me", "c")
    with pytest.raises(NotFound):
        kept.get("me", "b")
    twice = KeptResponses(max_bytes=150)  # a client chose the id of its request, and chose it again
    for _ in range(5):
        twice.add("me", {"id": "a"}, [{"role": "user", "content": "x" * 60}])
    assert twice.get("me", "a")
    small = KeptResponses(max_bytes=150)
    small.add("me", {"id": "a"}, [{"role": "user", "content": "x" * 60}])
    small.add("me", {"id": "b"}, [{"role": "user", "content": "x" * 60}])
    assert small.get("me", "b")
    with pytest.raises(NotFound):
        small.get("me", "a")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"include": ["file_search_call.results"]}, "file_search_call.results"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"background": True}, "background"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": []}, "input"),
    ],
)
def test_what_responses_cannot_do_is_refused_by_name(url, more, word):
    answer = post(url, "/v1/responses", {**BODIES["/v1/responses"], **more})
    assert answer.status_code == 400 and word in answer.json()["error"]["message"], answer.text


def test_ollama_finds_its_models_and_their_names_with_a_tag(url):
    names = [each["name"] for each in httpx.get(f"{url}/api/tags", headers=HEADERS).json()["models"]]
    assert names == ["base"]
    assert post(url, "/api/show", {"model": "base:latest"}).json()["capabilities"] == ["completion", "tools"]
    tagged = post(url, "/api/chat", {**BODIES["/api/chat"], "model": "base:latest", "stream": False})
    assert tagged.json()["done"] is True


def test_ollamas_clients_need_not_say_that_they_send_json_and_web_pages_must(url, said):
    """Ollama's own examples are `curl -d`, which sends a form's type; so can a page of another origin, unasked."""
    body = json.dumps({"model": "base", "stream": False, **BODIES["/api/chat"]})
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = httpx.post(f"{url}/api/chat", content=body, headers={**HEADERS, **kind})
        assert text_in("/api/chat", answer.json()) == said
        page = httpx.post(f"{url}/api/chat", content=body, headers={**HEADERS, **kind, "origin": "http://a.page"})
        assert page.status_code == 415
    assert httpx.post(f"{url}/v1/messages", content=body, headers=HEADERS).status_code == 415


@pytest.mark.parametrize(("keep_alive", "reason"), [(None, "load"), ("5m", "load"), (0, "stop"), ("0s", "stop")])
def test_ollamas_request_for_nothing_loads_a_model_and_generates_nothing(url, serving, keep_alive, reason):
    before = serving.endpoints["base"].engine.stats()
    for path, empty in (("/api/generate", {}), ("/api/generate", {"prompt": ""}), ("/api/chat", {"messages": []})):
        answer = post(url, path, {**empty, "keep_alive": keep_alive}).json()
        assert (answer["done"], answer["done_reason"], text_in(path, answer)) == (True, reason, "")
        assert post(url, path, {**empty, "model": "none"}).status_code == 404
    assert serving.endpoints["base"].engine.stats() == before


def test_ollamas_old_embedding_is_the_new_one_of_one_text(url):
    new = post(url, "/api/embed", {"input": ["ab"], "options": {"num_ctx": 64}, "keep_alive": "5m"}).json()
    assert post(url, "/api/embeddings", {"prompt": "ab"}).json() == {"embedding": new["embeddings"][0]}


def test_somebody_is_there(url):
    """Ollama's command asks this before everything else."""
    assert httpx.head(f"{url}/", headers=HEADERS).status_code == 200


def test_what_claude_code_says_of_thoughts_and_caches_changes_nothing(url, said):
    cached = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    more = {
        "messages": [{"role": "user", "content": [cached]}],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }
    answer = post(url, "/v1/messages?beta=true", {**BODIES["/v1/messages"], **more})
    assert text_in("/v1/messages", answer.json()) == said
    for name, value in (("thinking", {"type": "enabled", "budget_tokens": 9}), ("output_config", {"effort": "low"})):
        refused = post(url, "/v1/messages", {**BODIES["/v1/messages"], name: value})
        assert refused.status_code == 400 and name in refused.json()["error"]["message"]


def test_a_limit_over_the_room_there_is_means_all_of_it_where_clients_must_send_one(url):
    answer = post(url, "/v1/messages", {**BODIES["/v1/messages"], "max_tokens": 32_000})
    assert answer.status_code == 200
    refused = post(url, "/v1/responses", {**BODIES["/v1/responses"], "max_output_tokens": 32_000})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_routes_name_the_nearest(url):
    for path, near in (("/chat/completions", "/v1/chat/completions"), ("/v1/completion", "/v1/completions")):
        message = post(url, path, {}).json()["error"]["message"]
        assert f"`{near}`" in message
    assert len({(route.path, route.method) for route in ROUTES}) == len(ROUTES)
