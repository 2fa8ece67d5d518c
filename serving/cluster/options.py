"""What a cluster of models is told: the `args` of `serving.cluster.deployment:app`, checked and with their defaults.

Light enough to read before torch and ray are imported. Not here: how it runs (`serving/cluster/deployment.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from mpt.errors import UserError
from mpt.options import ModelOptions, at_least
from serving.auth import Keys
from serving.configuration import read_models, read_options, read_values
from serving.limits import Limits
from serving.options import HttpOptions

Routing = Literal["least_loaded", "prefix"]
UpdateOrder = Literal["start_first", "stop_first"]
ROUTER, SETTINGS = "Router", "Settings"
OWN_NAMES = {ROUTER, SETTINGS}  # of deployments that are no models
ReplicaHost = Literal["loopback", "node"]
NO_KEYS = (
    "replica_host is `node`, so other machines reach this cluster, and there are no keys; give `api_key_file`, or "
    "`no_auth: true` to serve everybody who reaches it"
)
SCALES = "its replicas follow the requests: give the model `min_replicas: 0`, and `downscale_delay_s` before it goes"
# Options that only `mpt serve` has, and what does the same here.
_OF_ONE_PROCESS = {
    "load": SCALES,
    "idle_unload": SCALES,
    "max_loaded": "the cluster runs what has room: give each model `num_cpus`, `num_gpus` and `max_replicas`",
    "models_dir": "write each model under `models`, with its `root`",
    "allow_model_loading": SCALES,
    "allow_adapter_loading": "put the adapters into the folder `adapters` of their model; it is read for each request",
    "batch_dir": "answer the file with `mpt run-batch requests.jsonl results.jsonl --url` and the cluster's URL",
    "demo": "run `mpt demo --url` beside it",
    "drain_s": "give the model `graceful_shutdown_timeout_s`, and `mpt cluster --drain-seconds`",
    "write_timeout_s": "HAProxy closes such connections after its own time",
    "idle_timeout_s": "HAProxy closes such connections after its own time",
    "max_connections": "HAProxy counts them, up to what `ulimit -Hn` leaves it; `mpt cluster` says how many",
    "host": "Ray listens: write it under `http_options`",
    "port": "Ray listens: write it under `http_options`",
}


@dataclass(frozen=True)
class ReplicaOptions(ModelOptions):
    """One model and how many replicas of it may run."""

    max_waiting: int = 64  # requests that may wait for a replica, at each router; more get 503
    routing: Routing = "least_loaded"  # `prefix`: prompts that begin alike go to the same replica, and find its cache
    num_gpus: float = 0  # of each process of a replica
    num_cpus: float = 0.25
    resources: Mapping[str, float] = field(default_factory=dict)  # Ray's custom resources, to pin a model to a group
    min_replicas: int = 1  # 0 lets go of the model when nobody asks
    max_replicas: int = 1
    initial_replicas: int | None = None
    target_ongoing_requests: float | None = None  # None is 70 % of max_running
    upscale_delay_s: float = 30
    downscale_delay_s: float = 600
    # When the model changes: another replica starts before one stops; `stop_first` where there is no room for it.
    update_order: UpdateOrder = "start_first"
    graceful_shutdown_timeout_s: float = 120  # how long running answers may finish when a replica leaves
    startup_timeout_s: float = 600  # reading the weights, a first token

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_remote:
            raise UserError(
                f"`root` is {self.root}: a cluster computes its models itself; take `mpt serve` for this one"
            )
        at_least(self, 1, "max_replicas")
        at_least(self, 0, "num_gpus", "num_cpus", "min_replicas", "upscale_delay_s")
        at_least(self, 0, "downscale_delay_s", "graceful_shutdown_timeout_s")
        at_least(self, 1e-3, "target_ongoing_requests")
        first = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= first <= self.max_replicas:
            raise UserError(
                f"min_replicas {self.min_replicas}, initial_replicas {first}, max_replicas {self.max_replicas}: "
                "each must be at most the next"
            )
        if self.num_gpus > 1 or (self.tensor_parallel > 1 and self.num_gpus not in (0, 1)):
            raise UserError(
                f"num_gpus is {self.num_gpus}: a process uses at most one GPU; for a model over several GPUs give "
                "tensor_parallel: N with num_gpus: 1"
            )

    @property
    def model(self) -> ModelOptions:
        """What the model itself is told. How many requests may wait is counted at the routers, not in its engine."""
        values = {each.name: getattr(self, each.name) for each in fields(ModelOptions) if each.name != "max_waiting"}
        return ModelOptions(**values)

    @property
    def n_cpus(self) -> float:
        """CPUs that all its first replicas ask for."""
        return self.num_cpus * self.tensor_parallel * (self.initial_replicas or self.min_replicas)

    @property
    def n_gpus(self) -> float:
        return self.num_gpus * self.tensor_parallel * (self.initial_replicas or self.min_replicas)


@dataclass(frozen=True)
class ReplicaHttp:
    """What every replica is told of HTTP, whatever its model."""

    request_timeout_s: float
    max_body_bytes: int
    max_embeddings_body_bytes: int
    keep_alive_s: float
    otel_endpoint: str | None
    replica_host: ReplicaHost


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(HttpOptions):
    """Everything `args` may say. Without models, the four of the mpt-tiny family."""

    models: Mapping[str, ReplicaOptions]
    no_auth: bool = False  # serve without keys, also beyond this machine
    router_replicas: int = 2  # one that dies takes its own answers with it, and no other
    router_num_cpus: float = 0.1
    # Where replicas listen for routers; `node` for several nodes.
    replica_host: ReplicaHost = "loopback"
    docs: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "router_replicas", "requests_per_minute", "tokens_per_minute")
        at_least(self, 1, "max_body_bytes", "max_embeddings_body_bytes")
        at_least(self, 0.1, "request_timeout_s", "keep_alive_s", "read_timeout_s")
        if self.no_auth and (self.api_keys or self.api_key_file):
            raise UserError("`no_auth` and keys contradict each other; give one of them")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if (limit := getattr(self, name)) is not None and limit < self.router_replicas:
                raise UserError(
                    f"{name} is {limit}, and each of {self.router_replicas} routers lets through its share; give at "
                    f"least {self.router_replicas}, or `router_replicas: 1`"
                )

    @property
    def replica_http(self) -> ReplicaHttp:
        return ReplicaHttp(**{each.name: getattr(self, each.name) for each in fields(ReplicaHttp)})

    def share(self, limit: int | None) -> int | None:
        """One router's part of a limit of the whole cluster."""
        return None if limit is None else limit // self.router_replicas


def router_keys(options: ClusterOptions) -> Keys:
    """The keys that each router takes, with its share of their limits. Raises UserError."""
    limits = Limits(options.share(options.requests_per_minute), options.share(options.tokens_per_minute))
    return Keys(options.api_keys, options.api_key_file, limits, options.router_replicas)


def read_args(args: Mapping[str, Any]) -> ClusterOptions:
    """The options in the `args` of an application. Raises UserError that names the key, its value and what it takes."""
    raw = dict(args)
    models, defaults = raw.pop("models", None), raw.pop("defaults", {})
    shared = read_values(_OF_A_MODEL, defaults, "defaults.", _refuse)
    if models is None:
        found = {name: read_options(ReplicaOptions, {**vars(own), **shared}, "defaults") for name, own in TINY.items()}
    else:
        given = read_models(_OF_A_MODEL, models, _refuse)
        for name in OWN_NAMES & given.keys():
            raise UserError(f"`{name}` cannot be a served name: the cluster calls a part of itself so")
        found = {name: read_options(ReplicaOptions, {**shared, **own}, f"models.{name}") for name, own in given.items()}
    known = {**get_type_hints(ClusterOptions), "defaults": Mapping[str, Any]}
    return read_options(ClusterOptions, {**read_values(known, raw, "", _refuse), "models": found}, "")


def _refuse(key: str) -> str | None:
    """What does the same as an option of `mpt serve`, with whose it is."""
    instead = _OF_ONE_PROCESS.get(key)
    return None if instead is None else f"is an option of `mpt serve`, not of a cluster; {instead}"


_OF_A_MODEL = get_type_hints(ReplicaOptions)
TINY = {
    "mpt-tiny": ReplicaOptions("mpt-tiny"),
    "mpt-tiny-instruct": ReplicaOptions("mpt-tiny-instruct"),
    "mpt-tiny-chat": ReplicaOptions("mpt-tiny-chat", routing="prefix"),
    "mpt-tiny-storywriter": ReplicaOptions(
        "mpt-tiny-storywriter", routing="prefix", max_running=8, graceful_shutdown_timeout_s=600
    ),
}
