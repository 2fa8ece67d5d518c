"""The terminal chat: what it sends, what it shows, and how it fails."""

import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import mpt
from mpt import generation
from mpt.chat import LocalPartner, Sampling, ServerPartner, converse, sse_data
from mpt.engine.local import LocalModel
from mpt.errors import UserError
from mpt.manifest import MANIFEST
from mpt.options import ModelOptions
from mpt.prompts import Message
from mpt.tokenizer import Tokenizer
from tests.in_process import answering

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(max_tokens=12, temperature=0.0, top_p=1.0, seed=None)


class Echo:
    """Answers with the number of messages and the last one; fails when told to."""

    name = "echo"

    def __init__(self) -> None:
        self.seen: list[list[Message]] = []

    def answer(self, messages: list[Message]) -> Iterator[str]:
        self.seen.append(list(messages))
        if messages[-1]["content"] == "fail":
            raise UserError("the context is full")
        if messages[-1]["content"] == "be silent":
            return
        yield f"{len(messages)}:"
        if messages[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        yield messages[-1]["content"]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Echo, str, str]]:
    def run(*lines: str, is_terminal: bool = False, system: str | None = None) -> tuple[Echo, str, str]:
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        stdin.isatty = lambda: is_terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        echo = Echo()
        converse(echo, system)
        return (echo, *capsys.readouterr())

    return run


def test_a_conversation_remembers(talk: Callable[..., tuple[Echo, str, str]]) -> None:
    echo, out, _ = talk("one", "", "two", system="Be brief.")
    assert out == "2:one\n4:two\n"
    assert [(m["role"], m["content"]) for m in echo.seen[1]] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "2:one"),
        ("user", "two"),
    ]


def test_commands(talk: Callable[..., tuple[Echo, str, str]], tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    echo, out, err = talk(
        "/system Be kind.", "one", "/system", f"/save {saved}", f"/save {saved}", "/reset", "two", "/help", "/nonsense",
        " /not a command", "/exit", "never read",
    )  # fmt: skip
    assert out == "2:one\n2:two\n4:/not a command\n"
    assert [m["role"] for m in json.loads(saved.read_text())] == ["system", "user", "assistant"]
    assert "Be kind." in err and f"saved 3 messages to `{saved}`" in err and "not saved: File exists" in err
    assert "/reset" in err and "unknown command `/nonsense`" in err
    assert [m["role"] for m in echo.seen[1]] == ["system", "user"]  # /reset kept the system message


def test_a_line_ending_in_a_backslash_goes_on(talk: Callable[..., tuple[Echo, str, str]]) -> None:
    echo, _, _ = talk("name: Ada\\", "age: 36")
    assert echo.seen[0][-1]["content"] == "name: Ada\nage: 36"


def test_interrupted_answer_is_kept_and_the_session_goes_on(talk: Callable[..., tuple[Echo, str, str]]) -> None:
    echo, out, err = talk("interrupt", "go on")
    assert out == "1:\n3:go on\n"
    assert "[stopped]" in err
    assert [m["content"] for m in echo.seen[1]] == ["interrupt", "1:", "go on"]


def test_an_empty_answer_leaves_no_half_turn(talk: Callable[..., tuple[Echo, str, str]]) -> None:
    echo, _, _ = talk("be silent", "go on")
    assert [m["content"] for m in echo.seen[1]] == ["go on"]


def test_failed_answer_leaves_no_trace_on_a_terminal_and_ends_a_script(
    talk: Callable[..., tuple[Echo, str, str]],
) -> None:
    echo, _, err = talk("fail", "go on", is_terminal=True)
    assert "the context is full" in err
    assert [m["content"] for m in echo.seen[1]] == ["go on"]
    with pytest.raises(UserError, match="context is full"):
        talk("fail", "go on")


def test_events_survive_any_cut_and_odd_line_separators() -> None:
    text = json.dumps({"content": "a\u2028b\x85é🙂"}, ensure_ascii=False)
    raw = f": keep-alive\n\ndata: {text}\r\n\r\ndata:[DONE]\n\n".encode()
    for size in range(1, len(raw) + 1):
        parts = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert list(sse_data(parts)) == [text, "[DONE]"]


class Api(ThreadingHTTPServer):
    """An OpenAI-style server that answers with the events it was given."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ApiHandler)
        self.models: list[dict[str, Any]] = [
            {"id": "base", "prompt_style": "none"},
            {"id": "c", "prompt_style": "chatml"},
        ]
        self.events: list[str] = []
        self.pause_s = 0.0
        self.status = 200
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def say(self, *words: str, end: str = "data: [DONE]\n\n") -> None:
        chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}]
        chunks += [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
        chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": []}]
        self.events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + [end]


class ApiHandler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"object": "list", "data": self.server.models}).encode())

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.status != 200:
            message = {"error": {"message": "the context holds 2048", "type": "invalid_request_error"}}
            return self.reply(self.server.status, json.dumps(message).encode())
        self.send_response(200)
        self.end_headers()
        try:
            for event in self.server.events:
                self.wfile.write(event.encode())
                self.wfile.flush()
                time.sleep(self.server.pause_s)
        except OSError:
            self.server.hung_up.set()

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    with answering(server):
        yield server


def test_server_answers_and_is_asked_in_openai_s_words(api: Api) -> None:
    api.say("Hel", "lo \u2028", "🙂")
    partner = ServerPartner(api.url + "/", None, "secret", Sampling(64, 0.2, 0.9, seed=7))
    assert partner.name == "c"  # the first chat model, not the first model
    plain = ServerPartner(api.url, None, None, Sampling(None, 0.2, 0.9, None))
    assert list(plain.answer([Message(role="user", content="hi")]))
    assert api.bodies.pop().keys() == {"model", "messages", "stream", "temperature", "top_p"}
    assert api.keys.pop() is None
    messages = [Message(role="user", content="hi")]
    assert "".join(partner.answer(messages)) == "Hello \u2028🙂"
    expected = {"model": "c", "messages": messages, "stream": True, "max_tokens": 64, "temperature": 0.2, "top_p": 0.9}
    assert api.bodies == [{**expected, "seed": 7}]
    assert api.keys == ["Bearer secret"]


def test_model_of_a_server_by_name(api: Api) -> None:
    assert ServerPartner(api.url, "base", None, GREEDY).name == "base"
    with pytest.raises(UserError, match="serves no `gpt`; it serves base, c"):
        ServerPartner(api.url, "gpt", None, GREEDY)
    api.models = [{"id": "elsewhere"}]  # another project's server names no style
    assert ServerPartner(api.url, None, None, GREEDY).name == "elsewhere"


def test_a_stream_that_ends_badly_is_an_error(api: Api) -> None:
    partner = ServerPartner(api.url, None, None, GREEDY)
    for end, match in (
        ("", r"without \[DONE\]"),
        ('data: {"error": {"message": "the engine failed"}}\n\n', "the engine failed"),
        ("data: {}\n\n", "does not speak"),
        ("data: {no json\n\n", "does not speak"),
    ):
        api.say("par", "tial", end=end)
        got: list[str] = []
        with pytest.raises(UserError, match=match):
            got.extend(partner.answer([Message(role="user", content="hi")]))  # keeps what came before the error
        assert "".join(got) == "partial"


def test_a_refusal_carries_the_server_s_message(api: Api) -> None:
    api.status = 400
    partner = ServerPartner(api.url, None, None, GREEDY)
    with pytest.raises(UserError, match="the context holds 2048"):
        list(partner.answer([Message(role="user", content="hi")]))


def test_no_server_says_how_to_get_one() -> None:
    with pytest.raises(UserError, match="mpt serve"):
        ServerPartner("http://127.0.0.1:9/v1", None, None, GREEDY)


def test_leaving_an_answer_hangs_up_on_the_server(api: Api) -> None:
    api.say(*["word "] * 500)
    api.pause_s = 0.01
    answer = ServerPartner(api.url, None, None, GREEDY).answer([Message(role="user", content="hi")])
    assert next(answer) == "" and next(answer) == "word "
    answer.close()  # type: ignore[attr-defined]
    assert api.hung_up.wait(5)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_ctrl_c_in_a_terminal_stops_the_answer_not_the_session(api: Api) -> None:
    """A real terminal: the first answer is cut by Ctrl-C, the second comes whole, Ctrl-D leaves with 0."""
    import fcntl
    import termios

    api.say("slow ", *["word "] * 200)
    api.pause_s = 0.05
    ours, theirs = os.openpty()

    def own_the_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a runner in the background hands down an ignored one

    process = subprocess.Popen(
        [sys.executable, "-m", "mpt.cli", "chat", "--url", api.url],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True, preexec_fn=own_the_terminal,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, pressing: bytes = b"") -> None:
        nonlocal seen
        end = time.monotonic() + 100
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 4096)
            elif pressing:
                os.write(ours, pressing)
        seen = seen.partition(text)[2]

    try:
        wait_for(b"> ")
        os.write(ours, b"hello\n")
        wait_for(b"word word ")
        os.write(ours, b"\x03")
        wait_for(b"[stopped]")
        api.say("quick")
        wait_for(b"> ")
        os.write(ours, b"again\n")
        wait_for(b"quick")
        wait_for(b"> ")
        # Pressed until it is seen: readline loses a signal between showing its prompt and waiting for a key.
        wait_for(b"Ctrl-D leaves", pressing=b"\x03")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(100) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert [m["role"] for m in api.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert api.bodies[1]["messages"][1]["content"].startswith("slow word ")  # the last word shown may miss


def test_local_chat_is_the_naive_loop_on_the_chatml_prompt(tiny_folders: Path) -> None:
    """The same tokens as the model gives when the prompt is written out by hand."""
    folder = tiny_folders / "chat"
    with LocalModel(ModelOptions(str(folder))) as model:
        said = "".join(LocalPartner(model, GREEDY).answer([Message(role="user", content="hello")]))
    written = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tokenizer.encode(written, allow_special=True)
    ids = generation.generate(mpt.load(folder), prompt, 12, end_ids=tokenizer.end_ids)
    assert said == tokenizer.decode(ids)
    assert said


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_local_chat_minds_the_context(tiny_folders: Path, max_tokens: int | None) -> None:
    message = [Message(role="user", content="hello" + " 7" * 116)]
    with LocalModel(ModelOptions(str(tiny_folders / "chat"))) as model:
        partner = LocalPartner(model, Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=None))
        n_prompt = len(model.encode_messages(message))
        assert 230 < n_prompt < 256
        assert sum(1 for _ in partner.answer(message)) <= 256 - n_prompt
        with pytest.raises(UserError, match="context of `test-chat` holds 256"):
            partner.answer([Message(role="user", content="hello " * 400)])


def test_base_model_is_refused_for_chat(tiny_folders: Path) -> None:
    with pytest.raises(UserError, match="`test-base` was not trained on chat"):
        LocalPartner(LocalModel(ModelOptions(str(tiny_folders / "base"))), GREEDY)


def test_the_token_that_ends_an_answer_is_not_shown(tiny_folders: Path, tmp_path: Path) -> None:
    """Also an ordinary one: here the second token of the greedy answer is made an end."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_folders / "base", folder, ignore=shutil.ignore_patterns(MANIFEST))
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tokenizer.encode("The")
    ids = generation.generate(mpt.load(folder), prompt, 2)
    assert not tokenizer.special_ids.intersection(ids) and ids[0] != ids[1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[1]]}))
    with LocalModel(ModelOptions(str(folder))) as model:
        deltas = list(model.stream(prompt, 5))
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids[:1])
    assert deltas[-1].finish_reason == "stop"


def test_a_text_may_be_longer_than_the_trained_context(tiny_folders: Path) -> None:
    """ALiBi has no last position: a context of 256, and the naive loop's tokens behind 300."""
    folder = tiny_folders / "base"
    prompt = random.Random(0).choices(range(3, 200), k=300)
    expected = generation.generate(mpt.load(folder), prompt, 12)
    read: list[int] = []
    with LocalModel(ModelOptions(str(folder), prompt_style="none")) as model:
        tokens = [t for delta in model.stream(prompt, 12, on_read=read.append) for t in delta.token_ids]
    assert tokens == expected
    assert read[-1] == 300


def test_an_interrupted_answer_leaves_the_model_ready(tiny_folders: Path) -> None:
    """Ctrl-C in the middle of an answer, then another question."""
    with LocalModel(ModelOptions(str(tiny_folders / "base"))) as model:
        prompt = model.tokenizer.encode("The")

        def answer_for_ever() -> None:
            while True:
                list(model.stream(prompt, 200))

        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            answer_for_ever()
        tokens = [t for delta in model.stream(prompt, 5) for t in delta.token_ids]
        assert tokens == generation.generate(mpt.load(tiny_folders / "base"), prompt, 5)
        assert model.open().engine.stats().n_running == 0
