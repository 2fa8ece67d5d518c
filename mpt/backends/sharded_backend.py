"""One model over several processes, one GPU each: the first plans and samples, the others compute along.

The engine sees a backend like any other. Before each call the first process tells the others what it is about to do,
in numbers over gloo, and all do the same on their own share of the weights and of the KV cache (`mpt/sharding.py`). A
process that fails or dies ends the model: nobody can go on without its share.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mpt.backends import capabilities
from mpt.backends.backend import Row, Work
from mpt.backends.torch_backend import TorchBackend, TorchRow
from mpt.checkpoint import load, read_config
from mpt.errors import DeviceLost, UserError
from mpt.sharding import Shard

_RESERVE, _COPY, _FORWARD = range(3)
_INLINE = 62  # numbers sent with the first message; longer commands take a second one
_IDLE = datetime.timedelta(days=365)  # the others wait for work as long as it takes


@dataclass(eq=False)
class _Numbered(Row):
    """A row that the other processes know by a number. local: this process's share, None until it has memory."""

    number: int
    local: TorchRow | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.local is None else self.local.capacity


class ShardedBackend:
    """The first process's side; `close` ends the others."""

    capabilities = capabilities.SHARDED
    model = None

    def __init__(self, local: TorchBackend, others: Sequence[subprocess.Popen[bytes]]) -> None:
        self.vocab_size, self.bytes_per_token, self.max_length = (
            local.vocab_size,
            local.bytes_per_token,
            local.max_length,
        )
        self._local, self._others = local, others
        self._n_rows, self._freed = 0, list[int]()

    def capacity_for(self, n_tokens: int) -> int:
        return self._local.capacity_for(n_tokens)

    def allocate(self, kv_bytes: int) -> None:
        self._local.allocate(kv_bytes)

    def reserve(self, row: Row | None, n_tokens: int) -> _Numbered:
        row = self._number() if row is None else row
        assert isinstance(row, _Numbered)
        if row.local is not None and n_tokens <= row.capacity:
            return row
        self._tell(_RESERVE, [row.number, row.length, n_tokens])
        if row.local is not None:
            row.local.length = row.length
        row.local = self._local.reserve(row.local, n_tokens)
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> _Numbered:
        assert isinstance(source, _Numbered) and source.local is not None
        made = self._number()
        self._tell(_COPY, [source.number, made.number, n_tokens, capacity])
        made.local = self._local.copy(source.local, n_tokens, capacity)
        made.length = n_tokens
        return made

    def forward(self, work: Sequence[Work]) -> Tensor:
        numbers, here = [], []
        for item in work:
            assert isinstance(item.row, _Numbered) and item.row.local is not None
            numbers += [item.row.number, item.row.length, len(item.tokens), *item.tokens]
            item.row.local.length = item.row.length
            here.append(replace(item, row=item.row.local))
        try:
            self._tell(_FORWARD, numbers)
            return self._local.forward(here)
        except Exception as error:  # the others may be in the middle of a step that will not end
            raise DeviceLost(f"a process of the model has failed: {error}") from error

    def close(self) -> None:
        """End the other processes."""
        for other in self._others:
            other.terminate()
        for other in self._others:
            other.wait()

    def _number(self) -> _Numbered:
        self._n_rows += 1
        made = _Numbered(self._n_rows)
        weakref.finalize(made, self._freed.append, made.number)
        return made

    def _tell(self, what: int, numbers: list[int]) -> None:
        freed = [self._freed.pop() for _ in range(len(self._freed))]
        command = [len(freed), *freed, *numbers]
        first = [what, len(command), *command[:_INLINE]]
        try:
            dist.broadcast(torch.tensor(first + [0] * (_INLINE + 2 - len(first))), 0)
            if len(command) > _INLINE:
                dist.broadcast(torch.tensor(command[_INLINE:]), 0)
        except RuntimeError as error:
            raise DeviceLost(f"a process of the model has gone: {error}") from error


def follow(backend: TorchBackend) -> None:
    """The other processes' side: do what the first one does until it ends."""
    rows: dict[int, Row] = {}
    while True:
        first = torch.empty(_INLINE + 2, dtype=torch.int64)
        dist.broadcast(first, 0)
        what, length, *command = first.tolist()
        if length > _INLINE:
            rest = torch.empty(length - _INLINE, dtype=torch.int64)
            dist.broadcast(rest, 0)
            command += rest.tolist()
        n_freed, *command = command[:length]
        for number in command[:n_freed]:
            rows.pop(number, None)
        _do(backend, rows, what, command[n_freed:])


def _do(backend: TorchBackend, rows: dict[int, Row], what: int, numbers: list[int]) -> None:
    if what == _RESERVE:
        number, length, n_tokens = numbers
        row = rows.get(number)
        if row is not None:
            row.length = length
        rows[number] = backend.reserve(row, n_tokens)
    elif what == _COPY:
        source, made, n_tokens, capacity = numbers
        rows[made] = backend.copy(rows[source], n_tokens, capacity)
    else:
        work, at = [], 0
        while at < len(numbers):
            number, length, n = numbers[at : at + 3]
            row = rows[number]
            row.length = length
            work.append(Work(row, numbers[at + 3 : at + 3 + n], 0))
            at += 3 + n
        backend.forward(work)


def open_sharded(folder: Path, n: int, *, dtype: torch.dtype, device: str) -> ShardedBackend:
    """The model shared by this process and n - 1 new ones, loaded. Raises UserError and what `load` raises."""
    if dist.is_initialized():
        raise UserError("one process serves one tensor parallel model; run `mpt serve` once for each, or `mpt cluster`")
    if device == "cuda" and torch.cuda.device_count() < n:
        raise UserError(f"{n} GPUs are asked for and {torch.cuda.device_count()} are here; lower tensor_parallel")
    Shard(0, n).check(read_config(folder))
    meeting = Path(tempfile.mkdtemp(prefix="mpt-tensor-parallel-")) / "store"
    name = str(dtype).removeprefix("torch.")
    others = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mpt.backends.sharded_backend",
                str(meeting),
                str(rank),
                str(n),
                str(folder),
                name,
                device,
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        for rank in range(1, n)
    ]
    try:
        _join(meeting, 0, n, device)
        return ShardedBackend(_load(folder, 0, n, dtype, device), others)
    except BaseException:
        for other in others:
            other.kill()
        raise


def _join(meeting: Path, rank: int, n: int, device: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
    if device == "cuda":
        torch.cuda.set_device(rank)
    kind = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{meeting}", rank=rank, world_size=n, timeout=_IDLE)


def _load(folder: Path, rank: int, n: int, dtype: torch.dtype, device: str) -> TorchBackend:
    where = f"cuda:{rank}" if device == "cuda" else device
    backend = TorchBackend(load(folder, dtype=dtype, device=where, shard=Shard(rank, n), verify=rank == 0))
    dist.barrier()
    return backend


def main() -> None:
    """One of the other processes: `python -m mpt.backends.sharded_backend MEETING RANK N FOLDER DTYPE DEVICE`."""
    meeting, rank, n, folder, dtype, device = sys.argv[1:]
    _join(Path(meeting), int(rank), int(n), device)
    backend = _load(Path(folder), int(rank), int(n), getattr(torch, dtype), device)
    try:
        follow(backend)
    except RuntimeError:  # the first process has gone
        sys.exit(0)


if __name__ == "__main__":
    main()
