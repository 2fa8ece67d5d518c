"""Engine events to OpenAI's responses and chunks, for text completions and for chat.

Both kinds run the same way: each prompt is one engine request of n samples, events are merged as they come, and a
choice's index is prompt * n + sample. What differs is how a choice looks, whole or in pieces.
"""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpt.engine import clock
from mpt.engine.endpoint import Endpoint
from mpt.engine.request import (
    Delta,
    Embedded,
    EngineError,
    Event,
    Progress,
    PromptScored,
    Sampling,
    Started,
    TokenLogprob,
)
from mpt.engine.sequence import Answer
from mpt.lora import Adapter
from mpt.tokenizer import DetokenizeStream, Tokenizer
from serving.errors import from_engine
from serving.metrics import Metrics

_LOWEST = -9999.0  # JSON has no -inf; the value OpenAI's servers use


@dataclass
class Job:
    """What a request asks of an endpoint, prompts already token ids, and what it has cost so far."""

    id: str
    model: str  # as asked for: a served name, an adapter's after a colon
    endpoint: Endpoint
    adapter: Adapter | None
    prompts: list[list[int]]
    sampling: Sampling
    n: int  # choices returned per prompt; sampling.n are generated (best_of)
    echo: bool = False
    texts: list[str] = field(default_factory=list)  # the prompts as text, for echo
    include_usage: bool = False
    continuous_usage: bool = False
    progress: dict[int, Progress] = field(default_factory=dict)  # of each prompt
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: set[str] = field(default_factory=set)
    arrived: float = field(default_factory=clock.now)
    queue_s: float | None = None
    ttft_s: float | None = None
    decode_s: float = 0.0  # from the first token to the last
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def n_tokens_at_most(self) -> int:
        """What its client's account is charged while it runs."""
        return sum(map(len, self.prompts)) + len(self.prompts) * self.sampling.n * self.sampling.max_tokens

    @property
    def n_tokens(self) -> int:
        """What it has come to so far."""
        return sum(map(len, self.prompts)) + self.completion_tokens

    def log_fields(self) -> dict[str, Any]:
        """What the access log says of it, never its text. itl_s: mean time between two tokens, of all its samples."""
        n_gaps = self.completion_tokens - len(self.prompts) * self.sampling.n
        return {
            "model": self.model,
            "finish_reason": ",".join(sorted(self.finish_reasons)) or "-",
            "prompt_tokens": sum(map(len, self.prompts)),
            "completion_tokens": self.completion_tokens,
            "queue_s": "-" if self.queue_s is None else round(self.queue_s, 4),
            "ttft_s": "-" if self.ttft_s is None else round(self.ttft_s, 4),
            "itl_s": round(self.decode_s * len(self.prompts) * self.sampling.n / n_gaps, 5) if n_gaps > 0 else "-",
        }

    def usage(self) -> dict[str, Any]:
        """A prompt counts once however many samples share it."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


Events = AsyncGenerator[tuple[int, Event], None]  # with the number of the prompt each belongs to


def start(job: Job, metrics: Metrics, *, deadline_s: float, salt: str) -> Events:
    """Queue every prompt of a job at once, all or none; its events, merged. Raises ApiError."""
    answers: list[Answer] = []
    engine, name = job.endpoint.engine, job.endpoint.name
    try:
        for prompt in job.prompts:
            answer = engine.submit(
                prompt, job.sampling, request_id=job.id, deadline_s=deadline_s, salt=salt, adapter=job.adapter
            )
            answers.append(answer)
    except EngineError as error:
        for answer in answers:
            answer.close()
        metrics.rejected.labels(name, type(error).__name__).inc()
        raise from_engine(error) from error
    return _merged(job, answers, metrics)


async def _merged(job: Job, answers: list[Answer], metrics: Metrics) -> Events:
    """The events of all answers as they come; closing this closes them."""
    started = False
    try:
        name = job.endpoint.name
        observed = [metrics.observe(name, answer) for answer in answers]
        async with aclosing(_interleaved(observed)) as events:
            async for prompt, event in events:
                if isinstance(event, Started):
                    started = True
                    job.cached_tokens += event.cached_tokens
                    if job.queue_s is None:
                        job.queue_s = event.at - job.arrived
                elif isinstance(event, Delta):
                    job.completion_tokens += len(event.token_ids)
                    if event.token_ids:
                        job.ttft_s = event.at - job.arrived if job.ttft_s is None else job.ttft_s
                        job.decode_s = max(job.decode_s, event.at - job.arrived - job.ttft_s)
                    if event.finish_reason is not None:
                        job.finish_reasons.add(event.finish_reason)
                yield prompt, event
    except EngineError as error:
        raise from_engine(error, started=started) from error
    finally:
        for answer in answers:
            answer.close()


async def _interleaved(streams: Sequence[AsyncGenerator[Event, None]]) -> Events:
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def pump(k: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async for event in stream:
                arrived.put_nowait((k, event))
            arrived.put_nowait((k, None))
        except Exception as error:  # handed to the reader, who raises it
            arrived.put_nowait((k, error))

    pumps = [asyncio.create_task(pump(k, stream)) for k, stream in enumerate(streams)]
    try:
        n_left = len(pumps)
        while n_left:
            k, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_left -= 1
            else:
                yield k, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


# -- whole responses -----------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        values = [entry.logprob or 0.0 for entry in self.logprobs]
        return sum(values) / max(len(values), 1)


async def _gather(job: Job, events: Events) -> tuple[list[list[_Choice]], list[list[TokenLogprob]]]:
    """All samples of each prompt, the n best of them first where more were drawn; and each prompt's scores."""
    drawn = [[_Choice() for _ in range(job.sampling.n)] for _ in job.prompts]
    scored: list[list[TokenLogprob]] = [[] for _ in job.prompts]
    async with aclosing(events):
        async for prompt, event in events:
            if isinstance(event, PromptScored):
                scored[prompt] = list(event.logprobs)
            elif isinstance(event, Delta):
                choice = drawn[prompt][event.index]
                choice.text += event.text
                choice.logprobs += event.logprobs or ()
                choice.finish_reason = event.finish_reason or choice.finish_reason
    if job.sampling.n > job.n:
        for choices in drawn:
            choices.sort(key=lambda choice: choice.mean_logprob, reverse=True)
    return [choices[: job.n] for choices in drawn], scored


async def completion(job: Job, events: Events, *, logprobs: int | None) -> dict[str, Any]:
    """A whole `text_completion`. logprobs: what the client asked for, None for nothing."""
    drawn, scored = await _gather(job, events)
    choices: list[dict[str, Any]] = []
    for prompt, samples in enumerate(drawn):
        for choice in samples:
            text = job.texts[prompt] + choice.text if job.echo else choice.text
            style = None
            if logprobs is not None:
                entries = [*scored[prompt], *choice.logprobs]
                style = CompletionLogprobs(job.endpoint.tokenizer, logprobs).add(entries)
            choices.append(_text_choice(len(choices), text, style, choice.finish_reason))
    return {**_head(job, "cmpl", "text_completion"), "choices": choices, "usage": job.usage()}


async def chat(job: Job, events: Events, *, logprobs: bool) -> dict[str, Any]:
    """A whole `chat.completion`."""
    (samples,), _ = await _gather(job, events)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": _chat_logprobs(job.endpoint.tokenizer, choice.logprobs) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(samples)
    ]
    return {**_head(job, "chatcmpl", "chat.completion"), "choices": choices, "usage": job.usage()}


async def embeddings(job: Job, events: Events, *, encoding: str) -> dict[str, Any]:
    """A whole list of embeddings, one a prompt: numbers, or base64 of little-endian float32."""
    vectors: dict[int, Any] = {}
    async with aclosing(events):
        async for prompt, event in events:
            if isinstance(event, Embedded):
                packed = np.array(event.vector, dtype="<f4")
                vectors[prompt] = (
                    base64.b64encode(packed.tobytes()).decode() if encoding == "base64" else packed.tolist()
                )
    data = [{"object": "embedding", "index": at, "embedding": vectors[at]} for at in range(len(job.prompts))]
    n_tokens = job.usage()["prompt_tokens"]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": job.model, "usage": usage}


# -- pieces --------------------------------------------------------------------------------------------------------


async def completion_chunks(job: Job, events: Events, *, logprobs: int | None) -> AsyncGenerator[dict[str, Any], None]:
    """A streamed `text_completion`: text as it comes, an empty piece with the finish reason, the usage if asked."""
    head = _head(job, "cmpl", "text_completion")
    tokenizer = job.endpoint.tokenizer
    styles: dict[int, CompletionLogprobs] = {}
    scores: dict[int, tuple[TokenLogprob, ...]] = {}
    opened: set[int] = set()
    async with aclosing(events):
        async for prompt, event in events:
            if isinstance(event, Progress):
                yield _progress(job, head, prompt, event)
            if isinstance(event, PromptScored):
                scores[prompt] = event.logprobs
            if not isinstance(event, Delta):
                continue
            index, text = prompt * job.n + event.index, event.text
            entries = list(event.logprobs or ())
            if index not in opened:
                opened.add(index)
                entries = [*scores.get(prompt, ()), *entries]
                text = job.texts[prompt] + text if job.echo else text
            piece = None
            if logprobs is not None:
                style = styles.setdefault(index, CompletionLogprobs(tokenizer, logprobs))
                piece = style.add(entries) if entries else None
            if text or piece:
                yield _piece(job, head, _text_choice(index, text, piece, None))
            if event.finish_reason is not None:
                yield _piece(job, head, _text_choice(index, "", None, event.finish_reason))
    if job.include_usage:
        yield {**head, "choices": [], "usage": job.usage()}


async def chat_chunks(job: Job, events: Events, *, logprobs: bool) -> AsyncGenerator[dict[str, Any], None]:
    """A streamed chat: the role, content as it comes, an empty delta with the finish reason, the usage if asked."""
    head = _head(job, "chatcmpl", "chat.completion.chunk")
    async with aclosing(events):
        for index in range(job.n):
            yield _piece(job, head, _delta_choice(index, {"role": "assistant", "content": ""}, None, None))
        async for prompt, event in events:
            if isinstance(event, Progress):
                yield _progress(job, head, prompt, event)
            if not isinstance(event, Delta):
                continue
            entries = event.logprobs if logprobs else None
            if event.text or entries:
                style = _chat_logprobs(job.endpoint.tokenizer, entries) if entries else None
                yield _piece(job, head, _delta_choice(event.index, {"content": event.text}, style, None))
            if event.finish_reason is not None:
                yield _piece(job, head, _delta_choice(event.index, {}, None, event.finish_reason))
    if job.include_usage:
        yield {**head, "choices": [], "usage": job.usage()}


def _head(job: Job, prefix: str, kind: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{job.id}", "object": kind, "created": job.created, "model": job.model}


def _piece(job: Job, head: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    piece = {**head, "choices": [choice]}
    if job.include_usage:
        piece["usage"] = job.usage() if job.continuous_usage else None
    return piece


def _progress(job: Job, head: dict[str, Any], prompt: int, event: Progress) -> dict[str, Any]:
    """How far all prompts of a request have been read: an extension in llama.cpp's manner, without choices."""
    job.progress[prompt] = event
    total = sum(map(len, job.prompts))
    piece = {**head, "choices": []}
    if job.include_usage:
        piece["usage"] = None
    piece["prompt_progress"] = {
        "total": total,
        "processed": sum(each.processed_tokens for each in job.progress.values()),
        "cached": job.cached_tokens,
        "time_ms": round(1000 * (event.at - job.arrived)),
    }
    return piece


def _text_choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def _delta_choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


# -- log-probabilities ---------------------------------------------------------------------------------------------


class CompletionLogprobs:
    """The completions style, growing: parallel lists of tokens, their values, alternatives and places in the text."""

    def __init__(self, tokenizer: Tokenizer, n_top: int) -> None:
        self._tokenizer, self._n_top = tokenizer, n_top
        self._detokenize = DetokenizeStream(tokenizer, skip_special_tokens=False)
        self._offset = 0

    def add(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The lists for these entries; offsets go on from those before."""
        name: Callable[[int], str] = self._tokenizer.token_text
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._detokenize.push(entry.token_id))
            if entry.logprob is None or not self._n_top:
                tops.append(None)
                continue
            top = {name(token): _finite(value) for token, value in reversed(entry.top[: self._n_top])}
            tops.append({name(entry.token_id): _finite(entry.logprob), **dict(reversed(top.items()))})
        return {
            "tokens": [name(entry.token_id) for entry in entries],
            "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    def describe(token: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes(token))
        return {"token": tokenizer.token_text(token), "logprob": _finite(logprob), "bytes": raw}

    content = [
        {
            **describe(entry.token_id, entry.logprob or 0.0),
            "top_logprobs": [describe(token, value) for token, value in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
