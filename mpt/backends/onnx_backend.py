"""A converted ONNX folder behind the engine: onnxruntime computes, one sequence at a time.

Each step copies a sequence's cache once, on its device, since the graph returns it longer by the step's tokens;
sequences are not batched. Slower than the torch backend with many streams, and for int8 and int4 folders faster with
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpt.attention import AttentionSpec
from mpt.backends import capabilities
from mpt.backends.backend import Row, Work
from mpt.backends.onnx_session import Cache, Session

_MASK_BYTES = 256_000_000  # most of the attention mask (H, T, S) of one run; longer chunks are cut


@dataclass(eq=False)
class OnnxRow(Row):
    """kv: of the session, (1, KV heads, P, D) each. reserved: tokens that are promised to it."""

    kv: Cache
    reserved: int

    @property
    def capacity(self) -> int:
        return self.reserved


class OnnxBackend:
    """What the engine needs (`mpt.backends.torch_backend.Backend`), from an onnxruntime session."""

    capabilities = capabilities.ONNX
    model = None

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self.session = Session(folder, device)
        config = self.session.config
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = config.max_seq_len if config.has_wpe else None
        self.bytes_per_token: int = config.kv_bytes_per_token * self.session.dtype.itemsize // 2
        self._n_heads: int = config.n_heads if AttentionSpec.of(config).alibi_bias_max is not None else 1

    def capacity_for(self, n_tokens: int) -> int:
        return n_tokens

    def allocate(self, kv_bytes: int) -> None:
        pass  # onnxruntime returns a new cache with every step

    def reserve(self, row: Row | None, n_tokens: int) -> OnnxRow:
        if row is None:
            return OnnxRow(self.session.empty(), reserved=n_tokens)
        assert isinstance(row, OnnxRow)
        row.reserved = max(row.reserved, n_tokens)
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> OnnxRow:
        assert isinstance(source, OnnxRow)
        return OnnxRow(self.session.cut(source.kv, n_tokens), reserved=capacity, length=n_tokens)

    def close(self) -> None:
        pass

    def forward(self, work: Sequence[Work]) -> Tensor:
        return torch.cat([torch.from_numpy(self._extend(item)) for item in work])

    def _extend(self, item: Work) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
        """Logits (n_logits, V) of one row, whose cache grows by its tokens."""
        row, tokens = item.row, item.tokens
        assert isinstance(row, OnnxRow)
        cache = self.session.cut(row.kv, row.length)
        n_stored = row.length + len(tokens)
        at_once = max(1, _MASK_BYTES // (4 * self._n_heads * n_stored))
        parts = []
        for start in range(0, len(tokens), at_once):
            chunk = tokens[start : start + at_once]
            n_after = len(tokens) - start - len(chunk)
            n_logits = min(len(chunk), max(0, item.n_logits - n_after))
            cache, logits = self.session.extend(cache, chunk, max(1, n_logits))
            parts.append(logits[0, -n_logits:] if n_logits else logits[0, :0])
        row.kv = cache
        return np.concatenate(parts)
