"""The OpenAPI document against the routes: what it says they take and answer is what they take and answer."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi import FastAPI

from serving.api.answers import ANSWERS
from serving.app import make_app
from serving.docs import openapi
from serving.endpoints import Serving
from serving.options import ServeOptions
from serving.routes import ROUTES
from tests.in_process import running_endpoint

DOCUMENT = openapi(needs_key=False)
BY_NAME = {route.name: route for route in ROUTES}
KEY = "sk-the-only-one"


@pytest.fixture(scope="module")
def app(model, tokenizer, tmp_path_factory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("batches")
    with running_endpoint(model, tokenizer, context_length=1024, kv_bytes=1 << 24) as endpoint:
        yield make_app(
            Serving(ServeOptions(models={}, api_keys=(KEY,), batch_dir=folder), endpoints={"base": endpoint})
        )


async def ask(app: FastAPI, method: str, path: str, body: Any = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as client:
        return await client.request(method, path, json=body)


def check(value: Any, schema: dict[str, Any]) -> None:
    """Raises jsonschema's error where a value is not of a schema of the document."""
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def operation(name: str) -> dict[str, Any]:
    route = BY_NAME[name]
    return DOCUMENT["paths"][route.path.replace(":name}", "}")][route.method.lower()]


def schema_of(name: str, status: int, kind: str = "application/json") -> dict[str, Any]:
    return operation(name)["responses"][str(status)]["content"][kind]["schema"]


def test_every_route_is_described():
    assert ANSWERS.keys() == BY_NAME.keys()
    assert {each["operationId"] for path in DOCUMENT["paths"].values() for each in path.values()} == BY_NAME.keys()


@pytest.mark.parametrize("name", [name for name, answer in ANSWERS.items() if answer.example])
def test_an_example_is_what_the_schema_says(name):
    check(ANSWERS[name].example, schema_of(name, 200))


COME_AND_GO = ("load_model", "unload_model")  # for models that do: test_lifecycle.py
ASKED = [
    name for name, answer in ANSWERS.items() if answer.asked and "model" in answer.asked and name not in COME_AND_GO
]


@pytest.mark.parametrize("name", ASKED)
async def test_an_example_of_a_body_is_answered_as_the_schema_says(app, name):
    body = {**ANSWERS[name].asked, "model": "base"}
    check(body, operation(name)["requestBody"]["content"]["application/json"]["schema"])
    answer = await ask(app, "POST", BY_NAME[name].path, body)
    assert answer.status_code == 200, answer.text
    check(answer.json(), schema_of(name, 200))


@pytest.mark.parametrize("name", [name for name in ASKED if ANSWERS[name].piece])
async def test_the_pieces_of_a_stream_are_as_the_schema_says(app, name):
    extra = {"stream_options": {"include_usage": True, "include_progress": True}} if "completions" in name else {}
    if name in ("completions", "chat_completions"):
        extra |= {"logprobs": 2 if name == "completions" else True, "return_token_ids": True}
    answer = await ask(
        app, "POST", BY_NAME[name].path, {**ANSWERS[name].asked, "model": "base", "stream": True, **extra}
    )
    kind = answer.headers["content-type"].partition(";")[0]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith(("data: {", "{"))]
    assert len(lines) > 2
    for line in lines:
        check(json.loads(line), schema_of(name, 200, kind)["x-piece"])


FULL = {
    "completions": [{"logprobs": 2, "echo": True, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}],
    "chat_completions": [{"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True}],
    "responses": [{"include": ["message.output_text.logprobs"], "top_logprobs": 1}],
    "embeddings": [{"encoding_format": "base64"}],
    "tokenize": [{"return_token_strs": True}],
}


@pytest.mark.parametrize("name", FULL)
async def test_an_answer_with_all_that_it_can_have_is_as_the_schema_says(app, name):
    for extra in FULL[name]:
        answer = await ask(app, "POST", BY_NAME[name].path, {**ANSWERS[name].asked, "model": "base", **extra})
        assert answer.status_code == 200, answer.text
        check(answer.json(), schema_of(name, 200))


async def test_calls_of_tools_are_as_the_schema_says(app):
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    parameters["additionalProperties"] = False
    function = {"name": "lamp", "parameters": parameters}
    asked = {"model": "base", "max_tokens": 80, "seed": 1}
    chat = asked | {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}
    chat["tools"] = [{"type": "function", "function": function}]
    messages = asked | {"messages": chat["messages"], "tool_choice": {"type": "any"}}
    del messages["seed"]
    messages["tools"] = [{"name": "lamp", "input_schema": parameters}]
    for name, body in (("chat_completions", chat), ("messages", messages)):
        answer = await ask(app, "POST", BY_NAME[name].path, body)
        assert answer.status_code == 200 and "lamp" in answer.text, answer.text
        check(answer.json(), schema_of(name, 200))


LOOKED_AT = [
    name
    for name, route in BY_NAME.items()
    if route.method == "GET" and not route.path.startswith(("/v1/files", "/v1/batches"))
]


@pytest.mark.parametrize("name", LOOKED_AT)
async def test_what_is_asked_without_a_body_is_as_the_schema_says(app, name):
    path = BY_NAME[name].path.replace("{model:name}", "base")
    if "response_id" in path:
        made = (await ask(app, "POST", "/v1/responses", {**ANSWERS["responses"].asked, "model": "base"})).json()
        path = path.replace("{response_id}", made["id"])
    answer = await ask(app, "GET", path)
    assert answer.status_code == 200
    kind = answer.headers["content-type"].partition(";")[0]
    check(answer.json() if kind == "application/json" else answer.text, schema_of(name, 200, kind))


async def test_files_and_batches_are_as_the_schema_says(app):
    headers = {"authorization": f"Bearer {KEY}"}

    async def look(name: str, method: str, **ids: str) -> dict[str, Any]:
        answer = await ask(app, method, BY_NAME[name].path.format(**ids))
        assert answer.status_code == 200, answer.text
        check(answer.json(), schema_of(name, 200))
        return answer.json()

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers) as client:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": ANSWERS["completions"].asked}
        line["body"] = {**line["body"], "model": "base"}
        upload = {"file": ("asked.jsonl", json.dumps(line).encode())}
        file = (await client.post("/v1/files", data={"purpose": "batch"}, files=upload)).json()
        check(file, schema_of("create_file", 200))
        body = {**ANSWERS["create_batch"].asked, "input_file_id": file["id"], "endpoint": "/v1/completions"}
        check(body, operation("create_batch")["requestBody"]["content"]["application/json"]["schema"])
        batch = (await client.post("/v1/batches", json=body)).json()
        check(batch, schema_of("create_batch", 200))
        while (await look("batch", "GET", batch_id=batch["id"]))["status"] != "completed":
            await asyncio.sleep(0.02)
        content = await client.get(f"/v1/files/{file['id']}/content")
        assert (
            content.headers["content-type"].partition(";")[0]
            in operation("file_content")["responses"]["200"]["content"]
        )
    await look("batches", "GET")
    await look("files", "GET")
    await look("file", "GET", file_id=file["id"])
    await look("delete_file", "DELETE", file_id=file["id"])
    over = await ask(app, "POST", f"/v1/batches/{batch['id']}/cancel")
    check(over.json(), schema_of("cancel_batch", over.status_code))
    await app.state.batches.stop()
