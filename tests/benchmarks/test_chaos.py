"""The storm of benchmarks/chaos.py: a real server survives it, and one that cuts or changes answers is found out."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from benchmarks import chaos
from benchmarks.faults import Faults, Plan, Supervisor
from benchmarks.storm import GAUGES, Storm
from benchmarks.storm_cases import Run
from serving.ports import free_port

CHAOS = Path(chaos.__file__)


def test_a_server_loses_nothing_in_a_storm_though_it_is_killed(tmp_path):
    path, port = tmp_path / "chaos.json", free_port()
    server = f"{sys.executable} -m mpt serve --port {port} --model mpt-tiny"
    command = [sys.executable, str(CHAOS), "--url", f"http://127.0.0.1:{port}", "--seconds", "5", "--streams", "12"]
    command += ["--burst", "40", "--json", str(path), "--command", server, "--faults", "server", "--pause", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert (result["lost"], result["wrong"]) == (0, 0)
    assert result["kinds"]["stream"]["complete"] > 0
    assert result["kinds"]["after: gauges at 0"]["complete"] == 1
    (strike,) = result["strikes"]
    assert strike["answers_after_s"] > 0
    assert sum(kind["away"] for kind in result["kinds"].values()) > 0  # nobody was there for a while
    assert result["exit_codes"] == [-signal.SIGKILL, 0]


def test_a_fault_excuses_only_what_it_broke() -> None:
    """Between the strike and a second after its end; a connection that began later broke for another reason."""
    faults = Faults("http://127.0.0.1:1", {}, ["fake"], Supervisor("true"), Plan("true"), 0)
    assert not faults.excuses(time.monotonic())
    faults._since, faults._until = 100.0, -1.0
    assert faults.excuses(90.0) and faults.excuses(110.0)
    faults._until = 120.0
    assert faults.excuses(121.0) and not faults.excuses(121.1)


def chunk(text: str, finish_reason: str | None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
WHOLE = [chunk("an ", None), chunk("answer", "length"), DONE]


@contextlib.asynccontextmanager
async def fake_server(pieces: list[bytes]) -> AsyncIterator[str]:
    """A server whose whole answers are right, and whose streams are these pieces; then the connection is closed."""

    async def completions(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if not asked.get("stream"):
            scores = {"tokens": ["an ", "answer"], "top_logprobs": [{"a": -0.1, "b": -3.0}] * 2}
            choice = {"text": "an answer", "finish_reason": "length", "logprobs": scores}
            choices = [{"index": k, **choice} for k in range(asked.get("n", 1))]
            usage = {"completion_tokens": asked["max_tokens"] * len(choices)}
            return web.json_response({"choices": choices, "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 64, "prompt_style": "none"}]})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text="".join(f"{gauge} 0\n" for gauge in GAUGES))

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("pieces", "what"),
    [
        ([chunk("an ", None)], "without [DONE]"),
        ([chunk("an ", None), chunk("answer", "length")], "without [DONE]"),
        ([chunk("an ", None), chunk("answer", None), DONE], "without a finish_reason"),
        ([chunk("an ", "length"), chunk("answer", "length"), DONE], "after its finish_reason"),
        ([chunk("an ", None), chunk("error", "length"), DONE], "wrong text"),
        ([*WHOLE, chunk("more", None)], "after [DONE]"),
        ([*WHOLE[:-1], DONE[:-1]], "inside an event"),
    ],
)
async def test_a_stream_that_is_cut_or_changed_is_lost(pieces, what):
    async with fake_server(pieces) as url, Storm(options(url)) as storm:
        await storm.prepare()
        for case in storm.cases:
            await storm.attempt("stream", storm.stream(case))
            await storm.attempt("whole", storm.whole(case))
    assert storm.tally.outcomes == {("stream", "lost"): len(storm.cases), ("whole", "complete"): len(storm.cases)}
    assert all(what in example for example in storm.tally.examples["stream: lost"])


async def test_a_run_reports_what_a_fake_server_truncates():
    async with fake_server(WHOLE[:-1]) as url:
        result = await chaos.storm_over(options(url))
    row = result["kinds"]["stream"]
    assert row["lost"] == row["sent"] > 0
    assert result["kinds"]["whole"]["lost"] == 0
    assert result["kinds"]["bad: JSON"]["wrong"] == result["kinds"]["bad: JSON"]["sent"] > 0  # aiohttp's own 500


def options(url: str) -> Run:
    return Run(url, None, (), seconds=1.5, seed=0, n_streams=8, n_burst=0, patience_s=30, tie=0.0)
