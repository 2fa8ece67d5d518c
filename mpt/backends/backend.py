"""What the engine needs from whatever computes a model: `Backend`, rows of its KV cache, a row's share of a step.

The engine plans; a backend computes one step of mixed prefill and decode, and owns the memory of each row. Not here:
who runs when (`mpt/engine/`), which backend is taken (`choose.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mpt.backends.native.step import RowMemory
from mpt.lora import Adapter


@dataclass
class Row:
    """One sequence's KV cache. `length` tokens of it are valid; a step writes behind them, the engine advances it."""

    kv: list[Any]  # per layer (2, KV heads, capacity, D): contiguous keys per head, as the attention kernel reads; or
    # an Int8Layer of that shape
    length: int = 0
    memory: RowMemory | None = None  # where it lies and how large its keys are; the torch backend's

    @property
    def capacity(self) -> int:
        """Tokens it has memory for."""
        return int(self.kv[0].shape[2])


@dataclass(frozen=True)
class Work:
    """One row's share of a step: read `tokens` at positions row.length onwards."""

    row: Row
    tokens: Sequence[int]
    n_logits: int  # logits wanted of the last so many positions: 0, 1, or all when scoring a prompt
    adapter: Adapter | None = None
    hidden: list[Tensor] | None = None  # gets the sum of its tokens' last hidden states, (C,) float32; torch only


class DeviceLost(Exception):
    """The backend cannot compute any more; the engine stops, and whoever runs it starts another."""


class Backend(Protocol):
    vocab_size: int
    bytes_per_token: int  # of KV cache
    max_length: int | None  # positions that exist, None when only memory bounds them (ALiBi)

    def capacity_for(self, n_tokens: int) -> int:
        """Tokens a row really takes to hold n_tokens."""
        ...

    def reserve(self, row: Row | None, n_tokens: int) -> Row:
        """A row (the same, grown, or a new one) that can hold n_tokens, its contents kept."""
        ...

    def copy(self, source: Row, n_tokens: int, capacity: int) -> Row:
        """A new row that begins with the first n_tokens of `source` and can hold `capacity`."""
        ...

    def forward(self, work: Sequence[Work]) -> Tensor:
        """Run one step; the logits asked for, in order, (sum of n_logits, V) float32. Lengths stay as they are."""
        ...

    def close(self) -> None:
        """Let go of what is not memory: other processes, sessions."""
        ...
