"""The messages of a chat, and the functions that a model may call in it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mpt.prompts import Message
from mpt.tools import Call, Tool, ToolUse
from serving.errors import InvalidRequest
from serving.protocol.body import NoNulls, Strict

TOOL_NAME = r"^[A-Za-z0-9_.-]{1,64}$"  # OpenAI's, and the dots of others
_MAX_TOOLS = 128  # OpenAI's


class Lenient(NoNulls):
    """Unknown fields are allowed: clients send back what other servers gave them, and declare more than is read."""

    model_config = ConfigDict(strict=True)


def _text_of(content: Any) -> Any:
    """The text of a content that comes in parts."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind in ("text", "refusal", "input_text", "output_text") and isinstance(text, str):
            texts.append(text)
        elif kind is None or kind in ("text", "refusal", "input_text", "output_text"):
            raise PydanticCustomError("part_type", 'part {n} must be {{"type": "text", "text": "..."}}', {"n": n})
        else:
            raise PydanticCustomError(
                "part_kind",
                "part {n} is `{kind}`, and MPT reads text only; send parts of type `text`",
                {"n": n, "kind": str(kind)[:40]},
            )
    return "".join(texts)


Text = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | list[dict[str, Any]])]


class FunctionCall(Lenient):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: str = "{}"


class ToolCall(Lenient):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def as_call(self) -> Call:
        return Call(self.id, self.function.name, self.function.arguments)


class ChatMessage(Lenient):
    """A turn. An assistant's may have `tool_calls` in place of content; a tool's content is the result of one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        return self.content or ""

    def as_message(self) -> Message:
        message = Message(role=self.role, content=self.text())
        if self.role == "assistant" and self.tool_calls:
            message["calls"] = tuple(call.as_call() for call in self.tool_calls)
        if self.role == "tool" and self.tool_call_id:
            message["call_id"] = self.tool_call_id
        return message


def check_messages(messages: list[ChatMessage]) -> None:
    """Raises InvalidRequest for a message that says nothing."""
    for n, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            where = f"messages[{n}].content"
            raise InvalidRequest(f"`{where}` is missing", code="missing_required_parameter", param=where)
        if message.tool_calls and message.role != "assistant":
            where = f"messages[{n}].tool_calls"
            raise InvalidRequest(f"`{where}`: the assistant calls tools, and this is the {message.role}", param=where)


class FunctionDeclaration(Lenient):
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDeclaration(Lenient):
    type: Literal["function"]
    function: FunctionDeclaration

    def as_tool(self) -> Tool:
        declared = self.function
        given = {} if declared.parameters is None else {"parameters": declared.parameters}
        return Tool(declared.name, declared.description or "", strict=bool(declared.strict), **given)


class NamedFunction(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1)]


class ToolChoice(Strict):
    """A function that must be called, or the ones that may be."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


def tool_use_of(
    tools: list[ToolDeclaration] | None,
    choice: ToolChoice | Literal["none", "auto", "required"] | None,
    is_parallel: bool | None,
) -> ToolUse | None:
    """What a request says of tools; None where the model is told of none. Raises InvalidRequest."""
    declared = tuple(tool.as_tool() for tool in tools or ())
    names = [tool.name for tool in declared]
    if len(declared) > _MAX_TOOLS:
        raise InvalidRequest(f"`tools` has {len(declared)} functions, at most {_MAX_TOOLS}; send fewer", param="tools")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"`tools` has `{twice}` twice; give each function a name of its own", param="tools")
    if not declared and choice not in (None, "none", "auto"):
        raise InvalidRequest("`tool_choice` asks for a call, and there are no `tools`; send some", param="tool_choice")
    if not declared or choice == "none":
        return None
    must_call, allowed = choice == "required", None
    if isinstance(choice, ToolChoice):
        must_call, wanted = _chosen(choice)
        if unknown := next((name for name in wanted if name not in names), None):
            known = ", ".join(f"`{name}`" for name in names[:20])
            message = f"`tool_choice` names `{unknown[:64]}`, which is none of `tools`: {known}"
            raise InvalidRequest(message, param="tool_choice")
        allowed = frozenset(wanted)
    is_one = isinstance(choice, ToolChoice) and choice.type == "function"
    return ToolUse(declared, must_call, is_one, allowed, is_parallel=is_parallel is not False and not is_one)


def _chosen(choice: ToolChoice) -> tuple[bool, list[str]]:
    """Whether a call must come, and to which functions."""
    if choice.type == "function" and choice.function is not None:
        return True, [choice.function.name]
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        return allowed.mode == "required", [tool.function.name for tool in allowed.tools]
    where = f"tool_choice.{choice.type}"
    raise InvalidRequest(f"`{where}` is missing", code="missing_required_parameter", param=where)
