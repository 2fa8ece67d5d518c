"""LlamaIndex over a server like OpenAI's."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

asked = json.load(sys.stdin)
server = {"api_base": f"{asked['url']}/v1", "api_key": asked["key"], "max_retries": 0}
model = OpenAILike(
    model=asked["chat"],
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    context_window=2048,
    **server,
)
base = OpenAILike(model=asked["base"], is_chat_model=False, temperature=0, max_tokens=8, context_window=2048, **server)
hello, conversation = ([ChatMessage(**message) for message in asked[name]] for name in ("hello", "conversation"))


def get_time(zone: str) -> str:
    """The time in a zone."""
    return asked["result"]


tool = FunctionTool.from_defaults(get_time)
answer = model.chat_with_tools([tool], chat_history=hello, tool_required=True, allow_parallel_tool_calls=False)
call = model.get_tool_calls_from_response(answer)[0]
embedding = OpenAILikeEmbedding(model_name=asked["base"], **server)
print(
    json.dumps(
        {
            "completion": base.complete(asked["text"]).text,
            "hello": model.chat(hello).message.content,
            "pieces": [piece.delta for piece in model.stream_chat(hello)],
            "conversation": model.chat(conversation).message.content,
            "called": call.tool_name,
            "embedding": embedding.get_text_embedding(asked["text"]),
        }
    )
)
