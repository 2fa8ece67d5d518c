"""Good and bad clients of a server, each with actions drawn from a generator of its own (`benchmarks/chaos.py`)."""

import asyncio
import contextlib
import io
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from benchmarks.faults import Faults
from benchmarks.storm_cases import (
    LONG_CONTEXT,
    MANY,
    PROMPTS,
    Case,
    Chunks,
    Ended,
    Json,
    Malformed,
    Model,
    Run,
    Tally,
    error_code,
    events,
    expect_ok,
    long_text,
    malformed,
    not_http,
    refuse_if_busy,
)

SETTLE_S = 10.0  # until the gauges must be back at 0
QUIET_S = 30.0  # until a connection of bytes that are not HTTP must be closed
GAUGES = ("mpt_num_requests_running", "mpt_num_requests_waiting", "mpt_kv_cache_usage_perc")


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
        if statuses and max(statuses) < 400:  # a server that died in between; `attempt` knows whether one did
            raise ConnectionResetError(f"closed behind {len(statuses)} right answers: {content[:100]!r}")
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
