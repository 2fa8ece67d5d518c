"""What a body may hold is counted before it is parsed, and no list of it is looked at beyond what is wrong in it."""

import json
import random
from typing import Any

import pytest
from pydantic import BaseModel

from serving.errors import ApiError, InvalidRequest, TooLarge
from serving.protocol import shape
from serving.protocol.body import parse
from serving.protocol.generation import ChatRequest, CompletionRequest
from serving.protocol.shape import check_shape
from serving.routes import BODIES

TEXTS = ['"', "\\", '\\"', '\\\\"', "[[[", "}{,", 'a"[,', "\u00e9\ud7ff", "\n", ""]


def value(drawn: random.Random, depth: int) -> Any:
    kind = drawn.randrange(5 if depth else 3)
    if kind == 3:
        return [value(drawn, depth - 1) for _ in range(drawn.randrange(4))]
    if kind == 4:
        return {drawn.choice(TEXTS) + str(n): value(drawn, depth - 1) for n in range(drawn.randrange(4))}
    return drawn.choice(TEXTS) if kind else drawn.randrange(9)


def counts(found: Any) -> tuple[int, int, int, int]:
    """Containers, strings, other values and levels of parsed JSON."""
    if isinstance(found, str):
        return 0, 1, 0, 0
    if not isinstance(found, list | dict):
        return 0, 0, 1, 0
    inside = [counts(each) for each in (found.values() if isinstance(found, dict) else found)]
    n_names = len(found) if isinstance(found, dict) else 0
    containers, strings, others = (sum(each[k] for each in inside) for k in range(3))
    return 1 + containers, n_names + strings, others, 1 + max((each[3] for each in inside), default=0)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_counted_is_what_json_itself_finds(seed, monkeypatch):
    """Each limit at the count lets the text pass, and one below refuses it; of text that has every trap in it."""
    drawn = random.Random(seed)
    found = [value(drawn, 5) for _ in range(6)]
    raw = json.dumps(found, ensure_ascii=drawn.random() < 0.5).encode()
    containers, strings, _, depth = counts(json.loads(raw))
    for name, count in (("MAX_CONTAINERS", containers), ("MAX_STRINGS", strings), ("MAX_DEPTH", depth)):
        monkeypatch.setattr(shape, name, count)
        check_shape(raw)
        monkeypatch.setattr(shape, name, count - 1)
        with pytest.raises(ApiError):
            check_shape(raw)
        monkeypatch.undo()


def test_numbers_are_counted_as_the_commas_between_them(monkeypatch):
    monkeypatch.setattr(shape, "MAX_VALUES", 100)
    check_shape(json.dumps(list(range(100))).encode())
    with pytest.raises(TooLarge):
        check_shape(json.dumps(list(range(101))).encode())


@pytest.mark.parametrize(
    "raw", [b"[" * 20_001, b"[]," * 20_001, b'""' * 100_001, b"1," * 1_000_001, b'{"a":' * 20_001, b"[{" * 10_001]
)
def test_more_than_any_body_needs_is_413(raw):
    with pytest.raises(TooLarge, match="over the limit of"):
        check_shape(raw)


@pytest.mark.parametrize("raw", [b"]" * 100_000, b"\\" * 9_999, b'"' * 9_999, b'"\\', b"][" * 9_999, b"", b"\xff[}"])
def test_what_is_no_json_is_left_to_the_parser(raw):
    check_shape(raw)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse(CompletionRequest, raw)


def test_what_is_nested_too_deep_is_refused_by_its_depth():
    check_shape(b"[" * 128 + b"]" * 128)
    with pytest.raises(InvalidRequest, match="over 128 levels deep"):
        check_shape(b"[" * 129 + b"]" * 129)


def places(schema: Any) -> list[dict[str, Any]]:
    """Every list of pydantic's own schema of a body, but those that only tell what a function takes."""
    found = [schema] if isinstance(schema, dict) and schema.get("type") == "list" else []
    inside = schema if isinstance(schema, list | tuple) else ()
    if isinstance(schema, dict):
        inside = [part for name, part in schema.items() if name != "json_schema_input_schema"]
    return found + [each for part in inside for each in places(part)]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_list_of_a_body_ends_at_its_first_wrong_item(body: type[BaseModel]):
    """Pydantic reports each wrong item, of a million in 5 s. A list of anything has none."""
    lists = [each for each in places(body.__pydantic_core_schema__) if each["items_schema"]["type"] != "any"]
    assert all(each.get("fail_fast") for each in lists), lists


def test_lists_are_found_by_that_test():
    assert len(places(ChatRequest.__pydantic_core_schema__)) >= 7


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("stop", [1] * 9, "`stop[0]`: input should be a valid string"),
        ("logit_bias", {str(n): "x" for n in range(9)}, "the value of `0` should be a number, not x"),
        ("logit_bias", {"1": True}, "the value of `1` should be a number, not true"),
        ("stream_options", {f"k{n}": 1 for n in range(257)}, "an object has 257 fields, at most 256"),
        ("structured_outputs", {"choice": [1] * 9}, "`structured_outputs.choice[0]`"),
    ],
)
def test_the_first_of_many_mistakes_is_told(field, wrong, said):
    body = {"model": "m", "prompt": "a", field: wrong}
    with pytest.raises(InvalidRequest) as error:
        parse(CompletionRequest, json.dumps(body).encode())
    assert said in str(error.value) and error.value.param.startswith(field)
