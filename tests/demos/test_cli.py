"""The command `mpt demo` as a process: its password, its port, its end, and copies that stand alone."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from httpx import ASGITransport
from typer.testing import CliRunner

from mpt.cli import app
from serving.ports import free_port
from tests.serving import servers

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demos]")

from demos import cli
from demos.cli import NAMES
from demos.server import mount


@contextmanager
def running(*command: str, until: str = "ready on") -> Iterator[None]:
    """A process that has said what it says when it is ready; killed at the end."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if until in line:
                break
        else:
            raise AssertionError(f"left with {process.wait()}: {''.join(said)}")
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_taken_port_is_one_line_and_status_2(scripted: Any) -> None:
    port = scripted.url.rpartition(":")[2]
    ran = CliRunner().invoke(app, ["demo", "chat", "--url", "http://127.0.0.1:9", "--port", port])
    assert ran.exit_code == 2
    said = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port or --host"
    assert ran.stderr == f"mpt demo: {said}\n"
    assert ran.stdout == ""


def test_a_password_lets_in_who_knows_it_and_sigterm_ends_page_and_server() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    demo = servers.start("demo", "chat", "--port", str(port), "--auth", "ann:right")  # says what its server says
    try:
        server_url = demo.url
        assert not server_url.endswith(f":{port}")
        assert wait_for(f"{url}/config").status_code == 401
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
            assert client.get("/config").status_code == 401
            assert client.post("/login", data={"username": "ann", "password": "right"}).status_code == 200
            assert client.get("/config").json()["title"] == "MPT chat"
        assert httpx.get(f"{server_url}/v1/models", trust_env=False).status_code == 200
        began = time.monotonic()
        assert demo.stop() == 0
        assert time.monotonic() - began < 8
        for ended in (server_url, url):
            with pytest.raises(httpx.ConnectError):
                httpx.get(ended, trust_env=False)
    finally:
        demo.stop()


def test_the_end_of_the_server_started_here_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    for dies, says in (("os.kill(os.getpid(), 9)", "the server has ended (exit code -9)"), ("pass", "")):
        program = f"import os, sys; print('a warning', file=sys.stderr); {dies}"
        cli._pass_on(subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True))
        first, *rest = capfd.readouterr().err.splitlines()
        assert first == "a warning"
        assert ("".join(rest) == "") if not says else says in rest[0]


async def test_all_pages_are_mounted_into_a_server(recwarn: pytest.WarningsRecorder) -> None:
    site = ASGITransport(mount(FastAPI(), "http://127.0.0.1:9"))
    async with httpx.AsyncClient(transport=site, base_url="http://testserver") as client:
        pages = (await client.get("/demo/config")).json()["pages"]
        assert [path for path, *_ in pages] == ["", *NAMES[1:]]
        for path, *_ in pages:
            assert (await client.get(f"/demo/{path}")).status_code == 200
    assert not [each for each in recwarn if "SSR" in str(each.message)]  # Gradio's, to whom serves them


def test_a_copy_starts_alone_against_a_server(scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-space"
    assert CliRunner().invoke(app, ["demo", "copy", "chat", str(folder)]).exit_code == 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {"app.py", "README.md", "requirements.txt", "mpt_space.py", "mpt_page.py"}
    again = CliRunner().invoke(app, ["demo", "copy", "chat", str(folder)])
    assert again.exit_code == 2
    assert "nothing was copied" in again.stderr

    port = free_port()
    monkeypatch.setenv("MPT_URL", scripted.url)
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    monkeypatch.chdir(folder)
    with running("-u", "app.py", until="Running on"):
        assert wait_for(f"http://127.0.0.1:{port}/config").json()["title"] == "MPT chat"


def test_a_copy_that_a_full_disk_stops_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, copied = shutil.copyfile, []

    def copy(source: Path, target: Path) -> None:
        if copied:
            target.write_text("hal")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        copied.append(real(source, target))

    monkeypatch.setattr(shutil, "copyfile", copy)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for folder in (tmp_path / "new", tmp_path / "mine"):
        copied.clear()
        error = CliRunner().invoke(app, ["demo", "copy", "chat", str(folder)]).exception
        assert isinstance(error, OSError) and error.filename == str(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]


def wait_for(url: str) -> httpx.Response:
    """What answers there, once something does."""
    for _ in range(200):
        try:
            return httpx.get(url, trust_env=False)
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers at {url}")
