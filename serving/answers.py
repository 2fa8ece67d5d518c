"""Engine events as OpenAI's responses and chunks, for completions, chat and embeddings.

A choice's index is prompt * n + sample. What runs underneath is in `jobs.py`.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import numpy as np
import orjson

from mpt.engine.request import Delta, Embedded, Progress, PromptScored, TokenLogprob
from mpt.tools import CallArguments, CallBegun, CallReader, Piece, Said
from serving.jobs import Events, Job
from serving.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs

Chunks = AsyncGenerator[dict[str, Any], None]
P = ParamSpec("P")

# -- whole responses -----------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

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
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs or ()
                choice.finish_reason = event.finish_reason or choice.finish_reason
                choice.stop_reason = event.stop_reason
    if job.sampling.n > job.n:
        for choices in drawn:
            choices.sort(key=lambda choice: choice.mean_logprob, reverse=True)
    return [choices[: job.n] for choices in drawn], scored


async def _made(job: Job, make: Callable[P, dict[str, Any]], *args: P.args, **options: P.kwargs) -> dict[str, Any]:
    """A whole answer, made in a thread where it tells of every token: of 200,000 scores that takes 0.5 to 2 s."""
    if job.sampling.logprobs is None and job.sampling.prompt_logprobs is None:
        return make(*args, **options)
    return await asyncio.to_thread(make, *args, **options)


async def completion(job: Job, events: Events, *, logprobs: int | None) -> dict[str, Any]:
    """A whole `text_completion`. logprobs: what the client asked for, None for nothing."""
    drawn, scored = await _gather(job, events)
    return await _made(job, _completion, job, drawn, scored, logprobs)


def _completion(
    job: Job, drawn: list[list[_Choice]], scored: list[list[TokenLogprob]], logprobs: int | None
) -> dict[str, Any]:
    tokenizer = job.endpoint.tokenizer
    choices: list[dict[str, Any]] = []
    for prompt, samples in enumerate(drawn):
        for choice in samples:
            text = job.echo[prompt] + choice.text if job.echo else choice.text
            style = None
            if logprobs is not None:
                entries = [*(scored[prompt] if job.echo else ()), *choice.logprobs]
                style = CompletionLogprobs(tokenizer, logprobs, job.names_by_id).add(entries)
            shown = _text_choice(len(choices), text, style, choice.finish_reason, choice.stop_reason)
            choices.append(shown | _token_ids(job, choice) | _of_prompt(job, prompt, scored[prompt]))
    return {**_head(job, "cmpl", "text_completion"), "choices": choices, "usage": job.usage()}


async def chat(job: Job, events: Events, *, logprobs: bool) -> dict[str, Any]:
    """A whole `chat.completion`."""
    (samples,), (scored,) = await _gather(job, events)
    return await _made(job, _chat, job, samples, scored, logprobs)


def _chat(job: Job, samples: list[_Choice], scored: list[TokenLogprob], logprobs: bool) -> dict[str, Any]:
    tokenizer = job.endpoint.tokenizer
    choices = []
    for index, choice in enumerate(samples):
        message, n_calls = _message(job, choice.text)
        style = chat_logprobs(tokenizer, choice.logprobs, job.names_by_id) if logprobs else None
        shown = {
            "index": index,
            "message": message,
            "logprobs": style,
            "finish_reason": _chat_reason(job, choice.finish_reason, n_calls),
            "stop_reason": choice.stop_reason,
        }
        choices.append(shown | _token_ids(job, choice))
    head = _head(job, "chatcmpl", "chat.completion")
    return {**head, "choices": choices, "usage": job.usage(), **_of_prompt(job, 0, scored)}


def _token_ids(job: Job, choice: _Choice) -> dict[str, Any]:
    """vLLM's field, which it gives as null where it was not asked for."""
    return {"token_ids": choice.token_ids if job.shows_token_ids else None}


def _of_prompt(job: Job, prompt: int, scored: list[TokenLogprob]) -> dict[str, Any]:
    """vLLM's fields about a prompt, which it gives as null where they were not asked for."""
    scores = job.prompt_logprobs
    return {
        "prompt_token_ids": job.prompts[prompt] if job.shows_token_ids else None,
        "prompt_logprobs": None if scores is None else prompt_logprobs(job.endpoint.tokenizer, scored, scores),
    }


def _message(job: Job, text: str) -> tuple[dict[str, Any], int]:
    """The assistant's message, and how many calls it holds."""
    message: dict[str, Any] = {"role": "assistant", "content": "".join([*job.echo, text]), "refusal": None}
    if job.tools is None:
        return message, 0
    reader = _reader(job)
    said, calls = "".join(job.echo), list[dict[str, Any]]()
    for piece in [*reader.push(text), *reader.finish()]:
        if isinstance(piece, Said):
            said += piece.text
        elif isinstance(piece, CallBegun):
            calls.append(_call(piece))
        else:
            calls[piece.index]["function"]["arguments"] += piece.text
    message["content"] = said or (None if calls else "")
    return message | ({"tool_calls": calls} if calls else {}), len(calls)


def _reader(job: Job) -> CallReader:
    assert job.tools is not None
    return CallReader((tool.name for tool in job.tools.callable_tools), is_parallel=job.tools.is_parallel)


def _call(begun: CallBegun) -> dict[str, Any]:
    return {"id": begun.id, "type": "function", "function": {"name": begun.name, "arguments": ""}}


def _chat_reason(job: Job, reason: str | None, n_calls: int) -> str | None:
    """As OpenAI's: an answer that calls ends for its calls, unless one function was forced on it."""
    is_named = job.tools is not None and job.tools.is_named
    return "tool_calls" if n_calls and reason == "stop" and not is_named else reason


async def embeddings(job: Job, events: Events, *, encoding: str) -> dict[str, Any]:
    """A whole list of embeddings, one a prompt: numbers, or base64 of little-endian float32."""
    vectors: dict[int, Any] = {}
    async with aclosing(events):
        async for prompt, event in events:
            if isinstance(event, Embedded):  # as JSON one by one: 8 million numbers at once would take half a second
                packed = np.array(event.vector, dtype="<f4")
                shown = base64.b64encode(packed.tobytes()).decode() if encoding == "base64" else packed.tolist()
                vectors[prompt] = orjson.Fragment(orjson.dumps(shown))
    data = [{"object": "embedding", "index": at, "embedding": vectors[at]} for at in range(len(job.prompts))]
    n_tokens = job.usage()["prompt_tokens"]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": job.model, "usage": usage}


# -- pieces --------------------------------------------------------------------------------------------------------


async def completion_chunks(job: Job, events: Events, *, logprobs: int | None) -> Chunks:
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
            ids = _ids(job, event)
            if index not in opened:
                opened.add(index)
                entries = [*scores.get(prompt, ()), *entries]
                text = job.echo[prompt] + text if job.echo else text
                ids |= {"prompt_token_ids": job.prompts[prompt]} if job.shows_token_ids else {}
            piece = None
            if logprobs is not None:
                style = styles.setdefault(index, CompletionLogprobs(tokenizer, logprobs, job.names_by_id))
                piece = style.add(entries) if entries else None
            if text or piece or ids:
                yield _piece(job, head, _text_choice(index, text, piece, None) | ids)
            if event.finish_reason is not None:
                yield _piece(job, head, _text_choice(index, "", None, event.finish_reason, event.stop_reason))
    if job.include_usage:
        yield {**head, "choices": [], "usage": job.usage()}


async def chat_chunks(job: Job, events: Events, *, logprobs: bool) -> Chunks:
    """A streamed chat: the role, content and calls as they come, an empty delta with the finish reason, the usage."""
    head = _head(job, "chatcmpl", "chat.completion.chunk")
    readers = [_reader(job) for _ in range(job.n)] if job.tools is not None else None
    async with aclosing(events):
        for index in range(job.n):
            first = _piece(job, head, _delta_choice(index, {"role": "assistant", "content": "".join(job.echo)}))
            yield first | ({"prompt_token_ids": job.prompts[0]} if job.shows_token_ids else {})
        async for prompt, event in events:
            if isinstance(event, Progress):
                yield _progress(job, head, prompt, event)
            if not isinstance(event, Delta):
                continue
            reader = readers[event.index] if readers is not None else None
            pieces: list[Piece] = [Said(event.text)] if reader is None else reader.push(event.text)
            if reader is not None and event.finish_reason is not None:
                pieces += reader.finish()
            deltas = [delta for delta in map(_delta, pieces) if delta != {"content": ""}]
            entries = event.logprobs if logprobs else None
            extra = _ids(job, event)
            if entries:
                extra["logprobs"] = chat_logprobs(job.endpoint.tokenizer, entries, job.names_by_id)
            for n, delta in enumerate(deltas or ([{"content": ""}] if extra else [])):
                yield _piece(job, head, _delta_choice(event.index, delta) | (extra if n == 0 else {}))
            if event.finish_reason is not None:
                reason = _chat_reason(job, event.finish_reason, 0 if reader is None else reader.n_calls)
                yield _piece(job, head, _delta_choice(event.index, {}, reason, event.stop_reason))
    if job.include_usage:
        yield {**head, "choices": [], "usage": job.usage()}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Said):
        return {"content": piece.text}
    if isinstance(piece, CallBegun):
        return {"tool_calls": [{"index": piece.index, **_call(piece)}]}
    assert isinstance(piece, CallArguments)
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _ids(job: Job, event: Delta) -> dict[str, Any]:
    return {"token_ids": list(event.token_ids)} if job.shows_token_ids and event.token_ids else {}


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


def _text_choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: int | str | None = None,
) -> dict[str, Any]:
    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}
    return choice if finish_reason is None else choice | {"stop_reason": stop_reason}


def _delta_choice(
    index: int, delta: dict[str, Any], finish_reason: str | None = None, stop_reason: int | str | None = None
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return choice if finish_reason is None else choice | {"stop_reason": stop_reason}
