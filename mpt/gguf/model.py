"""What a GGUF file says of an MPT model: its config, its weights under the model's names, and which tool made it.

Three layouts are read. llama.cpp's converters of 2023 (`convert-mpt-hf-to-gguf.py`) stored the embedding a second time
as `output.weight`. Today's (`convert_hf_to_gguf.py`) stores it once and adds `tokenizer.ggml.pre`. `mpt convert` adds a
whole tokenizer.json. llama-quantize keeps the layout of what it was given, in other types. Source: llama.cpp,
`src/models/mpt.cpp`, which applies ALiBi for any bias max, clip_qkv and learned positions.
"""

from pathlib import Path

import torch
from torch import Tensor

from mpt.config import MPTConfig
from mpt.errors import DamagedFile
from mpt.gguf import ggml_blocks
from mpt.gguf.config import read_keys
from mpt.gguf.file import GGUFFile
from mpt.gguf.header import GGUFTensor
from mpt.packed.matrix import Formula, PackedTensor, Rows, Weight
from mpt.stored import StoredTensor

_OUTSIDE = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.norm_f": "output_norm",
    "lm_head": "output",
}  # fmt: skip
_IN_BLOCK = {
    "norm_1": "attn_norm", "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output", "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down", "attn.q_ln": "attn_q_norm", "attn.k_ln": "attn_k_norm",
}  # fmt: skip
_OURS_OUTSIDE = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_OURS_IN_BLOCK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
# `general.file_type`: what llama-quantize was asked for. Most tensors have the type of that name.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 21: "Q2_K_S", 25: "IQ4_NL",
    32: "BF16",
}  # fmt: skip
_CONVERTERS_WRITE = {"F32", "F16", "BF16", "Q8_0"}


def model_name(name: str) -> str | None:
    """The model's name for a tensor of GGUF's; None for one that MPT does not have."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in _OURS_OUTSIDE:
        return f"{_OURS_OUTSIDE[module]}.{kind}"
    block, _, rest = module.removeprefix("blk.").partition(".")
    if not module.startswith("blk.") or not block.isdecimal() or rest not in _OURS_IN_BLOCK:
        return None
    return f"transformer.blocks.{block}.{_OURS_IN_BLOCK[rest]}.{kind}"


def gguf_name(name: str) -> str:
    """GGUF's name for one of the model's tensors."""
    module, _, kind = name.rpartition(".")
    if module.startswith("transformer.blocks."):
        _, _, number, inside = module.split(".", 3)
        return f"blk.{number}.{_IN_BLOCK[inside]}.{kind}"
    return f"{_OUTSIDE[module]}.{kind}"


def read_config(file: GGUFFile) -> MPTConfig:
    """The config. Raises UnsupportedConfig for another architecture, DamagedFile where something is missing."""
    return MPTConfig(**read_keys(file))


def read_weights(file: GGUFFile) -> dict[str, Weight]:
    """Every tensor under the model's name, blocks as packed matrices, a doubled output matrix once.

    Raises DamagedFile for a tensor that MPT does not have.
    """
    is_tied = read_config(file).tie_word_embeddings
    found: dict[str, Weight] = {}
    for name, tensor in file.tensors.items():
        ours = model_name(name)
        if ours is None:
            raise DamagedFile(f"`{file.path}` holds `{name}`, which is none of MPT's tensors")
        if name != "output.weight" or not is_tied:  # tied: was found equal
            found[ours] = _weight(file.path, tensor)
    return found


def _weight(path: Path, tensor: GGUFTensor) -> Weight:
    if tensor.kind in ggml_blocks.PLAIN_DTYPES:
        return StoredTensor(path, tensor.offset, ggml_blocks.PLAIN_DTYPES[tensor.kind], tensor.shape)
    if len(tensor.shape) != 2:
        raise DamagedFile(f"`{tensor.name}` in `{path}` is {list(tensor.shape)} of {tensor.kind}; blocks make matrices")
    data = StoredTensor(path, tensor.offset, torch.uint8, (tensor.shape[0], tensor.n_bytes // max(1, tensor.shape[0])))
    return block_matrix(data, tensor.kind, tensor.shape)


def block_matrix(data: StoredTensor, kind: str, shape: tuple[int, ...]) -> PackedTensor:
    """A matrix in blocks of a type. data: its rows of bytes."""
    return PackedTensor(
        file=data.file,
        dtype=torch.float32,
        shape=shape,
        packed_bytes=data.n_bytes,
        kind=kind,
        packing=kind,
        parts=(data,),
        step=1,
        formula=_rows_of(kind),
    )


def _rows_of(kind: str) -> Formula:
    def values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
        return ggml_blocks.dequantise(kind, parts[0][rows])

    return values


def how_made(file: GGUFFile) -> str:
    """The tool, its layout and its types, in words."""
    keys, tensors = file.keys, file.tensors
    if "tokenizer.huggingface.json" in keys:
        tool = "`mpt convert`"
    elif "tokenizer.ggml.pre" in keys:
        tool = "llama.cpp's convert_hf_to_gguf.py"
    elif "output.weight" in tensors:
        tool = "llama.cpp's convert-mpt-hf-to-gguf.py of 2023"
    else:
        tool = "a converter of llama.cpp before May 2024"
    kinds = sorted({tensor.kind for tensor in tensors.values()})
    if not _CONVERTERS_WRITE.issuperset(kinds) and not ("mpt convert" in tool and "Q4_0" in kinds):
        tool += " and llama-quantize"
    number = keys.get("general.file_type")
    name = _FILE_TYPES.get(number, f"type {number}") if isinstance(number, int) else None
    words = f"made by {tool}, " + (f"{name}: " if name else "") + f"tensors in {', '.join(kinds)}"
    if "general.quantization_version" in keys:
        words += f", quantisation version {keys['general.quantization_version']}"
    if "quantize.imatrix.file" in keys:
        words += ", with an importance matrix"
    return words
