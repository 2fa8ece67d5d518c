"""What each route answers: the shape, the statuses, an example of asking and of being answered.

By the route's name in `routes.py`. A test compares these with what the routes really answer.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from serving.api import dialects, shapes
from serving.replies import WELCOME
from serving.routes import Route
from serving.wire import ANTHROPIC, OLLAMA, wire_of

OPEN = frozenset({"health", "ready"})  # asked without a key, and never limited
REASONS = {
    400: "The body, or a value in it, is wrong; the message names it.",
    401: "No API key, or one that is not known.",
    403: "This server does not allow it.",
    404: "There is no such model, adapter, response, file or batch.",
    408: "The body did not come in time.",
    409: "The model is in use.",
    413: "The body is over the limit, as it came or unpacked.",
    415: "The body is not JSON in UTF-8, or is packed in a way that is not taken.",
    429: "Over the requests or tokens per minute of this key.",
    431: "The headers are over 32 KiB.",
    500: "A bug of this server; `x-request-id` names the request.",
    503: "Not now: the queue is full, the model loads, or the server leaves.",
}


@dataclass(frozen=True)
class Answer:
    """shape: of the JSON of a 200; a text is the content type of what is none. piece: of a stream's events or lines."""

    shape: type[BaseModel] | str
    piece: type[BaseModel] | None = None
    also: tuple[int, ...] = ()  # statuses, beside those that every route of its kind has
    asked: dict[str, Any] | None = None  # an example of a body
    example: dict[str, Any] | None = None  # of what is answered
    query: dict[str, str] = field(default_factory=dict)  # parameters, and what each says
    form: dict[str, Any] | None = None  # the schema of a multipart form that is asked with
    unavailable: type[BaseModel] | None = None  # the shape of a 503, where it is not an error's


_MODEL = "mpt-tiny-chat"
_HI = [{"role": "user", "content": "Hi"}]
_HEAD = {"created": 1795221991, "model": _MODEL}
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 8,
    "total_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_RUNS = {"runs": "C (avx512_bf16)", "why_not_faster": None}
_CARD = {
    "id": _MODEL, "object": "model", "created": 1795221991, "owned_by": "mpt", "root": _MODEL, "parent": None,
    "max_model_len": 2048, "context_length": 2048, "prompt_style": "chatml", "licence": "Apache-2.0",
    "runs": {"backend": "torch", "device": "cpu", "precision": "bfloat16", "steps": {"steps of one token": _RUNS}},
    "state": "loaded",
}  # fmt: skip
_DETAILS = {
    "parent_model": "", "format": "safetensors", "family": "mpt", "families": ["mpt"], "parameter_size": "",
    "quantization_level": "bfloat16",
}  # fmt: skip
_TAG = {
    "name": _MODEL, "model": _MODEL, "modified_at": "2026-11-21T00:46:31Z", "size": 0, "digest": "",
    "details": _DETAILS,
}  # fmt: skip
_LAST_LINE = {
    "model": _MODEL, "created_at": "2026-11-21T00:46:31.250000Z", "done": True, "done_reason": "stop",
    "total_duration": 41000000, "load_duration": 0, "prompt_eval_count": 12, "prompt_eval_duration": 9000000,
    "eval_count": 8, "eval_duration": 32000000,
}  # fmt: skip
_TEXT = "Hello! Nice to meet you."
_PART = {"type": "output_text", "text": _TEXT, "annotations": [], "logprobs": []}
_RESPONSE = {
    "id": "resp_75acde", "object": "response", "created_at": 1795221991, "status": "completed", "background": False,
    "error": None, "incomplete_details": None, "instructions": None, "max_output_tokens": None, "metadata": {},
    "model": _MODEL,
    "output": [
        {"id": "msg_75acde_0", "type": "message", "role": "assistant", "status": "completed", "content": [_PART]}
    ],
    "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
    "store": True, "temperature": 0.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_p": 1.0, "truncation": "disabled",
    "usage": {
        "input_tokens": 12, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 20,
    },
}  # fmt: skip
_CHOSEN = {"logprobs": None, "finish_reason": "stop", "stop_reason": None}
_SAID = {"role": "assistant", "content": _TEXT, "refusal": None}

_KEPT = (403, 503)  # of the routes of files and batches
_PAGE = {"limit": "The most rows of an answer.", "after": "The `id` of the last row of the answer before."}
_FORM = {
    "type": "object", "required": ["file", "purpose"], "additionalProperties": False,
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}},
}  # fmt: skip

ANSWERS: dict[str, Answer] = {
    "completions": Answer(
        shapes.Completion, shapes.CompletionChunk,
        asked={"model": _MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0},
        example={
            "id": "cmpl-75acde", "object": "text_completion", **_HEAD,
            "choices": [{"index": 0, "text": " there was a little", **_CHOSEN}], "usage": _USAGE,
        },
    ),
    "chat_completions": Answer(
        shapes.ChatCompletion, shapes.ChatChunk,
        asked={"model": _MODEL, "messages": _HI, "max_tokens": 8, "temperature": 0},
        example={
            "id": "chatcmpl-75acde", "object": "chat.completion", **_HEAD,
            "choices": [{"index": 0, "message": _SAID, **_CHOSEN}], "usage": _USAGE,
        },
    ),
    "embeddings": Answer(
        shapes.Embeddings,
        asked={"model": _MODEL, "input": ["Hi", "Hello"]},
        example={
            "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}], "model": _MODEL,
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        },
    ),
    "responses": Answer(
        dialects.Response, dialects.ResponseEvent,
        asked={"model": _MODEL, "input": "Hi", "max_output_tokens": 8, "temperature": 0},
        example=_RESPONSE,
    ),
    "response": Answer(dialects.Response, also=(404,), example=_RESPONSE),
    "delete_response": Answer(
        dialects.DeletedResponse, also=(404,), example={"id": "resp_75acde", "object": "response", "deleted": True}
    ),
    "messages": Answer(
        dialects.AnthropicMessage, dialects.AnthropicEvent,
        asked={"model": _MODEL, "max_tokens": 8, "messages": _HI, "temperature": 0},
        example={
            "id": "msg_75acde", "type": "message", "role": "assistant", "model": _MODEL,
            "content": [{"type": "text", "text": _TEXT}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {
                "input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 8
            },
        },
    ),
    "count_tokens": Answer(
        dialects.TokenCount, asked={"model": _MODEL, "messages": _HI}, example={"input_tokens": 12}
    ),
    "ollama_chat": Answer(
        dialects.OllamaChat, dialects.OllamaChat,
        asked={"model": _MODEL, "messages": _HI, "stream": False, "options": {"num_predict": 8, "temperature": 0}},
        example={**_LAST_LINE, "message": {"role": "assistant", "content": _TEXT}},
    ),
    "ollama_generate": Answer(
        dialects.OllamaText, dialects.OllamaText,
        asked={"model": _MODEL, "prompt": "Hi", "stream": False, "options": {"num_predict": 8, "temperature": 0}},
        example={**_LAST_LINE, "response": _TEXT},
    ),
    "ollama_embed": Answer(
        dialects.OllamaEmbeddings,
        asked={"model": _MODEL, "input": "Hi"},
        example={"model": _MODEL, "embeddings": [[0.6, -0.8]], "prompt_eval_count": 1},
    ),
    "ollama_embeddings": Answer(
        dialects.OllamaEmbedding, asked={"model": _MODEL, "prompt": "Hi"}, example={"embedding": [0.6, -0.8]}
    ),
    "ollama_show": Answer(
        dialects.OllamaShown, also=(404, 503), asked={"model": _MODEL},
        example={
            "license": "Apache-2.0", "modelfile": "", "parameters": "", "template": "", "details": _DETAILS,
            "model_info": {"general.architecture": "mpt", "mpt.context_length": 2048},
            "capabilities": ["completion", "tools"], "modified_at": "2026-11-21T00:46:31Z",
        },
    ),
    "ollama_tags": Answer(dialects.OllamaModels, example={"models": [_TAG]}),
    "ollama_ps": Answer(
        dialects.OllamaModels, example={"models": [{**_TAG, "expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}]}
    ),
    "root": Answer(shapes.Welcome, example={"message": WELCOME}),
    "ollama_version": Answer(dialects.OllamaVersion, example={"version": "0.1.0"}),
    "tokenize": Answer(
        shapes.Tokens, asked={"model": _MODEL, "prompt": "Hi"},
        example={"tokens": [72, 105], "count": 2, "max_model_len": 2048},
    ),
    "detokenize": Answer(shapes.Text, asked={"model": _MODEL, "tokens": [72, 105]}, example={"prompt": "Hi"}),
    "tokenizer_info": Answer(
        shapes.TokenizerInfo, also=(400, 404, 503),
        query={"model": "The name of a served model; needed where there are several."},
    ),
    "load": Answer(shapes.Load, example={"server_load": 0}),
    "models": Answer(shapes.Models, example={"object": "list", "data": [_CARD]}),
    "model": Answer(shapes.Model, also=(404, 503), example=_CARD),
    "load_model": Answer(
        shapes.ModelState, also=(403, 404, 503), asked={"model": _MODEL},
        example={"id": _MODEL, "object": "model", "state": "loaded"},
    ),
    "unload_model": Answer(
        shapes.ModelState, also=(403, 404, 409, 503), asked={"model": _MODEL},
        example={"id": _MODEL, "object": "model", "state": "unloaded"},
    ),
    "load_lora_adapter": Answer(
        shapes.Loaded, also=(403, 404, 503), asked={"lora_name": f"{_MODEL}:mine", "lora_path": "mine"},
        example={"id": f"{_MODEL}:mine", "object": "model", "loaded": True},
    ),
    "unload_lora_adapter": Answer(
        shapes.Loaded, also=(403, 404, 503), asked={"lora_name": f"{_MODEL}:mine"},
        example={"id": f"{_MODEL}:mine", "object": "model", "loaded": False},
    ),
    "create_file": Answer(shapes.File, also=_KEPT, form=_FORM),
    "files": Answer(
        shapes.Files, also=(400, *_KEPT), query={**_PAGE, "purpose": "Only files for it.", "order": "`asc` or `desc`."}
    ),
    "file": Answer(shapes.File, also=(404, *_KEPT)),
    "delete_file": Answer(shapes.DeletedFile, also=(400, 404, *_KEPT)),
    "file_content": Answer("application/jsonl", also=(404, *_KEPT)),
    "create_batch": Answer(
        shapes.Batch, also=(404, *_KEPT),
        asked={"input_file_id": "file-75acde", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ),
    "batches": Answer(shapes.Batches, also=(400, *_KEPT), query=_PAGE),
    "batch": Answer(shapes.Batch, also=(404, *_KEPT)),
    "cancel_batch": Answer(shapes.Batch, also=(400, 404, *_KEPT)),
    "health": Answer(shapes.Health, also=(503,), example={"status": "ok"}, unavailable=shapes.Unhealthy),
    "ready": Answer(shapes.Ready, also=(503,), example={"status": "ready"}),
    "version": Answer(
        shapes.Versions,
        example={"version": "0.1.0", "commit": "unknown", "torch": "2.13.0", "transformers": "5.18.0"}
    ),
    "metrics": Answer("text/plain"),
}  # fmt: skip


def statuses_of(route: Route) -> list[int]:
    """The statuses of a route, beside 200, in order."""
    found = {431, 500, *ANSWERS[route.name].also}
    if route.name not in OPEN:
        found |= {401, 429}
    if route.body is not None or ANSWERS[route.name].form is not None:
        found |= {400, 408, 413, 415}
    if route.is_relayed:
        found |= {404, 503}
    return sorted(found)


def error_of(path: str) -> type[BaseModel]:
    """The shape of the errors of a path's API."""
    wire = wire_of(path)
    if wire is ANTHROPIC:
        return dialects.AnthropicError
    return dialects.OllamaError if wire is OLLAMA else shapes.OpenAIError
