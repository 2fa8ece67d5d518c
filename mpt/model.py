"""MPT, the decoder-only transformer: one class for every checkpoint of the family.

Letters used in shapes, here and everywhere: B rows, T new tokens, S stored positions, H heads, D head size,
C = d_model, V vocabulary, L layers.

Module names are the checkpoint's (`transformer.blocks.N.attn.Wqkv`), so weights load with no mapping. Not here: how a
checkpoint is found and read (`mpt/checkpoint.py`), how attention is computed (`mpt/attention.py`), batching
(`mpt/engine/engine.py`), transformers' interface (`mpt/transformers_model.py`). Source: llm-foundry's MPT branch; clip
comes before qk_ln, GELU is the exact erf form.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mpt import attention, dropout
from mpt.config import MPTConfig

# How one layer's queries, keys and values (B, H, T, D) become its output (B, H, T, D): called with the layer's number.
# The model computes everything else; whoever holds the cache decides this (transformers' cache below, or an engine).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

_FEW_ROWS = 32  # up to here W x is faster than x W (measured at the 125M, 1B and 7B shapes)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., n_in) to (..., n_out); W (n_out, n_in).

    bfloat16 products of a few rows on CPU are done the other way round, W x instead of x W, where nothing is learned:
    torch reads W at the memory's speed this way, and at half to two thirds of it in `F.linear`. Both sum in float32 and
    round once. The result may be strided: copying wide logits would cost half of what was won.
    """
    n_out, n_in = weight.shape
    n_rows = x.numel() // n_in
    is_bfloat16_on_cpu = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    if not is_bfloat16_on_cpu or not 0 < n_rows <= _FEW_ROWS or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if n_rows == 1:
        row = x.reshape(-1)
        out = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
    else:
        columns = x.reshape(n_rows, -1).t()
        out = (weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)).t()
    return out.view(*x.shape[:-1], n_out)


class Linear(nn.Linear):
    """nn.Linear by way of `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding that draws nothing on the meta device, for which torch would import its compiler: 1.5 seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class MPTAttention(nn.Module):
    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        spec = attention.AttentionSpec.of(config)
        self.n_heads, self.n_kv_heads, self.d_head = spec.n_heads, spec.n_kv_heads, spec.d_head
        self.clip_qkv = spec.clip_qkv
        widths = [config.d_model, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head]
        self.widths = widths  # rows of Wqkv: all queries, then all keys, then all values
        self.Wqkv = Linear(config.d_model, sum(widths), bias=not config.no_bias)
        self.out_proj = Linear(config.d_model, config.d_model, bias=not config.no_bias)
        if spec.qk_ln:  # over the whole width, not per head
            self.q_ln: nn.LayerNorm | None = nn.LayerNorm(widths[0], eps=config.norm_eps, bias=not config.no_bias)
            self.k_ln: nn.LayerNorm | None = nn.LayerNorm(widths[1], eps=config.norm_eps, bias=not config.no_bias)
        else:
            self.q_ln = self.k_ln = None

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        qkv = self.Wqkv(x).contiguous()  # attention kernels need it, see Linear
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q), self.k_ln(k)
        q = q.view(B, T, self.n_heads, self.d_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        v = v.view(B, T, self.n_kv_heads, self.d_head).transpose(1, 2)
        out = attend(self.layer, q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MPTMLP(nn.Module):
    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ffn, bias=not config.no_bias)
        self.down_proj = Linear(config.d_ffn, config.d_model, bias=not config.no_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class MPTBlock(nn.Module):
    # What transformers' `gradient_checkpointing_enable` sets. Training has its own way (training/memory.py).
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=not config.no_bias)
        self.attn = MPTAttention(config, layer)
        self.norm_2 = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=not config.no_bias)
        self.ffn = MPTMLP(config)
        self.attn.out_proj.feeds_residual = self.ffn.down_proj.feeds_residual = True  # type: ignore[assignment]
        self.resid_pdrop = config.resid_pdrop
        self._places = dropout.place(f"blocks.{layer}.attn"), dropout.place(f"blocks.{layer}.ffn")

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self._forward, x, attend)
        return self._forward(x, attend)

    def _forward(self, x: Tensor, attend: Attend) -> Tensor:
        after_attn, after_ffn = self._places
        x = x + dropout.dropout(self.attn(self.norm_1(x), attend), self.resid_pdrop, self.training, after_attn)
        return x + dropout.dropout(self.ffn(self.norm_2(x)), self.resid_pdrop, self.training, after_ffn)


class MPTModel(nn.Module):
    """The stack: embeddings, blocks and the last norm."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte: nn.Embedding = Embedding(config.vocab_size, config.d_model)
        self.wpe = Embedding(config.max_seq_len, config.d_model) if config.has_wpe else None
        self._embedded = dropout.place("embeddings")
        self.blocks = nn.ModuleList(MPTBlock(config, layer) for layer in range(config.n_layers))
        self.norm_f = nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=not config.no_bias)
        self.attention = attention.AttentionSpec.of(config)
        self.heads = slice(None)  # those this process holds: all, unless the model is shared out (mpt/sharding.py)
        self._bias: Tensor | None = None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.wte = embeddings

    def alibi_slopes(self) -> Tensor | None:
        """ALiBi's slopes of the heads this process holds, (H,) float32 beside the weights; None without ALiBi."""
        slopes = self.attention.slopes()
        return None if slopes is None else slopes[self.heads].to(self.norm_f.weight.device)

    def documents_kernel(self) -> tuple[attention.DocumentsKernel, str | None]:
        """What attends within packed documents where these weights are, and why nothing faster does.

        Autocast decides in which dtype; without it the weights do.
        """
        weight = self.norm_f.weight
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return attention.documents_kernel(weight.device, dtype, self.attention.d_head)

    def alibi_bias(self, n_keys: int) -> Tensor | None:
        """ALiBi's bias for n_keys keys, (1, H, 1, S) float32, a view of a table that grows; None without ALiBi."""
        device = self.norm_f.weight.device
        if self._bias is None or self._bias.shape[-1] < n_keys or self._bias.device != device:
            slopes = self.alibi_slopes()
            if slopes is None:
                return None
            self._bias = attention.alibi_bias(slopes, max(n_keys, min(self.config.max_seq_len, 2 * n_keys)))
        return self._bias[..., -n_keys:]

    def run(self, x: Tensor, attend: Attend, position_ids: Tensor | None = None) -> Tensor:
        """The whole stack on embeddings x, (B, T, C) -> (B, T, C); attention as `attend` says.

        position_ids: (B, T), needed by learned positions only.
        """
        if self.wpe is not None:
            assert position_ids is not None
            x = x + self.wpe(position_ids)
        fraction = self.config.embedding_fraction
        if fraction < 1 and self.training:  # the value stays, the gradient shrinks (GLM-130B's trick)
            x = x * fraction + x.detach() * (1 - fraction)
        x = dropout.dropout(x, self.config.emb_pdrop, self.training, self._embedded)
        for block in self.blocks:
            x = block(x, attend)
        return self.norm_f(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, C) after the last norm.

        attention_mask: (B, S), 0 for padding anywhere in the row. sequence_id: (B, T) document numbers of packed rows,
        -1 for padding; not together with a cache or an attention_mask. Sequences may exceed max_seq_len with ALiBi.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None and sequence_id is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if self.wpe is not None and position_ids is None:
            position_ids = self.positions(x, attention_mask, sequence_id, past)
        attend = self._attend_through(past_key_values, attention_mask, sequence_id, past, x.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=self.run(x, attend, position_ids), past_key_values=past_key_values
        )

    def _attend_through(
        self,
        cache: Cache | None,
        attention_mask: Tensor | None,
        sequence_id: Tensor | None,
        past: int,
        T: int,
    ) -> Attend:
        """Attention over transformers' cache, padding and packed documents; what layers share is made here."""
        scale, S = self.attention.scale, past + T
        if sequence_id is not None and (cache is not None or attention_mask is not None):
            raise ValueError("sequence_id goes without a cache and without attention_mask; mark padding with -1")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (B, S), not {tuple(attention_mask.shape)}")
        key_mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask[:, -S:].bool()
        p = self.config.attention["attn_pdrop"] if self.training else 0.0
        if sequence_id is not None and not p:
            kernel, _ = self.documents_kernel()
            documents = attention.Documents(sequence_id, scale=scale, slopes=self.alibi_slopes(), kernel=kernel)
            return lambda layer, q, k, v: documents.attend(q, k, v)
        bias = self.alibi_bias(S)
        device = self.norm_f.weight.device
        takes_flex = attention.takes_flex(device) and T > 1 and not p
        sight = attention.see(T, S, device, key_mask) if takes_flex else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                k, v = cache.update(k, v, layer)
                k, v = k[:, :, :S], v[:, :, :S]  # a static cache hands out its whole length
            if p:
                drop = functools.partial(
                    dropout.dropout, p=p, training=True, where=dropout.place(f"blocks.{layer}.probabilities")
                )
                return self._attend_with_dropout(q, k, v, bias, key_mask, sequence_id, drop)
            return attention.attend(q, k, v, scale=scale, bias=bias, key_mask=key_mask, sight=sight)

        return attend

    def _attend_with_dropout(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        sequence_id: Tensor | None,
        drop: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Dropout falls on the probabilities, which only the eager formula holds; no released recipe uses it."""
        T, S = q.shape[2], k.shape[2]
        allowed = attention.causal_mask(T, S, q.device)[None, None]
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None, :]
        if sequence_id is not None:
            allowed = allowed & (sequence_id[:, None, :, None] == sequence_id[:, None, None, :])
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return attention.eager(q, k, v, scale=self.attention.scale, bias=bias, allowed=allowed, drop=drop)

    def positions(self, x: Tensor, attention_mask: Tensor | None, sequence_id: Tensor | None, past: int) -> Tensor:
        """Learned positions of x, (B, T, ...), count real tokens from each row's (or document's) first, (B, T)."""
        B, T = x.shape[:2]
        positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        if sequence_id is not None:
            first = torch.ones_like(sequence_id, dtype=torch.bool)
            first[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
            positions = positions - torch.where(first, positions, 0).cummax(-1).values
        if int(positions.max()) >= self.config.max_seq_len:
            raise ValueError(f"position {int(positions.max())} is beyond the {self.config.max_seq_len} learned ones")
        return positions


class MPTLanguageModel(nn.Module):
    """MPT with its language-model head: all that an engine needs. `of` makes one, of which weights are to be read."""

    config: MPTConfig
    transformer: MPTModel
    lm_head: nn.Linear

    @staticmethod
    def of(config: MPTConfig) -> "MPTLanguageModel":
        model = MPTLanguageModel()
        model.config = config
        model.transformer = MPTModel(config)
        model.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        model.tie_weights()
        return model

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def device(self) -> torch.device:
        return self.transformer.norm_f.weight.device

    def hidden_states(
        self,
        input_ids: Tensor,
        sequence_id: Tensor | None = None,
        attend: Attend | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What `unembed` takes, (B, T, C), of packed rows: for a loss that never holds all logits at once.

        attend, position_ids: as `MPTModel.run` takes them, for a part of the rows' positions, in place of sequence_id.
        """
        if attend is not None:
            return self.transformer.run(self.transformer.wte(input_ids), attend, position_ids)
        states: Tensor = self.transformer(input_ids, sequence_id=sequence_id, use_cache=False).last_hidden_state
        return states

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), in the model's dtype."""
        logits = self.lm_head(hidden)
        factor = self.config.logit_factor
        return logits if factor is None else logits * factor

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last `logits_to_keep` positions; what is given as `MPTModel.forward` takes it."""
        states = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            sequence_id=sequence_id,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            position_ids=position_ids,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.unembed(states.last_hidden_state[:, keep])
        return CausalLMOutputWithPast(logits=logits, past_key_values=states.past_key_values)
