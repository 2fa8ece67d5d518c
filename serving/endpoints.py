"""The models of one process, by the names that requests ask for, and who holds which of them."""

from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mpt.engine.endpoint import Endpoint
from mpt.errors import MPTError
from mpt.lora import Adapter
from mpt.options import split_name
from serving.access import may_reach, may_use, reached
from serving.connections import Connections
from serving.errors import ApiError, NotFound, Unavailable, adapter_damaged
from serving.lifecycle import Hold, Lifecycle
from serving.options import ServeOptions
from serving.sse import unless_disconnected


@dataclass
class Serving:
    """What the routes share: the endpoints that are loaded, how others come and go, and whether the server is leaving.

    loading: what must be there before the server is ready.
    """

    options: ServeOptions
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    draining: bool = False
    connections: Connections = field(default_factory=Connections)
    keeps_responses: bool = True  # False behind a router: the next request of a conversation meets another process

    def __post_init__(self) -> None:
        self.lifecycle = Lifecycle(self.options, self.endpoints)

    def names(self) -> list[str]:
        """Every served name that is there for the client, whether or not its model is loaded."""
        return reached(dict.fromkeys([*self.lifecycle.models, *self.endpoints, *sorted(self.loading)]))

    def must_wait(self, model: str) -> bool:
        """Whether a request's `model` has to be loaded first. Raises like `endpoint` does before it waits."""
        base, adapter = self._split(model)
        self.check_adapter(base, adapter)
        return self.lifecycle.must_wait(base)

    async def asked_for(self, model: str, request: Request) -> tuple[Endpoint, Adapter | None]:
        """As `chosen`, for a request whose body has been read. Raises ClientDisconnect when its client goes away."""
        must_wait, chosen = self.must_wait(model), self.chosen(model, request.state.hold)
        return await (unless_disconnected(request, chosen) if must_wait else chosen)

    async def chosen(self, model: str, hold: Hold) -> tuple[Endpoint, Adapter | None]:
        """The endpoint, and the adapter, of a request's `model`. Raises like `endpoint`."""
        base, name = self._split(model)
        self.check_adapter(base, name)
        endpoint = await self.endpoint(base, hold)
        if name is None:
            return endpoint, None
        try:
            adapter = await endpoint.adapters.get(name) if endpoint.adapters is not None else None
        except ApiError:
            raise
        except MPTError as error:
            raise adapter_damaged(error) from error
        if adapter is None:
            known = [] if endpoint.adapters is None else endpoint.adapters.names()
            shown = ", ".join(f"`{base}:{each}`" for each in known) or "none"
            raise NotFound(
                f"no adapter `{name[:100]}` of `{base}` here; there are: {shown}", code="model_not_found", param="model"
            )
        return endpoint, adapter

    async def endpoint(self, name: str, hold: Hold) -> Endpoint:
        """The endpoint of a served name, held by a request.

        Raises NotFound, or Unavailable while it loads at start, where it cannot be loaded, or when the server leaves.
        """
        self.check(name)
        return await self.lifecycle.get(name, hold)

    @property
    def only_model(self) -> str | None:
        """The name of the model that is served, if there is one alone."""
        names = self.names()
        return names[0] if len(names) == 1 else None

    def check(self, name: str) -> None:
        """See that a name is served and may be asked for now. Raises NotFound and Unavailable."""
        if self.draining:
            raise Unavailable("the server is shutting down; try another replica", code="shutting_down")
        if not may_reach(name):
            raise self._unknown(name)
        if name in self.endpoints:
            return
        if name in self.loading:
            raise Unavailable(f"`{name}` is still loading; try again soon", code="model_loading")
        if name not in self.lifecycle.models:
            raise self._unknown(name)

    def check_adapter(self, base: str, adapter: str | None) -> None:
        """As `check`, for a model or for an adapter of it."""
        self.check(base)
        whole = base if adapter is None else f"{base}:{adapter}"
        if not may_use(whole):
            raise self._unknown(whole)

    def _unknown(self, name: str) -> NotFound:
        known = ", ".join(f"`{known}`" for known in self.names())
        return NotFound(f"no model `{name[:100]}` here; served: {known}", code="model_not_found", param="model")

    def takes_priority(self, model: str) -> bool:
        """Whether requests for a model may have a `priority`."""
        base, _ = self._split(model)
        if (endpoint := self.endpoints.get(base)) is not None:
            return "priority" in endpoint.engine.capabilities.request.claimed
        unloaded = self.lifecycle.models.get(base)
        return unloaded is not None and not unloaded.options.is_remote  # every engine of this process does

    def not_ready(self) -> str | None:
        """Why requests cannot be answered now, None if they can. What is loaded when asked for counts as there."""
        if self.draining:
            return "shutting down"
        if self.loading:
            return "loading " + ", ".join(sorted(self.loading))
        stopped = [name for name, endpoint in self.endpoints.items() if not endpoint.engine.ready]
        return f"not answering: {', '.join(stopped)}" if stopped or not self.names() else None

    def leave(self) -> None:
        """Take no new request, and begin no load."""
        self.draining = True
        self.lifecycle.close()

    def _split(self, model: str) -> tuple[str, str | None]:
        """The base and the adapter of a request's `model`."""
        base, name = split_name(model)
        if name is None and (owner := self._owner(model)) is not None:
            return owner, model
        return base, name

    def _owner(self, adapter: str) -> str | None:
        """The one model that has an adapter of this name, where no model is called so."""
        if adapter in self.endpoints or adapter in self.lifecycle.models or adapter in self.loading:
            return None
        owners = [name for name in self.names() if adapter in (self.lifecycle.adapter_names(name) or ())]
        return owners[0] if len(owners) == 1 else None


class Holding:
    """ASGI middleware: a request holds the models that it uses, from its first byte to the last of its answer."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        with self._serving.lifecycle.holding() as state["hold"]:
            try:
                await self._app(scope, receive, send)
            finally:
                if (work := state.get("work")) is not None:
                    state["work"] = _Done(work.n_tokens, work.log_fields())


class _Done:
    """What the gate asks of a request's work, without the model: an open connection keeps its last request."""

    def __init__(self, n_tokens: int, fields: dict[str, Any]) -> None:
        self.n_tokens, self._fields = n_tokens, fields

    def log_fields(self) -> dict[str, Any]:
        return self._fields
