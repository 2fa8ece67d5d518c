"""Where one tensor lies in a file, and how it is read or mapped.

Not here: which files a folder has (`checkpoint.py`), tensors that lie packed in integers (`packed/`).
"""

import math
import mmap
import threading
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mpt.errors import DamagedFile


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie: contiguous, in row-major order."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)  # torch's own product overflows

    def read(self) -> Tensor:
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(values)
        return values

    def read_into(self, target: Tensor) -> None:
        """Fill `target` of the same shape, converting dtype and device where they differ."""
        direct = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        values = target if direct else torch.empty(self.shape, dtype=self.dtype)
        if self.n_bytes:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                into = values.detach().view(-1).view(torch.uint8).numpy().data
                done = 0
                while done < self.n_bytes:  # one read returns at most 2 GiB
                    n = file.readinto(into[done:])
                    if not n:
                        raise DamagedFile(f"`{self.file.name}` ends {self.n_bytes - done} bytes early; copy it again")
                    done += n
        if not direct:
            target.copy_(values)

    def map(self) -> Tensor | None:
        """It as it lies in the file, read page by page when it is used; None where its place suits no such dtype.

        Writing to it changes no file.
        """
        if self.offset % self.dtype.itemsize or not self.n_bytes:
            return None
        stat = self.file.stat()
        if self.offset + self.n_bytes > stat.st_size:
            raise DamagedFile(f"`{self.file.name}` ends early; copy it again")
        mapped = _mapped(self.file, stat.st_size, stat.st_mtime_ns)
        count = torch.Size(self.shape).numel()
        return torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


# Mappings by file, size and time of its last change: one each, however many tensors lie in it, as long as one is there.
_MAPPINGS: WeakValueDictionary[tuple[Path, int, int], mmap.mmap] = WeakValueDictionary()
_MAPPINGS_LOCK = threading.Lock()


def _mapped(file: Path, n_bytes: int, modified_ns: int) -> mmap.mmap:
    key = (file, n_bytes, modified_ns)
    with _MAPPINGS_LOCK:
        mapped = _MAPPINGS.get(key)
        if mapped is None:
            with file.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), n_bytes, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
                mapped.madvise(mmap.MADV_WILLNEED)  # the system reads ahead while the model is built
            _MAPPINGS[key] = mapped
        return mapped
