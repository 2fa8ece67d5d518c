"""One OpenAI-style server as `mpt bench` sees it: its models, how it counts tokens, an answer piece by piece."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from mpt.errors import UserError
from serving.bench.load import Prompt, random_words
from serving.bench.record import Record

_NO_TEXT = "no text"
_PROBE_WORDS = 8, 72  # the lengths of two prompts by which a server's tokens per word are found


@dataclass
class Target:
    """A model of a server. fields: what each body has beside the prompt. counts: it gives `usage` in streams."""

    session: aiohttp.ClientSession
    url: str  # up to /v1
    model: str
    chat: bool
    fields: dict[str, Any]
    counts: bool = True
    began: float = field(default_factory=time.perf_counter)

    async def send(self, prompt: Prompt) -> Record:
        """Ask for one answer and follow it to its end, or to what went wrong."""
        record = Record(sent=self._now())
        try:
            async with self.session.post(f"{self.url}/{self._route}", json=self._body(prompt)) as response:
                if response.status != 200:
                    record.error = f"{response.status} {_code(await response.read())}".strip()
                else:
                    record.error = await self._follow(record, response)
        except TimeoutError:
            record.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            record.error = f"connection: {type(error).__name__}"
        record.ended = self._now()
        return record

    async def tokens_per_word(self) -> tuple[float, float]:
        """Tokens that a word becomes, and those that every prompt has beside them. Raises UserError.

        Also the first requests, which find out whether the server answers at all and whether it counts.
        """
        words = next(random_words(max(_PROBE_WORDS), seed=0)).split()
        counted = []
        for n in _PROBE_WORDS:
            prompt = " ".join(words[:n])
            record = await self.send(prompt)
            if self.counts and (record.error or "").startswith(("400", "422")):  # it may not know `stream_options`
                self.counts = False
                record = await self.send(prompt)
            if record.error not in (None, _NO_TEXT):  # two tokens may be half a character
                raise UserError(
                    f"`{self.url}/{self._route}` gives `{self.model}` no answer: {record.error}; try another URL, "
                    "--model or --api-key"
                )
            counted.append(record.prompt_tokens)
        few, many = counted
        if few is None or many is None or many <= few:
            return 1.3, 0.0  # what English has with GPT-2's tokenizer
        slope = (many - few) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
        return slope, few - slope * _PROBE_WORDS[0]

    @property
    def _route(self) -> str:
        return "chat/completions" if self.chat else "completions"

    def _now(self) -> float:
        return time.perf_counter() - self.began

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body = {"model": self.model, "stream": True, **self.fields}
        if self.counts:
            body["stream_options"] = {"include_usage": True}
        if self.chat:
            return {**body, "messages": prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}

    async def _follow(self, record: Record, response: aiohttp.ClientResponse) -> str | None:
        """Note the pieces of a stream; what is wrong with it, None for a whole one with some text."""
        has_ended = False
        async for data in events(response):
            if data == b"[DONE]":
                has_ended = True
                break
            try:
                chunk = json.loads(data)
                if "error" in chunk:
                    return f"in the stream: {_code(data)}"
                choices, usage = chunk.get("choices") or (), chunk.get("usage")
                texts = [(c.get("delta") or {}).get("content") or c.get("text") for c in choices]
                has_ended = has_ended or any(c.get("finish_reason") for c in choices)
            except (ValueError, AttributeError, TypeError):
                return "in the stream: no chunk of OpenAI's"
            if any(texts):
                record.pieces.append(self._now())
            if usage:
                record.prompt_tokens, record.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not has_ended:
            return "stream cut off"
        return None if record.pieces else _NO_TEXT


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event, however the bytes are cut; comments are skipped."""
    rest = b""
    async for part in response.content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _code(raw: bytes) -> str:
    """What an error body of OpenAI's is called; nothing for another one."""
    try:
        error = json.loads(raw)["error"]
        return str(error.get("code") or error.get("type") or error.get("message") or "")[:80]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""


async def served_models(session: aiohttp.ClientSession, url: str) -> list[str]:
    """The names at /v1/models. Raises UserError."""
    try:
        async with session.get(f"{url}/models") as response:
            raw = await response.read()
            if response.status == 401:
                raise UserError(f"`{url}` wants a key; set MPT_API_KEY or give --api-key")
            if response.status != 200:
                raise UserError(f"`{url}/models` answered {response.status} {_code(raw)}; give --model or another URL")
            names = [str(card["id"]) for card in json.loads(raw)["data"]]
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"no server answers at `{url}` ({error}); start one with `mpt serve`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{url}/models` is not OpenAI's; give --model") from error
    if not names:
        raise UserError(f"`{url}` serves no model")
    return names
