"""The front of a cluster: one OpenAI base URL over many models, each with its own replicas.

Who may ask, how much, and whether a body is well formed is settled here. The answer is computed by a replica, whose
HTTP response comes through byte by byte as it is (relaying through Ray's own streams costs ten times as much, see
docs/benchmarks.md). Which replica, and how long it stays ours, is a lease. Nothing here knows Ray: `Fleet` is all it
needs, and `serving/cluster/deployment.py` gives it.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import mpt
from mpt.build import versions
from mpt.options import split_name
from serving.access import may_use, reached
from serving.aside import aside
from serving.auth import Door, Keys, book_of, keys_of
from serving.bodies import read, read_body
from serving.cluster.options import SCALES, ClusterOptions
from serving.cluster.relay import Fleet, Lessor, Relay, Relayed, RouterMetrics, Traffic
from serving.dialects import ollama
from serving.dialects.anthropic import CountRequest, MessagesRequest
from serving.dialects.ollama import (
    EmbedRequest,
    GenerateRequest,
    OldEmbedRequest,
    OllamaChatRequest,
    ShowRequest,
)
from serving.dialects.responses import ResponsesRequest
from serving.docs import add_docs
from serving.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from serving.front import root
from serving.gate import Gate
from serving.heads import Hosts
from serving.limits import RateLimiter
from serving.options import is_loopback
from serving.protocol.body import parse, prompts_of
from serving.protocol.generation import (
    ALL_THERE_IS,
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serving.refusals import add_errors
from serving.replies import as_json
from serving.request_log import request_log
from serving.routes import ROUTES, add_routes
from serving.tracing import Traced, spans_to
from serving.wire import respond

_BYTES_PER_TOKEN = 4  # OpenAI's rule of thumb; what a client is charged until the replica has counted
_UNKNOWN_LENGTH = 256  # tokens charged meanwhile for a chat that sets no limit
_ANY_TOKEN = 1 << 31  # a vocabulary's size: the replica knows the real one
_KEEPS_NONE = "a cluster keeps no responses, since its replicas change; send the whole conversation as `input`"
_PREFIX_CHARACTERS = 1024  # characters that decide which replica's cache a prompt may be in


class Kept:
    """What a router keeps when its options change: counts, what is on its way through, connections, clients' limits."""

    def __init__(self) -> None:
        self.metrics, self.traffic = RouterMetrics(), Traffic()
        self.session, self.limiter = _Session(), RateLimiter()
        self._made: dict[str, tuple[object, Any]] = {}

    def made(self, what: str, told: object, make: Callable[[], Any]) -> Any:
        """What was made, unless it is told something else now; requests on their way still use the one before."""
        if what not in self._made or self._made[what][0] != told:
            self._made[what] = told, make()
        return self._made[what][1]

    def exposition(self) -> str:
        """This router's own metrics."""
        return generate_latest(self.metrics.registry).decode()


def make_router(
    fleet: Fleet, options: ClusterOptions, door: Door, hosts: Hosts | None = None, kept: Kept | None = None
) -> FastAPI:
    """The ASGI app in front of a fleet; the same routes and errors as `serving.app.make_app`."""
    kept = kept or Kept()
    app = FastAPI(title="MPT", version=mpt.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # the redirect's host would be whatever the client's Host header says
    metrics, traffic, session = kept.metrics, kept.traffic, kept.session
    cards = fleet.cards
    keys = door if isinstance(door, Keys) else keys_of(options)
    keys.note_unknown(cards())
    several = options.replica_host == "node"
    told = (options.quota_store, options.request_timeout_s, keys.have_quotas, several)
    book = kept.made("book", told, lambda: book_of(keys, options, several_machines=several))
    for name in cards():
        metrics.lost.labels(name)  # 0 from the start: an alert sees the first loss only as a change

    def find(model: str) -> tuple[str, str | None]:
        if traffic.draining:
            raise Unavailable("the server is shutting down; try another", code="shutting_down")
        base, adapter = split_name(model)
        served = reached(cards())
        if base not in served or not may_use(model):
            known = ", ".join(f"`{name}`" for name in served)
            raise NotFound(f"no model `{model[:100]}` here; served: {known}", code="model_not_found", param="model")
        return base, adapter

    async def relay(request: Request, kind: type[BaseModel]) -> Response:
        raw = await read_body(request, options)
        served = reached(cards())
        asked = await aside(request, _understood, kind, raw, served[0] if len(served) == 1 else None)
        base, adapter = find(asked.model)
        work = Relayed(asked.model, asked.n_prompt, asked.n_tokens)
        request.state.admission.reserve(work.estimate)
        await request.state.account.hold(work.estimate)
        request.state.work = work
        lease = Lessor(fleet, base, adapter, asked.prefix, request.state.salt)
        return Relay(request, raw, work, lease, await session.get(), metrics, options, traffic, asked.is_streamed)

    def relayed(kind: type[BaseModel]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            return await relay(request, kind)

        return answer

    functions = _listing(fleet, find, options, traffic)
    functions |= {route.name: relayed(route.body) for route in ROUTES if route.is_relayed and route.body}
    needs_key = not isinstance(door, Keys) or door.required
    add_routes(app, functions | {"root": root(needs_key=needs_key, docs=options.docs, demo=False)})
    app.state.request_log = kept.made("log", options.log_requests, lambda: request_log(options.log_requests))
    add_errors(app, metrics)
    is_local = options.replica_host == "loopback"
    if is_local:
        app.add_middleware(_FromHereOnly)
    if options.docs:
        add_docs(app, needs_key=needs_key, also=(403,) if is_local else ())
    app.add_middleware(  # Ray Serve, which is around this app, sends x-request-id
        Gate,
        door=door,
        metrics=metrics,
        log_format=options.log_format,
        book=book,
        names_requests=False,
        hosts=hosts,
        limiter=kept.limiter,
    )
    spans = kept.made("spans", options.otel_endpoint, lambda: spans_to(options.otel_endpoint))
    app.add_middleware(Traced, spans=spans)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _listing(
    fleet: Fleet, find: Callable[[str], tuple[str, str | None]], options: ClusterOptions, traffic: Traffic
) -> dict[str, Callable[..., Any]]:
    """What answers each route that no replica answers, by its name in `routes.py`."""
    cards = fleet.cards

    async def adapter_loading(_: Request) -> Response:
        raise NotFound("a cluster loads no adapters by request; put them into the folder `adapters` of their model")

    async def batches() -> Response:
        raise NotFound(
            "a cluster keeps no files and runs no batches; answer the file with "
            "`mpt run-batch requests.jsonl results.jsonl --url` and this cluster's URL"
        )

    async def model_loading(_: Request) -> Response:
        raise NotFound(f"a cluster loads no models by request; {SCALES}")

    async def models() -> Response:
        return as_json({"object": "list", "data": await all_cards()})

    async def model(model: str) -> Response:
        base, _ = find(model)
        for card in cards()[base]:
            if card["id"] == model:
                return as_json({**card, "runs": (await fleet.runs()).get(base)})
        raise NotFound(f"no adapter `{model[:100]}` here", code="model_not_found", param="model")

    async def all_cards() -> list[dict[str, Any]]:
        runs = await fleet.runs()
        shown = [(name, card) for name, found in cards().items() for card in found if may_use(card["id"])]
        return [{**card, "runs": runs.get(name)} for name, card in shown]

    async def ollama_tags() -> Response:
        return as_json(ollama.tags(await all_cards()))

    async def ollama_ps() -> Response:
        return as_json(ollama.running(await all_cards()))

    async def ollama_show(request: Request) -> Response:
        name = (await read(request, ShowRequest, options)).model_name()
        find(name)
        return as_json(ollama.shown(next(card for card in await all_cards() if card["id"] == name)))

    async def ollama_version() -> Response:
        return as_json({"version": mpt.__version__})

    async def no_response(response_id: str) -> Response:
        raise NotFound(f"no response `{response_id[:80]}` is kept here: {_KEEPS_NONE}", code="response_not_found")

    async def no_tokenizer() -> Response:
        raise NotFound("a cluster reads no tokenizers; `/tokenize` asks a replica, and `mpt serve` has this route")

    async def load() -> Response:
        return as_json({"server_load": traffic.n})

    async def health() -> Response:
        return as_json({"status": "shutting down"}, 503) if traffic.draining else as_json({"status": "ok"})

    async def ready() -> Response:
        if traffic.draining:
            return respond(Unavailable("shutting down", code="shutting_down"), "/ready")
        why = await fleet.not_ready()
        if why is None:
            return as_json({"status": "ready"})
        return respond(Unavailable(why, code="model_loading"), "/ready")

    async def version() -> Response:
        return as_json(versions())

    async def scrape() -> Response:
        """Prometheus metrics of every router and replica, told apart by the label `replica`."""
        text = await asyncio.to_thread(merged, await fleet.expositions())
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    return {
        "models": models, "model": model, "health": health, "ready": ready, "version": version, "metrics": scrape,
        "load_lora_adapter": adapter_loading, "unload_lora_adapter": adapter_loading, "load": load,
        "load_model": model_loading, "unload_model": model_loading,
        "response": no_response, "delete_response": no_response, "tokenizer_info": no_tokenizer,
        "ollama_tags": ollama_tags, "ollama_ps": ollama_ps, "ollama_show": ollama_show,
        "ollama_version": ollama_version,
        **{route.name: batches for route in ROUTES if route.path.startswith(("/v1/files", "/v1/batches"))},
    }  # fmt: skip


class _FromHereOnly:
    """Refuses other machines: Ray binds a replica's port to every address, whatever the config's host is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope.get("client") or ("127.0.0.1", 0)
        if scope["type"] == "http" and not is_loopback(peer[0]):
            await respond(Forbidden("this server is for its own machine only"), scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _Session:
    """One HTTP client for all replicas, made inside the event loop that uses it."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def get(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                auto_decompress=False,
                read_bufsize=1 << 16,
            )
        return self._session


def merged(expositions: Mapping[str, str]) -> bytes:
    """Metrics of several processes as one exposition, each sample with the process's name as `replica`."""
    families: dict[str, Metric] = {}
    for process, text in expositions.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                labels = {**sample.labels, "replica": process}
                family.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)

    class Found:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry()
    registry.register(Found())
    return generate_latest(registry)


@dataclass(frozen=True)
class _Asked:
    """What a router wants to know of a body. prefix: what decides which replica may have a prompt in its cache.

    n_prompt, n_tokens: what its client is charged until a replica has counted, for its prompt and with its answer.
    """

    model: str
    is_streamed: bool
    n_prompt: int
    n_tokens: int
    prefix: str


def _understood(kind: type[BaseModel], raw: bytes, model: str | None) -> _Asked:
    asked = _as_openai(parse(kind, raw, model))
    return _Asked(asked.model, bool(getattr(asked, "stream", False)), *_tokens(asked), _prefix(asked))


def _as_openai(asked: Any) -> Any:
    """The chat, the completion or the embedding that a dialect's body asks for. Raises InvalidRequest."""
    if isinstance(asked, ResponsesRequest) and asked.previous_response_id is not None:
        message = f"`previous_response_id`: {_KEEPS_NONE}"
        raise InvalidRequest(message, code="unsupported_value", param="previous_response_id")
    if isinstance(asked, EmbedRequest | OldEmbedRequest):
        return asked.as_embedding()
    if isinstance(asked, CountRequest) and not isinstance(asked, MessagesRequest):
        return asked
    if isinstance(asked, ResponsesRequest | MessagesRequest | OllamaChatRequest | GenerateRequest):
        return asked.as_chat()
    return asked


def _tokens(asked: Any) -> tuple[int, int]:
    """What a client is charged for a request until a replica has counted: for its prompt, and with its answer."""
    if isinstance(asked, ChatRequest):
        wanted = asked.wanted_tokens() or _UNKNOWN_LENGTH
        n_prompt = sum(_text_tokens(message.text()) for message in asked.messages)
        return n_prompt, n_prompt + (asked.n or 1) * wanted
    if isinstance(asked, CompletionRequest):
        prompts = prompts_of(asked.prompt, _ANY_TOKEN)
        wanted = DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        wanted = _UNKNOWN_LENGTH if wanted == ALL_THERE_IS else wanted
        n_prompt = _prompt_tokens(prompts)
        return n_prompt, n_prompt + len(prompts) * (asked.best_of or asked.n or 1) * wanted
    if isinstance(asked, EmbeddingRequest):
        n_prompt = _prompt_tokens(prompts_of(asked.input, _ANY_TOKEN, "input"))
        return n_prompt, n_prompt
    return 0, 0


def _prompt_tokens(prompts: list[str | list[int]]) -> int:
    return sum(_text_tokens(prompt) if isinstance(prompt, str) else len(prompt) for prompt in prompts)


def _text_tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _prefix(asked: Any) -> str:
    """What decides which replica may have a prompt in its cache; the same in every turn of a conversation."""
    if isinstance(asked, ChatRequest):
        first = [message.text() for message in asked.messages[:2]]
        text = "\n".join(first)
    elif isinstance(asked, CompletionRequest):
        prompt = asked.prompt
        text = prompt if isinstance(prompt, str) else orjson.dumps(prompt[:_PREFIX_CHARACTERS]).decode()
    else:
        return ""
    return hashlib.sha256(text[:_PREFIX_CHARACTERS].encode("utf-8", "replace")).hexdigest()[:16]
