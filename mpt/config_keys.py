"""Judges the keys of a config.json that are not MPT's own, and finds the MPT inside a larger model's config.

A key is used, or dropped with its reason, or refused by name. Decided in this order:

1. A key that repeats a setting under another program's name must agree with it (`judge` gets these as `repeats`).
2. null, false, 0 and what is empty ask for nothing.
3. The words of its name say that it is about training, about how or where something is computed, about where files came
   from, or about a part that is off. Such a key changes no logit.
4. Everything else is refused: it may change the answers.

Not here: MPT's own keys and their values (`config.py`).
"""

import re
from collections.abc import Mapping
from typing import Any

from mpt.bounded import shown
from mpt.errors import UnsupportedConfig

Raw = Mapping[str, Any]

# `replit_lm` is the first release of replit-code-v1-3b: `mosaic_gpt` under another name.
FLAT_TYPES = ("mosaic_gpt", "replit_lm")
TYPES = ("mpt", *FLAT_TYPES)
# Their config has MPT's keys beside those of what they add: a vision encoder, a memory.
_EXTENDED_TYPES = ("llava_mpt", "extended-mpt")
READ_TYPES = (*TYPES, *_EXTENDED_TYPES)

# What other programs call the numbers that give tensors their shapes; the file's tensors show which number is right.
# For the context there is no such proof: it limits requests and changes no logit.
SAME_SIZE = {
    "hidden_size": "d_model", "n_embd": "d_model", "num_hidden_layers": "n_layers", "num_layers": "n_layers",
    "n_layer": "n_layers", "max_position_embeddings": "max_seq_len", "n_positions": "max_seq_len",
    "n_ctx": "max_seq_len", "seq_length": "max_seq_len", "sequence_length": "max_seq_len",
    "max_sequence_length": "max_seq_len", "model_max_length": "max_seq_len",
    "max_seq_len_inference": "max_seq_len", "tokenizer_model_max_length": "max_seq_len",
}  # fmt: skip
_SAME_HEADS = ("num_attention_heads", "n_head", "num_heads")

_TRAINING = {
    "init", "initializer", "initialization", "initialisation", "loss", "dropout", "pdrop", "layerdrop", "train",
    "training", "trainable", "pretraining", "pretrained", "finetune", "finetuning", "gradient", "grad",
    "checkpointing", "optimizer", "scheduler", "lr", "learning", "decay", "epoch", "epochs", "seed", "freeze",
    "unfreeze", "tune", "lora", "qlora", "dora", "peft", "unsloth", "axolotl", "trl", "deepspeed", "fsdp",
    "wandb", "dataset", "datasets", "batch", "label", "labels",
}  # fmt: skip
_HOW = {
    "impl", "implementation", "kernel", "kernels", "backend", "dtype", "device", "precision", "compile",
    "flash", "flash2", "triton", "sdpa", "xformers", "cuda", "cache", "offload",
}  # fmt: skip
_ORIGIN = {
    "name", "path", "version", "commit", "hash", "revision", "author", "license", "licence", "url", "repo",
    "repository", "file", "language", "languages", "tags", "date", "tokenizer", "template", "prompt",
    "parallel", "parallelism", "world",
}  # fmt: skip
# Keys of llm-foundry whose names do not say it.
_SAME_ANSWER = {
    "fc_type": "says how, not what, is computed",
    "use_pad_tok_in_ffn": "changes positions of padding alone",
    "attn_uses_sequence_id": "is about training",
}
# Words of a model's parts. `activation_name` and `parallel_residual` are about the part, whatever the other word is.
_PARTS = {
    "norm", "layernorm", "act", "activation", "attn", "attention", "position", "positional", "pos", "rope",
    "rotary", "alibi", "window", "ffn", "mlp", "qkv", "head", "heads", "hidden", "layer", "layers", "block",
    "blocks", "embed", "embedding", "embeddings", "logit", "logits", "mask", "bias", "residual",
}  # fmt: skip
_NEUTRAL_AT_ONE = {"multiplier", "factor", "scale", "scaling"}
_ENCODERS = {"mm", "vision", "vis", "image", "images", "perceiver"}  # words of what is put before a language model
# Words of architectures that came after MPT; a key with one of them is never taken for a larger model's own.
_LATER = {
    "rope", "rotary", "sliding", "window", "softcap", "softcapping", "moe", "expert", "experts", "glu",
    "rmsnorm", "prefix",
}  # fmt: skip


def judge(path: str, value: object, repeats: Raw, extends: str | None = None) -> str:
    """Why a key can be dropped, in a few words. path: the key with its table, such as `attn_config.topk`.

    repeats: what the model's settings are, by the names that other programs have for them. extends: the type of the
    larger model, whose own keys are of no concern to the MPT in it. Raises UnsupportedConfig for a key that may change
    the answers.
    """
    key = path.rpartition(".")[2]
    if value is not None and key in repeats:
        return _compared(path, value, repeats[key], SAME_SIZE.get(key))
    if _is_nothing(value):
        return "asks for nothing"
    reason = _reason(key, value)
    if reason is not None:
        return reason
    if extends is not None and not set(_words(key)) & _LATER:
        return f"belongs to what {extends} adds"
    raise UnsupportedConfig(
        f"config key `{path}` with value `{shown(value)}` is not one of MPT's and may change the answers; if it does "
        "not, remove it from config.json"
    )


def _compared(path: str, value: object, ours: object, same_size: str | None) -> str:
    equals = value in ours if isinstance(ours, tuple) else value == ours
    if equals:
        return "repeats what MPT's own keys say"
    if same_size == "max_seq_len":
        return f"max_seq_len {ours} is believed: MPT's classes read it"
    if same_size is not None:
        return f"{same_size} {ours} is believed: MPT's classes read it, and the tensors must have that size"
    expected = ours[0] if isinstance(ours, tuple) else ours
    raise UnsupportedConfig(
        f"config key `{path}` is `{shown(value)}`, and MPT's own keys make it `{shown(expected)}`; correct or remove "
        "one of them in config.json"
    )


def _is_nothing(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_nothing(inner) for inner in value.values())
    return not value


def _reason(key: str, value: object) -> str | None:
    words = set(_words(key))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in _SAME_ANSWER:
        return _SAME_ANSWER[key]
    if key.startswith("_"):
        return "a note of the program that saved it"
    if words & {"moe", "expert", "experts"}:
        is_count = bool(words & {"num", "n", "experts"}) and not words & _ORIGIN
        return "means nothing without experts" if value == 1 or not is_count else None
    if words & {"rope", "rotary"}:
        return "means nothing without rotary positions" if is_number else None
    if words & _TRAINING:
        return "is about training"
    if words & _HOW:
        return "says how, not what, is computed"
    if key.endswith(("_token", "_token_id", "_token_ids", "_token_index")):
        return "is about single tokens"
    if words & _ORIGIN and not words & _PARTS:
        return "says where it came from or ran"
    if words & _NEUTRAL_AT_ONE and is_number and value == 1 and not words & {"attn", "attention", "softmax"}:
        return "multiplies by 1"
    return None


def _words(key: str) -> list[str]:
    return re.findall(r"[a-z]+\d*", key.lower())


# -- larger models -----------------------------------------------------------------------------------------------------


def language_model(raw: Raw) -> dict[str, Any] | None:
    """The config of the MPT that a config.json is of or contains, with sizes under MPT's names; None for no MPT."""
    found: dict[str, Any] | None = dict(raw) if raw.get("model_type") in READ_TYPES or _has_mpts_class(raw) else None
    nested = nested_key(raw)
    if nested is not None:
        found = dict(raw[nested])
        found["torch_dtype"] = found.get("torch_dtype") or raw.get("torch_dtype")
    if found is not None:
        for theirs, ours in (*SAME_SIZE.items(), *((name, "n_heads") for name in _SAME_HEADS)):
            if found.get(theirs) is not None and ours not in found:
                found[ours] = found.pop(theirs)
    return found


def _has_mpts_class(raw: Raw) -> bool:
    """Whether a config of no type, or of one that names MPT, has a class of MPT's and its keys."""
    if "mpt" not in str(raw.get("model_type") or "mpt").lower():
        return False
    classes = raw.get("architectures")
    names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    return any("MPT" in name or "Mpt" in name for name in names) and {"d_model", "n_heads", "n_layers"} <= raw.keys()


def nested_key(raw: Raw) -> str | None:
    """The key under which a larger model's config (OpenFlamingo's, Otter's) holds its MPT's, or None."""
    if raw.get("model_type") in READ_TYPES:
        return None
    inner = (key for key, value in raw.items() if isinstance(value, dict) and value.get("model_type") in TYPES)
    return next(inner, None)


def extended_type(raw: Raw) -> str | None:
    """The type of the larger model that a config.json is of, or None for an MPT alone."""
    kind = raw.get("model_type")
    if kind in _EXTENDED_TYPES or nested_key(raw) is not None:
        return str(kind or "a larger model")
    keys = [key for key, value in raw.items() if not _is_nothing(value)]
    if any(set(_words(key)) & _ENCODERS or key.startswith("cross_attn") for key in keys):
        return "a vision model"
    return None
