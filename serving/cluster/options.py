"""What a cluster of models is told: the `args` of `serving.cluster.deployment:app`, checked and with their defaults.

Light enough to read before torch and ray are imported. Not here: how it runs (`serving/cluster/deployment.py`).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mpt.errors import UserError
from mpt.options import MODEL_NAME, ModelOptions, at_least
from serving.options import HttpOptions

Routing = Literal["least_loaded", "prefix"]
UpdateOrder = Literal["start_first", "stop_first"]
OWN_NAMES = ROUTER, SETTINGS = "Router", "Settings"  # of deployments that are no models
ReplicaHost = Literal["loopback", "node"]
NO_KEYS = (
    "replica_host is `node`, so other machines reach this cluster, and there are no keys; give `api_key_file`, or "
    "`no_auth: true` to serve everybody who reaches it"
)
# Options of `mpt serve` about which models are in its one process, and what does the same here.
SCALES = "its replicas follow the requests: give the model `min_replicas: 0`, and `downscale_delay_s` before it goes"
_OF_ONE_PROCESS = {
    "load": SCALES,
    "idle_unload": SCALES,
    "max_loaded": "the cluster runs what has room: give each model `num_cpus`, `num_gpus` and `max_replicas`",
    "models_dir": "write each model under `models`, with its `root`",
    "allow_model_loading": SCALES,
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
    keep_alive_s: float
    replica_host: ReplicaHost


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(HttpOptions):
    """Everything `args` may say. Without models, the four of the mpt-tiny family."""

    models: Mapping[str, ReplicaOptions]
    no_auth: bool = False  # serve without keys, also beyond this machine
    router_replicas: int = 1
    router_num_cpus: float = 0.1
    # Where replicas listen for routers; `node` for several nodes.
    replica_host: ReplicaHost = "loopback"
    docs: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "router_replicas", "max_body_bytes", "requests_per_minute", "tokens_per_minute")
        at_least(self, 0.1, "request_timeout_s", "keep_alive_s", "read_timeout_s")

    @property
    def replica_http(self) -> ReplicaHttp:
        return ReplicaHttp(self.request_timeout_s, self.max_body_bytes, self.keep_alive_s, self.replica_host)

    def share(self, limit: int | None) -> int | None:
        """One router's part of a limit of the whole cluster."""
        return None if limit is None else max(1, math.floor(limit / self.router_replicas))


def read_args(args: Mapping[str, Any]) -> ClusterOptions:
    """The options in the `args` of an application. Raises UserError that names the key, its value and what it takes."""
    raw = dict(args)
    models = raw.pop("models", None)
    if models is not None and (not isinstance(models, Mapping) or not models):
        raise UserError("`models` maps each served name to its options; give at least one: {chat: {root: mpt-7b-chat}}")
    found: dict[str, ReplicaOptions] = dict(TINY)
    if models is not None:
        found = {}
        for name, given in models.items():
            if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
                raise UserError(f"`{name}` cannot be a served name: letters, digits, `.`, `_`, `-`, at most 64")
            if name in OWN_NAMES:
                raise UserError(f"`{name}` cannot be a served name: the cluster calls a part of itself so")
            if not isinstance(given, Mapping):
                raise UserError(f"`models.{name}` is {given!r}; write its options: {{root: mpt-7b}}")
            found[name] = _read(ReplicaOptions, given, f"models.{name}.")
    return _read(ClusterOptions, {**raw, "models": found}, "")


def _read(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if (instead := _OF_ONE_PROCESS.get(str(key).replace("-", "_"))) is not None:
            raise UserError(f"`{where}{key}` is an option of `mpt serve`, not of a cluster; {instead}")
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            raise UserError(
                f"`{where}{key}` is no option"
                + (f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(hints)}")
            )
        values[key] = _convert(hints[key], value, f"{where}{key}")
    for each in fields(kind):
        if each.name == "root" and "root" not in values:
            raise UserError(f"`{where}root` is missing; give a catalog name or a folder of a checkpoint")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"`{where.rstrip('.')}`: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON or YAML as its field's type, nothing guessed: no numbers from text, no booleans for numbers."""
    options = get_args(hint) if get_origin(hint) is not Literal else ()
    if type(None) in options:
        if value is None:
            return None
        rest = [option for option in options if option is not type(None)]
        return _convert(rest[0], value, where)
    wanted = ""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        wanted = " or ".join(f"`{choice}`" for choice in get_args(hint))
    elif hint is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif hint in (int, float):
        if isinstance(value, int | float) and not isinstance(value, bool) and (hint is float or value == int(value)):
            return hint(value)
        wanted = "a whole number" if hint is int else "a number"
    elif hint is str or hint is Path:
        if isinstance(value, str) and value:
            return hint(value)
        wanted = "text"
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        wanted = "a list of texts"
    else:
        if isinstance(value, Mapping):
            kind = get_args(hint)[1]
            is_plain = kind in (float, Path)  # the others are models, read already
            return {name: _convert(kind, item, f"{where}.{name}") if is_plain else item for name, item in value.items()}
        wanted = "a mapping"
    raise UserError(f"`{where}` is {value!r}; it takes {wanted}")


TINY = {
    "mpt-tiny": ReplicaOptions("mpt-tiny"),
    "mpt-tiny-instruct": ReplicaOptions("mpt-tiny-instruct"),
    "mpt-tiny-chat": ReplicaOptions("mpt-tiny-chat", routing="prefix"),
    "mpt-tiny-storywriter": ReplicaOptions(
        "mpt-tiny-storywriter", routing="prefix", max_running=8, graceful_shutdown_timeout_s=600
    ),
}
