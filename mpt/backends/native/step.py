"""A model's steps in C, for few tokens and for whole prompts: the structures, filled from the modules, and the calls.

It takes over where Python and torch's thread barriers would cost as much as reading the weights. Shapes are checked
here, as C checks nothing.
"""

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mpt.backends.int8_cache import Int8Layer
from mpt.backends.native import structures
from mpt.backends.native.available import FORMAT_OF, ModelFacts, prompt_variant, step_variant
from mpt.backends.native.library import load
from mpt.backends.native.structures import PANEL, PROJECTIONS
from mpt.backends.quantization import Int8Linear
from mpt.lora import Adapter
from mpt.model import MPTLanguageModel
from mpt.packed.layers import PackedLinear, packed_kinds


@dataclass
class RowMemory:
    """Where a row's cache lies, and how large its keys are."""

    addresses: Tensor  # (L,) int64, of each layer's (2, KV heads, capacity, D)
    scale_addresses: Tensor | None  # (L,) of their scales, None where they are not int8
    capacity: int  # positions there is room for
    key_norms: Tensor  # (L, KV heads) float32: no key stored is longer

    @classmethod
    def of(cls, kv: Sequence[Tensor | Int8Layer], known: "RowMemory | None") -> "RowMemory":
        """Of a cache that has moved, or been copied from one of which `known` is true. kv: (2, KV heads, S, D) each."""
        norms = torch.zeros(len(kv), kv[0].shape[1]) if known is None else known.key_norms.clone()
        numbers = [layer.numbers if isinstance(layer, Int8Layer) else layer for layer in kv]
        scales = [layer.scales.data_ptr() for layer in kv if isinstance(layer, Int8Layer)]
        addresses = torch.tensor([layer.data_ptr() for layer in numbers])
        return cls(addresses, torch.tensor(scales) if scales else None, kv[0].shape[2], norms)

    def note_keys(self, layer: int, norms: Tensor) -> None:
        """Keys with these norms, (KV heads, n), have been stored by somebody else."""
        largest = self.key_norms[layer]
        torch.maximum(largest, norms.amax(-1) * 1.0001, out=largest)  # rounding must not make the bound too small


class NativeStep:
    """A model's steps. Holds pointers into the model's tensors, which must stay where and as they are."""

    def __init__(self, model: MPTLanguageModel, *, drop: float = 2.0**-24, variant: str | None = None) -> None:
        """drop: the share of a query's attention that may be left out with old keys. variant: another one of those that
        can run here than the fastest. Raises Unavailable."""
        config, transformer = model.config, model.transformer
        weight = transformer.norm_f.weight
        facts: ModelFacts = {
            "dtype": weight.dtype,
            "device": weight.device.type,
            "int8_weights": isinstance(model.lm_head, Int8Linear),
            "is_shared": transformer.heads != slice(None),
            "packed": packed_kinds(model),
        }
        self._library = load(step_variant(config, **facts, variant=variant)[0])
        self._prompts = load(prompt_variant(config, **facts, variant=variant)[0])
        self.max_tokens = structures.MAX_TOKENS
        self._dtype = weight.dtype
        self._kept: list[object] = []  # what the structures point into
        layers = (structures.Layer * config.n_layers)(*(self._layer(block) for block in transformer.blocks))
        first: Any = transformer.blocks[0].attn
        spec = transformer.attention
        self._model = structures.Model(
            format=structures.FORMATS.index(FORMAT_OF[weight.dtype]),
            n_layers=config.n_layers, d_model=config.d_model, n_heads=config.n_heads, n_kv_heads=first.n_kv_heads,
            d_head=config.d_head, d_ffn=config.d_ffn, eps=config.norm_eps, softmax_scale=spec.scale,
            clip_qkv=spec.clip_qkv or 0.0, slopes=self._pointer(spec.slopes()), layers=layers,
            norm_f=self._norm(transformer.norm_f), head=self._linear(model.lm_head),
        )  # fmt: skip
        self._kept.append(layers)
        self._drop, self._n_layers, self._vocab_size = drop, config.n_layers, config.vocab_size
        self._n_threads = torch.get_num_threads()
        n_floats = self._library.mpt_scratch_floats(ctypes.byref(self._model), self.max_tokens, self._n_threads)
        self._scratch = torch.empty(n_floats)
        self._prompt_scratch = torch.empty(0)
        self._keys_read = torch.zeros(1, dtype=torch.int64)
        self._tables: WeakKeyDictionary[Adapter, _Table] = WeakKeyDictionary()

    @property
    def keys_read(self) -> int:
        """Keys attended over since the start, summed over queries, heads and layers."""
        return int(self._keys_read)

    def run(
        self,
        embeddings: Tensor,
        row_tokens: Sequence[int],
        lengths: Sequence[int],
        memories: Sequence[RowMemory],
        wanted: Sequence[int],
        adapters: Sequence[Adapter | None] = (),
        *,
        as_prompts: bool = False,
    ) -> Tensor:
        """Logits (len(wanted), V) float32 of the wanted tokens; keys and values of all are stored in their rows.

        embeddings: (T, C) float32, rows one after another. row_tokens: tokens of each row. lengths: positions each row
        holds already. wanted: places in the step. adapters: each row's, if any has one. as_prompts: by the code for any
        number of tokens, the faster the more. The rows' caches are all in the model's dtype, or all int8.
        """
        T, n = embeddings.shape[0], len(row_tokens)
        assert as_prompts or self.max_tokens >= T
        function = self._prompts.mpt_prompt if as_prompts else self._library.mpt_step
        scratch = self._scratch_of_prompts(row_tokens, memories, len(wanted)) if as_prompts else self._scratch
        assert sum(row_tokens) == T and len(lengths) == len(memories) == n
        assert embeddings.dtype == torch.float32 and embeddings.is_contiguous()
        capacities = [memory.capacity for memory in memories]
        assert all(map(operator.ge, capacities, map(operator.add, lengths, row_tokens)))
        present = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
        row_adapter = [-1 if adapter is None else present.index(adapter) for adapter in adapters] or [-1] * n
        numbers = torch.tensor([*row_tokens, *lengths, *capacities, *row_adapter, *wanted], dtype=torch.int32)
        addresses = torch.cat([memory.addresses for memory in memories])
        found = [memory.scale_addresses for memory in memories if memory.scale_addresses is not None]
        assert len(found) in (0, n)
        scales = torch.cat(found) if found else None
        norms = torch.tensor([memory.key_norms.data_ptr() for memory in memories])
        logits = torch.empty(len(wanted), self._vocab_size)
        tables = [self._table(adapter) for adapter in present]
        max_rank = max((table.max_rank for table in tables), default=0)
        n_columns = sum(-(-tokens // PANEL) for tokens in row_tokens) * PANEL  # no fewer than either step has
        low = torch.empty(len(tables) * max_rank * n_columns)
        loras = ctypes.create_string_buffer(b"".join(table.structs for table in tables))
        at = numbers.data_ptr()
        step = structures.Step(
            n_tokens=T, n_rows=n, n_logits=len(wanted), n_threads=self._n_threads, x=embeddings.data_ptr(),
            row_tokens=at, row_length=at + 4 * n, row_capacity=at + 8 * n, kv=addresses.data_ptr(),
            kv_scale=None if scales is None else scales.data_ptr(), key_norm=norms.data_ptr(),
            n_adapters=len(tables), max_rank=max_rank, adapters=ctypes.addressof(loras), row_adapter=at + 12 * n,
            low=low.data_ptr(), logit_tokens=at + 16 * n, logits=logits.data_ptr(), scratch=scratch.data_ptr(),
            keys_read=self._keys_read.data_ptr(), drop=self._drop,
        )  # fmt: skip
        function(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _scratch_of_prompts(self, row_tokens: Sequence[int], memories: Sequence[RowMemory], n_logits: int) -> Tensor:
        """As large as the largest step so far needed it."""
        n_panels = sum(-(-n // PANEL) for n in row_tokens)
        n_floats = self._prompts.mpt_prompt_scratch_floats(
            ctypes.byref(self._model), n_panels, n_logits, self._n_threads, memories[0].scale_addresses is not None
        )
        if n_floats > self._prompt_scratch.numel():
            self._prompt_scratch = torch.empty(0)  # the old one is free before the new one is there
            self._prompt_scratch = torch.empty(n_floats)
        return self._prompt_scratch

    def _table(self, adapter: Adapter) -> "_Table":
        table = self._tables.get(adapter)
        if table is None:
            table = self._tables[adapter] = _Table.of(adapter, self._n_layers, self._dtype)
        return table

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, vector: Tensor | None) -> int | None:
        """Of a norm, a bias or scales in float32, the one kind that C takes; a copy unless they are float32."""
        return None if vector is None else self._pointer(vector.detach().float())

    def _norm(self, norm: nn.LayerNorm | None) -> structures.Norm:
        if norm is None:
            return structures.Norm()
        return structures.Norm(self._floats(norm.weight), self._floats(norm.bias))

    def _linear(self, linear: nn.Linear) -> structures.Linear:
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        scale, kind = None, FORMAT_OF[self._dtype]
        if isinstance(linear, PackedLinear):
            (weight,), kind = linear.matrix.parts, linear.matrix.kind
        else:
            assert isinstance(linear.weight, Tensor)
            weight = linear.weight
        if isinstance(linear, Int8Linear):
            scale, kind = linear.scale, "INT8_ROWS"
        assert kind not in FORMAT_OF.values() or weight.dtype == self._dtype, weight.dtype
        shape = linear.out_features, linear.in_features
        pointers = self._pointer(weight), self._floats(scale), self._floats(bias)
        return structures.Linear(*pointers, *shape, structures.FORMATS.index(kind))

    def _layer(self, block: Any) -> structures.Layer:
        attn, ffn = block.attn, block.ffn
        norms = map(self._norm, (block.norm_1, block.norm_2, attn.q_ln, attn.k_ln))
        return structures.Layer(*norms, *map(self._linear, (attn.Wqkv, attn.out_proj, ffn.up_proj, ffn.down_proj)))


@dataclass
class _Table:
    """Where an adapter's matrices lie."""

    structs: bytes  # of (layers, projections) _Lora
    max_rank: int
    kept: list[Tensor]  # what they point into

    @classmethod
    def of(cls, adapter: Adapter, n_layers: int, dtype: torch.dtype) -> "_Table":
        """dtype: the model's."""
        kept_in = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        structs = (structures.Lora * (n_layers * len(PROJECTIONS)))()
        kept: list[Tensor] = []
        for place in range(len(structs)):
            layer, which = divmod(place, len(PROJECTIONS))
            pair = adapter.pairs.get(f"transformer.blocks.{layer}.{PROJECTIONS[which]}")
            if pair is not None:
                a, b = (matrix.to(kept_in).contiguous() for matrix in (pair[0], pair[1].T))
                kept += a, b
                structs[place] = structures.Lora(a.data_ptr(), b.data_ptr(), len(a))
        return cls(bytes(structs), max((lora.rank for lora in structs), default=0), kept)
