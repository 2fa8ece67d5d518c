"""Functions over HTTP: what a request declares, calls that are forced, and calls found in what a model says."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from mpt.engine.endpoint import Endpoint
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import listening, running_endpoint

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
DICE = {"type": "function", "function": {"name": "dice"}}
ASKED = [{"role": "user", "content": "Time?"}]


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=2048, kv_bytes=1 << 25) as endpoint:
        yield Serving(ServeOptions(models={}), endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def client(serving) -> Iterator[openai.OpenAI]:
    with listening(make_app(serving), log_level="warning") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        model="base", messages=more.pop("messages", ASKED), tools=more.pop("tools", [CLOCK, DICE]), seed=1, **more
    )


def test_a_forced_call_has_arguments_of_its_schema(client):
    for choice, reason in (
        ({"type": "function", "function": {"name": "clock"}}, "stop"),  # OpenAI's: a named call ends with `stop`
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "clock"}}]}}, "tool_calls"),
    ):  # fmt: skip
        answer = ask(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert answer.finish_reason == reason and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.type == "function" and call.function.name == "clock"
        assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")


def test_a_required_call_is_one_of_the_functions_and_streams_as_openai_streams(client):
    whole = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls[0].function
    with client.chat.completions.stream(
        model="base", messages=ASKED, tools=[CLOCK, DICE], tool_choice="required", parallel_tool_calls=False, seed=1
    ) as stream:
        final = stream.get_final_completion().choices[0]
    (call,) = final.message.tool_calls
    assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)
    assert final.finish_reason == "tool_calls"


def test_a_cut_call_says_so(client):
    answer = ask(client, tool_choice="required", max_tokens=45).choices[0]
    assert answer.finish_reason == "length"


def test_without_functions_and_with_none_nothing_is_told_to_the_model(client):
    plain = ask(client, tools=[], max_tokens=1).usage.prompt_tokens
    assert ask(client, tool_choice="none", max_tokens=1).usage.prompt_tokens == plain
    assert ask(client, max_tokens=1).usage.prompt_tokens > plain + 100


SAID = 'Wait.\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'


@pytest.fixture
def says(serving, monkeypatch) -> Callable[[str], None]:
    """Makes the model say a text, whatever it computes: an answer that calls by itself."""
    endpoint: Endpoint = serving.endpoints["base"]
    backend, eos = endpoint.engine._backend, endpoint.tokenizer.eos_id
    forward = backend.forward

    def say(text: str) -> None:
        ids = iter(endpoint.tokenizer.encode(text))

        def scripted(work):
            logits = torch.full_like(forward(work), -50.0)
            for row in logits:
                row[next(ids, eos)] = 50.0
            return logits

        monkeypatch.setattr(backend, "forward", scripted)

    return say


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_makes_by_itself_is_found(client, says, stream):
    says(SAID)
    if stream:
        deltas = [chunk.choices[0] for chunk in ask(client, temperature=0, stream=True)]
        content = "".join(each.delta.content or "" for each in deltas)
        calls = [call for each in deltas for call in each.delta.tool_calls or ()]
        name, reason = calls[0].function.name, deltas[-1].finish_reason
        arguments = "".join(call.function.arguments or "" for call in calls)
        assert calls[0].id and all(call.id is None for call in calls[1:]) and len(calls) > 2
    else:
        answer = ask(client, temperature=0).choices[0]
        content, reason = answer.message.content, answer.finish_reason
        (call,) = answer.message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert (content, name, arguments, reason) == ("Wait.", "clock", '{"zone": "UTC"}', "tool_calls")


def test_what_looks_like_a_call_is_text_where_no_function_is_declared(client, says):
    says(SAID)
    answer = ask(client, temperature=0, tools=[]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (SAID, "stop")


@pytest.mark.parametrize("strict", [False, True])
def test_a_strict_function_binds_what_the_model_does_by_itself(client, says, strict):
    """Text may stand around the call; its arguments are of the schema, though the model meant others."""
    says(SAID.replace("UTC", "XYZ"))
    tool = {"type": "function", "function": {**CLOCK["function"], "strict": strict}}
    answer = ask(client, tools=[tool], max_tokens=120, temperature=0).choices[0].message
    zone = json.loads(answer.tool_calls[0].function.arguments)["zone"]
    assert answer.content.startswith("Wait.") and (zone in ("UTC", "CET")) is strict


def test_calls_and_results_go_back_to_the_model(client):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert ask(client, messages=messages, max_tokens=2).usage.completion_tokens > 0


def test_json_or_a_call_is_what_the_answer_is_with_both(client):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": {"a": 1}}}}
    answer = ask(client, response_format=form, tools=[CLOCK]).choices[0].message
    assert answer.tool_calls or json.loads(answer.content) == {"a": 1}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [DICE] * 129}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "tool_choice": "required"}, "structured_outputs.regex"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "a", "parameters": {"type": "object", "x-guidance": {}}}}]}, "tools"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "a", "parameters": {"type": "nonsense"}}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"function": {"name": "clock"}}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content"),
    ],
)  # fmt: skip
async def test_bad_declarations_are_refused_by_name(serving, more, param):
    body = {"model": "base", "messages": ASKED, "tools": [CLOCK], **more}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize("where", ["description", "arguments"])
async def test_tools_that_cannot_fit_are_refused_before_they_are_read(serving, monkeypatch, where):
    """A description of 20 MB took half a minute to tokenize."""
    monkeypatch.setattr("serving.intake.encode_chat", None)  # not to be reached
    long = "word " * 10_000
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": long}}
    body = {"model": "base", "messages": ASKED, "tools": [CLOCK]}
    if where == "arguments":
        body["messages"] = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
    else:
        body["tools"] = [{"type": "function", "function": {"name": "clock", "description": long}}]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_an_image_is_refused_in_words(serving):
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    body = {"model": "base", "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(serving)), base_url="http://test") as client:
        message = (await client.post("/v1/chat/completions", json=body)).json()["error"]["message"]
    assert "part 1" in message and "`image_url`" in message and "text only" in message
