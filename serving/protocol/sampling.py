"""The engine's request, made of a body's fields."""

from collections.abc import Sequence

from mpt.engine.grammar import Grammar
from mpt.engine.request import Sampling
from serving.errors import InvalidRequest
from serving.protocol.body import short
from serving.protocol.generation import MAX_BEST_OF, ChatRequest, CompletionRequest, declared_of

MAX_STOPS = 16  # OpenAI's limit is 4
MAX_STOP_CHARACTERS = 1000  # of one: as much text is held back while it may still come


def sampling_of(
    body: CompletionRequest | ChatRequest, max_tokens: int, vocab_size: int, grammar: Grammar | None = None
) -> Sampling:
    """What the engine is asked for; fields that are null take their defaults. Raises InvalidRequest."""
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequest(f"`min_tokens` {body.min_tokens} is over max_tokens {max_tokens}", param="min_tokens")
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_ids(name, getattr(body, name) or (), vocab_size)
    if body.prompt_logprobs is not None and body.stream:
        message = "`prompt_logprobs` come with a whole response only; set stream to false"
        raise InvalidRequest(message, param="prompt_logprobs")
    is_chat = isinstance(body, ChatRequest)
    n, logprobs, prompt_logprobs = _of_chat(body) if is_chat else _of_completion(body)
    if body.logprob_token_ids and logprobs is None:
        raise InvalidRequest("`logprob_token_ids` needs `logprobs`", param="logprob_token_ids")
    if body.allowed_token_ids is not None and grammar is not None:
        message = "`allowed_token_ids` contradicts the structure asked for; leave one out"
        raise InvalidRequest(message, param="allowed_token_ids")
    declared = declared_of(body)
    return Sampling(
        **declared | {"top_k": max(declared["top_k"], 0)},
        max_tokens=max_tokens,
        n=n,
        logit_bias=_bias(body.logit_bias or {}, vocab_size),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        stop=_stops(body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def _of_completion(body: CompletionRequest) -> tuple[int, int | None, int | None]:
    """How many samples are drawn, and how many alternatives are told of generated and of prompt tokens."""
    best_of = body.best_of or body.n
    if best_of < body.n:
        raise InvalidRequest(f"`best_of` {best_of} is under n {body.n}", param="best_of")
    if best_of > body.n and best_of > MAX_BEST_OF:
        raise InvalidRequest(f"`best_of` {best_of} is over the limit of {MAX_BEST_OF}; lower it", param="best_of")
    if best_of > body.n and body.stream:
        raise InvalidRequest("`best_of` over n cannot be streamed; set stream to false", param="best_of")
    logprobs = 0 if best_of > body.n and body.logprobs is None else body.logprobs  # to rank by
    echoed = body.logprobs if body.echo else None
    wanted = [each for each in (body.prompt_logprobs, echoed) if each is not None]
    return best_of, logprobs, max(wanted, default=None)


def _of_chat(body: ChatRequest) -> tuple[int, int | None, int | None]:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    return body.n, (body.top_logprobs or 0) if body.logprobs else None, body.prompt_logprobs


def _stops(body: CompletionRequest | ChatRequest) -> tuple[str, ...]:
    stops = [body.stop] if body.stop and isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise InvalidRequest(f"`stop` takes 1 to {MAX_STOPS} strings, none empty", param="stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(f"a `stop` has {longest} characters, at most {MAX_STOP_CHARACTERS}; cut it", param="stop")
    return tuple(stops)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"`{name}`: {bad} is outside 0 to {vocab_size - 1}", param=name)


def _bias(raw: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in raw.items():
        if not key.isascii() or not key.isdigit() or len(key) > 12 or int(key) >= vocab_size:
            raise InvalidRequest(
                f"`logit_bias`: `{short(key)}` is not a token id, 0 to {vocab_size - 1}", param="logit_bias"
            )
        if not -100 <= value <= 100:
            raise InvalidRequest(f"`logit_bias`: {value} is outside -100 to 100", param="logit_bias")
        bias[int(key)] = value
    return bias
