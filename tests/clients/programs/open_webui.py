"""The requests of Open WebUI, as its backend builds them, over both of its kinds of connection.

Source: `routers/ollama.py`, `routers/openai.py` and `utils/payload.py` of its backend.
"""

import json
import sys

import httpx

asked = json.load(sys.stdin)
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {asked['key']}"}
headers |= {"X-OpenWebUI-User-Name": "Greta", "X-OpenWebUI-User-Role": "admin", "X-OpenWebUI-Chat-Id": "c-1"}
server = httpx.Client(base_url=asked["url"], headers=headers, timeout=100)
chat, base, hello = asked["chat"], asked["base"], asked["hello"]
tool = {"type": "function", "function": asked["tool"]}
options = {  # each that its settings have
    "temperature": 0, "top_p": 0.9, "seed": 1, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0, "num_ctx": 2048,
    "num_batch": 512, "num_keep": 24, "num_predict": -1, "repeat_last_n": 64, "top_k": 40, "min_p": 0.0,
    "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": [], "num_gpu": 0,
    "use_mmap": True, "use_mlock": False, "num_thread": 2, "tfs_z": 1,
}  # fmt: skip
call = {"index": 0, "id": "call_1", "type": "function", "function": asked["called"]}
result = {"role": "tool", "tool_call_id": "call_1", "content": asked["result"]}


def post(path, **body):
    answer = server.post(path, json=body)
    assert answer.status_code == 200, f"{path}: {answer.text}"
    return answer


def get(path):
    answer = server.get(path)
    assert answer.status_code == 200, f"{path}: {answer.text}"
    return answer.json()


def by_ollama(messages=hello, **more):
    body = {"model": chat, "messages": messages, "stream": False, "options": options, "keep_alive": "5m", **more}
    return post("/api/chat", **body).json()["message"]


def by_openai(**more):
    return post("/v1/chat/completions", model=chat, messages=hello, temperature=0, **more)


lines = post("/api/chat", model=chat, messages=hello, stream=True, options=options, format=None, think=None).text
events = by_openai(stream=True, stream_options={"include_usage": True}).text
chunks = [json.loads(event[6:]) for event in events.split("\n\n") if event.startswith("data: {")]
texts = [asked["text"]]
print(
    json.dumps(
        {
            "version": sorted(get("/api/version")),
            "models": [model["model"] for model in get("/api/tags")["models"]],
            "models_by_openai": [model["id"] for model in get("/v1/models")["data"]],
            "running": [model["name"] for model in get("/api/ps")["models"]],
            "by_ollama": by_ollama()["content"],
            "pieces": [json.loads(line)["message"]["content"] for line in lines.splitlines()],
            "auto": by_ollama(tools=[tool])["content"],
            "after_result": by_ollama(
                [*hello, {"role": "assistant", "content": "", "tool_calls": [call]}, result], tools=[tool]
            )["content"],
            "structured": json.loads(by_ollama(format=asked["schema"])["content"]),
            "unloaded": post("/api/generate", model=chat, keep_alive=0, prompt="").json()["done_reason"],
            "embedding": post("/api/embed", model=base, input=texts).json()["embeddings"][0],
            "embedding_by_openai": post("/v1/embeddings", model=base, input=texts).json()["data"][0]["embedding"],
            "by_openai": by_openai(stream=False, max_completion_tokens=1000).json()["choices"][0]["message"]["content"],
            "pieces_by_openai": [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]],
        }
    )
)
