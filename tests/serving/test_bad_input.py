"""Bodies nobody should send: each is refused with the right status, code and field, and reaches no engine."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.protocol.body import parse
from serving.protocol.generation import CompletionRequest
from serving.protocol.sampling import sampling_of
from tests.in_process import running_endpoint

LIMIT = 1 << 16
MISSING = "missing_required_parameter"
SCHEMA = "response_format.json_schema"
GOOD = '"model":"base","prompt":"a","max_tokens":1'


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=128, kv_bytes=1 << 22) as endpoint:
        yield Serving(ServeOptions(models={}, max_body_bytes=LIMIT), endpoints={"base": endpoint})


async def send(serving: Serving, content: str | bytes, path: str, kind: str = "application/json") -> httpx.Response:
    transport = httpx.ASGITransport(make_app(serving))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ("", "invalid_json", None),
        ("{", "invalid_json", None),
        ("[]", "invalid_json", None),
        (b"\xff{}", "invalid_json", None),
        ("[" * 15_000, "invalid_json", None),
        (f'{{{GOOD},"temperature":NaN}}', "invalid_json", None),
        (f'{{{GOOD},"temperature":Infinity}}', "invalid_json", None),
        (f'{{{GOOD},"temperature":1e400}}', "invalid_json", None),
        (f'{{{GOOD},"seed":{"9" * 5000}}}', "invalid_json", None),
        (f'{{{GOOD},"stop":"\\ud800"}}', "invalid_json", None),
        (f'{{{GOOD},"n":true}}', "invalid_type", "n"),
        (f'{{{GOOD},"n":"16"}}', "invalid_type", "n"),
        (f'{{{GOOD},"n":1.5}}', "invalid_type", "n"),
        (f'{{{GOOD},"n":{"[" * 100}{"]" * 100}}}', "invalid_type", "n"),
        (f'{{"model":"base","prompt":[{"[" * 100}{"]" * 100}]}}', "invalid_type", "prompt[0][0]"),
        (f'{{{GOOD},"logit_bias":{{"{"0" * 5000}":1}}}}', "invalid_value", "logit_bias"),
        (f'{{{GOOD},"logit_bias":{{"000000000000260":1}}}}', "invalid_value", "logit_bias"),
        (f'{{{GOOD},"n":129}}', "invalid_value", "n"),
        (f'{{{GOOD},"n":0}}', "invalid_value", "n"),
        (f'{{{GOOD},"temperature":-0.1}}', "invalid_value", "temperature"),
        (f'{{{GOOD},"temperature":"hot"}}', "invalid_type", "temperature"),
        (f'{{{GOOD},"top_p":1.1}}', "invalid_value", "top_p"),
        (f'{{{GOOD},"logprobs":21}}', "invalid_value", "logprobs"),
        (f'{{{GOOD},"best_of":1,"n":2}}', "invalid_value", "best_of"),
        (f'{{{GOOD},"best_of":2,"stream":true}}', "invalid_value", "best_of"),
        (f'{{{GOOD},"stop":[""]}}', "invalid_value", "stop"),
        (f'{{{GOOD},"stop":{json.dumps(["x"] * 17)}}}', "invalid_value", "stop"),
        (f'{{{GOOD},"stop":"{"x" * 1001}"}}', "invalid_value", "stop"),
        (f'{{{GOOD},"stop_token_ids":[260]}}', "invalid_value", "stop_token_ids"),
        (f'{{{GOOD},"logit_bias":{{"-1":1}}}}', "invalid_value", "logit_bias"),
        (f'{{{GOOD},"logit_bias":{{"260":1}}}}', "invalid_value", "logit_bias"),
        (f'{{{GOOD},"logit_bias":{{"5":101}}}}', "invalid_value", "logit_bias"),
        (f'{{{GOOD},"min_tokens":2}}', "invalid_value", "min_tokens"),
        (f'{{{GOOD},"stream_options":{{}}}}', "invalid_value", "stream_options"),
        (f'{{{GOOD},"tempratur":1}}', "unknown_parameter", "tempratur"),
        (f'{{{GOOD},"messages":[]}}', "unknown_parameter", "messages"),
        (f'{{{GOOD},"tools":[{{}}]}}', "unsupported_parameter", "tools"),
        (f'{{{GOOD},"suffix":"x"}}', "unsupported_parameter", "suffix"),
        (f'{{{GOOD},"response_format":{{"type":"yaml"}}}}', "invalid_value", "response_format.type"),
        (f'{{{GOOD},"response_format":{{"type":"json_schema"}}}}', MISSING, SCHEMA),
        (
            f'{{{GOOD},"response_format":{{"type":"json_schema","json_schema":{{"name":"x"}}}}}}',
            MISSING,
            f"{SCHEMA}.schema",
        ),
        (
            f'{{{GOOD},"response_format":{{"type":"json_object","json_schema":{{"name":"x","schema":{{}}}}}}}}',
            "invalid_value",
            SCHEMA,
        ),
        (f'{{{GOOD},"structured_outputs":{{}}}}', "invalid_value", "structured_outputs"),
        (f'{{{GOOD},"structured_outputs":{{"regex":"a","choice":["a"]}}}}', "invalid_value", "structured_outputs"),
        (f'{{{GOOD},"structured_outputs":{{"regex":"["}}}}', "invalid_value", "structured_outputs.regex"),
        (f'{{{GOOD},"structured_outputs":{{"choice":[]}}}}', "invalid_value", "structured_outputs.choice"),
        (f'{{{GOOD},"structured_outputs":{{"choice":["a",""]}}}}', "invalid_value", "structured_outputs.choice"),
        (f'{{{GOOD},"structured_outputs":{{"choice":[1]}}}}', "invalid_type", "structured_outputs.choice[0]"),
        (
            f'{{{GOOD},"structured_outputs":{{"structural_tag":"a"}}}}',
            "invalid_value",
            "structured_outputs.structural_tag",
        ),
        (
            f'{{{GOOD},"structured_outputs":{{"regex":"a"}},"response_format":{{"type":"json_object"}}}}',
            "invalid_value",
            "structured_outputs",
        ),
        (f'{{{GOOD},"min_tokens":1,"response_format":{{"type":"json_object"}}}}', "invalid_value", "min_tokens"),
        (f'{{{GOOD},"ignore_eos":true,"response_format":{{"type":"json_object"}}}}', "invalid_value", "ignore_eos"),
        (f'{{{GOOD},"guided_json":{{}}}}', "unsupported_parameter", "guided_json"),
        (f'{{{GOOD},"priority":101}}', "invalid_value", "priority"),
        (f'{{{GOOD},"priority":"high"}}', "invalid_type", "priority"),
        ('{"model":"base"}', "missing_required_parameter", "prompt"),
        ('{"model":"base","prompt":[]}', "invalid_value", "prompt"),
        ('{"model":"base","prompt":3}', "invalid_type", "prompt"),
        ('{"model":"base","prompt":[1,"a"]}', "invalid_type", "prompt[1]"),
        ('{"model":"base","prompt":["a",1]}', "invalid_type", "prompt[1]"),
        ('{"model":"base","prompt":["a",[1,null]]}', "invalid_type", "prompt[1][1]"),
        ('{"model":"base","prompt":[true]}', "invalid_type", "prompt[0]"),
        ('{"model":"base","prompt":[260]}', "invalid_prompt", "prompt"),
        ('{"model":"base","prompt":[[-1]]}', "invalid_prompt", "prompt"),
        (json.dumps({"model": "base", "prompt": ["a"] * 2049}), "invalid_value", "prompt"),
        ('{"model":"base","prompt":"a","max_tokens":128}', "context_length_exceeded", "prompt"),
        (json.dumps({"model": "base", "prompt": "é" * 5000}), "context_length_exceeded", "prompt"),
    ],
)
async def test_a_bad_completion_is_refused_by_name(serving, content, code, param):
    response = await send(serving, content, "/v1/completions")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    if code == "context_length_exceeded":  # the sentence of OpenAI's that litellm's fallbacks look for
        assert error["message"].startswith("This model's maximum context length is 128 tokens. However, you")
    assert serving.endpoints["base"].engine.stats().n_running == 0


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "invalid_value", "messages"),
        ("hi", "invalid_type", "messages"),
        ([{"role": "user"}], "missing_required_parameter", "messages[0].content"),
        ([{"role": "robot", "content": "x"}], "invalid_value", "messages[0].role"),
        ([{"role": "user", "content": 3}], "invalid_type", "messages[0].content"),
        ([{"role": "user", "content": "x" * 4000}], "context_length_exceeded", "messages"),
    ],
)
async def test_bad_messages_are_refused_by_name(serving, messages, code, param):
    body = json.dumps({"model": "base", "messages": messages})
    error = (await send(serving, body, "/v1/chat/completions")).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("path", "rest"), [("/v1/completions", '"prompt":"a","max_tokens":1'), ("/tokenize", '"prompt":"a"')]
)
async def test_a_model_may_be_left_out_where_there_is_one(serving, path, rest):
    """As with vLLM, whose clients (lm-evaluation-harness's tokenizer) do."""
    for body in (f"{{{rest}}}", f'{{{rest},"model":null}}'):
        assert (await send(serving, body, path)).status_code == 200
    two = Serving(serving.options, endpoints={**serving.endpoints, "other": serving.endpoints["base"]})
    error = (await send(two, f"{{{rest}}}", path)).json()["error"]
    assert (error["code"], error["param"]) == (MISSING, "model")


async def test_a_prompt_and_its_answer_may_fill_the_context(serving):
    body = '{"model":"base","prompt":[5],"max_tokens":127,"ignore_eos":true}'
    response = await send(serving, body, "/v1/completions")
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] == 128


async def test_scores_of_prompts_are_bounded(serving, monkeypatch):
    monkeypatch.setattr("serving.intake._MAX_SCORES", 60)
    body = {"model": "base", "prompt": ["abc", "de"], "echo": True, "max_tokens": 0}  # a token a byte: 5
    fits = await send(serving, json.dumps({**body, "logprobs": 12}), "/v1/completions")
    assert fits.status_code == 200
    refused = (await send(serving, json.dumps({**body, "logprobs": 13}), "/v1/completions")).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_value", "logprobs")
    assert "65" in refused["message"]
    assert "60" in refused["message"]


async def test_every_reference_of_the_schema_resolves(serving):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        document = (await client.get("/openapi.json")).json()
        page = (await client.get("/docs")).text
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references >= {
        "CompletionRequest", "ChatRequest", "TokenizeRequest", "ChatMessage", "ToolDeclaration", "StreamOptions",
        "ResponsesRequest", "MessagesRequest", "OllamaChatRequest", "EmbeddingRequest",
    }  # fmt: skip
    assert references <= set(document["components"]["schemas"])
    assert "<code>max_completion_tokens</code>" in page


async def test_fields_that_ask_for_nothing_are_accepted(serving):
    extra = '"user":"u","metadata":{"a":"b"},"store":false,"tools":[],"suffix":null,"stop":null,"logprobs":null'
    extra += ',"n":null,"repetition_penalty":1.0,"response_format":{"type":"text"},"top_k":-1'
    assert (await send(serving, f"{{{GOOD},{extra}}}", "/v1/completions")).status_code == 200


@pytest.mark.parametrize(("given", "priority"), [("-3", -3), ("null", 0)])
def test_a_priority_reaches_the_engine(given, priority):
    asked = parse(CompletionRequest, f'{{{GOOD},"priority":{given}}}'.encode())
    assert sampling_of(asked, 1, 260).priority == priority


async def test_unknown_fields_inside_a_message_are_accepted(serving):
    body = {
        "model": "base",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "x", "name": "n", "refusal": None}],
    }
    assert (await send(serving, json.dumps(body), "/v1/chat/completions")).status_code == 200


async def test_size_and_type_are_refused_before_parsing(serving):
    large = await send(serving, "{" + " " * LIMIT, "/v1/completions")
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    text = await send(serving, f"{{{GOOD}}}", "/v1/completions", kind="text/plain")
    assert (text.status_code, text.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_a_text_is_measured_before_it_is_tokenized(serving):
    error = (await send(serving, json.dumps({"model": "base", "prompt": "a" * 4000}), "/tokenize")).json()["error"]
    assert error["code"] == "context_length_exceeded"


async def test_made_up_methods_make_no_new_metrics(serving):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        for n in range(3):
            await client.request(f"MADEUP{n}", "/v1/completions")
        text = (await client.get("/metrics")).text
    others = [line for line in text.splitlines() if "http_requests_total{" in line and 'method="other"' in line]
    assert "MADEUP" not in text and [float(line.split()[-1]) for line in others] == [3.0]


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_the_access_log_says_what_a_request_cost_and_not_what_it_said(serving, caplog, stream):
    with caplog.at_level("INFO", "serving.access"):
        content = f'{{"model":"base","prompt":"secretly","max_tokens":3,"ignore_eos":true,"stream":{stream}}}'
        await send(serving, content, "/v1/completions")
    line = caplog.records[-1].getMessage()
    for part in (
        "model=base",
        "finish_reason=length",
        "prompt_tokens=8",
        "completion_tokens=3",
        "ttft_s=0.",
        "status=200",
    ):
        assert part in line
    assert "queue_s=0." in line and "secretly" not in line


@pytest.mark.parametrize("body_came", [True, False])
async def test_a_client_that_left_is_logged_as_499_and_not_as_a_bug(serving, caplog, body_came):
    body = {"type": "http.request", "body": b'{"model":"base","prompt":"a","max_tokens":100,"ignore_eos":true}'}
    messages = [*([body] if body_came else []), {"type": "http.disconnect"}]
    sent = []

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send_on(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
    scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1"}
    with caplog.at_level("INFO", "serving"):
        await make_app(serving)(scope, receive, send_on)
    assert sent == []
    assert ["status=499" in record.getMessage() for record in caplog.records if record.name.startswith("serving")] == [
        True
    ]


async def test_wrong_urls_and_methods_have_openais_body(serving):
    transport = httpx.ASGITransport(make_app(serving))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        nowhere, method = await client.get("/v2"), await client.get("/v1/completions")
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "unknown_url")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    assert method.headers["allow"] == "POST"


async def test_while_draining_and_loading_requests_are_503(serving):
    leaving = Serving(serving.options, endpoints=serving.endpoints, draining=True)
    loading = Serving(serving.options, loading={"base"})
    for state, code in ((leaving, "shutting_down"), (loading, "model_loading")):
        response = await send(state, f"{{{GOOD}}}", "/v1/completions")
        assert (response.status_code, response.json()["error"]["code"]) == (503, code)
        assert "retry-after" in response.headers


async def test_a_bug_is_a_500_that_tells_nothing(serving, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr("serving.intake.sampling_of", broken)
    response = await send(serving, f"{{{GOOD}}}", "/v1/completions")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "secret" not in response.text and response.headers["x-request-id"] in error["message"]
    assert response.headers["x-should-retry"] == "false"
