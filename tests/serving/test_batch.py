"""`mpt run-batch`: every request is answered once, whatever stops a run; nothing is sent of a file that is wrong."""

import fcntl
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from mpt.errors import Interrupted, MachineRefused, UserError
from mpt.options import ModelOptions
from serving.batch import sending
from serving.batch.lines import Results, check
from serving.batch.run import BatchRun, run
from tests.in_process import listening


class Stub:
    """Answers with the prompt in capitals; does what a prompt asks for."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.on: dict[str, Response] = {}  # answered once and then no more
        self.away = False

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            prompt = (await request.json())["prompt"]
            self.asked[prompt] += 1
            if self.away:
                return JSONResponse({"error": {"code": "shutting_down"}}, 503)
            if prompt == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                return JSONResponse({}, 429, {"retry-after": "100"})
            if prompt in self.on:
                return self.on.pop(prompt)
            if prompt.startswith("bad"):
                return JSONResponse({"error": {"code": "invalid_value"}}, 400)
            if prompt.startswith("poison"):
                return JSONResponse({"error": {"code": "overloaded"}}, 503)
            return JSONResponse({"text": prompt.upper()})

        return app


@pytest.fixture
def stub(monkeypatch) -> Stub:
    monkeypatch.setattr(sending, "_WAITS_S", (0.01, 0.01, 0.02))
    return Stub()


@pytest.fixture
def url(stub) -> Iterator[str]:
    with listening(stub.app(), log_level="warning") as address:
        yield address


def write(path: Path, prompts: list[str], **changed) -> Path:
    rows = [
        {"custom_id": f"id-{p}", "method": "POST", "url": "/v1/completions", "body": {"prompt": p}} | changed
        for p in prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(path: Path) -> dict[str, dict]:
    """By custom id, each there once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def batch(folder: Path, url: str | None, **changed) -> BatchRun:
    told = {
        "requests": folder / "in.jsonl", "results": folder / "out.jsonl", "url": url, "models": {}, "api_key": None,
        "n_at_once": 4, "timeout_s": 20.0,
    }  # fmt: skip
    return BatchRun(**told | changed)


def test_each_request_has_its_line(tmp_path, stub, url, capsys) -> None:
    write(tmp_path / "in.jsonl", ["a", "bad b", *(f"p{n}" for n in range(20))])
    assert run(batch(tmp_path, url)) == 0
    found = results(tmp_path / "out.jsonl")
    assert len(found) == 22 and set(stub.asked.values()) == {1}
    row = found["id-a"]
    assert set(row) == {"id", "custom_id", "response", "error"} and row["id"].startswith("batch_req_")
    assert (row["response"]["status_code"], row["response"]["body"], row["error"]) == (200, {"text": "A"}, None)
    assert row["response"]["request_id"]
    assert found["id-bad b"]["response"]["status_code"] == 400
    assert "21 answered, 1 failed (1 x 400)" in capsys.readouterr().out


def test_a_second_run_goes_on_behind_a_half_written_line(tmp_path, stub, url) -> None:
    write(tmp_path / "in.jsonl", ["a", "b", "c"])
    assert run(batch(tmp_path, url)) == 0
    whole = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    kept = json.loads(whole[0])["custom_id"].removeprefix("id-")
    (tmp_path / "out.jsonl").write_text(whole[0] + whole[1][:30])  # as a killed run leaves it
    stub.asked.clear()
    assert run(batch(tmp_path, url)) == 0
    assert set(results(tmp_path / "out.jsonl")) == {"id-a", "id-b", "id-c"}
    assert set(stub.asked) == {"a", "b", "c"} - {kept}


def test_what_is_refused_for_the_moment_is_asked_again(tmp_path, stub, url) -> None:
    stub.on = {
        "a": JSONResponse({}, 503, {"retry-after": "0"}), "b": JSONResponse({}, 429, {"retry-after": "1"}),
        "c": JSONResponse({"error": {"code": "request_timeout"}}, 503), "d": Response("<html>", 502),
    }  # fmt: skip
    write(tmp_path / "in.jsonl", ["a", "b", "c", "d"])
    assert run(batch(tmp_path, url)) == 0
    statuses = {name: row["response"]["status_code"] for name, row in results(tmp_path / "out.jsonl").items()}
    assert statuses == {"id-a": 200, "id-b": 200, "id-c": 503, "id-d": 200}  # the same would time out again
    assert stub.asked == {"a": 2, "b": 2, "c": 1, "d": 2}


def test_one_request_that_never_works_does_not_stop_the_others(tmp_path, stub, url) -> None:
    write(tmp_path / "in.jsonl", ["poison", *(f"p{n}" for n in range(200))])
    assert run(batch(tmp_path, url, n_at_once=2)) == 0
    assert results(tmp_path / "out.jsonl")["id-poison"]["response"]["status_code"] == 503
    assert stub.asked["poison"] == 1 + 3


def test_a_server_that_is_lost_stops_the_run_and_the_next_one_goes_on(tmp_path, stub, url) -> None:
    write(tmp_path / "in.jsonl", [f"p{n}" for n in range(6)])
    write(tmp_path / "some.jsonl", ["p0", "p1"])
    assert run(batch(tmp_path, url, requests=tmp_path / "some.jsonl")) == 0
    stub.away = True
    with pytest.raises(Interrupted, match=r"0 answered, 0 failed, 2 were there before.*run the same command again"):
        run(batch(tmp_path, url))
    with pytest.raises(Interrupted, match="ConnectError"):
        run(batch(tmp_path, "http://127.0.0.1:9"))
    stub.away = False
    assert run(batch(tmp_path, url)) == 0
    assert len(results(tmp_path / "out.jsonl")) == 6


def test_ctrl_c_keeps_what_there_is(tmp_path, stub, url) -> None:
    write(tmp_path / "in.jsonl", ["a", "interrupt"])
    with pytest.raises(Interrupted, match=r"1 answered, 0 failed: .* run the same command again"):
        run(batch(tmp_path, url, n_at_once=1))
    assert set(results(tmp_path / "out.jsonl")) == {"id-a"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "has no requests"),
        ("{", "line 1: this is no JSON"),
        ("[1]\n", "line 1: this is no JSON object"),
        ('{"method": "POST"}\n', "line 1: `custom_id`"),
        ('{"custom_id": "a", "method": "GET"}\n', "line 1: `method` is 'GET'"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/models"}\n', "line 1: `url` is '/v1/models'"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": 1}\n', "line 1: `body`"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}\n', "stream"),
    ],
)
def test_nothing_is_sent_of_a_file_that_is_wrong(tmp_path, stub, url, text, part) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(UserError, match="nothing was sent") as wrong:
        run(batch(tmp_path, url))
    assert part in str(wrong.value) and not stub.asked


def test_a_custom_id_that_comes_twice_is_refused(tmp_path, stub, url) -> None:
    write(tmp_path / "in.jsonl", ["a", "b", "a"])
    with pytest.raises(UserError, match="line 3: `id-a` is line 1's too"):
        run(batch(tmp_path, url))
    assert not stub.asked


def test_a_file_of_results_is_not_taken_for_another(tmp_path, url) -> None:
    write(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(UserError, match="is the file of requests"):
        run(batch(tmp_path, url, results=tmp_path / "in.jsonl"))
    (tmp_path / "notes").write_text("buy milk\n")
    with pytest.raises(UserError, match=r"line 1 of .* is no result"):
        run(batch(tmp_path, url, results=tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "buy milk\n"


def test_two_runs_do_not_write_one_file(tmp_path, url) -> None:
    write(tmp_path / "in.jsonl", ["a"])
    with (tmp_path / "out.jsonl").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run writes"):
            run(batch(tmp_path, url))


def test_a_full_disk_is_told_and_the_half_line_dropped(tmp_path, monkeypatch) -> None:
    opened = Results(tmp_path / "out.jsonl")
    opened.append({"custom_id": "a"})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, raw: real(fd, raw[:5]))
    with pytest.raises(MachineRefused, match="disk is full"):
        opened.append({"custom_id": "b"})
    monkeypatch.undo()
    opened.close()
    assert Results(tmp_path / "out.jsonl").done == {"a"}
    assert (tmp_path / "out.jsonl").read_text() == '{"custom_id":"a"}\n'


def test_models_opened_here_answer_as_a_server_does(tmp_path) -> None:
    rows = [
        ("/v1/completions", {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}),
        ("/v1/embeddings", {"model": "tiny", "input": "Once"}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"model": "nobody", "prompt": "a"}),
    ]
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": body} for n, (url, body) in enumerate(rows)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"tiny": ModelOptions("mpt-tiny", device="cpu", kv_gb=0.01, threads=1)}
    assert run(batch(tmp_path, None, models=models)) == 0
    found = {name: row["response"] for name, row in results(tmp_path / "out.jsonl").items()}
    assert found["0"]["body"]["usage"]["completion_tokens"] == 4
    assert len(found["1"]["body"]["data"][0]["embedding"]) > 8
    assert found["2"]["status_code"] == 400  # a base model takes no messages
    assert found["3"]["body"]["error"]["code"] == "model_not_found"


def test_problems_are_found_up_to_a_number(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_text("{\n" * 1000)
    n, problems = check(tmp_path / "in.jsonl")
    assert (n, len(problems)) == (0, 20) and problems[4].line == 5
    write(tmp_path / "in.jsonl", ["a", "b", "c"])
    assert [p.code for p in check(tmp_path / "in.jsonl", most=2)[1]] == ["too_many_tasks"]
    assert [p.code for p in check(tmp_path / "in.jsonl", "/v1/embeddings")[1]] == ["invalid_url"] * 3
