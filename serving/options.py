"""What `mpt serve` was told: one frozen row of options, light enough to make before torch is imported."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from mpt.command_line import Device, Dtype, KVCache, Quantization, Style

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of models and of adapters; the colon stands between


@dataclass(frozen=True)
class ServeOptions:
    """Everything a server needs to know. models: served name to catalog name, folder or hub repository."""

    models: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    requests_per_minute: int | None = None  # of each client whose key has no limits of its own
    tokens_per_minute: int | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantization | None = None  # of the weights
    kv_cache: KVCache = "auto"  # precision of the KV cache, the weights' or int8
    speculate: bool = True  # look answers up in their prompts, where that changes nothing but the speed
    drafts: Mapping[str, str] = field(default_factory=dict)  # of a served name, the smaller model that guesses for it
    tensor_parallel: int = 1  # processes that share each model, one GPU each
    kv_bytes: int | None = None  # per model; None shares what memory is free
    max_running: int = 32
    max_waiting: int = 256
    prefill_chunk: int = 512
    context_lengths: Mapping[str, int] = field(default_factory=dict)
    prompt_styles: Mapping[str, Style] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)  # of a served name, by their own
    adapter_folders: Mapping[str, Path] = field(default_factory=dict)
    adapter_loading: Path | None = None  # clients may load adapters inside this folder
    cors_origins: tuple[str, ...] = ()
    docs: bool = True
    demo: bool = False  # the Spaces of demos/ under /demo
    profile: Path | None = None  # folder that gets a trace of each model's first busy steps
    log_format: Literal["text", "json"] = "text"
    drain_s: float = 30.0
    request_timeout_s: float = 600.0
    max_body_bytes: int = 32 << 20
    keep_alive_s: float = 15.0


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may lead anywhere."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
