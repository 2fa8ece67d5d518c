"""Tensors that are read one at a time, and the safetensors files they are streamed into.

A checkpoint of any size is converted in the memory of its largest tensor: what is stored is described first (name,
shape, dtype) and read when its turn comes.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mpt.checkpoint import StoredTensor
from mpt.errors import DamagedFile

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


def stored(tensor: StoredTensor) -> Lazy:
    """A tensor that lies in one piece in a file."""

    def read() -> Tensor:
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.read_into(values)
        return values

    return Lazy(tensor.dtype, tensor.shape, read, tensor.file.name)


def check_finite(name: str, values: Tensor, where: str) -> None:
    """Raises DamagedFile for NaN or infinity, which no trained checkpoint holds."""
    # A sum is finite only if all are, and takes no memory; float32's own largest value may overflow it, so look again.
    if not values.is_floating_point() or bool(values.sum(dtype=torch.float64).isfinite()):
        return
    n_bad = int((~values.isfinite()).sum())
    if n_bad:
        raise DamagedFile(f"`{name}` in `{where}` holds {n_bad} values that are NaN or infinite; get another copy")


class SafetensorsFile:
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
        self.data_start = 8 + len(text)
        self._left = dict(tensors)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, values: Tensor) -> memoryview:
        """Append the next tensor; returns the bytes written."""
        expected = next(iter(self._left))
        assert name == expected and self._left.pop(name) == (values.dtype, tuple(values.shape)), (name, expected)
        data = raw(values)
        self._file.write(data)
        return data

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._left, self._left


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
