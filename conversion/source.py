"""What a path holds: recognised by looking, described, and every tensor of it readable under the model's own name."""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion.tensors import Lazy
from mpt.catalog import find_local
from mpt.checkpoint import read_manifest, sha256
from mpt.config import MPTConfig
from mpt.errors import CheckpointNotFound, DamagedFile, UserError
from mpt.model import MPTForCausalLM
from mpt.tokenizer import Tokenizer

KINDS = ("huggingface", "adapter", "composer", "composer-sharded", "fastertransformer", "gguf", "onnx")
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".zip", ".tar.zst", ".7z")


@dataclass(frozen=True)
class Source:
    """A checkpoint of any kind, opened: nothing of its weights is read yet."""

    kind: str
    path: Path
    config: MPTConfig
    tensors: Mapping[str, Lazy]  # under the model's names, exactly its parameters, a tied head once
    tokenizer: Tokenizer | None
    files: tuple[Path, ...]  # that it was read from
    chat_template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json, where there is one
    notes: tuple[str, ...] = ()  # what a reader should know of how it was read
    folder: Path | None = None  # that describes it (manifest.json, config.json), if it has one
    licence: str | None = None  # where the file itself says it
    manifests: tuple[Path, ...] = ()  # folders whose manifest.json its files are checked against

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its tensors."""
        dtypes = [tensor.dtype for tensor in self.tensors.values()]
        return max(set(dtypes), key=dtypes.count)

    @property
    def n_parameters(self) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def hash_files(self) -> dict[str, str]:
        """sha256 of every file it was read from, by name. Raises DamagedFile where a manifest says otherwise."""
        found = {path: sha256(path) for path in self.files}
        for folder in self.manifests:
            for name, expected in (read_manifest(folder) or {}).get("files", {}).items():
                if not (folder / name).is_file():
                    raise DamagedFile(f"`{name}` is in manifest.json but not in `{folder}`; copy the checkpoint again")
                if found.get(folder / name, expected) != expected:
                    raise DamagedFile(f"`{folder / name}` does not match its sha256 in manifest.json; copy it again")
        return {path.name: digest for path, digest in found.items()}

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors.values())


def recognise(path: Path) -> str:
    """One of KINDS. Raises CheckpointNotFound for what is none of them, UserError for an archive."""
    if path.name.endswith(_ARCHIVES) and path.is_file():
        raise UserError(f"`{path}` is an archive; unpack it into a folder of its own and give that")
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return "gguf"
        if magic[:2] == b"PK" or path.suffix in (".pt", ".pth"):
            return "composer"
        raise CheckpointNotFound(f"`{path}` is no checkpoint file this reads: .pt of Composer, or .gguf")
    if not path.is_dir():
        raise CheckpointNotFound(f"`{path}` does not exist; give a checkpoint's folder or file")
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / ".metadata").is_file() and any(path.glob("*.distcp")):
        return "composer-sharded"
    if (path / "model.onnx").is_file():
        return "onnx"
    if (path / "config.ini").is_file() or any(path.glob("*-gpu/config.ini")):
        return "fastertransformer"
    if (path / "config.json").is_file():
        return "huggingface"
    for found in sorted(path.glob("*.gguf")) + sorted(path.glob("*.pt")):
        raise CheckpointNotFound(f"`{path}` has no config.json; give the file, for example `{found}`")
    raise CheckpointNotFound(
        f"`{path}` holds no checkpoint: config.json (Hugging Face), adapter_config.json (peft), model.onnx, "
        "config.ini (FasterTransformer) or .metadata (Composer)"
    )


def open_source(name_or_path: str | Path, tokenizer: Path | None = None, base: str | None = None) -> Source:
    """Open a checkpoint of any kind: a path, or a name of the catalog whose copy is on this machine.

    tokenizer: a folder, for kinds that bring none. base: what an adapter is added to, instead of what it names.
    Raises CheckpointNotFound, DamagedFile, UnsupportedConfig, UserError.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        found = find_local(str(name_or_path))
        if found is None:
            raise CheckpointNotFound(f"`{name_or_path}` does not exist; give a checkpoint's folder or file")
        path = found
    kind = recognise(path)
    if path.is_dir():
        refuse_links_outside(path)
    if base is not None and kind != "adapter":
        raise UserError(f"`--base` goes with adapters; `{path}` is {kind}")
    from conversion.formats import adapter, composer, fastertransformer, gguf_file, huggingface

    if kind == "adapter":
        return adapter.read(path, base)
    if kind in ("composer", "composer-sharded"):
        return composer.read(path, tokenizer)
    if kind == "fastertransformer":
        return fastertransformer.read(path, tokenizer)
    if kind == "gguf":
        return gguf_file.read(path, tokenizer)
    return huggingface.read(path, kind, tokenizer)


def complete(config: MPTConfig, tensors: dict[str, Lazy], where: Path) -> dict[str, Lazy]:
    """The tensors as exactly the model's parameters, in its shapes and order; a head equal to the embedding goes.

    Raises DamagedFile naming what is missing, unknown, of another shape, or a head that differs.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in MPTForCausalLM(config).named_parameters()}
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        what = f"misses `{min(missing)}`" if missing else f"holds `{min(unknown)}`, unknown to its config"
        more = len(missing) + len(unknown) - 1
        raise DamagedFile(f"`{where}` {what}" + (f" (and {more} more names differ)" if more else ""))
    for name, shape in expected.items():
        if not tensors[name].dtype.is_floating_point:
            raise DamagedFile(f"`{name}` in `{tensors[name].where}` is {tensors[name].dtype}, no weights")
        if tensors[name].shape != shape:
            raise DamagedFile(
                f"`{name}` in `{tensors[name].where}` is {list(tensors[name].shape)}, the config makes it {list(shape)}"
            )
    if head is not None:
        wte = tensors["transformer.wte.weight"]
        if head.shape != wte.shape or not torch.equal(head.read().to(wte.dtype), wte.read()):
            raise DamagedFile(f"`lm_head.weight` in `{head.where}` differs from the embedding the config ties it to")
    return {name: tensors[name] for name in expected}


def refuse_links_outside(folder: Path) -> None:
    """Raises DamagedFile for a link that leaves the folder; the Hugging Face cache's own links are allowed."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"  # of <cache>/models--x--y/snapshots/<commit>
    for entry in os.scandir(folder):
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(root) and target.parent != blobs:
                raise DamagedFile(f"`{entry.path}` is a link to `{target}`, outside its folder; copy the file itself")


def unpack(format_: str, data: bytes, where: str) -> tuple[Any, ...]:
    """struct.unpack. Raises DamagedFile for too few bytes."""
    try:
        return struct.unpack(format_, data)
    except struct.error as error:
        raise DamagedFile(f"`{where}` ends early; copy it again") from error
