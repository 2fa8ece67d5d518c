"""The models of one process as they become ready, by the names that requests ask for."""

from dataclasses import dataclass, field

from mpt.engine.adapters import split_name
from mpt.engine.endpoint import Endpoint
from mpt.lora import Adapter
from serving.errors import NotFound, Unavailable
from serving.options import ServeOptions


@dataclass
class Serving:
    """What the routes share: the endpoints as they become ready, and whether the server is leaving."""

    options: ServeOptions
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    draining: bool = False
    keeps_responses: bool = True  # False behind a router: the next request of a conversation meets another process

    async def chosen(self, model: str) -> tuple[Endpoint, Adapter | None]:
        """The endpoint, and the adapter, of a request's `model`. Raises like `endpoint`."""
        base, name = split_name(model)
        if name is None and (owner := self._owner(model)) is not None:
            base, name = owner, model
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

    def _owner(self, adapter: str) -> str | None:
        """The one model that has an adapter of this name, where no model is called so."""
        if adapter in self.endpoints or adapter in self.loading:
            return None
        owners = [
            name
            for name, endpoint in self.endpoints.items()
            if endpoint.adapters is not None and adapter in endpoint.adapters.names()
        ]
        return owners[0] if len(owners) == 1 else None

    @property
    def only_model(self) -> str | None:
        """The name of the model that is served or loads, if there is one alone."""
        names = [*self.endpoints, *self.loading]
        return names[0] if len(names) == 1 else None

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
        endpoint = self.endpoints.get(self._owner(model) or split_name(model)[0])
        return endpoint is not None and "priority" in endpoint.engine.capabilities.request.claimed

    def not_ready(self) -> str | None:
        """Why requests cannot be answered now, None if they can."""
        if self.draining:
            return "shutting down"
        if self.loading:
            return "loading " + ", ".join(sorted(self.loading))
        stopped = [name for name, endpoint in self.endpoints.items() if not endpoint.engine.ready]
        return f"not answering: {', '.join(stopped)}" if stopped or not self.endpoints else None
