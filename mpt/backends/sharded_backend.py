"""One model over several processes, one GPU each: the first plans and samples, the others compute along.

The engine sees a backend like any other. Before each call the first process tells the others what it is about to do,
in numbers over gloo, and all do the same on their own share of the weights and of the KV cache (`mpt/sharding.py`). A
process that fails or dies ends the model: nobody can go on without its share.

On CUDA each share is a `PagedBackend`, on CPU a `TorchBackend`. Pools have the same number of pages everywhere. The
first process takes the pages of a call before it tells the others, and tells them with it which rows are gone: so a
call for which it has no page goes no further, and one that is told finds pages in every process.
"""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mpt.backends import capabilities
from mpt.backends.backend import Row, Work
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.backends.torch_backend import TorchBackend
from mpt.checkpoint import load_for_engine, read_config
from mpt.errors import DeviceLost, MachineRefused, UserError
from mpt.model import MPTLanguageModel
from mpt.sharding import Shard

Share = TorchBackend | PagedBackend
_RESERVE, _COPY, _FORWARD, _ALLOCATE, _FREE_BYTES = range(5)
_INLINE = 62  # numbers sent with the first message; longer commands take a second one
_IDLE = datetime.timedelta(days=365)  # the others wait for work as long as it takes


@dataclass(eq=False)
class _Numbered(Row):
    """A row that the other processes know by a number. shares: of each number, this process's own row."""

    number: int
    shares: dict[int, Row]

    @property
    def local(self) -> Row | None:
        """This process's share, None until it has memory."""
        return self.shares.get(self.number)

    @property
    def capacity(self) -> int:
        return 0 if self.local is None else self.local.capacity


class ShardedBackend:
    """The first process's side; `close` ends the others."""

    model = None

    def __init__(self, local: Share, others: Sequence[subprocess.Popen[bytes]]) -> None:
        self.capabilities = replace(capabilities.SHARDED, returns_early=local.capabilities.returns_early)
        self.vocab_size, self.bytes_per_token, self.max_length = (
            local.vocab_size,
            local.bytes_per_token,
            local.max_length,
        )
        self._local, self._others = local, others
        self._n_rows, self._freed, self._shares = 0, list[int](), dict[int, Row]()

    def capacity_for(self, n_tokens: int) -> int:
        return self._local.capacity_for(n_tokens)

    def allocate(self, kv_bytes: int) -> None:
        self._tell(_ALLOCATE, [kv_bytes])
        try:
            _allocate(self._local, kv_bytes)
        except BaseException:  # the others may be waiting in the middle of a warm-up
            self.close()
            raise

    def least_free_bytes(self) -> int:
        """Of the GPUs' memory, on the one that has the least."""
        self._tell(_FREE_BYTES, [])
        return _least_free_bytes()

    def reserve(self, row: Row | None, n_tokens: int) -> _Numbered:
        row = self._number() if row is None else row
        assert isinstance(row, _Numbered)
        if row.local is not None and n_tokens <= row.capacity:
            return row
        if row.local is not None:
            row.local.length = row.length
        local = self._local.reserve(row.local, n_tokens)
        self._tell(_RESERVE, [row.number, row.length, n_tokens])
        self._shares[row.number] = local
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> _Numbered:
        assert isinstance(source, _Numbered) and source.local is not None
        made = self._number()
        local = self._local.copy(source.local, n_tokens, capacity)
        self._tell(_COPY, [source.number, made.number, n_tokens, capacity])
        self._shares[made.number] = local
        made.length = n_tokens
        return made

    def forward(self, work: Sequence[Work]) -> Tensor:
        numbers, here = [], []
        for item in work:
            assert isinstance(item.row, _Numbered) and item.row.local is not None
            numbers += [item.row.number, item.row.length, len(item.tokens), *item.tokens]
            item.row.local.length = item.row.length
            here.append(replace(item, row=item.row.local))
        if isinstance(self._local, PagedBackend):
            self._local.make_own(here)
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
        made = _Numbered(self._n_rows, self._shares)
        weakref.finalize(made, _let_go, made.number, self._freed, self._shares).atexit = False
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


def _let_go(number: int, freed: list[int], shares: dict[int, Row]) -> None:
    """Of a row that is gone. Its pages are free here only once the others are sure to be told, whatever the thread."""
    freed.append(number)
    shares.pop(number, None)


def follow(backend: Share) -> None:
    """The other processes' side: do what the first one does until it ends."""
    rows: dict[int, Row] = {}
    while (told := _told()) is not None:
        what, n_freed, *numbers = told
        for number in numbers[:n_freed]:
            rows.pop(number, None)
        _do(backend, rows, what, numbers[n_freed:])


def _told() -> list[int] | None:
    """What the first process is about to do: `_tell`'s numbers. None: it has gone."""
    try:
        first = torch.empty(_INLINE + 2, dtype=torch.int64)
        dist.broadcast(first, 0)
        what, length, *command = first.tolist()
        if length > _INLINE:
            rest = torch.empty(length - _INLINE, dtype=torch.int64)
            dist.broadcast(rest, 0)
            command += rest.tolist()
    except RuntimeError:
        return None
    return [what, *command[:length]]


def _do(backend: Share, rows: dict[int, Row], what: int, numbers: list[int]) -> None:
    if what == _ALLOCATE:
        with contextlib.suppress(MachineRefused):  # the first process raises it
            _allocate(backend, numbers[0])
    elif what == _FREE_BYTES:
        _least_free_bytes()
    elif what == _RESERVE:
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


def _allocate(backend: Share, kv_bytes: int) -> None:
    """In all processes at once. Raises MachineRefused in each of them where one has not the memory."""
    if not isinstance(backend, PagedBackend):
        backend.allocate(kv_bytes)
        return
    refused = None
    try:
        backend.make_pool(kv_bytes)
    except MachineRefused as error:
        refused = error
    n_refused = torch.tensor([int(refused is not None)])
    dist.all_reduce(n_refused)
    if refused is not None:
        raise refused
    if n_refused:
        raise MachineRefused(
            f"no {kv_bytes / 1e9:.1f} GB for the KV cache on another GPU of the model; lower `--kv-gb`, or end what "
            "else runs there"
        )
    if backend.needs_warm_up:
        backend.warm_up()


def _least_free_bytes() -> int:
    """In all processes at once."""
    free = torch.tensor([torch.cuda.mem_get_info()[0]])
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)


def open_sharded(
    folder: Path, n: int, *, dtype: torch.dtype, device: str, steps: Steps | None = None
) -> ShardedBackend:
    """The model shared by this process and n - 1 new ones, loaded. Raises UserError and what `load` raises.

    steps: of a KV cache in pages; None: rows of a cache of their own, as on CPU.
    """
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
                json.dumps(None if steps is None else asdict(steps)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        for rank in range(1, n)
    ]
    try:
        _join(meeting, 0, n, device)
        return ShardedBackend(_load(folder, 0, n, dtype, device, steps), others)
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


def _load(folder: Path, rank: int, n: int, dtype: torch.dtype, device: str, steps: Steps | None) -> Share:
    where = f"cuda:{rank}" if device == "cuda" else device
    model = load_for_engine(folder, dtype=dtype, device=where, shard=Shard(rank, n), verify=rank == 0)
    backend = share_of(model, steps)
    dist.barrier()
    return backend


def share_of(model: MPTLanguageModel, steps: Steps | None) -> Share:
    """What computes one process's share, in pages where the steps are told.

    Without CUDA graphs. NCCL allows sums over the processes inside one, but each process captures what its own time and
    memory allow, and one that misses a graph runs a larger one, whose sums have another shape.
    """
    # TODO: capture them once the processes agree on each graph, and two GPUs have shown that they answer alike.
    return TorchBackend(model) if steps is None else PagedBackend(model, steps=steps, graphs=False)


def main() -> None:
    """Another process: `python -m mpt.backends.sharded_backend MEETING RANK N FOLDER DTYPE DEVICE STEPS`.

    It ends with the first one. An error of its own ends it too, and the first one then misses it.
    """
    meeting, rank, n, folder, dtype, device, told = sys.argv[1:]
    _join(Path(meeting), int(rank), int(n), device)
    steps = None if json.loads(told) is None else Steps(**json.loads(told))
    follow(_load(Path(folder), int(rank), int(n), getattr(torch, dtype), device, steps))


if __name__ == "__main__":
    main()
