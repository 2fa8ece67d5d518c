"""The shapes of answers, as in `shapes.py`, of OpenAI's Responses API, of Anthropic's API and of Ollama's."""

from typing import Any, Literal

from pydantic import BaseModel

from serving.api.shapes import Cached, Shape, TokenLogprob

# -- OpenAI's Responses API ------------------------------------------------------------------------------------------


class OutputText(Shape):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Shape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputText]


class OutputCall(Shape):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


class ResponseError(Shape):
    code: str
    message: str


class Incomplete(Shape):
    reason: Literal["max_output_tokens"]


class ReasoningTokens(Shape):
    reasoning_tokens: int


class ResponseUsage(Shape):
    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Response(Shape):
    """OpenAI's `response`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """An event of a streamed response; `type` says which, and what else it has."""

    type: str
    sequence_number: int


class DeletedResponse(Shape):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


# -- Anthropic's -----------------------------------------------------------------------------------------------------


class TextBlock(Shape):
    type: Literal["text"]
    text: str


class ToolUseBlock(Shape):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(Shape):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(Shape):
    """Anthropic's `message`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicEvent(BaseModel):
    """An event of a streamed message; `type` says which, and what else it has."""

    type: str


class TokenCount(Shape):
    input_tokens: int


class AnthropicProblem(Shape):
    type: str
    message: str


class AnthropicError(Shape):
    """What Anthropic's routes answer when they cannot."""

    type: Literal["error"]
    error: AnthropicProblem


# -- Ollama's --------------------------------------------------------------------------------------------------------


class OllamaCalled(Shape):
    name: str
    arguments: dict[str, Any]


class OllamaToolCall(Shape):
    function: OllamaCalled


class OllamaSaid(Shape):
    role: Literal["assistant"]
    content: str
    tool_calls: list[OllamaToolCall] | None = None


class _OllamaLine(Shape):
    """A line of a stream, or the whole answer; the last line has what it took, durations in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaChat(_OllamaLine):
    message: OllamaSaid


class OllamaText(_OllamaLine):
    response: str


class OllamaEmbeddings(Shape):
    model: str
    embeddings: list[list[float]]
    prompt_eval_count: int


class OllamaEmbedding(Shape):
    embedding: list[float]


class OllamaDetails(Shape):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Shape):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    expires_at: str | None = None
    size_vram: int | None = None


class OllamaModels(Shape):
    models: list[OllamaModel]


class OllamaShown(Shape):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(Shape):
    version: str


class OllamaError(Shape):
    """What Ollama's routes answer when they cannot."""

    error: str
