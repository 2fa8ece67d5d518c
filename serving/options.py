"""What a server was told: of HTTP, which `mpt serve` and the cluster share, and of the one process of `mpt serve`.

Light enough to make before torch is imported. What each model is told: `mpt/options.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from mpt.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """What clients meet, whether one process answers or a cluster."""

    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    requests_per_minute: int | None = None  # of each client whose key has no limits of its own
    tokens_per_minute: int | None = None
    request_timeout_s: float = 600.0
    max_body_bytes: int = 32 << 20  # of one that comes compressed, when it is unpacked
    read_timeout_s: float = 60.0  # for the head of a request, where uvicorn reads it, and again for its body
    keep_alive_s: float = 15.0
    cors_origins: tuple[str, ...] = ()
    docs: bool = True
    log_format: Literal["text", "json"] = "text"


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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may lead anywhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
