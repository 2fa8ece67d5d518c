"""A conversation in the terminal, with a server over HTTP or with a model loaded here.

The answer goes to stdout as it is generated, everything else to stderr. Ctrl-C stops an answer, not the session.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from mpt.errors import MPTError, UserError
from mpt.prompts import Message

HELP = """\
/reset          forget the conversation, keep the system message
/system [TEXT]  set the system message, or show it
/save FILE      write the conversation as JSON, in the form of the API's `messages`
/help           this list
/exit           leave (also Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C stops an answer. A leading space sends a line that begins with /."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    max_tokens: int | None  # None: up to the end of the context
    temperature: float
    top_p: float
    seed: int | None


class Partner(Protocol):
    """Whoever answers."""

    name: str

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The answer to a conversation, piece by piece. Raises MPTError."""
        ...


class LocalPartner:
    """A model in this process, the LocalModel of `mpt/engine/local.py`."""

    def __init__(self, model: Any, sampling: Sampling) -> None:
        if model.style == "none":
            raise UserError(
                f"`{model.entry.name}` was not trained on chat; continue text with "
                f"`mpt generate --model {model.entry.name} PROMPT`, or chat with `mpt-tiny-chat`"
            )
        model.open()
        self.name: str = model.entry.name
        self._model = model
        self._sampling = sampling

    def answer(self, messages: list[Message]) -> Iterator[str]:
        ids = self._model.encode_messages(messages)
        draw = self._sampling
        room = self._model.room_after(ids)
        n = room if draw.max_tokens is None else min(draw.max_tokens, room)
        deltas = self._model.stream(ids, n, temperature=draw.temperature, top_p=draw.top_p, seed=draw.seed)
        return (delta.text for delta in deltas)


class ServerPartner:
    """A model behind an OpenAI-style API."""

    def __init__(self, url: str, model: str | None, api_key: str | None, sampling: Sampling) -> None:
        """Connect and choose the model: the one named, else the server's first that is made for chat."""
        self._url = url.rstrip("/")
        is_here = httpx.URL(self._url).host in ("127.0.0.1", "localhost", "::1")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(10.0, read=120.0),  # the server sends a comment every 15 s while it computes
            trust_env=not is_here,  # a proxy from the environment cannot reach this machine
        )
        self._sampling = sampling
        served = self._served_models()
        if model is not None and model not in (card["id"] for card in served):
            raise UserError(f"`{url}` serves no `{model}`; it serves {', '.join(card['id'] for card in served)}")
        self.name = model or _made_for_chat(served)

    def answer(self, messages: list[Message]) -> Iterator[str]:
        draw = self._sampling
        body: dict[str, Any] = {"model": self.name, "messages": messages, "stream": True}
        body |= {"temperature": draw.temperature, "top_p": draw.top_p}
        wishes = {"max_tokens": draw.max_tokens, "seed": draw.seed}
        body |= {name: wish for name, wish in wishes.items() if wish is not None}
        try:
            with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise UserError(_error_message(response))
                for event in sse_data(response.iter_bytes()):
                    if event == "[DONE]":
                        return
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise UserError(f"the server broke off: {chunk['error'].get('message', chunk['error'])}")
                    for choice in chunk["choices"]:  # empty in the chunk that carries the usage
                        yield choice["delta"].get("content") or ""
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"`{self._url}` does not speak OpenAI's chat protocol: {error!r}") from error
        except httpx.HTTPError as error:
            raise UserError(f"lost the server at `{self._url}`: {error}") from error
        raise UserError("the server ended the stream without [DONE]; the answer may be incomplete")

    def _served_models(self) -> list[dict[str, Any]]:
        try:
            response = self._client.get(f"{self._url}/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"no server answers at `{self._url}` ({error}); start one with `mpt serve`, "
                "or chat without one: `mpt chat --model mpt-tiny-chat`"
            ) from error
        if response.status_code != 200:
            raise UserError(_error_message(response))
        served: list[dict[str, Any]] = response.json()["data"]
        if not served:
            raise UserError(f"the server at `{self._url}` serves no model")
        return served


def _made_for_chat(served: list[dict[str, Any]]) -> str:
    """The first ChatML model, else the first with a template of its own, else an instruct model, else the first.

    Other servers' cards name no style.
    """
    for style in ("chatml", "template", "instruct"):
        for card in served:
            if card.get("prompt_style") == style:
                return str(card["id"])
    return str(served[0]["id"])


def sse_data(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event in a stream of bytes, however it is cut; comments are skipped.

    Lines end at \\n only: httpx's own `iter_lines` also cuts at U+2028 and others, which may stand inside JSON text.
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode("utf-8")


def _error_message(response: httpx.Response) -> str:
    """What an error response says, in OpenAI's form or not."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"`{response.url}` answered {response.status_code}: {response.text[:200]}"


def converse(partner: Partner, system: str | None = None) -> None:
    """Read lines from stdin and answer each until /exit or the end of input.

    On a terminal a failed answer is reported and the session goes on; from a file or pipe it raises.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # absent on Windows
            import readline  # noqa: F401  (gives `input` line editing and a history)
        _say(f"chat with `{partner.name}`; /help lists the commands")
    history = [Message(role="system", content=system)] if system else []
    while (line := _read_line(is_terminal)) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if line.split()[0] in ("/exit", "/quit"):
                return
            history = _obey(line, history)
            continue
        try:
            history = _take_turn(partner, history, line)
        except MPTError as error:
            if not is_terminal:
                raise
            _say(str(error))


def _take_turn(partner: Partner, history: list[Message], line: str) -> list[Message]:
    """The conversation after one more question and answer; without them if no answer came."""
    asked = [*history, Message(role="user", content=line.strip())]
    answer = ""
    try:
        for text in partner.answer(asked):
            print(text, end="", flush=True)
            answer += text
    except KeyboardInterrupt:
        _say("[stopped]")
    finally:
        print(flush=True)
    return [*asked, Message(role="assistant", content=answer)] if answer else history


def _obey(line: str, history: list[Message]) -> list[Message]:
    """The conversation after a command."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    system, turns = history[:1], history[1:]
    if not history or history[0]["role"] != "system":
        system, turns = [], history
    if command == "/reset":
        return system
    if command == "/system" and rest:
        return [Message(role="system", content=rest), *turns]
    if command == "/system":
        _say(system[0]["content"] if system else "no system message; the model's own applies, if it has one")
    elif command == "/save" and rest:
        _save(Path(rest).expanduser(), history)
    elif command == "/help":
        _say(HELP)
    else:
        _say(f"unknown command `{line}`; /help lists the commands")
    return history


def _save(path: Path, history: list[Message]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(history, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except OSError as error:
        _say(f"not saved: {error.strerror} (`{path}`)")
    else:
        _say(f"saved {len(history)} messages to `{path}`")


def _read_line(is_terminal: bool) -> str | None:
    """The next line to send, None at the end of input."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if is_terminal else "")
        except EOFError:
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            _say("\n/exit or Ctrl-D leaves")
            lines = []
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
