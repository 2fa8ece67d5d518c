"""OpenAI's Responses API as a chat. Source: OpenAI's API reference, `POST /v1/responses`."""

import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from serving.dialects.translation import Chunks, Translation, given, with_usage
from serving.errors import ApiError, InternalError, InvalidRequest
from serving.protocol.body import Strict, Whole, few, translated
from serving.protocol.generation import MAX_TOP_LOGPROBS, ChatRequest, drawn_fields
from serving.protocol.messages import TOOL_NAME, Lenient
from serving.wire import RESPONSES

_LOGPROBS = "message.output_text.logprobs"
_NOTHING_TO_INCLUDE = {"reasoning.encrypted_content"}  # these models do not reason
_THOUGHTS = {"reasoning", "compaction"}  # another model's, which are no part of a prompt here
_HOSTED = "`{0}`: there are no tools of type `{1}` here; declare functions, and run them yourself"

_NAMES = {  # ours, and what they are called here
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


class ResponsesTool(Lenient):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class StreamShape(Strict):
    include_obfuscation: bool = False


class _Given(Strict):
    model: str
    input: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    stream_options: StreamShape | None = None
    text: TextOptions | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    metadata: Annotated[dict[str, str], few(64)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None  # ours, with those of `Sampling`


_Drawn: Any = create_model("_Drawn", __base__=_Given, **drawn_fields())


class ResponsesRequest(_Drawn):
    """The answer is kept for `previous_response_id` unless `store` is false."""

    def as_chat(self, before: list[dict[str, Any]] | None = None) -> ChatRequest:
        """The same as a chat. before: the messages of the previous response. Raises InvalidRequest."""
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields: dict[str, Any] = {name: getattr(self, name) for name in drawn_fields()} | {
            "model": self.model,
            "messages": [*instructions, *(before or []), *self.messages()],
            "max_completion_tokens": self.max_output_tokens,
            "stream": self.stream,
            "stop": self.stop,
            "tools": self._tools(),
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "chat_template_kwargs": self.chat_template_kwargs,
            "logprobs": self._logprobs(),
            "top_logprobs": self.top_logprobs if self._logprobs() else None,
        }
        return translated(ChatRequest, with_usage(fields), _NAMES)

    def messages(self) -> list[dict[str, Any]]:
        """Its input as a chat's messages. Raises InvalidRequest."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not self.input:
            raise InvalidRequest("`input` is empty; send a text or at least one message", param="input")
        messages: list[dict[str, Any]] = []
        for n, item in enumerate(self.input):
            _add_item(messages, item, f"input[{n}]")
        return messages

    def _tools(self) -> list[dict[str, Any]] | None:
        tools = []
        for n, tool in enumerate(self.tools or ()):
            where = f"tools[{n}]"
            if tool.get("type") != "function":
                raise InvalidRequest(
                    _HOSTED.format(where, str(tool.get("type"))[:40]), code="unsupported_value", param=where
                )
            function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
            tools.append({"type": "function", "function": function})
        return tools or None

    def _choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") == "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        if choice.get("type") == "allowed_tools":
            tools = [{"type": "function", "function": {"name": each.get("name")}} for each in choice.get("tools", [])]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
        kind = str(choice.get("type"))[:40]
        raise InvalidRequest(_HOSTED.format("tool_choice", kind), code="unsupported_value", param="tool_choice")

    def _format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.type != "json_schema":
            return None if form is None else {"type": form.type}
        schema = given(name=form.name or "answer", schema=form.json_schema)
        return {"type": "json_schema", "json_schema": schema}

    def _logprobs(self) -> bool:
        for name in self.include or ():
            if name != _LOGPROBS and name not in _NOTHING_TO_INCLUDE:
                message = f"`include`: `{name[:60]}` is nothing an answer has here; `{_LOGPROBS}` is"
                raise InvalidRequest(message, code="unsupported_value", param="include")
        return _LOGPROBS in (self.include or ())


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Add one item of an input to the messages of a chat."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":  # items of one answer are one message
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
    elif kind not in _THOUGHTS:
        message = f"`{where}`: items of type `{str(kind)[:40]}` are not supported; send messages and function calls"
        raise InvalidRequest(message, code="unsupported_value", param=where)


@dataclass
class Responses(Translation):
    """The answer of a chat as a response, whole or in events."""

    asked: ResponsesRequest
    id: str
    is_stored: bool
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)  # the items of the answer, as they come
    wire, names = RESPONSES, _NAMES

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The response of a whole answer."""
        choice = answer["choices"][0]
        message = choice["message"]
        if message["content"] or not message.get("tool_calls"):
            logprobs = (choice["logprobs"] or {}).get("content", [])
            self.output.append(self._text_item(message["content"] or "", logprobs))
        self.output += [self._call_item(call) for call in message.get("tool_calls", ())]
        return self._response(_status(choice["finish_reason"]), answer["usage"])

    def said(self) -> list[dict[str, Any]]:
        """The answer as a chat's messages, for the conversation that goes on."""
        messages: list[dict[str, Any]] = []
        for item in self.output:
            _add_item(messages, item, "output")
        return messages

    async def events(self, chunks: Chunks) -> Chunks:
        """OpenAI's events, each with its number; the last one says how it ended."""
        n = 0
        async with aclosing(self._events(chunks)) as events:
            async for event in events:
                yield {**event, "sequence_number": n}
                n += 1

    async def _events(self, chunks: Chunks) -> Chunks:
        usage: dict[str, Any] | None = None
        reason = "stop"
        yield {"type": "response.created", "response": self._response("in_progress")}
        yield {"type": "response.in_progress", "response": self._response("in_progress")}
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        logprobs = (choice.get("logprobs") or {}).get("content", [])
                        for event in self._grown(choice["delta"], logprobs):
                            yield event
                        reason = choice["finish_reason"] or reason
        except ApiError as error:
            yield self._failed(error)
            return
        if not self.output:
            for event in self._begun(self._text_item("", [])):
                yield event
        for event in self._done():
            yield event
        status = _status(reason)
        yield {"type": f"response.{status}", "response": self._response(status, usage)}

    def _failed(self, error: ApiError) -> dict[str, Any]:
        code = "server_error" if isinstance(error, InternalError) else error.code
        return {
            "type": "response.failed",
            "response": {**self._response("failed"), "error": {"code": code, "message": str(error)}},
        }

    def _grown(self, delta: dict[str, Any], logprobs: list[Any]) -> list[dict[str, Any]]:
        """The events of one delta of a chat."""
        events: list[dict[str, Any]] = []
        if text := delta.get("content"):
            if not self.output or self.output[-1]["type"] != "message":
                events += [*self._done(), *self._begun(self._text_item("", []))]
            item, at = self.output[-1], len(self.output) - 1
            part = item["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            events.append(
                {
                    "type": "response.output_text.delta", "item_id": item["id"], "output_index": at,
                    "content_index": 0, "delta": text, "logprobs": logprobs,
                }
            )  # fmt: skip
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                events += [*self._done(), *self._begun(self._call_item(call))]
            if more := call["function"]["arguments"]:
                item, at = self.output[-1], len(self.output) - 1
                item["arguments"] += more
                kind = "response.function_call_arguments.delta"
                events.append({"type": kind, "item_id": item["id"], "output_index": at, "delta": more})
        return events

    def _begun(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        item["status"] = "in_progress"
        self.output.append(item)
        at = len(self.output) - 1
        shown = {**item, "content": []} if item["type"] == "message" else dict(item)
        events: list[dict[str, Any]] = [{"type": "response.output_item.added", "output_index": at, "item": shown}]
        if item["type"] == "message":
            part = dict(item["content"][0])
            kind = "response.content_part.added"
            events.append({"type": kind, "item_id": item["id"], "output_index": at, "content_index": 0, "part": part})
        return events

    def _done(self) -> list[dict[str, Any]]:
        """The events that close the item that is open."""
        if not self.output or self.output[-1]["status"] != "in_progress":
            return []
        item, at = self.output[-1], len(self.output) - 1
        item["status"] = "completed"
        place = {"item_id": item["id"], "output_index": at}
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            events = [{"type": "response.function_call_arguments.done", **place, **whole}]
        else:
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [{"type": "response.output_text.done", **place, "content_index": 0, **text}]
            events.append({"type": "response.content_part.done", **place, "content_index": 0, "part": part})
        return [*events, {"type": "response.output_item.done", "output_index": at, "item": item}]

    def _text_item(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
        name = f"msg_{self.id}_{len(self.output)}"
        return {"id": name, "type": "message", "role": "assistant", "status": "completed", "content": [part]}

    def _call_item(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {
            "id": f"fc_{call['id'].removeprefix('call_')}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": function["name"],
            "arguments": function["arguments"],
        }

    def _response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        asked = self.asked
        form = asked.text.format if asked.text is not None else None
        shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": [dict(item) for item in self.output] if status != "in_progress" else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self.is_stored,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": shown},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


def _status(reason: str) -> str:
    return "incomplete" if reason == "length" else "completed"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
