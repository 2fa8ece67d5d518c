"""OpenAI's client on the Responses API."""

import json
import sys

import openai

asked = json.load(sys.stdin)
client = openai.OpenAI(base_url=f"{asked['url']}/v1", api_key=asked["key"], max_retries=0)
tool = {"type": "function", **asked["tool"], "strict": True}
said = asked["hello"][0]["content"]


def ask(given=said, **more):
    return client.responses.create(model=asked["chat"], input=given, temperature=0, **more)


def streamed(**more):
    pieces, kinds = [], []
    with client.responses.stream(model=asked["chat"], input=said, temperature=0, **more) as events:
        for event in events:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
        return pieces, kinds, events.get_final_response()


def call_of(response):
    call = next(item for item in response.output if item.type == "function_call")
    return {"name": call.name, "arguments": json.loads(call.arguments)}


def error(ask):
    try:
        ask()
    except openai.APIStatusError as found:
        return [type(found).__name__, found.code]


name, _, question = (message["content"] for message in asked["conversation"])
dropped = ask(asked["conversation"][:1])
stored = ask(name)
pieces, kinds, whole = streamed()
called = ask(tools=[tool], tool_choice="required", parallel_tool_calls=False)
output = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": asked["result"]}
form = {"format": {"type": "json_schema", "name": "answer", "schema": asked["schema"], "strict": True}}
client.responses.delete(dropped.id)
print(
    json.dumps(
        {
            "hello": ask().output_text,
            "pieces": pieces,
            "whole": whole.output_text,
            "kinds": list(dict.fromkeys(kinds)),
            "conversation": ask(question, previous_response_id=stored.id).output_text,
            "kept": client.responses.retrieve(stored.id).output_text,
            "forgotten": error(lambda: client.responses.retrieve(dropped.id)),
            "required": call_of(called),
            "named": call_of(ask(tools=[tool], tool_choice={"type": "function", "name": tool["name"]})),
            "streamed_call": call_of(streamed(tools=[tool], tool_choice="required", parallel_tool_calls=False)[2]),
            "after_result": ask([*asked["hello"], *called.output, output], tools=[tool]).output_text,
            "after_stored_result": ask([output], previous_response_id=called.id, tools=[tool]).output_text,
            "structured": json.loads(ask(text=form).output_text),
            "no_model": error(lambda: client.responses.create(model="none", input=said)),
            "too_long": error(lambda: ask(asked["long"])),
        }
    )
)
