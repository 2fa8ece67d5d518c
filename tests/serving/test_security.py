"""The promises of docs/security.md that no other test holds; each row of its table of others' mistakes is one here."""

import dataclasses
import json
import re
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
from serving.heads import Hosts
from serving.options import ServeOptions
from tests.in_process import running_endpoint
from tests.serving.cluster.test_cluster import FakeFleet

KEY = "sk-the-only-one"


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=128, kv_bytes=1 << 22) as endpoint:
        yield Serving(ServeOptions(models={}, api_keys=(KEY,)), endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def app(serving) -> FastAPI:
    return make_app(serving)


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


HEAD = {"authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "content-type", "content-encoding"])
async def test_of_two_headers_that_could_be_meant_neither_is(app, name):
    for each in (app, router()):
        twice = [*HEAD.items(), (name, "Bearer wrong"), *([] if name in HEAD else [(name, "Bearer other")])]
        for headers in (twice, twice[::-1]):
            answer = await ask(each, "GET", "/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "duplicate_header")


OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8000", "a.localhost",
       "host.docker.internal:8000", "Mine.Example:1"]  # fmt: skip
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost",
           "[::1].evil.example", "[2001:db8::1]", "10.0.0.1", "0.0.0.0", "127.0.0.1@evil.example", "", "\xff",
           "["]  # fmt: skip


@pytest.mark.parametrize("host", [*OWN, *FOREIGN])
async def test_a_page_whose_name_leads_here_is_not_answered_by_a_server_without_keys(serving, host):
    """DNS rebinding: the page's own site, which the browser names as `Host`, leads to 127.0.0.1."""
    hosts = Hosts(["mine.example"])
    open_router = make_router(FakeFleet([]), ClusterOptions(models=TINY), Keys([], None), hosts)
    for each in (make_app(serving, Keys([], None), hosts), open_router):
        for path in ("/v1/models", "/health"):
            answer = await ask(each, "GET", path, headers={"host": host.encode("latin-1")})
            assert answer.status_code == (200 if host in OWN else 403), host
            if host in FOREIGN:
                assert answer.json()["error"]["code"] == "host_not_allowed" and "evil" not in answer.text


async def test_a_request_without_a_host_is_no_browsers(serving):
    app, sent = make_app(serving, Keys([], None), Hosts()), []

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("value", [b"\xff", b"\xe9" * 9, b"a b", b"x" * 1024, b"", b"[", b"%", b"\x7f", "é".encode()])
async def test_no_header_is_a_bug(app, value):
    names = ("authorization", "x-api-key", "x-request-id", "host", "content-type", "content-encoding", "content-length",
             "origin", "accept", "x-batch-id", "x-mpt-salt", "x-mpt-lease", "x-forwarded-for", "range", "x-unknown",
             "traceparent", "expect", "connection", "cookie")  # fmt: skip
    for each in (app, router()):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/api/chat")):
            for name in names:
                headers = {name.encode(): value}
                if name not in ("authorization", "x-api-key"):
                    headers[b"authorization"] = f"Bearer {KEY}".encode()
                answer = await ask(each, method, path, content=b"[]", headers=headers)
                assert answer.status_code < 500, (path, name)
                if each is app:
                    assert re.fullmatch("[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
