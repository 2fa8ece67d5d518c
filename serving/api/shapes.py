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


State = Literal["loaded", "loading", "unloaded", "failed"]


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
    state: State | None = None  # in one process; a cluster's replicas come and go by themselves
    reason: str | None = None  # why it is `failed`


class ModelState(Shape):
    id: str
    object: Literal["model"]
    state: State


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


class Welcome(Shape):
    message: str


class Load(Shape):
    server_load: int


class Loaded(Shape):
    id: str
    object: Literal["model"]
    loaded: bool


class Places(Shape):
    """How many connections are open, and may be."""

    open: int
    limit: int


class Health(Shape):
    """connections: where all that may be are open."""

    status: Literal["ok"]
    connections: Places | None = None


class Unhealthy(Shape):
    """models: those whose engines have stopped for good."""

    status: Literal["loading", "shutting down", "failed"]
    models: list[str] | None = None
    connections: Places | None = None


class Ready(Shape):
    status: Literal["ready"]


class Versions(Shape):
    version: str
    commit: str
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


# -- files and batches -----------------------------------------------------------------------------------------------


class File(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    expires_at: int | None
    status_details: str | None


class Files(Shape):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Shape):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Counts(Shape):
    total: int
    completed: int
    failed: int


class Batch(Shape):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    metadata: dict[str, str] | None


class Batches(Shape):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
