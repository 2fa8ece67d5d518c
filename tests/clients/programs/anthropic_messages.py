"""Anthropic's client."""

import json
import sys

import anthropic

asked = json.load(sys.stdin)
client = anthropic.Anthropic(base_url=asked["url"], api_key=asked["key"], max_retries=0)
tool = {"name": asked["tool"]["name"], "description": asked["tool"]["description"]}
tool["input_schema"] = asked["tool"]["parameters"]
given = {"model": asked["chat"], "max_tokens": 500, "extra_body": {"temperature": 0}}


def ask(messages=asked["hello"], **more):
    return client.messages.create(**{**given, "messages": messages, **more})


def call_of(message):
    block = next(block for block in message.content if block.type == "tool_use")
    return {"name": block.name, "arguments": block.input}


def streamed(**more):
    with client.messages.stream(**given, messages=asked["hello"], **more) as stream:
        return list(stream.text_stream), stream.get_final_message()


def error(ask):
    try:
        ask()
    except anthropic.APIStatusError as found:
        return [type(found).__name__, found.body["error"]["type"]]


any_tool = {"type": "any", "disable_parallel_tool_use": True}
called = ask(tools=[tool], tool_choice=any_tool)
result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": asked["result"]}
back = [*asked["hello"], {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
form = {"format": {"type": "json_schema", "schema": asked["schema"]}}
pieces, whole = streamed()
wrong = anthropic.Anthropic(base_url=asked["url"], api_key="wrong", max_retries=0)
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "hello": ask().content[0].text,
            "reason": whole.stop_reason,
            "pieces": pieces,
            "whole": whole.content[0].text,
            "conversation": ask(asked["conversation"]).content[0].text,
            "auto": ask(tools=[tool]).content[0].text,
            "required": call_of(called),
            "named": call_of(ask(tools=[tool], tool_choice={"type": "tool", "name": tool["name"]})),
            "streamed_call": call_of(streamed(tools=[tool], tool_choice=any_tool)[1]),
            "after_result": ask(back, tools=[tool]).content[0].text,
            "structured": json.loads(ask(output_config=form).content[0].text),
            "prompt_tokens": client.messages.count_tokens(model=asked["chat"], messages=asked["hello"]).input_tokens,
            "no_model": error(lambda: ask(model="none")),
            "too_long": error(lambda: ask([{"role": "user", "content": asked["long"]}])),
            "wrong_key": error(lambda: wrong.messages.create(**given, messages=asked["hello"])),
        }
    )
)
