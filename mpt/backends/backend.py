"""What the engine needs from whatever computes a model: `Backend`, rows of its KV cache, a row's share of a step.

The engine plans; a backend computes one step of mixed prefill and decode, and owns the memory of each row. Not here:
who runs when (`mpt/engine/`), which backend is taken (`choose.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from mpt.backends.capabilities import Capabilities
from mpt.lora import Adapter
from mpt.model import MPTLanguageModel

FEW_TOKENS = 16  # of a row: one that is known and guesses fill the 16 columns of a product, which cost what one costs
CHEAP_TOKENS = 32  # of a step in which somebody guesses; beyond them each more costs time


@dataclass(eq=False)
class Row:
    """One sequence's KV cache. `length` tokens of it are valid; a step writes behind them, the engine advances it.

    What it holds, and where, is each backend's own.
    """

    length: int = field(default=0, kw_only=True)

    @property
    def capacity(self) -> int:
        """Tokens it has memory for."""
        raise NotImplementedError


@dataclass(frozen=True)
class Work:
    """One row's share of a step: read `tokens` at positions row.length onwards."""

    row: Row
    tokens: Sequence[int]
    n_logits: int  # logits wanted of the last so many positions: 0, 1, or all when scoring a prompt
    adapter: Adapter | None = None
    hidden: list[Tensor] | None = None  # gets the sum of its last hidden states, (C,) float32, for an embedding


class Backend(Protocol):
    capabilities: Capabilities
    vocab_size: int
    bytes_per_token: int  # of KV cache
    max_length: int | None  # positions that exist, None when only memory bounds them (ALiBi)

    @property
    def model(self) -> MPTLanguageModel | None:
        """Whose projections adapters stand beside; None where this process has no modules."""
        ...

    def allocate(self, kv_bytes: int) -> None:
        """Prepare for rows of so many bytes together, before the first one. Raises MachineRefused."""
        ...

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


@runtime_checkable
class RowCopies(Protocol):
    """A backend whose rows can leave the process and come back, as the same bits: what prefixes on disk need."""

    def block_bytes(self, n_tokens: int) -> int:
        """Bytes of so many tokens outside."""
        ...

    def take_out(self, row: Row, start: int, n_tokens: int) -> np.ndarray:
        """A copy of what the tokens from `start` on hold, (block_bytes,) uint8; on the engine's thread."""
        ...

    def put_in(self, row: Row, start: int, n_tokens: int, block: np.ndarray) -> None:
        """Write what `take_out` gave, on any thread; the row is nobody else's meanwhile. Its length stays as it is."""
        ...
