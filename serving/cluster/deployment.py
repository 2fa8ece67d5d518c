"""The cluster on Ray Serve: `serve run serving.cluster.deployment:app`, `serve deploy serving/config.yaml`.

Two kinds of deployment. `Router` is the front: one OpenAI base URL (`router.py` beside this file). `Model`, one per
served model, holds an engine and the same HTTP app as `mpt serve`, on a port of its own.

What goes through Ray is the lease of a replica, not its tokens. A lease is a call that lasts as long as the answer, so
Ray counts ongoing requests, scales on them, holds requests back, drains a replica that leaves and tells when one died;
the answer itself goes from the replica's socket to the router's, at the speed of `mpt serve`.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from mpt.engine.adapter_folders import MAX_LOADED
from mpt.errors import MPTError, UserError
from mpt.processors import allowed_threads
from serving.auth import Client, Headers, Keys
from serving.cluster.fleet import RayFleet, replica_id
from serving.cluster.options import (
    NO_KEYS,
    ROUTER,
    SETTINGS,
    ClusterOptions,
    ReplicaHttp,
    ReplicaOptions,
    read_args,
    router_keys,
)
from serving.cluster.own_address import stay_on_this_machine
from serving.cluster.relay import CHARGED
from serving.cluster.router import Kept, make_router
from serving.cluster.settings import Settings, digest_of
from serving.cluster.timeouts import HEALTH_CHECK_S, Timeouts
from serving.cluster.versions import version_of, with_version
from serving.connections import Clocks, Connections, timed_protocol
from serving.heads import Hosts
from serving.logs import set_up_logging
from serving.options import ServeOptions

log = logging.getLogger(__name__)

_UNUSED_S = 30.0  # a lease whose request never came is over
_SETTINGS_AGAIN_S = 1.0
_LAST_EVENTS_S = 1.0  # for errors on their way to the routers, before a replica without an engine leaves
_AFFINE = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_ONE_MORE = 1  # per cent of the replicas, which Ray rounds up: one starts before one of the others stops


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application for the `args` of a Serve config (`serving.cluster.options.ClusterOptions`). Raises UserError.

    Deployed over another, it restarts the replicas of the models whose options changed, and no other. The routers go
    on with the new `args`, which they hear of through `Settings`.
    """
    return application(args, {})


def application(args: Mapping[str, Any], leaving: Mapping[str, ReplicaOptions]) -> serve.Application:
    """`app`, and models that the routers do not know any more but whose replicas stay. Raises UserError."""
    options = read_args(args)
    if options.replica_host == "node" and not (options.api_keys or options.api_key_file or options.no_auth):
        raise UserError(NO_KEYS)
    http, n_models = options.replica_http, len(options.models)
    models = {
        name: _deployment(name, model, http).bind(name, model, http, n_models, _n_sharing(model, options))
        for name, model in {**leaving, **options.models}.items()
    }
    settings = serve.deployment(Settings).options(
        name=SETTINGS,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
        max_surge_percent=_ONE_MORE,
        user_config=json.loads(json.dumps(args)),
    )
    router = serve.deployment(Router).options(
        name=ROUTER,
        max_ongoing_requests=10_000,
        num_replicas=options.router_replicas,
        ray_actor_options={"num_cpus": options.router_num_cpus},
        graceful_shutdown_timeout_s=Timeouts.of(options).router_s,
        max_surge_percent=_ONE_MORE,
    )
    bound = with_version(settings, version_of(SETTINGS)).bind()
    return with_version(router, version_of(ROUTER)).bind(bound, models)


def _deployment(name: str, model: ReplicaOptions, http: ReplicaHttp) -> serve.Deployment:
    """How Ray runs one model."""
    max_running = model.sized(is_paged=model.num_gpus > 0).max_running
    assert max_running is not None
    n = model.tensor_parallel  # processes, all of them in the replica's own actor, so on one machine
    actor = {"num_cpus": model.num_cpus * n, "num_gpus": model.num_gpus * n, "resources": dict(model.resources)}
    routing = RequestRouterConfig(request_router_class=_AFFINE) if model.routing == "prefix" else RequestRouterConfig()
    settings: dict[str, Any] = {
        "name": name,
        "ray_actor_options": actor,
        "max_ongoing_requests": max_running,
        "max_queued_requests": model.max_waiting,
        "graceful_shutdown_timeout_s": model.graceful_shutdown_timeout_s,
        "health_check_period_s": HEALTH_CHECK_S,
        "request_router_config": routing,
        "max_surge_percent": _ONE_MORE if model.update_order == "start_first" else 0,
    }
    if model.min_replicas == model.max_replicas:
        settings["num_replicas"] = model.min_replicas
    else:
        settings["autoscaling_config"] = {
            "min_replicas": model.min_replicas,
            "initial_replicas": model.initial_replicas,
            "max_replicas": model.max_replicas,
            "target_ongoing_requests": model.target_ongoing_requests or 0.7 * max_running,
            "upscale_delay_s": model.upscale_delay_s,
            "downscale_delay_s": model.downscale_delay_s,
        }
    version = version_of(name, asdict(model.model), asdict(http))
    return with_version(serve.deployment(Model).options(**settings), version)


# -- a model's replica ---------------------------------------------------------------------------------------------


@dataclass
class _Ticket:
    """A lease on the replica's side."""

    begun: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    report: dict[str, Any] = field(default_factory=dict)


class Model:
    """One replica of one model: its engine, and its HTTP app for those who hold a lease."""

    def __init__(self, name: str, model: ReplicaOptions, http: ReplicaHttp, n_models: int, n_sharing: int) -> None:
        set_up_logging()
        stay_on_this_machine()
        self._name, self._http = name, http
        self._endpoint = _open(name, _with_threads(model, n_models), n_sharing)
        threading.Thread(target=_leave_when_it_stops, args=(self._endpoint,), name="engine watch", daemon=True).start()
        self._tickets: dict[str, _Ticket] = {}
        self._token = secrets.token_hex(16)
        self._listener, self._url = _listen(http.replica_host)
        self._app: ASGIApp = self._make_app()
        self._server: asyncio.Task[None] | None = None

    async def lease(self) -> AsyncGenerator[dict[str, Any], None]:
        """Where to send one request; then, when it has been answered, what it cost."""
        self.check_health()  # it may have a second to live; the router asks another replica
        if adapter := serve.get_multiplexed_model_id():
            await self._adapter(adapter)
        self._start_server()
        number, ticket = secrets.token_hex(8), _Ticket()
        self._tickets[number] = ticket
        try:
            yield {"url": self._url, "token": self._token, "lease": number, "replica": replica_id()}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ticket.ended.wait(), None if ticket.begun else _UNUSED_S)
            if ticket.begun:
                await ticket.ended.wait()
            yield ticket.report
        finally:
            self._tickets.pop(number, None)

    @serve.multiplexed(max_num_models_per_replica=MAX_LOADED)
    async def _adapter(self, name: str) -> object:
        """Tells Ray that this replica holds an adapter; one that does not exist is refused over HTTP."""
        adapters = self._endpoint.adapters
        with contextlib.suppress(MPTError):
            return await adapters.get(name) if adapters is not None else None
        return None

    def exposition(self) -> tuple[str, str]:
        """This replica's name and its metrics."""
        from prometheus_client import generate_latest

        return replica_id(), generate_latest(self._metrics.registry).decode()

    def runs(self) -> tuple[str, dict[str, Any]]:
        """The model's name, and what computes it here."""
        assert self._endpoint.choice is not None
        return self._name, self._endpoint.choice.as_json()

    def check_health(self) -> None:
        """Raises when the engine has stopped, so that Ray replaces this replica."""
        if self._endpoint.engine.failed is not None:
            raise RuntimeError(f"the engine of `{self._name}` has stopped: {self._endpoint.engine.failed}")

    async def __del__(self) -> None:
        """End what still runs with an error event; Ray has waited for it before."""
        if hasattr(self, "_endpoint"):
            await asyncio.to_thread(self._endpoint.engine.close)
            await asyncio.sleep(0.1)  # the last events are on their way to the sockets

    def _make_app(self) -> ASGIApp:
        from serving.app import make_app
        from serving.endpoints import Serving

        http = self._http
        options = ServeOptions(
            models={},
            docs=False,
            request_timeout_s=http.request_timeout_s,
            max_body_bytes=http.max_body_bytes,
            max_embeddings_body_bytes=http.max_embeddings_body_bytes,
            keep_alive_s=http.keep_alive_s,
            otel_endpoint=http.otel_endpoint,
        )
        serving = Serving(options, endpoints={self._name: self._endpoint}, keeps_responses=False)
        app = make_app(serving, door=_LeaseDoor(self._token))
        self._metrics = app.state.metrics
        return _Leased(app, self._tickets)

    def _start_server(self) -> None:
        if self._server is None:
            import uvicorn

            config = uvicorn.Config(
                self._app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                http=timed_protocol(Clocks(), Connections(), "httptools"),
                ws="none",
            )
            self._server = asyncio.create_task(uvicorn.Server(config).serve(sockets=[self._listener]))


class _LeaseDoor:
    """Lets in the routers of this application, which have settled who asks."""

    def __init__(self, token: str) -> None:
        self._keys = Keys((token,), None)

    def client(self, headers: Headers) -> Client:
        self._keys.client(headers)
        return Client("router", headers.get(b"x-mpt-salt", ""))


class _Leased:
    """Ends a lease with the request that came with it."""

    def __init__(self, app: ASGIApp, tickets: Mapping[str, _Ticket]) -> None:
        self._app, self._tickets = app, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = dict(scope.get("headers", ())).get(b"x-mpt-lease", b"").decode("latin-1")
        ticket = self._tickets.get(number)
        if ticket is not None:
            ticket.begun = True
        try:
            await self._app(scope, receive, send)
        finally:
            if ticket is not None:
                ticket.report = _report(scope.get("state", {}))
                ticket.ended.set()


def _report(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the router is told of a request that has ended: for its log, and what its client is charged."""
    fields = {"error": state["error"]} if "error" in state else {}
    work = state.get("work")
    if work is None:
        return {CHARGED: 0, **fields}
    told = {key: value for key, value in work.log_fields().items() if key != "model"}
    return {**told, CHARGED: work.n_tokens, **fields}


def _leave_when_it_stops(endpoint: Any, leave: Callable[[int], object] = os._exit) -> None:
    """End the process soon after its engine: Ray sees that at once, and takes 15 s to give up one that is unhealthy.

    In those it would fail requests faster than the others answer them, so that most went to it.
    """
    while endpoint.engine.failed is None:
        time.sleep(0.2)
    time.sleep(_LAST_EVENTS_S)
    leave(endpoint.engine.failed.exit_code)


def _open(name: str, model: ReplicaOptions, n_sharing: int) -> Any:
    """The endpoint of a replica, ready. n_sharing: replicas that share its memory. Raises MPTError."""
    from mpt.engine.endpoint import open_endpoint

    options = model.model
    if options.device == "auto" and not model.num_gpus:  # Ray has given it no GPU
        options = replace(options, device="cpu")
    endpoint = open_endpoint(name, options, n_sharing)
    until = time.monotonic() + model.startup_timeout_s
    while not endpoint.engine.ready:
        if endpoint.engine.failed is not None or time.monotonic() > until:
            raise UserError(f"`{name}` cannot answer: {endpoint.engine.failed or 'no first token in time'}")
        time.sleep(0.01)
    return endpoint


def _n_sharing(model: ReplicaOptions, cluster: ClusterOptions) -> int:
    """Replicas that may want a KV cache of the memory that this one has: of its GPU, or of the machine."""
    if model.num_gpus:
        return max(1, int(1 / model.num_gpus))
    return sum(each.max_replicas for each in cluster.models.values() if not each.num_gpus)


def _listen(host: str) -> tuple[socket.socket, str]:
    address = "127.0.0.1" if host == "loopback" else ray.util.get_node_ip_address()
    if host == "loopback" and len([node for node in ray.nodes() if node["Alive"]]) > 1:
        raise UserError("replica_host is `loopback` and the cluster has several nodes; give replica_host: node")
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen()  # connections wait here until the server is up
    return listener, f"http://{address}:{listener.getsockname()[1]}"


def _with_threads(model: ReplicaOptions, n_models: int) -> ReplicaOptions:
    """Ray sets one thread for a share of a CPU; more threads than cores would wait for each other at every product."""
    share = max(1, allowed_threads().n // n_models)
    return replace(model, threads=model.threads or (int(model.num_cpus) if model.num_cpus >= 1 else share))


# -- the front -----------------------------------------------------------------------------------------------------


@serve.ingress()
class Router:
    """The ingress: `serving.cluster.router` over this application's handles."""

    def __init__(self, settings: DeploymentHandle, models: Mapping[str, DeploymentHandle]) -> None:
        """models: makes them part of the application; who is served is what `settings` say."""
        set_up_logging()
        stay_on_this_machine()
        # Ray's uvicorn would take what any client writes into `X-Forwarded-For` for the address that it comes from.
        os.environ["FORWARDED_ALLOW_IPS"] = ""
        self._settings, self._front, self._kept = settings, _Front(), Kept()
        self._fleet: RayFleet | None = None
        self._heard = self._goes_by = ""  # digests of `args`

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        await self._take(await self._settings.args.remote(self._heard))
        self._following = asyncio.create_task(self._follow())
        return self._front

    def follows(self) -> str:
        """The digest of the `args` that this router goes by."""
        return self._goes_by

    async def _follow(self) -> None:
        """Go by what `settings` say, for as long as this router lives."""
        while True:
            try:
                args = await self._settings.args.remote(self._heard)
                if digest_of(args) != self._heard:
                    await self._take(args)
            except MPTError as error:
                log.error("settings that cannot be kept; going on with those there are: %s", error)
            except Exception as error:  # Ray's, or of gRPC below it, while that replica is replaced
                log.warning("no settings; going on with those there are: %r", error)
                await asyncio.sleep(_SETTINGS_AGAIN_S)

    async def _take(self, args: dict[str, Any]) -> None:
        """Serve what `args` say from the next request on; those on their way end as they began. Raises MPTError."""
        self._heard = digest_of(args)
        options = read_args(args)
        fleet = RayFleet(options, self._fleet)
        self._front.app = await asyncio.to_thread(self._make, fleet, options)
        self._fleet, self._goes_by = fleet, self._heard

    def _make(self, fleet: "RayFleet", options: ClusterOptions) -> ASGIApp:
        fleet.read_cards()
        keys = router_keys(options)
        is_open = options.replica_host == "loopback" and not (keys.required or options.no_auth)
        return make_router(fleet, options, keys, Hosts(options.allowed_hosts) if is_open else None, self._kept)

    def exposition(self) -> tuple[str, str]:
        """This router's name and its metrics."""
        return replica_id(), self._kept.exposition()

    async def drain(self, timeout_s: float) -> None:
        """Let running answers end before everything is shut down."""
        await self._kept.traffic.drain(timeout_s)


class _Front:
    """The app that a router is now."""

    def __init__(self) -> None:
        self.app: ASGIApp = Starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
