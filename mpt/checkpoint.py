"""Reads checkpoints, Hugging Face style folders and GGUF files, into the model, and writes such folders.

A checkpoint's place is its folder, or the GGUF file that it is.

Reading streams: each tensor goes from the file straight into its parameter, so loading peaks at the model plus its
largest tensor (a memory-mapped reader keeps every page it touched: 3 times the model when measured). Weights are data:
safetensors, or `pytorch_model*.bin` through torch's weights-only unpickler; code beside a checkpoint is never run.

Not here: what a checkpoint says about text (`checkpoint_text.py`); Composer and FasterTransformer folders, ONNX
(`conversion/`); training state (`training/checkpoint.py`).
"""

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from mpt.architecture import read_keys
from mpt.bounded import parse_json
from mpt.catalog import GPTQ_FILES, resolve
from mpt.config import MPTConfig
from mpt.config_keys import extended_type
from mpt.errors import CheckpointNotFound, DamagedFile, UnsupportedConfig
from mpt.files import read_json, read_optional_json, whole_folder
from mpt.gguf import model as gguf_model
from mpt.gguf.file import is_gguf, open_gguf
from mpt.manifest import verify_manifest, write_manifest
from mpt.model import MPTLanguageModel
from mpt.packed import layers as packed_layers
from mpt.packed.folder import unpacked, unpacking_in_words
from mpt.packed.matrix import PackedTensor, Weight
from mpt.packed.packing import packing_in
from mpt.stored import StoredTensor

if TYPE_CHECKING:
    from mpt.chat_template import ChatTemplate
    from mpt.packed.layers import Pack
    from mpt.sharding import Shard
    from mpt.style_template import StyleTemplate
    from mpt.tokenizer import Tokenizer
    from mpt.transformers_model import MPTForCausalLM

_Model = TypeVar("_Model", bound=MPTLanguageModel)

log = logging.getLogger(__name__)

_HEADER_LIMIT = 16_000_000  # of 100,000 tensors; the format's own bound is 100 MB
_PICKLE_LIMIT = 64_000_000  # MPT-30B's has 0.1 MB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,  # the integers are in quantised folders only, never weights by themselves
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_COUNTS = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}  # positions of a vision encoder, masks
# What may stand before the name of a language model's tensor: trainers' wrappers and larger models' attributes.
_PREFIXES = (
    "model.", "module.", "base_model.", "lang_encoder.", "language_model.", "language_encoder.", "text_model.", "llm.",
    "lm.",
)  # fmt: skip
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OF_LANGUAGE_MODEL = re.compile(
    r"lm_head\.weight|transformer\.((wte|wpe|norm_f)|blocks\.\d+\.(norm_1|norm_2|attn|ffn)(\.\w+)?)"
    r"\.(weight(\.\w+)*|bias|qweight|qzeros|scales|g_idx|SCB|weight_format)"
)
# `mosaic_gpt` (the 1B) to today's names, in this order. Source: llm-foundry scripts/misc/convert_examples_ckpt.py
_MOSAIC_GPT_NAMES = (
    (".ln_", ".norm_"),
    (".mlp_up.", ".up_proj."),
    (".mlp_down.", ".down_proj."),
    (".mlp.", ".ffn."),
)


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
    pack: "Pack | None" = None,
) -> "MPTForCausalLM":
    """The model at a place, or under a name of the catalog, ready for inference, behind transformers' interface.

    dtype: None keeps the file's. verify: check every file against its manifest.json, where it has one. pack: keeps
    matrices packed, in layers that unpack them while they multiply: `as_it_lies` of `packed/layers.py`, or one of
    `packed/rounding.py`; such a model can be run and not saved.
    Raises CheckpointNotFound, UnsupportedConfig, DamagedFile.
    """
    from mpt.transformers_model import MPTForCausalLM

    place = resolve(str(name_or_path))
    model = _read(MPTForCausalLM, place, dtype=dtype, device=device, verify=verify, pack=pack)
    model.generation_config = _generation_config(place)
    model.name_or_path = str(name_or_path)
    return model


def load_for_engine(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
    shard: "Shard | None" = None,
    pack: "Pack | None" = None,
) -> MPTLanguageModel:
    """As `load`, without transformers' interface, whose import takes half of a server's start, and 200 MB.

    shard: a share of a model that several processes hold together, which goes without `pack`.
    """
    place = resolve(str(name_or_path))
    return _read(MPTLanguageModel.of, place, dtype=dtype, device=device, verify=verify, shard=shard, pack=pack)


def _read(
    make: Callable[[MPTConfig], _Model],
    place: Path,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    verify: bool,
    shard: "Shard | None" = None,
    pack: "Pack | None" = None,
) -> _Model:
    if verify:
        verify_manifest(place)
    config = read_config(place)
    with torch.device("meta"):
        model = make(config)
    weights = weights_of(model, place)
    if shard is not None:
        shard.cut(model)
    if dtype is None:
        dtype = stored_dtype(place, config, weights)
    model.config.dtype = dtype
    if pack is not None:
        assert shard is None, "a model shared over processes is cut into parts of its real values"
        packed_layers.put_into(model, weights, device, dtype, pack)
    else:
        say_unpacked(place, weights)
    # As `to_empty`, which makes torch import its symbolic shapes.
    model = model.to(dtype)._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    packed_layers.tie_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if shard is None or weights[name].shape == parameter.shape:
                weights[name].read_into(parameter)
            else:
                parameter.copy_(shard.part(name, weights[name].read(), config))
    return model.eval()


def save(
    model: "MPTForCausalLM",
    folder: str | Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    chat_template: "ChatTemplate | StyleTemplate | None" = None,
    manifest: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a Hugging Face folder that appears only once it is whole; returns it.

    manifest: entries to put beside the files' sha256 in manifest.json (name, recipe, scores ...). Raises UserError if
    the folder exists and is not empty or the model's matrices are packed, MachineRefused when it cannot be written.
    """
    folder = Path(folder)
    packed_layers.refuse_to_save(model)
    with whole_folder(folder) as partial:
        with without_progress_bar():
            model.save_pretrained(partial, max_shard_size=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(partial)
            generation = GenerationConfig(eos_token_id=list(tokenizer.end_ids), use_cache=True)
            generation.save_pretrained(partial)
        if chat_template is not None:
            chat_template.save(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone; a checkpoint is there to be read
        write_manifest(partial, manifest or {})
    return folder


def read_config(place: Path) -> MPTConfig:
    """The config of a folder or a GGUF file. Raises CheckpointNotFound, DamagedFile, UnsupportedConfig."""
    keys = read_keys(place)
    return MPTConfig(**keys) if is_gguf(place) else MPTConfig.from_dict(keys)


def stored_tensors(place: Path) -> dict[str, Weight]:
    """Every weight of a folder or a GGUF file under the name the model uses, without reading it.

    Understands hub, in-tree and `mosaic_gpt` names and the prefixes of trainers; single and sharded files; what AWQ,
    GPTQ and bitsandbytes packed, as its real values. Of a larger model, such as LLaVA, only the language model's.
    """
    return gguf_model.read_weights(open_gguf(place)) if is_gguf(place) else _tensors_of_folder(place)


def _tensors_of_folder(folder: Path) -> dict[str, Weight]:
    packing = packing_in(folder)
    is_larger = extended_type(read_optional_json(folder / "config.json")) is not None
    found: dict[str, StoredTensor] = {}
    again: dict[str, StoredTensor] = {}  # OpenFlamingo's second names for its blocks
    for stored_as, tensor in _entries(folder, is_larger):
        name = canonical_name(stored_as)
        if is_larger and not _OF_LANGUAGE_MODEL.fullmatch(name):
            continue
        if "old_decoder_blocks." in stored_as:
            again[name] = tensor
        elif name in found:
            raise DamagedFile(f"tensor `{name}` is stored twice: in `{found[name].file.name}` and `{tensor.file.name}`")
        else:
            found[name] = tensor
    no_bias = read_optional_json(folder / "config.json").get("no_bias", True)
    return unpacked(again | found, packing, bool(no_bias))


def left_out(folder: Path) -> list[str]:
    """The parts of a larger model that are not its language model, with the number of tensors of each."""
    kind = extended_type(read_optional_json(folder / "config.json"))
    if kind is None:
        return []
    parts: dict[str, int] = {}
    for stored_as, _ in _entries(folder, True):
        name = canonical_name(stored_as)
        if not _OF_LANGUAGE_MODEL.fullmatch(name):
            named = [part for part in name.split(".") if part not in ("transformer", "blocks") and not part.isdigit()]
            part = named[0] if named else name
            parts[part] = parts.get(part, 0) + 1
    return [f"`{part}` ({count} tensor{'s' * (count > 1)})" for part, count in sorted(parts.items())]


def _entries(folder: Path, is_larger: bool) -> Iterator[tuple[str, StoredTensor]]:
    """Name as stored and place of each tensor of the folder's files. is_larger: some may be whole numbers."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            yield from safetensors_entries(file, _DTYPES | _COUNTS if is_larger else _DTYPES)
        else:
            state = describe_torch_file(file)
            if is_larger and isinstance(state, Mapping):
                state = {name: t for name, t in state.items() if getattr(t, "dtype", None) not in _COUNTS.values()}
            yield from place(file, state)


def canonical_name(name: str) -> str:
    """The model's name for a tensor stored under an older or prefixed one."""
    name = _WRAPPERS.sub("", name)
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    if name.startswith("old_decoder_blocks."):
        name = f"transformer.blocks.{name.partition('.')[2]}"
    if name.startswith("transformer.ln_f."):
        return name.replace(".ln_f.", ".norm_f.")
    if name.startswith("transformer.blocks."):
        name = name.replace(".decoder_layer.", ".")
        for old, new in _MOSAIC_GPT_NAMES:
            name = name.replace(old, new)
    return name


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before .bin, an index before a glob."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise DamagedFile(f"`{folder / index}` has no `weight_map` from tensor to file; copy it again")
            names = sorted({str(name) for name in weight_map.values()})
            bad = [name for name in names if Path(name).name != name]
            if bad:
                raise DamagedFile(f"`{index}` points outside its folder: `{bad[0]}`")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise DamagedFile(
                    f"`{index}` names `{missing[0]}`, which is not there ({len(missing)} of {len(names)} missing)"
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    by_autogptq = list(folder.glob(GPTQ_FILES))  # with quantize_config.json
    if len(by_autogptq) == 1:
        return by_autogptq
    raise CheckpointNotFound(f"`{folder}` has no model.safetensors or pytorch_model.bin, single or sharded")


def weights_of(model: MPTLanguageModel, place: Path) -> dict[str, Weight]:
    """Where each of the model's parameters is stored, tied ones once; the model may be on the meta device.

    Raises DamagedFile unless names and shapes match exactly and a stored head equals the embedding it is tied to.
    """
    stored = stored_tensors(place)
    targets = dict(model.named_parameters())  # tied weights appear once
    head = stored.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    check_names(place, stored.keys(), targets.keys())
    for name, parameter in targets.items():
        if not stored[name].dtype.is_floating_point:
            raise UnsupportedConfig(
                f"`{name}` in `{stored[name].file.name}` is {stored[name].dtype}, no weights; supported: "
                "floating types, and integers with what a `quantization_config` puts beside them"
            )
        if stored[name].shape != tuple(parameter.shape):
            raise DamagedFile(
                f"`{name}` in `{stored[name].file.name}` is {list(stored[name].shape)}, "
                f"the config makes it {list(parameter.shape)}"
            )
    if head is not None and not _are_equal(head, stored["transformer.wte.weight"]):
        raise DamagedFile(
            f"`lm_head.weight` differs from the embedding it is tied to; set tie_word_embeddings to false in "
            f"`{place / 'config.json'}` if the head was trained on its own"
        )
    return stored


def check_names(where: Path, stored: Set[str], expected: Set[str]) -> None:
    """Raises DamagedFile unless exactly the expected tensors are stored; says so where the biases alone differ."""
    missing, unknown = expected - stored, stored - expected
    biases = {name for name in expected | stored if name.endswith(".bias")}
    if missing == biases and not unknown and missing:
        raise DamagedFile(
            f"`{where}` holds none of its {len(missing)} biases (`no_bias` is false): transformers' own MPT class "
            "drops them when it saves a checkpoint again, and the copy answers differently; take the original, or set "
            "`no_bias` to true in its config.json to use the copy without them"
        )
    if unknown == biases and not missing and unknown:
        raise DamagedFile(
            f"`{where}` holds {len(unknown)} bias{'es' * (len(unknown) > 1)} that its config denies, `{min(unknown)}` "
            "first; set `no_bias` to false in its config.json to use them"
        )
    if missing or unknown:
        what = f"misses `{min(missing)}`" if missing else f"holds `{min(unknown)}`, unknown to its config"
        more = len(missing) + len(unknown) - 1
        raise DamagedFile(f"`{where}` {what}" + (f" (and {more} more names differ)" if more else ""))


def _are_equal(a: Weight, b: Weight) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a.read().to(b.dtype), b.read())


def safetensors_entries(file: Path, dtypes: Mapping[str, torch.dtype] = _DTYPES) -> Iterator[tuple[str, StoredTensor]]:
    """Name and place of each tensor of a safetensors file. Format: u64 header size, JSON header, data."""
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            (n_header,) = struct.unpack("<Q", f.read(8))
            if n_header > min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"header of {n_header} bytes")
            header = parse_json(f.read(n_header))
        header.pop("__metadata__", None)
        used = 0  # entries may come in any order, their bytes must not be shared
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start < used:
                raise ValueError(f"`{name}` overlaps another tensor")
            used = end
            if entry["dtype"] not in dtypes:
                raise UnsupportedConfig(
                    f"`{name}` in `{file.name}` is {entry['dtype']}; supported: {', '.join(_DTYPES)}"
                )
            tensor = StoredTensor(file, 8 + n_header + start, dtypes[entry["dtype"]], tuple(entry["shape"]))
            if (
                min(tensor.shape, default=0) < 0
                or start < 0
                or end - start != tensor.n_bytes
                or 8 + n_header + end > size
            ):
                raise ValueError(f"`{name}` does not fit in the file")
            yield name, tensor
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise DamagedFile(f"`{file}` is not a whole safetensors file ({error}); copy it again") from error


def describe_torch_file(file: Path, safe_globals: Sequence[Any] = ()) -> Any:
    """What a `torch.save` file holds, unpickled weights-only and without its tensors' data: `place` finds that.

    safe_globals: more classes it may name. Raises DamagedFile, also for a file that asks for code.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _check_archive(file)
    try:
        # The mode gives shapes and, per storage, the offset of its bytes in the file.
        with FakeTensorMode(), torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to run the file's code
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for `{code[1]}`, and such a file can run code" if code else "is damaged, or more than weights"
        raise DamagedFile(f"`{file}` {what}; it was not opened further: get it as safetensors") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and others for a bad file
        what = str(error).partition(".")[0].partition("\n")[0]
        raise DamagedFile(f"`{file}` is not a whole torch file ({what}); copy it again") from error


def _check_archive(file: Path) -> None:
    """Raises DamagedFile where what is unpickled, the names without the numbers, grows when it is unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile, ValueError):
        return  # torch's format from before 1.6, or no torch file: whoever reads it says so
    for name, size in sizes.items():
        if name.endswith("/data.pkl") and size > _PICKLE_LIMIT:
            raise DamagedFile(f"`{name}` in `{file}` has {size} bytes, at most {_PICKLE_LIMIT} are read; copy it again")


def place(file: Path, state: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Name and place of each tensor of a mapping that `describe_torch_file` gave."""
    if not isinstance(state, Mapping):
        raise DamagedFile(f"`{file.name}` holds a {type(state).__name__}, not tensors by name")
    size = file.stat().st_size
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise DamagedFile(f"`{name}` in `{file.name}` is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in _DTYPES.values():
            supported = ", ".join(str(dtype) for dtype in _DTYPES.values())
            raise UnsupportedConfig(f"`{name}` in `{file.name}` is {tensor.dtype}; supported: {supported}")
        if not tensor.is_contiguous():
            raise UnsupportedConfig(f"`{name}` in `{file.name}` is stored transposed; save it again, contiguous")
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            raise UnsupportedConfig(
                f"`{file.name}` is in torch's format from before 1.6; save it again with a newer torch"
            )
        found = StoredTensor(
            file, start + tensor.storage_offset() * tensor.dtype.itemsize, tensor.dtype, tuple(tensor.shape)
        )
        if found.offset + found.n_bytes > size:
            raise DamagedFile(f"`{file.name}` ends before `{name}` does; copy it again")
        yield name, found


def stored_dtype(place: Path, config: MPTConfig, weights: Mapping[str, Weight] | None = None) -> torch.dtype:
    """What a checkpoint's weights are loaded as when nothing is asked for: what its config says, else most of them."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    n_values: dict[torch.dtype, int] = {}
    for tensor in (weights or stored_tensors(place)).values():
        n_values[tensor.dtype] = n_values.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(n_values, key=lambda dtype: n_values[dtype])


def say_unpacked(place: Path, weights: Mapping[str, Weight]) -> None:
    """Log what unpacking costs, where something is packed."""
    packing = packing_in(place)
    said = unpacking_in_words(weights, None if packing is None else packing.tool)
    if said is not None:
        log.info("`%s`: %s", place, said)


def packed_sizes(place: Path, *, to_run: bool = False) -> dict[str, int]:
    """What a checkpoint's matrices are packed as, and the bytes of each kind as they lie, the largest first.

    to_run: what C multiplies with instead.
    """
    if not is_gguf(place) and packing_in(place) is None:
        return {}
    n_bytes: dict[str, int] = {}
    for tensor in stored_tensors(place).values():
        if isinstance(tensor, PackedTensor) and tensor.packed_bytes:
            kind, size = (tensor.runs_as, tensor.run_bytes) if to_run else (tensor.kind, tensor.packed_bytes)
            n_bytes[kind] = n_bytes.get(kind, 0) + size
    return dict(sorted(n_bytes.items(), key=lambda item: -item[1]))


def _generation_config(place: Path) -> GenerationConfig:
    """The folder's generation_config.json; the cache is always on, though the published files switch it off."""
    if is_gguf(place):
        return GenerationConfig(eos_token_id=open_gguf(place).end_id, use_cache=True)
    path = place / "generation_config.json"
    config = GenerationConfig.from_dict(read_json(path)) if path.is_file() else GenerationConfig(eos_token_id=0)
    config.use_cache = True
    try:
        config.validate(strict=True)
    except ValueError as error:  # such a config loads, but `save` would fail on it after hours of training
        log.warning("`%s` contradicts itself, only its token ids are used: %s", path, error)
        ids = {key: getattr(config, key) for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
        config = GenerationConfig(**ids, use_cache=True)
    return config


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """transformers draws one for each file written, on whatever stderr is."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
