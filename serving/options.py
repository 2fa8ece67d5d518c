"""What `mpt serve` was told: one frozen row of options, light enough to make before torch is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ServeOptions:
    """Everything a server needs to know. models: served name to catalog name, folder or hub repository."""

    models: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_bytes: int | None = None  # per model; None shares what memory is free
    max_running: int = 32
    max_waiting: int = 256
    prefill_chunk: int = 512
    context_lengths: Mapping[str, int] = field(default_factory=dict)
    prompt_styles: Mapping[str, Literal["none", "instruct", "chatml"]] = field(default_factory=dict)
    cors_origins: tuple[str, ...] = ()
    docs: bool = True
    log_format: Literal["text", "json"] = "text"
    drain_s: float = 30.0
    request_timeout_s: float = 600.0
    max_body_bytes: int = 32 << 20
    keep_alive_s: float = 15.0
