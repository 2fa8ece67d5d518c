"""GGUF, llama.cpp's file: header, keys and values, tensor descriptions, then the tensors.

It is written through the `gguf` package. What llama.cpp's own tools wrote is read by `mpt/gguf/`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conversion import metadata, running, tensors
from conversion.options import Options
from conversion.running import Runner
from conversion.source import Source, complete
from conversion.tensors import Lazy
from mpt.errors import UserError
from mpt.gguf import ggml_blocks, ggml_types
from mpt.gguf.config import ARCHITECTURE
from mpt.gguf.file import open_gguf
from mpt.gguf.model import gguf_name, how_made, read_config, read_weights
from mpt.tokenizer import CHATML_END, Tokenizer

PRE = "mpt"  # llama.cpp's name for the GPT-2 pattern that NeoX's ByteLevel splits by; tested against llama.cpp itself
_QUANTISATIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types


def cannot_express(source: Source) -> dict[str, str]:
    """By name of a setting, what llama.cpp would do differently with this file."""
    config = source.config
    found: dict[str, str] = {}
    if config.logit_factor is not None:
        found["logit_scale"] = f"logit_scale {config.logit_scale}: llama.cpp's MPT does not scale logits"
    if config.attention["softmax_scale"] not in (None, config.d_head**-0.5):
        found["softmax_scale"] = f"softmax_scale {config.attention['softmax_scale']}: llama.cpp uses 1/sqrt(d_head)"
    if config.attention["qk_ln"]:
        found["qk_ln"] = "qk_ln: llama.cpp (seen in node-llama-cpp 3.22.1) aborts on a file that holds it"
    if source.tokenizer is not None and not _splits_as_neox(source.tokenizer):
        found["tokenizer"] = "tokenizer: llama.cpp knows no pattern that splits text as this one does"
    return found


def _splits_as_neox(tokenizer: Tokenizer) -> bool:
    splitter = json.loads(tokenizer.to_json())["pre_tokenizer"] or {}
    return splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True) and not splitter["add_prefix_space"]


def write(source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write `<out>/model.gguf`; no sha256, which the manifest takes. Norms and biases stay float32.

    Raises UserError without a tokenizer, which llama.cpp needs, and for matrices whose rows do not fill blocks of 32.
    """
    import gguf

    if source.tokenizer is None:
        raise UserError(f"`{source.path}` has no tokenizer, and GGUF holds one; give --tokenizer FOLDER")
    quantisation = _QUANTISATIONS[dtype]
    writer: Any = gguf.GGUFWriter(str(out / "model.gguf"), ARCHITECTURE)
    add_keys(writer, source, quantisation)
    add_tokenizer(writer, source, source.tokenizer)
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

    size = ggml_types.n_bytes(kind, tensor.shape)
    if size is None:
        block = ggml_types.BLOCK_TYPES[kind]
        raise UserError(f"`{name}` has rows of {tensor.shape[-1]}; {kind} needs a multiple of {block.n_values}")
    is_plain = kind in ggml_types.PLAIN_TYPES
    shape = tensor.shape if is_plain else (*tensor.shape[:-1], size // torch.Size(tensor.shape[:-1]).numel())
    dtype = np.dtype(np.float32) if is_plain else np.dtype(np.uint8)
    writer.add_tensor_info(gguf_name(name), shape, dtype, size, gguf.GGMLQuantizationType[kind])


def _kind(name: str, tensor: Lazy, quantisation: str) -> str:
    if len(tensor.shape) == 1 or name.endswith("wpe.weight"):
        return "F32"
    if quantisation == "Q4_0" and name in ("transformer.wte.weight", "lm_head.weight"):
        return "Q8_0"  # it also makes the logits, where four bits cost most
    return quantisation


def _encoded(values: Tensor, kind: str, name: str, tensor: Lazy) -> "np.ndarray[Any, Any]":
    import gguf

    if kind in ggml_types.PLAIN_TYPES:
        dtype = ggml_blocks.PLAIN_DTYPES[kind]
        found = Lazy(values.dtype, tensor.shape, lambda: values, tensor.where).cast(dtype, name).read()
        return np.frombuffer(tensors.raw(found), np.uint8)
    return gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])


def add_keys(writer: Any, source: Source, quantisation: str) -> None:
    """Write what llama.cpp must know of a model whose matrices are of a type."""
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


def add_tokenizer(writer: Any, source: Source, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as llama.cpp reads it, with a token for every row of the embedding, and whole for us."""
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
    """An MPT of llama.cpp: F32, F16 and BF16 as they are, blocks as float32. Raises DamagedFile."""
    file = open_gguf(path)
    config = read_config(file)
    found, why_none = (Tokenizer.from_folder(tokenizer), None) if tokenizer else file.tokenizer
    stored = {name: tensors.stored(tensor) for name, tensor in read_weights(file).items()}
    return Source(
        kind="gguf",
        path=path,
        config=config,
        tensors=complete(config, stored, path),
        tokenizer=found,
        files=(path,),
        chat_template=file.chat_template,
        licence=file.text("general.license"),
        notes=tuple(note for note in (how_made(file), why_none) if note is not None),
    )
