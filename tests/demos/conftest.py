"""A browser, a real server with the tiny family, and a scripted one for what a real server does too seldom.

Servers and pages are started once for many tests; what a test can change is its own.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serving.ports import free_port
from tests.demos.scripted_server import ScriptedServer
from tests.serving import servers

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("MPT_CHROMIUM", "/usr/bin/chromium")
TINY = ("mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter")
SHORT = "mpt-tiny-storywriter-1k"  # a StoryWriter that holds 1,024 tokens, so that a book is soon too long


@pytest.fixture(scope="session")
def real_server() -> Iterator[servers.Server]:
    """`mpt serve` with the tiny family and SHORT."""
    models = [option for name in TINY for option in ("--model", name)]
    short = ("--model", f"{SHORT}=mpt-tiny-storywriter", "--context-length", f"{SHORT}=1024")
    with servers.running("serve", "--port", "0", "--drain-seconds", "0", *models, *short) as server:
        yield server


class _Stage:
    """An ASGI app that is the app of whichever script is on: the server stays when the script changes."""

    def __init__(self) -> None:
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[_Stage, str]]:
    """A server without a script, and its URL."""
    stage, port = _Stage(), free_port()
    config = uvicorn.Config(stage, port=port, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    yield stage, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(5)


@pytest.fixture
def scripted(stage: tuple[_Stage, str]) -> ScriptedServer:
    """A fresh script. A stream that a test left open ends in the counts of that test's own."""
    script = ScriptedServer(stage[1])
    stage[0].app = script.app()
    return script


@pytest.fixture(scope="module")
def show() -> Iterator[Callable[[str, str], str]]:
    """Serve a Space over the server at a URL, in this process and once; the URL of its page."""
    running = []

    @cache
    def launch(name: str, server_url: str) -> str:
        from demos.mpt_page import launch_options
        from demos.mpt_space import Server

        blocks = import_module(f"demos.{name}.app").build(Server(server_url))
        _, url, _ = blocks.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=free_port(), **launch_options()
        )
        running.append(blocks)
        return str(url)

    yield launch
    for blocks in running:
        blocks.close(verbose=False)


# -- a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says what is missing. Module-wide: Playwright's loop must end before asyncio's tests.

    One context, so that Gradio's scripts are loaded once.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}; apt-get install chromium, or set MPT_CHROMIUM")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = chromium.new_context(locale="en-GB")
        context.set_default_timeout(15_000)
        context.new_page()
        yield context
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A page of a URL in a tab of its own; errors of its scripts, and requests to other machines, fail the test.

    After the test one empty tab is left, and nothing of what a page saved in the browser.
    """
    troubles: list[str] = []
    listeners = {
        "weberror": lambda error: troubles.append(f"error in the page: {error.error}"),
        "request": lambda request: troubles.append(f"outside: {request.url}") if is_outside(request.url) else None,
    }

    def open_at(url: str, *, width: int = 1280, height: int = 860, dark: bool = False) -> Any:
        page = next((page for page in browser.pages if page.url == "about:blank"), None) or browser.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto(url)
        page.get_by_role("heading", level=1).wait_for()
        return page

    for event, listener in listeners.items():
        browser.on(event, listener)
    yield open_at
    for page in [page for page in browser.pages if page.url != "about:blank"]:
        page.evaluate("localStorage.clear(); sessionStorage.clear()")
        page.goto("about:blank")
    for page in browser.pages[1:]:
        page.close()
    for event, listener in listeners.items():
        browser.remove_listener(event, listener)
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
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(400)  # until drawers that open have opened
            page.screenshot(path=str(folder / f"{name}.png"))

    return take
