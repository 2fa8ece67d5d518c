"""A request at work: its prompts run as one engine request each, and their events come back merged.

Not here: how a request becomes a job (`intake.py`), and how an answer looks (`answers.py`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from mpt.engine import clock
from mpt.engine.endpoint import Endpoint
from mpt.engine.errors import EngineError, RequestTimeout
from mpt.engine.request import Delta, Event, Progress, Sampling, Started
from mpt.engine.sequence import Answer
from mpt.lora import Adapter
from mpt.tools import ToolUse
from serving.errors import Unavailable, from_engine
from serving.metrics import Metrics

_AT_ONCE = 64  # prompts of one job in the queue
_RETRY_S = 0.05  # between two tries to queue more of them


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
    echo: list[str] = field(default_factory=list)  # what the answer to each prompt begins with, if it does
    length_penalty: float | None = None  # of a beam search; None draws
    tools: ToolUse | None = None  # calls are looked for in the answer
    shows_token_ids: bool = False
    names_by_id: bool = False  # tokens of log-probabilities are called by their ids
    prompt_logprobs: int | None = None  # alternatives told of each prompt token
    include_usage: bool = False
    continuous_usage: bool = False
    progress: dict[int, Progress] = field(default_factory=dict)  # of each prompt
    cached_tokens: int = 0
    completion_tokens: int = 0  # given to the client
    read_tokens: int = 0  # of prompts that a step has begun to read
    drawn_tokens: int = 0  # for its answers; of beams, those of each step
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
        """What its client's account is charged: what was computed for it, however it ended."""
        return self.read_tokens + self.drawn_tokens

    def note(self, event: Event) -> None:
        """Count what an event tells of."""
        if isinstance(event, Started):
            self.cached_tokens += event.cached_tokens
            self.read_tokens += event.prompt_tokens
            if self.queue_s is None:
                self.queue_s = event.at - self.arrived
        elif isinstance(event, Delta):
            self.completion_tokens += len(event.token_ids)
            self.drawn_tokens += len(event.token_ids)
            if event.token_ids:
                self.ttft_s = event.at - self.arrived if self.ttft_s is None else self.ttft_s
                self.decode_s = max(self.decode_s, event.at - self.arrived - self.ttft_s)
            if event.finish_reason is not None:
                self.finish_reasons.add(event.finish_reason)

    def ended_by(self, error: BaseException) -> None:
        """Note what ended samples that did not end by themselves: the deadline, an error, or a client that went."""
        is_late, is_error = isinstance(error, RequestTimeout), isinstance(error, Exception)
        self.finish_reasons.add("timeout" if is_late else "error" if is_error else "abort")

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
    """Queue the prompts of a job, all or none; its events, merged. Raises ApiError.

    Of more than `_AT_ONCE` prompts the next ones follow when those before them have ended, so that one request does not
    fill the queue.
    """
    until = time.monotonic() + deadline_s

    def submit(prompts: list[list[int]]) -> list[Answer]:
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                left_s = max(0.0, until - time.monotonic())
                answers.append(
                    job.endpoint.engine.submit(
                        prompt, job.sampling, request_id=job.id, deadline_s=left_s, salt=salt, adapter=job.adapter
                    )
                )
        except EngineError as error:
            for answer in answers:
                answer.close()
            metrics.rejected.labels(job.endpoint.name, type(error).__name__).inc()
            raise from_engine(error) from error
        return answers

    first = submit(job.prompts[:_AT_ONCE])
    return (
        _merged(job, first, metrics) if len(job.prompts) <= _AT_ONCE else _in_turn(job, first, metrics, submit, until)
    )


async def _in_turn(
    job: Job, first: list[Answer], metrics: Metrics, submit: Callable[[list[list[int]]], list[Answer]], until: float
) -> Events:
    """The events of more prompts than may be queued at once."""
    answers = first
    for start in range(0, len(job.prompts), _AT_ONCE):
        while start:
            try:
                answers = submit(job.prompts[start : start + _AT_ONCE])
                break
            except Unavailable as error:
                if error.code != "overloaded" or time.monotonic() > until:
                    raise
                await asyncio.sleep(_RETRY_S)
        async with aclosing(_merged(job, answers, metrics)) as events:
            async for prompt, event in events:
                yield start + prompt, event


async def _merged(job: Job, answers: list[Answer], metrics: Metrics) -> Events:
    """The events of all answers as they come; closing this closes them."""
    started, n_left = False, len(answers) * job.sampling.n
    try:
        name = job.endpoint.name
        observed = [metrics.observe(name, answer) for answer in answers]
        async with aclosing(_interleaved(observed)) as events:
            async for prompt, event in events:
                job.note(event)
                started |= isinstance(event, Started)
                n_left -= isinstance(event, Delta) and event.finish_reason is not None
                yield prompt, event
    except BaseException as error:  # closing this raises GeneratorExit in it
        if n_left:
            job.ended_by(error)
        if isinstance(error, EngineError):
            raise from_engine(error, started=started) from error
        raise
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
