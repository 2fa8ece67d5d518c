"""Functions as text: what the model is told, what its answer must be, and calls found in what it says."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from mpt.errors import UserError
from mpt.tools import Call, CallArguments, CallBegun, CallReader, Said, Tool, as_text, describe, grammar_of

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"City": {"enum": ["Rome", "Paris"]}}}  # fmt: skip
WEATHER, CLOCK = Tool("weather", "How it is outside.", CITY), Tool("clock")
ROME, PARIS = ("weather", '{"city": "Rome"}'), ("weather", '{"city": "Paris"}')
SING = '<tool_call>{"name": "sing", "arguments": {}}</tool_call>'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def read(answer: str, size: int, **options) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls of an answer that comes in pieces of `size`."""
    reader = CallReader(["weather", "clock"], **options)
    pieces = [p for at in range(0, len(answer), size) for p in reader.push(answer[at : at + size])] + reader.finish()
    said, calls = "", []
    for piece in pieces:
        if isinstance(piece, Said):
            said += piece.text
        elif isinstance(piece, CallBegun):
            assert piece.index == len(calls) and piece.id.startswith("call_")
            calls.append((piece.name, ""))
        else:
            name, before = calls[piece.index]
            calls[piece.index] = (name, before + piece.text)
    return said, calls


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "said", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("a < b, <tool", "a < b, <tool", []),
        (CALL, "", [ROME]),
        (f"Let me look.\n\n{CALL}\n", "Let me look.", [ROME]),
        (f"{CALL}\n{CALL.replace('Rome', 'Paris')}", "", [ROME, PARIS]),
        ('<tool_call>{"name":"clock","arguments":{}}</tool_call>', "", [("clock", "{}")]),
        ('<tool_call>{"arguments": {"city": "Rome"}, "name": "weather"}</tool_call>', "", [ROME]),
        ('<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("clock", '{"a": 1}')]),
        ('{"name": "weather", "parameters": {"city": "R}{\\"]"}}', "", [("weather", '{"city": "R}{\\"]"}')]),
        # What is no call stays what it was.
        (SING, SING, []),
        ("<tool_call> no JSON </tool_call>", "<tool_call> no JSON </tool_call>", []),
        ('{"name": "sing", "arguments": {}}', '{"name": "sing", "arguments": {}}', []),
        ('{"names": ["a"]}', '{"names": ["a"]}', []),
        ('  {"name": "Ann"', '  {"name": "Ann"', []),
        # An answer that was cut shows what there was of its call.
        ('<tool_call>\n{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
        ('<tool_call>\n{"na', '<tool_call>\n{"na', []),
    ],
)  # fmt: skip
def test_calls_are_found_however_an_answer_is_cut(answer, said, calls, size):
    assert read(answer, size) == (said, calls)


def test_where_one_call_is_allowed_the_rest_is_left_out():
    assert read(f"{CALL}\n{CALL}\nand so on", 3, is_parallel=False) == ("", [ROME])


def test_arguments_are_given_before_the_call_has_ended():
    reader = CallReader(["weather"])
    reader.push('<tool_call>\n{"name": "weather", "arguments": {"city')
    assert reader.push('": "Ro') == [CallArguments(0, '": "Ro')]


def test_text_is_held_back_only_while_it_may_become_a_call():
    reader = CallReader(["weather"])
    assert reader.push("1 <tool") == [Said("1")]
    assert reader.push("box") == [Said(" <toolbox")]


def accepts(grammar: str, answer: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(answer.encode())) == len(answer.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("answer", "as_forced", "as_free"),
    [
        (CALL, True, True),
        (f"{CALL}\n{CALL}", True, True),
        (CALL.replace("Rome", "Bonn"), False, False),
        ("No call.", False, True),
        (f"Wait. {CALL} Done.", False, True),
    ],
)
def test_grammars_take_calls_of_the_schema_and_nothing_else(answer, as_forced, as_free):
    tools = [WEATHER, CLOCK]
    assert accepts(grammar_of(tools, otherwise=None, is_parallel=True), answer) is as_forced
    assert accepts(grammar_of(tools, otherwise="text", is_parallel=True), answer) is as_free


def test_a_grammar_of_one_call_takes_no_second():
    assert not accepts(grammar_of([WEATHER], otherwise=None, is_parallel=False), f"{CALL}\n{CALL}")


def test_an_answer_is_a_call_or_json_of_a_schema():
    grammar = grammar_of([WEATHER], otherwise={"type": "object", "properties": {"a": {"const": 1}}}, is_parallel=True)
    assert accepts(grammar, CALL) and accepts(grammar, '{"a": 1}')
    assert not accepts(grammar, '{"a": 2}') and not accepts(grammar, f"{CALL} and more")


def test_instructions_to_the_grammar_engine_are_refused():
    with pytest.raises(UserError, match="x-guidance"):
        grammar_of([Tool("a", parameters={"x-guidance": {"lenient": True}})], otherwise=None, is_parallel=True)


def test_a_conversation_with_calls_and_results_becomes_text():
    calls = (Call("c1", "weather", '{"city": "Rome"}'), Call("c2", "clock", "{}"))
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "", "calls": calls},
        {"role": "tool", "content": "noon", "call_id": "c2"},
        {"role": "tool", "content": "sun", "call_id": "c1"},
    ]
    told = as_text(messages, [WEATHER])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"] == describe([WEATHER])
    assert told[2]["content"] == f'{CALL}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'
    sun, noon = ("<tool_response>\n" + text + "\n</tool_response>" for text in ("sun", "noon"))
    assert told[3]["content"] == f"{sun}\n{noon}"


def test_tools_are_described_behind_the_system_message():
    told = as_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], [WEATHER, CLOCK])
    before, *lines = told[0]["content"].split("\n\nYou can call these functions:\n")
    assert before == "Be kind." and len(told) == 2
    assert json.loads(lines[0].split("\n")[0]) == {
        "name": "weather", "description": "How it is outside.", "parameters": CITY
    }  # fmt: skip


def test_what_a_model_called_is_told_to_it_as_it_wrote_it():
    said, ((name, arguments),) = read(CALL, 1)
    assert Call("id", name, arguments).as_text() == CALL and not said
