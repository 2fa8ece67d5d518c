"""Good and bad clients against a running server for a while: what was lost, what was answered wrong, what memory did.

    mpt serve --port 8123 &
    python benchmarks/chaos.py --url http://127.0.0.1:8123 --pid $! --seconds 60 --streams 100

    python benchmarks/chaos.py --command "mpt cluster --port 8123" --url http://127.0.0.1:8123 --faults all

With `--faults` the parts of the server die meanwhile, and more (`benchmarks/faults.py`). A connection that a fault
broke is counted apart: `away` if there was no answer yet, `cut` if its client saw the answer break off. A stream that
ended as if it were whole is lost, whatever happened.

Every client draws its actions from a generator of its own, seeded with the run's seed and its number; what cannot be
repeated is the timing. A well-formed request must end complete (finish_reason and [DONE], or a whole body, with the
greedy text that the same prompt gave when it was alone), or be refused with 429 or 503 and `Retry-After`, or end in an
error event; anything else is lost. A malformed request must get the 4xx of docs/serving.md with OpenAI's body; anything
else is wrong. Bytes that are not HTTP never reach the API, so any 4xx, or a closed connection, is right for them.

In bfloat16 a greedy text may differ after two tokens of almost the same probability, because other requests in the
batch change how matrix products round. Texts are therefore compared up to the first such tie of the reference; for a
server in float32, `--tie 0` compares them whole.
"""

import asyncio
import contextlib
import io
import random
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.faults import BACK_WITHIN_S, NAMES, Faults, Plan, Supervisor

Json = dict[str, Any]

OUTCOMES = ("complete", "refused", "error event", "cancelled", "away", "cut", "wrong", "lost")
MANY = 500_000  # times two tokens, more than any context here and within 4 MiB
OVER_THE_LIMIT = bytes(17 << 20)  # servers take 4 MiB, and 16 of embeddings
SETTLE_S = 10.0  # until the gauges must be back at 0
QUIET_S = 30.0  # until a connection of bytes that are not HTTP must be closed
GAUGES = ("mpt_num_requests_running", "mpt_num_requests_waiting", "mpt_kv_cache_usage_perc")
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
    health = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    post = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
    garbage = b"\x00" + rng.randbytes(rng.randrange(200)) + b"\r\n\r\n"
    return rng.choice(
        (
            garbage,
            health * rng.randrange(1, 20) + garbage,
            post + b"Content-Length: 2\r\n\r\n{}" + garbage,
            post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            post + b"Content-Length: -5\r\n\r\n",
            post + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
            post + b"X-Long: " + b"a" * (1 << 20) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64) + b"\r\n\r\n",  # TLS
        )
    )


class Storm:
    """The clients of one run and what they count."""

    def __init__(self, run: Run) -> None:
        self.run, self.url = run, run.url.rstrip("/")
        self.tally = Tally()
        self.models: list[Model] = []
        self.cases: list[Case] = []
        self.long_cases: list[Case] = []
        key = {"authorization": f"Bearer {run.key}"} if run.key else {}
        self.headers = {"content-type": "application/json", **key}
        self.faults: Faults | None = None

    async def __aenter__(self) -> "Storm":
        def narrow(address: Any) -> socket.socket:
            narrowed = socket.socket(address[0], address[1], address[2])
            narrowed.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            return narrowed

        # Idle connections are dropped before the server's 5 s: a request on one that it closes is nobody's fault.
        connectors = [aiohttp.TCPConnector(limit=0, keepalive_timeout=2, socket_factory=f) for f in (None, narrow)]
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connectors[0], timeout=timeout)
        self._slow_session = aiohttp.ClientSession(connector=connectors[1], timeout=timeout, read_bufsize=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._slow_session.close()

    # -- before the storm

    async def prepare(self) -> None:
        """Ask what is served, and each case alone. Raises Ended if the server does not answer."""
        async with self._session.get(f"{self.url}/v1/models", headers=self.headers) as response:
            await expect_ok(response)
            cards = orjson.loads(await response.read())["data"]
        self.models = [
            Model(card["id"], card["max_model_len"], card["prompt_style"] != "none")
            for card in cards
            if card.get("parent") is None
        ]
        rng = random.Random(f"{self.run.seed}/cases")
        for model in self.models:
            for k, prompt in enumerate(PROMPTS):
                self.cases.append(await self._alone(model, prompt, rng.randrange(8, 65), model.is_chat and k % 2 == 0))
            growing = long_text(rng, 180)  # about 210 tokens: its answer needs a second 256 of KV cache
            self.cases.append(await self._alone(model, growing, 96, False))
        for model in self.models:
            if model.context_length >= LONG_CONTEXT:
                for _ in range(3):
                    text = long_text(rng, rng.randrange(1500, 5000))
                    self.long_cases.append(await self._alone(model, text, 16, False))

    async def _alone(self, model: Model, prompt: str, max_tokens: int, is_chat: bool) -> Case:
        body: Json = {"model": model.name, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"skip_special_tokens": False}
        if is_chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
            choice = (await self._post(path, body | {"logprobs": True, "top_logprobs": 2}))["choices"][0]
            entries = choice["logprobs"]["content"]
            tokens = [entry["token"] for entry in entries]
            tops = [[top["logprob"] for top in entry["top_logprobs"]] for entry in entries]
            text = choice["message"]["content"]
        else:
            path, body["prompt"] = "/v1/completions", prompt
            choice = (await self._post(path, body | {"logprobs": 2}))["choices"][0]
            tokens = choice["logprobs"]["tokens"]
            tops = [list(top.values()) for top in choice["logprobs"]["top_logprobs"]]
            text = choice["text"]
        margins = [max(top) - min(top) for top in tops]
        tie = next((k for k, margin in enumerate(margins) if margin < self.run.tie), None)
        if tie is None:
            return Case(path, body, text, None)
        certain = "".join(tokens[:tie])  # differs from the text where a character is split between tokens
        n_certain = next((k for k, (a, b) in enumerate(zip(text, certain, strict=False)) if a != b), len(certain))
        return Case(path, body, text, n_certain)

    async def _post(self, path: str, body: Json) -> Json:
        """A whole answer. Raises Ended if it was refused."""
        async with self._session.post(self.url + path, data=orjson.dumps(body), headers=self.headers) as response:
            await expect_ok(response)
            return orjson.loads(await response.read())

    # -- clients of one request each; they return when all went well

    async def stream(
        self, case: Case, n: int = 1, *, usage: bool = False, pace: random.Random | None = None, timed: bool = False
    ) -> None:
        """Read a stream to its end and check it. pace: through a narrow socket, slowly, with much to send."""
        body = case.body | {"stream": True, "n": n} | ({"stream_options": {"include_usage": True}} if usage else {})
        if pace:
            body |= {"logprobs": 20} if "prompt" in body else {"logprobs": True, "top_logprobs": 20}
        chunks, session, started = Chunks(n), self._slow_session if pace else self._session, time.perf_counter()
        async with session.post(self.url + case.path, data=orjson.dumps(body), headers=self.headers) as response:
            await expect_ok(response)
            async for payload in events(response, pace):
                if chunks.add(payload) and timed:
                    self.tally.ttft_s.append(time.perf_counter() - started)
                    timed = False
        if not chunks.done:
            raise Ended("lost", "the stream ended without [DONE]")
        if usage:
            self._check_usage(chunks.usage, n, case)
        self._check_texts(chunks.texts, case)

    async def whole(self, case: Case, n: int = 1) -> None:
        answer = await self._post(case.path, case.body | {"n": n})
        choices = answer["choices"]
        if [choice["index"] for choice in choices] != list(range(n)) or not all(c["finish_reason"] for c in choices):
            raise Ended("lost", f"choices are missing, out of order or unfinished: {choices}")
        self._check_usage(answer["usage"], n, case)
        self._check_texts([c["text"] if "text" in c else c["message"]["content"] for c in choices], case)

    def _check_usage(self, usage: Json | None, n: int, case: Case) -> None:
        if usage is None or usage["completion_tokens"] != n * case.body["max_tokens"]:
            raise Ended("lost", f"usage is {usage} for {n} times {case.body['max_tokens']} tokens")

    def _check_texts(self, texts: list[str], case: Case) -> None:
        for text in texts:
            case.check(text)
        self.tally.n_tokens += len(texts) * case.body["max_tokens"]

    async def fresh_long(self, rng: random.Random, model: Model) -> None:
        """A prompt of thousands of tokens that nobody sent before."""
        body = {"model": model.name, "prompt": long_text(rng, rng.randrange(1500, 5000)), "max_tokens": 8}
        answer = await self._post("/v1/completions", body | {"temperature": 0, "ignore_eos": True})
        if answer["usage"]["completion_tokens"] != 8:
            raise Ended("lost", f"usage is {answer['usage']} for 8 tokens")
        self.tally.n_tokens += 8

    async def refused(self, bad: Malformed) -> None:
        """Send what must be refused. Raises Ended: refused, or wrong.

        A server may also close the connection over which too much comes (RFC 9110, 15.5.14), which can reach a client
        that goes on sending before the answer does.
        """
        try:
            await self._refused(bad)
        except aiohttp.ClientOSError:
            if bad.status == 413:
                raise Ended("refused", "413, or closed while it was sent") from None
            raise

    async def _refused(self, bad: Malformed) -> None:
        headers, content = {**self.headers, **bad.headers}, io.BytesIO(bad.content)
        data: Any = content
        if headers.pop("te", None):
            data = chunks_of(content)
        async with self._session.request(bad.method, self.url + bad.path, data=data, headers=headers) as response:
            raw = await response.read()
            code = error_code(raw, "wrong", response.status)
            refuse_if_busy(response, code)
            if "x-request-id" not in response.headers:
                raise Ended("wrong", f"{response.status} {code} without x-request-id")
            if response.status != bad.status or (bad.code is not None and code != bad.code):
                sent = f"{bad.method} {bad.path} {bad.content[:100]!r}"
                raise Ended("wrong", f"{response.status} {code} instead of {bad.status} {bad.code}: {sent}")
            raise Ended("refused", f"{response.status} {code}")

    async def garbage(self, rng: random.Random) -> None:
        """Send bytes that are not HTTP; the connection must be closed, any answer but the last being a right one."""
        where = urlsplit(self.url)
        reader, writer = await self._connect()
        content, answer = not_http(rng, where.netloc), b""
        try:
            writer.write(content)
            async with asyncio.timeout(QUIET_S):
                with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
                    await writer.drain()
                    while piece := await reader.read(1 << 16):
                        answer += piece
        except TimeoutError:
            raise Ended("wrong", f"open after {QUIET_S:.0f} s: {content[:100]!r}, answered {answer[:200]!r}") from None
        finally:
            writer.close()
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]
        if any(status >= 500 for status in statuses) or (statuses and not 400 <= statuses[-1] < 500):
            raise Ended("wrong", f"statuses {statuses} for {content[:100]!r}")
        raise Ended("refused", f"{statuses[-1]}, closed" if statuses else "closed")

    async def stall(self, rng: random.Random) -> None:
        """Send half a body, wait, go away."""
        reader, writer = await self._connect()
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        raw = orjson.dumps({"model": self.models[0].name, "prompt": "a" * rng.randrange(10, 10_000)})
        head = f"Host: {urlsplit(self.url).netloc}\r\n{head}Content-Length: {len(raw)}\r\n\r\n"
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode())
        writer.write(raw[: rng.randrange(len(raw))])
        try:
            async with asyncio.timeout(rng.uniform(0, 3)):
                answer = await reader.read(200)
        except (TimeoutError, ConnectionError):
            raise Ended("cancelled", "") from None
        finally:
            writer.close()
        if not answer:
            raise ConnectionResetError("closed before the body was complete")
        raise Ended("wrong", f"answered before the body was complete: {answer!r}")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        where = urlsplit(self.url)
        is_tls = where.scheme == "https"
        port = where.port or (443 if is_tls else 80)
        return await asyncio.open_connection(where.hostname, port, ssl=is_tls or None)

    # -- the storm

    async def attempt(self, kind: str, work: Awaitable[None], cancel_after_s: float | None = None) -> bool:
        """Await one request and count how it ended. Returns whether it was refused for now."""
        self.tally.sent[kind] += 1
        failure = "wrong" if kind.startswith("bad: ") else "lost"
        started, began = time.perf_counter(), time.monotonic()
        outcome, what = "complete", ""
        try:
            async with asyncio.timeout(self.run.patience_s):
                try:
                    async with asyncio.timeout(cancel_after_s):
                        await work
                except TimeoutError as error:
                    if cancel_after_s is None or time.perf_counter() - started < cancel_after_s:
                        raise Ended(failure, f"timed out: {error!r}") from None
                    raise Ended("cancelled", "") from None
        except Ended as end:
            outcome, what = end.outcome, end.what
        except TimeoutError:
            outcome, what = failure, f"not ended in {self.run.patience_s:.0f} s"
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            # A broken connection, or an answer of another shape.
            outcome, what = failure, f"{type(error).__name__}: {error}"
            if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError) and (
                self.faults is not None and self.faults.excuses(began)
            ):
                outcome = "cut" if isinstance(error, aiohttp.ClientPayloadError) else "away"
        self.tally.slowest_s = max(self.tally.slowest_s, time.perf_counter() - started)
        self.tally.add(kind, outcome, what)
        return outcome == "away" or (outcome == "refused" and what.startswith(("429", "503")))

    async def client(self, k: int, until: float) -> None:
        """Drawn actions, one after the other until the time is up; a client that was refused waits a little."""
        rng = random.Random(f"{self.run.seed}/{k}")
        actions: dict[Callable[[random.Random], Awaitable[bool]], int] = {
            self._a_stream: 30, self._a_whole: 10, self._a_slow_reader: 8, self._a_vanishing: 12, self._a_cancelled: 6,
            self._a_flood: 12, self._a_garbage: 5, self._a_stall: 4, self._too_long: 4, self._unknown_model: 3,
            self._samples: 4, self._a_long_prompt: 5,
        }  # fmt: skip
        while time.monotonic() < until:
            action = rng.choices(list(actions), weights=list(actions.values()))[0]
            is_busy = await action(rng)
            await asyncio.sleep(rng.uniform(0.2, 2) if is_busy else rng.expovariate(20))

    async def bursts(self, until: float) -> None:
        """Now and then, more short requests at once than the queue of one model takes."""
        rng = random.Random(f"{self.run.seed}/bursts")
        while (left_s := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, rng.uniform(1, 10)))
            case, n = rng.choice(self.cases), rng.choice((1, 4))
            asks = [self.whole if rng.random() < 0.5 else self.stream for _ in range(self.run.n_burst)]
            await asyncio.gather(*(self.attempt("burst", ask(case, n)) for ask in asks))

    async def _a_stream(self, rng: random.Random) -> bool:
        usage = rng.random() < 0.5
        return await self.attempt("stream", self.stream(rng.choice(self.cases), usage=usage, timed=True))

    async def _a_whole(self, rng: random.Random) -> bool:
        return await self.attempt("whole", self.whole(rng.choice(self.cases)))

    async def _a_slow_reader(self, rng: random.Random) -> bool:
        n = rng.choice((1, 4))
        return await self.attempt("slow reader", self.stream(rng.choice(self.cases), n, pace=rng))

    async def _a_vanishing(self, rng: random.Random) -> bool:
        gone_s = rng.choice((rng.uniform(0, 0.005), rng.uniform(0, 0.1), rng.uniform(0, 2)))
        case = rng.choice(self.long_cases or self.cases) if rng.random() < 0.2 else rng.choice(self.cases)
        return await self.attempt("vanishing", self.stream(case, rng.choice((1, 1, 8))), cancel_after_s=gone_s)

    async def _a_cancelled(self, rng: random.Random) -> bool:
        gone_s = rng.choice((rng.uniform(0, 0.02), rng.uniform(0, 2)))
        case = rng.choice(self.long_cases or self.cases) if rng.random() < 0.2 else rng.choice(self.cases)
        return await self.attempt("cancelled whole", self.whole(case, rng.choice((1, 8))), cancel_after_s=gone_s)

    async def _a_flood(self, rng: random.Random) -> bool:
        is_busy = False
        for _ in range(rng.randrange(1, 12)):
            bad = malformed(rng, rng.choice(self.models))
            if self.run.key and rng.random() < 0.1:
                bad = Malformed("bad: key", b"{}", 401, "invalid_api_key", headers={"authorization": "Bearer no"})
            is_busy |= await self.attempt(bad.kind, self.refused(bad))
        return is_busy

    async def _a_garbage(self, rng: random.Random) -> bool:
        return await self.attempt("bad: not HTTP", self.garbage(rng))

    async def _a_stall(self, rng: random.Random) -> bool:
        return await self.attempt("bad: half a body", self.stall(rng))

    async def _too_long(self, rng: random.Random) -> bool:
        model = rng.choice(self.models)
        prompt: object = rng.choice(([5] * (model.context_length + 1), "a b " * MANY))
        body, code = orjson.dumps({"model": model.name, "prompt": prompt}), "context_length_exceeded"
        return await self.attempt("bad: too long", self.refused(Malformed("", body, 400, code)))

    async def _unknown_model(self, rng: random.Random) -> bool:
        body = orjson.dumps({"model": f"gpt-{rng.randrange(100)}", "prompt": "a"})
        return await self.attempt("bad: model", self.refused(Malformed("", body, 404, "model_not_found")))

    async def _samples(self, rng: random.Random) -> bool:
        case = rng.choice(self.cases)
        ask = self.stream(case, 8, usage=True) if rng.random() < 0.5 else self.whole(case, 8)
        return await self.attempt("8 samples", ask)

    async def _a_long_prompt(self, rng: random.Random) -> bool:
        if not self.long_cases:
            return await self._a_stream(rng)
        if rng.random() < 0.5:
            return await self.attempt("long prompt", self.stream(rng.choice(self.long_cases)))
        model = rng.choice([model for model in self.models if model.context_length >= LONG_CONTEXT])
        return await self.attempt("long prompt", self.fresh_long(rng, model))

    # -- after the storm

    async def afterwards(self) -> None:
        """The gauges are back at 0, the server is healthy, and every case answers as it did."""
        await self.attempt("after: gauges at 0", self._settled())
        await self.attempt("after: health", self._healthy())
        for case in {case.body["model"]: case for case in self.cases + self.long_cases}.values():
            await self.attempt("after: same text", self.whole(case))

    async def _settled(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while True:
            async with self._session.get(f"{self.url}/metrics", headers=self.headers) as response:
                text = await response.text()
            lines = [line for line in text.splitlines() if line.startswith(GAUGES)]
            if {re.split(r"[{ ]", line)[0] for line in lines} != set(GAUGES):
                raise Ended("wrong", f"/metrics lacks some of {GAUGES}: {lines}")
            left = [line for line in lines if float(line.rpartition(" ")[2]) != 0]
            if not left:
                return
            if time.monotonic() > deadline:
                raise Ended("wrong", f"after {SETTLE_S:.0f} s: {left}")
            await asyncio.sleep(0.2)

    async def _healthy(self) -> None:
        async with self._session.get(f"{self.url}/health") as response:
            if response.status != 200:
                raise Ended("wrong", f"/health is {response.status}: {await response.text()}")


async def chunks_of(content: io.BytesIO) -> AsyncIterator[bytes]:
    while piece := content.read(1 << 18):
        yield piece


# -- memory --------------------------------------------------------------------------------------------------------


class Memory:
    """The resident memory of processes and their children, sampled every second."""

    def __init__(self, roots: Callable[[], list[psutil.Process]]) -> None:
        self._roots = roots
        self.samples: list[tuple[float, float]] = []  # (seconds, MB)

    async def watch(self) -> None:
        while True:
            n_bytes = 0
            for root in self._roots():
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in {root, *root.children(recursive=True)}:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            n_bytes += process.memory_info().rss
            if n_bytes:
                self.samples.append((time.monotonic(), n_bytes / 1e6))
            await asyncio.sleep(1)

    def summary(self) -> Json | None:
        """First, last and highest MB, and the slope of the second half by least squares, in MB a minute."""
        half = self.samples[len(self.samples) // 2 :]
        if len(half) < 2:
            return None
        mean_t, mean_y = (sum(column) / len(half) for column in zip(*half, strict=True))
        slope = sum((t - mean_t) * (y - mean_y) for t, y in half) / sum((t - mean_t) ** 2 for t, _ in half)
        megabytes = [y for _, y in self.samples]
        ends = {"first_mb": megabytes[0], "last_mb": megabytes[-1], "peak_mb": max(megabytes)}
        return {**ends, "slope_mb_per_min": slope * 60}


# -- the run and its report ----------------------------------------------------------------------------------------


async def storm_over(run: Run) -> Json:
    """The whole run as numbers. Raises Ended if the server does not answer before the storm."""
    async with contextlib.AsyncExitStack() as stack:
        supervisor = None
        if run.plan is not None:
            supervisor = await stack.enter_async_context(Supervisor(run.plan.command, run.plan.log))
            await ready(run.url)
        storm = await stack.enter_async_context(Storm(run))
        await storm.prepare()
        memory, tally = Memory(lambda: roots_of(run, supervisor)), storm.tally
        watching = asyncio.create_task(memory.watch())
        started = time.monotonic()
        until = started + run.seconds
        if run.plan is not None and supervisor is not None and run.plan.faults:
            names = [model.name for model in storm.models]
            storm.faults = Faults(storm.url, storm.headers, names, supervisor, run.plan, run.seed)
        striking = storm.faults.run(until) if storm.faults else asyncio.sleep(0)
        await asyncio.gather(striking, storm.bursts(until), *(storm.client(k, until) for k in range(run.n_streams)))
        storm_s, n_tokens = time.monotonic() - started, tally.n_tokens
        watching.cancel()
        await storm.afterwards()
    strikes = storm.faults.strikes if storm.faults else []
    compared = [len(case.text[: case.n_certain]) for case in storm.cases]
    ttft = sorted(tally.ttft_s)
    return {
        "seed": run.seed, "streams": run.n_streams, "seconds": round(storm_s, 1),
        "kinds": {
            kind: {"sent": tally.sent[kind], **{each: tally.outcomes[kind, each] for each in OUTCOMES}}
            for kind in sorted(tally.sent)
        },
        "lost": tally.total("lost"), "wrong": tally.total("wrong"),
        "reasons": [[*reason, count] for reason, count in sorted(tally.reasons.items())],
        "examples": {name: texts for name, texts in tally.examples.items() if texts},
        "ttft_p50_s": quantile(ttft, 0.5), "ttft_p99_s": quantile(ttft, 0.99), "slowest_s": tally.slowest_s,
        "tokens_per_s": n_tokens / storm_s,
        "text_compared": sum(compared) / sum(len(case.text) for case in storm.cases),
        "memory": memory.summary(),
        "strikes": [asdict(strike) for strike in strikes],
        "exit_codes": supervisor.exit_codes if supervisor is not None else [],
    }  # fmt: skip


async def ready(url: str) -> None:
    """Wait until the server says so. Raises Ended after BACK_WITHIN_S."""
    deadline = time.monotonic() + BACK_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url.rstrip('/')}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise Ended("lost", f"not ready within {BACK_WITHIN_S:.0f} s")


def roots_of(run: Run, supervisor: Supervisor | None) -> list[psutil.Process]:
    """The processes whose memory counts, with their children."""
    if supervisor is not None:
        return [supervisor.root] if supervisor.root is not None else []
    return [psutil.Process(pid) for pid in run.pids if psutil.pid_exists(pid)]


def quantile(ordered: list[float], q: float) -> float | None:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else None


def show(result: Json, console: Console) -> None:
    """The table, the reasons behind its columns, and examples of what went wrong."""
    table = Table(title=f"{result['streams']} clients for {result['seconds']} s, seed {result['seed']}")
    table.add_column("kind")
    for name in ("sent", *OUTCOMES):
        table.add_column(name, justify="right")
    for kind, row in result["kinds"].items():
        table.add_row(kind, *(str(row[name] or "") for name in ("sent", *OUTCOMES)))
    table.add_section()
    totals = (sum(row[name] for row in result["kinds"].values()) for name in ("sent", *OUTCOMES))
    table.add_row("all", *map(str, totals))
    console.print(table)
    reasons: Counter[tuple[str, str]] = Counter()
    for _, outcome, what, count in result["reasons"]:
        reasons[outcome, what] += count
    for (outcome, what), count in reasons.most_common():
        console.print(f"{count:7} {outcome}: {what}", markup=False, highlight=False)
    if result["ttft_p50_s"] is not None:
        p50, p99 = result["ttft_p50_s"], result["ttft_p99_s"]
        console.print(f"TTFT of streams: p50 {p50:.3f} s, p99 {p99:.3f} s; slowest request {result['slowest_s']:.1f} s")
    console.print(
        f"{result['tokens_per_s']:.0f} tokens/s in complete answers; "
        f"{result['text_compared']:.0%} of the reference texts lie before a tie"
    )
    show_strikes(result["strikes"], console)
    if memory := result["memory"]:
        console.print(
            f"memory: {memory['first_mb']:.0f} MB at first, {memory['last_mb']:.0f} at last, peak "
            f"{memory['peak_mb']:.0f}; slope of the second half {memory['slope_mb_per_min']:+.1f} MB/min"
        )
    for name, texts in result["examples"].items():
        for text in texts:
            console.print(f"{name}: {text}", markup=False, highlight=False)
    console.print(f"lost {result['lost']}, wrong {result['wrong']}", style="bold")


def show_strikes(strikes: list[Json], console: Console) -> None:
    """Each kind of fault: how often it struck, the slowest return, what was wrong."""
    if not strikes:
        return
    table = Table("fault", "struck", "all models answer, s", "the part is there, s", "worst wait, s", "wrong")
    for name in sorted({strike["fault"] for strike in strikes}):
        found = [strike for strike in strikes if strike["fault"] == name]
        answers, parts = ([strike[key] for strike in found] for key in ("answers_after_s", "part_after_s"))
        table.add_row(
            name, str(len(found)), "never" if None in answers else f"{max(answers):.1f}",
            "" if None in parts else f"{max(parts):.1f}", f"{max(strike['worst_wait_s'] for strike in found):.1f}",
            "; ".join(strike["wrong"] for strike in found if strike["wrong"]),
        )  # fmt: skip
    console.print(table)


def chaos(
    url: str = typer.Option("http://127.0.0.1:8000", help="The server."),
    api_key: str | None = typer.Option(None, help="A key, if it wants one."),
    pid: str = typer.Option("", metavar="PID[,PID]", help="Processes whose memory, with their children's, to watch."),
    seconds: float = typer.Option(60.0, min=0.1, help="How long clients begin new requests."),
    seed: int = typer.Option(0, help="Of every random choice."),
    streams: int = typer.Option(100, min=1, help="Clients at once."),
    burst: int = typer.Option(400, min=0, help="Requests at once in a burst; 0 for none."),
    patience: float = typer.Option(120.0, min=0.1, help="Seconds after which a request counts as lost."),
    tie: float = typer.Option(0.25, min=0, help="Compare texts up to two tokens this close, in nats; 0 wholly."),
    json: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
    command: str | None = typer.Option(None, help="Start the server by this, and again whenever it ends."),
    faults: str = typer.Option("", metavar="NAME[,NAME]", help=f"With --command: {', '.join(NAMES)}, or all."),
    pause: float = typer.Option(10.0, min=0, help="Seconds between the end of a fault and the next."),
    config: Path | None = typer.Option(None, help="For the fault `config`: the server's config, which is changed."),
    reload: str | None = typer.Option(None, help="For the fault `config`: the command that applies it."),
    log: Path | None = typer.Option(None, help="File for what the server of --command writes."),
) -> None:
    """Good and bad clients against a running server; exit code 1 if a request was lost or answered wrong."""
    names = tuple(name for name in NAMES if faults == "all" or name in faults.split(","))
    if unknown := set(filter(None, faults.split(","))) - {*NAMES, "all"}:
        raise typer.BadParameter(f"no fault {sorted(unknown)}; known: {', '.join(NAMES)}", param_hint="--faults")
    if names and command is None:
        raise typer.BadParameter("a server that is to be hurt is started here; give --command", param_hint="--faults")
    if "config" in names and (config is None or reload is None):
        raise typer.BadParameter("`config` needs --config and --reload", param_hint="--faults")
    pids = tuple(int(each) for each in re.findall(r"\d+", pid))
    if missing := [each for each in pids if not psutil.pid_exists(each)]:
        raise typer.BadParameter(f"no process {missing}", param_hint="--pid")
    try:
        plan = None if command is None else Plan(command, names, pause, config, reload, log)
        run = Run(url, api_key, pids, seconds, seed, streams, burst, patience, tie, plan)
        result = asyncio.run(storm_over(run))
    except (Ended, aiohttp.ClientError) as error:
        typer.echo(f"chaos: {url} does not answer before the storm: {error}", err=True)
        raise typer.Exit(2) from None
    if json is not None:
        json.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    show(result, Console(width=120))
    never = [strike for strike in result["strikes"] if strike["wrong"] or strike["answers_after_s"] is None]
    if result["lost"] or result["wrong"] or never:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(chaos)
