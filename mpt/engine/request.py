"""What a request asks of the engine and what it gets back: the vocabulary between HTTP and the engine.

Nothing here computes. The HTTP layer translates OpenAI's fields into `Sampling` and `Delta`s into OpenAI's
chunks; the engine knows no field names of OpenAI.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from mpt.draw_parameters import DrawParameters, asked_over_http
from mpt.engine import clock
from mpt.engine.grammar import Grammar

FinishReason = Literal["stop", "length"]
MAX_PRIORITY = 100  # and as many below 0


@dataclass(frozen=True, kw_only=True)
class Sampling(DrawParameters):
    """How to continue one prompt. A field made by `asked_over_http` is a field of OpenAI's bodies too, which check its
    range; the others come from what several fields of a body say together.
    """

    max_tokens: int  # 0 is allowed: score the prompt and generate nothing
    min_tokens: int = asked_over_http(0, ge=0)  # end-of-text and stop ids cannot be drawn before
    n: int = 1  # samples; they share the prompt's cache
    presence_penalty: float = asked_over_http(0.0, ge=-2, le=2)  # OpenAI: subtracted once for a token generated before
    frequency_penalty: float = asked_over_http(0.0, ge=-2, le=2)  # OpenAI: subtracted for each time it was generated
    # CTRL (Keskar et al. 2019): prompt and answer, divides or multiplies
    repetition_penalty: float = asked_over_http(1.0, gt=0, le=100)
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None  # nothing else is drawn
    seed: int | None = asked_over_http(None, ge=-(2**63), lt=2**63)  # sample k of n draws from seed + k
    stop: tuple[str, ...] = ()  # found in the text, also across token borders
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end-of-text ids
    ignore_eos: bool = asked_over_http(False)
    include_stop_str_in_output: bool = asked_over_http(False)
    skip_special_tokens: bool = asked_over_http(True)
    logprobs: int | None = None  # top alternatives per generated token; 0 gives the token's own only
    logprob_token_ids: tuple[int, ...] = ()  # tokens whose log-probabilities are told beside the best ones
    prompt_logprobs: int | None = None  # the same for the prompt's tokens (echo)
    grammar: Grammar | None = None  # what the answer must be; it ends where that is complete
    priority: int = asked_over_http(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)  # lower leaves the queue first
    cache_salt: str = ""  # cached prefixes are shared only between requests that give the same
    embed: bool = False  # give the mean of the prompt's last hidden states; with max_tokens 0
    progress: bool = False  # tell how far the prompt has been read


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its log-probability under the raw distribution (before temperature and penalties)."""

    token_id: int
    logprob: float | None  # None for the first token of a prompt
    top: tuple[tuple[int, float], ...]  # the best alternatives, best first; floats equal to `logprob` where same
    named: tuple[tuple[int, float], ...] = ()  # the tokens of `logprob_token_ids`


@dataclass(frozen=True)
class PromptScored:
    """First event of a request that asked for `prompt_logprobs`: one entry a prompt token."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Delta:
    """What sample `index` gained in a step: text that is final, and the tokens behind it.

    Text lags behind tokens while it may still become part of a character or of a stop string.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    at: float = field(default_factory=clock.now, compare=False)  # when the token was drawn (`mpt.engine.clock`)

    def then(self, later: "Delta") -> "Delta":
        """Both as one."""
        logprobs = None if self.logprobs is None else self.logprobs + (later.logprobs or ())
        return replace(
            later, text=self.text + later.text, token_ids=self.token_ids + later.token_ids, logprobs=logprobs
        )


@dataclass(frozen=True)
class Started:
    """The request's first step begins: how much of its prompt is in the cache already. Precedes every other event."""

    prompt_tokens: int
    cached_tokens: int
    at: float = field(default_factory=clock.now, compare=False)  # when that step began


@dataclass(frozen=True)
class Progress:
    """How many of the prompt's tokens are in the cache, after each chunk of it."""

    processed_tokens: int
    total_tokens: int
    at: float = field(default_factory=clock.now, compare=False)


@dataclass(frozen=True)
class Embedded:
    """The mean of the prompt's last hidden states, d_model numbers, scaled to length 1."""

    vector: tuple[float, ...]


Event = Started | Progress | PromptScored | Embedded | Delta
