"""`mpt bench`: figures checked by hand, a server whose answers are known, and one that fails in every way."""

import asyncio
import itertools
import json
import os
import signal
import statistics
from collections.abc import Iterator
from types import SimpleNamespace

import aiohttp
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mpt.errors import UserError
from serving.bench.client import Target
from serving.bench.load import Load, drive, random_words, read_dataset
from serving.bench.record import Record
from serving.bench.report import Report, figures
from serving.bench.run import Bench, run
from tests.in_process import listening

WORD_TOKENS, BESIDE = 3, 5  # of the server below: what it counts a word as, and what it adds to every prompt


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def url(asked) -> Iterator[str]:
    """A server whose models each do one thing."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict:
        return {"data": [{"id": "good"}, {"id": "other"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        asked.append(body)
        kind = body["model"]
        if kind == "silent-about-usage" and "stream_options" in body:
            return JSONResponse({"error": {"code": "unknown_field"}}, 400)
        if kind == "full" and body["max_tokens"] > 2:
            return JSONResponse({"error": {"code": "overloaded", "message": "later"}}, 503)
        lines = list(stream(kind, body["max_tokens"], BESIDE + WORD_TOKENS * len(body["prompt"].split())))
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    with listening(app, log_level="warning") as address:
        yield address


def stream(kind: str, n: int, n_prompt: int) -> Iterator[str]:
    """Two tokens a piece, as a server that guesses ahead sends them."""
    yield ": a comment\n\n"
    for _ in range(n // 2):
        yield f"data: {json.dumps({'choices': [{'text': 'a b', 'finish_reason': None}]})}\n\n"
    if kind == "broken" and n > 2:
        yield f"data: {json.dumps({'error': {'code': 'engine_gone'}})}\n\n"
        return
    if kind == "cut" and n > 2:
        return
    yield f"data: {json.dumps({'choices': [{'text': '', 'finish_reason': 'length'}]})}\n\n"
    if kind != "silent-about-usage":
        yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': n_prompt, 'completion_tokens': n}})}\n\n"
    yield "data: [DONE]\n\n"


def bench(url: str, n: int = 6, **changed) -> Bench:
    load = Load(n_requests=n, seconds=None, rate=None, concurrency=3, seed=1)
    told = {
        "url": url, "model": "good", "api_key": None, "load": load, "chat": False, "prompt_tokens": 35,
        "output_tokens": 8, "dataset": None, "ignore_eos": False, "temperature": 0.0, "timeout_s": 20.0,
        "json_file": None, "plot_file": None,
    }  # fmt: skip
    return Bench(**told | changed)


def test_figures_of_one_request_by_hand() -> None:
    """Sent at 1 s; pieces of 2 tokens at 1.5, 1.7 and 2.1 s; over at 2.2 s."""
    record = Record(sent=1.0, pieces=[1.5, 1.7, 2.1], ended=2.2, prompt_tokens=10, output_tokens=6)
    assert record.ttft_s == 0.5
    assert record.itl_s == pytest.approx([0.2, 0.4])
    assert record.tpot_s == pytest.approx(0.6 / 5)
    assert record.e2e_s == pytest.approx(1.2)
    report = Report([record, Record(sent=0.2, ended=3.2, error="timeout")], {}, False)
    assert report.seconds == 3.0
    assert report.throughput() == pytest.approx(
        {"requests_per_s": 1 / 3, "output_tokens_per_s": 2.0, "prompt_tokens_per_s": 10 / 3}
    )
    assert report.errors == {"timeout": 1}


def test_percentiles_are_those_of_the_standard_library() -> None:
    times = [0.4, 0.1, 0.9, 0.3, 0.7, 1.6, 0.2]
    expected = statistics.quantiles(times, n=100, method="inclusive")
    found = figures(times)
    assert found["mean"] == pytest.approx(statistics.fmean(times))
    for p in (50, 90, 95, 99):
        assert found[f"p{p}"] == pytest.approx(expected[p - 1])


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of an exponential distribution: mean and standard deviation are both 1 / rate."""
    due = list(Load(20_001, None, rate=4.0, concurrency=None, seed=3).due())
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert due[0] == 0.0 and statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert due == list(Load(20_001, None, rate=4.0, concurrency=None, seed=3).due())


def test_random_prompts_share_no_beginning() -> None:
    texts = random_words(40, seed=0)
    begun = [" ".join(next(texts).split()[:6]) for _ in range(200)]
    assert len(set(begun)) == 200


def test_a_load_is_sent_counted_and_drawn(url, asked, tmp_path, capsys) -> None:
    asked.clear()
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    assert run(bench(url, json_file=file, plot_file=picture, model=None)) == 0
    probes, sent = asked[:2], asked[2:]
    assert len(sent) == 6 and {body["model"] for body in sent} == {"good"}
    assert {len(body["prompt"].split()) for body in sent} == {10}  # 5 + 3 x 10 are 35 tokens
    assert all(body["max_tokens"] == 8 and "ignore_eos" not in body for body in sent)
    assert all(body["max_tokens"] == 2 for body in probes)
    found = json.loads(file.read_text())
    assert (found["answered"], found["failed"], found["errors"], found["interrupted"]) == (6, 0, {}, False)
    assert found["model"] == "good" and len(found["requests"]) == 6
    assert found["output_tokens_per_s"] == pytest.approx(48 / found["seconds"])
    assert found["prompt_tokens_per_s"] == pytest.approx(6 * 35 / found["seconds"])
    assert set(found["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "6 requests in" in shown and "6 answered, 0 failed" in shown and "prompt 35.0, output 8.0" in shown
    for title in ("time to first token", "inter-token latency", "time per output token", "end to end"):
        assert title in shown


@pytest.mark.parametrize(
    ("model", "kind"),
    [("full", "503 overloaded"), ("broken", "in the stream: engine_gone"), ("cut", "stream cut off")],
)
def test_errors_are_counted_by_kind_and_all_of_them_are_an_exit_code(url, model, kind, capsys) -> None:
    assert run(bench(url, model=model)) == 1
    shown = capsys.readouterr().out
    assert "0 answered, 6 failed" in shown and f"6 x {kind}" in shown


def test_a_server_that_does_not_count_is_asked_without_stream_options(url, asked, capsys) -> None:
    asked.clear()
    assert run(bench(url, model="silent-about-usage")) == 0
    assert all("stream_options" not in body for body in asked[1:])
    assert "pieces of text output 4.0" in capsys.readouterr().out


def test_a_dataset_goes_round(url, asked, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one two"}\n"three"\n\n')
    asked.clear()
    load = Load(n_requests=5, seconds=None, rate=500.0, concurrency=None, seed=0)
    assert run(bench(url, dataset=file, load=load, ignore_eos=True)) == 0
    prompts = sorted(body["prompt"] for body in asked[2:])
    assert prompts == ["one two"] * 3 + ["three"] * 2 and asked[-1]["ignore_eos"] is True


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "no lines"), ("{", "line 1"), ("{}", "has no text"), ('{"messages": [{"role": "user"}]}', "--chat")],
)
def test_a_bad_dataset_is_refused_by_its_line(tmp_path, text, part) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=part):
        read_dataset(file, chat=False)


@pytest.mark.parametrize("changed", [{"rate": 0.0}, {"rate": float("nan")}, {"seconds": -1.0}])
def test_a_load_that_cannot_be_sent_is_refused(changed) -> None:
    with pytest.raises(UserError, match="no positive number"):
        Load(**{"n_requests": 1, "seconds": None, "rate": None, "concurrency": 1, "seed": 0} | changed)


def test_what_cannot_be_written_is_told_before_anything_is_sent(url, asked, tmp_path) -> None:
    asked.clear()
    for wrong in ({"json_file": tmp_path / "no" / "x.json"}, {"plot_file": tmp_path / "x.doc"}):
        with pytest.raises(UserError):
            run(bench(url, **wrong))
    with pytest.raises(UserError, match="no server answers"):
        run(bench("http://127.0.0.1:9", model=None))
    assert not asked


async def test_no_more_than_the_concurrency_are_on_their_way() -> None:
    now, most = 0, 0

    async def send(_: object) -> Record:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(20):
            await asyncio.sleep(0)
        now -= 1
        return Record(sent=0.0)

    seen: list[Record] = []
    load = Load(n_requests=50, seconds=None, rate=None, concurrency=4, seed=0)
    assert not await drive(load, random_words(3, 0), send, seen.append)
    assert len(seen) == 50 and most == 4


def test_ctrl_c_tells_what_there_is(url, monkeypatch, capsys) -> None:
    """The fifth request never ends; Ctrl-C comes while it is waited for."""
    sent = 0
    real = Target.send

    async def send(self: Target, prompt: object) -> Record:
        nonlocal sent
        sent += 1
        if sent == 7:  # two probes before them
            asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        return await real(self, prompt)  # type: ignore[arg-type]

    monkeypatch.setattr(Target, "send", send)
    load = Load(n_requests=5, seconds=None, rate=None, concurrency=1, seed=0)
    assert run(bench(url, load=load)) == 130
    assert "(interrupted): 4 answered, 0 failed" in capsys.readouterr().out


async def test_events_are_whole_however_the_bytes_are_cut() -> None:
    from serving.bench.client import events

    raw = 'data: {"a": "\u2028é"}\r\n\r\n: comment\n\ndata: [DONE]\n\n'.encode()

    async def parts() -> object:
        for at in range(len(raw)):
            yield raw[at : at + 1]

    response = SimpleNamespace(content=SimpleNamespace(iter_any=parts))
    assert [data async for data in events(response)] == ['{"a": "\u2028é"}'.encode(), b"[DONE]"]  # type: ignore[arg-type]


async def test_a_connection_that_breaks_is_an_error_of_its_kind() -> None:
    async with aiohttp.ClientSession() as session:
        target = Target(session, "http://127.0.0.1:9/v1", "m", False, {})
        record = await target.send("hello")
    assert record.error == "connection: ClientConnectorError" and not record.pieces
