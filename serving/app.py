"""The HTTP app: OpenAI's routes over the endpoints of one process.

Made by one function and run in two places: by `mpt serve` on uvicorn, and inside a Ray Serve replica. Bodies are read
here under a byte limit and parsed in `serving/protocol/`, since FastAPI's own reading takes NaN, "16" for 16 and
unknown fields; the OpenAPI schema is given by hand instead.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

import mpt
from mpt.build import versions
from mpt.engine.adapter_folders import find_inside, without_path
from mpt.engine.adapters import AdapterExists, Adapters
from mpt.errors import CheckpointNotFound, MPTError
from mpt.options import MODEL_NAME, split_name
from serving.auth import Door, book_of, keys_of
from serving.batch.api import batch_functions
from serving.batch.service import BatchDoor, BatchService
from serving.batch.store import Store
from serving.bodies import read
from serving.docs import add_docs
from serving.endpoints import Holding, Serving
from serving.errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from serving.front import root
from serving.gate import Gate
from serving.generation import Generation
from serving.heads import Hosts
from serving.lifecycle import Hold
from serving.lifecycle_metrics import LifecycleCollector
from serving.listing import listing
from serving.loading import model_loading
from serving.metrics import Metrics
from serving.refusals import add_errors
from serving.replies import as_json
from serving.request_log import request_log
from serving.routes import LoadAdapterRequest, UnloadAdapterRequest, add_routes
from serving.tracing import Traced, spans_to
from serving.wire import respond

log = logging.getLogger(__name__)

Functions = dict[str, Callable[..., Any]]  # what answers each route, by its name in `routes.py`


def make_app(serving: Serving, door: Door | None = None, hosts: Hosts | None = None) -> FastAPI:
    """The ASGI app over these endpoints; they may still be loading.

    door: who is let in; the keys of the options by default. Another one stands behind a router, which logs. hosts: the
    names that the server may be asked by, None for any.
    """
    options = serving.options
    log_format = options.log_format if door is None else None
    metrics = Metrics(lambda: list(serving.endpoints.values()))
    app = FastAPI(title="MPT", version=mpt.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.redirect_slashes = False  # the redirect's host would be whatever the client's Host header says
    app.state.serving, app.state.metrics = serving, metrics
    app.state.request_log = request_log(options.log_requests)
    keys = keys_of(options)
    keys.note_unknown(serving.names())
    door = door or keys
    service = None
    if options.batch_dir is not None:
        door = BatchDoor(door)
        service = BatchService(Store(options.batch_dir), app, door, serving.takes_priority)
    app.state.batches = service
    metrics.registry.register(LifecycleCollector(serving.lifecycle))
    metrics.connections.set_function(lambda: serving.connections.n_open)
    functions = batch_functions(service, door, options)
    functions |= Generation(serving, metrics).functions() | listing(serving) | _adapter_loading(serving)
    functions |= model_loading(serving) | _operations(serving, metrics)
    front = root(needs_key=keys.required, docs=options.docs, demo=options.demo)
    add_routes(app, functions | {"root": front})
    add_errors(app, metrics)
    if options.docs:
        add_docs(app, needs_key=keys.required)
    app.add_middleware(Holding, serving=serving)
    app.add_middleware(
        Gate, door=door, metrics=metrics, log_format=log_format, book=book_of(keys, options), hosts=hosts
    )
    app.add_middleware(Traced, spans=spans_to(options.otel_endpoint))
    if options.cors_origins:  # outside the gate: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _adapter_loading(serving: Serving) -> Functions:
    folder = serving.options.adapter_loading

    async def named(lora_name: str, hold: Hold) -> tuple[Adapters, str, str]:
        """The adapters of the model that is meant, and the whole and the own name of this one."""
        base, name = split_name(lora_name)
        if name is None:
            taking = [each for each in serving.names() if serving.lifecycle.adapter_names(each) is not None]
            if len(taking) != 1:
                shown = ", ".join(f"`{each}:{base[:64]}`" for each in taking)
                message = f"`lora_name` must say of which model it is: {shown or 'none here takes adapters'}"
                raise InvalidRequest(message, param="lora_name")
            base, name = taking[0], base
        if not MODEL_NAME.fullmatch(name):
            message = f"`{name[:64]}` is no name for an adapter: letters, digits, `.`, `_`, `-`, at most 64"
            raise InvalidRequest(message, param="lora_name")
        serving.check_adapter(base, name)
        adapters = (await serving.endpoint(base, hold)).adapters
        if adapters is None:
            raise InvalidRequest(f"`{base}` takes no adapters: it runs in another engine", param="lora_name")
        return adapters, f"{base}:{name}", name

    def allowed() -> Path:
        if folder is None:
            raise Forbidden("this server loads no adapters; start it with --allow-adapter-loading FOLDER")
        return folder

    async def load_lora_adapter(request: Request) -> Response:
        within = allowed()
        asked = await read(request, LoadAdapterRequest, serving.options)
        adapters, whole, name = await named(asked.lora_name, request.state.hold)
        try:
            path = await asyncio.to_thread(find_inside, within, asked.lora_path)
        except CheckpointNotFound as error:
            raise NotFound(str(error), code="adapter_not_found", param="lora_path") from None
        try:
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
        asked = await read(request, UnloadAdapterRequest, serving.options)
        adapters, whole, name = await named(asked.lora_name, request.state.hold)
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
        if failed:
            return as_json({"status": "failed", "models": failed}, 503)
        status = "shutting down" if serving.draining else "loading" if serving.loading else "ok"
        places = serving.connections
        full = {"connections": {"open": places.n_open, "limit": places.limit}} if places.are_full else {}
        return as_json({"status": status, **full}, 200 if status == "ok" else 503)

    async def ready() -> Response:
        why = serving.not_ready()
        if why is None:
            return as_json({"status": "ready"})
        return respond(Unavailable(why, code="shutting_down" if serving.draining else "model_loading"), "/ready")

    async def version() -> Response:
        return as_json(versions())

    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def ollama_version() -> Response:
        return as_json({"version": mpt.__version__})

    return {"health": health, "ready": ready, "version": version, "metrics": scrape, "ollama_version": ollama_version}
