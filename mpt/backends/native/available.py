"""Whether a model's steps can run in C on this machine, and in which variant, decided before the model has weights.

Reasons are sentence fragments. Not here: which way is taken where more than one is open (`choose.py`), and what to do
where none is.
"""

from typing import TypedDict, Unpack

import torch

from mpt.attention import AttentionSpec
from mpt.backends.capabilities import asked_for
from mpt.backends.native.library import Features, Unavailable, features, load
from mpt.backends.native.structures import (
    FORMATS,
    MAX_HEAD,
    N_IN_MULTIPLE,
    N_IN_MULTIPLE_INT8,
    N_OUT_MULTIPLE,
    PANEL,
)
from mpt.config import MPTConfig

__all__ = [
    "FORMAT_OF", "Features", "ModelFacts", "Unavailable", "features", "products", "prompt_variant", "step_variant",
    "why_no_step",
]  # fmt: skip

# How C calls the dtypes that it computes models in.
FORMAT_OF = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
# What of `AttentionSpec` the C code computes: a field that is new is not ignored there.
_ATTENTION = frozenset({"n_heads", "n_kv_heads", "d_head", "scale", "alibi_bias_max", "clip_qkv", "qk_ln"})


class ModelFacts(TypedDict):
    """What the decision needs to know besides the config."""

    dtype: torch.dtype  # of all but quantised weights
    device: str
    int8_weights: bool
    is_shared: bool  # over processes, each with some of the heads
    packed: tuple[str, ...]  # what weights stay packed as


def why_no_step(config: MPTConfig, *, variant: str | None = None, **facts: Unpack[ModelFacts]) -> str | None:
    """Why a model's steps cannot run in C here, or None where they can.

    variant: another one than the fastest that computes it. If only the machine is left to ask, the C code is compiled
    (seconds, once).
    """
    try:
        load(step_variant(config, variant=variant, **facts)[0])
        load(prompt_variant(config, variant=variant, **facts)[0])
    except Unavailable as reason:
        return str(reason)
    return None


def step_variant(
    config: MPTConfig, *, variant: str | None = None, **facts: Unpack[ModelFacts]
) -> tuple[str, str | None]:
    """The fastest variant for a model's steps of few tokens, and why no faster one runs. Raises Unavailable."""
    return _fastest(config, variant, _not_in_tiles(config, facts), facts)


def prompt_variant(
    config: MPTConfig, *, variant: str | None = None, **facts: Unpack[ModelFacts]
) -> tuple[str, str | None]:
    """The same for whole prompts."""
    reason = _not_in_tiles(config, facts)
    if reason is None and AttentionSpec.of(config).qk_ln:  # which needs a token's heads side by side
        reason = "AMX's tiles do not take queries and keys that are normalised (qk_ln)"
    if reason is None and config.d_head % PANEL:  # heads are made of whole tiles
        reason = f"AMX's tiles do not take heads of {config.d_head}, no multiple of {PANEL}"
    return _fastest(config, variant, reason, facts)


def _fastest(
    config: MPTConfig, variant: str | None, why_no_tiles: str | None, facts: ModelFacts
) -> tuple[str, str | None]:
    reason = _why_never(config, facts)
    if reason is not None:
        raise Unavailable(reason)
    found = features()
    if variant is not None:
        return variant, None
    if found.variant != "amx" or why_no_tiles is None:
        return found.variant, found.why_not_faster
    if len(found.variants) == 1:  # MPT_NATIVE_ISA=amx
        raise Unavailable(why_no_tiles)
    return found.variants[1], why_no_tiles


def _why_never(config: MPTConfig, facts: ModelFacts) -> str | None:
    """What no variant computes."""
    if facts["is_shared"]:
        return "a model shared over processes adds up their parts between its layers"
    dtype, device_type = facts["dtype"], torch.device(facts["device"]).type
    if device_type != "cpu" or dtype not in FORMAT_OF:
        return f"C is for float32, float16 and bfloat16 on CPU, and this model is {_name(dtype)} on {device_type}"
    if dtype != torch.bfloat16 and (facts["packed"] or facts["int8_weights"]):
        return f"C multiplies with quantised weights in bfloat16 models, and the rest of this one is {_name(dtype)}"
    unknown = [kind for kind in facts["packed"] if kind not in FORMATS]
    if unknown:
        return f"the weights stay packed ({unknown[0]}), which C does not multiply with"
    if config.d_head > MAX_HEAD:
        return f"heads of {config.d_head}; at most {MAX_HEAD} are made for"
    for field in asked_for(AttentionSpec.of(config)):
        if field not in _ATTENTION:
            return f"`{field}` is not made for in C"
    for name, (n_out, n_in) in products(config).items():
        if facts["int8_weights"] and n_in % N_IN_MULTIPLE:
            return f"`{name}` is {n_out} x {n_in}; int8 weights are made for multiples of {N_IN_MULTIPLE} inputs"
    return None


def _not_in_tiles(config: MPTConfig, facts: ModelFacts) -> str | None:
    """Why AMX's tiles do not compute it."""
    if facts["dtype"] != torch.bfloat16:
        return f"AMX's tiles multiply bfloat16 and int8, and this model is {_name(facts['dtype'])}"
    if facts["packed"]:
        return f"AMX's tiles do not take weights that stay packed ({facts['packed'][0]})"
    for name, (n_out, n_in) in products(config).items():
        if n_out % N_OUT_MULTIPLE or n_in % (N_IN_MULTIPLE_INT8 if facts["int8_weights"] else N_IN_MULTIPLE):
            multiples = f"multiples of {N_OUT_MULTIPLE} and {N_IN_MULTIPLE} (int8: {N_IN_MULTIPLE_INT8})"
            return f"AMX's tiles take {multiples}, and `{name}` is {n_out} x {n_in}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def products(config: MPTConfig) -> dict[str, tuple[int, int]]:
    """The outputs and inputs of a model's products, under their names."""
    C, F, n_kv = config.d_model, config.d_ffn, config.n_kv_heads * config.d_head
    return {
        "attn.Wqkv": (C + 2 * n_kv, C),
        "attn.out_proj": (C, C),
        "ffn.up_proj": (F, C),
        "ffn.down_proj": (C, F),
        "lm_head": (config.vocab_size, C),
    }
