"""What one model is told, wherever it runs: `mpt serve`, `mpt cluster`, `mpt generate` and `mpt chat` fill this row.

Light enough to make before torch is imported. Not here: what a server is told (`serving/options.py`), how many replicas
a cluster keeps (`serving/cluster/options.py`), which backend honours which field (`mpt/backends/capabilities.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, get_args

from mpt.command_line import Device, Dtype, KVCache, Quantization, Style
from mpt.errors import UserError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of models and of adapters; the colon stands between
TRITON = "triton://"  # begins the address of a model in a Triton server
_PREFIX_CACHE_GB = 20
TINY = ("mpt-tiny", "mpt-tiny-instruct", "mpt-tiny-chat", "mpt-tiny-storywriter")  # served when nothing is asked for


def split_name(model: str) -> tuple[str, str | None]:
    """The base and the adapter of a request's `model`."""
    base, colon, adapter = model.partition(":")
    return base, adapter if colon else None


def chunk_alone(chunk: int) -> int:
    """Tokens of a prompt that are read in a step where nobody waits for it. chunk: where others do, `prefill_chunk`.

    Products of more tokens are faster, up to some thousands.
    """
    return max(chunk, min(4 * chunk, 8192))


@dataclass(frozen=True)
class ModelOptions:
    """A checkpoint and how to run it. Only `root` has no default. Raises UserError for a value out of range."""

    root: str  # catalog name, folder, hub repository, or a Triton address
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantize: Quantization | None = None  # of the weights
    kv_cache: KVCache = "auto"  # precision of the KV cache, the weights' or int8
    speculate: bool | None = None  # look answers up in their prompts; None: where answers stay the same to the bit
    draft: str | None = None  # a smaller model with the same tokenizer, which guesses instead
    tensor_parallel: int = 1  # processes that share the model, one GPU each
    kv_gb: float | None = None  # KV cache, 1e9 bytes; None shares what memory is free
    prefix_cache: Path | None = None  # folder in which prefixes outlive the memory and the process
    prefix_cache_gb: float | None = None  # what all files in it may take, 1e9 bytes; None is 20
    max_running: int | None = None  # sequences computed at once; None is what the device has the room and speed for
    max_waiting: int = 256  # requests that may wait
    prefill_chunk: int | None = None  # prompt tokens read in a step that others wait for; None likewise
    context_length: int | None = None  # None is the trained one
    prompt_style: Style | None = None  # None is the checkpoint's own
    chat_template: str | None = None  # instead of prompt_style: the file of a Jinja template, or the name of a style
    adapters: Path | None = None  # folder of LoRA adapters, served as `model:adapter`
    named_adapters: Mapping[str, Path] = field(default_factory=dict)  # single ones, by the name they are served under
    threads: int | None = None  # of the process, on CPU; None is what machine and container allow
    profile: Path | None = None  # folder that gets a trace of the first busy steps

    def __post_init__(self) -> None:
        at_least(self, 1, "context_length", "max_running", "tensor_parallel", "threads")
        at_least(self, 0, "max_waiting")
        at_least(self, 16, "prefill_chunk")
        at_least(self, 1e-3, "kv_gb", "prefix_cache_gb")
        if self.prefix_cache_gb is not None and self.prefix_cache is None:
            raise UserError(
                f"prefix_cache_gb is {self.prefix_cache_gb:g} and there is no prefix_cache; give its folder too: "
                "`--prefix-cache FOLDER`, or `prefix_cache: FOLDER` in a cluster's config"
            )
        if self.draft is not None and self.speculate is False:
            raise UserError("`draft` is given and `speculate` is off; leave one of them out")
        if self.chat_template is not None and self.prompt_style is not None:
            raise UserError("`chat_template` and `prompt_style` are both given; leave one of them out")

    @property
    def asked_style(self) -> Style | None:
        """The prompt style that is asked for by either of the two options, None where the checkpoint's own is."""
        named = [style for style in get_args(Style) if style == self.chat_template]
        if named or self.chat_template is None:
            return named[0] if named else self.prompt_style
        return "template"

    @property
    def template_file(self) -> Path | None:
        """The file of the chat template that is asked for."""
        if self.chat_template is None or self.chat_template in get_args(Style):
            return None
        return Path(self.chat_template).expanduser()

    @property
    def is_told_to_guess(self) -> bool:
        """Whether tokens are to be guessed even where a step of several rounds otherwise than steps of one."""
        return self.draft is not None or bool(self.speculate)

    @property
    def is_remote(self) -> bool:
        """Whether the model is computed by a Triton server."""
        return self.root.startswith(TRITON)

    def sized(self, *, is_paged: bool) -> Self:
        """These with numbers for `max_running` and `prefill_chunk`. is_paged: on a GPU, in pages.

        A GPU computes 8,192 tokens of a prompt at the speed of its products, and 256 rows in little more than the time
        of one; a CPU is at its limit with fewer, and others wait longer for each.
        """
        running, chunk = (256, 8192) if is_paged else (32, 512)
        return replace(self, max_running=self.max_running or running, prefill_chunk=self.prefill_chunk or chunk)

    @property
    def kv_bytes(self) -> int | None:
        return None if self.kv_gb is None else round(self.kv_gb * 1e9)

    @property
    def prefix_cache_bytes(self) -> int:
        return round((self.prefix_cache_gb or _PREFIX_CACHE_GB) * 1e9)


def at_least(options: Any, low: float, *names: str) -> None:
    """Raises UserError for the first of these fields that is set and under `low`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise UserError(f"{name} is {value}; the least is {low:g}")
