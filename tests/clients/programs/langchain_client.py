"""LangChain's client of OpenAI's API, on chat completions and on Responses."""

import json
import sys

from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

asked = json.load(sys.stdin)
server = {"base_url": f"{asked['url']}/v1", "api_key": asked["key"], "max_retries": 0}
model = ChatOpenAI(model=asked["chat"], temperature=0, **server)
tool = {"type": "function", "function": asked["tool"]}
schema = {"title": "answer", **asked["schema"]}
called = model.bind_tools([tool], tool_choice="required", parallel_tool_calls=False).invoke(asked["hello"])
named = model.bind_tools([tool], tool_choice=asked["tool"]["name"]).invoke(asked["hello"])
result = ToolMessage(asked["result"], tool_call_id=called.tool_calls[0]["id"])
responses = ChatOpenAI(model=asked["chat"], temperature=0, use_responses_api=True, **server)
embeddings = OpenAIEmbeddings(model=asked["base"], check_embedding_ctx_length=False, **server)


def call_of(message):
    call = message.tool_calls[0]
    return {"name": call["name"], "arguments": call["args"]}


def structured(method):
    return model.with_structured_output(schema, method=method, strict=True).invoke(asked["hello"])


print(
    json.dumps(
        {
            "hello": model.invoke(asked["hello"]).content,
            "pieces": [piece.content for piece in model.stream(asked["hello"])],
            "conversation": model.invoke(asked["conversation"]).content,
            "auto": model.bind_tools([tool]).invoke(asked["hello"]).content,
            "required": call_of(called),
            "named": call_of(named),
            "after_result": model.bind_tools([tool]).invoke([*asked["hello"], called, result]).content,
            "structured": structured("json_schema"),
            "structured_by_call": structured("function_calling"),
            "by_responses": responses.invoke(asked["hello"]).text,
            "embedding": embeddings.embed_query(asked["text"]),
        }
    )
)
