"""Reading a JSON body strictly: every field has a type, a range and a fate.

A field is used, or accepted because it asks for nothing (`unused.py`), or refused by name; none is ignored. null asks
for nothing anywhere, and 5.0 is the integer 5.

Pydantic reports everything that is wrong, in one call that nothing interrupts: 10 s for 4 MB of wrong items. So lists
of bodies end at their first wrong item (`fail_fast`), objects have few fields, and `shape.py` counts before all of it.
"""

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serving.errors import InvalidRequest
from serving.protocol.shape import check_shape
from serving.protocol.unused import RENAMED, UNUSED, asks_nothing

MAX_PROMPTS = 2048  # of one request: OpenAI's for embeddings
_MAX_FIELDS = 256  # of one object whose fields have names here


class NoNulls(BaseModel):
    """A JSON object in which a field that is null is as good as left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > _MAX_FIELDS:
            raise _too_many(len(given), _MAX_FIELDS)
        return {name: value for name, value in given.items() if value is not None}


class Strict(NoNulls):
    """An object in which every field is known and of its type, and no number is NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_DEFAULTS: dict[str, list[Any]] = {}


def accept_defaults_of(*kinds: type[BaseModel]) -> None:
    """Let the fields of these bodies ask for nothing at their defaults in every other body too."""
    for kind in kinds:
        for name, declared in kind.model_fields.items():
            if not declared.is_required():
                _DEFAULTS.setdefault(name, []).append(declared.default)


def _too_many(n: int, limit: int) -> PydanticCustomError:
    return PydanticCustomError("fields", "an object has {n} fields, at most {limit}", {"n": n, "limit": limit})


def few(limit: int) -> BeforeValidator:
    """Refuses an object with more fields than this; pydantic would look at each of them first."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise _too_many(len(value), limit)
        return value

    return BeforeValidator(check)


_WHOLE_END = 2**63


def _whole(value: Any) -> Any:
    """5.0 as 5; clients whose language has one kind of number send it.

    An integer that 64 bits do not hold is read as a float, which is another number.
    """
    if not isinstance(value, float) or not value.is_integer():
        return value
    if abs(value) >= _WHOLE_END:
        raise PydanticCustomError(
            "range", "input should be from {low} to {high}", {"low": -_WHOLE_END, "high": _WHOLE_END - 1}
        )
    return int(value)


WHOLE = BeforeValidator(_whole)
Whole = Annotated[int, WHOLE]

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], raw: bytes, model: str | None = None) -> Body:
    """A request body of one kind. Raises TooLarge, and InvalidRequest that names field, value and what would be right.

    model: the one that is meant where the body names none, as with vLLM.
    """
    check_shape(raw)
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body is a JSON {_kind(fields)}, not an object", code="invalid_json")
    fields = {name: value for name, value in fields.items() if _is_used(kind, name, value)}
    if model is not None and "model" in kind.model_fields and fields.get("model") is None:
        fields["model"] = model
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error.errors()) from None


def translated(kind: type[Body], fields: dict[str, Any], names: Mapping[str, str] | None = None) -> Body:
    """A body made of another API's. names: what its fields are called there. Raises InvalidRequest in these names."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:
            field, *rest = problem["loc"]
            if field in (names or {}):  # places inside it are not those of the other API
                problem["loc"] = ((names or {})[str(field)],)
            else:
                problem["loc"] = (field, *rest)
        raise _explain(problems) from None


def _is_used(kind: type[BaseModel], name: str, value: object) -> bool:
    """Whether a field is one that is read; raises for the unknown and the unsupported."""
    if name in kind.model_fields:
        return True
    defaults = _DEFAULTS.get(name, [])
    if value is None or asks_nothing(name, value) or any(_is_same(value, default) for default in defaults):
        return False
    if name in RENAMED and (shown := RENAMED[name]).partition(":")[0] in kind.model_fields:
        raise InvalidRequest(f"`{name}` is called `{shown}` here", code="unsupported_parameter", param=name)
    if name in UNUSED or defaults:
        raise InvalidRequest(f"`{name}` is not supported here; leave it out", code="unsupported_parameter", param=name)
    close = difflib.get_close_matches(name[:100], kind.model_fields, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    raise InvalidRequest(f"unknown parameter `{short(name)}`{hint}", code="unknown_parameter", param=short(name))


def _is_same(value: object, default: object) -> bool:
    """Whether a value is a default, or as empty as one that is null."""
    if default is None:
        return value in ([], {}, "")
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _explain(problems: list[Any]) -> InvalidRequest:
    """Pydantic's first finding as one sentence; of a field that may be of several kinds, what each kind is.

    Where the value is of one of these kinds and a part of it is wrong, the part is named.
    """
    first = problems[0]
    param, is_branch = _place(first["loc"])
    same = [first]
    if is_branch:
        of_field = [each for each in problems if _place(each["loc"]) == (param, True)]
        first = max(of_field, key=lambda each: len(_steps(each["loc"])))
        param = _path(_steps(first["loc"]))
        same = [each for each in of_field if _path(_steps(each["loc"])) == param]
    kind = first["type"]
    if kind == "missing":
        return InvalidRequest(f"`{param}` is missing", code="missing_required_parameter", param=param)
    is_type = kind.endswith(("_type", "_parsing")) or kind == "int_from_float"
    wanted = " or ".join(dict.fromkeys(map(_wanted, same)))
    message = f"`{param}`: {wanted}; got {short(first['input'])}"
    return InvalidRequest(message, code="invalid_type" if is_type else "invalid_value", param=param)


def _place(loc: tuple[str | int, ...]) -> tuple[str, bool]:
    """The field's path, and whether pydantic has gone into a branch of a union, which is no part of it."""
    before = list(itertools.takewhile(lambda step: not _is_branch(step), loc))
    return _path(before), len(before) < len(loc)


def _steps(loc: tuple[str | int, ...]) -> list[str | int]:
    """The way to a value, without the branches of unions that pydantic took on it."""
    return [step for step in loc if not _is_branch(step)]


def _is_branch(step: str | int) -> bool:
    return isinstance(step, str) and (
        step in ("str", "float", "int", "bool", "dict") or "[" in step or step[:1].isupper()
    )


def _path(steps: Sequence[str | int]) -> str:
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _wanted(problem: Any) -> str:
    """What pydantic says should be there."""
    expected = problem.get("ctx", {}).get("expected")
    if expected:
        return f"input should be {expected}"
    if problem["type"] in ("model_type", "dict_type"):
        return "input should be an object"
    said: str = problem["msg"]
    return said[0].lower() + said[1:]


def short(value: object) -> str:
    """A value as an error message shows it."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list | dict):  # its content may be megabytes, or nested deeper than orjson writes
        text = f"a JSON {_kind(value)} of {len(value)}"
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def prompts_of(value: Any, vocab_size: int, param: str = "prompt") -> list[str | list[int]]:
    """The prompts in a field of a request: a string, strings, token ids, or lists of those."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            f"`{param}` must be a string, a list of strings, a list of token ids or a list of those, and not empty",
            code="invalid_type" if not isinstance(value, list) else "invalid_value",
            param=param,
        )
    if is_id(value[0]):
        return [check_ids(_ids(value, param), vocab_size, param)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"`{param}` holds {len(value)} prompts, at most {MAX_PROMPTS}; split them", param=param)
    prompts: list[str | list[int]] = []
    for n, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list) and item:
            prompts.append(check_ids(_ids(item, f"{param}[{n}]"), vocab_size, param))
        else:
            message = f"`{param}[{n}]` must be a string or a list of token ids; got {short(item)}"
            raise InvalidRequest(message, code="invalid_type", param=f"{param}[{n}]")
    return prompts


def _ids(items: list[Any], where: str) -> list[int]:
    for n, item in enumerate(items):
        if not is_id(item):
            place = f"{where}[{n}]"
            raise InvalidRequest(f"`{place}` must be a token id; got {short(item)}", code="invalid_type", param=place)
    return items


def is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidRequest(
            f"token id {bad} is outside the vocabulary, 0 to {vocab_size - 1}", code="invalid_prompt", param=param
        )
    return ids
