"""What every Space asks of an OpenAI-style server: models, streams that can be stopped, errors as sentences.

It is not about pages (that is `mpt_page.py`), and there is no Gradio in it. The file is copied beside each Space's
`app.py`. The server may be `mpt serve`, a cluster or anybody's: what only ours offers (`/tokenize`, `prompt_style`,
`licence`, reading progress) is used where it is there.
"""

import asyncio
import json
import logging
import math
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

log = logging.getLogger(__name__)
DEFAULT_URL = "http://127.0.0.1:8000"
LONGEST_WAIT_S = 5.0  # for a busy server, before its refusal is shown; who waits longer wants to know why
Message = dict[str, Any]  # {"role": ..., "content": ...}
Card = dict[str, Any]  # an entry of /v1/models


class SpaceError(Exception):
    """Why there is no answer, as a sentence for the person in front of the page.

    retry_after_s: when the server says that trying again makes sense. code: the server's, else one of
    `unreachable`, `no_server`, `broken_stream`. numbers: what else the server's error carries, e.g. `n_prompt_tokens`.
    """

    def __init__(
        self,
        sentence: str,
        retry_after_s: float | None = None,
        code: str | None = None,
        numbers: dict[str, int] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.sentence, self.retry_after_s, self.code, self.numbers = sentence, retry_after_s, code, numbers or {}

    @property
    def is_worth_waiting(self) -> bool:
        """Whether the server asks to come back so soon that the page can do it by itself."""
        return self.retry_after_s is not None and self.retry_after_s <= LONGEST_WAIT_S


@dataclass(frozen=True)
class Piece:
    """One event of a stream: some text, or how far the prompt has been read, or the usage, or nothing for a second.

    logprobs: for completions one (token, logprob, {alternative: logprob}) for each token of the piece.
    notice: why nothing comes yet, as a sentence.
    """

    text: str = ""
    logprobs: list[tuple[str, float | None, dict[str, float]]] | None = None
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    progress: dict[str, int] | None = None  # total, processed, cached, time_ms
    notice: str = ""


class Server:
    """The server at a URL, $MPT_URL by default, with a key, $MPT_API_KEY by default."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        url = url or os.environ.get("MPT_URL") or DEFAULT_URL
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self._key = key or os.environ.get("MPT_API_KEY") or None
        self._answers = True  # so far, for the log

    async def models(self) -> list[Card]:
        """The entries of /v1/models; of a server that is not ours they may be `id` only. Raises SpaceError."""
        answer = await self._json("GET", "/v1/models")
        cards = answer.get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise SpaceError(
                f"What answers at {self.url} is no OpenAI-style server: it lists no models.", None, "no_server"
            )
        if not cards:
            raise SpaceError(f"The server at {self.url} serves no model.", None, "no_server")
        return cards

    def chat(self, model: str, messages: list[Message], **parameters: Any) -> AsyncGenerator[Piece, None]:
        """Stream the answer to a conversation. Closing the generator frees the server at once. Raises SpaceError."""
        return self._stream("/v1/chat/completions", {"model": model, "messages": messages, **parameters})

    def complete(self, model: str, prompt: str, **parameters: Any) -> AsyncGenerator[Piece, None]:
        """Stream the continuation of a text. Closing the generator frees the server at once. Raises SpaceError."""
        return self._stream("/v1/completions", {"model": model, "prompt": prompt, **parameters})

    async def count(self, model: str, text_or_messages: str | list[Message]) -> int:
        """How many tokens a text, or messages in the model's template, are to it. Raises SpaceError.

        Servers that are neither ours nor vLLM have no /tokenize: code `unknown_url` or `no_tokenizer`.
        """
        count = (await self._tokenized(model, text_or_messages)).get("count")
        if not isinstance(count, int):
            raise SpaceError(f"The server at {self.url} does not count tokens.", None, "no_tokenizer")
        return count

    async def tokenize(self, model: str, text_or_messages: str | list[Message]) -> list[int]:
        """The tokens of a text, or of messages in the model's template. Raises SpaceError as `count` does."""
        tokens = (await self._tokenized(model, text_or_messages)).get("tokens")
        if not isinstance(tokens, list):
            raise SpaceError(f"The server at {self.url} does not say which tokens a text has.", None, "no_tokenizer")
        return tokens

    async def detokenize(self, model: str, tokens: list[int]) -> str:
        """The text of tokens. Raises SpaceError as `count` does."""
        text = (await self._json("POST", "/detokenize", {"model": model, "tokens": tokens})).get("prompt")
        if not isinstance(text, str):
            raise SpaceError(f"The server at {self.url} does not say which text tokens are.", None, "no_tokenizer")
        return text

    async def _tokenized(self, model: str, text_or_messages: str | list[Message]) -> dict[str, Any]:
        kind = "prompt" if isinstance(text_or_messages, str) else "messages"
        return await self._json("POST", "/tokenize", {"model": model, kind: text_or_messages})

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        options = {"include_usage": True}
        if body.pop("progress", False):
            options["include_progress"] = True
        body = {name: value for name, value in body.items() if value is not None}
        body |= {"stream": True, "stream_options": options}
        try:
            async with aclosing(self._stream_once(path, body)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        except SpaceError as error:
            if not error.is_worth_waiting:
                raise
            wait_s = error.retry_after_s or 0.0
        while wait_s > 0:  # a piece each second, as of `_with_beats`
            yield Piece(notice=f"The server is busy; trying again in {math.ceil(wait_s)} s.")
            await asyncio.sleep(min(1.0, wait_s))
            wait_s -= 1
        async with aclosing(self._stream_once(path, body)) as pieces:
            async for piece in pieces:
                yield piece

    async def _stream_once(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        done = False
        async with self._client() as client, self._answer(client, "POST", path, body) as response:
            if response.status_code != 200:
                await response.aread()
                raise _refusal(response)
            async with aclosing(_with_beats(_events(response))) as events:
                async for event in events:
                    if event == "[DONE]":
                        done = True
                        break
                    yield _piece(event) if event else Piece()
        if not done:
            raise SpaceError(
                "The server ended the stream in the middle, so the answer is not complete. It may have been "
                "restarted; try again.",
                None,
                "broken_stream",
            )

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self._client() as client, self._answer(client, method, path, body) as response:
            await response.aread()
            if response.status_code != 200:
                raise _refusal(response)
            try:
                answer = response.json()
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                raise SpaceError(f"What answers at {self.url} is no OpenAI-style server.", None, "no_server")
            return answer

    def _client(self) -> httpx.AsyncClient:
        """A new one each time: closing it closes its connections, which is how the server learns of a Stop."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        is_here = re.match(r"https?://(127\.0\.0\.1|localhost|\[::1\])([:/]|$)", self.url) is not None
        timeout = httpx.Timeout(10.0, read=120.0)  # our servers send a comment every 15 s while they compute
        # A proxy from the environment cannot reach this machine.
        return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=not is_here)

    @asynccontextmanager
    async def _answer(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[httpx.Response]:
        """The response, with everything the network does wrong as a SpaceError, while it is read too."""
        began = False
        try:
            async with client.stream(method, f"{self.url}{path}", json=body) as response:
                began = True
                self._say_whether_it_answers(True)
                yield response
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise SpaceError(f"`{self.url}` is no address of a server: {error}.", None, "unreachable") from error
        except httpx.ReadTimeout as error:
            raise SpaceError("The server has been silent for two minutes; try again.", None, "unreachable") from error
        except httpx.HTTPError as error:
            self._say_whether_it_answers(False)
            if began:
                raise SpaceError(
                    "The connection to the server broke, so the answer is not complete. It may have been restarted; "
                    "try again.",
                    None,
                    "broken_stream",
                ) from error
            raise SpaceError(
                f"No server answers at {self.url}. It may be starting or down; try again in a moment.",
                None,
                "unreachable",
            ) from error

    def _say_whether_it_answers(self, answers: bool) -> None:
        """Log it when it changes: who runs the page looks at the terminal, not at the page."""
        if answers != self._answers:
            log.warning("the server at %s %s", self.url, "answers again" if answers else "does not answer")
        self._answers = answers


async def _events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The data of each server-sent event, however the bytes are cut; comments are skipped.

    Lines end at \\n only: httpx's own `aiter_lines` also cuts at U+2028 and others, which may stand inside JSON text.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode("utf-8", "replace")


async def _with_beats(events: AsyncGenerator[str, None], every_s: float = 1.0) -> AsyncGenerator[str, None]:
    """The events, and an empty one for each second without one.

    Gradio looks whether the tab is still open only when it is handed something: without beats, a closed tab would keep
    the server reading a long prompt, or a place in its queue.
    """
    async with aclosing(events):
        waiting = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=every_s)
                if not done:
                    yield ""
                    continue
                event = waiting.result()
                if event is None:
                    return
                waiting = asyncio.ensure_future(anext(events, None))
                yield event
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})


def _piece(event: str) -> Piece:
    try:
        chunk = json.loads(event)
        if "error" in chunk:
            raise _error_event(chunk["error"])
        usage, progress = chunk.get("usage"), chunk.get("prompt_progress")
        if not chunk.get("choices"):
            return Piece(usage=usage, progress=progress)
        choice = chunk["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        scores = _scores(choice.get("logprobs"))
        return Piece(text or "", scores, usage, choice.get("finish_reason"), progress)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SpaceError(f"The server does not speak OpenAI's protocol: {error!r}.", None, "no_server") from error


def _scores(logprobs: dict[str, Any] | None) -> list[tuple[str, float | None, dict[str, float]]] | None:
    """Token, its log-probability and the likeliest tokens there, of both of OpenAI's forms."""
    if not logprobs:
        return None
    if "content" in logprobs:
        return [
            (
                entry["token"],
                entry["logprob"],
                {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()},
            )
            for entry in logprobs["content"] or ()
        ]
    tokens, tops = logprobs["tokens"], logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        (token, value, top or {}) for token, value, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True)
    ]


# -- errors as sentences -------------------------------------------------------------------------------------------


def _refusal(response: httpx.Response) -> SpaceError:
    """A response other than 200, as a sentence."""
    try:
        error = response.json()["error"]
        error = error if isinstance(error, dict) else {"message": str(error)}
    except (ValueError, KeyError, TypeError):
        error = {}
    wait_s = _seconds(response.headers.get("retry-after"))
    status, code, message = response.status_code, error.get("code"), str(error.get("message") or "")
    again = f"try again in {wait_s:g} s" if wait_s else "try again in a moment"
    if code == "context_length_exceeded":
        sentence = f"This is too long for the model: {message}."
    elif status == 401:
        sentence = "The server refuses the key of this page: set MPT_API_KEY to one it knows, and start the page again."
        code = code or "invalid_api_key"
    elif status == 403:
        sentence = f"The server does not let this page in: {message or 'forbidden'}."
    elif status == 429:
        sentence = f"Too many requests for this minute; {again}."
    elif code in ("overloaded", "queue_timeout"):
        sentence = f"The server has more to do than it can: its queue is full; {again}."
    elif code == "shutting_down":
        sentence = f"The server is shutting down, perhaps for a restart; {again}."
    elif code == "model_loading":
        sentence = f"The model is still loading; {again}."
    elif message:
        sentence = f"The server says: {message}."
    else:
        sentence = f"The server answered {status}, with nothing that explains it; {again}."
    return SpaceError(_tidy(sentence), wait_s, code, _numbers(error))


def _error_event(error: Any) -> SpaceError:
    """An error event inside a stream, as a sentence."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    code, message = error.get("code"), str(error.get("message") or "no reason given")
    if code in ("shutting_down", "engine_stopped", "replica_lost"):
        sentence = "The server stopped in the middle of the answer, perhaps for a restart; try again in a moment."
    else:
        sentence = f"The server broke off: {message}."
    return SpaceError(_tidy(sentence), None, code, _numbers(error))


def _numbers(error: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in error.items() if isinstance(value, int) and not isinstance(value, bool)}


def _seconds(header: str | None) -> float | None:
    try:
        return float(header) if header else None
    except ValueError:  # an HTTP date
        return None


def _tidy(sentence: str) -> str:
    return re.sub(r"\.{2,}$", ".", sentence)


# -- models, and what fits into them -----------------------------------------------------------------------------------


def pick(cards: list[Card], model: str | None) -> Card:
    """The one chosen, else the first: a server may have come back with others."""
    return next((card for card in cards if card["id"] == model), cards[0])


def context_length(card: Card) -> int | None:
    """The tokens a model can hold, ours or vLLM's name for it."""
    value = card.get("context_length") or card.get("max_model_len")
    return value if isinstance(value, int) else None


async def count_or_guess(server: Server, card: Card, prompt: str | list[Message]) -> int:
    """The tokens of a prompt; where the server does not count, a guess that is rather too high. Raises SpaceError."""
    try:
        return await server.count(card["id"], prompt)
    except SpaceError as error:
        if error.code not in ("unknown_url", "no_tokenizer"):
            raise
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return sum(map(len, texts)) // 3  # English has 4 characters to a token


def room(card: Card, n_prompt_tokens: int, wanted: int) -> int:
    """How many of the wanted tokens fit after a prompt; SpaceError when none does."""
    context = context_length(card)
    if context is None:
        return wanted
    if n_prompt_tokens >= context:
        raise SpaceError(
            f"The prompt is {n_prompt_tokens:,} tokens with all that must go before it, and {card['id']} holds "
            f"{context:,} together with its answer; shorten it.",
            None,
            "context_length_exceeded",
        )
    return min(wanted, context - n_prompt_tokens)


async def room_after(server: Server, card: Card, prompt: str | list[Message], wanted: int) -> int:
    """`room` after a prompt that is not counted yet; one that the server does not say the context of stays uncounted."""
    if context_length(card) is None:
        return wanted
    return room(card, await count_or_guess(server, card, prompt), wanted)


def models_that_answer(cards: list[Card], style: str, refusal: str) -> list[Card]:
    """The models that answer messages, those of a prompt style first. SpaceError with a sentence when there is none.

    Servers other than ours do not name a style, so all of their models count.
    """
    able = [card for card in cards if card.get("prompt_style") != "none"]
    if not able:
        raise SpaceError(refusal, None, "no_server")
    return sorted(able, key=lambda card: card.get("prompt_style") != style)


def sampling(
    temperature: float, top_p: float, *, top_k: float = 0, repetition_penalty: float = 1, seed: float | None = None
) -> dict[str, Any]:
    """Parameters of a request from the page's sliders. None, which is not sent, stands for what is off."""
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": int(top_k) or None,
        "repetition_penalty": None if repetition_penalty == 1 else repetition_penalty,
        "seed": None if seed is None else int(seed),
    }
