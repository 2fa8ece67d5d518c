"""Anthropic's Messages API as a chat. Source: Anthropic's API reference, `POST /v1/messages`."""

import json
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from serving.dialects.translation import Chunks, Translation, given, with_usage
from serving.errors import InvalidRequest
from serving.protocol.body import Strict, Whole, translated
from serving.protocol.generation import ChatRequest
from serving.protocol.messages import TOOL_NAME, Lenient
from serving.wire import ANTHROPIC

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Turn(Lenient):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class AnthropicTool(Lenient):
    type: Literal["custom"] = "custom"
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(Lenient):
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Literal["high"] | None = None  # as much as it takes, which is Anthropic's default


class CountRequest(Strict):
    """What is counted: everything of a request that the model reads."""

    model: str
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1)]
    system: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True)] | None = None
    tool_choice: AnthropicChoice | None = None

    def as_fields(self) -> dict[str, Any]:
        """The same as fields of a ChatRequest. Raises InvalidRequest."""
        choice = self.tool_choice
        return given(
            model=self.model,
            messages=[*_system(self.system), *(m for n, turn in enumerate(self.messages) for m in _messages(n, turn))],
            tools=None if self.tools is None else [_tool(tool) for tool in self.tools],
            tool_choice=None if choice is None else _choice(choice),
            parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
            # An assistant's turn at the end is the beginning of the answer.
            continue_final_message=True if self.messages[-1].role == "assistant" else None,
        )

    def as_chat(self) -> ChatRequest:
        return translated(ChatRequest, self.as_fields())


class MessagesRequest(CountRequest):
    """Anthropic's request. `max_tokens` is required there."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    output_config: OutputConfig | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat. Raises InvalidRequest."""
        fields = self.as_fields() | given(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            stream=self.stream,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "answer", "schema": self.output_config.format.json_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return translated(ChatRequest, with_usage(fields))


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if system is None:
        return []
    text = system if isinstance(system, str) else "\n".join(_text(block, "system") for block in system)
    return [{"role": "system", "content": text}] if text else []


def _text(block: Any, where: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
        kind = str(block.get("type") if isinstance(block, dict) else None)[:40]
        message = f"`{where}`: MPT reads text only, and a block is of type `{kind}`; send blocks of type `text`"
        raise InvalidRequest(message, param=where)
    return str(block["text"])


def _messages(n: int, turn: Turn) -> list[dict[str, Any]]:
    """A turn as messages: its results of calls each, then what is said."""
    where = f"messages[{n}].content"
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in turn.content:
        kind = block.get("type")
        if kind == "tool_result" and turn.role == "user":
            results.append({"role": "tool", "content": _result(block, where), "tool_call_id": block.get("tool_use_id")})
        elif kind == "tool_use" and turn.role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):  # another model's thoughts
            texts.append(_text(block, where))
    said: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or calls or not results else results


def _result(block: dict[str, Any], where: str) -> str:
    content = block.get("content") or ""
    if not isinstance(content, str | list):
        raise InvalidRequest(f"`{where}`: the content of a tool_result is a text or blocks of text", param=where)
    text = content if isinstance(content, str) else "\n".join(_text(part, where) for part in content)
    return f"error: {text}" if block.get("is_error") else text


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = given(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return {"type": "function", "function": function}


def _choice(choice: AnthropicChoice) -> Any:
    if choice.type == "tool":
        if choice.name is None:
            where = "tool_choice.name"
            raise InvalidRequest(f"`{where}` is missing", code="missing_required_parameter", param=where)
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


class Messages(Translation):
    """The answer of a chat as Anthropic's."""

    wire, shortens = ANTHROPIC, True

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Anthropic's message."""
        choice = answer["choices"][0]
        message = choice["message"]
        content = [{"type": "text", "text": message["content"]}] if message["content"] else []
        for call in message.get("tool_calls", ()):
            content.append({**_block(call), "input": _input(call["function"]["arguments"])})
        stop = _stop(choice, bool(message.get("tool_calls")))
        return {**_head(answer), "content": content, **stop, "usage": _usage(answer["usage"])}

    async def events(self, chunks: Chunks) -> Chunks:
        """Anthropic's events: one block of text or of a call is open at a time."""
        index, kind = -1, ""
        usage: dict[str, Any] = {}
        stop: dict[str, Any] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                if index < 0 and not usage:
                    head = {**_head(chunk), "content": [], "stop_reason": None, "stop_sequence": None}
                    yield {"type": "message_start", "message": {**head, "usage": _usage(chunk["usage"])}}
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    for opened, delta in _deltas(choice["delta"]):
                        if opened is not None and (opened["type"] != "text" or kind != "text"):
                            if index >= 0:
                                yield {"type": "content_block_stop", "index": index}
                            index, kind = index + 1, opened["type"]
                            yield {"type": "content_block_start", "index": index, "content_block": opened}
                        if delta is not None:
                            yield {"type": "content_block_delta", "index": index, "delta": delta}
                    if choice["finish_reason"] is not None:
                        if index >= 0:
                            yield {"type": "content_block_stop", "index": index}
                        stop = _stop(choice, kind == "tool_use")
        yield {"type": "message_delta", "delta": stop, "usage": _usage(usage)}
        yield {"type": "message_stop"}


def _deltas(delta: dict[str, Any]) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """What a chat's delta opens, if it is not open, and what it adds."""
    if delta.get("content"):
        return [({"type": "text", "text": ""}, {"type": "text_delta", "text": delta["content"]})]
    found: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    for call in delta.get("tool_calls", ()):
        text = call["function"]["arguments"]
        opened = {**_block(call), "input": {}} if "id" in call else None
        found.append((opened, {"type": "input_json_delta", "partial_json": text} if text else None))
    return found


def _block(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}


def _input(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:  # the answer was cut
        return {}


def _head(answer: dict[str, Any]) -> dict[str, Any]:
    name = "msg_" + answer["id"].removeprefix("chatcmpl-")
    return {"id": name, "type": "message", "role": "assistant", "model": answer["model"]}


def _stop(choice: dict[str, Any], calls: bool) -> dict[str, Any]:
    said = choice.get("stop_reason")
    if isinstance(said, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": said}
    reason = "tool_use" if calls and choice["finish_reason"] == "stop" else _STOP_REASONS[choice["finish_reason"]]
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Anthropic counts apart what was read from a cache."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
