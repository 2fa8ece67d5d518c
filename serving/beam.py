"""Beam search over an engine: the likeliest answers by the sum of their log-probabilities, as vLLM's servers offer it.

Each step asks the engine for one more token behind each beam. The engine keeps the rows of finished requests, so a step
reads one token of each beam and copies the rows of those that branch.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace

from mpt.backends.capabilities import asked_for
from mpt.engine.errors import EngineError
from mpt.engine.request import Delta, Event, Sampling, TokenLogprob
from mpt.engine.sequence import Answer
from mpt.tokenizer import DetokenizeStream
from serving.errors import InvalidRequest, from_engine
from serving.jobs import Job

# What a request may say beside the number of beams; the rest steers draws, and beams are not drawn.
_TAKES = {"max_tokens", "n", "temperature", "ignore_eos", "skip_special_tokens", "seed", "priority", "cache_salt"}


@dataclass(frozen=True)
class Beam:
    """tokens: generated ones; total: the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    total: float = 0.0
    has_ended: bool = False

    def score(self, n_prompt: int, length_penalty: float) -> float:
        """vLLM's: the sum over the length of prompt and answer, without end-of-text, to the power of the penalty."""
        return float(self.total / (n_prompt + len(self.tokens) - self.has_ended) ** length_penalty)


def check(job: Job) -> None:
    """Raises InvalidRequest for what beams cannot honour."""
    for name in asked_for(job.sampling):
        if name not in _TAKES:
            message = f"`{name}` steers draws, and `use_beam_search` draws nothing; leave one of them out"
            raise InvalidRequest(message, param=name)


async def search(
    job: Job, submit: Callable[[list[int], Sampling], Answer], length_penalty: float
) -> AsyncGenerator[tuple[int, Event], None]:
    """The best beams of each prompt, best first, as the events of so many samples. Raises ApiError.

    submit: queues one step of one beam; whatever time is left is its deadline.
    """
    for at, prompt in enumerate(job.prompts):
        try:
            beams = await _best(job, prompt, submit, length_penalty)
        except BaseException as error:
            job.ended_by(error)
            if isinstance(error, EngineError):
                raise from_engine(error) from error
            raise
        for index, beam in enumerate(beams):
            delta = _delta(job, index, beam)
            job.completion_tokens += len(delta.token_ids)
            job.finish_reasons.add(str(delta.finish_reason))
            yield at, delta


async def _best(
    job: Job, prompt: list[int], submit: Callable[[list[int], Sampling], Answer], length_penalty: float
) -> list[Beam]:
    width = job.sampling.n
    ends = frozenset() if job.sampling.ignore_eos else frozenset(job.endpoint.tokenizer.end_ids)
    # Twice the width: of that many continuations, at least so many do not end the text.
    step = replace(job.sampling, n=1, max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=2 * width)
    beams, ended = [Beam()], list[Beam]()

    def score(beam: Beam) -> float:
        return beam.score(len(prompt), length_penalty)

    job.read_tokens += len(prompt)
    for _ in range(job.sampling.max_tokens):
        told = await asyncio.gather(*(_next(submit, [*prompt, *beam.tokens], step) for beam in beams))
        job.drawn_tokens += len(told)
        grown = [
            Beam((*beam.tokens, token), beam.total + logprob, token in ends)
            for beam, following in zip(beams, told, strict=True)
            for token, logprob in following.top
        ]
        ended += [beam for beam in grown if beam.has_ended]
        beams = sorted((beam for beam in grown if not beam.has_ended), key=score, reverse=True)[:width]
    return sorted([*ended, *beams], key=score, reverse=True)[:width]


async def _next(submit: Callable[[list[int], Sampling], Answer], tokens: list[int], step: Sampling) -> TokenLogprob:
    """What may follow these tokens, with its log-probabilities."""
    answer = submit(tokens, step)
    try:
        async for event in answer:
            if isinstance(event, Delta) and event.logprobs:
                return event.logprobs[0]
    finally:
        answer.close()
    raise EngineError("a step of the beam search gave no token")


def _delta(job: Job, index: int, beam: Beam) -> Delta:
    tokens = beam.tokens[:-1] if beam.has_ended else beam.tokens
    stream = DetokenizeStream(
        job.endpoint.tokenizer, skip_special_tokens=job.sampling.skip_special_tokens, is_continuation=True
    )
    text = "".join(stream.push(token) for token in tokens) + stream.flush()
    return Delta(index, text, beam.tokens, finish_reason="stop" if beam.has_ended else "length")
