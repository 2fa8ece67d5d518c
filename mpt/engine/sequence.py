"""One sample being generated: its tokens, its random numbers, its text so far and when it ends."""

import asyncio
import random
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mpt.backends.backend import Row
from mpt.engine import clock
from mpt.engine.errors import EngineError, Unsupported
from mpt.engine.grammar import BadGrammar
from mpt.engine.prefix_transfers import Loading, Lookup, Trail
from mpt.engine.request import Delta, Event, FinishReason, Sampling, TokenLogprob
from mpt.lora import Adapter
from mpt.sampling import Penalties, TokenCounts, ban_others
from mpt.tokenizer import DetokenizeStream, Tokenizer


class StopText:
    """Lets text through except what is, or may still become, a stop string."""

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops, self._include = stops, include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is final, and the stop string that ended it, if one did. The earliest match wins."""
        if not self._stops:
            return text, None
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            return self._held[: at + len(stop) * self._include], stop
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        final, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return final, None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text begin the stop string."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


@dataclass(eq=False)
class Request:
    """What one call of the engine asked for; its samples are `sequences`."""

    id: str
    prompt: list[int]
    sampling: Sampling
    salt: str  # prefixes are shared only within one salt
    adapter: Adapter | None
    deadline: float | None  # by `mpt.engine.clock`
    loop: asyncio.AbstractEventLoop  # where `deliver` must be called
    deliver: Callable[[Event | EngineError], None]
    client: str = ""  # who takes turns with others in the queue
    sequences: list["Sequence"] = field(default_factory=list)
    cancelled: bool = False  # set by the asker, read by the engine's thread
    arrived: float = field(default_factory=clock.now)


class Sequence:
    """One sample of a request. `tokens` grows; those before row.length are in the cache."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, vocab_size: int) -> None:
        sampling = request.sampling
        self.request, self.index, self.sampling = request, index, sampling
        self.tokens = list(request.prompt)
        self.n_prompt = len(request.prompt)
        self.row: Row | None = None
        self.lookup: Lookup | None = None  # of its prompt on disk; it is not admitted before that is done
        self.loading: Loading | None = None  # while its row comes from disk; it takes part in no step meanwhile
        self.trail: Trail | None = None  # how far its row is on disk, None where it is not to be kept there
        self.finished = False
        self.hidden: list[Tensor] = []  # sums over parts of the prompt, (C,) each, where an embedding is asked for
        self.admitted = False  # has left the queue once, though it may have been sent back
        self.scored: list[TokenLogprob] = []  # the prompt's, while it is being scored
        self.started = False  # its prompt is read
        self.begun = False  # a step has had a part of it
        self.random = random.Random(None if sampling.seed is None else sampling.seed + index)
        self._detokenize = DetokenizeStream(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            is_continuation=any(token not in tokenizer.special_ids for token in request.prompt),
        )
        self._stop_text = StopText(sampling.stop, sampling.include_stop_str_in_output)
        self._end_ids = frozenset() if sampling.ignore_eos else frozenset(tokenizer.end_ids)
        ends = {token for token in (*tokenizer.end_ids, *sampling.stop_token_ids) if token < vocab_size}
        self.banned_early = np.array(sorted(ends), dtype=np.int64)
        penalized = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        self._counts = TokenCounts(self.tokens) if penalized else None
        self.penalties = None
        if self._counts is not None:
            strengths = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
            self.penalties = Penalties(self._counts, *strengths)
        bias = {token: value for token, value in sampling.logit_bias.items() if token < vocab_size}
        self.bias = np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)
        allowed = sampling.allowed_token_ids
        self.allowed = None if allowed is None else np.array(allowed, dtype=np.int64)
        self.grammar = sampling.grammar.begin() if sampling.grammar is not None else None
        self._grammar_failed: BadGrammar | None = None
        is_bound = self.grammar is not None or self.allowed is not None
        self._is_steered = self.penalties is not None or bool(bias) or is_bound

    @property
    def waits_for_disk(self) -> bool:
        waited_for = self.loading or self.lookup
        return waited_for is not None and not waited_for.done

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_left(self) -> int:
        """Tokens it may still generate."""
        return self.sampling.max_tokens - self.n_generated

    @property
    def unread(self) -> Tokens[int]:
        """Tokens that are not in the cache yet; the whole prompt at first, one while decoding."""
        return self.tokens[self.row.length if self.row else 0 :]

    @property
    def is_prefill(self) -> bool:
        assert self.row is not None
        n_tokens = len(self.tokens)
        return n_tokens - self.row.length > 1 or n_tokens == self.n_prompt

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the model's likeliest token, whatever it drew before."""
        return self.sampling.temperature == 0 and not self.adjusts_logits

    @property
    def adjusts_logits(self) -> bool:
        return self._is_steered or self.is_too_early

    def forced(self, n: int) -> list[int]:
        """Up to n tokens that its grammar makes it write next, most likely."""
        return [] if self.grammar is None else self.grammar.forced(n)

    @property
    def is_too_early(self) -> bool:
        """Whether it may not end yet."""
        return self.n_generated < self.sampling.min_tokens

    def mask(self, logits: Tensor) -> None:
        """Ban what its grammar forbids from its row of logits, (V,), in place."""
        assert self.grammar is not None
        try:
            ban_others(logits, self.grammar.allowed(len(logits)))
        except BadGrammar as error:  # told by `accept`, which ends this request and nobody else's
            self._grammar_failed = error

    def end_without_tokens(self) -> Delta:
        """The end of a sample that was to score its prompt only."""
        self.finished = True
        return Delta(self.index, "", (), None, "length")

    def accept(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Take the token drawn; what it adds to the answer, and whether it ends it. Raises as `take`."""
        return self.say(self.take(token), logprob)

    def take(self, token: int) -> "Taken":
        """Go on behind the token drawn: all that the next step depends on, unless there are stop strings.

        Raises Unsupported where the grammar has led nowhere.
        """
        if self.grammar is not None:
            try:
                if self._grammar_failed is not None:
                    raise self._grammar_failed
                self.grammar.take(token)
            except BadGrammar as error:
                raise Unsupported(str(error)) from error
        self.tokens.append(token)
        if self._counts is not None:
            self._counts.add(token)
        sampling = self.sampling
        late_enough = self.n_generated >= sampling.min_tokens
        reason: FinishReason | None = None
        if late_enough and (token in self._end_ids or token in sampling.stop_token_ids):
            reason = "stop"
        elif self.n_generated >= sampling.max_tokens:
            reason = "length"
        self.finished = reason is not None
        return Taken(token, late_enough, reason, clock.now())

    def say(self, taken: "Taken", logprob: TokenLogprob | None) -> Delta:
        """What a token that was taken adds to the answer; a stop string in it ends the answer. Each once, in order."""
        token, late_enough, reason, at = taken
        stop: int | str | None = token if reason == "stop" else None
        text = ""
        if reason != "stop" or self.sampling.include_stop_str_in_output:
            text = self._detokenize.push(token)
        if reason is not None:
            text += self._detokenize.flush()
        stop_string = None
        if late_enough:
            text, stop_string = self._stop_text.push(text)
        if stop_string is not None:
            self.finished, reason, stop = True, "stop", stop_string
        elif reason is not None:
            text += self._stop_text.flush()
        logprobs = None if logprob is None else (logprob,)
        return Delta(self.index, text, (token,), logprobs, reason, stop, at)


class Taken(NamedTuple):
    """A token on its way into an answer's text. late_enough: it may end the answer. reason: why it does. at: when it
    was drawn."""

    token: int
    late_enough: bool
    reason: FinishReason | None
    at: float


class Answer:
    """What happens to one request, event by event, until all its n samples have ended.

    Closing it cancels: the memory is free at the next step. Raises RequestTimeout, ShuttingDown and EngineFailed.
    """

    def __init__(
        self, request: Request, inbox: "asyncio.Queue[Event | EngineError]", cancel: Callable[[Request], None]
    ) -> None:
        self.request, self._inbox, self._cancel = request, inbox, cancel
        self._n_left = request.sampling.n

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Event:
        if not self._n_left:
            raise StopAsyncIteration
        event = await self._inbox.get()
        if isinstance(event, EngineError):
            raise event
        self._n_left -= isinstance(event, Delta) and event.finish_reason is not None
        return event

    def close(self) -> None:
        self._cancel(self.request)
