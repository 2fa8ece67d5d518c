"""`mpt serve` as a process: ready, asked, told to stop, and what it says when it cannot start."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

import mpt
from serving.listening import listen
from serving.logs import process_age_s
from serving.ports import free_port
from tests.serving import servers

Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    return mpt.save(model, tmp_path_factory.mktemp("checkpoints") / "base", tokenizer=tokenizer)


@pytest.fixture
def start(folder) -> Iterator[Start]:
    started: list[servers.Server] = []

    def run(*options: str) -> tuple[subprocess.Popen[str], str]:
        server = servers.start("serve", "--port", "0", "--model", f"base={folder}", *options)
        started.append(server)
        return server.process, server.url

    yield run
    for server in started:
        server.stop(signal.SIGKILL)


def asking(n_tokens: int) -> dict[str, object]:
    return {"model": "base", "prompt": "a", "max_tokens": n_tokens, "stream": True, "ignore_eos": True}


def test_sigterm_lets_running_streams_finish_and_refuses_new_ones(start):
    process, url = start()
    with httpx.stream("POST", f"{url}/v1/completions", json=asking(600), timeout=100) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client() as late:
            late.get(f"{url}/health")  # its connection is open before the listener closes
            process.send_signal(signal.SIGTERM)
            while (refused := late.get(f"{url}/ready")).status_code == 200:
                pass
            refused = late.post(f"{url}/v1/completions", json=asking(1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(100) == 0


def test_sigterm_ends_what_does_not_finish_with_an_error_event(start):
    process, url = start("--drain-seconds", "0.1")
    with httpx.stream("POST", f"{url}/v1/completions", json=asking(2000), timeout=100) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"code":"shutting_down"' in rest[-1]
    assert "data: [DONE]" not in rest
    assert process.wait(100) == 0


SECOND_FAILS = """
import os, sys, time
from mpt import cli
from mpt.errors import DamagedFile
from serving import lifecycle

whole = lifecycle.open_endpoint

def open_endpoint(name, *rest):
    while name == "bad":
        if os.path.exists(os.environ["FLAG"]):
            raise DamagedFile("its second half is missing")
        time.sleep(0.01)
    return whole(name, *rest)

lifecycle.open_endpoint = open_endpoint
sys.argv[0] = "mpt"
cli.main()
"""


def test_a_model_that_cannot_be_loaded_cuts_no_answer_of_another(folder, tmp_path):
    port, flag = free_port(), tmp_path / "flag"
    models = ("--model", f"base={folder}", "--model", f"bad={folder}")
    command = [sys.executable, "-c", SECOND_FAILS, "serve", "--port", str(port), *models]
    with subprocess.Popen(command, env={**os.environ, "FLAG": str(flag)}) as process:
        try:
            while True:
                with (
                    contextlib.suppress(httpx.TransportError),
                    httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=100) as client,
                    client.stream("POST", "/v1/completions", json=asking(200)) as response,
                ):
                    if response.status_code == 200:
                        health = client.get("/health")
                        assert (health.status_code, health.json()) == (503, {"status": "loading"})
                        assert client.get("/ready").status_code == 503
                        flag.touch()
                        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
                        break
                assert process.poll() is None
                time.sleep(0.05)
            assert process.wait(100) == 3
        finally:
            process.kill()


PATIENT = """
import sys, uvicorn
from mpt import cli
from serving import server

make = uvicorn.Config

def patient(*arguments, **options):
    return make(*arguments, **{**options, "timeout_graceful_shutdown": 1000})

uvicorn.Config = patient
sys.argv[0] = "mpt"
cli.main()
"""


def test_what_gets_no_answer_holds_nothing_up_when_the_terminal_is_closed(folder):
    """Idle connections, half a head, half a body, a demo's page that listens. It would wait for them for long."""
    options = ("--port", "0", "--model", f"base={folder}", "--demo")
    server = servers.start("serve", *options, program=("-c", PATIENT))
    address = "127.0.0.1", int(server.url.rpartition(":")[2])
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n"
    )
    page = b"GET /demo/gradio_api/heartbeat/abc HTTP/1.1\r\nhost: localhost\r\n\r\n"
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with ExitStack() as opened:
        opened.callback(server.stop, signal.SIGKILL)
        for sent in (head, head + b"\r\n{", whole, page, page):
            connection = opened.enter_context(socket.create_connection(address, timeout=100))
            connection.sendall(sent)
            if sent in (whole, page):
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asking(400), timeout=100) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGHUP)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(100) == 0


def test_standard_streams_that_are_closed_are_nobody_elses(folder):
    """Else the server's sockets get their numbers, and what libraries write to stderr."""
    port = free_port()
    options = ("serve", "--port", str(port), "--model", f"base={folder}")
    command = f"exec {sys.executable} -m mpt {shlex.join(options)} 0<&- 1>&- 2>&-"
    with subprocess.Popen(command, shell=True) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        try:
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/ready").status_code == 200:
                        break
                time.sleep(0.05)
            assert client.post("/v1/completions", json=asking(4) | {"stream": False}).status_code == 200
            opened = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
            assert opened == [os.devnull] * 3
            process.send_signal(signal.SIGTERM)
            assert process.wait(100) == 0
        finally:
            process.kill()


def refusal(*options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "mpt", "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_what_cannot_start_is_one_line_and_an_exit_code(folder, tmp_path):
    code, line = refusal("--model", str(tmp_path / "nothing"))
    assert code == 2 and line.startswith("mpt: ")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    code, line = refusal("--model", f"base={damaged}")
    assert code == 3 and line.startswith("mpt: ") and "sha256" in line


DOOMED = """
import sys
import torch
from mpt import cli
from mpt.backends.torch_backend import TorchBackend

whole = TorchBackend.forward

def forward(self, work):
    if any(len(item.tokens) == 13 for item in work):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return whole(self, work)

TorchBackend.forward = forward
sys.argv[0] = "mpt"
cli.main()
"""


def test_a_lost_device_ends_the_process_with_a_code_of_its_own(folder):
    """The prompt of 13 tokens meets it; a request to the other model ends as it should."""
    models = ("--model", f"base={folder}", "--model", f"other={folder}", "--no-speculate")
    server = servers.start("serve", "--port", "0", *models, program=("-c", DOOMED))
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asking(1500) | {"model": "other"}) as other:
            lines = other.iter_lines()
            next(lines)
            with httpx.Client(base_url=server.url, timeout=100) as client:
                assert client.get("/ready").status_code == client.get("/health").status_code == 200
                bad = client.post("/v1/completions", json=asking(4) | {"stream": False, "prompt": "x" * 13})
                assert (bad.status_code, bad.json()["error"]["code"]) == (503, "engine_stopped")
                assert (client.get("/health").status_code, client.get("/ready").status_code) == (503, 503)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(100) == 6
        server.reader.join(100)
    finally:
        server.stop(signal.SIGKILL)
    assert "mpt: `base` has stopped: the device is lost: CUDA error: an illegal memory access" in "".join(server.lines)


STUCK = """
import sys, threading
from mpt import cli
from serving import lifecycle

def open_endpoint(*_):
    print("loading", file=sys.stderr, flush=True)
    threading.Event().wait()

lifecycle.open_endpoint = open_endpoint
sys.argv[0] = "mpt"
cli.main()
"""


def test_sigterm_while_a_model_loads_ends_it_at_once_and_well(folder):
    """The thread that loads would never end, so nothing waited for it."""
    command = [sys.executable, "-c", STUCK, "serve", "--port", "0", "--model", f"base={folder}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("loading" in line for line in process.stderr)
            process.send_signal(signal.SIGTERM)
            assert process.wait(100) == 0
        finally:
            process.kill()


def test_sigterm_before_the_server_stands_ends_it_well(folder):
    code = "import os, signal\nfrom mpt import cli, catalog\n"
    code += "catalog.resolve = lambda _: os.kill(os.getpid(), signal.SIGTERM)\ncli.main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--model", f"base={folder}"]
    assert subprocess.run(command, timeout=100, check=False).returncode == 0


def test_a_command_that_ends_looks_for_no_cycles():
    """Among the objects of torch that takes a second. They are frozen before the interpreter's own end begins."""
    code = "import atexit, gc\natexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
    code += "from mpt import cli\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "True"


def test_a_process_is_as_old_as_psutil_says():
    assert process_age_s() == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)


def test_a_port_that_is_taken_is_said_before_anything_loads(folder):
    with listen("127.0.0.1", 0) as taken:  # as a server takes it
        taken.listen()
        port = str(taken.getsockname()[1])
        code, line = refusal("--model", f"base={folder}", "--port", port)
    assert code == 2 and line.startswith("mpt: ") and port in line


def test_a_profile_shows_where_steps_spend_their_time(start, tmp_path):
    process, url = start("--profile", str(tmp_path / "new"))
    httpx.post(f"{url}/v1/completions", json=asking(60) | {"stream": False}, timeout=100).raise_for_status()
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0
    trace = json.loads((tmp_path / "new" / "base.trace.json").read_text())
    spans = Counter(event.get("name") for event in trace["traceEvents"])
    assert spans["model"] == spans["draw"] == spans["plan"] > 20  # 60 tokens without the first 20 steps
    assert "model" in (tmp_path / "new" / "base.txt").read_text()
