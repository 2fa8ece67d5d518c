"""The command `mpt demo`: the Spaces in a browser, and copies of them to deploy."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mpt.extras import require  # the one of `mpt` that is needed: which command installs them, this copy knows

NAMES = ("chat", "instruct", "storywriter", "base", "compare")
SHARED = (
    "mpt_space.py",
    "mpt_page.py",
    "mpt_looks.py",
    "mpt_text.py",
    "favicon.png",
)  # what each Space needs beside its own folder
LOAD_S = 120.0  # for the four tiny models, which take about 6


def demo(
    what: Annotated[
        str,
        typer.Argument(metavar="[all|chat|instruct|storywriter|base|compare|copy]", help="Which; `copy` copies one."),
    ] = "all",
    name: Annotated[str | None, typer.Argument(help="For `copy`: which.", show_default=False)] = None,
    folder: Annotated[
        Path | None, typer.Argument(help="For `copy`: where to; made if new.", show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="MPT_URL", help="An OpenAI-style server.", show_default="one with the tiny family, started here"
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MPT_API_KEY", help="Key for the server.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD", envvar="MPT_DEMO_AUTH", help="Ask visitors for these.", show_default="nobody asked"
        ),
    ] = None,
) -> None:
    """Show models in a web page: chat, instruct, storywriter, base, compare, or all of them.

    \b
    Examples:
      mpt demo
      mpt demo chat --url http://gpu-box:8000/v1
      mpt demo copy chat my-space
    """
    if what == "copy":
        _copy(name, folder)
        return
    if what not in ("all", *NAMES):
        _refuse(f"there is no demo `{what}`; there are all, {', '.join(NAMES)}")
    if name is not None or folder is not None:
        _refuse(f"`{name}` is one argument too many; only `mpt demo copy NAME FOLDER` takes more")
    user, colon, password = (auth or "").partition(":")
    if auth and not (user and colon and password):
        _refuse("--auth takes USER:PASSWORD")
    if host not in ("127.0.0.1", "localhost", "::1") and not auth:
        _say(f"warning: everybody who reaches {host} can use the page; --auth USER:PASSWORD asks them for a password")
    require("`mpt demo`", "demos", "gradio", "markdown_it", "mdit_py_plugins", "latex2mathml")
    _check_port(host, port)  # before the seconds that Gradio and a server's models take
    with _stopped_by_sigterm():
        if url is not None:
            _show(what, url, api_key, host, port, (user, password) if auth else None)
            return
        with _tiny_server() as started:
            _show(what, started, None, host, port, (user, password) if auth else None)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, or an address that is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            _refuse(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host")


def _show(what: str, url: str, key: str | None, host: str, port: int, auth: tuple[str, str] | None) -> None:
    """Serve the page until interrupted."""
    from demos import mpt_page, mpt_space, server

    source = mpt_space.Server(url, key)
    blocks = server.site(source) if what == "all" else server.page(what, source)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            quiet=True,
            prevent_thread_lock=True,
            **mpt_page.launch_options(),
        )
    except OSError as error:  # somebody has taken it meanwhile
        _refuse(f"cannot listen on {host}:{port}: {error}; choose another --port")
    _say(f"ready on http://{host}:{port}, with the server at {source.url}; Ctrl-C ends it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        blocks.close(verbose=False)


@contextmanager
def _tiny_server() -> Iterator[str]:
    """The URL of `mpt serve` with the tiny family, in a process that ends with this one."""
    _say("starting a server with the mpt-tiny family (--url takes another)")
    process = subprocess.Popen(
        [sys.executable, "-m", "mpt", "serve", "--port", "0", "--drain-seconds", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C is for this process, which then ends that one
    )  # fmt: skip
    try:
        yield _url_of(process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url_of(process: "subprocess.Popen[str]") -> str:
    """Where a server listens, once it is ready; what it says is passed on."""
    assert process.stderr is not None
    watch = threading.Timer(LOAD_S, process.kill)
    watch.start()
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := re.search(r"ready after .* on (http://[^\s,]+)", line):
                threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
                return found[1]
    finally:
        watch.cancel()
    _refuse(f"the server did not start (exit code {process.wait()}); `mpt serve` alone shows why")


def _pass_on(process: "subprocess.Popen[str]") -> None:
    """Keep reading, as a full pipe would block the server; show only what is not one of its requests, and its end."""
    assert process.stderr is not None
    for line in process.stderr:
        if " INFO " not in line:
            print(line, end="", file=sys.stderr, flush=True)
    if (code := process.wait()) not in (0, -signal.SIGTERM):
        _say(f"the server has ended (exit code {code}), so the pages cannot answer; start `mpt demo` again")


def _copy(name: str | None, folder: Path | None) -> None:
    """A Space that stands alone: its folder, and the modules it shares with the others."""
    if name not in NAMES or folder is None:
        _refuse(f"`mpt demo copy` takes a name and a folder; names: {', '.join(NAMES)}")
    here = Path(__file__).parent
    sources = [path for path in sorted((here / name).iterdir()) if path.is_file()]
    sources += [here / shared for shared in SHARED]
    existing = [path.name for path in sources if (folder / path.name).exists()]
    if existing:
        _refuse(f"`{folder}` already has {', '.join(existing)}; nothing was copied; name another folder")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sources:
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        if folder.is_dir():
            for path in sources:
                (folder / path.name).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
        error.filename = str(folder)  # also where it names the source
        raise  # the command line has a line and a code for each kind
    _say(f"copied {', '.join(path.name for path in sources)} to `{folder}`; run it with `python {folder / 'app.py'}`")


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the page as Ctrl-C does, so that the server started here ends too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(f"mpt demo: {text}", file=sys.stderr, flush=True)


def _refuse(sentence: str) -> NoReturn:
    _say(sentence)
    raise typer.Exit(2)
