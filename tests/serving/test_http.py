"""HTTP itself: what comes compressed, slowly, in pieces or under odd names, over sockets where that matters."""

import gzip
import json
import re
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import zstandard
from fastapi import FastAPI

from serving import bodies, intake, listing
from serving.app import make_app
from serving.aside import SMALL
from serving.auth import Keys
from serving.cluster import router as router_module
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.connections import Clocks, Connections, timed_protocol
from serving.dialects import anthropic, responses
from serving.encodings import unpacked
from serving.endpoints import Serving
from serving.errors import TooLarge
from serving.options import ServeOptions
from tests.in_process import listening, running_endpoint
from tests.serving.cluster.test_cluster import FakeFleet

LIMIT = 1 << 16
GOOD = b'{"model":"base","prompt":"a","max_tokens":1}'
JSON = "application/json"


@pytest.fixture(scope="module")
def serving(model, tokenizer) -> Iterator[Serving]:
    with running_endpoint(model, tokenizer, context_length=128, kv_bytes=1 << 22) as endpoint:
        options = ServeOptions(models={}, max_body_bytes=LIMIT, read_timeout_s=0.3)
        yield Serving(options, endpoints={"base": endpoint})


@pytest.fixture(scope="module")
def app(serving) -> FastAPI:
    return make_app(serving)


@pytest.fixture(scope="module")
def url(app) -> Iterator[str]:
    with listening(app, http=timed_protocol(Clocks(0.3), Connections()), timeout_keep_alive=1) as found:
        yield found


async def ask(app: FastAPI, method: str, path: str, content: bytes = b"", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.request(method, path, content=content, headers=named)


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=100) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    pieces = []
    try:
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:  # it closed before it had read what came
        pass
    return b"".join(pieces)


def request(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST /v1/completions HTTP/{version}", "host: x", "connection: close", f"content-type: {JSON}", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


# -- compressed bodies -----------------------------------------------------------------------------------------------


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate ": bare_deflate,  # which some call so
    "zstd": zstandard.compress,
    "identity": bytes,
}


@pytest.mark.parametrize("coding", PACKED)
async def test_a_compressed_body_is_read(app, coding):
    answer = await ask(app, "POST", "/v1/completions", PACKED[coding](GOOD), content_type=JSON, content_encoding=coding)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("coding", [name for name in PACKED if name != "identity"])
async def test_the_limit_is_of_what_a_body_unpacks_to(app, coding):
    bomb = PACKED[coding](b" " * (200 * LIMIT))
    assert len(bomb) < LIMIT
    refused = await ask(app, "POST", "/v1/completions", bomb, content_type=JSON, content_encoding=coding)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    fits = PACKED[coding](GOOD + b" " * (LIMIT - len(GOOD)))
    taken = await ask(app, "POST", "/v1/completions", fits, content_type=JSON, content_encoding=coding)
    assert taken.status_code == 200


@pytest.mark.parametrize("coding", [name for name in PACKED if name not in ("x-gzip", "identity")])
def test_a_body_is_not_unpacked_far_beyond_its_limit(coding):
    """Of 32 MiB no more than a few of the steps, of 1 MiB, are ever in memory, as Python counts it."""
    bomb = PACKED[coding](bytes(32 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            unpacked(bomb, coding.strip(), LIMIT)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
async def test_a_body_that_is_not_in_its_coding_is_refused(app, coding):
    for damaged in (GOOD, PACKED[coding](GOOD)[:-9], PACKED[coding](GOOD) + b"more"):
        answer = await ask(app, "POST", "/v1/completions", damaged, content_type=JSON, content_encoding=coding)
        assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_encoding", "invalid_json")


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": JSON, "content_encoding": "br"},
        {"content_type": JSON, "content_encoding": "gzip, gzip"},
        {"content_type": "text/plain"},
        {"content_type": f"{JSON}; charset=latin-1"},
        {"content_type": "application/x-www-form-urlencoded"},
        {},
    ],
)
async def test_other_types_and_codings_are_415(app, headers):
    answer = await ask(app, "POST", "/v1/completions", GOOD, **headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert ("accept-encoding" in answer.headers) == ("content_encoding" in headers)


@pytest.mark.parametrize("body", [b"\xef\xbb\xbf" + GOOD, b'{"max_tokens":7,' + GOOD[1:]], ids=["bom", "twice"])
async def test_a_byte_order_mark_is_skipped_and_of_two_fields_the_last_counts(app, body):
    answer = await ask(app, "POST", "/v1/completions", body, content_type=f"{JSON}; charset=UTF-8")
    assert answer.json()["usage"]["completion_tokens"] == 1


# -- slow, and in pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nho"])
def test_a_head_that_does_not_come_ends_the_connection(url, begun):
    with connected(url) as connection:
        connection.sendall(begun)
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 408 Request Timeout\r\n") if begun else said == b""


def test_a_second_head_that_does_not_come_ends_the_connection_too(url):
    with connected(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 200") and said.count(b"HTTP/1.1") <= 2


def test_a_body_that_does_not_come_is_408(url):
    with connected(url) as connection:
        connection.sendall(request(GOOD)[:-5])
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 408 ") and b"body_timeout" in said


def test_the_rest_of_a_body_whose_request_has_its_answer_may_not_trickle_for_ever(url):
    """Every byte would put off a clock that counts silence."""
    closed = threading.Event()
    with connected(url) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n")

        def trickle() -> None:
            try:
                while not closed.wait(0.05):
                    connection.sendall(b"x")
            except OSError:
                pass

        thread = threading.Thread(target=trickle)
        thread.start()
        said = rest(connection)
        closed.set()
        thread.join()
    assert said.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_both_versions_of_http_are_answered(url, version):
    with connected(url) as connection:
        connection.sendall(request(GOOD, version=version))
        said = rest(connection)
    assert said.startswith(b"HTTP/1.1 200 ") and b'"text_completion"' in said


def test_a_body_is_asked_for_where_its_client_waits_to_be_asked(url):
    with connected(url) as connection:
        head, _, body = request(GOOD, "expect: 100-continue").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_too_large_is_not_asked_for(url):
    with connected(url) as connection:
        head = request(b" " * (LIMIT + 1), "expect: 100-continue").partition(b"\r\n\r\n")[0]
        connection.sendall(head + b"\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_needs_no_length(url):
    head = request(b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    with connected(url) as connection:
        connection.sendall(head + b"9\r\n" + GOOD[:9] + b"\r\n")
        connection.sendall(b"%x\r\n" % len(GOOD[9:]) + GOOD[9:] + b"\r\n0\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 200 ")


# -- beside the event loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "n_steps"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}, 3),
        ("/v1/completions", {"prompt": ["a", [1, 2]], "max_tokens": 1}, 4),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, 2),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}, 3),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, 3),
        ("/v1/embeddings", {"input": ["a", "b"]}, 3),
        ("/tokenize", {"prompt": "a"}, 2),
        ("/detokenize", {"tokens": [1, 2]}, 2),
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
async def test_a_large_body_is_understood_beside_the_event_loop(app, monkeypatch, path, fields, n_steps, is_large):
    """Each step that grows with a body is followed to the thread it runs in: parsing, translating, tokenizing."""
    here, steps = threading.get_ident(), list[tuple[str, bool]]()

    def followed(name, function):
        def call(*args, **options):
            steps.append((name, threading.get_ident() == here))
            return function(*args, **options)

        return call

    endpoint = app.state.serving.endpoints["base"]
    for where, name in (
        (bodies, "parse"), (intake, "prompts_of"), (intake, "sampling_of"), (listing, "check_ids"),
        (responses, "translated"), (anthropic, "translated"), (endpoint.tokenizer, "encode"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, followed(name, getattr(where, name)))
    body = json.dumps({"model": "base", **fields}).encode()
    answer = await ask(app, "POST", path, body + b" " * (SMALL if is_large else 0), content_type=JSON)
    assert answer.status_code == 200 and len(steps) >= n_steps
    for name, is_here in steps:  # a chat is always made tokens of in a thread: its template may be slow
        assert is_here == (not is_large) or (name == "encode" and not is_here), name


async def test_a_router_understands_large_bodies_beside_its_event_loop(monkeypatch):
    """It refuses this one before it asks for a replica."""
    router = make_router(FakeFleet([]), ClusterOptions(models=TINY, replica_host="node"), Keys([], None))
    here, threads = threading.get_ident(), list[int]()
    whole = router_module.parse
    monkeypatch.setattr(router_module, "parse", lambda *args: threads.append(threading.get_ident()) or whole(*args))
    for n_more in (0, SMALL):
        body = b'{"model":"mpt-tiny","prompt":3}' + b" " * n_more
        assert (await ask(router, "POST", "/v1/completions", body, content_type=JSON)).status_code == 400
    assert [each == here for each in threads] == [True, False]


# -- methods and paths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/base", "/docs", "/openapi.json", "/health", "/load", "/api/tags", "/v1/models/no"],
)
def test_head_is_get_without_its_body(url, path):
    found = []
    for method in ("GET", "HEAD"):
        with connected(url) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            head, _, body = rest(connection).decode().partition("\r\n\r\n")
        lines = [line for line in head.splitlines() if not line.startswith(("date:", "x-request-id:"))]
        found.append((lines, body))
    assert found[0][0] == found[1][0] and found[0][1] and not found[1][1]


async def test_another_method_is_405_with_those_there_are(app):
    router = make_router(FakeFleet([]), ClusterOptions(models=TINY, docs=True, replica_host="node"), Keys([], None))
    for each in (app, router):
        for path, methods in (await ask(each, "GET", "/openapi.json")).json()["paths"].items():
            path = re.sub("{\\w+}", "x", path)
            there = {name.upper() for name in methods}
            there |= {"GET"} if path in ("/v1/models/load", "/v1/models/unload") else set()  # a model's card
            allowed = there | ({"HEAD"} if "GET" in there else set())
            for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"} - allowed:
                answer = await ask(each, method, path)
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].split(", ")) == allowed, (method, path)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/models", "/v1/models"),
        ("/v1//models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/completion", "/v1/completions"),
    ],
)
async def test_a_path_that_is_not_there_names_the_nearest(app, path, meant):
    error = (await ask(app, "GET", path)).json()["error"]
    assert error["code"] == "unknown_url" and error["message"].endswith(f"did you mean `{meant}`?")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/name", "no model `org/name`"),
        ("org%2Fname", "no model `org/name`"),
        ("base:mine", "no adapter `base:mine`"),
        ("base%3Amine", "no adapter `base:mine`"),
    ],
)
async def test_a_name_that_no_model_has_is_said_as_it_was_meant(app, name, said):
    answer = await ask(app, "GET", f"/v1/models/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert said in answer.json()["error"]["message"]


# -- what MPT does not read ------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
DONE = {"type": "tool_result", "tool_use_id": "a", "content": [BLOCK]}
SEEN = {"type": "input_image", "image_url": "data:image/png;base64,AA"}


@pytest.mark.parametrize(
    ("path", "body", "where", "kind"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0]", "image_url"),
        ("/v1/responses", {"input": [{"role": "user", "content": [SEEN]}]}, "input", "input_image"),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [BLOCK]}]}, "messages[0]", "image"),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [DONE]}]}, "[0].content", "image"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["A"]}]}, "messages[0].images", "image"),
        ("/api/generate", {"prompt": "a", "images": ["AA"]}, "`images`", "image"),
    ],
)  # fmt: skip
async def test_an_image_is_refused_by_the_place_where_it_stands(app, path, body, where, kind):
    answer = await ask(app, "POST", path, json.dumps({"model": "base", **body}).encode(), content_type=JSON)
    said = answer.json()["error"]
    message = said if isinstance(said, str) else said["message"]
    assert answer.status_code == 400
    assert where in message and kind in message and "MPT reads text only" in message


@pytest.mark.parametrize("content", [[3], 3, {"type": "text"}])
async def test_a_result_of_a_tool_that_is_no_text_is_refused(app, content):
    block = {"type": "tool_result", "tool_use_id": "a", "content": content}
    body = {"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": [block]}]}
    answer = await ask(app, "POST", "/v1/messages", json.dumps(body).encode(), content_type=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, 2**64, 2**70, -(2**70)])
async def test_a_seed_outside_64_bits_is_refused_with_its_range(app, value):
    for path, rest_of in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    ):
        body = json.dumps({"model": "base", "seed": value, **rest_of}).encode()
        answer = await ask(app, "POST", path, body, content_type=JSON)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")
        assert str(2**63) in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", [2**64, 2**70, -(2**70), 1e300])
async def test_numbers_over_64_bits_are_no_bug(app, value):
    for name in ("max_tokens", "min_tokens", "n", "top_k", "logprobs", "priority", "best_of", "truncate_prompt_tokens"):
        body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1, name: value}).encode()
        answer = await ask(app, "POST", "/v1/completions", body, content_type=JSON)
        assert answer.status_code == 400 or (name in ("top_k", "truncate_prompt_tokens") and value > 0), name
