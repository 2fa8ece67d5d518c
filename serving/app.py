"""The HTTP app: OpenAI's routes over the endpoints of one process.

Made by one function and run in two places: by `mpt serve` on uvicorn, and inside a Ray Serve replica. Bodies are read
here under a byte limit and parsed by `serving/protocol.py`, since FastAPI's own reading takes NaN, "16" for 16 and
unknown fields; the OpenAPI schema is given by hand instead.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import mpt
from mpt.engine.adapters import AdapterExists, Adapters, find_inside, split_name, without_path
from mpt.engine.endpoint import Endpoint
from mpt.engine.request import Sampling
from mpt.errors import CheckpointNotFound, MPTError
from mpt.lora import Adapter
from mpt.options import MODEL_NAME
from serving import answers
from serving.auth import Door, keys_of
from serving.batch.api import batch_functions
from serving.batch.service import BatchDoor, BatchService
from serving.batch.store import Store
from serving.cards import cards_of
from serving.docs import add_docs
from serving.errors import (
    ApiError,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    Unavailable,
)
from serving.gate import Gate, respond
from serving.intake import chat_tokens, check_room, check_scores, check_size, make_job, prompt_tokens, read_body
from serving.metrics import HttpMetrics, Metrics
from serving.options import ServeOptions
from serving.protocol import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest, parse, prompts_of
from serving.routes import (
    BODIES,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    add_routes,
)
from serving.sse import EventStream, until_disconnected

log = logging.getLogger(__name__)

Functions = dict[str, Callable[..., Any]]  # what answers each route, by its name in `routes.py`
Result = TypeVar("Result")


@dataclass
class Serving:
    """What the routes share: the endpoints as they become ready, and whether the server is leaving."""

    options: ServeOptions
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    draining: bool = False

    async def chosen(self, model: str) -> tuple[Endpoint, Adapter | None]:
        """The endpoint, and the adapter, of a request's `model`. Raises like `endpoint`."""
        base, name = split_name(model)
        endpoint = self.endpoint(base)
        if name is None:
            return endpoint, None
        adapter = await endpoint.adapters.get(name) if endpoint.adapters is not None else None
        if adapter is None:
            known = [] if endpoint.adapters is None else endpoint.adapters.names()
            shown = ", ".join(f"`{base}:{each}`" for each in known) or "none"
            raise NotFound(
                f"no adapter `{name[:100]}` of `{base}` here; there are: {shown}", code="model_not_found", param="model"
            )
        return endpoint, adapter

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint of a served name. Raises NotFound, or Unavailable while it loads or the server leaves."""
        if self.draining:
            raise Unavailable("the server is shutting down; try another replica", code="shutting_down")
        if name in self.endpoints:
            return self.endpoints[name]
        if name in self.loading:
            raise Unavailable(f"`{name}` is still loading; try again soon", code="model_loading")
        known = ", ".join(f"`{known}`" for known in [*self.endpoints, *sorted(self.loading)])
        raise NotFound(f"no model `{name[:100]}` here; served: {known}", code="model_not_found", param="model")

    def takes_priority(self, model: str) -> bool:
        """Whether requests for a model may have a `priority`."""
        endpoint = self.endpoints.get(split_name(model)[0])
        return endpoint is not None and "priority" in endpoint.engine.capabilities.request.claimed

    def not_ready(self) -> str | None:
        """Why requests cannot be answered now, None if they can."""
        if self.draining:
            return "shutting down"
        if self.loading:
            return "loading " + ", ".join(sorted(self.loading))
        stopped = [name for name, endpoint in self.endpoints.items() if not endpoint.engine.ready]
        return f"not answering: {', '.join(stopped)}" if stopped or not self.endpoints else None


def make_app(serving: Serving, door: Door | None = None) -> FastAPI:
    """The ASGI app over these endpoints; they may still be loading.

    door: who is let in; the keys of the options by default. Another one stands behind a router, which logs.
    """
    options = serving.options
    log_format = options.log_format if door is None else None
    metrics = Metrics(lambda: list(serving.endpoints.values()))
    app = FastAPI(title="MPT", version=mpt.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # the redirect's host would be whatever the client's Host header says
    app.state.serving, app.state.metrics = serving, metrics
    door = door or keys_of(options)
    service = None
    if options.batch_dir is not None:
        door = BatchDoor(door)
        service = BatchService(Store(options.batch_dir), app, door, serving.takes_priority)
    app.state.batches = service
    functions = batch_functions(service, door, options.max_body_bytes)
    functions |= _generation(serving, metrics) | _models_and_tokens(serving) | _adapter_loading(serving)
    add_routes(app, functions | _operations(serving, metrics))
    add_errors(app, metrics)
    if options.docs:
        add_docs(app, *BODIES)
    app.add_middleware(Gate, door=door, metrics=metrics, log_format=log_format)
    if options.cors_origins:  # outside the gate: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _generation(serving: Serving, metrics: Metrics) -> Functions:
    limit = serving.options.max_body_bytes

    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await read_body(request, limit))
        endpoint, adapter = await serving.chosen(asked.model)
        texts_or_ids = prompts_of(asked.prompt, endpoint.vocab_size)
        prompts = [await prompt_tokens(endpoint, prompt) for prompt in texts_or_ids]
        longest = max(map(len, prompts))
        room = endpoint.context_length - longest
        wanted = min(DEFAULT_COMPLETION_TOKENS, max(room, 1)) if asked.max_tokens is None else asked.max_tokens
        check_room(endpoint, longest, wanted, "prompt")
        texts = []
        if asked.echo:
            pairs = zip(texts_or_ids, prompts, strict=True)
            texts = [p if isinstance(p, str) else endpoint.tokenizer.decode(ids, False) for p, ids in pairs]
        check_scores(asked, prompts)
        job = await make_job(request, asked, endpoint, adapter, prompts, wanted)
        job.echo, job.texts = bool(asked.echo), texts
        return await run(
            request,
            job,
            asked,
            lambda events: answers.completion_chunks(job, events, logprobs=asked.logprobs),
            lambda events: answers.completion(job, events, logprobs=asked.logprobs),
        )

    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await read_body(request, limit))
        endpoint, adapter = await serving.chosen(asked.model)
        prompt = await chat_tokens(endpoint, asked.messages)
        room = endpoint.context_length - len(prompt)
        wanted = asked.max_completion_tokens or asked.max_tokens or max(room, 1)
        check_room(endpoint, len(prompt), wanted, "messages")
        job = await make_job(request, asked, endpoint, adapter, [prompt], wanted)
        logprobs = bool(asked.logprobs)
        return await run(
            request,
            job,
            asked,
            lambda events: answers.chat_chunks(job, events, logprobs=logprobs),
            lambda events: answers.chat(job, events, logprobs=logprobs),
        )

    async def embeddings(request: Request) -> Response:
        asked = parse(EmbeddingRequest, await read_body(request, limit))
        endpoint, adapter = await serving.chosen(asked.model)
        if not endpoint.engine.capabilities.gives_embeddings:
            message = f"`{endpoint.name}` gives no embeddings: it runs in another engine"
            raise InvalidRequest(message, code="unsupported_value", param="model")
        texts_or_ids = prompts_of(asked.input, endpoint.vocab_size, "input")
        prompts = [await prompt_tokens(endpoint, each, "input") for each in texts_or_ids]
        check_room(endpoint, max(map(len, prompts)), 0, "input")
        sampling = Sampling(max_tokens=0, embed=True)
        job = answers.Job(request.state.request_id, asked.model, endpoint, adapter, prompts, sampling, n=1)
        encoding = asked.encoding_format or "float"
        return await run(request, job, asked, None, lambda events: answers.embeddings(job, events, encoding=encoding))

    async def run(request: Request, job: answers.Job, asked: Any, chunks: Any, whole: Any) -> Response:
        """Start a job and answer with a stream or a whole response, whichever was asked for."""
        request.state.admission.reserve(job.n_tokens_at_most)
        request.state.work = job  # for the access log and the client's account, when the last byte has been sent
        events = answers.start(job, metrics, deadline_s=serving.options.request_timeout_s, salt=request.state.salt)
        if getattr(asked, "stream", False):
            return EventStream(chunks(events), request_id=job.id, keep_alive_s=serving.options.keep_alive_s)
        return as_json(await _unless_disconnected(request, whole(events)))

    return {"completions": completions, "chat_completions": chat_completions, "embeddings": embeddings}


def _models_and_tokens(serving: Serving) -> Functions:
    limit = serving.options.max_body_bytes

    async def models() -> Response:
        return as_json(
            {"object": "list", "data": [card for endpoint in serving.endpoints.values() for card in cards_of(endpoint)]}
        )

    async def model(model: str) -> Response:
        base, _ = split_name(model)
        for card in cards_of(serving.endpoint(base)):
            if card["id"] == model:
                return as_json(card)
        raise NotFound(f"no adapter `{model[:100]}` here", code="model_not_found", param="model")

    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await read_body(request, limit))
        endpoint, _ = await serving.chosen(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise InvalidRequest("give `prompt` or `messages`, one of the two", param="prompt")
        if asked.messages is not None:
            ids = await chat_tokens(endpoint, asked.messages)
        else:
            check_size(endpoint, [asked.prompt or ""], "prompt")
            ids = await asyncio.to_thread(endpoint.tokenizer.encode, asked.prompt or "")
        return as_json({"tokens": ids, "count": len(ids), "max_model_len": endpoint.context_length})

    async def detokenize(request: Request) -> Response:
        asked = parse(DetokenizeRequest, await read_body(request, limit))
        endpoint, _ = await serving.chosen(asked.model)
        ids = prompts_of(asked.tokens, endpoint.vocab_size) if asked.tokens else [[]]
        return as_json({"prompt": endpoint.tokenizer.decode(ids[0], False)})  # type: ignore[arg-type]

    return {"models": models, "model": model, "tokenize": tokenize, "detokenize": detokenize}


def _adapter_loading(serving: Serving) -> Functions:
    limit, folder = serving.options.max_body_bytes, serving.options.adapter_loading

    def named(lora_name: str) -> tuple[Adapters, str, str]:
        """The adapters of the model that is meant, and the whole and the own name of this one."""
        base, name = split_name(lora_name)
        if name is None:
            taking = [each.name for each in serving.endpoints.values() if each.adapters is not None]
            if len(taking) != 1:
                shown = ", ".join(f"`{each}:{base[:64]}`" for each in taking)
                message = f"`lora_name` must say of which model it is: {shown or 'none here takes adapters'}"
                raise InvalidRequest(message, param="lora_name")
            base, name = taking[0], base
        if not MODEL_NAME.fullmatch(name):
            message = f"`{name[:64]}` is no name for an adapter: letters, digits, `.`, `_`, `-`, at most 64"
            raise InvalidRequest(message, param="lora_name")
        adapters = serving.endpoint(base).adapters
        if adapters is None:
            raise InvalidRequest(f"`{base}` takes no adapters: it runs in another engine", param="lora_name")
        return adapters, f"{base}:{name}", name

    def allowed() -> Path:
        if folder is None:
            raise Forbidden("this server loads no adapters; start it with --allow-adapter-loading FOLDER")
        return folder

    async def load_lora_adapter(request: Request) -> Response:
        within = allowed()
        asked = parse(LoadAdapterRequest, await read_body(request, limit))
        adapters, whole, name = named(asked.lora_name)
        path = Path()
        try:
            path = await asyncio.to_thread(find_inside, within, asked.lora_path)
            is_new = await adapters.add(name, path)
        except CheckpointNotFound as error:
            message = without_path(error, path, asked.lora_path)
            raise NotFound(message, code="adapter_not_found", param="lora_path") from None
        except AdapterExists as error:
            raise InvalidRequest(str(error), code="adapter_exists", param="lora_name") from None
        except MPTError as error:
            raise InvalidRequest(without_path(error, path, asked.lora_path), param="lora_path") from None
        log.info("adapter %s %s", whole, "loaded" if is_new else "was loaded already")
        return as_json({"id": whole, "object": "model", "loaded": True})

    async def unload_lora_adapter(request: Request) -> Response:
        allowed()
        asked = parse(UnloadAdapterRequest, await read_body(request, limit))
        adapters, whole, name = named(asked.lora_name)
        if not await adapters.remove(name):
            known = name in adapters.names()
            why = "was given when the server started, and stays" if known else "is not loaded here"
            raise NotFound(f"`{whole}` {why}", code="adapter_not_found", param="lora_name")
        log.info("adapter %s unloaded", whole)
        return as_json({"id": whole, "object": "model", "loaded": False})

    return {"load_lora_adapter": load_lora_adapter, "unload_lora_adapter": unload_lora_adapter}


def _operations(serving: Serving, metrics: Metrics) -> Functions:
    async def health() -> Response:
        failed = [name for name, endpoint in serving.endpoints.items() if endpoint.engine.failed]
        return as_json({"status": "failed", "models": failed} if failed else {"status": "ok"}, 503 if failed else 200)

    async def ready() -> Response:
        why = serving.not_ready()
        if why is None:
            return as_json({"status": "ready"})
        return respond(Unavailable(why, code="shutting_down" if serving.draining else "model_loading"))

    async def version() -> Response:
        return as_json(versions())

    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return {"health": health, "ready": ready, "version": version, "metrics": scrape}


def add_errors(app: FastAPI, metrics: HttpMetrics) -> None:
    """Answer every error with OpenAI's body, the framework's own too."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        if isinstance(error, RateLimited):
            metrics.rate_limited.labels(error.kind).inc()
        return respond(error)

    @app.exception_handler(MPTError)
    async def user_error(_: Request, error: MPTError) -> Response:
        log.error("an adapter cannot be used: %s", error)  # with a path, which clients need not know
        return respond(Unavailable("this adapter cannot be read here; ask who runs the server", code="adapter_damaged"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.scope['path'][:100]}"
        if error.status_code == 405:
            refused = MethodNotAllowed(f"`{where}` is not a method of this URL")
            refused.headers = dict(error.headers or {})
            return respond(refused)
        if error.status_code == 404:
            return respond(NotFound(f"there is no `{where}` here; the API begins at /v1"))
        return respond(InvalidRequest(str(error.detail)))


def versions() -> dict[str, str]:
    """What runs here, for /version."""
    return {"version": mpt.__version__, **{name: metadata.version(name) for name in ("torch", "transformers")}}


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await task


def as_json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
