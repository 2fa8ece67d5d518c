"""The shapes of answers, as pydantic models, for the OpenAPI document and the tests that compare them with answers.

Answers are made as plain dicts, where speed counts (`answers.py`, `dialects/`). A field that is not named here is not
allowed, so an answer that grows one fails a test until it is described.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cached(Shape):
    cached_tokens: int


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class Scored(Shape):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, Scored] | None]


class TextLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["TokenLogprob"] = []


class ChatLogprobs(Shape):
    content: list[TokenLogprob]
    refusal: None


Reason = Literal["stop", "length"]


class TextChoice(Shape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Progress(Shape):
    """How far the prompts have been read."""

    total: int
    processed: int
    cached: int
    time_ms: int


class _Answer(Shape):
    id: str
    created: int
    model: str


class Completion(_Answer):
    """OpenAI's `text_completion`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(_Answer):
    """A piece of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None
    prompt_progress: Progress | None = None


class Function(Shape):
    name: str
    arguments: str


class Call(Shape):
    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Call] | None = None


class ChatChoice(Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason | Literal["tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(_Answer):
    """OpenAI's `chat.completion`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionPiece(Shape):
    name: str | None = None
    arguments: str


class CallPiece(Shape):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece


class Delta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPiece] | None = None


class DeltaChoice(Shape):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | Literal["tool_calls"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Answer):
    """A piece of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[DeltaChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_progress: Progress | None = None


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="numbers, or base64 of little-endian float32")]


class PromptUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Shape):
    """One vector for each text."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Step(Shape):
    runs: str
    why_not_faster: str | None


class Runs(Shape):
    """What computes a model, and why nothing faster does."""

    backend: str
    device: str
    precision: str
    steps: dict[str, Step]


class Model(Shape):
    """A model, or an adapter on one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    context_length: int
    prompt_style: Literal["none", "instruct", "chatml", "template"]
    licence: str
    runs: Runs | None


class Models(Shape):
    object: Literal["list"]
    data: list[Model]


class Tokens(Shape):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(Shape):
    prompt: str


class AddedToken(Shape):
    content: str
    special: bool


class TokenizerInfo(Shape):
    """What transformers' tokenizer_config.json says."""

    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    eos_token: str
    pad_token: str
    added_tokens_decoder: dict[str, AddedToken]
    chat_template: str | None


class Load(Shape):
    server_load: int


class Loaded(Shape):
    id: str
    object: Literal["model"]
    loaded: bool


class Health(Shape):
    status: Literal["ok"]


class Failed(Shape):
    """The engines of these models have stopped for good."""

    status: Literal["failed"]
    models: list[str]


class Ready(Shape):
    status: Literal["ready"]


class Versions(Shape):
    version: str
    torch: str
    transformers: str


class Error(Shape):
    message: str
    type: str
    param: str | None
    code: str
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class OpenAIError(Shape):
    """What OpenAI's routes, and those of no other API, answer when they cannot."""

    error: Error


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
