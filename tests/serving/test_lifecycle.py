"""Models that come and go: loaded when asked for, shared while they load, unloaded without a trace."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import torch

import mpt
from mpt.config import MPTConfig
from mpt.engine.endpoint import open_endpoint
from mpt.engine.room import room_for
from mpt.errors import MPTError, UserError
from mpt.generation import generate
from mpt.memory import Memory
from mpt.options import ModelOptions
from serving import cli
from serving.api import shapes
from serving.app import make_app
from serving.cards import card_of
from serving.cluster.options import TINY, ClusterOptions, read_args
from serving.endpoints import Serving
from serving.lifecycle import _for_clients
from serving.models_dir import checkpoints_in
from serving.options import ServeOptions, seconds
from tests.in_process import listening
from tests.serving import servers
from tests.serving.test_adapters import make as make_adapter

NAMES = ("a", "b", "c")
GREEDY = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def folders(model, tokenizer, tmp_path_factory) -> Path:
    """Three copies of the toy model, under three names."""
    root = tmp_path_factory.mktemp("models")
    first = mpt.save(model, root / NAMES[0], tokenizer=tokenizer)
    for name in NAMES[1:]:
        shutil.copytree(first, root / name)
    return root


class Gate:
    """In place of `open_endpoint`: notes what is opened, and opens it when it is let."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.may = threading.Event()

    def __call__(self, name, *arguments):
        self.opened.append(name)
        assert self.may.wait(100)
        return open_endpoint(name, *arguments)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    made = Gate()
    made.may.set()
    monkeypatch.setattr("serving.lifecycle.open_endpoint", made)
    yield made
    made.may.set()


@pytest.fixture
def serve(folders, gate) -> Iterator[Callable[..., Serving]]:
    """A server's models, none of them loaded, whose idle time is told by `now`."""
    made: list[Serving] = []

    def run(root: Path = folders, max_waiting: int = 256, **options) -> Serving:
        models = {
            name: ModelOptions(str(root / name), device="cpu", max_waiting=max_waiting, kv_gb=0.01) for name in NAMES
        }
        serving = Serving(ServeOptions(models=models, load="on-request", **options))
        serving.now = 0.0
        serving.lifecycle.clock = lambda: serving.now
        made.append(serving)
        return serving

    yield run
    gate.may.set()
    for serving in made:
        for endpoint in serving.endpoints.values():
            endpoint.engine.close()


def client_of(serving: Serving, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(serving))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=100)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.002)


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    return {card["id"]: card["state"] for card in (await client.get("/v1/models")).json()["data"]}


async def ask(client: httpx.AsyncClient, name: str, **fields: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": name, **GREEDY, **fields})


async def sample(client: httpx.AsyncClient, line: str) -> float | None:
    """A sample of /metrics, None where there is none."""
    found = [text for text in (await client.get("/metrics")).text.splitlines() if text.startswith(f"{line} ")]
    return float(found[0].rpartition(" ")[2]) if found else None


def test_for_its_card_a_model_that_no_catalog_has_is_fetched(monkeypatch, tmp_path):
    def snapshot(repo_id: str, **_: object) -> str:
        raise OSError(f"no room for {repo_id}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    with pytest.raises(MPTError, match="no room for someone/x"):
        card_of("served", ModelOptions(root="someone/x"))


# -- loaded when asked for ---------------------------------------------------------------------------------------------


async def test_a_model_is_loaded_by_its_first_request_and_listed_before(serve, model):
    serving = serve()
    await serving.lifecycle.check_all()
    async with client_of(serving) as client:
        assert (await client.get("/ready")).status_code == (await client.get("/health")).status_code == 200
        listed = (await client.get("/v1/models")).json()
        shapes.Models.model_validate(listed)
        cards = listed["data"]
        assert [(card["id"], card["state"], card["context_length"], card["runs"]) for card in cards] == [
            (name, "unloaded", 2048, None) for name in NAMES
        ]
        assert (await client.get("/v1/models/b")).json() == cards[1]
        assert (await client.get("/api/ps")).json() == {"models": []}
        assert serving.takes_priority("a") and not serving.takes_priority("d")  # for batches
        assert await sample(client, 'mpt_engine_up{model_name="a"}') is None
        answer = (await ask(client, "a")).json()
        assert answer["choices"][0]["token_ids"] == generate(model, [5, 6, 7], 8)
        assert await states(client) == {"a": "loaded", "b": "unloaded", "c": "unloaded"}
        assert (await client.get("/v1/models/a")).json()["runs"]["backend"] == "torch"
        assert [each["name"] for each in (await client.get("/api/ps")).json()["models"]] == ["a"]
        assert [each["name"] for each in (await client.get("/api/tags")).json()["models"]] == list(NAMES)
        assert (await client.get("/ready")).status_code == 200
        assert await sample(client, 'mpt_model_loaded{model_name="a"}') == 1
        assert await sample(client, 'mpt_model_loaded{model_name="b"}') == 0
        assert await sample(client, 'mpt_model_load_seconds_count{model_name="a"}') == 1
        assert await sample(client, 'mpt_engine_up{model_name="a"}') == 1
        unknown = await ask(client, "d", stream=True)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "`a`, `b`, `c`" in unknown.json()["error"]["message"]


async def test_every_route_that_needs_a_model_waits_for_it(serve, gate):
    bodies = {
        "/tokenize": {"prompt": "ab"},
        "/detokenize": {"tokens": [5]},
        "/v1/embeddings": {"input": [5, 6]},
        "/api/generate": {"prompt": "a", "raw": True, "options": {"num_predict": 1}},
    }
    for path, body in bodies.items():
        async with client_of(serve()) as client:
            assert (await client.post(path, json={"model": "a", **body})).status_code == 200, path
    async with client_of(serve()) as client:
        assert (await client.get("/tokenizer_info", params={"model": "a"})).status_code == 200
    assert gate.opened == ["a"] * 5


async def test_requests_for_a_model_that_loads_share_the_load(serve, gate):
    gate.may.clear()
    serving = serve()
    async with client_of(serving) as client:
        asking = [asyncio.create_task(ask(client, "a")) for _ in range(5)]
        await until(lambda: serving.lifecycle.models["a"].n_waiting == 5)
        assert await states(client) == {"a": "loading", "b": "unloaded", "c": "unloaded"}
        assert await sample(client, 'mpt_model_requests_waiting_for_load{model_name="a"}') == 5
        gate.may.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 5
    assert gate.opened == ["a"]


async def test_no_more_than_max_waiting_wait_and_others_are_told(serve, gate):
    gate.may.clear()
    serving = serve(max_waiting=2)
    async with client_of(serving) as client:
        asking = [asyncio.create_task(ask(client, "a")) for _ in range(2)]
        await until(lambda: serving.lifecycle.models["a"].n_waiting == 2)
        refused = await ask(client, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
        gate.may.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]


async def test_waiting_is_part_of_a_request_s_time(serve, gate):
    gate.may.clear()
    async with client_of(serve(request_timeout_s=0.05)) as client:
        late = await ask(client, "a")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")


@pytest.fixture
def url(serve) -> Iterator[tuple[str, Serving]]:
    serving = serve(keep_alive_s=0.02, model_loading=frozenset({"all"}))
    with listening(make_app(serving), log_level="critical", ws="none") as found:
        yield found, serving


async def test_ollama_unloads_for_a_client_that_may_and_loads_nothing_to_do_so(serve):
    for allowed, reason, state in ((frozenset({"all"}), "unload", "unloaded"), (frozenset(), "stop", "loaded")):
        serving = serve(model_loading=allowed)
        async with client_of(serving) as client:
            body = {"model": "a", "keep_alive": 0}
            first = await client.post("/api/generate", json=body)
            assert (first.json()["done_reason"], serving.lifecycle.state("a")) == (reason, "unloaded")
            assert (await ask(client, "a")).status_code == 200
            again = await client.post("/api/generate", json=body)
        assert (again.json()["done_reason"], serving.lifecycle.state("a")) == (reason, state)


def test_a_stream_is_kept_alive_until_its_model_is_there(url, gate):
    where, _ = url
    gate.may.clear()
    messages = [{"role": "user", "content": "a"}]
    bodies = {
        "/v1/completions": {"model": "a", **GREEDY, "stream": True},
        "/v1/messages": {"model": "b", "messages": messages, "max_tokens": 2, "stream": True},
        "/v1/chat/completions": {"model": "b", "messages": messages, "max_tokens": 5000, "stream": True},
    }
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=where, timeout=100))
        streams = [stack.enter_context(client.stream("POST", path, json=body)) for path, body in bodies.items()]
        lines = [stream.iter_lines() for stream in streams]
        for stream, each in zip(streams, lines, strict=True):
            assert stream.status_code == 200
            assert [line for _ in range(2) for line in (next(each), next(each))] == [": keep-alive", ""] * 2
        gate.may.set()
        ended = [[line for line in each if line and not line.startswith(":")] for each in lines]
    completion, message, refused = ended
    ids = [token for line in completion[:-1] for token in json.loads(line[6:])["choices"][0].get("token_ids", ())]
    assert completion[-1] == "data: [DONE]" and len(ids) == 8
    assert message[0] == "event: message_start" and message[-2] == "event: message_stop"
    (only,) = refused  # what is found out only once the model is there
    assert json.loads(only[6:])["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(url, gate, stream):
    where, serving = url
    gate.may.clear()
    body = json.dumps({"model": "a", **GREEDY, "stream": stream}).encode()
    host, port = where.removeprefix("http://").split(":")
    waiting = serving.lifecycle.models["a"]
    with socket.create_connection((host, int(port))) as gone:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        gone.sendall(head.encode() + b"\r\n\r\n" + body)
        asyncio.run(until(lambda: waiting.n_waiting == 1 and gate.opened == ["a"]))
    asyncio.run(until(lambda: waiting.n_waiting == 0))
    gate.may.set()
    asyncio.run(until(lambda: serving.lifecycle.state("a") == "loaded"))
    stats = serving.endpoints["a"].engine.stats()
    assert (waiting.n_held, stats.n_running, stats.n_waiting, stats.n_steps) == (0, 0, 0, 0)


async def test_a_load_that_nobody_waits_for_any_more_is_not_begun(serve, gate):
    gate.may.clear()
    serving = serve()
    async with client_of(serving) as client:
        first = asyncio.create_task(ask(client, "a"))
        await until(lambda: gate.opened == ["a"])
        with serving.lifecycle.holding() as hold:
            second = asyncio.create_task(serving.lifecycle.get("b", hold))
            await until(lambda: serving.lifecycle.models["b"].n_waiting == 1)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        gate.may.set()
        assert (await first).status_code == 200
        await until(lambda: serving.lifecycle.models["b"].outcome is None)
    assert gate.opened == ["a"]


async def test_a_load_that_fails_is_told_to_each_who_waits_and_may_be_tried_again(serve, gate, folders, tmp_path):
    for name in NAMES:
        shutil.copytree(folders / name, tmp_path / name)
    weights = tmp_path / "a" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    gate.may.clear()
    serving = serve(tmp_path)
    async with client_of(serving) as client:
        asking = [asyncio.create_task(ask(client, "a", stream=k == 1)) for k in range(2)]
        await until(lambda: serving.lifecycle.models["a"].n_waiting == 2)
        gate.may.set()
        refused, streamed = await asyncio.gather(*asking)
        assert gate.opened == ["a"]
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "model_load_failed")
        assert "sha256" in error["message"] and str(tmp_path) not in error["message"]
        assert json.loads(streamed.text.removeprefix("data: ")) == {"error": error}
        card = (await client.get("/v1/models/a")).json()
        shapes.Model.model_validate(card)
        assert card["state"] == "failed" and card["reason"] in error["message"]
        assert (await client.get("/ready")).status_code == (await client.get("/health")).status_code == 200
        assert (await ask(client, "b")).status_code == 200
        assert await sample(client, 'mpt_model_load_failures_total{model_name="a"}') == 1
        weights.write_bytes(whole)
        assert (await ask(client, "a")).status_code == 200
        assert "reason" not in (await client.get("/v1/models/a")).json()


async def test_a_bug_while_loading_is_told_without_its_words(serve, monkeypatch):
    def broken(*_):
        raise KeyError("/secret/path")

    monkeypatch.setattr("serving.lifecycle.open_endpoint", broken)
    async with client_of(serve()) as client:
        refused = await ask(client, "a")
    assert refused.status_code == 503 and "secret" not in refused.text and "KeyError" not in refused.text


def test_no_path_of_this_machine_is_in_what_clients_are_told(serve, folders):
    model = serve().lifecycle.models["a"]
    said = f"`{folders}/a/config.json` and /etc/x.json, ~/y: 1/2 of and/or"
    assert _for_clients(said, model) == "`a/config.json` and ..., ...: 1/2 of and/or"


async def test_what_cannot_be_loaded_as_it_is_told_is_refused_at_start(folders):
    models = {"a": ModelOptions(str(folders / "a"), device="cpu", dtype="float32", quantize="int8")}
    with pytest.raises(UserError, match="--dtype bfloat16"):
        await Serving(ServeOptions(models=models, load="on-request")).lifecycle.check_all()


async def test_a_server_that_leaves_sends_those_who_wait_away(serve, gate):
    gate.may.clear()
    serving = serve()
    async with client_of(serving) as client:
        asking = [asyncio.create_task(ask(client, name)) for name in ("a", "b")]
        await until(lambda: gate.opened == ["a"] and serving.lifecycle.models["b"].n_waiting)
        serving.leave()
        refused = await asyncio.gather(*asking)
        assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(503, "shutting_down")}
        gate.may.set()
        await until(lambda: not serving.lifecycle._tasks)
    assert gate.opened == ["a"] and serving.endpoints == {}


# -- unloaded for room -------------------------------------------------------------------------------------------------


async def test_the_least_recently_used_goes_when_another_is_asked_for(serve, gate):
    serving = serve(max_loaded=2)
    async with client_of(serving) as client:
        for moment, name in enumerate(("a", "b", "a", "c")):
            serving.now = float(moment)
            assert (await ask(client, name)).status_code == 200
        assert await states(client) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert await sample(client, 'mpt_model_unloads_total{model_name="b",reason="room"}') == 1
        assert await sample(client, 'mpt_model_loaded{model_name="b"}') == 0
        assert await sample(client, 'mpt_engine_up{model_name="b"}') is None
        card = (await client.get("/v1/models/b")).json()
        assert card["runs"] is None and card["context_length"] == 2048
    assert gate.opened == ["a", "b", "c"]


async def test_a_model_that_answers_stays_and_goes_before_new_requests_for_it(serve, gate):
    serving = serve(max_loaded=1)
    models = serving.lifecycle.models
    async with client_of(serving) as client:
        with serving.lifecycle.holding() as hold:
            running = await serving.lifecycle.get("a", hold)
            other = asyncio.create_task(ask(client, "b"))
            await until(lambda: models["a"].is_retiring)
            later = asyncio.create_task(ask(client, "a"))
            await until(lambda: models["a"].n_waiting == 1)
            assert serving.endpoints == {"a": running} and running.engine.ready and gate.opened == ["a"]
        assert (await other).status_code == (await later).status_code == 200
    assert gate.opened == ["a", "b", "a"]


async def test_a_model_stays_where_who_wanted_its_room_has_gone(serve, gate):
    serving = serve(max_loaded=1)
    models = serving.lifecycle.models
    async with client_of(serving) as client:
        with serving.lifecycle.holding() as hold, serving.lifecycle.holding() as other:
            await serving.lifecycle.get("a", hold)
            wanted = asyncio.create_task(serving.lifecycle.get("b", other))
            await until(lambda: models["a"].is_retiring)
            later = asyncio.create_task(ask(client, "a"))
            await until(lambda: models["a"].n_waiting == 1)
            wanted.cancel()
            assert (await later).status_code == 200
    assert gate.opened == ["a"]


async def test_models_go_until_there_is_memory_for_the_next(serve, gate, monkeypatch, folders):
    """A machine with room for two of them, their budgets of KV cache included."""
    needed = room_for("a", ModelOptions(str(folders / "a"), device="cpu", kv_gb=0.01)).n_bytes
    serving = serve()

    def free(device: str) -> Memory:
        growth = sum(each.kv_growth_bytes for each in serving.endpoints.values())
        return Memory((2 - len(serving.endpoints)) * needed + growth, 3 * needed)

    monkeypatch.setattr("serving.lifecycle.free_memory", free)
    async with client_of(serving) as client:
        for moment, name in enumerate(NAMES):
            serving.now = float(moment)
            assert (await ask(client, name)).status_code == 200
        assert await states(client) == {"a": "unloaded", "b": "loaded", "c": "loaded"}


def test_the_room_that_a_model_takes_is_its_weights_and_a_least_of_cache(folders, model):
    """Counted by hand: the embedding is the head too, MPT has no biases, and float32 has four bytes."""
    n_weights = 260 * 64 + 2 * (64 * 3 * 64 + 64 * 64 + 2 * 4 * 64 * 64 + 2 * 64) + 64
    assert n_weights == sum(each.numel() for each in model.parameters())
    cache = 2 * 2 * 64 * 4 * 2048  # keys and values, layers, width, bytes, tokens
    options = ModelOptions(str(folders / "a"), device="cpu")
    assert room_for("a", options).n_bytes == pytest.approx(1.1 * 4 * n_weights + cache / 0.6, abs=2)
    told = room_for("a", ModelOptions(str(folders / "a"), device="cpu", kv_gb=0.5, dtype="bfloat16"))
    assert (told.device, told.n_bytes) == ("cpu", pytest.approx(1.1 * 2 * n_weights + 5e8, abs=2))


async def test_places_share_what_is_free_and_the_log_says_so(folders, monkeypatch, caplog):
    """60 % of a gigabyte for two places; then of what the first left, promised and taken, for the last."""
    options = ModelOptions(str(folders / "a"), device="cpu", max_running=10_000)
    models = dict.fromkeys(NAMES, options)
    serving = Serving(ServeOptions(models=models, load="on-request", max_loaded=2))
    free = Memory(1_000_000_000, 2_000_000_000, "the container's")
    monkeypatch.setattr("mpt.engine.room.free_memory", lambda device: free)
    caplog.set_level("INFO")
    block = 256 * 2 * 2 * 64 * 4
    budgets = []
    try:
        with serving.lifecycle.holding() as hold:
            for name in ("a", "b"):
                endpoint = await serving.lifecycle.get(name, hold)
                budgets.append(endpoint.engine.stats().kv_total_bytes)
    finally:
        for endpoint in serving.endpoints.values():
            endpoint.engine.close()
    assert budgets[0] == pytest.approx(0.3e9, abs=block)
    assert budgets[1] == pytest.approx(0.6 * (1e9 - budgets[0]), rel=0.01)
    assert "KV cache 0.30 GB (60% of the 1.00 GB that are free of the container's 2.00 GB, shared by 2)" in caplog.text
    assert "(60% of the 0.70 GB that are free of the container's 2.00 GB)" in caplog.text


# -- unloaded when idle, and by request --------------------------------------------------------------------------------


async def test_a_model_goes_when_nobody_has_asked_for_it(serve, gate):
    serving = serve(idle_unload_s=900.0)
    async with client_of(serving) as client:
        await ask(client, "a")
        with serving.lifecycle.holding() as hold:
            await serving.lifecycle.get("b", hold)
            serving.now = 899.0
            await serving.lifecycle.unload_idle()
            assert (await states(client))["a"] == "loaded"
            assert serving.lifecycle.idle_s_left("a") == 1.0 and serving.lifecycle.idle_s_left("b") == 900.0
            serving.now = 900.0
            await serving.lifecycle.unload_idle()
            assert await states(client) == {"a": "unloaded", "b": "loaded", "c": "unloaded"}
        serving.now = 1799.0  # b was let go of at 900
        await serving.lifecycle.unload_idle()
        assert (await states(client))["b"] == "loaded"
        serving.now = 1800.0
        await serving.lifecycle.unload_idle()
        assert (await states(client))["b"] == "unloaded"
        assert await sample(client, 'mpt_model_unloads_total{model_name="a",reason="idle"}') == 1
        assert (await ask(client, "a")).status_code == 200
    assert gate.opened == ["a", "b", "a"]


async def test_clients_load_and_unload_where_they_may(serve, gate):
    serving = serve(api_keys=("ops: one", "two"), model_loading=frozenset({"ops"}))
    body = {"model": "a"}
    async with client_of(serving, authorization="Bearer two") as other:
        for path in ("/v1/models/load", "/v1/models/unload"):
            refused = await other.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    async with client_of(serving, authorization="Bearer one") as client:
        for path, state in (("load", "loaded"), ("load", "loaded"), ("unload", "unloaded"), ("unload", "unloaded")):
            done = await client.post(f"/v1/models/{path}", json=body)
            shapes.ModelState.model_validate(done.json())
            assert (done.status_code, done.json()) == (200, {"id": "a", "object": "model", "state": state})
        assert (await client.post("/v1/models/load", json={"model": "d"})).status_code == 404
        with serving.lifecycle.holding() as hold:
            await serving.lifecycle.get("a", hold)
            busy = await client.post("/v1/models/unload", json=body)
            assert (busy.status_code, busy.json()["error"]["code"]) == (409, "model_busy")
            assert "a" in serving.endpoints
        assert await sample(client, 'mpt_model_unloads_total{model_name="a",reason="request"}') == 1
    assert gate.opened == ["a", "a"]


async def test_without_the_option_nobody_loads_by_request(serve):
    async with client_of(serve()) as client:
        refused = await client.post("/v1/models/load", json={"model": "a"})
    assert refused.status_code == 403 and "--allow-model-loading" in refused.json()["error"]["message"]


async def test_an_adapter_that_a_client_has_loaded_is_there_after_an_unload(serve, model, tmp_path):
    make_adapter(model, tmp_path / "mine", 1)
    serving = serve(adapter_loading=tmp_path)
    async with client_of(serving) as client:
        loaded = await client.post("/v1/load_lora_adapter", json={"lora_name": "a:mine", "lora_path": "mine"})
        assert loaded.status_code == 200
        first = (await ask(client, "a:mine")).json()["choices"]
        await serving.lifecycle.unload("a")
        assert (await states(client))["a:mine"] == "unloaded"
        assert (await ask(client, "mine")).json()["choices"] == first != (await ask(client, "a")).json()["choices"]
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "a:mine"})
        assert gone.status_code == 200 and "a:mine" not in await states(client)


# -- what is left behind -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tokenizer, tmp_path_factory) -> Path:
    """A model of 50 MB, whose coming and going shows in a process's memory."""
    torch.manual_seed(0)
    config = MPTConfig(d_model=512, n_heads=8, n_layers=4, vocab_size=260, max_seq_len=512)
    return mpt.save(mpt.MPTForCausalLM(config), tmp_path_factory.mktemp("large") / "large", tokenizer=tokenizer)


def test_an_unloaded_model_is_gone_and_so_is_its_thread(large):
    """Asked over a connection that stays open and so remembers its last request."""
    options = ModelOptions(str(large), device="cpu", kv_gb=0.05)
    serving = Serving(
        ServeOptions(models={"large": options}, load="on-request", model_loading=frozenset({"all"}), docs=False)
    )
    with listening(make_app(serving), log_level="critical", ws="none", timeout_keep_alive=600) as url:
        n_engines = sum(thread.name == "engine" for thread in threading.enumerate())
        with httpx.Client(base_url=url, timeout=100) as asking, httpx.Client(base_url=url, timeout=100) as ordering:
            for _ in range(2):
                asking.post("/v1/completions", json={"model": "large", **GREEDY}).raise_for_status()
                weights = weakref.ref(serving.endpoints["large"].engine._backend.model)
                gc.collect()
                ordering.post("/v1/models/unload", json={"model": "large"}).raise_for_status()
                assert weights() is None
                assert sum(thread.name == "engine" for thread in threading.enumerate()) == n_engines


def test_loading_and_unloading_does_not_make_a_server_grow(large):
    """A process of its own, whose heap no other test has filled; a model that stayed would add 50 MB a time."""
    n_bytes = (large / "model.safetensors").stat().st_size
    options = ("--model", f"large={large}", "--load", "on-request", "--allow-model-loading", "all", "--kv-gb", "0.05")
    with servers.running("serve", "--port", "0", "--device", "cpu", *options) as server:
        process, after = psutil.Process(server.process.pid), []
        with httpx.Client(base_url=server.url, timeout=100) as client:
            for _ in range(6):
                client.post("/v1/completions", json={"model": "large", **GREEDY}).raise_for_status()
                client.post("/v1/models/unload", json={"model": "large"}).raise_for_status()
                after.append(process.memory_info().rss)
    # glibc keeps up to 64 MB at the end of a thread's heap: a load may find them there, and an unload leave them.
    assert after[-1] - after[0] < 2 * n_bytes, [round(rss / 1e6) for rss in after]


# -- what a server is told ---------------------------------------------------------------------------------------------


def test_durations_have_a_unit():
    assert [seconds("--idle-unload", text) for text in ("90s", "15m", "2h", "1.5m")] == [90, 900, 7200, 90]
    for text in ("15", "m", "0s", "-5m", "1d", "1h30m", ""):
        with pytest.raises(UserError, match="90s, 15m, 2h"):
            seconds("--idle-unload", text)


def test_a_folder_of_checkpoints_is_served_by_their_names(folders, tmp_path, monkeypatch, caplog):
    started: list[ServeOptions] = []
    monkeypatch.setattr("serving.server.serve", lambda options, _: started.append(options))
    for name in NAMES:
        (tmp_path / name).symlink_to(folders / name)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    cli.serve(
        port=0, models_dir=tmp_path, model=[f"more={folders / 'a'}"], load="on-request", idle_unload="15m", max_loaded=2
    )
    (options,) = started
    assert list(options.models) == ["more", *NAMES]
    assert (options.load, options.idle_unload_s, options.max_loaded) == ("on-request", 900, 2)
    assert options.models["b"].root == str(tmp_path / "b")
    assert "llama" in caplog.text
    with pytest.raises(UserError, match="same name"):
        cli.serve(models_dir=tmp_path, model=[f"a={folders / 'a'}"])
    with pytest.raises(UserError, match="contradict"):
        cli.serve(models_dir=tmp_path, max_loaded=2)
    with pytest.raises(UserError, match="--allow-model-loading all"):
        cli.serve(models_dir=tmp_path, allow_model_loading=["ops"])
    with pytest.raises(UserError, match="stays loaded"):
        cli.serve(model=[f"a={folders / 'a'}"], tensor_parallel=2, load="on-request")
    (tmp_path / "a b").symlink_to(folders / "a")
    with pytest.raises(UserError, match="`a b` has characters"):
        checkpoints_in(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints_in(tmp_path / "adapter")
    with pytest.raises(UserError, match="No such file"):
        checkpoints_in(tmp_path / "nowhere")


def test_a_cluster_names_what_to_use_instead():
    for key in ("load", "idle_unload", "max_loaded", "models_dir", "allow_model_loading"):
        with pytest.raises(UserError, match=f"`{key}` is an option of `mpt serve`"):
            read_args({key: "x"})
    with pytest.raises(UserError, match=r"`models\.m\.idle_unload`.*min_replicas: 0"):
        read_args({"models": {"m": {"root": "mpt-tiny", "idle_unload": "15m"}}})
    assert read_args({}) == ClusterOptions(models=TINY)


SLOW = """
import sys, threading
from mpt import cli
from mpt.engine import endpoint
from serving import lifecycle

def open_endpoint(name, *arguments):
    if name == "slow":
        print("opening", file=sys.stderr, flush=True)
        threading.Event().wait()
    return endpoint.open_endpoint(name, *arguments)

lifecycle.open_endpoint = open_endpoint
sys.argv[0] = "mpt"
cli.main()
"""


def test_sigterm_during_a_load_sends_who_waits_away_and_ends_the_process(folders):
    """The load would never end."""
    options = ("--models-dir", str(folders), "--load", "on-request", "--model", f"slow={folders / 'a'}")
    server = servers.start("serve", "--port", "0", *options, program=("-c", SLOW))
    try:
        with httpx.Client(base_url=server.url, timeout=100) as client:
            assert client.post("/v1/completions", json={"model": "b", **GREEDY}).status_code == 200
            with client.stream("POST", "/v1/completions", json={"model": "slow", **GREEDY, "stream": True}) as waiting:
                asyncio.run(until(lambda: any("opening" in line for line in server.lines)))
                os.kill(server.process.pid, signal.SIGTERM)
                assert '"code":"shutting_down"' in waiting.read().decode()
        assert server.process.wait(100) == 0
    finally:
        server.stop(signal.SIGKILL)
