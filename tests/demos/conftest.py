"""A browser, real servers with the tiny family, and a scripted one for what a real server does too seldom."""

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.serving import servers
from tests.serving.servers import free_port

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("MPT_CHROMIUM", "/usr/bin/chromium")


# -- a real server ---------------------------------------------------------------------------------------------------


@dataclass
class RealServer:
    """`mpt serve` with the tiny family, which can be killed and started again at the same URL."""

    port: int
    options: tuple[str, ...] = ()
    server: servers.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = servers.start("serve", "--port", str(self.port), "--drain-seconds", "0", *self.options)

    def end(self, with_signal: int = signal.SIGTERM) -> None:
        if self.server is not None:
            self.server.stop(with_signal)


@pytest.fixture(scope="module")
def real_server() -> Iterator[RealServer]:
    server = RealServer(free_port())
    try:
        server.start()
        yield server
    finally:
        server.end()


# -- a scripted server -----------------------------------------------------------------------------------------------


@dataclass
class ScriptedServer:
    """Answers by the first word of the last message, some of which it knows; others it repeats.

    `slow`, `silent`, `break` and `error` are how a stream goes. `busy` is refused, `crowded` the first time only,
    `throttled` each time. A token is a word to it. `closed` counts streams that the client left before they ended.
    """

    url: str = ""
    key: str | None = None
    context: int = 100
    started: int = 0
    closed: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    style: str = "chatml"

    def app(self) -> FastAPI:
        app = FastAPI()

        def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
            return JSONResponse(
                {"error": {"message": message, "type": "t", "param": None, "code": code}}, status, headers
            )

        @app.get("/v1/models")
        async def models(request: Request) -> Any:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return error(401, "invalid_api_key", "the API key is wrong")
            return {
                "data": [
                    {
                        "id": "scripted-chat", "context_length": self.context, "prompt_style": self.style,
                        "licence": "CC-BY-NC-SA-4.0", "parent": None,
                    }
                ]
            }  # fmt: skip

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            body = await request.json()
            return {"count": words(body)}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Any:
            body = await request.json()
            last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            word = last.split()[0]
            if word == "busy":
                return error(503, "overloaded", "32 requests run and 256 wait", {"Retry-After": "7"})
            if word == "crowded" and last not in self.refused:
                self.refused.append(last)
                return error(503, "overloaded", "32 requests run and 256 wait", {"Retry-After": "2"})
            if word == "throttled":
                self.refused.append(last)
                return error(429, "rate_limit_exceeded", "60 requests a minute", {"Retry-After": "1"})
            if words(body) + (body.get("max_tokens") or 1) > self.context:
                return error(400, "context_length_exceeded", f"{words(body)} tokens, over the {self.context} of it")
            self.bodies.append(body)
            return StreamingResponse(stream(body, last), media_type="text/event-stream")

        async def stream(body: dict[str, Any], last: str) -> Any:
            self.started += 1
            word = last.split()[0]
            done = False

            def chunk(text: str, finish: str | None = None) -> str:
                choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
                choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
                return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"

            try:
                if word == "silent":
                    await asyncio.sleep(3600)
                if word == "slow":
                    for n in range(10_000):
                        yield chunk(f"word{n} ")
                        await asyncio.sleep(0.03)
                elif word == "break":
                    yield chunk("It began well ")
                    await asyncio.sleep(0.2)
                    done = True
                    return  # no [DONE]
                elif word == "error":
                    yield chunk("It began well ")
                    failed = {
                        "message": "replica 3 is gone",
                        "type": "server_error",
                        "param": None,
                        "code": "replica_lost",
                    }
                    yield f"data: {json.dumps({'error': failed})}\n\n"
                    done = True
                    return
                else:
                    for word in re.findall(r"\s*\S+|\s+$", last):
                        yield chunk(word)
                yield chunk("", "stop")
                n_prompt, n_answer = words(body), len(last.split())
                yield f"data: {json.dumps({'choices': [], 'usage': usage(n_prompt, n_answer)})}\n\n"
                yield "data: [DONE]\n\n"
                done = True
            finally:
                self.closed += not done

        return app


def words(body: dict[str, Any]) -> int:
    texts = [message["content"] for message in body["messages"]] if body.get("messages") else [body["prompt"]]
    return sum(len(text.split()) for text in texts)


def usage(n_prompt: int, n_answer: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    script = ScriptedServer()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(script.app(), port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{port}"
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    yield script
    server.should_exit = True
    thread.join(5)


# -- a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says what is missing. Module-wide: Playwright's loop must end before asyncio's tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}; apt-get install chromium, or set MPT_CHROMIUM")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A page of a URL in a window of its own; errors of its scripts, and requests to other machines, fail the test."""
    contexts, troubles = [], []

    def open_at(url: str, *, width: int = 1280, height: int = 860, dark: bool = False) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", locale="en-GB"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: troubles.append(f"error in the page: {error}"))
        page.on(
            "request", lambda request: troubles.append(f"outside: {request.url}") if is_outside(request.url) else None
        )
        page.goto(url)
        page.get_by_role("heading", level=1).wait_for()
        return page

    yield open_at
    for context in contexts:
        with suppress(Exception):  # one that the test itself has closed
            context.close()
    assert not troubles


def is_outside(url: str) -> bool:
    return re.match(r"(https?|wss?)://(?!127\.0\.0\.1)", url) is not None


@pytest.fixture
def screenshot() -> Callable[[Any, str], None]:
    """Save a picture of a page to docs/images when MPT_SCREENSHOTS=1."""

    def take(page: Any, name: str) -> None:
        if os.environ.get("MPT_SCREENSHOTS") == "1":
            folder = ROOT / "docs" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(folder / f"{name}.png"))

    return take


@pytest.fixture
def show() -> Iterator[Callable[[Any], str]]:
    """Serve a Space in this process; the URL of its page."""
    running = []

    def launch(blocks: Any) -> str:
        from demos.mpt_space import launch_options

        _, url, _ = blocks.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=free_port(), **launch_options()
        )
        running.append(blocks)
        return str(url)

    yield launch
    for blocks in running:
        blocks.close(verbose=False)
