"""The bodies of completions, chat and embeddings.

Sources: OpenAI's API reference; vLLM's names for the extensions that clients send.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from mpt.engine.request import Sampling
from mpt.tools import ToolUse
from serving.protocol.body import WHOLE, Strict, Whole, accept_defaults_of, short
from serving.protocol.messages import ChatMessage, ToolChoice, ToolDeclaration, tool_use_of
from serving.protocol.structure import ResponseFormat, StructuredOutputs

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_SAMPLES = 128  # n, of OpenAI
MAX_BEST_OF = 20  # OpenAI's
MAX_TOP_LOGPROBS = 20
MAX_TOKEN_IDS = 1024  # of one list of them
ALL_THERE_IS = -1  # max_tokens: up to the end of the context


def _of_numbers(bias: Any) -> Any:
    """Tells of one wrong value, where pydantic would tell of all: there may be as many as tokens."""
    for name, value in bias.items() if isinstance(bias, dict) else ():
        if not isinstance(value, int | float) or isinstance(value, bool):
            told = {"name": short(name), "value": short(value)}
            raise PydanticCustomError("number_type", "the value of `{name}` should be a number, not {value}", told)
    return bias


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_progress: bool = False  # ours: how far the prompt has been read
    include_obfuscation: bool = False  # padding against traffic analysis; none is added here


def drawn_fields() -> dict[str, Any]:
    """The fields of a body that `Sampling` declares, for pydantic's `create_model`; each is null for its default."""
    hints = get_type_hints(Sampling)
    found = {each.name: each for each in fields(Sampling) if "http" in each.metadata}

    def typed(name: str) -> Any:
        whole = [WHOLE] if hints[name] in (int, int | None) else []
        return Annotated[(hints[name], Field(**found[name].metadata["http"]), *whole)]

    return {name: (typed(name) | None, each.default) for name, each in found.items()}


class _Given(Strict):
    """What a body says beside the fields of `Sampling`, or in other words than it."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_SAMPLES)] = 1
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_of_numbers)] | None = None
    stop_token_ids: Annotated[list[Whole], Field(fail_fast=True, max_length=64)] | None = None
    allowed_token_ids: Annotated[list[Whole], Field(fail_fast=True, min_length=1)] | None = None
    logprob_token_ids: Annotated[list[Whole], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    use_beam_search: bool = False
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    add_special_tokens: bool | None = None  # no tokenizer of an MPT adds any by itself


_DEFAULTS = {name: default for name, (_, default) in drawn_fields().items()}
_Generation: Any = create_model("_Generation", __base__=_Given, **drawn_fields())


def declared_of(body: Any) -> dict[str, Any]:
    """The fields that `Sampling` declares, as a body gives them; those that are null take their defaults."""
    given = {name: getattr(body, name) for name in _DEFAULTS}
    return {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}


class CompletionRequest(_Generation):
    prompt: Any  # a union pydantic would explain badly: see `prompts_of`
    max_tokens: Annotated[Whole, Field(ge=ALL_THERE_IS)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=MAX_SAMPLES)] | None = None
    echo: bool = False
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    parse_special: bool = True  # llama.cpp's: control tokens spelled in the prompt are control tokens


class EmbeddingRequest(Strict):
    """Texts or token ids; each becomes a vector of d_model numbers and length 1."""

    model: str
    input: Any  # as a completion's prompt: see `prompts_of`
    encoding_format: Literal["float", "base64"] = "float"
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"


class ChatRequest(_Generation):
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[Whole, Field(ge=ALL_THERE_IS)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=ALL_THERE_IS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolDeclaration], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    echo: bool = False  # the answer begins with what the last message says
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def tool_use(self) -> ToolUse | None:
        """What it says of tools. Raises InvalidRequest."""
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def wanted_tokens(self) -> int | None:
        """The limit of the answer, None for none."""
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if wanted == ALL_THERE_IS else wanted


accept_defaults_of(CompletionRequest, ChatRequest)
