"""The header of a GGUF file: its keys and values, and where each tensor lies.

The `gguf` package's reader trusts its input. So this one is ours: every count and length is bounded by the file's size
before anything is allocated. Source: the GGUF specification (ggml, docs/gguf.md).

Not here: what the keys mean for MPT ((`model.py`, `tokenizer.py`)), and writing (`conversion/formats/`).
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt.errors import DamagedFile, UserError
from mpt.gguf import ggml_types

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 10_000_000  # entries of any table: a vocabulary has 50,432


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file."""

    name: str
    kind: str  # a name of `ggml_types`
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Keys with their values, and the tensors by name. Raises DamagedFile; UserError for one part of several."""
    header = _Header(path)
    keys, described = header.parse()
    n_parts = keys.get("split.count", 1)
    if n_parts != 1:
        raise UserError(f"`{path}` is one of {n_parts} files; join them with `llama-gguf-split --merge`")
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise DamagedFile(f"`{path}` has general.alignment {alignment}")
    start = -(-header.at // alignment) * alignment
    found: dict[str, GGUFTensor] = {}
    end = 0
    for name, shape, number, offset in sorted(described, key=lambda entry: entry[3]):
        kind = ggml_types.type_name(number)
        if kind is None:
            raise DamagedFile(f"`{name}` in `{path}` has {ggml_types.unknown_type(number)}")
        size = ggml_types.n_bytes(kind, shape)
        if size is None:
            raise DamagedFile(f"`{name}` in `{path}` is {list(shape)}, whose rows do not fill blocks of {kind}")
        if name in found or offset < end:
            raise DamagedFile(f"`{name}` in `{path}` overlaps another tensor or is there twice")
        if start + offset + size > header.size:
            raise DamagedFile(
                f"`{path}` ends early: it has {header.size} bytes, and `{name}` alone reaches to byte "
                f"{start + offset + size}; copy it again"
            )
        end = offset + size
        found[name] = GGUFTensor(name, kind, shape, start + offset, size)
    return keys, found


class _Header:
    """Reads values one after the other, never past the file's end."""

    def __init__(self, path: Path) -> None:
        self._path, self.size, self.at = path, path.stat().st_size, 0
        self._data: bytes | mmap.mmap = b""
        if self.size:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def parse(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
        """Keys, and of each tensor name, shape, type and offset."""
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
        return keys, described

    def _take(self, format_: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + format_)
        data = self._data[self.at : self.at + size]
        if len(data) != size:
            raise DamagedFile(f"`{self._path}` ends early; copy it again")
        self.at += size
        return struct.unpack("<" + format_, data)

    def _count(self) -> int:
        (n,) = self._take("Q")
        if n > min(_MOST, self.size):
            raise DamagedFile(f"`{self._path}` says it has {n} entries, more than fit in it; copy it again")
        return int(n)

    def _string(self) -> str:
        (n,) = self._take("Q")
        if n > self.size - self.at:
            raise DamagedFile(f"`{self._path}` has a text of {n} bytes, more than are left of it; copy it again")
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
