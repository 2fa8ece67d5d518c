"""Ollama's client."""

import json
import sys

import ollama

asked = json.load(sys.stdin)
client = ollama.Client(host=asked["url"], headers={"Authorization": f"Bearer {asked['key']}"})
tool = {"type": "function", "function": asked["tool"]}
greedy = {"temperature": 0}


def chat(messages=asked["hello"], **more):
    return client.chat(asked["chat"], messages, options=greedy, **more)


def error(ask):
    try:
        ask()
    except ollama.ResponseError as found:
        return found.status_code


# Ollama's defaults, and what it says of machines and caches.
usual = {
    "numa": False, "num_ctx": 2048, "num_batch": 512, "num_gpu": -1, "main_gpu": 0, "low_vram": False, "f16_kv": True,
    "logits_all": False, "vocab_only": False, "use_mmap": True, "use_mlock": False, "embedding_only": False,
    "num_thread": 0, "num_keep": 4, "num_predict": -1, "top_k": 40, "top_p": 0.9, "tfs_z": 1.0, "typical_p": 1.0,
    "repeat_last_n": 64, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "mirostat": 0,
    "mirostat_tau": 5.0, "mirostat_eta": 0.1, "penalize_newline": True, "stop": [], "seed": 0, "temperature": 0,
}  # fmt: skip
unknown = usual.keys() ^ ollama.Options.model_fields.keys()
called = ollama.Message(role="assistant", tool_calls=[{"function": asked["called"]}])
back = [*asked["hello"], called, {"role": "tool", "content": asked["result"], "tool_name": asked["tool"]["name"]}]
text = client.generate(asked["base"], asked["text"], options={**greedy, "num_predict": 8})
shown = client.show(asked["chat"])
other = ollama.Client(host=asked["url"], headers={"Authorization": "Bearer wrong"})
print(
    json.dumps(
        {
            "models": [model.model for model in client.list().models],
            "running": [model.model for model in client.ps().models],
            "capabilities": shown.capabilities,
            "context": shown.modelinfo["mpt.context_length"],
            "completion": text.response,
            "hello": chat().message.content,
            "with_usual_options": client.chat(asked["chat"], asked["hello"], options=usual).message.content,
            "unknown_options": sorted(unknown),
            "reason": chat().done_reason,
            "pieces": [piece.message.content for piece in chat(stream=True)],
            "conversation": chat(asked["conversation"]).message.content,
            "asked_once": client.generate(asked["chat"], asked["hello"][0]["content"], options=greedy).response,
            "auto": chat(tools=[tool]).message.content,
            "after_result": chat(back, tools=[tool]).message.content,
            "structured": json.loads(chat(format=asked["schema"]).message.content),
            "embedding": list(client.embed(asked["base"], asked["text"]).embeddings[0]),
            "old_embedding": list(client.embeddings(asked["base"], asked["text"]).embedding),
            "prompt_tokens": chat().prompt_eval_count,
            "no_model": error(lambda: client.chat("none", asked["hello"])),
            "too_long": error(lambda: chat([{"role": "user", "content": asked["long"]}])),
            "wrong_key": error(other.list),
        }
    )
)
