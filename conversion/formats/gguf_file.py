"""GGUF, llama.cpp's file: header, keys and values, tensor descriptions, then the tensors.

Written through the `gguf` package, whose reader trusts its input; so reading is ours, every count and length bounded by
the file's size before anything is allocated. Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's
`src/models/mpt.cpp`, which applies ALiBi for any bias max, clip_qkv and norms of queries and keys.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from conversion import metadata, running, tensors
from conversion.options import Options
from conversion.running import Runner
from conversion.source import Source, complete, unpack
from conversion.tensors import Lazy
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, UnsupportedConfig, UserError
from mpt.tokenizer import CHATML_END, END_OF_TEXT, Tokenizer

PRE = "mpt"  # llama.cpp's name for the GPT-2 pattern that NeoX's ByteLevel splits by; tested against llama.cpp itself
_ARCH = "mpt"
_OUTSIDE = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.norm_f": "output_norm",
    "lm_head": "output",
}  # fmt: skip
_IN_BLOCK = {
    "norm_1": "attn_norm", "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down", "attn.q_ln": "attn_q_norm", "attn.k_ln": "attn_k_norm",
}  # fmt: skip
# The tensor types that are read: number, name, values of a block, bytes of a block.
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_QUANTISATIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types
_MOST = 10_000_000  # entries of any table: a vocabulary has 50,432


def cannot_express(source: Source) -> dict[str, str]:
    """By name of a setting, what llama.cpp would do differently with this file."""
    config = source.config
    found: dict[str, str] = {}
    if config.logit_factor is not None:
        found["logit_scale"] = f"logit_scale {config.logit_scale}: llama.cpp's MPT does not scale logits"
    if config.attention["softmax_scale"] not in (None, config.d_head**-0.5):
        found["softmax_scale"] = f"softmax_scale {config.attention['softmax_scale']}: llama.cpp uses 1/sqrt(d_head)"
    if config.attention["qk_ln"]:
        found["qk_ln"] = "qk_ln: llama.cpp (seen in v0.5.0) aborts on a file that holds it"
    if source.tokenizer is not None and not _splits_as_neox(source.tokenizer):
        found["tokenizer"] = "tokenizer: llama.cpp knows no pattern that splits text as this one does"
    return found


def _splits_as_neox(tokenizer: Tokenizer) -> bool:
    splitter = json.loads(tokenizer.to_json())["pre_tokenizer"] or {}
    return splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True) and not splitter["add_prefix_space"]


def their_name(name: str) -> str:
    """GGUF's name for one of the model's tensors."""
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer.blocks."):
        _, _, number, inside = module.split(".", 3)
        return f"blk.{number}.{_IN_BLOCK[inside]}.{kind}"
    return f"{_OUTSIDE[module]}.{kind}"


def write(source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write `<out>/model.gguf`; no sha256, which the manifest takes. Norms and biases stay float32.

    Raises UserError without a tokenizer, which llama.cpp needs, and for matrices whose rows do not fill blocks of 32.
    """
    import gguf

    if source.tokenizer is None:
        raise UserError(f"`{source.path}` has no tokenizer, and GGUF holds one; give --tokenizer FOLDER")
    quantisation = _QUANTISATIONS[dtype]
    writer: Any = gguf.GGUFWriter(str(out / "model.gguf"), _ARCH)
    _add_keys(writer, source, quantisation)
    _add_tokenizer(writer, source, source.tokenizer)
    ordered = list(source.tensors.items())
    kinds = {name: _kind(name, tensor, quantisation) for name, tensor in ordered}
    for name, tensor in ordered:
        _add_description(writer, name, tensor, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in ordered:
        values = tensor.read()
        tensors.check_finite(name, values, tensor.where)
        data = _encoded(values, kinds[name], name, tensor)
        writer.write_tensor_data(data)
        advance(data.nbytes)
    writer.close()
    return {}


def runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    """Our model; llama.cpp itself runs in the tests."""
    return [running.read_back(target)]


def _add_description(writer: Any, name: str, tensor: Lazy, kind: str) -> None:
    import gguf

    _, block, size = next(known for known in _TYPES.values() if known[0] == kind)
    n = torch.Size(tensor.shape).numel()
    if tensor.shape[-1] % block:
        raise UserError(f"`{name}` has rows of {tensor.shape[-1]}; {kind} needs a multiple of {block}")
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size) if block > 1 else tensor.shape
    dtype = np.dtype(np.uint8) if block > 1 else np.dtype(np.float32)
    writer.add_tensor_info(their_name(name), shape, dtype, n // block * size, gguf.GGMLQuantizationType[kind])


def _kind(name: str, tensor: Lazy, quantisation: str) -> str:
    if len(tensor.shape) == 1 or name.endswith("wpe.weight"):
        return "F32"
    if quantisation == "Q4_0" and name in ("transformer.wte.weight", "lm_head.weight"):
        return "Q8_0"  # it also makes the logits, where four bits cost most
    return quantisation


def _encoded(values: Tensor, kind: str, name: str, tensor: Lazy) -> "np.ndarray[Any, Any]":
    import gguf

    if kind in _TORCH:
        found = Lazy(values.dtype, tensor.shape, lambda: values, tensor.where).cast(_TORCH[kind], name).read()
        return np.frombuffer(tensors.raw(found), np.uint8)
    return gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])


def _add_keys(writer: Any, source: Source, quantisation: str) -> None:
    import gguf

    config, attention = source.config, source.config.attention
    writer.add_name(source.path.resolve().name)
    writer.add_license(metadata.licence(source))
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ffn)
    writer.add_head_count(config.n_heads)
    if config.n_kv_heads != config.n_heads:
        writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    if attention["clip_qkv"] is not None:
        writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_max_alibi_bias(float(attention["alibi_bias_max"]) if attention["alibi"] else 0.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(quantisation, f"MOSTLY_{quantisation}")))


def _add_tokenizer(writer: Any, source: Source, tokenizer: Tokenizer) -> None:
    described = json.loads(tokenizer.to_json())
    names = {token_id: token for token, token_id in described["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    tokens, types = [], []
    for token_id in range(source.config.vocab_size):
        if token_id in added:
            tokens.append(added[token_id]["content"])
            types.append(_CONTROL if added[token_id]["special"] else _USER_DEFINED)
        elif token_id in names:
            tokens.append(names[token_id])
            types.append(_NORMAL)
        else:  # the embedding is padded to a multiple of 128 or so
            tokens.append(f"[PAD{token_id}]")
            types.append(_UNUSED)
    if len(names.keys() | added.keys()) and max(names.keys() | added.keys()) >= source.config.vocab_size:
        raise UserError(f"the tokenizer has more tokens than the embedding's {source.config.vocab_size} rows")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.eos_id)
    end = tokenizer.special_id(CHATML_END)
    if end is not None:
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_string("tokenizer.huggingface.json", tokenizer.to_json())
    template = metadata.chat_template(source)
    if template is not None:
        writer.add_chat_template(template)


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """An MPT of llama.cpp: F32, F16 and BF16 as they are, Q8_0 and Q4_0 as float32. Raises DamagedFile."""
    keys, found = _Parser(path).parse()
    architecture = keys.get("general.architecture")
    if architecture != _ARCH:
        raise UnsupportedConfig(f"`{path}` holds a `{architecture}`; this reads MPT (`{_ARCH}`)")
    config = _config(keys, found, path)
    ours = {their_name(name): name for name in _names(config)}
    unknown = next((name for name in found if name not in ours), None)
    if unknown is not None:
        raise DamagedFile(f"`{path}` holds `{unknown}`, which is none of MPT's tensors")
    lazies = {ours[name]: _lazy(path, entry) for name, entry in found.items()}
    return Source(
        kind="gguf",
        path=path,
        config=config,
        tensors=complete(config, lazies, path),
        tokenizer=Tokenizer.from_folder(tokenizer) if tokenizer else _tokenizer(keys, path),
        files=(path,),
        chat_template=keys.get("tokenizer.chat_template"),
        licence=keys.get("general.license"),
        notes=tuple(
            f"{kind} tensors were dequantised" for kind in sorted({e.kind for e in found.values()}) if kind[0] == "Q"
        ),
    )


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class _Parser:
    """Reads a GGUF's header, never past the file's end."""

    def __init__(self, path: Path) -> None:
        self._path, self._size, self._at = path, path.stat().st_size, 0
        self._data = np.memmap(path, np.uint8, "r") if self._size else np.empty(0, np.uint8)

    def parse(self) -> tuple[dict[str, Any], dict[str, _Entry]]:
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise DamagedFile(f"`{self._path}` is no GGUF of version 2 or 3")
        n_tensors, n_keys = self._count(), self._count()
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            name = self._string()
            keys[name] = self._value(self._take("I")[0])
        described = []
        for _ in range(n_tensors):
            name = self._string()
            (n_dimensions,) = self._take("I")
            if n_dimensions > 4:
                raise DamagedFile(f"`{name}` in `{self._path}` has {n_dimensions} dimensions")
            shape = self._take(f"{n_dimensions}Q")[::-1]
            described.append((name, shape, *self._take("IQ")))
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise DamagedFile(f"`{self._path}` has general.alignment {alignment}")
        start = -(-self._at // alignment) * alignment
        found: dict[str, _Entry] = {}
        end = 0
        for name, shape, kind, offset in sorted(described, key=lambda entry: entry[3]):
            if kind not in _TYPES:
                known = ", ".join(known[0] for known in _TYPES.values())
                raise UnsupportedConfig(f"`{name}` in `{self._path}` has GGUF's type {kind}; supported: {known}")
            type_name, block, size = _TYPES[kind]
            n = int(np.prod(shape, dtype=object)) if shape else 1
            n_bytes = n // block * size
            if name in found or offset < end or n % block or start + offset + n_bytes > self._size:
                raise DamagedFile(f"`{name}` in `{self._path}` overlaps another tensor or does not fit in the file")
            end = offset + n_bytes
            found[name] = _Entry(name, type_name, tuple(int(x) for x in shape), start + offset, n_bytes)
        return keys, found

    def _take(self, format_: str) -> tuple[Any, ...]:
        import struct

        size = struct.calcsize("<" + format_)
        found = unpack("<" + format_, self._data[self._at : self._at + size].tobytes(), str(self._path))
        self._at += size
        return found

    def _count(self) -> int:
        (n,) = self._take("Q")
        if n > min(_MOST, self._size):
            raise DamagedFile(f"`{self._path}` says it has {n} entries, more than fit in it")
        return int(n)

    def _string(self) -> str:
        (n,) = self._take("Q")
        if n > self._size - self._at:
            raise DamagedFile(f"`{self._path}` has a text of {n} bytes, more than are left of it")
        (data,) = self._take(f"{n}s")
        return str(data.decode("utf-8", "replace"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            (of,) = self._take("I")
            n = self._count()
            if of in _SCALARS:
                return list(self._take(f"{n}{_SCALARS[of]}"))
            if of == _STRING:
                return [self._string() for _ in range(n)]
        elif kind in _SCALARS:
            return self._take(_SCALARS[kind])[0]
        raise DamagedFile(f"`{self._path}` has a value of the unknown kind {kind}")


def _lazy(path: Path, entry: _Entry) -> Lazy:
    def read() -> Tensor:
        data = tensors.read_exactly(path, entry.offset, entry.n_bytes)
        if entry.kind in _TORCH:
            return torch.frombuffer(bytearray(data), dtype=_TORCH[entry.kind]).view(entry.shape)
        import gguf

        blocks = np.frombuffer(data, np.uint8).reshape(*entry.shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[entry.kind]))

    return Lazy(_TORCH.get(entry.kind, torch.float32), entry.shape, read, path.name)


def _config(keys: Mapping[str, Any], found: Mapping[str, _Entry], path: Path) -> MPTConfig:
    def key(name: str, default: Any = None) -> Any:
        value = keys.get(f"{_ARCH}.{name}", default)
        if value is None:
            raise DamagedFile(f"`{path}` has no key `{_ARCH}.{name}`")
        return value

    if "token_embd.weight" not in found:
        raise DamagedFile(f"`{path}` misses `token_embd.weight`")
    d_model, n_heads = key("embedding_length"), key("attention.head_count")
    n_kv_heads = key("attention.head_count_kv", n_heads)
    bias_max = _decimal(key("attention.max_alibi_bias", 0.0))
    attention: dict[str, Any] = {
        "alibi": bias_max > 0,
        "clip_qkv": _decimal(key("attention.clamp_kqv", 0.0)) or None,
        "qk_ln": any("attn_q_norm" in name for name in found),
    }
    if bias_max > 0:
        attention["alibi_bias_max"] = bias_max
    if n_kv_heads != n_heads:
        attention |= {"attn_type": "grouped_query_attention", "kv_n_heads": n_kv_heads}
    return MPTConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=key("block_count"),
        expansion_ratio=key("feed_forward_length") / d_model,
        max_seq_len=key("context_length"),
        vocab_size=found["token_embd.weight"].shape[0],
        norm_eps=_decimal(key("attention.layer_norm_epsilon", 1e-5)),
        no_bias="output_norm.bias" not in found,
        tie_word_embeddings="output.weight" not in found,
        learned_pos_emb=True,
        attn_config=attention,
    )


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 of the file stands for: 0.7, not 0.699999988."""
    return float(str(np.float32(value)))


def _names(config: MPTConfig) -> list[str]:
    from mpt.model import MPTForCausalLM

    with torch.device("meta"):
        names = [name for name, _ in MPTForCausalLM(config).named_parameters()]
    return [*names, "lm_head.weight"] if config.tie_word_embeddings else names


def _tokenizer(keys: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The one our own files carry whole, else one made of tokens and merges."""
    tokens, merges = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.merges")
    eos = keys.get("tokenizer.ggml.eos_token_id")
    if "tokenizer.huggingface.json" in keys:
        eos_token = tokens[eos] if tokens and isinstance(eos, int) and eos < len(tokens) else END_OF_TEXT
        return Tokenizer.from_json(keys["tokenizer.huggingface.json"], str(path), eos_token=eos_token)
    if not tokens or not merges or keys.get("tokenizer.ggml.model") != "gpt2":
        return None
    types = keys.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    vocab = {token: n for n, token in enumerate(tokens) if types[n] == _NORMAL}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    for n, token in enumerate(tokens):
        if types[n] in (_CONTROL, _USER_DEFINED):
            made.add_tokens([tokenizers.AddedToken(token, special=types[n] == _CONTROL, normalized=False)])
            if made.token_to_id(token) != n:
                raise DamagedFile(f"`{path}` has the added token `{token}` at {n}, with a gap before it")
    return Tokenizer(made, eos_token=tokens[eos] if isinstance(eos, int) else END_OF_TEXT)
