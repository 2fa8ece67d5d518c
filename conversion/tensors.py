"""Tensors that are read one at a time, and the safetensors files they are streamed into.

A checkpoint of any size is converted in the memory of its largest tensor: what is stored is described first (name,
shape, dtype) and read when its turn comes.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mpt.errors import DamagedFile
from mpt.packed.matrix import Weight

_LARGE = 100_000_000  # bytes
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Lazy:
    """A tensor that is described now and read when it is needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    where: str  # the file it comes from, for messages

    @property
    def n_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def cast(self, dtype: torch.dtype, name: str) -> "Lazy":
        """The same in another dtype. Reading raises DamagedFile when a finite value overflows it."""
        if dtype == self.dtype:
            return self

        def read() -> Tensor:
            values = self.read()
            found = values.to(dtype)
            n_over = int((found.isinf() & values.isfinite()).sum()) if dtype == torch.float16 else 0
            if n_over:
                raise DamagedFile(
                    f"{n_over} values of `{name}` (largest {float(values.abs().max()):g}) are over float16's 65,504; "
                    "convert to bfloat16 or float32"
                )
            return found

        return Lazy(dtype, self.shape, read, self.where)

    def plus_product(self, a: Tensor, b: Tensor, scale: float) -> "Lazy":
        """A matrix with scale b a added, (r, in) and (out, r), in float32 before it is rounded to its own dtype."""

        def read() -> Tensor:
            values = self.read()
            return torch.mm(b.float(), a.float()).mul_(scale).add_(values).to(values.dtype)

        return Lazy(self.dtype, self.shape, read, self.where)


def stored(tensor: Weight) -> Lazy:
    """A weight of a folder."""
    return Lazy(tensor.dtype, tensor.shape, tensor.read, tensor.file.name)


def check_finite(name: str, values: Tensor, where: str) -> None:
    """Raises DamagedFile for NaN or infinity, which no trained checkpoint holds."""
    if not values.is_floating_point() or not values.numel():
        return
    low, high = torch.aminmax(values)  # NaN if any is; one pass that takes no memory
    if not (math.isfinite(low) and math.isfinite(high)):
        n_bad = sum(int((~part.isfinite()).sum()) for part in values.view(-1).split(1 << 24))
        raise DamagedFile(f"`{name}` in `{where}` holds {n_bad} values that are NaN or infinite; get another copy")


class HashedFile:
    """A new file whose sha256 is taken while it is written, in a thread: hashing takes as long as writing."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._last: Future[None] | None = None
        self.sha256 = ""  # once it is closed

    def write(self, data: bytes | memoryview) -> None:
        """Append; a small piece is held for its hash while the next one is read, a large one is not."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._digest.update, data)
        self._file.write(data)
        if len(data) > _LARGE:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._pool.shutdown()
        self.sha256 = self._digest.hexdigest()


class SafetensorsFile(HashedFile):
    """A safetensors file written tensor by tensor, in the order of its header."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape) in tensors.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data begins where any type may lie
        self._left = dict(tensors)
        super().__init__(path)
        self.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, values: Tensor) -> int:
        """Append the next tensor; the bytes it took."""
        expected = next(iter(self._left))
        assert name == expected and self._left.pop(name) == (values.dtype, tuple(values.shape)), (name, expected)
        data = raw(values)
        self.write(data)
        return len(data)


def raw(values: Tensor) -> memoryview:
    """A tensor's bytes, in row-major order."""
    data: memoryview = values.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor is alone."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def read_exactly(path: Path, offset: int, n: int) -> bytes:
    """Raises DamagedFile where the file is shorter."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(n)
    if len(data) != n:
        raise DamagedFile(f"`{path.name}` ends {n - len(data)} bytes early; copy it again")
    return data
