"""Whether a model's steps can run in C on this machine, decided before the model has weights.

Answers are reasons, as sentence fragments; None means that it can. Not here: which way is taken where more than one is
open, and what to do where none is.
"""

from typing import TypedDict, Unpack

import torch

from mpt.attention import AttentionSpec
from mpt.backends.capabilities import asked_for
from mpt.backends.native.library import Features, Unavailable, features, load
from mpt.backends.native.structures import MAX_HEAD, N_IN_MULTIPLE, N_IN_MULTIPLE_INT8, N_OUT_MULTIPLE, PANEL
from mpt.config import MPTConfig

__all__ = ["Features", "ModelFacts", "Unavailable", "features", "why_no_prompts", "why_no_step"]


# What of `AttentionSpec` step.c and prompt.c compute: a field that is new is not ignored there.
_ATTENTION = frozenset({"n_heads", "n_kv_heads", "d_head", "scale", "alibi_bias_max", "clip_qkv", "qk_ln"})


class ModelFacts(TypedDict):
    """What the decision needs to know besides the config."""

    dtype: torch.dtype  # of all but int8 weights
    device: str
    int8_weights: bool
    is_shared: bool  # over processes, each with some of the heads
    packed: str | None  # what weights stay packed as, in words


def why_no_step(config: MPTConfig, *, variant: str | None = None, **facts: Unpack[ModelFacts]) -> str | None:
    """Why a model's steps of few tokens cannot run in C here, or None where they can.

    variant: another one than the fastest that runs here. If only the machine is left to ask, the C code is compiled
    (seconds, once).
    """
    dtype, int8_weights = facts["dtype"], facts["int8_weights"]
    if facts["is_shared"]:
        return "a model shared over processes adds up their parts between its layers"
    if facts["packed"]:
        return f"the weights stay packed ({facts['packed']}), which C does not multiply with"
    device_type = torch.device(facts["device"]).type
    if device_type != "cpu" or dtype != torch.bfloat16:
        return f"C is for bfloat16 on CPU, and this model is {str(dtype).removeprefix('torch.')} on {device_type}"
    if config.d_head > MAX_HEAD:
        return f"heads of {config.d_head}; at most {MAX_HEAD} are made for"
    for field in asked_for(AttentionSpec.of(config)):
        if field not in _ATTENTION:
            return f"`{field}` is not made for in C"
    for name, (n_out, n_in) in _products(config).items():
        if n_out % N_OUT_MULTIPLE or n_in % (N_IN_MULTIPLE_INT8 if int8_weights else N_IN_MULTIPLE):
            multiples = f"multiples of {N_OUT_MULTIPLE} and {N_IN_MULTIPLE} (int8: {N_IN_MULTIPLE_INT8})"
            return f"`{name}` is {n_out} x {n_in}; {multiples} are made for"
    try:
        load(variant)
    except Unavailable as reason:
        return str(reason)
    return None


def why_no_prompts(config: MPTConfig, *, variant: str | None = None, **facts: Unpack[ModelFacts]) -> str | None:
    """Why whole prompts cannot be read in C here, or None where they can. They need all that `why_no_step` asks for."""
    reason = why_no_step(config, variant=variant, **facts)
    if reason is not None:
        return reason
    if AttentionSpec.of(config).qk_ln:  # which needs a token's heads side by side
        return "queries and keys are normalised (qk_ln)"
    if config.d_head % PANEL:  # heads are made of whole tiles
        return f"heads of {config.d_head} are no multiple of {PANEL}"
    found = features()
    if (variant or found.variant) != "amx":
        return found.missing.get("amx", "this processor has no AMX")
    return None


def _products(config: MPTConfig) -> dict[str, tuple[int, int]]:
    """The outputs and inputs of a model's products, under their names."""
    C, F, n_kv = config.d_model, config.d_ffn, config.n_kv_heads * config.d_head
    return {
        "attn.Wqkv": (C + 2 * n_kv, C),
        "attn.out_proj": (C, C),
        "ffn.up_proj": (F, C),
        "ffn.down_proj": (C, F),
        "lm_head": (config.vocab_size, C),
    }
