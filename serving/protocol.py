"""OpenAI's request bodies, read strictly: every field has a type, a range and a fate.

A field is used, or accepted because it asks for nothing (`user`, `store: false`), or refused by name; none is ignored.
Sources: OpenAI's API reference; vLLM's names for the extensions clients send in `extra_body`.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mpt.engine.grammar import ANY_OBJECT, Grammar, Kind
from mpt.engine.request import Sampling
from serving.errors import InvalidRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_SAMPLES = 8  # n and best_of: each is a sequence in the batch
MAX_PROMPTS = 64
MAX_STOPS = 16  # OpenAI's limit is 4
MAX_STOP_CHARACTERS = 1000  # of one: as much text is held back while it may still come
MAX_TOP_LOGPROBS = 20

# Accepted whatever they say: they change nothing a caller could observe.
_NO_OPS = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "add_special_tokens",
}  # fmt: skip
# Accepted only at values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "store": (None, False), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]), "audio": (None,), "prediction": (None,), "reasoning_effort": (None,),
    "verbosity": (None,), "web_search_options": (None,), "use_beam_search": (False,), "length_penalty": (1.0,),
    "early_stopping": (False,), "prompt_logprobs": (None,), "truncate_prompt_tokens": (None,),
    "spaces_between_special_tokens": (True,), "return_token_ids": (None, False), "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "typical_p": (None, 1.0), "dimensions": (None,), "echo_prompt": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "chat_template": (None,), "chat_template_kwargs": (None, {}),
}  # fmt: skip
# vLLM's names before 0.12, and what they are called in `structured_outputs` since.
_RENAMED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class Strict(BaseModel):
    """A body in which every field is known and of its type, and no number is NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_progress: bool = False  # ours: how far the prompt has been read
    include_obfuscation: bool = False  # padding against traffic analysis; none is added here


class JsonSchema(Strict):
    """OpenAI's: a schema under a name. It is always kept to; `strict` asks for nothing more."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's: the answer is JSON, of a schema if there is one."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: the answer is what one of these describes. Expressions are Rust's, grammars Lark's."""

    json_schema: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def _declared() -> dict[str, Any]:
    """The fields of a body that `Sampling` declares, each of them null for its default."""
    hints = get_type_hints(Sampling)
    found = {each.name: each for each in fields(Sampling) if "http" in each.metadata}
    return {
        name: (Annotated[hints[name], Field(**each.metadata["http"])] | None, each.default)
        for name, each in found.items()
    }


class _Given(Strict):
    """What a body says beside the fields of `Sampling`, or in other words than it."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = 1
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


_DEFAULTS = {name: default for name, (_, default) in _declared().items()}
_Generation: Any = create_model("_Generation", __base__=_Given, **_declared())


class CompletionRequest(_Generation):
    prompt: Any  # a union pydantic would explain badly: see `prompts_of`
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Unknown fields inside a message are allowed: clients send back what other servers gave them."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes) -> Body:
    """A request body of one kind. Raises InvalidRequest naming the field, its value and what would be right."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body is a JSON {_kind(fields)}, not an object", code="invalid_json")
    fields = {name: value for name, value in fields.items() if not _asks_nothing(kind, name, value)}
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None


def _asks_nothing(kind: type[BaseModel], name: str, value: object) -> bool:
    """Whether a field is one to accept and drop; raises for the unknown and the unsupported."""
    if name in kind.model_fields:
        return False
    if name in _NO_OPS:
        return True
    if name in _RENAMED:
        if value is None:
            return True
        now = f'`structured_outputs: {{"{_RENAMED[name]}": ...}}`'
        raise InvalidRequest(f"`{name}` is called {now} now; send that", code="unsupported_parameter", param=name)
    if name in _NEUTRAL:
        if any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name]):
            return True
        raise InvalidRequest(f"`{name}` is not supported here; leave it out", code="unsupported_parameter", param=name)
    close = difflib.get_close_matches(name, kind.model_fields, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    raise InvalidRequest(f"unknown parameter `{_short(name)}`{hint}", code="unknown_parameter", param=_short(name))


def _explain(problem: Any) -> InvalidRequest:
    """Pydantic's first finding as one sentence."""
    param = ""
    for step in problem["loc"]:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step in ("str", "float", "int") or "[" in str(step):  # a branch of a union, not a field
            break
        else:
            param += f".{step}" if param else str(step)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "missing":
        return InvalidRequest(f"`{param}` is missing", code="missing_required_parameter", param=param)
    is_type = kind.endswith(("_type", "_parsing")) or kind == "int_from_float"
    wanted = problem["msg"][0].lower() + problem["msg"][1:]
    if context.get("expected"):
        wanted = f"input should be {context['expected']}"
    message = f"`{param}`: {wanted}; got {_short(problem['input'])}"
    return InvalidRequest(message, code="invalid_type" if is_type else "invalid_value", param=param)


def _short(value: object) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, list | dict):  # its content may be megabytes, or nested deeper than orjson writes
        text = f"a JSON {_kind(value)} of {len(value)}"
    else:
        text = orjson.dumps(value, default=str).decode("utf-8", "replace")
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def prompts_of(value: Any, vocab_size: int, param: str = "prompt") -> list[str | list[int]]:
    """The prompts in a field of a request: a string, strings, token ids, or lists of those."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"`{param}` must be a string, a list of strings, a list of token ids or a list of those, and not empty",
            code="invalid_type" if not isinstance(value, list) else "invalid_value",
            param=param,
        )
    if all(_is_id(item) for item in value):
        return [_check_ids(value, vocab_size, param)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"`{param}` holds {len(value)} prompts, at most {MAX_PROMPTS}; split them", param=param)
    prompts: list[str | list[int]] = []
    for n, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list) and item and all(_is_id(token) for token in item):
            prompts.append(_check_ids(item, vocab_size, param))
        else:
            message = f"`{param}[{n}]` must be a string or a list of token ids; got {_short(item)}"
            raise InvalidRequest(message, code="invalid_type", param=f"{param}[{n}]")
    return prompts


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(
            f"token id {bad} is outside the vocabulary, 0 to {vocab_size - 1}", code="invalid_prompt", param=param
        )
    return ids


def sampling_of(
    body: CompletionRequest | ChatRequest, max_tokens: int, vocab_size: int, grammar: Grammar | None = None
) -> Sampling:
    """What the engine is asked for; fields that are null take their defaults."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise InvalidRequest(f"`stop` takes 1 to {MAX_STOPS} strings, none empty", param="stop")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(f"a `stop` has {longest} characters, at most {MAX_STOP_CHARACTERS}; cut it", param="stop")
    bad = next((t for t in body.stop_token_ids or [] if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(f"`stop_token_ids`: {bad} is outside 0 to {vocab_size - 1}", param="stop_token_ids")
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"`min_tokens` {min_tokens} is over max_tokens {max_tokens}", param="min_tokens")
    n = body.n or 1
    logprobs: int | None
    prompt_logprobs = None
    if isinstance(body, CompletionRequest):
        best_of = body.best_of or n
        if best_of < n:
            raise InvalidRequest(f"`best_of` {best_of} is under n {n}", param="best_of")
        if best_of > n and body.stream:
            raise InvalidRequest("`best_of` over n cannot be streamed; set stream to false", param="best_of")
        logprobs = body.logprobs
        prompt_logprobs = body.logprobs if body.echo else None
        if best_of > n and logprobs is None:
            logprobs = 0  # to rank by
        n = best_of
    else:
        if body.top_logprobs is not None and not body.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    given = {name: getattr(body, name) for name in _DEFAULTS}
    declared = {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}
    return Sampling(
        **declared | {"top_k": max(declared["top_k"], 0)},
        max_tokens=max_tokens,
        n=n,
        logit_bias=_bias(body.logit_bias or {}, vocab_size),
        stop=tuple(stops),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


@dataclass(frozen=True)
class Structure:
    """What an answer must look like, and the field that asked for it."""

    kind: Kind
    value: Any
    param: str


def structure_of(body: CompletionRequest | ChatRequest, max_tokens: int) -> Structure | None:
    """The structure a request asks of its answer. Raises InvalidRequest for what contradicts it."""
    found: list[Structure] = []
    form, outputs = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            where = "response_format.json_schema"
            raise InvalidRequest(f"`{where}` is missing", code="missing_required_parameter", param=where)
        found.append(Structure("json", form.json_schema.json_schema, "response_format.json_schema.schema"))
    elif form is not None and form.json_schema is not None:
        raise InvalidRequest(
            f'`response_format.json_schema` needs the type "json_schema", not "{form.type}"',
            param="response_format.json_schema",
        )
    elif form is not None and form.type == "json_object":
        found.append(Structure("json", ANY_OBJECT, "response_format"))
    if outputs is not None:
        asked: list[tuple[str, Kind, Any]] = [
            ("json", "json", outputs.json_schema),
            ("regex", "regex", outputs.regex),
            ("choice", "choice", outputs.choice),
            ("grammar", "grammar", outputs.grammar),
            ("json_object", "json", ANY_OBJECT if outputs.json_object else None),
        ]
        given = [
            Structure(kind, value, f"structured_outputs.{name}") for name, kind, value in asked if value is not None
        ]
        if len(given) != 1:
            raise InvalidRequest(
                "`structured_outputs` takes one of `json`, `regex`, `choice`, `grammar` and `json_object`; "
                f"got {len(given)} of them",
                param="structured_outputs",
            )
        found += given
    if not found:
        return None
    if len(found) > 1:
        message = "`response_format` and `structured_outputs` both say what the answer is; send one of them"
        raise InvalidRequest(message, param="structured_outputs")
    for name, contradicts in (
        ("min_tokens", bool(body.min_tokens)),  # the answer may be complete before
        ("ignore_eos", bool(body.ignore_eos)),  # nothing may follow a complete answer
        ("max_tokens", not max_tokens),
    ):
        if contradicts:
            raise InvalidRequest(f"`{name}` contradicts `{found[0].param}`; leave it out", param=name)
    return found[0]


def _bias(raw: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in raw.items():
        if not key.isascii() or not key.isdigit() or len(key) > 12 or int(key) >= vocab_size:
            raise InvalidRequest(
                f"`logit_bias`: `{_short(key)}` is not a token id, 0 to {vocab_size - 1}", param="logit_bias"
            )
        if not -100 <= value <= 100:
            raise InvalidRequest(f"`logit_bias`: {value} is outside -100 to 100", param="logit_bias")
        bias[int(key)] = value
    return bias
