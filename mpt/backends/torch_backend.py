"""A model on CPU or GPU in torch, with the steps in C (`native/`) where they can run: the default backend.

Not here: who runs when (`mpt/engine/`), which code is taken (`choose.py`), pages on CUDA (`paged_backend.py`).
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt import attention
from mpt.backends import capabilities
from mpt.backends.backend import Row, Work
from mpt.backends.int8_cache import Int8Layer, head_bytes
from mpt.backends.native.available import Unavailable
from mpt.backends.native.step import NativeStep, RowMemory
from mpt.backends.native.structures import PANEL
from mpt.backends.packed import PackedModel
from mpt.errors import MachineRefused
from mpt.memory import give_back_freed
from mpt.model import MPTLanguageModel

log = logging.getLogger(__name__)

# On CPU oneDNN keeps code and buffers for every number of bfloat16 rows it has multiplied, and glibc keeps what it
# frees: 2,000 steps of as many sizes left 1.2 GB behind. So sizes are rounded up, and freed memory is given back.
_ROUND_ROWS, _FEW_ROWS = 32, 32  # few rows go another way (mpt.model.Linear)
_STEPS_BETWEEN_TRIMS = 500  # a trim takes 20 ms
_LONG = 2048  # stored positions from which it pays to ask how far each head reaches
_FEW_TOKENS = PANEL  # rows with at most so many tokens in a step go through the C step, where there is one
_BLOCK = 256  # rows grow by this many tokens: a copy every 256 steps costs about 1 % of what decode reads meanwhile


@dataclass(eq=False)
class TorchRow(Row):
    """kv: for each layer (2, KV heads, capacity, D), contiguous keys per head, as the attention kernels read; or an
    Int8Layer of that shape."""

    kv: list[Any]
    memory: RowMemory  # where it lies, and how large its keys are

    @property
    def capacity(self) -> int:
        return int(self.kv[0].shape[2])


class TorchBackend:
    """An MPTLanguageModel. Rows that read a few tokens, decoding above all, go through the C step where there is one;
    the others in one packed pass of torch, attention row by row over exact slices.

    Which of the two computes a row's tokens depends on their number alone, never on who shares the step.
    """

    def __init__(self, model: MPTLanguageModel, *, int8_cache: bool = False) -> None:
        """int8_cache: keys and values in int8. Raises MachineRefused where the C step, which reads them, cannot run."""
        config = model.config
        self.model: MPTLanguageModel = model
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = config.max_seq_len if config.has_wpe else None
        self._weight = model.transformer.norm_f.weight  # whose dtype and device the cache has
        attn: Any = model.transformer.blocks[0].attn
        self._shape = (2, int(attn.n_kv_heads), config.d_head)
        self._n_layers: int = config.n_layers
        self._int8_cache = int8_cache
        n_bytes = head_bytes(config.d_head) if int8_cache else config.d_head * self._weight.itemsize
        self.bytes_per_token = math.prod(self._shape[:2]) * n_bytes * self._n_layers
        self._packed = PackedModel(model)
        self._rounds = self._weight.dtype == torch.bfloat16 and self._weight.device.type == "cpu"
        self._n_steps = 0
        is_on_cpu = self._weight.device.type == "cpu"
        self._slopes = model.transformer.alibi_slopes() if is_on_cpu else None  # where keys out of reach are left out
        self.native: NativeStep | None = None
        try:
            self.native = NativeStep(model)
        except Unavailable as reason:
            if int8_cache:
                raise MachineRefused(
                    f"`--kv-cache int8` is for the C step, which cannot run here ({reason}); leave `--kv-cache` out"
                ) from reason
            log.debug("no step in C: %s", reason)
        self.capabilities = replace(capabilities.TORCH, exact_guesses=self.native is not None)

    def capacity_for(self, n_tokens: int) -> int:
        return -(-n_tokens // _BLOCK) * _BLOCK

    def allocate(self, kv_bytes: int) -> None:
        pass  # rows grow one by one, out of what the system has

    def reserve(self, row: Row | None, n_tokens: int) -> TorchRow:
        if row is None:
            kv = [self._empty(n_tokens) for _ in range(self._n_layers)]
            return TorchRow(kv, RowMemory.of(kv, None))
        assert isinstance(row, TorchRow)
        if n_tokens > row.capacity:
            for layer, old in enumerate(row.kv):  # one layer at a time: the old one is free before the next grows
                row.kv[layer] = self._empty(n_tokens)
                _copy(old, row.kv[layer], row.length)
            row.memory = RowMemory.of(row.kv, row.memory)
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> TorchRow:
        assert isinstance(source, TorchRow)
        row = self.reserve(None, capacity)
        for new, old in zip(row.kv, source.kv, strict=True):
            _copy(old, new, n_tokens)
        row.length = n_tokens
        row.memory = RowMemory.of(row.kv, source.memory)
        return row

    def block_bytes(self, n_tokens: int) -> int:
        _, heads, _ = self._shape
        return n_tokens * self.bytes_per_token + self._n_layers * heads * 4  # and the bound of its keys, float32

    def take_out(self, row: Row, start: int, n_tokens: int) -> np.ndarray:
        assert isinstance(row, TorchRow) and start + n_tokens <= row.capacity
        block = np.empty(self.block_bytes(n_tokens), dtype=np.uint8)
        at = 0
        for piece in _memory(row, start, n_tokens):
            block[at : at + piece.size].reshape(piece.shape)[...] = piece
            at += piece.size
        assert at == block.size, (at, block.size)
        return block

    def put_in(self, row: Row, start: int, n_tokens: int, block: np.ndarray) -> None:
        assert isinstance(row, TorchRow) and start + n_tokens <= row.capacity
        norms = row.memory.key_norms.numpy()
        known = norms.copy()
        at = 0
        for piece in _memory(row, start, n_tokens):
            piece[...] = block[at : at + piece.size].reshape(piece.shape)
            at += piece.size
        np.maximum(norms, known, out=norms)

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        self._n_steps += 1
        if self._n_steps % _STEPS_BETWEEN_TRIMS == 0 and self._weight.device.type == "cpu":
            give_back_freed()
        parts = self._parts(work)
        if len(parts) == 1:
            return parts[0][1](work)
        answers: dict[int, Tensor] = {}
        for items, run in parts:
            answers |= zip(map(id, items), run(items).split([item.n_logits for item in items]), strict=True)
        return torch.cat([answers[id(item)] for item in work])

    def _parts(self, work: Sequence[Work]) -> list[tuple[Sequence[Work], Callable[[Sequence[Work]], Tensor]]]:
        """A step's shares and who computes them, by each share's own size and wishes, whatever else is in the step."""
        native = self.native
        if native is None:
            return [(work, self._pack)]
        few, many, rest = list[Work](), list[Work](), list[Work]()
        for item in work:
            if item.hidden is not None:
                rest.append(item)
            elif len(item.tokens) <= _FEW_TOKENS:
                few.append(item)
            else:
                many.append(item)
        parts: list[tuple[Sequence[Work], Callable[[Sequence[Work]], Tensor]]] = []
        while few:
            group = _at_most(few, native.max_tokens)
            few = few[len(group) :]
            parts.append((group, functools.partial(self._run_native, native)))
        if many:
            parts.append((many, functools.partial(self._run_native, native, as_prompts=True)))
        return [*parts, (rest, self._pack)] if rest else parts

    def _run_native(self, native: NativeStep, work: Sequence[Work], *, as_prompts: bool = False) -> Tensor:
        """A step in C: logits as `forward` gives them."""
        transformer, n_tokens = self.model.transformer, [len(item.tokens) for item in work]
        embeddings = transformer.wte(torch.tensor([token for item in work for token in item.tokens])).float()
        rows = list(map(_own_row, work))
        if transformer.wpe is not None:
            places = [torch.arange(row.length, row.length + n) for row, n in zip(rows, n_tokens, strict=True)]
            embeddings += transformer.wpe(torch.cat(places))
        ends = itertools.accumulate(n_tokens)
        wanted = [at for item, end in zip(work, ends, strict=True) for at in range(end - item.n_logits, end)]
        memories = [row.memory for row in rows]
        adapters = [item.adapter for item in work]
        lengths = [row.length for row in rows]
        logits = native.run(embeddings, n_tokens, lengths, memories, wanted, adapters, as_prompts=as_prompts)
        factor = self.model.config.logit_factor
        return logits if factor is None else logits.mul_(factor)

    def _pack(self, work: Sequence[Work]) -> Tensor:
        """Everything in one pass of torch."""
        n_tokens = sum(len(item.tokens) for item in work)
        n_extra = -n_tokens % _ROUND_ROWS if self._rounds and n_tokens > _FEW_ROWS else 0
        spans = []  # (row, start in the step, end, positions stored after the step)
        start = 0
        for item in work:
            end = start + len(item.tokens)
            row = _own_row(item)
            spans.append((row, start, end, row.length + end - start))
            start = end
        bias = self.model.transformer.alibi_bias(max(stored for *_, stored in spans))
        scale = self.model.transformer.attention.scale

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fresh = torch.cat([k, v])  # (2, KV heads, N, D), as rows store them
            norms = k[0].float().norm(dim=-1)  # (KV heads, N)
            answers = []
            for row, start, end, stored in spans:
                kv, new_norms = row.kv[layer], norms[:, start:end]
                if isinstance(kv, Int8Layer):  # attended over as stored, the fresh ones too: chunks change nothing
                    kv.write(row.length, fresh[:, :, start:end])
                    new_norms = kv.read(row.length, stored)[0].norm(dim=-1)
                    kv = kv.read(0, stored).bfloat16()
                else:
                    kv[:, :, row.length : stored] = fresh[:, :, start:end]
                reach = None
                row.memory.note_keys(layer, new_norms)
                if self._slopes is not None and end - start > 1 and stored >= _LONG:
                    largest = row.memory.key_norms[layer].repeat_interleave(q.shape[1] // k.shape[1])
                    bound = q[0, :, start:end].float().norm(dim=-1).amax(-1) * largest * scale
                    reach = attention.alibi_reach(self._slopes, bound)
                keys, values = kv[:, :, :stored].split(1)
                answers.append(attention.attend(q[:, :, start:end], keys, values, scale=scale, bias=bias, reach=reach))
            if n_extra:
                answers.append(torch.zeros_like(q[:, :, -n_extra:]))
            return torch.cat(answers, dim=2) if len(answers) > 1 else answers[0]  # (1, H, N, D)

        return self._packed.run(work, attend, n_extra)

    def close(self) -> None:
        pass

    def _empty(self, n_tokens: int) -> Tensor | Int8Layer:
        two, heads, d_head = self._shape
        shape = (two, heads, self.capacity_for(n_tokens), d_head)
        if self._int8_cache:
            return Int8Layer.empty(shape)
        return torch.empty(shape, dtype=self._weight.dtype, device=self._weight.device)


def _own_row(item: Work) -> TorchRow:
    assert isinstance(item.row, TorchRow)
    return item.row


def _copy(source: Any, to: Any, n_tokens: int) -> None:
    """The first n_tokens of one layer's keys and values, with their scales where they have some."""
    if isinstance(source, Int8Layer):
        to.copy_from(source, n_tokens)
    else:
        to[:, :, :n_tokens] = source[:, :, :n_tokens]


def _memory(row: TorchRow, start: int, n_tokens: int) -> Iterator[np.ndarray]:
    """The bytes of some tokens of a row on CPU, where they lie, behind those of the bound of its keys.

    As numpy's, since each thread that computes with torch leaves threads of OpenMP behind.
    """
    yield row.memory.key_norms.numpy().view(np.uint8)
    for layer in row.kv:
        tensors = (layer.numbers, layer.scales[..., None]) if isinstance(layer, Int8Layer) else (layer,)
        for tensor in tensors:
            yield tensor.view(torch.uint8).numpy()[:, :, start : start + n_tokens]


def _at_most(work: Sequence[Work], n_tokens: int) -> list[Work]:
    """The first items that have no more than n_tokens together; one at least."""
    totals = itertools.accumulate(len(item.tokens) for item in work)
    return [item for item, total in zip(work, totals, strict=True) if total <= n_tokens]
