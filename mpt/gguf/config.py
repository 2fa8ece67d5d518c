"""What a GGUF file says of the shape of its MPT, as the keys of a config.json. Imports nothing heavy.

Not here: which of them are honoured (`mpt/architecture.py`), its weights (`model.py`).
"""

import mmap
import struct
from functools import lru_cache
from typing import Any

from mpt.errors import DamagedFile, UnsupportedConfig
from mpt.gguf.file import GGUFFile

ARCHITECTURE = "mpt"
_PIECE = 1 << 24  # bytes that are compared at a time


def read_keys(file: GGUFFile) -> dict[str, Any]:
    """The keys of a config.json that say the same. Raises UnsupportedConfig for another architecture, DamagedFile."""
    keys, tensors, path = file.keys, file.tensors, file.path
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedConfig(f"`{path}` holds a `{architecture}`; this reads MPT (`{ARCHITECTURE}`)")

    def number(name: str, default: float | None = None) -> Any:
        value = keys.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise DamagedFile(f"`{path}` has no key `{ARCHITECTURE}.{name}`")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DamagedFile(f"`{path}` has `{ARCHITECTURE}.{name}` {str(value)[:40]!r}, which is no number")
        if not 0 <= value < 1 << 31:  # nor NaN
            raise DamagedFile(f"`{path}` has `{ARCHITECTURE}.{name}` {value}, which is not between 0 and 2**31")
        return value

    if "token_embd.weight" not in tensors:
        raise DamagedFile(f"`{path}` misses `token_embd.weight`")
    d_model, n_heads, n_layers = number("embedding_length"), number("attention.head_count"), number("block_count")
    if tensors["token_embd.weight"].shape[1:] != (d_model,) or d_model == 0:
        shape = list(tensors["token_embd.weight"].shape)
        raise DamagedFile(f"`token_embd.weight` in `{path}` is {shape}, and the key embedding_length says {d_model}")
    if n_layers > len(tensors):  # before a model of so many layers is built
        raise DamagedFile(f"`{path}` says it has {n_layers} layers, more than it has tensors")
    n_kv_heads = number("attention.head_count_kv", n_heads)
    bias_max = _decimal(number("attention.max_alibi_bias", 0.0))
    clip = _decimal(number("attention.clamp_kqv", 0.0))
    qk_ln = any("attn_q_norm" in name for name in tensors)
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "expansion_ratio": number("feed_forward_length") / d_model,
        "max_seq_len": number("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "norm_eps": _decimal(number("attention.layer_norm_epsilon", 1e-5)),
        "no_bias": "output_norm.bias" not in tensors,
        "tie_word_embeddings": "output.weight" not in tensors or is_doubled(file),
        "learned_pos_emb": bias_max > 0 or "position_embd.weight" in tensors,
        "attn_config": attention_keys(n_heads, n_kv_heads, bias_max, clip, qk_ln),
    }


def attention_keys(n_heads: int, n_kv_heads: int, bias_max: float, clip: float, qk_ln: bool) -> dict[str, Any]:
    """`attn_config` of what ggml's files say. bias_max 0: no ALiBi. clip 0: none."""
    keys: dict[str, Any] = {"alibi": bias_max > 0, "clip_qkv": clip or None, "qk_ln": qk_ln}
    if bias_max > 0:
        keys["alibi_bias_max"] = bias_max
    if n_kv_heads != n_heads:
        keys |= {"attn_type": "grouped_query_attention", "kv_n_heads": n_kv_heads}
    return keys


@lru_cache(maxsize=4)  # a config is asked for several times, and the embedding of 256,000 tokens takes 2 GB
def is_doubled(file: GGUFFile) -> bool:
    """Whether the output matrix is the embedding once more, byte for byte. An untied one differs in its first piece."""
    tensors = file.tensors
    one, other = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if one is None or other is None or (one.kind, one.shape) != (other.kind, other.shape):
        return False
    with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(
            data[one.offset + at : one.offset + min(at + _PIECE, one.n_bytes)]
            == data[other.offset + at : other.offset + min(at + _PIECE, one.n_bytes)]
            for at in range(0, one.n_bytes, _PIECE)
        )


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 of the file stands for: 0.7, not 0.699999988."""
    stored = struct.pack("<f", value)
    return next(short for n in range(1, 10) if struct.pack("<f", short := float(f"{value:.{n}g}")) == stored)
