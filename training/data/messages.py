"""Turns of conversations as people keep them: OpenAI's, ShareGPT's, with tools, in parts, several of one speaker.

Each becomes a `Message` of `mpt/prompts.py`, as the server makes them of a request.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpt.errors import UserError
from mpt.prompts import Message
from mpt.tools import Call, Tool

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "function_response": "tool",
    "function-response": "tool",
}  # fmt: skip
_CALLS = {"function_call", "function-call", "tool_call"}  # turns of ShareGPT's form that are nothing but calls
_BETWEEN = "\n\n"  # joins what one says in several turns


class Conversation(NamedTuple):
    """What was said, with the functions that were declared. unlearned: messages of the assistant's, by their place
    among these, that the row marks as not to be learned."""

    messages: list[Message]
    tools: tuple[Tool, ...] = ()
    unlearned: frozenset[int] = frozenset()


def read(turns: Sequence[Any], tools: Any = None, system: Any = None, *, is_trimmed: bool = False) -> Conversation:
    """A conversation of a row, checked. system: what the row says beside its turns.

    is_trimmed: without what stands before the first question and after the last answer, as scraped ones have it.
    Raises UserError for a turn that cannot be read, and for what is no question with an answer.
    """
    found = [_turn(turn, n) for n, turn in enumerate(turns)]
    if is_trimmed:
        found = _trimmed(found)
    told = text_of(system, "`system`")
    if told.strip() and not any(turn[0]["role"] == "system" for turn in found):
        found = [(Message(role="system", content=told), True), *found]
    found = _joined(found)
    messages = [message for message, _ in found]
    _check(messages)
    answers = [is_learned for message, is_learned in found if message["role"] == "assistant"]
    if not any(answers):
        raise UserError("no answer is to be learned: every `weight` is 0")
    unlearned = frozenset(n for n, is_learned in enumerate(answers) if not is_learned)
    return Conversation(messages, tools_of(tools), unlearned)


def tools_of(value: Any) -> tuple[Tool, ...]:
    """The functions a row declares: OpenAI's list, bare functions, or either as JSON text. Raises UserError."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"`tools` is not JSON ({error})") from error
    if not value:
        return ()
    return tuple(_tool(one) for one in (value if isinstance(value, list) else [value]))


def text_of(content: Any, what: str) -> str:
    """A text, or the texts of a list of parts. Raises UserError for parts that are no text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, what) for part in content)
    raise UserError(f"{what} is {kind_of(content)}; a text is needed{_as_json(content)}")


def _as_json(value: Any) -> str:
    return ", for example its JSON" if isinstance(value, dict | int) else ""


def kind_of(value: Any) -> str:
    """What a value is in JSON's words, which a row's author knows."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if isinstance(value, int | float):
        return "a number"
    known = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return known.get(type(value), f"a {type(value).__name__}")


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text").endswith("text"):
        return str(part["text"])
    if not isinstance(part, dict) or "type" not in part:
        raise UserError(f"{what} has a part that is {kind_of(part)}; a text is needed{_as_json(part)}")
    raise UserError(f"{what} has a part of type `{part['type']}`; MPT reads text alone")


def _turn(value: Any, n: int) -> tuple[Message, bool]:
    """One turn, and whether it is learned where it is the assistant's. Raises UserError."""
    where = f"`messages[{n}]`"
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; an object with `role` and `content` is needed")
    role = value.get("role", value.get("from"))
    key = next((key for key in ("content", "value", "text") if key in value), None)
    calls = _calls_of(value, where)
    if role in _CALLS:
        calls, role, key = _calls_in(value[key] if key else None, where), "assistant", None
    if role not in _ROLES or (key is None and not calls):
        said = f"the role `{role}`" if role not in _ROLES else "no `content`"
        raise UserError(
            f"{where} has {said}; needed are `role`, one of {', '.join(dict.fromkeys(_ROLES.values()))}, and `content`"
        )
    message = Message(role=_ROLES[role], content=text_of(value[key], f"{where}'s content") if key else "")
    if calls and message["role"] != "assistant":
        raise UserError(f"{where} has calls and is the {message['role']}'s; only the assistant calls functions")
    if calls:
        message["calls"] = calls
    if message["role"] == "tool" and isinstance(value.get("tool_call_id"), str):
        message["call_id"] = value["tool_call_id"]
    return message, value.get("weight", 1) != 0 and value.get("train", True) is not False


def _calls_of(value: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    """An assistant's calls, in the field of today or the one of OpenAI's first functions."""
    found = value.get("tool_calls") or ([value["function_call"]] if value.get("function_call") else [])
    return _calls_in(found, where) if found else ()


def _calls_in(found: Any, where: str) -> tuple[Call, ...]:
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise UserError(f"{where} has a call that is not JSON ({error})") from error
    calls = []
    for n, one in enumerate(found if isinstance(found, list) else [found]):
        call = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{where} has a call without a `name`; needed are `name` and `arguments`")
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else _json(arguments, f"{where}'s call")
        calls.append(Call(str(one.get("id") or f"call_{n}"), call["name"], text))
    return tuple(calls)


def _json(value: Any, what: str) -> str:
    """A value as JSON, without the keys that are null. Raises UserError for NaN, which JSON has not."""
    try:
        return json.dumps(_stated(value), ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{what} holds NaN or infinity, which JSON has not") from error


def _tool(value: Any) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError("one of `tools` has no `name`; each is a function with `name`, `description` and `parameters`")
    parameters = function.get("parameters") or function.get("input_schema")
    described = str(function.get("description") or "")
    if not isinstance(parameters, dict):
        return Tool(function["name"], described)
    _json(parameters, f"the function `{function['name']}`")  # as which a model will see them
    return Tool(function["name"], described, _stated(parameters))


def _stated(value: Any) -> Any:
    """Without the keys that are null: a table gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _stated(inner) for key, inner in value.items() if inner is not None}
    return [_stated(inner) for inner in value] if isinstance(value, list) else value


def _trimmed(turns: list[tuple[Message, bool]]) -> list[tuple[Message, bool]]:
    while turns and turns[-1][0]["role"] != "assistant":
        turns = turns[:-1]
    start = next((n for n, turn in enumerate(turns) if turn[0]["role"] == "user"), len(turns))
    return [turn for n, turn in enumerate(turns) if n >= start or turn[0]["role"] == "system"]


def _joined(turns: Sequence[tuple[Message, bool]]) -> list[tuple[Message, bool]]:
    """With what one says in several turns as one turn, a blank line between. Results of functions stay apart."""
    joined: list[tuple[Message, bool]] = []
    for message, is_learned in turns:
        before = joined[-1] if joined else None
        if before is None or before[0]["role"] != message["role"] or message["role"] == "tool":
            joined.append((message, is_learned))
            continue
        if before[0].get("calls"):
            raise UserError("the assistant goes on after its calls without their results")
        if message["role"] == "assistant" and before[1] != is_learned:
            raise UserError("two messages of the assistant follow each other, of which one is to be learned")
        texts = [text for text in (before[0]["content"], message["content"]) if text]
        joined[-1] = (Message(**{**message, "content": _BETWEEN.join(texts)}), is_learned)
    return joined


def _check(messages: Sequence[Message]) -> None:
    if messages and messages[-1]["role"] != "assistant":
        raise UserError(f"the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    if len(messages) < 2:
        raise UserError(f"a conversation has {len(messages)} messages; it needs a question and an answer")
    for message in messages:
        if message["role"] in ("user", "assistant") and not message["content"].strip() and not message.get("calls"):
            raise UserError(f"a message of the {message['role']}'s is empty")
    for before, after in itertools.pairwise(messages):
        if after["role"] == "tool" and not (before.get("calls") or before["role"] == "tool"):
            raise UserError("a function's result follows no call")
