"""The replicas of every model, as a router leases them from Ray Serve."""

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from mpt.engine.adapter_folders import available
from serving.cards import card_of, with_adapters
from serving.cluster.options import ROUTER, ClusterOptions, ReplicaOptions
from serving.cluster.relay import Lease, ReplicaLost
from serving.errors import Unavailable

log = logging.getLogger(__name__)

_REPORT_S = 2.0  # for what an answer cost, after its last byte


class RayFleet:
    """The replicas of every model, by way of Ray Serve's handles."""

    def __init__(self, options: ClusterOptions, before: "RayFleet | None") -> None:
        """before: the fleet that this one takes the place of."""
        old: Mapping[str, ReplicaOptions] = before._options.models if before is not None else {}
        handles: Mapping[str, DeploymentHandle] = before._handles if before is not None else {}
        self._app: str = serve.get_replica_context().app_name
        self._options: ClusterOptions = options
        # A handle asks for the way of routing once.
        self._handles: dict[str, DeploymentHandle] = {
            name: handles[name]
            if name in old and old[name].routing == model.routing
            else serve.get_deployment_handle(name, self._app, _check_exists=False)
            for name, model in options.models.items()
        }
        # Models that joined a running cluster; it is as ready as before until they are.
        joined = options.models.keys() - old.keys() if before is not None else set()
        joining: set[str] = before._joining if before is not None else set()
        self._joining: set[str] = joined | (joining & options.models.keys())
        self._cards: dict[str, dict[str, Any]] = {}

    def read_cards(self) -> None:
        """Read what /v1/models says of each model, from its files. Raises MPTError."""
        self._cards = {name: card_of(name, model) for name, model in self._options.models.items()}

    def cards(self) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for name, card in self._cards.items():
            model = self._options.models[name]
            found[name] = with_adapters(card, list(available(model.named_adapters, model.adapters)))
        return found

    @contextlib.asynccontextmanager
    async def lease(self, model: str, adapter: str | None, prefix: str) -> AsyncIterator[Lease]:
        handle = self._handles[model].options(
            stream=True,
            multiplexed_model_id=adapter or "",
            session_id=prefix if self._options.models[model].routing == "prefix" else "",
        )
        # Ray Serve cancels what was called in a request's context when its client goes. The lease is still wanted then.
        stream = contextvars.Context().run(handle.lease.remote)
        rest: asyncio.Future[Any] | None = None
        try:
            try:
                first = await stream.__anext__()
            except BackPressureError as error:
                raise Unavailable("every replica is busy and the queue is full; try again later") from error
            except (RayError, RayServeException, StopAsyncIteration) as error:
                raise ReplicaLost(f"no lease: {type(error).__name__}") from error
            rest = asyncio.ensure_future(_next(stream))

            async def report() -> dict[str, Any]:
                with contextlib.suppress(TimeoutError, ReplicaLost):
                    return await asyncio.wait_for(asyncio.shield(rest), _REPORT_S)
                return {}

            headers = {"authorization": f"Bearer {first['token']}", "x-mpt-lease": first["lease"]}
            lost = asyncio.get_running_loop().create_future()
            rest.add_done_callback(lambda done: _tell(lost, done))
            yield Lease(first["url"], headers, first["replica"], lost, report)
        finally:
            if rest is not None:  # else there is nothing to cancel, and cancelling would raise the error again
                stream.cancel()
                rest.cancel()
                await asyncio.gather(rest, return_exceptions=True)

    async def runs(self) -> dict[str, dict[str, Any]]:
        return dict(await self._ask(self._handles.values(), "runs"))

    async def expositions(self) -> dict[str, str]:
        own = serve.get_deployment_handle(ROUTER, self._app)
        return dict(await self._ask((own, *self._handles.values()), "exposition"))

    async def _ask(self, handles: Iterable[DeploymentHandle], method: str) -> list[tuple[str, Any]]:
        """What a method of every replica says; those that do not answer are left out."""
        asked = [handle.broadcast(method) for handle in handles]
        answers = await asyncio.gather(*(each.results_async(timeout_s=5) for each in asked), return_exceptions=True)
        found: list[tuple[str, Any]] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                log.warning("no %s of a deployment: %r", method, answer)
                continue
            found += [each for each in answer if not isinstance(each, BaseException)]
        return found

    async def not_ready(self) -> str | None:
        status = await asyncio.to_thread(serve.status)
        deployments = status.applications[self._app].deployments
        running = {name for name, found in deployments.items() if found.replica_states.get("RUNNING")}
        self._joining -= running
        wanted = {name for name, model in self._options.models.items() if model.min_replicas} - self._joining
        waiting = sorted(wanted - running)
        return f"no replica of {', '.join(waiting)}" if waiting else None


async def _next(stream: Any) -> dict[str, Any]:
    """The end of a lease: what its answer cost. Raises ReplicaLost when its replica died."""
    try:
        return await stream.__anext__()
    except (RayError, RayServeException, StopAsyncIteration) as error:
        raise ReplicaLost(type(error).__name__) from error


def _tell(lost: "asyncio.Future[None]", done: "asyncio.Future[Any]") -> None:
    if not lost.done() and not done.cancelled() and (error := done.exception()) is not None:
        lost.set_exception(error)
        lost.exception()  # it may be that nobody waits any more


def replica_id() -> str:
    return serve.get_replica_context().replica_id.unique_id
