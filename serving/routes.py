"""The API's routes, stated once for the app of one process and for the router of a cluster.

A route is a line in `ROUTES`, with its body above it. App and router give a function for each; `add_routes` refuses to
leave one out. Not here: the bodies of completions and chat and the reading of bodies (`protocol/`), how a route
answers (`app.py`, `cluster/router.py`).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.routing import Match
from starlette.routing import Route as Matched
from starlette.types import Scope

from serving.dialects.anthropic import CountRequest, MessagesRequest
from serving.dialects.ollama import (
    EmbedRequest,
    GenerateRequest,
    OldEmbedRequest,
    OllamaChatRequest,
    ShowRequest,
)
from serving.dialects.responses import ResponsesRequest
from serving.protocol.body import Strict, Whole, few
from serving.protocol.generation import ChatRequest, CompletionRequest, EmbeddingRequest
from serving.protocol.messages import ChatMessage, ToolDeclaration


class TokenizeRequest(Strict):
    """vLLM's: a text, or messages with what a chat says of its prompt."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    parse_special: bool = True  # llama.cpp's: control tokens spelled in the prompt are control tokens
    add_special_tokens: bool | None = None  # no tokenizer of an MPT adds any by itself
    return_token_strs: bool = False
    tools: Annotated[list[ToolDeclaration], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Strict):
    model: str
    tokens: Annotated[list[Whole], Field(fail_fast=True)]


class LoadAdapterRequest(Strict):
    """vLLM's. The name is `base:name`, or a name where one model is served; the path is from the server's folder."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(Strict):
    lora_name: str


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class BatchRequest(Strict):
    """A file of requests to one endpoint, to be answered within a day."""

    input_file_id: str
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[_Key, _Value], few(16), Field(max_length=16)] | None = None


class ModelRequest(Strict):
    """Which model is to be loaded or unloaded."""

    model: str


@dataclass(frozen=True)
class Route:
    """name: of the function that answers. is_relayed: in a cluster a replica answers it, as the body says which.

    verb: the HTTP method, where it is not the one that the body says.
    """

    name: str
    path: str
    description: str
    body: type[BaseModel] | None = None  # a POST with this body; None is a GET
    is_relayed: bool = False
    verb: Literal["POST", "DELETE"] | None = None

    @property
    def method(self) -> str:
        return self.verb or ("GET" if self.body is None else "POST")


class _Name(StringConvertor):
    """A name in a path: one with a slash too, which is no model's here, and that is what its answer says."""

    regex = ".+"


register_url_convertor("name", _Name())

ROUTES = (
    Route("completions", "/v1/completions", "Continue prompts: text, texts, token ids or lists of those.",
          CompletionRequest, is_relayed=True),
    Route("chat_completions", "/v1/chat/completions", "Answer a conversation, in the model's own prompt style.",
          ChatRequest, is_relayed=True),
    Route("embeddings", "/v1/embeddings", "The mean of the last hidden states of each text, scaled to length 1.",
          EmbeddingRequest, is_relayed=True),
    Route("responses", "/v1/responses", "OpenAI's Responses API: answer an input, or go on from an earlier response.",
          ResponsesRequest, is_relayed=True),
    Route("response", "/v1/responses/{response_id}", "A response that is kept here."),
    Route("delete_response", "/v1/responses/{response_id}", "Forget a response.", verb="DELETE"),
    Route("messages", "/v1/messages", "Anthropic's Messages API.", MessagesRequest, is_relayed=True),
    Route("count_tokens", "/v1/messages/count_tokens", "How many tokens a request of `/v1/messages` has.",
          CountRequest, is_relayed=True),
    Route("ollama_chat", "/api/chat", "Ollama's chat.", OllamaChatRequest, is_relayed=True),
    Route("ollama_generate", "/api/generate", "Ollama's completion.", GenerateRequest, is_relayed=True),
    Route("ollama_embed", "/api/embed", "Ollama's embeddings.", EmbedRequest, is_relayed=True),
    Route("ollama_embeddings", "/api/embeddings", "Ollama's embedding of one text, as it was before `/api/embed`.",
          OldEmbedRequest, is_relayed=True),
    Route("ollama_show", "/api/show", "What Ollama tells of a model.", ShowRequest),
    Route("ollama_tags", "/api/tags", "The models served here, as Ollama lists them."),
    Route("ollama_ps", "/api/ps", "The models that are loaded, as Ollama lists them."),
    Route("root", "/", "200: clients of Ollama ask here whether there is a server. Asked for `text/html`, a page."),
    Route("ollama_version", "/api/version", "The version of this server, where Ollama has its own."),
    Route("tokenize", "/tokenize", "The token ids of a text, or of messages in the model's prompt style.",
          TokenizeRequest, is_relayed=True),
    Route("detokenize", "/detokenize", "The text of token ids, control tokens included.",
          DetokenizeRequest, is_relayed=True),
    Route("tokenizer_info", "/tokenizer_info", "vLLM's: what a tokenizer's configuration says; `?model=` of several."),
    Route("load", "/load", "vLLM's: how many requests are being answered or wait."),
    Route("models", "/v1/models", "The models served here, and what computes each."),
    Route("model", "/v1/models/{model:name}", "One model served here."),
    Route("load_model", "/v1/models/load",
          "Load a model now, where the server was started to allow it; it may be loaded already.", ModelRequest),
    Route("unload_model", "/v1/models/unload",
          "Give back a model's memory, where the server was started to allow it and no request uses the model.",
          ModelRequest),
    Route("load_lora_adapter", "/v1/load_lora_adapter",
          "Serve one more LoRA adapter, where the server was started to allow it.", LoadAdapterRequest),
    Route("unload_lora_adapter", "/v1/unload_lora_adapter",
          "Serve a loaded adapter no longer; its running requests finish with it.", UnloadAdapterRequest),
    Route("create_file", "/v1/files", "Keep a file of requests: a form with `purpose` (`batch`) and `file`.",
          verb="POST"),
    Route("files", "/v1/files", "The files of this key, the newest first."),
    Route("file", "/v1/files/{file_id}", "One file of this key."),
    Route("delete_file", "/v1/files/{file_id}", "Delete a file.", verb="DELETE"),
    Route("file_content", "/v1/files/{file_id}/content", "What is in a file."),
    Route("create_batch", "/v1/batches", "Answer a file of requests, when there is time.", BatchRequest),
    Route("batches", "/v1/batches", "The batches of this key, the newest first."),
    Route("batch", "/v1/batches/{batch_id}", "One batch of this key."),
    Route("cancel_batch", "/v1/batches/{batch_id}/cancel", "End a batch with the answers it has.", verb="POST"),
    Route("health", "/health", "200; 503 while it loads or shuts down, or when an engine has stopped for good."),
    Route("ready", "/ready", "200 once every model can answer and the server takes requests."),
    Route("version", "/version", "The versions that run here."),
    Route("metrics", "/metrics", "Prometheus metrics."),
)  # fmt: skip
BODIES = tuple(route.body for route in ROUTES if route.body is not None)


def nearest(path: str) -> str:
    """What somebody may have meant who asked for a path that is not there, as the end of a sentence."""
    plain = "/" + "/".join(part for part in path[:200].split("/") if part)
    paths = {route.path.replace(":name}", "}") for route in ROUTES}
    likely = [each for each in (plain, f"/v1{plain}", plain.removeprefix("/v1")) if each in paths]
    close = likely or difflib.get_close_matches(plain[:100], paths, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else "the API begins at /v1; /docs lists all of it"


def methods_of(app: FastAPI, scope: Scope) -> set[str]:
    """The methods that a path is there for."""
    found = [each for each in app.router.routes if isinstance(each, Matched) and each.matches(scope)[0] != Match.NONE]
    return {method for each in found for method in each.methods or ()}


def add_routes(app: FastAPI, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Add every route of the table to an app. functions: what answers each, by the route's name, all of them."""
    names = {route.name for route in ROUTES}
    assert functions.keys() == names, f"routes without a function or a place: {functions.keys() ^ names}"
    for route in ROUTES:
        if route.method == "GET":  # HEAD is its head, which the server cuts off
            app.add_api_route(route.path, functions[route.name], methods=["HEAD"], include_in_schema=False)
        app.add_api_route(
            route.path,
            functions[route.name],
            methods=[route.method],
            description=route.description,
            include_in_schema=False,  # `docs.py` describes it
        )
