"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs`, and calls of functions."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mpt.engine.grammar import ANY_OBJECT, Kind
from mpt.errors import UserError
from mpt.tools import ToolUse
from serving.errors import InvalidRequest
from serving.protocol.body import Strict


class JsonSchema(Strict):
    """OpenAI's: a schema under a name. It is always kept to; `strict` asks for nothing more."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's: the answer is JSON, of a schema if there is one."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: the answer is what one of these describes. Expressions are Rust's, grammars Lark's."""

    json_schema: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True, min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


@dataclass(frozen=True)
class Structure:
    """What an answer must look like, and the field that asked for it."""

    kind: Kind
    value: Any
    param: str


def structure_of(body: Any, max_tokens: int, tools: ToolUse | None = None) -> Structure | None:
    """What a body of `generation.py` asks of the answer's form. Raises InvalidRequest for what contradicts it."""
    found = _called(tools, _formatted(body)) if tools is not None else _formatted(body)
    if found is None:
        return None
    for name, contradicts in (
        ("min_tokens", bool(body.min_tokens)),  # the answer may be complete before
        ("ignore_eos", bool(body.ignore_eos)),  # nothing may follow a complete answer
        ("max_tokens", not max_tokens),
    ):
        if contradicts:
            raise InvalidRequest(f"`{name}` contradicts `{found.param}`; leave it out", param=name)
    return found


def _formatted(body: Any) -> Structure | None:
    form: ResponseFormat | None = body.response_format
    outputs: StructuredOutputs | None = body.structured_outputs
    formatted = None if form is None else _of_format(form)
    if outputs is None:
        return formatted
    if formatted is not None:
        message = "`response_format` and `structured_outputs` both say what the answer is; send one of them"
        raise InvalidRequest(message, param="structured_outputs")
    asked: list[tuple[str, Kind, Any]] = [
        ("json", "json", outputs.json_schema),
        ("regex", "regex", outputs.regex),
        ("choice", "choice", outputs.choice),
        ("grammar", "grammar", outputs.grammar),
        ("json_object", "json", ANY_OBJECT if outputs.json_object else None),
    ]
    given = [Structure(kind, value, f"structured_outputs.{name}") for name, kind, value in asked if value is not None]
    if len(given) != 1:
        raise InvalidRequest(
            "`structured_outputs` takes one of `json`, `regex`, `choice`, `grammar` and `json_object`; "
            f"got {len(given)} of them",
            param="structured_outputs",
        )
    return given[0]


def _of_format(form: ResponseFormat) -> Structure | None:
    if form.type == "json_schema":
        if form.json_schema is None:
            where = "response_format.json_schema"
            raise InvalidRequest(f"`{where}` is missing", code="missing_required_parameter", param=where)
        return Structure("json", form.json_schema.json_schema, "response_format.json_schema.schema")
    if form.json_schema is not None:
        raise InvalidRequest(
            f'`response_format.json_schema` needs the type "json_schema", not "{form.type}"',
            param="response_format.json_schema",
        )
    return Structure("json", ANY_OBJECT, "response_format") if form.type == "json_object" else None


def _called(tools: ToolUse, otherwise: Structure | None) -> Structure | None:
    """Calls, or what the answer is that calls nothing."""
    if otherwise is not None and otherwise.kind != "json":
        message = f"`{otherwise.param}` leaves no room for calls of `tools`; send one of the two"
        raise InvalidRequest(message, param=otherwise.param)
    try:
        grammar = tools.grammar(None if otherwise is None else otherwise.value)
    except UserError as error:
        raise InvalidRequest(str(error), param="tools") from None
    return None if grammar is None else Structure("grammar", grammar, "tools")
