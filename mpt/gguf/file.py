"""A GGUF file as what it says: keys, tensors, tokenizer, chat template. Imports nothing heavy.

Not here: the header's format (`header.py`), what its keys mean for MPT's config and weights (`model.py`), writing such
files (`conversion/formats/gguf_file.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mpt.gguf.header import GGUFTensor, read_header
from mpt.gguf.tokenizer import read_tokenizer
from mpt.tokenizer import Tokenizer

_MAGIC = b"GGUF"
_TOKEN_KEYS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's names and templates'


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """One file. keys, tensors: of its header."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @cached_property
    def tokenizer(self) -> tuple[Tokenizer | None, str | None]:
        """The tokenizer, or None and why there is none. Raises DamagedFile where its lists disagree."""
        embedding = self.tensors.get("token_embd.weight")
        return read_tokenizer(self.keys, embedding.shape[0] if embedding and embedding.shape else 0, self.path)

    @property
    def chat_template(self) -> str | None:
        return self.text("tokenizer.chat_template")

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        found = self.keys.get("tokenizer.ggml.eos_token_id")
        return found if isinstance(found, int) else 0

    def token_names(self) -> dict[str, str]:
        """What templates call the control tokens by: `bos_token`, `eos_token` and the like."""
        tokens = self.keys.get("tokenizer.ggml.tokens")
        found = {}
        for key, name in _TOKEN_KEYS.items():
            token_id = self.keys.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(tokens, list) and isinstance(token_id, int) and 0 <= token_id < len(tokens):
                found[f"{name}_token"] = str(tokens[token_id])
        return found

    def text(self, key: str) -> str | None:
        """The value of a key where it is a text."""
        value = self.keys.get(key)
        return value if isinstance(value, str) else None


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_gguf(path: Path) -> GGUFFile:
    """A file; its header alone is read, once. Raises DamagedFile, UserError for a part of several."""
    stat = path.stat()
    return _open(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)  # a header with a vocabulary takes 0.2 s, and a server asks several times
def _open(path: Path, n_bytes: int, modified_ns: int) -> GGUFFile:
    return GGUFFile(path, *read_header(path))
