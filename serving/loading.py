"""The routes by which clients load and unload models, where the server was started to allow it."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response

from serving.bodies import read
from serving.endpoints import Serving
from serving.errors import Conflict, Forbidden, InvalidRequest
from serving.options import EVERYBODY
from serving.replies import as_json
from serving.routes import ModelRequest
from serving.sse import unless_disconnected

log = logging.getLogger(__name__)


def may_load(serving: Serving, request: Request) -> bool:
    """Whether the client of a request may load and unload models."""
    return bool(serving.options.model_loading & {EVERYBODY, request.state.client})


def model_loading(serving: Serving) -> dict[str, Callable[..., Any]]:
    """What answers each of these routes, by its name in `routes.py`."""
    options = serving.options

    async def named(request: Request) -> str:
        """The model that a client may load or unload."""
        if not options.model_loading:
            raise Forbidden("this server loads no models by request; start it with --allow-model-loading CLIENT")
        if not may_load(serving, request):
            raise Forbidden("this key may not load and unload models; ask who runs the server")
        name = (await read(request, ModelRequest, options)).model
        serving.check(name)
        if name not in serving.lifecycle.models:
            raise InvalidRequest(f"`{name}` stays as it is: this process was given it loaded", param="model")
        return name

    def answer(name: str) -> Response:
        return as_json({"id": name, "object": "model", "state": serving.lifecycle.state(name)})

    async def load_model(request: Request) -> Response:
        name = await named(request)
        await unless_disconnected(request, serving.endpoint(name, request.state.hold))
        return answer(name)

    async def unload_model(request: Request) -> Response:
        name = await named(request)
        try:
            await serving.lifecycle.unload(name)
        except Conflict:
            log.info("%s: not unloaded for %s: requests use it", name, request.state.client)
            raise
        return answer(name)

    return {"load_model": load_model, "unload_model": unload_model}
