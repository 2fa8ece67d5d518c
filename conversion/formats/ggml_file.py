"""GGML `.bin`, the files of ggml's MPT example, of rustformers' `llm` and of gpt4all before GGUF came.

A header of numbers, the vocabulary, then each tensor behind its own small header, under the checkpoint's own names. The
vocabulary has no merges, so there is no tokenizer in such a file. Sources: ggml, `examples/mpt`; rustformers/llm,
`crates/ggml`; gpt4all, `convert_mpt_hf_to_ggml.py` and `mpt.cpp`.

Blocks changed twice in 2023, which the version of the quantisation tells: until 1 a scale is a float32 (Q4_0, Q4_1,
Q8_0), and in 0 a byte holds two values that are neighbours. It is stored as 1,000 times the version in the file's type.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import tensors
from conversion.source import Source, complete, unpack
from conversion.tensors import Lazy
from mpt.config import MPTConfig
from mpt.errors import DamagedFile
from mpt.gguf import ggml_blocks, ggml_types
from mpt.gguf.config import attention_keys
from mpt.tokenizer import Tokenizer

_LAYOUTS = {
    b"lmgg": "ggml's MPT example (`ggml`)", b"fmgg": "rustformers' llm (`ggmf`)", b"tjgg": "rustformers' llm (`ggjt`)",
    b"mmgg": "gpt4all",
}  # fmt: skip
_OLD_BYTES = {"Q4_0": 20, "Q4_1": 24, "Q8_0": 36}  # of a block with scales in float32
_PART = 1 << 15  # blocks that are computed at a time
_IS_SPECIAL = 1 << 31  # gpt4all: in the length of a control token


@dataclass(frozen=True)
class _Stored:
    """One tensor of the file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class _File:
    """Reads values one after the other, never past the file's end."""

    def __init__(self, path: Path) -> None:
        self._path, self.size, self.at = path, path.stat().st_size, 0
        self._file = path.open("rb")

    def take(self, format_: str) -> tuple[Any, ...]:
        self._file.seek(self.at)
        size = struct.calcsize("<" + format_)
        self.at += size
        return unpack("<" + format_, self._file.read(size), str(self._path))

    def skip(self, n: int) -> None:
        if not 0 <= n <= self.size - self.at:
            raise DamagedFile(f"`{self._path}` ends early; copy it again")
        self.at += n

    def close(self) -> None:
        self._file.close()


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """An MPT of GGML: F32 and F16 as they are, blocks as float32. Raises DamagedFile."""
    file = _File(path)
    try:
        magic, numbers, version = _header(file, path)
        _skip_vocabulary(file, magic, numbers["n_vocab"], path)
        stored = _tensors(file, magic, version, path)
    finally:
        file.close()
    kinds = sorted({tensor.kind for tensor in stored.values()})
    in_blocks = "" if version is None else f", quantisation version {version}"
    notes = [f"made by the tools of {_LAYOUTS[magic]}, tensors in {', '.join(kinds)}{in_blocks}"]
    if tokenizer is None:
        notes.append("GGML holds no merges, so it has no tokenizer; give --tokenizer FOLDER for one")
    config = _config(numbers, stored, path)
    lazies = {name: _lazy(path, tensor, version) for name, tensor in stored.items()}
    return Source(
        kind="ggml",
        path=path,
        config=config,
        tensors=complete(config, lazies, path),
        tokenizer=Tokenizer.from_folder(tokenizer) if tokenizer else None,
        files=(path,),
        notes=tuple(notes),
    )


def _header(file: _File, path: Path) -> tuple[bytes, dict[str, Any], int | None]:
    """Magic, the model's numbers, and the version of the quantisation, None where the file does not say it."""
    (magic,) = file.take("4s")
    container = 0
    if magic in (b"fmgg", b"tjgg"):
        (container,) = file.take("I")
        if container not in ((1,) if magic == b"fmgg" else (1, 2, 3)):
            raise DamagedFile(f"`{path}` has version {container} of {_LAYOUTS[magic]}, which is not known")
    names = ("d_model", "max_seq_len", "n_heads", "n_layers", "n_vocab")
    if magic == b"mmgg":
        names = ("n_vocab", "max_seq_len", "n_layers", "n_heads", "d_model")
    numbers: dict[str, Any] = dict(zip(names, file.take("5i"), strict=True))
    if magic == b"lmgg" and 0 < file.take("i")[0] < 100_000:  # as a float32 this is next to 0, which no bias max is
        raise DamagedFile(
            f"`{path}` is of the first layout of ggml's example, without alibi_bias_max and clip_qkv; get a later copy"
        )
    file.at -= 4 if magic == b"lmgg" else 0
    numbers["bias_max"], numbers["clip"], file_type = file.take("2fi")
    is_possible = all(0 < numbers[name] < 1 << 24 for name in names) and numbers["d_model"] % numbers["n_heads"] == 0
    if not is_possible or not 0 <= numbers["bias_max"] < 1e4 or not 0 <= numbers["clip"] < 1e6 or file_type < 0:
        raise DamagedFile(f"`{path}` is no GGML file of an MPT: its header says {numbers}")
    said = file_type // 1000 or None
    version = {b"mmgg": 0, b"tjgg": container - 1}.get(magic, said)
    if (version != said and said is not None) or version not in (None, 0, 1, 2):
        raise DamagedFile(f"`{path}` has version {said} of the quantisation in a layout of version {version}")
    return magic, numbers, version


def _skip_vocabulary(file: _File, magic: bytes, n_vocab: int, path: Path) -> None:
    if magic == b"mmgg" and file.take("I")[0] != n_vocab:
        raise DamagedFile(f"`{path}` has two sizes of its vocabulary; copy it again")
    for _ in range(n_vocab):
        (length,) = file.take("I")
        file.skip(length & ~_IS_SPECIAL if magic == b"mmgg" else length)
        if magic in (b"fmgg", b"tjgg"):
            file.skip(4)  # a score, which byte-level BPE does not have


def _tensors(file: _File, magic: bytes, version: int | None, path: Path) -> dict[str, _Stored]:
    """By name. A file that does not say its version is read where its sizes are those of version 2, and only there."""
    found: dict[str, _Stored] = {}
    try:
        while file.at < file.size:
            name, stored = _tensor(file, magic, 2 if version is None else version, path)
            if name in found:
                raise DamagedFile(f"`{path}` holds `{name}` twice")
            found[name] = stored
    except DamagedFile:
        if version is None and any(stored.kind in ggml_types.BLOCK_TYPES for stored in found.values()):
            raise _no_version(path) from None
        raise
    kinds = {stored.kind for stored in found.values()} & ggml_types.BLOCK_TYPES.keys()
    if version is None and kinds and not kinds & _OLD_BYTES.keys():
        raise _no_version(path)
    return found


def _no_version(path: Path) -> DamagedFile:
    return DamagedFile(
        f"`{path}` does not say the version of its quantisation, and its blocks are not surely of version 2; "
        "get a copy of June 2023 or later"
    )


def _tensor(file: _File, magic: bytes, version: int, path: Path) -> tuple[str, _Stored]:
    n_dimensions, length, number = file.take("3i")
    if not 0 < n_dimensions <= 2 or not 0 < length <= 200:
        raise DamagedFile(f"`{path}` is damaged at byte {file.at}: a tensor of {n_dimensions} dimensions")
    shape = file.take(f"{n_dimensions}i")[::-1]
    (raw_name,) = file.take(f"{length}s")
    name = raw_name.decode("utf-8", "replace")
    kind = ggml_types.type_name(number)
    if kind is None or kind == "BF16":
        raise DamagedFile(f"`{name}` in `{path}` has {ggml_types.unknown_type(number)}")
    if version < 2 and kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
        raise DamagedFile(f"`{name}` in `{path}` is {kind}, which version {version} of the quantisation does not have")
    size = ggml_types.n_bytes(kind, shape) if min(shape) > 0 else None
    if size is None:
        raise DamagedFile(f"`{name}` in `{path}` is {list(shape)}, whose rows do not fill blocks of {kind}")
    if version < 2 and kind in _OLD_BYTES:
        size = math.prod(shape) // ggml_types.BLOCK_TYPES[kind].n_values * _OLD_BYTES[kind]
    if magic == b"tjgg":
        file.skip(-file.at % 32)
    offset = file.at
    file.skip(size)
    return name, _Stored(kind, shape, offset, size)


def _config(numbers: dict[str, Any], stored: dict[str, _Stored], path: Path) -> MPTConfig:
    """What the header does not say, heads of keys and the feed-forward's width, is in the shapes."""
    d_model, n_heads = numbers["d_model"], numbers["n_heads"]
    block = "transformer.blocks.0"
    missing = [name for name in (f"{block}.attn.Wqkv.weight", f"{block}.ffn.up_proj.weight") if name not in stored]
    if missing:
        raise DamagedFile(f"`{path}` misses `{missing[0]}`")
    if numbers["n_layers"] > len(stored):  # before a model of so many layers is built
        raise DamagedFile(f"`{path}` says it has {numbers['n_layers']} layers, more than it has tensors")
    n_kv_heads = (stored[f"{block}.attn.Wqkv.weight"].shape[0] - d_model) // (2 * (d_model // n_heads))
    bias_max, clip = (float(f"{value:.7g}") for value in (numbers["bias_max"], numbers["clip"]))
    qk_ln = f"{block}.attn.q_ln.weight" in stored
    return MPTConfig(
        d_model=d_model,
        n_heads=n_heads,
        n_layers=numbers["n_layers"],
        expansion_ratio=stored[f"{block}.ffn.up_proj.weight"].shape[0] / d_model,
        max_seq_len=numbers["max_seq_len"],
        vocab_size=numbers["n_vocab"],
        no_bias="transformer.norm_f.bias" not in stored,
        tie_word_embeddings="lm_head.weight" not in stored,
        learned_pos_emb=bias_max > 0 or "transformer.wpe.weight" in stored,
        attn_config=attention_keys(n_heads, n_kv_heads, bias_max, clip, qk_ln),
    )


def _lazy(path: Path, stored: _Stored, version: int | None) -> Lazy:
    def read() -> Tensor:
        data = tensors.read_exactly(path, stored.offset, stored.n_bytes)
        is_old = version == 0 or (version == 1 and stored.kind in _OLD_BYTES)
        if stored.kind in ggml_types.PLAIN_TYPES or not is_old:
            return ggml_blocks.values(stored.kind, stored.shape, data)
        n_blocks = math.prod(stored.shape) // 32
        blocks = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n_blocks, -1)
        parts = [_old_values(stored.kind, part, version == 0) for part in blocks.split(_PART)]
        return torch.cat(parts).view(stored.shape)

    return Lazy(ggml_blocks.PLAIN_DTYPES.get(stored.kind, torch.float32), stored.shape, read, path.name)


def _old_values(kind: str, blocks: Tensor, are_neighbours: bool) -> Tensor:
    """(blocks, bytes) to (blocks, 32), of version 0 or 1. are_neighbours: the two values of a byte, in version 0."""

    def number(at: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return blocks[:, at : at + dtype.itemsize].contiguous().view(dtype).float()

    def four_bits(at: int) -> Tensor:
        data = blocks[:, at:]
        both = torch.stack([data & 15, data >> 4], 2).flatten(1) if are_neighbours else ggml_blocks.halves(data)
        return both.float()

    if kind == "Q4_0":
        return number(0) * (four_bits(4) - 8)
    if kind == "Q4_1":
        return number(0) * four_bits(8) + number(4)
    if kind == "Q8_0":
        return number(0) * blocks[:, 4:].view(torch.int8).float()
    half = torch.float16
    if kind == "Q5_0":
        return number(0, half) * (four_bits(6) + 16 * ggml_blocks.bits(blocks[:, 2:6]) - 16)
    assert kind == "Q5_1", kind
    return number(0, half) * (four_bits(8) + 16 * ggml_blocks.bits(blocks[:, 4:8])) + number(2, half)
