"""A server that answers as a script says, for what a real one does too seldom. `scripted_server.py PORT` runs it."""

import asyncio
import json
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

WORD = r"\s*\S+|\s+$"
PROBABILITY, PROBABILITY_OF_OTHER = 0.5, 0.25


@dataclass
class ScriptedServer:
    """Answers by the first word of the last message, some of which it knows; others it repeats.

    `slow`, `silent`, `break` and `error` are how a stream goes; `read` reports how far the prompt is read. `busy` is
    refused, `crowded` the first time only, `throttled` each time. A token is a word, with the white space before it,
    and as likely as PROBABILITY. `closed` counts streams that the client left before they ended. `crowded_s` is the
    wait it names to a crowd. With `shows_tokens` it says which tokens a text has.
    """

    url: str = ""
    key: str | None = None
    context: int = 100
    started: int = 0
    closed: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    style: str = "chatml"
    crowded_s: int = 2
    shows_tokens: bool = False
    vocabulary: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["scripted-chat"])  # all alike

    def app(self) -> FastAPI:
        app = FastAPI()

        def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
            return JSONResponse(
                {"error": {"message": message, "type": "t", "param": None, "code": code}}, status, headers
            )

        @app.get("/v1/models")
        async def models(request: Request) -> Any:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return error(401, "invalid_api_key", "the API key is wrong")
            return {
                "data": [
                    {
                        "id": name, "context_length": self.context, "prompt_style": self.style,
                        "licence": "CC-BY-NC-SA-4.0", "parent": None,
                    }
                    for name in self.models
                ]
            }  # fmt: skip

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            body = await request.json()
            if not self.shows_tokens:
                return {"count": words(body)}
            text = body["prompt"] if "prompt" in body else "".join(each["content"] for each in body["messages"])
            pieces = re.findall(WORD, text)
            self.vocabulary += [piece for piece in dict.fromkeys(pieces) if piece not in self.vocabulary]
            return {"count": len(pieces), "tokens": [self.vocabulary.index(piece) for piece in pieces]}

        @app.post("/detokenize")
        async def detokenize(request: Request) -> Any:
            tokens = (await request.json())["tokens"]
            return {"prompt": "".join(self.vocabulary[token] for token in tokens)}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Any:
            body = await request.json()
            last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            word = last.split()[0]
            if word == "busy":
                return error(503, "overloaded", "32 requests run and 256 wait", {"Retry-After": "7"})
            if word == "crowded" and last not in self.refused:
                self.refused.append(last)
                return error(503, "overloaded", "32 requests run and 256 wait", {"Retry-After": str(self.crowded_s)})
            if word == "throttled":
                self.refused.append(last)
                return error(429, "rate_limit_exceeded", "60 requests a minute", {"Retry-After": "1"})
            if words(body) + (body.get("max_tokens") or 1) > self.context:
                return error(400, "context_length_exceeded", f"{words(body)} tokens, over the {self.context} of it")
            self.bodies.append(body)
            return StreamingResponse(stream(body, last), media_type="text/event-stream")

        async def stream(body: dict[str, Any], last: str) -> Any:
            self.started += 1
            word = last.split()[0]
            done = False

            def chunk(text: str, finish: str | None = None) -> str:
                choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
                choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
                if body.get("logprobs") and text:
                    tops = {text: math.log(PROBABILITY), "other": math.log(PROBABILITY_OF_OTHER)}
                    choice["logprobs"] = {
                        "tokens": [text], "token_logprobs": [math.log(PROBABILITY)], "top_logprobs": [tops],
                    }  # fmt: skip
                return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"

            try:
                if word == "silent":
                    await asyncio.sleep(3600)
                if word == "slow":
                    for n in range(10_000):
                        yield chunk(f"word{n} ")
                        await asyncio.sleep(0.03)
                elif word == "break":
                    yield chunk("It began well ")
                    await asyncio.sleep(0.2)
                    done = True
                    return  # no [DONE]
                elif word == "error":
                    yield chunk("It began well ")
                    failed = {
                        "message": "replica 3 is gone",
                        "type": "server_error",
                        "param": None,
                        "code": "replica_lost",
                    }
                    yield f"data: {json.dumps({'error': failed})}\n\n"
                    done = True
                    return
                else:
                    if word == "read" and body["stream_options"].get("include_progress"):
                        yield progress(words(body), words(body) // 2)
                        yield progress(words(body), words(body))
                    for word in re.findall(WORD, last):
                        yield chunk(word)
                yield chunk("", "stop")
                n_prompt, n_answer = words(body), len(last.split())
                yield f"data: {json.dumps({'choices': [], 'usage': usage(n_prompt, n_answer)})}\n\n"
                yield "data: [DONE]\n\n"
                done = True
            finally:
                self.closed += not done

        return app


def words(body: dict[str, Any]) -> int:
    texts = [message["content"] for message in body["messages"]] if body.get("messages") else [body["prompt"]]
    return sum(len(text.split()) for text in texts)


def progress(n_prompt: int, n_read: int) -> str:
    point = {"total": n_prompt, "processed": n_read, "cached": 0, "time_ms": 100 * n_read}
    return f"data: {json.dumps({'choices': [], 'prompt_progress': point})}\n\n"


def usage(n_prompt: int, n_answer: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}


if __name__ == "__main__":
    uvicorn.run(ScriptedServer().app(), port=int(sys.argv[1]), log_level="error")
