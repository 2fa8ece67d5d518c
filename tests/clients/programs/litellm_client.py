"""LiteLLM over each of the server's APIs."""

import json
import sys

import litellm

asked = json.load(sys.stdin)
litellm.telemetry = False
openai_like = {"api_base": f"{asked['url']}/v1", "api_key": asked["key"]}
tool = {"type": "function", "function": asked["tool"]}


def chat(provider="openai", server=openai_like, **more):
    model = f"{provider}/{asked['chat']}"
    given = {"model": model, "messages": asked["hello"], "temperature": 0, "num_retries": 0}
    return litellm.completion(**{**given, **server, **more})


call = chat(tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls[0].function
root = {"api_base": asked["url"], "api_key": asked["key"]}
response = litellm.responses(
    model=f"openai/{asked['chat']}", input=asked["hello"][0]["content"], temperature=0, **openai_like
)
embedding = litellm.embedding(model=f"openai/{asked['base']}", input=[asked["text"]], **openai_like)
text = litellm.text_completion(
    model=f"text-completion-openai/{asked['base']}", prompt=asked["text"], max_tokens=8, temperature=0, **openai_like
)
try:
    litellm.completion(model="openai/none", messages=asked["hello"], num_retries=0, **openai_like)
except litellm.exceptions.NotFoundError as found:
    error = type(found).__name__
try:
    chat(messages=[{"role": "user", "content": asked["long"]}])
except litellm.exceptions.BadRequestError as found:
    too_long = type(found).__name__
print(
    json.dumps(
        {
            "completion": text.choices[0].text,
            "hello": chat().choices[0].message.content,
            "pieces": [piece.choices[0].delta.content or "" for piece in chat(stream=True)],
            "required": {"name": call.name, "arguments": json.loads(call.arguments)},
            "by_responses": response.output[0].content[0].text,
            "by_messages": chat("anthropic", root).choices[0].message.content,
            "by_ollama": chat("ollama_chat", root).choices[0].message.content,
            "embedding": embedding.data[0]["embedding"],
            "no_model_error": error,
            "too_long": too_long,
        }
    )
)
