"""A checkpoint of any format, described, and every tensor of it readable under the model's own name.

Not here: which format a path holds and how it is read (`open.py`, `formats/`).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion.tensors import Lazy
from mpt.checkpoint import check_names
from mpt.config import MPTConfig
from mpt.errors import DamagedFile
from mpt.manifest import read_manifest, sha256
from mpt.model import MPTLanguageModel
from mpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A checkpoint of any kind, opened: nothing of its weights is read yet."""

    kind: str
    path: Path
    config: MPTConfig
    tensors: Mapping[str, Lazy]  # under the model's names, exactly its parameters, a tied head once
    tokenizer: Tokenizer | None
    files: tuple[Path, ...]  # that it was read from
    why_no_tokenizer: str = "the source has none"  # where `tokenizer` is None
    chat_template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json, where there is one
    notes: tuple[str, ...] = ()  # what a reader should know of how it was read
    folder: Path | None = None  # that describes it (manifest.json, config.json), if it has one
    licence: str | None = None  # where the file itself says it
    tokenizer_files: tuple[Path, ...] = ()  # of its folder, that a copy takes along as they are
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


def complete(config: MPTConfig, tensors: dict[str, Lazy], where: Path) -> dict[str, Lazy]:
    """The tensors as exactly the model's parameters, in its shapes and order; a head equal to the embedding goes.

    Raises DamagedFile naming what is missing, unknown, of another shape, or a head that differs.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in MPTLanguageModel.of(config).named_parameters()}
    tensors = dict(tensors)
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_names(where, tensors.keys(), expected.keys())
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


def unpack(format_: str, data: bytes, where: str) -> tuple[Any, ...]:
    """struct.unpack. Raises DamagedFile for too few bytes."""
    try:
        return struct.unpack(format_, data)
    except struct.error as error:
        raise DamagedFile(f"`{where}` ends early; copy it again") from error
