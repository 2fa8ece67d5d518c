"""`mpt-tiny-chat` with the two functions it was trained to call, left to choose: whole, streamed, by client."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mpt.engine.endpoint import open_endpoint
from mpt.options import ModelOptions
from mpt.toy_tools import as_openai
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import listening

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
NAME = "mpt-tiny-chat"
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How it is outside."}}


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    options = ServeOptions(models={NAME: ModelOptions(NAME, kv_gb=0.2)})
    endpoint = open_endpoint(NAME, options.models[NAME], 1)
    yield Serving(options, endpoints={NAME: endpoint})
    endpoint.engine.close()


@pytest.fixture
async def client(serving) -> Any:
    transport = httpx.ASGITransport(make_app(serving))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=100) as client:
        yield client


def body(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": messages, "tools": as_openai(), "temperature": 0, **more}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


async def answered(client, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=body(*messages, **more))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == ("tool_calls" if choice["message"].get("tool_calls") else "stop")
    return choice["message"]


def called(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize(
    ("question", "call"),
    [
        ("What time is it in Oslo?", ("get_time", {"city": "Oslo"})),
        ("What is 17 times 42?", ("calculate", {"expression": "17 * 42"})),
    ],
)
async def test_a_question_leads_to_a_call_and_its_result_to_an_answer(client, question, call):
    message = await answered(client, user(question))
    assert called(message) == [call] and not message["content"]
    # A result that the model cannot know, so the answer is read from it.
    result = {
        "role": "tool",
        "tool_call_id": message["tool_calls"][0]["id"],
        "content": "07:53" if "time is" in question else "3518",
    }
    answer = await answered(client, user(question), message, result)
    assert result["content"] in answer["content"] and not called(answer)


async def test_no_function_is_called_where_none_is_needed(client):
    assert called(await answered(client, user("Hello"))) == []
    told = [user("Hi, my name is Greta"), {"role": "assistant", "content": "Hello Greta! Nice to meet you."}]
    answer = await answered(client, *told, user("What is my name?"))
    assert "Greta" in answer["content"] and not called(answer)


async def test_only_what_is_declared_is_called(client):
    clock, calculator = as_openai()
    for tools in ([WEATHER], [WEATHER, calculator], [clock]):
        question = "What is 17 times 42?" if clock in tools else "What time is it in Oslo?"
        message = await answered(client, user(question), tools=tools)
        assert not called(message) and message["content"]
    message = await answered(client, user("What time is it in Oslo?"), tools=[calculator, WEATHER, clock])
    assert called(message) == [("get_time", {"city": "Oslo"})]


async def test_a_stream_gives_the_same_call(client):
    question = user("What time is it in Oslo?")
    response = await client.post("/v1/chat/completions", json=body(question, stream=True))
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls") or []]
    assert [function["name"] for function in functions if function.get("name")] == ["get_time"]
    assert json.loads("".join(function.get("arguments", "") for function in functions)) == {"city": "Oslo"}
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_example_of_the_page_runs(serving):
    """The page's program, word for word but for the port, prints what the page says."""
    program, printed = re.search(
        r"```python\n(import openai\n.*?toy_tools.*?)```\n\n```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    ).groups()
    out = io.StringIO()
    with listening(make_app(serving), log_level="warning") as url, contextlib.redirect_stdout(out):
        exec(program.replace("http://127.0.0.1:8000", url), {})
    assert out.getvalue() == printed
