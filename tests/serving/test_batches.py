"""`/v1/files` and `/v1/batches` with the real `openai` client: each key its own, last in turn, and over a restart."""

import asyncio
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from mpt.backends.torch_backend import TorchBackend
from mpt.engine.endpoint import Endpoint
from mpt.engine.engine import Engine
from mpt.errors import DamagedFile, UserError
from serving.app import make_app
from serving.auth import Keys
from serving.batch import store as stores
from serving.batch.lines import new_id
from serving.batch.store import Store, StoredBatch
from serving.cluster.options import TINY, ClusterOptions
from serving.cluster.router import make_router
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests.in_process import listening, running_engine
from tests.serving.cluster.test_cluster import FakeFleet

ALICE, BOB = "sk-alice-of-the-test", "sk-bob-of-the-test"
CAROL = "sk-carol-of-the-test"
KEYS = (f"alice: {ALICE}", f"bob: {BOB} tokens_per_minute=60", f"carol: {CAROL} models=base:mine tokens_total=100")


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Iterator[Engine]:
    with running_engine(TorchBackend(model), tokenizer, context_length=2048, kv_bytes=1 << 26) as engine:
        yield engine


@pytest.fixture(scope="module")
def endpoint(engine, model, tokenizer) -> Endpoint:
    return Endpoint("base", "base", engine, tokenizer, "chatml", None, "Apache-2.0", model.config.vocab_size, 2048)


def app_over(endpoint: Endpoint, folder: Path | None) -> FastAPI:
    store = None if folder is None else str(folder / "quotas.sqlite")
    keys = KEYS if folder is not None else KEYS[:2]
    options = ServeOptions(models={}, api_keys=keys, batch_dir=folder, docs=True, quota_store=store)
    return make_app(Serving(options, endpoints={"base": endpoint}))


@pytest.fixture(scope="module")
def url(endpoint, tmp_path_factory) -> Iterator[str]:
    app = app_over(endpoint, tmp_path_factory.mktemp("batches"))
    with listening(app, log_level="warning") as address:
        yield address
    app.state.batches.store.close()


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def alice(url) -> openai.OpenAI:
    return client_of(url, ALICE)


@pytest.fixture(scope="module")
def bob(url) -> openai.OpenAI:
    return client_of(url, BOB)


def row(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    given = {"model": "base", "prompt": "hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or given}


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in rows)


def upload(client: openai.OpenAI, *rows: dict[str, Any]) -> str:
    return client.files.create(file=("requests.jsonl", io.BytesIO(lines(*rows))), purpose="batch").id


def begin(client: openai.OpenAI, file_id: str, endpoint: str = "/v1/completions") -> str:
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h").id  # type: ignore[arg-type]


def over(client: openai.OpenAI, batch_id: str) -> Any:
    until = time.monotonic() + 100
    while time.monotonic() < until:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.01)
    raise AssertionError(f"still {batch.status}")


def results(text: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    return {each["custom_id"]: each for each in found}


def test_a_batch_is_answered_as_over_http(alice, engine, monkeypatch) -> None:
    """The same text as a request of its own; good and bad lines in a file each; all of lowest priority."""
    priorities = []
    real = engine.submit

    def submit(prompt: list[int], sampling: Any, **more: Any) -> Any:
        priorities.append(sampling.priority)
        return real(prompt, sampling, **more)

    expected = alice.completions.create(model="base", prompt="hello", max_tokens=5, temperature=0,
                                        extra_body={"ignore_eos": True})  # fmt: skip
    monkeypatch.setattr(engine, "submit", submit)
    file_id = upload(alice, row("a"), row("b"), row("wrong", model="base", prompt="x", temperature=9))
    made = alice.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h", metadata={"of": "a test"}
    )
    assert made.status == "validating" and made.metadata == {"of": "a test"}
    assert made.expires_at == made.created_at + 24 * 3600
    batch = over(alice, made.id)
    assert batch.status == "completed" and batch.completed_at >= batch.in_progress_at >= batch.created_at
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    good = results(alice.files.content(batch.output_file_id).text)
    bad = results(alice.files.content(batch.error_file_id).text)
    assert set(good) == {"a", "b"} and set(bad) == {"wrong"}
    answer = good["a"]["response"]
    assert answer["status_code"] == 200 and answer["body"]["choices"][0]["text"] == expected.choices[0].text
    assert bad["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert priorities == [100, 100]
    shown = alice.files.retrieve(batch.output_file_id)
    assert (shown.purpose, shown.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert shown.bytes == len(alice.files.content(batch.output_file_id).content)


@pytest.mark.parametrize(
    ("where", "body"),
    [
        ("/v1/embeddings", {"model": "base", "input": "hello"}),
        ("/v1/chat/completions",
         {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
    ],
)  # fmt: skip
def test_other_endpoints_have_batches_too(alice, where, body) -> None:
    batch = over(alice, begin(alice, upload(alice, row("a", where, **body)), where))
    assert batch.status == "completed" and batch.error_file_id is None
    assert results(alice.files.content(batch.output_file_id).text)["a"]["response"]["status_code"] == 200


def test_a_file_that_is_wrong_fails_its_batch_and_names_the_lines(alice) -> None:
    file_id = upload(alice, row("a"), row("b", "/v1/embeddings", model="base", input="x"), row("a"))
    batch = over(alice, begin(alice, file_id))
    assert batch.status == "failed" and batch.output_file_id is None and batch.failed_at
    found = [(problem.line, problem.code) for problem in batch.errors.data]
    assert found == [(2, "invalid_url"), (3, "duplicate_custom_id")]


def test_a_key_sees_only_its_own(alice, bob, url) -> None:
    file_id = upload(alice, row("a"))
    batch_id = begin(alice, file_id)
    for ask in (
        lambda: bob.files.retrieve(file_id), lambda: bob.files.content(file_id), lambda: bob.files.delete(file_id),
        lambda: begin(bob, file_id), lambda: bob.batches.retrieve(batch_id), lambda: bob.batches.cancel(batch_id),
        lambda: alice.files.retrieve("file-../../lock"), lambda: alice.batches.retrieve(new_id("batch_")),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            ask()
    assert not bob.files.list().data and not bob.batches.list().data
    assert file_id in [each.id for each in alice.files.list(purpose="batch")]
    over(alice, batch_id)
    assert httpx.get(f"{url}/v1/batches").status_code == 401
    forged = {"authorization": "Bearer x", "x-batch-id": batch_id}
    assert httpx.get(f"{url}/v1/batches", headers=forged).status_code == 401


def test_a_batch_counts_against_the_limits_of_its_key(bob, url) -> None:
    """60 tokens a minute come back one a second; the request took 5 of the prompt and 5 of the answer, twice."""
    over(bob, begin(bob, upload(bob, row("a"), row("b"))))
    left = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {BOB}"}).headers
    assert int(left["x-ratelimit-remaining-tokens"]) < 60 - 10


def test_lists_come_in_pages_newest_first(alice) -> None:
    ids = [upload(alice, row(f"a{n}")) for n in range(3)]
    page = alice.files.list(limit=2, purpose="batch")
    newest = [each.id for each in alice.files.list(purpose="batch")][:3]
    assert set(newest) <= {each.id for each in alice.files.list()} and len(page.data) == 2 and page.has_more
    assert [each.id for each in page.data] == newest[:2]
    assert set(ids) <= {each.id for each in alice.files.list(limit=2)}  # the client asks page after page
    oldest = alice.files.list(limit=1, order="asc").data[0]
    assert oldest.created_at <= min(each.created_at for each in alice.files.list())
    for wrong in ({"limit": 0}, {"after": "file-x"}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            alice.files.list(**wrong)  # type: ignore[arg-type]


def test_a_deleted_file_is_gone(alice) -> None:
    file_id = upload(alice, row("a"))
    assert alice.files.delete(file_id).deleted
    for ask in (alice.files.retrieve, alice.files.content, alice.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file_id)


def test_a_cancelled_batch_keeps_the_answers_it_has(alice) -> None:
    """The first is short, the others would be at work for a minute together."""
    long = {"model": "base", "prompt": "a", "max_tokens": 1900, "ignore_eos": True}
    file_id = upload(alice, row("a"), *(row(f"b{n}", **long) for n in range(60)))
    batch_id = begin(alice, file_id)
    while not alice.batches.retrieve(batch_id).request_counts.completed:
        time.sleep(0.005)
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        alice.files.delete(file_id)
    assert alice.batches.cancel(batch_id).status == "cancelling"
    batch = over(alice, batch_id)
    assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
    found = results(alice.files.content(batch.output_file_id).text)
    assert "a" in found and len(found) == batch.request_counts.completed < 61
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        alice.batches.cancel(batch_id)


@pytest.mark.parametrize(
    ("form", "status", "part"),
    [
        ({"data": {"purpose": "fine-tune"}, "files": {"file": b"x"}}, 400, "must be `batch`"),
        ({"data": {"purpose": "batch", "file": "x"}, "files": {"other": b"x"}}, 400, "unknown parameter `other`"),
        ({"data": {"purpose": "batch", "expires_after": "1"}, "files": {"file": b"x"}}, 400, "`expires_after`"),
        ({"data": {"purpose": "batch"}}, 415, "multipart/form-data"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}}, 400, "no multipart form"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400, "form"),
    ],
)
def test_an_upload_that_is_wrong_is_refused_by_name(url, form, status, part) -> None:
    headers = {"authorization": f"Bearer {ALICE}", **form.pop("headers", {})}
    answer = httpx.post(f"{url}/v1/files", headers=headers, **form)
    assert answer.status_code == status and part in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"endpoint": "/v1/completions", "completion_window": "1h"}, "invalid_value"),
        ({"endpoint": "/v1/models", "completion_window": "24h"}, "invalid_value"),
        ({"endpoint": "/v1/completions", "completion_window": "24h", "output_expires_after": {}}, "unknown_parameter"),
    ],
)
def test_a_batch_that_asks_for_what_is_not_offered_is_refused(url, alice, body, code) -> None:
    headers = {"authorization": f"Bearer {ALICE}"}
    answer = httpx.post(f"{url}/v1/batches", headers=headers, json={"input_file_id": "file-x", **body})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == code


def test_a_batch_uses_the_models_and_the_budget_of_its_key(url, endpoint, monkeypatch) -> None:
    """Its key has an adapter only, whose requests are answered by the base here: 10 prompt tokens and 20 more each."""
    carol = client_of(url, CAROL)
    assert [card.id for card in carol.models.list()] == []
    batch = over(carol, begin(carol, upload(carol, row("of-another"))))
    failed = results(carol.files.content(batch.error_file_id).text)["of-another"]
    assert (failed["response"]["status_code"], failed["response"]["body"]["error"]["code"]) == (404, "model_not_found")
    monkeypatch.setattr("serving.endpoints.may_use", lambda _: True)
    monkeypatch.setattr("serving.endpoints.may_reach", lambda _: True)
    body = {"model": "base", "prompt": "0123456789", "max_tokens": 20, "ignore_eos": True}
    batch = over(carol, begin(carol, upload(carol, *(row(str(n), **body) for n in range(6)))))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 3)  # 90 tokens of 100
    refused = results(carol.files.content(batch.error_file_id).text)
    assert {each["response"]["body"]["error"]["code"] for each in refused.values()} == {"insufficient_quota"}


def test_sizes_and_numbers_have_limits(alice, url, monkeypatch) -> None:
    from serving.batch import api

    monkeypatch.setattr(api, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(api, "_FORM_BYTES", 500)
    before = len(alice.files.list().data)
    with pytest.raises(openai.APIStatusError) as refused:
        upload(alice, row("a", prompt="x" * 5000))
    assert refused.value.status_code == 413

    def chunks() -> Iterator[bytes]:  # of no length that is known before
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 100

    headers = {"authorization": f"Bearer {ALICE}", "content-type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{url}/v1/files", headers=headers, content=chunks()).status_code == 413
    assert len(alice.files.list().data) == before
    monkeypatch.setattr(stores, "_MAX_OWNER_FILES", before)
    with pytest.raises(openai.BadRequestError, match="delete some"):
        upload(alice, row("a"))


def test_without_a_folder_and_in_a_cluster_they_are_refused_by_name(endpoint) -> None:
    router = make_router(FakeFleet([]), ClusterOptions(models=TINY), Keys([], None))
    for app, part in ((app_over(endpoint, None), "--batch-dir"), (router, "mpt run-batch")):
        with listening(app, log_level="warning") as url:
            client = client_of(url, ALICE)
            for ask in (client.files.list, client.batches.list, lambda c=client: upload(c, row("a"))):
                with pytest.raises(openai.APIStatusError, match=part):
                    ask()


# -- over a restart ------------------------------------------------------------------------------------------------


async def until_over(app: FastAPI, batch_id: str) -> StoredBatch:
    [batch] = [each for each in app.state.batches.store.batches() if each.id == batch_id]
    async with asyncio.timeout(60):
        while not batch.is_over:
            await asyncio.sleep(0.01)
    return batch


def stored(folder: Path, *rows: dict[str, Any], **changed: Any) -> tuple[Store, StoredBatch]:
    """A folder with a batch in it that has not been begun."""
    store = Store(folder)
    file_id = store.keep(io.BytesIO(lines(*rows)))
    store.show_file("owner", file_id, "requests.jsonl", "batch")
    shown = {
        "id": new_id("batch_"), "endpoint": "/v1/completions", "errors": None, "input_file_id": file_id,
        "status": "validating", "created_at": 1, "expires_at": time.time() + 1000, "finalizing_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0}, "output_file_id": None, "error_file_id": None,
    }  # fmt: skip
    batch = StoredBatch("owner", "someone", (None, None), shown | changed)
    store.add_batch(batch)
    return store, batch


async def test_a_stopped_server_goes_on_with_its_batches(endpoint, tmp_path) -> None:
    many = [row(f"a{n}", model="base", prompt="a", max_tokens=120, ignore_eos=True) for n in range(40)]
    store, batch = stored(tmp_path, *many)
    store.close()
    first = app_over(endpoint, tmp_path)
    first.state.batches.resume()
    [running] = first.state.batches.store.batches()
    async with asyncio.timeout(60):
        while not running.shown["request_counts"]["completed"]:
            await asyncio.sleep(0.005)
    await first.state.batches.stop()
    assert not running.is_over
    before = results((tmp_path / "files" / f"{batch.results[0]}.jsonl").read_text())
    assert 0 < len(before) < 40
    second = app_over(endpoint, tmp_path)
    second.state.batches.resume()
    ended = await until_over(second, batch.id)
    await second.state.batches.stop()
    assert ended.shown["status"] == "completed"
    assert ended.shown["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    text = (tmp_path / "files" / f"{batch.results[0]}.jsonl").read_text()
    assert len(text.splitlines()) == 40 and results(text).items() >= before.items()


async def test_a_batch_made_before_the_server_is_ready_is_worked_on_once(endpoint, tmp_path) -> None:
    """HTTP answers while models load; when they are there, `resume` meets the batches made meanwhile."""
    many = [row(f"a{n}", model="base", prompt="a", max_tokens=20, ignore_eos=True) for n in range(40)]
    store, batch = stored(tmp_path, *many)
    store.close()
    app = app_over(endpoint, tmp_path)
    service = app.state.batches
    [running] = service.store.batches()
    service.begin(running)
    async with asyncio.timeout(60):
        while not running.shown["request_counts"]["completed"]:
            await asyncio.sleep(0.005)
    service.resume()
    ended = await until_over(app, batch.id)
    await service.stop()
    assert (ended.shown["status"], ended.shown["errors"]) == ("completed", None)
    assert len((tmp_path / "files" / f"{ended.shown['output_file_id']}.jsonl").read_text().splitlines()) == 40


async def test_a_killed_server_goes_on_behind_a_half_written_line(endpoint, tmp_path) -> None:
    store, batch = stored(tmp_path, row("a"), row("b"), status="in_progress")
    whole = json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": "kept"}, "error": None})
    store.content(batch.results[0]).write_text(whole + "\n" + '{"custom_id": "b", "resp')
    (tmp_path / "files" / "file-of-an-upload.partial").write_text("half")
    store.close()
    app = app_over(endpoint, tmp_path)
    app.state.batches.resume()
    ended = await until_over(app, batch.id)
    await app.state.batches.stop()
    found = results((tmp_path / "files" / f"{ended.shown['output_file_id']}.jsonl").read_text())
    assert set(found) == {"a", "b"} and found["a"]["response"]["body"] == "kept"
    assert not list(tmp_path.glob("**/*.partial"))


async def test_what_is_not_answered_in_its_day_is_told_so(endpoint, tmp_path) -> None:
    store, batch = stored(tmp_path, row("a"), row("b"), status="in_progress", expires_at=time.time() - 1)
    store.close()
    app = app_over(endpoint, tmp_path)
    app.state.batches.resume()
    ended = await until_over(app, batch.id)
    await app.state.batches.stop()
    assert ended.shown["status"] == "expired" and ended.shown["output_file_id"] is None
    found = results((tmp_path / "files" / f"{ended.shown['error_file_id']}.jsonl").read_text())
    assert [found[name]["error"]["code"] for name in ("a", "b")] == ["batch_expired"] * 2


async def test_a_cancelled_batch_is_cancelled_after_a_restart_too(endpoint, tmp_path) -> None:
    store, batch = stored(tmp_path, row("a"), status="cancelling")
    store.close()
    app = app_over(endpoint, tmp_path)
    app.state.batches.resume()
    assert (await until_over(app, batch.id)).shown["status"] == "cancelled"
    await app.state.batches.stop()


def test_a_folder_is_of_one_server(tmp_path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="another server's"):
        Store(tmp_path)
    store.close()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("files", "batches")] == [0o700, 0o700]
    (tmp_path / "batches" / "batch_x.json").write_text("{")
    with pytest.raises(DamagedFile):
        Store(tmp_path)


def test_the_oldest_batches_are_forgotten_and_unfinished_ones_limited(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stores, "_MAX_OWNER_BATCHES", 3)
    monkeypatch.setattr(stores, "_MAX_UNFINISHED", 1)
    store, last = stored(tmp_path, row("a"), status="completed")
    for n in range(2, 8):
        last = StoredBatch("owner", "someone", (None, None), {**last.shown, "id": new_id("batch_"), "created_at": n})
        store.add_batch(last)
    assert [batch.shown["created_at"] for batch in store.batches("owner")] == [7, 6, 5]
    assert len(list((tmp_path / "batches").glob("*.json"))) == 3
    running = {**last.shown, "id": new_id("batch_"), "status": "in_progress"}
    store.add_batch(StoredBatch("owner", "someone", (None, None), running))
    with pytest.raises(Exception, match="at most 1 may be"):
        store.add_batch(StoredBatch("owner", "someone", (None, None), {**running, "id": new_id("batch_")}))
    store.add_batch(StoredBatch("another", "else", (None, None), {**running, "id": new_id("batch_")}))
    store.close()
