"""OpenAI's client: completions, chat, tools, structured output, embeddings, errors."""

import json
import sys

import openai

asked = json.load(sys.stdin)
client = openai.OpenAI(base_url=f"{asked['url']}/v1", api_key=asked["key"], max_retries=0)
tool = {"type": "function", "function": asked["tool"]}
named = {"type": "function", "function": {"name": asked["tool"]["name"]}}


def chat(messages=asked["hello"], **more):
    create = client.chat.completions.create
    return create(model=asked["chat"], messages=messages, temperature=0, **more).choices[0].message


def stream(**more):
    create = client.chat.completions.create
    return create(model=asked["chat"], messages=asked["hello"], temperature=0, stream=True, **more)


def call_of(message):
    function = message.tool_calls[0].function
    return {"name": function.name, "arguments": json.loads(function.arguments)}


def streamed_call():
    name, arguments = "", ""
    for chunk in stream(tools=[tool], tool_choice="required", parallel_tool_calls=False):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    return {"name": name, "arguments": json.loads(arguments)}


def error(ask):
    try:
        ask()
    except openai.APIStatusError as found:
        return [type(found).__name__, found.code]


called = chat(tools=[tool], tool_choice="required", parallel_tool_calls=False)
result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": asked["result"]}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked["schema"], "strict": True}}
other = openai.OpenAI(base_url=f"{asked['url']}/v1", api_key="wrong", max_retries=0)
text = client.completions.create(model=asked["base"], prompt=asked["text"], temperature=0, max_tokens=8).choices[0].text
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "completion": text,
            "hello": chat().content,
            "pieces": [chunk.choices[0].delta.content or "" for chunk in stream()],
            "conversation": chat(asked["conversation"]).content,
            "auto": chat(tools=[tool]).content,
            "required": call_of(called),
            "named": call_of(chat(tools=[tool], tool_choice=named)),
            "streamed_call": streamed_call(),
            "after_result": chat([*asked["hello"], called, result], tools=[tool]).content,
            "structured": json.loads(chat(response_format=form).content),
            "embedding": client.embeddings.create(model=asked["base"], input=[asked["text"]]).data[0].embedding,
            "no_model": error(lambda: client.chat.completions.create(model="none", messages=asked["hello"])),
            "too_long": error(lambda: chat([{"role": "user", "content": asked["long"]}])),
            "wrong_key": error(other.models.list),
        }
    )
)
