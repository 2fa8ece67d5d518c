"""Turns with tools, in parts, several of one speaker: what a row says becomes what the server would render."""

import json
from typing import Any

import pytest

from mpt.catalog import resolve
from mpt.errors import UserError
from mpt.prompts import Message, encode_training
from mpt.tokenizer import Tokenizer
from mpt.tools import Call, Tool
from training.data.rows import conversation, read, sample_of

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
OPENAI = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
    {"role": "assistant", "content": "It rains."},
]
SHAREGPT = [
    {"from": "human", "value": "Weather in Oslo?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"from": "observation", "value": "Rain."},
    {"from": "gpt", "value": "It rains."},
]


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return Tokenizer.from_folder(resolve("mpt-tiny-chat"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI, "tools": [WEATHER]},
        {"messages": OPENAI, "tools": json.dumps([WEATHER])},
        {"messages": OPENAI, "tools": [WEATHER["function"]]},
        {"conversations": SHAREGPT, "tools": json.dumps([WEATHER["function"]])},
        # As a table gives it: every key of every row, null where a row lacks it.
        {"messages": [{"tool_calls": None, "tool_call_id": None, **turn} for turn in OPENAI], "tools": [
            {"type": "function", "function": {**WEATHER["function"], "parameters": {
                "type": "object", "properties": {"city": {"type": "string", "enum": None}, "day": None},
                "required": ["city"]}}}]},
    ],
)  # fmt: skip
def test_calls_results_and_declared_functions_are_rendered_as_the_server_does(
    row: dict[str, Any], chatml: Tokenizer
) -> None:
    by_hand = [
        Message(role="user", content="Weather in Oslo?"),
        Message(role="assistant", content="", calls=(Call("c1", "weather", '{"city": "Oslo"}'),)),
        Message(role="tool", content="Rain.", call_id="c1"),
        Message(role="assistant", content="It rains."),
    ]
    tool = Tool("weather", "Of a city.", WEATHER["function"]["parameters"])  # type: ignore[index]
    ids, learned = encode_training(chatml, "chatml", by_hand, tools=[tool])
    assert sample_of(row, chatml, "chatml") == (ids, learned)
    said = chatml.decode([token for token, keep in zip(ids, learned, strict=True) if keep], False)
    assert said == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>It rains.<|im_end|>'
    )


def test_openais_first_functions_are_read() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "Rain."},
            {"role": "assistant", "content": "It rains."},
        ],
        "functions": [WEATHER["function"]],
    }
    found = read(row)
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["calls"][0].name == "weather" and found.tools[0].name == "weather"


def test_parts_are_one_text_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]
    assert conversation(chat(("user", parts), ("assistant", [{"type": "text", "text": "Fig"}]))) == [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Fig"},
    ]
    with pytest.raises(UserError, match="part of type `image_url`"):
        conversation(chat(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("assistant", "A fig")))


def test_what_one_says_in_several_turns_is_one_turn() -> None:
    said = [("system", "Be brief."), ("user", "Hi."), ("user", "Name a fruit."), ("assistant", "Fig."),
            ("assistant", "Or apple.")]  # fmt: skip
    joined = [("system", "Be brief."), ("user", "Hi.\n\nName a fruit."), ("assistant", "Fig.\n\nOr apple.")]
    assert conversation(chat(*said)) == [{"role": role, "content": text} for role, text in joined]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a fruit.", "response": " "},
        {"prompt": "", "response": "A fig"},
        {"question": "Name a fruit.", "answer": None},
        {"question": "Name a fruit.", "chatgpt_answers": ["", ""]},
        chat(("user", "Name a fruit."), ("assistant", "")),
        chat(("user", "Name a fruit."), ("assistant", "\n"), ("user", "Another?"), ("assistant", "A fig")),
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "A fig"}]},
        {"chosen": "\n\nHuman: Name a fruit.\n\nAssistant: "},
        {"prompt": [{"role": "user", "content": "Name a fruit."}], "completion": ""},
    ],
)
def test_an_empty_question_or_answer_is_refused_in_every_shape(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is empty"):
        conversation(row)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([*OPENAI[:1], OPENAI[2], OPENAI[3]], "follows no call"),
        ([*OPENAI[:2], {"role": "assistant", "content": "It rains."}], "without their results"),
        ([{**OPENAI[0], "tool_calls": [CALL]}, OPENAI[3]], "only the assistant"),
        ([OPENAI[0], {"role": "assistant", "tool_calls": [{"id": "c1"}]}], "call without a `name`"),
        ([OPENAI[0], {"role": "assistant", "content": "x", "weight": 0}], "no answer is to be learned"),
    ],
)
def test_turns_that_make_no_conversation_are_refused(turns: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        conversation({"messages": turns})


def test_an_answer_of_weight_0_is_not_learned(chatml: Tokenizer) -> None:
    turns = chat(("user", "A?"), ("assistant", "Bad."), ("user", "B?"), ("assistant", "Good."))
    turns["messages"][1]["weight"] = 0
    sample = sample_of(turns, chatml, "chatml")
    learned = [token for token, keep in zip(*sample, strict=True) if keep]
    assert chatml.decode(learned, False) == "Good.<|im_end|>"
