"""Real clients over real sockets: what each says the server said is what /v1/chat/completions and its like say.

One program a client in `programs/`. It reads a JSON of what to ask from its standard input and writes what it got. The
programs run with the clients of `make clients`, in `.clients/`; without that folder, with this Python's. A client that
is not installed is skipped by name.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.servers import running

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.*"))
CLIENTS = ROOT / ".clients"
PYTHON = CLIENTS / "bin" / "python"
KEY = "sk-of-the-clients"
TOOL = {
    "name": "get_time",
    "description": "The time in a zone.",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"type": "string", "enum": ["UTC"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
ASKED = {
    "key": KEY,
    "chat": "mpt-tiny-chat",
    "base": "mpt-tiny",
    "hello": [{"role": "user", "content": "Hello"}],
    "conversation": [
        {"role": "user", "content": "Hi, my name is Greta"},
        {"role": "assistant", "content": "Hello Greta! Nice to meet you."},
        {"role": "user", "content": "What is my name?"},
    ],
    "tool": TOOL,
    "called": {"name": "get_time", "arguments": {"zone": "UTC"}},
    "result": "12:30",
    "schema": {
        "type": "object",
        "properties": {"color": {"type": "string", "enum": ["red", "green"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
    "text": "Once upon a time",
    "long": "one two three " * 2000,
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny models behind a key."""
    keys = tmp_path_factory.mktemp("clients") / "keys"
    keys.write_text(KEY)
    with running("serve", "--port", "0", "--api-key-file", str(keys)) as server:
        yield server.url


@pytest.fixture(scope="module")
def facts(url: str) -> dict[str, Any]:
    """What the server says to plain HTTP, greedily."""

    def ask(path: str, **body: Any) -> Any:
        answer = httpx.post(f"{url}{path}", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=100)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(messages: Any, **more: Any) -> Any:
        return ask("/v1/chat/completions", model=ASKED["chat"], messages=messages, temperature=0, **more)

    def said(messages: Any, **more: Any) -> Any:
        return chat(messages, **more)["choices"][0]["message"]["content"]

    tool = {"type": "function", "function": TOOL}
    function = {"name": "get_time", "arguments": json.dumps(ASKED["called"]["arguments"])}
    call = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    result = {"role": "tool", "tool_call_id": "a", "content": ASKED["result"]}
    text = ask("/v1/completions", model=ASKED["base"], prompt=ASKED["text"], max_tokens=8, temperature=0)
    vectors = ask("/v1/embeddings", model=ASKED["base"], input=ASKED["text"])
    models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()
    found = {
        "hello": said(ASKED["hello"]),
        "conversation": said(ASKED["conversation"]),
        "after_result": said([*ASKED["hello"], call, result], tools=[tool]),
        "auto": said(ASKED["hello"], tools=[tool]),
        "completion": text["choices"][0]["text"],
        "embedding": vectors["data"][0]["embedding"],
        "models": [model["id"] for model in models["data"]],
        "prompt_tokens": chat(ASKED["hello"])["usage"]["prompt_tokens"],
    }
    assert "Greta" in found["conversation"] and "12:30" in found["after_result"]  # else they would show nothing
    return found


def run(program: Path, url: str) -> dict[str, Any]:
    """What a program says. Skips where its client is not installed."""
    if program.suffix == ".mjs":
        if shutil.which("node") is None or not (CLIENTS / "node_modules").is_dir():
            pytest.skip(f"{program.stem} is not installed: `make clients`, with node")
        script = CLIENTS / program.name  # where node finds its packages
        shutil.copy(program, script)
        command = ["node", str(script)]
    else:
        command = [str(PYTHON) if PYTHON.exists() else sys.executable, str(program)]
    asked = json.dumps({**ASKED, "url": url})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=110)
    if missing := re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'$", done.stderr, re.MULTILINE):
        pytest.skip(f"{missing[1]} is not installed: `make clients`")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def is_fact(name: str) -> Callable[[Any, dict[str, Any]], bool]:
    return lambda value, facts: bool(value == facts[name])


def is_call(value: Any, _: dict[str, Any]) -> bool:
    return bool(value["name"] == "get_time" and value["arguments"] in ({"zone": "UTC"}, {"zone": "CET"}))


def is_colour(value: Any, _: dict[str, Any]) -> bool:
    return value in ({"color": "red"}, {"color": "green"})


def is_streamed(value: Any, facts: dict[str, Any]) -> bool:
    """Several pieces, which are the answer."""
    return "".join(value) == facts["hello"] and len([piece for piece in value if piece]) > 1


def is_embedding(value: Any, facts: dict[str, Any]) -> bool:
    return bool(value == pytest.approx(facts["embedding"], rel=1e-6))


def equals(expected: Any) -> Callable[[Any, dict[str, Any]], bool]:
    return lambda value, _: bool(value == expected)


# What a program says under a name, whatever program it is; longest beginning first.
RULES: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    **{name: is_fact(name) for name in ("auto", "completion", "conversation", "hello", "models", "prompt_tokens")},
    **dict.fromkeys(("after_", "agent_by_"), is_fact("after_result")),
    **dict.fromkeys(("asked_once", "by_", "whole", "with_usual_options"), is_fact("hello")),
    **dict.fromkeys(("required", "named", "streamed_call"), is_call),
    "pieces": is_streamed,
    "structured": is_colour,
    "embedding": is_embedding,
    "old_embedding": is_embedding,
}
# What some say of their own.
OWN: dict[str, dict[str, Callable[[Any, dict[str, Any]], bool]]] = {
    "openai_chat": {
        "no_model": equals(["NotFoundError", "model_not_found"]),
        "too_long": equals(["BadRequestError", "context_length_exceeded"]),
        "wrong_key": equals(["AuthenticationError", "invalid_api_key"]),
    },
    "openai_responses": {
        "kept": lambda value, _: "Greta" in value,
        "forgotten": equals(["NotFoundError", "response_not_found"]),
        "no_model": equals(["NotFoundError", "model_not_found"]),
        "too_long": equals(["BadRequestError", "context_length_exceeded"]),
        "kinds": equals(  # OpenAI's order, of a text
            [
                *("response.created", "response.in_progress", "response.output_item.added"),
                *("response.content_part.added", "response.output_text.delta", "response.output_text.done"),
                *("response.content_part.done", "response.output_item.done", "response.completed"),
            ]
        ),
    },
    "anthropic_messages": {
        "reason": equals("end_turn"),
        "no_model": equals(["NotFoundError", "not_found_error"]),
        "too_long": equals(["BadRequestError", "invalid_request_error"]),
        "wrong_key": equals(["AuthenticationError", "authentication_error"]),
    },
    "ollama_client": {
        "running": is_fact("models"),
        "capabilities": equals(["completion", "tools"]),
        "context": equals(2048),
        "reason": equals("stop"),
        "unknown_options": equals([]),
        "no_model": equals(404),
        "too_long": equals(400),
        "wrong_key": equals(401),
    },
    "open_webui": {
        "version": equals(["version"]),
        "running": is_fact("models"),
        "unloaded": equals("stop"),
    },
    "llama_index_client": {"called": equals("get_time")},
    "litellm_client": {
        "no_model_error": equals("NotFoundError"),
        "too_long": equals("ContextWindowExceededError"),  # on which its fallbacks to longer models go
    },
    "openai_agent": {"n_calls": equals(2)},
}


def rule_of(program: str, name: str) -> Callable[[Any, dict[str, Any]], bool]:
    if name in OWN.get(program, {}):
        return OWN[program][name]
    return RULES[max((known for known in RULES if name.startswith(known)), key=len)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_a_client_gets_what_the_server_says(program: Path, url: str, facts: dict[str, Any]) -> None:
    found = run(program, url)
    assert OWN.get(program.stem, {}).keys() <= found.keys()
    wrong = {name: value for name, value in found.items() if not rule_of(program.stem, name)(value, facts)}
    assert not wrong
