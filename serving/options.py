"""What a server was told: of HTTP, which `mpt serve` and the cluster share, and of the one process of `mpt serve`.

Light enough to make before torch is imported. What each model is told: `mpt/options.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from mpt.errors import UserError
from mpt.options import ModelOptions

EVERYBODY = "all"  # in place of a client's name


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """What clients meet, whether one process answers or a cluster."""

    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    quota_store: str | None = None  # file of SQLite or URL of Postgres; None: a file in the user's state folder
    requests_per_minute: int | None = None  # of each client whose key has no limits of its own
    tokens_per_minute: int | None = None
    request_timeout_s: float = 600.0
    max_body_bytes: int = 4 << 20  # of one that comes compressed, when it is unpacked; 65k tokens are about 400 KB
    max_embeddings_body_bytes: int = 16 << 20  # of 2,048 texts at once
    read_timeout_s: float = 60.0  # for the head of a request, where uvicorn reads it, and again for its body
    keep_alive_s: float = 15.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # names, beside the machine's own, of a server on loopback without keys
    docs: bool = True
    log_format: Literal["text", "json"] = "text"
    log_requests: Path | None = None  # file for what clients ask, redacted
    otel_endpoint: str | None = None  # takes spans over OTLP; None is what OpenTelemetry's own variables say


@dataclass(frozen=True, kw_only=True)
class ServeOptions(HttpOptions):
    """Everything `mpt serve` needs to know."""

    models: Mapping[str, ModelOptions]  # by served name
    host: str = "127.0.0.1"
    port: int = 8000
    adapter_loading: Path | None = None  # clients may load adapters inside this folder
    batch_dir: Path | None = None  # holds the files and batches of clients
    demo: bool = False  # the Spaces of demos/ under /demo
    drain_s: float = 30.0
    load: Literal["at-start", "on-request"] = "at-start"
    write_timeout_s: float = 60.0  # for a client to read something of what waits for it
    idle_timeout_s: float = 75.0  # of a connection between two requests: longer than load balancers keep theirs
    max_connections: int | None = None  # None: three quarters of the files that the process may have
    idle_unload_s: float | None = None  # models that nobody has asked for in so long are unloaded; None: never
    max_loaded: int | None = None  # models in memory at once; None: as many as fit
    model_loading: frozenset[str] = frozenset()  # clients who may load and unload by request, or EVERYBODY

    def __post_init__(self) -> None:
        """Raises UserError where options of when models are in memory contradict each other, or cannot be kept."""
        n_models, clients = len(self.models), self.model_loading
        if self.max_loaded is not None and self.max_loaded < n_models and self.load == "at-start":
            raise UserError(
                f"--max-loaded {self.max_loaded} and {n_models} models that are all loaded at start contradict each "
                "other; add --load on-request, or raise the number"
            )
        come_and_go = self.load == "on-request" or self.idle_unload_s is not None or clients
        if come_and_go and any(model.tensor_parallel > 1 for model in self.models.values()):
            raise UserError(
                "--tensor-parallel is for a model that stays loaded; leave out --load on-request, --idle-unload and "
                "--allow-model-loading, or use `mpt cluster`, whose replicas come and go"
            )
        if clients - {EVERYBODY} and not (self.api_keys or self.api_key_file):
            shown = ", ".join(sorted(clients))
            raise UserError(
                f"--allow-model-loading {shown} names clients, and there are no keys to tell them apart; give "
                f"--api-key-file, or --allow-model-loading {EVERYBODY}"
            )


def seconds(option: str, text: str) -> float:
    """A duration such as 90s, 15m or 2h. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    value = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if value <= 0:
        raise UserError(f"`{option} {text}` is no duration; write a number above 0 with s, m or h: 90s, 15m, 2h")
    return value


def without_password(url: str) -> str:
    """A database's URL as logs, errors and files may show it; a path is itself."""
    hidden = re.sub(r"(://[^/@:]*):[^@]*@", r"\1@", url)
    return re.sub(r"([?&])password=[^&]*&?", r"\1", hidden).rstrip("?&")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may lead anywhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
