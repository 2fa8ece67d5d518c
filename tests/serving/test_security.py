"""The promises of docs/security.md that no other test holds; each row of its table of others' mistakes is one here."""

import dataclasses
import json
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from serving.app import make_app
from serving.auth import Keys
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import running_endpoint
from tests.serving.cluster.test_cluster import FakeFleet

KEY = "sk-the-only-one"


@pytest.fixture(scope="module")
def app(model, tokenizer) -> Iterator[FastAPI]:
    with running_endpoint(model, tokenizer, context_length=128, kv_bytes=1 << 22) as endpoint:
        yield make_app(Serving(ServeOptions(models={}, api_keys=(KEY,)), endpoints={"base": endpoint}))


def router() -> FastAPI:
    return make_router(FakeFleet([]), ClusterOptions(models=TINY, docs=True), Keys([KEY], None))


async def ask(app: FastAPI, method: str, path: str, **more) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **more)


async def test_every_route_there_is_needs_a_key(app):
    """Found by looking, so that a new route cannot be forgotten."""
    for each in (app, router()):
        routes = [(route.path, method) for route in each.routes if isinstance(route, Route) for method in route.methods]
        assert len(routes) >= 10
        for path, method in routes:
            status = (await ask(each, method, path.replace("{model}", "base"))).status_code
            assert (status != 401) == (path in ("/health", "/ready")), (path, method)


@pytest.mark.parametrize(
    "path",
    ["/v1/models/", "//v1/models", "/V1/models", "/health/", "/health/../v1/models", "/ready;v1/models", "/health%00"],
)
@pytest.mark.parametrize("host", ["test", "test/health", "health", "test/health?"])
async def test_no_spelling_of_a_path_or_host_gets_past_the_key(app, path, host):
    for each in (app, router()):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "BREW"):
            answer = await ask(each, method, path, headers={"host": host})
            assert answer.status_code == 401, (method, path, host)


async def test_nothing_in_an_answer_repeats_the_host(app):
    for each in (app, router()):
        headers = {"authorization": f"Bearer {KEY}", "host": "evil.example"}
        for path in ("/v1/models/", "/docs", "/openapi.json", "/nowhere"):
            answer = await ask(each, "GET", path, headers=headers)
            assert "evil" not in answer.text + str(answer.headers) and answer.status_code in (200, 404)
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_pages_of_other_origins_may_not_call(app):
    for each in (app, router()):
        asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        for method in ("GET", "OPTIONS"):
            answer = await ask(each, method, "/v1/models", headers={"authorization": f"Bearer {KEY}", **asked})
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "field",
    [
        "chat_template", "guided_json", "guided_regex", "guided_grammar", "guided_choice",
        "prompt_embeds", "kv_transfer_params", "mm_processor_kwargs",
    ],
)  # fmt: skip
async def test_what_hurt_others_is_no_parameter_here(app, field):
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    for path, rest in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        body = json.dumps({"model": "base", "max_tokens": 1, **rest, field: "{{ x }}"})
        answer = await ask(app, "POST", path, content=body, headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == field
        assert error["code"] in ("unknown_parameter", "unsupported_parameter")


async def test_heads_are_bounded(app):
    headers = {"x-padding": "p" * 40_000}
    answer = await ask(app, "GET", "/health", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


async def test_an_adapter_that_cannot_be_read_tells_no_path(app, tmp_path, monkeypatch):
    from mpt.engine.adapters import Adapters

    (tmp_path / "secret-place" / "broken").mkdir(parents=True)
    (tmp_path / "secret-place" / "broken" / "adapter_config.json").write_text("{")
    serving = app.state.serving
    endpoint = serving.endpoints["base"]
    adapters = Adapters({}, tmp_path / "secret-place", endpoint.engine._backend.model)
    monkeypatch.setitem(serving.endpoints, "base", dataclasses.replace(endpoint, adapters=adapters))
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    body = '{"model":"base:broken","prompt":"a"}'
    answer = await ask(app, "POST", "/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_damaged")
    assert "secret" not in answer.text
