"""Ollama's chat, generate and embed as chats, completions and embeddings. Source: Ollama's `docs/api.md`.

Streams are lines of JSON. A stream is what a client gets that does not say otherwise. A request without a prompt or
messages asks for a model to be loaded, or with `keep_alive: 0` to be unloaded. How long a model stays is the server's
to say.
"""

import json
from collections.abc import Mapping
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from serving.dialects.translation import Chunks, Translation, given, with_usage
from serving.errors import InvalidRequest
from serving.protocol.body import NoNulls, Strict, Whole, translated
from serving.protocol.generation import ChatRequest, CompletionRequest, EmbeddingRequest
from serving.protocol.messages import Lenient, ToolDeclaration
from serving.wire import OLLAMA

if TYPE_CHECKING:  # it needs torch, which a cluster's routers do without
    from serving.jobs import Job

LATEST = ":latest"
_NEVER = "9999-12-31T23:59:59Z"

_NAMES = {  # ours, and what they are called here
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "repetition_penalty": "options.repeat_penalty",
}


class Options(Strict):
    """Sampling. Sizes of caches and batches are the server's: a model is loaded once, for everybody."""

    num_predict: Annotated[Whole, Field(ge=-2)] | None = None  # -1 and -2: no limit
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Whole | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    num_ctx: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    num_keep: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    numa: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Literal[False] = False
    embedding_only: Literal[False] = False
    repeat_last_n: Any = None
    penalize_newline: Any = None
    typical_p: Annotated[float, Field(ge=1, le=1)] | None = None
    tfs_z: Annotated[float, Field(ge=1, le=1)] | None = None
    mirostat: Annotated[Whole, Field(ge=0, le=0)] | None = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None

    def as_fields(self) -> dict[str, Any]:
        """The same under our names."""
        limit = self.num_predict
        return given(
            max_tokens=None if limit is None else max(limit, -1) or 1,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class OllamaFunction(Lenient):
    name: str
    arguments: dict[str, Any]


class OllamaCall(Lenient):
    function: OllamaFunction


def _no_images(given: list[Any]) -> list[Any]:
    if given:
        raise PydanticCustomError("images", "there are images, and MPT reads text only; leave them out")
    return given


NoImages = Annotated[list[Any], AfterValidator(_no_images), Field(json_schema_extra={"maxItems": 0})]


class OllamaMessage(Lenient):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: NoImages | None = None
    tool_calls: Annotated[list[OllamaCall], Field(fail_fast=True)] | None = None

    def as_message(self) -> dict[str, Any]:
        calls = [
            {"function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}}
            for call in self.tool_calls or ()
        ]
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        return message | ({"tool_calls": calls} if calls else {})


class _Asked(Strict):
    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: Any = None  # the server's to say (`--idle-unload`); told back where a request asks for nothing else

    def model_name(self) -> str:
        return self.model.removesuffix(LATEST)

    def shared_fields(self) -> dict[str, Any]:
        fields = {"model": self.model_name(), "stream": self.stream}
        fields |= {} if self.options is None else self.options.as_fields()
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": self.format}}
        return fields


class OllamaChatRequest(_Asked):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True, default_factory=list)]
    tools: Annotated[list[ToolDeclaration], Field(fail_fast=True)] | None = None

    def as_chat(self) -> ChatRequest:
        messages = [message.as_message() for message in self.messages] or [{"role": "user", "content": ""}]
        fields = {**self.shared_fields(), "messages": messages} | ({"tools": self.tools} if self.tools else {})
        return translated(ChatRequest, with_usage(fields), _NAMES)


class GenerateRequest(_Asked):
    """`POST /api/generate`. `raw`: the prompt is the whole prompt; else it is put into the model's own format."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: Annotated[str, Field(max_length=0)] | None = None
    template: Annotated[str, Field(max_length=0)] | None = None
    images: NoImages | None = None
    context: Annotated[list[Any], Field(max_length=0)] | None = None

    def as_chat(self) -> ChatRequest:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt}]
        return translated(ChatRequest, with_usage({**self.shared_fields(), "messages": messages}), _NAMES)

    def as_completion(self) -> CompletionRequest:
        """The same for a text that is continued as it is. Raises InvalidRequest for a system message."""
        if self.system:
            message = "`system` needs a model with a chat format, and no `raw: true`; write it into the prompt"
            raise InvalidRequest(message, param="system")
        fields = {"max_tokens": -1, **self.shared_fields(), "prompt": self.prompt}
        return translated(CompletionRequest, with_usage(fields), _NAMES)


class EmbedRequest(Strict):
    """`POST /api/embed`."""

    model: str
    input: str | Annotated[list[str], Field(fail_fast=True)]
    truncate: bool = True
    options: Options | None = None  # of sampling, which vectors are not, and of caches

    def as_embedding(self) -> EmbeddingRequest:
        """The same as OpenAI's. What is too long loses its end, as with Ollama, unless `truncate` is false."""
        limit = -1 if self.truncate else None
        name = self.model.removesuffix(LATEST)
        return EmbeddingRequest(model=name, input=self.input, truncate_prompt_tokens=limit, truncation_side="right")


class OldEmbedRequest(Strict):
    """`POST /api/embeddings`, which `/api/embed` has replaced: one text, one vector."""

    model: str
    prompt: str
    options: Options | None = None

    def as_embedding(self) -> EmbeddingRequest:
        return EmbedRequest(model=self.model, input=self.prompt).as_embedding()


class ShowRequest(NoNulls):
    """`POST /api/show`. `name` is what `model` was called."""

    model: str | None = None
    name: str | None = None
    verbose: bool = False

    def model_name(self) -> str:
        """Raises InvalidRequest where none is given."""
        name = self.model or self.name
        if name is None:
            raise InvalidRequest("`model` is missing", code="missing_required_parameter", param="model")
        return name.removesuffix(LATEST)


class Ollama(Translation):
    """The answer of a chat or of a completion as Ollama's."""

    wire, shortens, names = OLLAMA, True, _NAMES

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._model, self._is_chat = model, is_chat
        self._job: Job | None = None

    def begin(self, job: "Job") -> None:
        self._job = job

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        message = choice.get("message", {})
        calls = [_whole_call(call) for call in message.get("tool_calls", ())]
        text = choice["text"] if "text" in choice else message["content"] or ""
        return {**self.line(text, calls), **self._end(choice["finish_reason"], answer["usage"])}

    async def events(self, chunks: Chunks) -> Chunks:
        """A line for each piece of text; calls are told whole, with the last line."""
        reason, usage = "stop", dict[str, Any]()
        calls: list[dict[str, Any]] = []
        async with aclosing(chunks):
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    delta = choice.get("delta", choice)
                    for call in delta.get("tool_calls", ()):
                        if "id" in call:
                            calls.append(call)
                        else:
                            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
                    if text := delta.get("text") or delta.get("content"):
                        yield self.line(text, [])
                    reason = choice["finish_reason"] or reason
        yield {**self.line("", [_whole_call(call) for call in calls]), **self._end(reason, usage)}

    def line(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """A piece of the answer."""
        head = {"model": self._model, "created_at": now()}
        if not self._is_chat:
            return {**head, "response": text, "done": False}
        message = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
        return {**head, "message": message, "done": False}

    def _end(self, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Durations in nanoseconds, as the engine took the times."""
        assert self._job is not None
        first = self._job.ttft_s or 0.0
        return {
            "done": True,
            "done_reason": "length" if reason == "length" else "stop",
            "total_duration": round(1e9 * (first + self._job.decode_s)),
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": round(1e9 * (first - (self._job.queue_s or 0.0))),
            "eval_count": usage["completion_tokens"],
            "eval_duration": round(1e9 * self._job.decode_s),
        }


def is_forgetting(keep_alive: Any) -> bool:
    """Whether a request without a text asks for its model to be unloaded, not loaded."""
    return str(keep_alive).strip("smh") in ("0", "0.0")


def did(reason: str, model: str, *, is_chat: bool) -> dict[str, Any]:
    """The answer to a request without a text. reason: `load`, `unload`, or `stop` where nothing was done."""
    return {**Ollama(model, is_chat=is_chat).line("", []), "done": True, "done_reason": reason}


def _whole_call(call: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:  # the answer was cut
        arguments = {}
    return {"function": {"name": call["function"]["name"], "arguments": arguments}}


def tags(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """`GET /api/tags`, of the entries of /v1/models."""
    return {"models": [_tag(card) for card in cards]}


def running(
    cards: list[dict[str, Any]], idle_s_left: Mapping[str, float | None] = MappingProxyType({})
) -> dict[str, Any]:
    """`GET /api/ps`, of the entries of the models that are loaded.

    idle_s_left: how soon each of them, by its name, is unloaded if nobody asks for it; None, or absent, for never.
    """
    found = []
    for card in cards:
        left_s = idle_s_left.get(card["parent"] or card["id"])
        expires = _NEVER if left_s is None else _written(datetime.now(UTC) + timedelta(seconds=left_s))
        found.append({**_tag(card), "expires_at": expires, "size_vram": 0})
    return {"models": found}


def _tag(card: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": card["id"],
        "model": card["id"],
        "modified_at": _written(datetime.fromtimestamp(card["created"], UTC)),
        "size": 0,
        "digest": "",
        "details": _details(card),
    }


def _details(card: dict[str, Any]) -> dict[str, Any]:
    precision = (card.get("runs") or {}).get("precision", "")
    return {
        "parent_model": card.get("parent") or "",
        "format": "safetensors",
        "family": "mpt",
        "families": ["mpt"],
        "parameter_size": "",
        "quantization_level": precision,
    }


def shown(card: dict[str, Any]) -> dict[str, Any]:
    """`POST /api/show`, of an entry of /v1/models."""
    chats = card["prompt_style"] != "none"
    return {
        "license": card["licence"],
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(card),
        "model_info": {"general.architecture": "mpt", "mpt.context_length": card["context_length"]},
        "capabilities": ["completion", *(["tools"] if chats else [])],
        "modified_at": _tag(card)["modified_at"],
    }


def now() -> str:
    """As Ollama writes times."""
    return _written(datetime.now(UTC))


def _written(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
