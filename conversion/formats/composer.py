"""Composer checkpoints, what llm-foundry's trainer leaves: one `.pt`, or a folder of shards of an FSDP run.

`state.model` holds the weights under `model.`; `state.integrations.huggingface` the config and the tokenizer's files.
Nothing in them is trusted: pickles are read without running code, and of the tokenizer only files of known names.
"""

import datetime
import io
import json
import pickle
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion import tensors
from conversion.source import Source, complete
from conversion.tensors import Lazy
from mpt.checkpoint import canonical_name, describe_torch_file, place
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, MPTError, UnsupportedConfig, UserError
from mpt.lora import settings
from mpt.tokenizer import Tokenizer

# Composer keeps `.json` files of these names (without suffix), and newer ones the template.
_TOKENIZER_FILES = {
    "tokenizer": ".json", "tokenizer_config": ".json", "special_tokens_map": ".json", "added_tokens": ".json",
    "chat_template": ".jinja",
}  # fmt: skip
_PREFIX = "state.model."


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """A monolithic `.pt` or a folder with `.metadata`. Raises DamagedFile, also for pickles that ask for code."""
    if path.is_dir():
        kind, (found, integration) = "composer-sharded", _read_sharded(path)
        files: Iterable[Path] = sorted(p for p in path.iterdir() if p.is_file())
    else:
        kind, (found, integration) = "composer", _read_single(path)
        files = (path,)
    config = _config(integration, path)
    found, n_added = _with_adapters(found, integration, path)
    own, why_not, template = _tokenizer(integration, path)
    return Source(
        kind=kind,
        path=path,
        config=config,
        tensors=complete(config, found, path),
        tokenizer=Tokenizer.from_folder(tokenizer) if tokenizer else own,
        why_no_tokenizer=why_not,
        files=tuple(files),
        chat_template=template,
        notes=(f"LoRA added to {n_added} matrices",) if n_added else (),
    )


def _read_single(path: Path) -> tuple[dict[str, Lazy], Mapping[str, Any]]:
    state = _mapping(describe_torch_file(path, _harmless()), "state", path)
    found = {}
    for name, tensor in place(path, _mapping(state, "model", path)):
        found[canonical_name(name.removeprefix("model."))] = tensors.stored(tensor)
    integrations = state.get("integrations")
    known = integrations.get("huggingface") if isinstance(integrations, Mapping) else None
    return found, known if isinstance(known, Mapping) else {}


def _harmless() -> list[Any]:
    """What Composer's own readers allow beside tensors: times, and the arrays of numpy's random state."""
    import numpy as np

    multiarray = __import__("numpy._core.multiarray", fromlist=["_reconstruct"])
    kinds = [type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float32", "float64")]
    return [datetime.timedelta, multiarray._reconstruct, np.ndarray, np.dtype, *kinds]


def _mapping(state: Any, key: str, path: Path) -> Mapping[str, Any]:
    found = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping):
        raise DamagedFile(f"`{path}` has no `{key}`; a Composer checkpoint holds state.model")
    return found


class _Metadata(pickle.Unpickler):
    """Reads `.metadata`, which torch itself unpickles with any class: here only those that describe tensors."""

    _ALLOWED = frozenset({
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("collections", "OrderedDict"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in self._ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for `{module}.{name}`, and such a file can run code")


def _read_sharded(folder: Path) -> tuple[dict[str, Lazy], Mapping[str, Any]]:
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Metadata(file).load()
        stored = dict(metadata.state_dict_metadata)
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        paths = dict(metadata.planner_data or {})
    except MPTError:
        raise
    except Exception as error:  # pickle raises anything for a damaged file
        raise DamagedFile(f"`{path}` {error or type(error).__name__}; it was not opened further") from error
    found: dict[str, Lazy] = {}
    integration: dict[str, Any] = {}
    for name, entry in stored.items():
        chunks = getattr(entry, "chunks", None)
        if name.startswith(_PREFIX) and chunks is not None:
            ours = canonical_name(name.removeprefix(_PREFIX).removeprefix("model."))
            found[ours] = _sharded(folder, name, entry, places)
        keys = paths.get(name, tuple(name.split(".")))
        if tuple(keys[:3]) == ("state", "integrations", "huggingface") and chunks is None:
            _put(integration, keys[3:], _piece(folder, places.get((name, ())), name))
    if not found:
        raise DamagedFile(f"`{folder}` holds no `state.model`; a Composer checkpoint does")
    return found, _lists(integration)


def _sharded(folder: Path, name: str, entry: Any, places: Mapping[Any, Any]) -> Lazy:
    """A tensor whose pieces lie in several files."""
    shape, dtype = tuple(entry.size), entry.properties.dtype
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        if len(offsets) != len(shape) or any(
            o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)
        ):
            raise DamagedFile(f"`{name}` in `{folder}` has a piece outside its shape {list(shape)}")

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        n_filled = 0
        for chunk in entry.chunks:
            piece = _piece(folder, places.get((name, tuple(chunk.offsets))), name)
            if not isinstance(piece, Tensor) or tuple(piece.shape) != tuple(chunk.sizes):
                raise DamagedFile(f"a piece of `{name}` in `{folder}` is not of its size {list(chunk.sizes)}")
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
            n_filled += piece.numel()
        if n_filled != whole.numel():
            raise DamagedFile(f"`{name}` in `{folder}` has pieces of {n_filled} of its {whole.numel()} values")
        return whole

    return Lazy(dtype, shape, read, folder.name)


def _piece(folder: Path, info: Any, name: str) -> Any:
    """What `torch.save` wrote at a place of a shard file."""
    if info is None or Path(info.relative_path).name != info.relative_path:
        raise DamagedFile(f"`{name}` in `{folder / '.metadata'}` lies nowhere, or outside the folder")
    file = folder / info.relative_path
    if not file.is_file():
        raise DamagedFile(f"`{file}` is not there; copy the folder again")
    data = tensors.read_exactly(file, info.offset, info.length)
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        what = str(error).partition("\n")[0]
        raise DamagedFile(f"`{name}` in `{file.name}` is damaged or asks for code ({what})") from error


def _put(tree: dict[str, Any], keys: Iterable[Any], value: Any) -> None:
    *parents, last = (str(key) for key in keys)
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _lists(tree: Any) -> Any:
    """Mappings of 0, 1, 2 ... as the lists they were flattened from."""
    if not isinstance(tree, dict):
        return tree
    values = {key: _lists(value) for key, value in tree.items()}
    if values and all(key.isdigit() for key in values):
        return [values[key] for key in sorted(values, key=int)]
    return values


# What peft calls the parts of a matrix with adapters: frozen, A and B, behind which the adapter's name may stand.
_PART = re.compile(r"(?P<matrix>.+)\.(?P<part>base_layer|lora_A|lora_B)(\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)")
_MERGING = (
    "merge what is wanted into the base with peft's `merge_and_unload`, save that as a Hugging Face folder, and "
    "convert the folder"
)


def _with_adapters(
    found: Mapping[str, Lazy], integration: Mapping[str, Any], path: Path
) -> tuple[dict[str, Lazy], int]:
    """The tensors of a run that trained LoRA, each pair added to its matrix, and how many pairs there are.

    Raises UnsupportedConfig where only the pairs were saved, for several adapters, and for another kind; DamagedFile.
    """
    whole: dict[str, Lazy] = {}
    pairs: dict[str, dict[str, Lazy]] = {}
    adapters: set[str] = set()
    for name, tensor in found.items():
        part = _PART.fullmatch(name)
        if part is None or part["part"] == "base_layer":
            whole[name if part is None else f"{part['matrix']}.{part['kind']}"] = tensor
        else:
            pairs.setdefault(f"{part['matrix']}.weight", {})[part["part"]] = tensor
            adapters.add(part["adapter"] or "")
    if not pairs:
        return whole, 0
    if len(adapters) > 1:
        named = ", ".join(f"`{name}`" for name in sorted(adapters))
        raise UnsupportedConfig(f"`{path}` holds the adapters {named}; supported: one; {_MERGING}")
    model = integration.get("model")
    described = model.get("peft_config") if isinstance(model, Mapping) else None
    content = described.get("content") if isinstance(described, Mapping) else None
    rank, scale, base = settings(content if isinstance(content, Mapping) else {}, path, _MERGING)
    if not whole:
        raise UnsupportedConfig(
            f"`{path}` holds the adapters of a LoRA run and not the weights of its base, `{base}`; save the run with "
            "`should_save_peft_only: false`, or its adapters as peft does, and convert that folder"
        )
    for name, pair in pairs.items():
        matrix = whole.get(name)
        n_out, n_in = matrix.shape if matrix is not None and len(matrix.shape) == 2 else (0, 0)
        if {key: half.shape for key, half in pair.items()} != {"lora_A": (rank, n_in), "lora_B": (n_out, rank)}:
            raise DamagedFile(f"the adapter of `{name}` in `{path}` is no pair of rank {rank} that fits it")
        whole[name] = whole[name].plus_product(pair["lora_A"].read(), pair["lora_B"].read(), scale)
    return whole, len(pairs)


def _config(integration: Mapping[str, Any], path: Path) -> MPTConfig:
    try:
        content = integration["model"]["config"]["content"]
    except (KeyError, TypeError):
        raise UnsupportedConfig(
            f"`{path}` holds no config (state.integrations.huggingface.model.config); it was not trained from a "
            "Hugging Face model class"
        ) from None
    if not isinstance(content, dict):
        raise DamagedFile(f"the config in `{path}` is a {type(content).__name__}, not an object")
    return MPTConfig.from_dict(content)


def _tokenizer(integration: Mapping[str, Any], path: Path) -> tuple[Tokenizer | None, str, str | None]:
    """The tokenizer, or why there is none, and its chat template; a file of any other name or kind is left there."""
    tokenizer, why_not = None, "the source has none; to give one: --tokenizer FOLDER"
    entries = integration.get("tokenizer")
    if not isinstance(entries, Mapping):
        return None, why_not, None
    texts: dict[str, str] = {}
    for name, suffix in _TOKENIZER_FILES.items():
        entry = entries.get(name)
        if isinstance(entry, Mapping) and entry.get("file_extension") == suffix:
            content = entry.get("content")
            texts[name] = content if isinstance(content, str) else json.dumps(content)
    if "tokenizer" not in texts:
        return None, why_not, None
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / (name + _TOKENIZER_FILES[name])).write_text(text, encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_folder(folder)
        except DamagedFile as error:
            raise DamagedFile(f"the tokenizer in `{path}` is not readable: {error}") from error
        except UserError as error:
            why_not = f"none is read ({error}); to give one: --tokenizer FOLDER"
    template = texts.get("chat_template") or json.loads(texts.get("tokenizer_config", "{}")).get("chat_template")
    return tokenizer, why_not, template if isinstance(template, str) else None
