"""What the clients of a storm (`benchmarks/storm.py`) send, good and bad, and how they read what they get."""

import asyncio
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from benchmarks.faults import Plan

Json = dict[str, Any]

OUTCOMES = ("complete", "refused", "error event", "cancelled", "away", "cut", "wrong", "lost")
MANY = 500_000  # times two tokens, more than any context here and within 4 MiB
OVER_THE_LIMIT = bytes(17 << 20)  # servers take 4 MiB, and 16 of embeddings
LONG_CONTEXT = 8192  # tokens; a model that has them also gets prompts of 1,500 to 5,000 words, about 6,000 tokens
PROMPTS = (
    "The old man and the", "Once upon a time there was", "She opened the door and", "In the year 1900",
    "The king said to his", "It was a dark night;", "Chapter 1", "Ünï ☃ 鯨",
)  # fmt: skip
WORDS = re.findall(r"\w+", "the sea was calm and a ship went out with men who sang of home until night came over them")


class Ended(Exception):
    """How a request ended, when not in the ordinary way."""

    def __init__(self, outcome: str, what: str) -> None:
        super().__init__(what)
        self.outcome, self.what = outcome, what


@dataclass(frozen=True)
class Run:
    """What one run does. tie: nats between the first two tokens under which the greedy choice is not certain."""

    url: str
    key: str | None
    pids: tuple[int, ...]
    seconds: float
    seed: int
    n_streams: int
    n_burst: int
    patience_s: float
    tie: float
    plan: Plan | None = None  # of a server that is started here


@dataclass(frozen=True)
class Model:
    name: str
    context_length: int
    is_chat: bool


@dataclass(frozen=True)
class Case:
    """A greedy request and what it answered when alone. n_certain: characters before the first tie, None if none."""

    path: str
    body: Json
    text: str
    n_certain: int | None

    def check(self, text: str) -> None:
        if text[: self.n_certain] != self.text[: self.n_certain]:
            raise Ended("lost", f"wrong text: {text!r} instead of {self.text!r}, certain up to {self.n_certain}")


@dataclass(frozen=True)
class Malformed:
    """A request to be refused with this status and, where there is one right answer, this code."""

    kind: str
    content: bytes
    status: int = 400
    code: str | None = None
    path: str = "/v1/completions"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Tally:
    """What happened, counted as it happens."""

    sent: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, outcome)
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (kind, outcome, what), shortened
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # three of "kind: outcome"
    ttft_s: list[float] = field(default_factory=list)
    n_tokens: int = 0
    slowest_s: float = 0.0

    def add(self, kind: str, outcome: str, what: str) -> None:
        self.outcomes[kind, outcome] += 1
        if outcome in ("complete", "cancelled"):
            return
        self.reasons[kind, outcome, what[:60]] += 1
        examples = self.examples[f"{kind}: {outcome}"]
        if outcome in ("wrong", "lost") and len(examples) < 3:
            examples.append(what[:1000])

    def total(self, outcome: str) -> int:
        return sum(count for (_, each), count in self.outcomes.items() if each == outcome)


# -- reading answers -----------------------------------------------------------------------------------------------


def error_code(raw: bytes, failure: str, status: int) -> str:
    """The code of OpenAI's error body. Raises Ended(failure) if it is not one."""
    try:
        error = orjson.loads(raw)["error"]
        if isinstance(error["message"], str) and isinstance(error["type"], str) and isinstance(error["code"], str):
            return error["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    raise Ended(failure, f"{status} without OpenAI's error body: {raw[:200]!r}")


def refuse_if_busy(response: aiohttp.ClientResponse, code: str) -> None:
    """Raises Ended("refused") for the two answers that say: not now."""
    if response.status in (429, 503) and response.headers.get("Retry-After", "").isdigit():
        raise Ended("refused", f"{response.status} {code}")


async def expect_ok(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    raw = await response.read()
    code = error_code(raw, "lost", response.status)
    refuse_if_busy(response, code)
    raise Ended("lost", f"{response.status} {code}: {raw[:300]!r}")


async def events(response: aiohttp.ClientResponse, pace: random.Random | None) -> AsyncIterator[str]:
    """The `data:` of each server-sent event. pace: read a few bytes and sleep, a hundred times, then read on."""
    rest, n_reads = b"", 0
    while True:
        piece = await response.content.read(pace.choice((16, 256, 4096)) if pace else 1 << 16)
        if not piece:
            break
        if pace and n_reads < 100:
            n_reads += 1
            await asyncio.sleep(pace.uniform(0, 0.05))
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ").decode()
            elif not event.startswith(b":"):
                raise Ended("lost", f"neither data nor a comment in the stream: {event[:200]!r}")
    if rest:
        raise Ended("lost", f"the stream ended inside an event: {rest[:200]!r}")


class Chunks:
    """The chunks of one stream, whose order is checked as they come."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self._finished = [False] * n
        self._ids: set[str] = set()
        self.usage: Json | None = None
        self.done = False

    def add(self, payload: str) -> str:
        """Take one event's data, return its text. Raises Ended for an error event or a wrong order."""
        if self.done:
            raise Ended("lost", f"an event after [DONE]: {payload[:200]}")
        if payload == "[DONE]":
            if not all(self._finished):
                raise Ended("lost", "[DONE] without a finish_reason")
            self.done = True
            return ""
        chunk = orjson.loads(payload)
        if "error" in chunk:
            code = error_code(payload.encode(), "lost", 200)
            raise Ended("wrong" if code == "internal_error" else "error event", code)
        self._ids.add(chunk["id"])
        if len(self._ids) > 1:
            raise Ended("lost", f"chunks of several answers in one stream: {sorted(self._ids)}")
        if not chunk["choices"]:
            if not all(self._finished) or self.usage is not None:
                raise Ended("lost", "usage before the end, or twice")
            self.usage = chunk["usage"]
        return "".join(self._take(choice) for choice in chunk["choices"])

    def _take(self, choice: Json) -> str:
        k = choice["index"]
        if self._finished[k] or self.usage is not None:
            raise Ended("lost", f"a chunk of choice {k} after its finish_reason")
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        self.texts[k] += text
        self._finished[k] = choice["finish_reason"] is not None
        return text


# -- what clients send ---------------------------------------------------------------------------------------------


def long_text(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=n_words))


def malformed(rng: random.Random, model: Model) -> Malformed:
    """One of the requests nobody should send."""
    good: Json = {"model": model.name, "prompt": "a", "max_tokens": 1}
    raw = orjson.dumps(good)
    bad_type = rng.choice(({"n": "2"}, {"max_tokens": 1.5}, {"stream": 1}, {"prompt": 7}, {"model": 7}))
    bad_value = rng.choice(({"n": 999}, {"temperature": -1}, {"top_p": 2}, {"max_tokens": -2}, {"seed": 2**63}))
    nested = b"[" * 5000 + b"]" * 5000
    pick = rng.choices(range(14), weights=[8] * 12 + [1, 1])[0]
    return (
        Malformed("bad: JSON", raw[: rng.randrange(len(raw))], code="invalid_json"),
        Malformed("bad: NaN", raw[:-1] + b',"temperature":NaN}', code="invalid_json"),
        Malformed("bad: field", orjson.dumps({**good, "tempratur": 1}), code="unknown_parameter"),
        Malformed("bad: type", orjson.dumps({**good, **bad_type}), code="invalid_type"),
        Malformed("bad: value", orjson.dumps({**good, **bad_value}), code="invalid_value"),
        Malformed("bad: nesting", rng.choice((nested, raw[:-1] + b',"stop":' + nested + b"}"))),
        Malformed("bad: binary", rng.randbytes(2000), code="invalid_json"),
        Malformed("bad: content type", raw, 415, "unsupported_media_type", headers={"content-type": "text/plain"}),
        Malformed("bad: method", b"", 405, "method_not_allowed", method=rng.choice(("GET", "PUT", "DELETE", "PATCH"))),
        Malformed("bad: URL", raw, 404, "unknown_url", path=f"/v1/{rng.randrange(1000)}/completions"),
        Malformed("bad: messages", orjson.dumps({"model": model.name, "messages": "hi"}), path="/v1/chat/completions"),
        Malformed("bad: ids", orjson.dumps({**good, "prompt": [1, -1]}), code="invalid_prompt"),
        Malformed("bad: huge body", OVER_THE_LIMIT, 413, "request_too_large"),
        Malformed("bad: huge chunks", OVER_THE_LIMIT, 413, "request_too_large", headers={"te": "chunked"}),
    )[pick]


def not_http(rng: random.Random, host: str) -> bytes:
    """Bytes that end a connection: garbage, alone or behind requests that are well-formed."""
    version = f"GET /version HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    post = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
    garbage = b"\x00" + rng.randbytes(rng.randrange(200)) + b"\r\n\r\n"
    return rng.choice(
        (
            garbage,
            version * rng.randrange(1, 20) + garbage,
            post + b"Content-Length: 2\r\n\r\n{}" + garbage,
            post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            post + b"Content-Length: -5\r\n\r\n",
            post + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
            post + b"X-Long: " + b"a" * (1 << 20) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64) + b"\r\n\r\n",  # TLS
        )
    )
