"""FasterTransformer folders: raw little-endian arrays by file name, split over tensor-parallel ranks, and config.ini.

Layout: llm-foundry's `convert_and_save_ft_weights` and the loader in FasterTransformer's `ParallelGptWeight.cc`. The
loader takes missing or short files for random weights, so reading and writing are checked to the byte here.
"""

import configparser
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import model_folder, running, tensors
from conversion.options import Options
from conversion.running import Runner
from conversion.source import Source, complete
from conversion.tensors import HashedFile, Lazy
from mpt.bounded import read_text
from mpt.checkpoint import read_config
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, UnsupportedConfig, UserError
from mpt.tokenizer import tokenizer_files

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = "transformer.blocks."
# Per block: our name, FasterTransformer's, and how it is laid out (see `_Layout`).
_IN_BLOCK = (
    ("norm_1", "input_layernorm", "whole"),
    ("attn.Wqkv", "attention.query_key_value", "qkv"),
    ("attn.out_proj", "attention.dense", "rows"),
    ("norm_2", "post_attention_layernorm", "whole"),
    ("ffn.up_proj", "mlp.dense_h_to_4h", "columns"),
    ("ffn.down_proj", "mlp.dense_4h_to_h", "rows"),
)


def cannot_express(source: Source) -> dict[str, str]:
    """By name of a setting, why FasterTransformer would compute this model differently."""
    config, attention = source.config, source.config.attention
    found: dict[str, str] = {}
    if attention["clip_qkv"] is not None:
        found["clip_qkv"] = f"clip_qkv {attention['clip_qkv']}: FasterTransformer does not clip"
    if attention["alibi"] and attention["alibi_bias_max"] != 8:
        found["alibi_bias_max"] = f"alibi_bias_max {attention['alibi_bias_max']}: FasterTransformer's slopes are for 8"
    if attention["qk_ln"]:
        found["qk_ln"] = "qk_ln: FasterTransformer has no norms of queries and keys"
    if config.logit_factor is not None:
        found["logit_scale"] = f"logit_scale {config.logit_scale}: FasterTransformer does not scale logits"
    if attention["softmax_scale"] not in (None, config.d_head**-0.5):
        found["softmax_scale"] = f"softmax_scale {attention['softmax_scale']}: FasterTransformer uses 1/sqrt(d_head)"
    if config.n_kv_heads != config.n_heads:
        found["kv_n_heads"] = (
            f"kv_n_heads {config.n_kv_heads}: FasterTransformer has a key-value head for each query head"
        )
    return found


@dataclass(frozen=True)
class _File:
    """One file of the folder: its name, its shape, and which tensor's part it holds; None holds zeros."""

    name: str
    shape: tuple[int, ...]
    tensor: str | None
    part: Callable[[Tensor], Tensor]


def files(config: MPTConfig, tp: int, has_head: bool) -> Iterator[_File]:
    """Every file of a folder for tp ranks, in the order they are written.

    Biases the model has not are files of zeros, since FasterTransformer wants them.
    """
    c = config.d_model
    yield _File("model.wte.bin", (config.vocab_size, c), "transformer.wte.weight", _same)
    if config.has_wpe:
        yield _File("model.wpe.bin", (config.max_seq_len, c), "transformer.wpe.weight", _same)
    for n in range(config.n_layers):
        for ours, theirs, layout in _IN_BLOCK:
            name, path = f"{_BLOCK}{n}.{ours}", f"model.layers.{n}.{theirs}"
            yield from _pair(name, path, layout, config, tp)
    yield from _pair("transformer.norm_f", "model.final_layernorm", "whole", config, tp)
    if has_head:
        yield _File("model.lm_head.weight.bin", (config.vocab_size, c), "lm_head.weight", _same)


def _pair(name: str, path: str, layout: str, config: MPTConfig, tp: int) -> Iterator[_File]:
    """A module's weight and bias."""
    c, f = config.d_model, config.d_ffn
    bias = None if config.no_bias else f"{name}.bias"
    if layout == "whole":
        yield _File(f"{path}.weight.bin", (c,), f"{name}.weight", _same)
        yield _File(f"{path}.bias.bin", (c,), bias, _same)
        return
    ranks = range(tp)
    if layout == "qkv":  # a module's weights before its biases, so that each tensor is read once
        yield from (_File(f"{path}.weight.{r}.bin", (c, 3, c // tp), f"{name}.weight", _qkv(r, tp)) for r in ranks)
        yield from (_File(f"{path}.bias.{r}.bin", (3, c // tp), bias, _qkv_bias(r, tp)) for r in ranks)
    elif layout == "columns":
        yield from (_File(f"{path}.weight.{r}.bin", (c, f // tp), f"{name}.weight", _columns(r, tp)) for r in ranks)
        yield from (_File(f"{path}.bias.{r}.bin", (f // tp,), bias, _slice(r, tp)) for r in ranks)
    else:
        n_in = c if name.endswith("out_proj") else f
        yield from (_File(f"{path}.weight.{r}.bin", (n_in // tp, c), f"{name}.weight", _rows(r, tp)) for r in ranks)
    if layout == "rows":
        yield _File(f"{path}.bias.bin", (c,), bias, _same)


def write(source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write `<out>/<tp>-gpu/`, config.json and the tokenizer beside it; the weights' sha256.

    Raises UserError for a tensor-parallel degree that does not fit.
    """
    config, tp = source.config, options.tensor_parallel
    kind: torch.dtype = getattr(torch, dtype)
    for what, size in (("n_heads", config.n_heads), ("d_model", config.d_model), ("d_ffn", config.d_ffn)):
        if tp < 1 or size % tp:
            raise UserError(f"`--tensor-parallel` is {tp}; it must divide {what} {size}")
    folder = out / f"{tp}-gpu"
    folder.mkdir()
    digests: dict[Path, str] = {}
    for name, its in groupby(files(config, tp, "lm_head.weight" in source.tensors), key=lambda file: file.tensor):
        digests |= _write_tensor(name, None if name is None else source.tensors[name], its, folder, kind, advance)
    (folder / "config.ini").write_text(_ini(source, kind, tp), encoding="utf-8")
    model_folder.write_beside(source, kind, out)
    return digests


def _write_tensor(
    name: str | None,
    tensor: Lazy | None,
    its: Iterable[_File],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> dict[Path, str]:
    """Write a tensor's files, and read it once; files of zeros where there is none."""
    whole = torch.empty(0)
    if name is not None and tensor is not None:
        whole = tensor.cast(dtype, name).read()
        tensors.check_finite(name, whole, tensor.where)
    digests = {}
    for file in its:
        values = torch.zeros(file.shape, dtype=dtype) if tensor is None else file.part(whole)
        assert tuple(values.shape) == file.shape, (file.name, values.shape)
        data = tensors.raw(values)
        with HashedFile(folder / file.name) as target:
            target.write(data)
        digests[folder / file.name] = target.sha256
        advance(len(data))
    return digests


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """A folder of any tensor-parallel degree, ours or the public converter's.

    What config.ini does not say is taken from config.json beside it, else MPT's released values. Raises DamagedFile for
    a file that is missing or not of its exact size, UserError for several degrees in one folder.
    """
    folder = path
    if not (path / "config.ini").is_file():
        degrees = sorted(path.glob("*-gpu"))
        if len(degrees) != 1:
            raise UserError(f"`{path}` holds {len(degrees)} degrees; give one of {', '.join(map(str, degrees))}")
        folder = degrees[0]
    ini = _section(folder / "config.ini")
    tp, dtype = ini.number("tensor_para_size", 1), ini.dtype()
    has_head = (folder / "model.lm_head.weight.bin").is_file()
    config = _config(ini, path, has_head)
    parts: dict[str, list[_File]] = {}
    for file in files(config, tp, has_head):
        _check_file(folder / file.name, file, dtype)
        if file.tensor is not None:
            parts.setdefault(file.tensor, []).append(file)
    found = {name: _joined(name, folder, its, dtype, config) for name, its in parts.items()}
    own = next((place for place in (path, folder) if tokenizer_files(place)), path)
    its_tokenizer, why_not = model_folder.find_tokenizer(own, tokenizer)
    return Source(
        kind="fastertransformer",
        path=path,
        config=config,
        tensors=complete(config, found, folder),
        tokenizer=its_tokenizer,
        why_no_tokenizer=why_not,
        files=tuple(sorted(folder.iterdir())),
        notes=(f"tensor parallel {tp}",),
        folder=path if (path / "config.json").is_file() else None,
    )


def _check_file(path: Path, file: _File, dtype: torch.dtype) -> None:
    size = dtype.itemsize * torch.Size(file.shape).numel()
    if not path.is_file():
        raise DamagedFile(f"`{path.parent}` has no `{path.name}`; copy it again")
    if path.stat().st_size != size:
        raise DamagedFile(f"`{path}` has {path.stat().st_size} bytes, {list(file.shape)} in {dtype} needs {size}")
    if file.tensor is None and any(path.read_bytes()):
        raise UnsupportedConfig(f"`{path}` holds biases; its config.json must say no_bias false")


def runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    """Our model with the tanh form of GELU, the only one FasterTransformer has; float16 is as near as that comes."""
    forward = running.forward_of(running.filled(target, "tanh"))
    return [Runner("fastertransformer read back", forward, least_exact="float16")]


@dataclass(frozen=True)
class _Ini:
    path: Path
    values: Mapping[str, str]

    def number(self, key: str, default: int | None = None) -> int:
        text = self.values.get(key)
        if text is None and default is not None:
            return default
        try:
            found = int(text or "")
        except ValueError:
            raise DamagedFile(f"`{self.path}` has {key} `{text}`; a whole number is needed") from None
        if found < 1:
            raise DamagedFile(f"`{self.path}` has {key} {found}; it must be above 0")
        return found

    def dtype(self) -> torch.dtype:
        name = self.values.get("weight_data_type", "fp32")
        if name not in _DTYPES:
            raise DamagedFile(f"`{self.path}` has weight_data_type `{name}`; known: {', '.join(_DTYPES)}")
        return _DTYPES[name]


def _section(path: Path) -> _Ini:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_text(path))
        return _Ini(path, dict(parser["gpt"]))
    except (configparser.Error, KeyError, UnicodeDecodeError) as error:
        raise DamagedFile(f"`{path}` is no FasterTransformer configuration: {error}") from error


def _config(ini: _Ini, path: Path, has_head: bool) -> MPTConfig:
    d_model = ini.number("head_num") * ini.number("size_per_head")
    facts: dict[str, Any] = {
        "d_model": d_model,
        "n_heads": ini.number("head_num"),
        "n_layers": ini.number("num_layer"),
        "vocab_size": ini.number("vocab_size"),
        "max_seq_len": ini.number("max_pos_seq_len"),
        "expansion_ratio": ini.number("inter_size", 4 * d_model) / d_model,
        "tie_word_embeddings": not has_head,
    }
    beside = next((p / "config.json" for p in (path, ini.path.parent) if (p / "config.json").is_file()), None)
    if beside is not None:
        config = read_config(beside.parent)
        differing = [key for key, value in facts.items() if getattr(config, key) != value]
        if differing:
            key = differing[0]
            raise DamagedFile(f"`{beside}` has {key} {getattr(config, key)}, `{ini.path}` {facts[key]}")
        return config
    alibi = ini.values.get("use_attention_linear_bias", "False") == "True"
    eps = float(ini.values.get("layernorm_eps", "1e-5"))
    return MPTConfig(**facts, norm_eps=eps, attn_config={"alibi": alibi})


def _ini(source: Source, dtype: torch.dtype, tp: int) -> str:
    config = source.config
    end = source.tokenizer.eos_id if source.tokenizer is not None else config.eos_token_id or 0
    rows: dict[str, object] = {
        "model_name": source.path.resolve().name,
        "head_num": config.n_heads,
        "size_per_head": config.d_head,
        "inter_size": config.d_ffn,
        "max_pos_seq_len": config.max_seq_len,
        "num_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "start_id": end,
        "end_id": end,
        "weight_data_type": next(name for name, known in _DTYPES.items() if known == dtype),
        "tensor_para_size": tp,
        "layernorm_eps": config.norm_eps,
    }
    if config.attention["alibi"]:
        rows |= {"has_positional_encoding": False, "use_attention_linear_bias": True}
    return "[gpt]\n" + "".join(f"{key} = {value}\n" for key, value in rows.items())


def _joined(name: str, folder: Path, its: list[_File], dtype: torch.dtype, config: MPTConfig) -> Lazy:
    """The tensor that the ranks' parts make."""
    c = config.d_model
    module, _, kind = name.rpartition(".")
    is_linear = module.endswith(("Wqkv", "out_proj", "up_proj", "down_proj"))

    def read() -> Tensor:
        parts = [
            torch.frombuffer(bytearray((folder / file.name).read_bytes()), dtype=dtype).view(file.shape) for file in its
        ]
        if not is_linear:
            return parts[0]
        if name.endswith("Wqkv.weight"):
            return torch.cat(parts, dim=2).reshape(c, 3 * c).t().contiguous()
        if name.endswith("Wqkv.bias"):
            return torch.cat(parts, dim=1).reshape(3 * c)
        if name.endswith("up_proj.weight"):
            return torch.cat(parts, dim=1).t().contiguous()
        if name.endswith(("out_proj.weight", "down_proj.weight")):
            return torch.cat(parts, dim=0).t().contiguous()
        return torch.cat(parts)  # a bias, whole or in parts

    shape: tuple[int, ...] = its[0].shape
    if is_linear:
        n_out = {"Wqkv": 3 * c, "up_proj": config.d_ffn}.get(module.rpartition(".")[2], c)
        n_in = config.d_ffn if module.endswith("down_proj") else c
        shape = (n_out,) if kind == "bias" else (n_out, n_in)
    return Lazy(dtype, shape, read, its[0].name)


def _same(values: Tensor) -> Tensor:
    return values


def _slice(rank: int, tp: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.chunk(tp)[rank]


def _qkv(rank: int, tp: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.t().reshape(values.shape[1], 3, -1).chunk(tp, dim=2)[rank]


def _qkv_bias(rank: int, tp: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.reshape(3, -1).chunk(tp, dim=1)[rank]


def _columns(rank: int, tp: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.t().chunk(tp, dim=1)[rank]


def _rows(rank: int, tp: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.t().chunk(tp, dim=0)[rank]
