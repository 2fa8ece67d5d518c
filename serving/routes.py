"""The API's routes, stated once for the app of one process and for the router of a cluster.

A route is a line in `ROUTES`, with its body above it. App and router give a function for each; `add_routes` refuses to
leave one out. Not here: the bodies of completions and chat and the reading of bodies (`protocol.py`), how a route
answers (`app.py`, `cluster/router.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

from serving import protocol
from serving.docs import takes


class EmbeddingRequest(protocol.Strict):
    """Texts or token ids; each becomes a vector of d_model numbers and length 1."""

    model: str
    input: Any  # as a completion's prompt: see `protocol.prompts_of`
    encoding_format: Literal["float", "base64"] | None = "float"


class TokenizeRequest(protocol.Strict):
    model: str
    prompt: str | None = None
    messages: list[protocol.ChatMessage] | None = None


class DetokenizeRequest(protocol.Strict):
    model: str
    tokens: list[int]


class LoadAdapterRequest(protocol.Strict):
    """vLLM's. The name is `base:name`, or a name where one model is served; the path is from the server's folder."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(protocol.Strict):
    lora_name: str


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class BatchRequest(protocol.Strict):
    """A file of requests to one endpoint, to be answered within a day."""

    input_file_id: str
    endpoint: Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None


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


ROUTES = (
    Route("completions", "/v1/completions", "Continue prompts: text, texts, token ids or lists of those.",
          protocol.CompletionRequest, is_relayed=True),
    Route("chat_completions", "/v1/chat/completions", "Answer a conversation, in the model's own prompt style.",
          protocol.ChatRequest, is_relayed=True),
    Route("embeddings", "/v1/embeddings", "The mean of the last hidden states of each text, scaled to length 1.",
          EmbeddingRequest, is_relayed=True),
    Route("tokenize", "/tokenize", "The token ids of a text, or of messages in the model's prompt style.",
          TokenizeRequest, is_relayed=True),
    Route("detokenize", "/detokenize", "The text of token ids, control tokens included.",
          DetokenizeRequest, is_relayed=True),
    Route("models", "/v1/models", "The models served here, and what computes each."),
    Route("model", "/v1/models/{model}", "One model served here."),
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
    Route("health", "/health", "200 while this process answers; 503 when an engine has stopped for good."),
    Route("ready", "/ready", "200 once every model can answer and the server takes requests."),
    Route("version", "/version", "The versions that run here."),
    Route("metrics", "/metrics", "Prometheus metrics."),
)  # fmt: skip
BODIES = tuple(route.body for route in ROUTES if route.body is not None)


def add_routes(app: FastAPI, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Add every route of the table to an app. functions: what answers each, by the route's name, all of them."""
    names = {route.name for route in ROUTES}
    assert functions.keys() == names, f"routes without a function or a place: {functions.keys() ^ names}"
    for route in ROUTES:
        app.add_api_route(
            route.path,
            functions[route.name],
            methods=[route.method],
            description=route.description,
            openapi_extra=None if route.body is None else takes(route.body),
        )
