"""Functions that a model may call: how they are described to it, how it calls them, and how a call is read.

MPT has no tokens for tools, so all of it is text, in the form that open models commonly learn:

- The system message ends with `describe(tools)`: each function as one line of JSON, and how to call it.
- A call is `<tool_call>`, a line of JSON with `name` and `arguments`, `</tool_call>`. An answer may hold several.
- A result comes back in the user's next turn, inside `<tool_response>` and `</tool_response>`.

`grammar_of` is what an answer follows that must call. `CallReader` finds calls in an answer as it is generated. Not
here: the fields of an API that tools come in (`serving/protocol/`).
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpt.errors import UserError

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_RESULT_START, _RESULT_END = "<tool_response>", "</tool_response>"
MAX_CALLS = 16  # of one answer that must call
# How llguidance reads a schema: what cannot be enforced is refused. Between the parts of a document stand some spaces,
# but not spaces for ever, which models without a clue otherwise write; arguments are spelled as Python spells JSON.
_ARGUMENTS = {"lenient": False, "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
GUIDANCE: dict[str, Any] = {"lenient": False, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}

_HOW_TO_CALL = f"""\
To call one, write its name and arguments as JSON, and wait for the result:
{CALL_START}
{{"name": "function", "arguments": {{"argument": "value"}}}}
{CALL_END}"""


@dataclass(frozen=True)
class Tool:
    """A function. parameters: the JSON schema of its arguments; strict: whether a call may not differ from it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}, "additionalProperties": False}
    )
    strict: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the model is told of it."""
        description = {"description": self.description} if self.description else {}
        return {"name": self.name, **description, "parameters": self.parameters}


@dataclass(frozen=True)
class Call:
    """A call in a message. arguments: JSON as the model wrote it."""

    id: str
    name: str
    arguments: str

    def as_text(self) -> str:
        arguments = self.arguments
        if not _is_object(arguments):  # clients may send back anything
            arguments = json.dumps(arguments, ensure_ascii=False)
        return f'{CALL_START}\n{{"name": {_quoted(self.name)}, "arguments": {arguments}}}\n{CALL_END}'


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools. allowed: the names it may call; must_call: an answer without a call is none;
    is_named: one function was chosen by the caller.
    """

    tools: tuple[Tool, ...]
    must_call: bool = False
    is_named: bool = False
    allowed: frozenset[str] | None = None  # None: all of them
    is_parallel: bool = True  # an answer may hold several calls

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    def grammar(self, schema: Any = None) -> str | None:
        """What an answer follows, None for any text. schema: of an answer that calls nothing.

        Raises UserError as `grammar_of` does.
        """
        if self.must_call or schema is not None or any(tool.strict for tool in self.callable_tools):
            otherwise = None if self.must_call else "text" if schema is None else schema
            return grammar_of(self.callable_tools, otherwise=otherwise, is_parallel=self.is_parallel)
        return None


# -- to the model --------------------------------------------------------------------------------------------------


def describe(tools: Sequence[Tool]) -> str:
    """The part of the system message about these tools."""
    lines = [json.dumps(tool.as_json(), ensure_ascii=False) for tool in tools]
    return "\n".join(["You can call these functions:", *lines, "", _HOW_TO_CALL])


def as_text(messages: Sequence[Any], tools: Sequence[Tool] = ()) -> list[Any]:
    """A conversation whose tools, calls and results are text, in the roles system, user and assistant.

    messages: as `mpt.prompts.Message`, which stands above this module. Results stand in the order of the calls they
    answer.
    """
    plain: list[Any] = []
    order: dict[str, int] = {}  # of the calls of the last answer
    results: list[tuple[int, str]] = []

    def add_results() -> None:
        if results:
            texts = [text for _, text in sorted(results, key=lambda result: result[0])]
            plain.append({"role": "user", "content": "\n".join(texts)})
            results.clear()

    for message in messages:
        if message["role"] == "tool":
            place = order.get(message.get("call_id") or "", len(results))
            results.append((place, f"{_RESULT_START}\n{message['content']}\n{_RESULT_END}"))
            continue
        add_results()
        content, calls = message["content"], message.get("calls") or ()
        order = {call.id: n for n, call in enumerate(calls)}
        texts = [*([content] if content else []), *(call.as_text() for call in calls)]
        plain.append({"role": message["role"], "content": "\n".join(texts)})
    add_results()
    return _with_tools(plain, tools) if tools else plain


def _with_tools(messages: list[Any], tools: Sequence[Tool]) -> list[Any]:
    """The description of tools behind the first system message, or as the first message."""
    for n, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            said = [text for text in (message["content"], describe(tools)) if text and text.strip()]
            told = {**message, "content": "\n\n".join(said)}
            return [*messages[:n], told, *messages[n + 1 :]]
    return [{"role": "system", "content": describe(tools)}, *messages]


# -- what an answer must be ----------------------------------------------------------------------------------------


def grammar_of(tools: Sequence[Tool], *, otherwise: Any, is_parallel: bool) -> str:
    """Answers that may call these functions in Lark's notation, with arguments of their schemas.

    otherwise: None where an answer is calls and nothing else, up to MAX_CALLS; "text" for text that may hold calls; or
    the schema (an object or its text) of the JSON that an answer without calls is. Raises UserError for a schema with
    an instruction to the grammar engine.
    """
    opening, closing = _quoted(f"{CALL_START}\n"), _quoted(f"\n{CALL_END}")
    if otherwise == "text":
        # Text up to a call's start is taken lazily, so what follows can only be a call.
        start = [f"start: call{{0,{MAX_CALLS if is_parallel else 1}}} TEXT", f"call: head body {closing}"]
        start += [f"head[lazy]: TEXT {opening}", r"TEXT: /(.|\n)*/"]
    else:
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if is_parallel else ""
        start = [f"start: calls{'' if otherwise is None else ' | answer'}", f"calls: call{more}"]
        start += [f"call: {opening} body {closing}"]
        start += [] if otherwise is None else [f"answer: %json {_schema('the answer', otherwise, GUIDANCE)}"]
    rules = [
        f"args_{n}: %json {_schema(f'`{tool.name}`', tool.parameters, _ARGUMENTS)}" for n, tool in enumerate(tools)
    ]
    bodies = [f'body_{n}: {_quoted(_head(tool.name))} args_{n} "}}"' for n, tool in enumerate(tools)]
    body = "body: " + " | ".join(f"body_{n}" for n in range(len(tools)))
    return "\n".join(["%llguidance {}", *start, body, *bodies, *rules])


def _head(name: str) -> str:
    return f'{{"name": {_quoted(name)}, "arguments": '


def _schema(what: str, schema: Any, guidance: Mapping[str, Any]) -> str:
    """A schema with our instructions to the grammar engine."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"the schema of {what} is not valid JSON: {error}") from None
    if not isinstance(schema, Mapping) or "x-guidance" in schema:
        raise UserError(f"the schema of {what} must be a JSON object without `x-guidance`")
    return json.dumps({"x-guidance": guidance, **schema})


# -- from the model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """Text of an answer that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The index-th call of an answer names its function; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of the index-th call, as the model wrote them."""

    index: int
    text: str


Piece = Said | CallBegun | CallArguments

_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BARE = '{"name":"'  # how a call without `<tool_call>` begins, spaces aside


class CallReader:
    """Finds calls in an answer that comes in pieces.

    A call is what stands between `<tool_call>` and `</tool_call>`, or an answer that begins with a JSON object which
    names a function first. What names no function of `names`, or is no JSON, stays text. Arguments are given as they
    come. With is_parallel False nothing is read behind the first call.
    """

    def __init__(self, names: Iterable[str], *, is_parallel: bool = True) -> None:
        self.n_calls = 0
        self._names, self._is_parallel = frozenset(names), is_parallel
        self._text = ""  # not looked at yet, or held back: it may become a call
        self._call: _CallText | None = None  # the call being read
        self._has_said = False
        self._is_closing = False  # a call was read, and its `</tool_call>` comes next
        self._is_over = False

    def push(self, text: str) -> list[Piece]:
        """What is certain once `text` has come."""
        self._text += text
        pieces: list[Piece] = []
        while not self._is_over:
            step = self._closing() if self._is_closing else self._called() if self._call else self._said()
            if step is None:
                return pieces
            pieces += step
        self._text = ""
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when the answer has ended."""
        call, rest = self._call, self._text
        self._call, self._text = None, ""
        if call is not None:
            whole = [] if call.is_begun else self._as_text(call)
            return [*call.more(), *whole]
        if self._is_closing or (self.n_calls and not rest.strip()):
            return []
        return [Said(rest)] if rest else []

    def _said(self) -> list[Piece] | None:
        """Text up to the next call; None when more must come first."""
        text = self._text
        start = text.find(CALL_START)
        said = text if start < 0 else text[:start]
        if not self._has_said and _BARE.startswith(begins := _without_space(said)[: len(_BARE)]) and begins:
            if begins == _BARE:
                self._call = _CallText(self._names, is_bare=True)
                return []
            if start < 0:
                return None
        if start < 0:
            kept = _held_back(text)
            self._text, said = text[len(text) - kept :], text[: len(text) - kept]
            self._has_said |= bool(said)
            return [Said(said)] if said else None
        self._has_said, self._text = True, text[start + len(CALL_START) :]
        self._call = _CallText(self._names, is_bare=False)
        return [Said(said.rstrip())] if said.strip() else []

    def _called(self) -> list[Piece] | None:
        """More of a call; None when more must come first."""
        call = self._call
        assert call is not None
        if not self._text:
            return None
        was_begun = call.is_begun
        self._text = call.push(self._text)
        if call.is_text:
            self._call = None
            return self._as_text(call)
        pieces: list[Piece] = []
        if call.is_begun and not was_begun:
            pieces.append(CallBegun(self.n_calls, f"call_{secrets.token_hex(12)}", call.name))
            call.index, self.n_calls = self.n_calls, self.n_calls + 1
        pieces += call.more()
        if call.is_whole:
            self._call, self._has_said = None, True
            self._is_closing, self._is_over = not call.is_bare, not self._is_parallel
        return pieces

    def _closing(self) -> list[Piece] | None:
        """Drop the end of a call; None when more must come first."""
        text = self._text.lstrip()
        if len(text) < len(CALL_END) and CALL_END.startswith(text):
            return None
        self._is_closing, self._text = False, text.removeprefix(CALL_END)
        return []

    def _as_text(self, call: "_CallText") -> list[Piece]:
        self._has_said = True
        return [Said(call.text if call.is_bare else CALL_START + call.text)]


class _CallText:
    """The JSON of one call as it comes."""

    def __init__(self, names: frozenset[str], is_bare: bool) -> None:
        self.text, self.name, self.index, self.is_bare = "", "", 0, is_bare
        self.is_begun = self.is_whole = self.is_text = False
        self._names = names
        self._arguments = ""  # known and not given yet
        self._start, self._end = -1, -1  # of the arguments in the text
        self._read = self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, text: str) -> str:
        """Take what belongs to the call; the rest."""
        self.text += text
        if not self.text.lstrip().startswith("{"):
            self.is_text = bool(self.text.strip())
            return ""
        if not self.is_begun and (found := _BEGINNING.match(self.text)) and found[1] in self._names:
            self.is_begun, self.name, self._start = True, found[1], found.end()
        given = max(self._start, self._read)
        self._scan()
        if self.is_begun:
            self._arguments += self.text[given : self._end if self._end >= 0 else self._read]
        if not self.is_whole:
            return ""
        rest, self.text = self.text[self._read :], self.text[: self._read]
        if not self.is_begun:
            self._take_whole()
        return rest

    def more(self) -> list[Piece]:
        """The arguments that have come since it was asked last."""
        given, self._arguments = self._arguments, ""
        return [CallArguments(self.index, given)] if given else []

    def _scan(self) -> None:
        """Read on to the end of the object, or of what there is."""
        for at in range(self._read, len(self.text)):
            character = self.text[at]
            if self._in_string:
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1 and self._end < 0 <= self._start < at:
                    self._end = at + 1
                if self._depth == 0:
                    self._read, self.is_whole = at + 1, True
                    return
        self._read = len(self.text)

    def _take_whole(self) -> None:
        """A call in another order, or with its arguments as a string of JSON; else it is text."""
        try:
            found = json.loads(self.text)
        except ValueError:
            found = {}
        arguments = found.get("arguments", found.get("parameters", {}))
        self.is_text = found.get("name") not in self._names
        self.is_begun = not self.is_text
        if self.is_begun:
            self.name = found["name"]
            self._arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _without_space(text: str) -> str:
    return "".join(text[:1000].split())


def _held_back(text: str) -> int:
    """How much of a text's end may still belong to a call: the beginning of its start, and space before that."""
    longest = min(len(text), len(CALL_START) - 1)
    tag = next((n for n in range(longest, 0, -1) if CALL_START.startswith(text[-n:])), 0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip())


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
