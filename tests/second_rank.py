"""The other process of a model that a test shares with it: it follows the test's own, one model after the other.

python -m tests.second_rank     # reads a line of JSON for each model, `share`'s arguments; answers when it has ended
"""

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mpt.checkpoint
from mpt.backends.paged_backend import PagedBackend, Steps
from mpt.backends.sharded_backend import ShardedBackend, follow
from mpt.errors import MachineRefused
from mpt.sharding import Shard

ROOT = Path(__file__).parents[1]
MEET = datetime.timedelta(seconds=100)  # a process that waits longer has lost the other one
NOT_IN_THE_SECOND = 12345  # bytes of a pool that only the first process has
FREE = (3_000_000_000, 2_000_000_000)  # bytes of their GPUs' memory that are free, as the processes say


class InPages(PagedBackend):
    """A share whose pool is told apart by its size, and full of NaN: nobody may read what nobody has written."""

    def __init__(self, rank: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rank = rank

    def make_pool(self, kv_bytes: int) -> None:
        if self.rank and kv_bytes == NOT_IN_THE_SECOND:
            raise MachineRefused("the second process has not so much")
        super().make_pool(kv_bytes)
        if not self.needs_warm_up:
            self._pages.kv.fill_(torch.nan)


class WarmedUp(InPages):
    needs_warm_up = True


def share(rank: int, meeting: str, folder: str, triton: bool, warm_up: bool) -> PagedBackend:
    """This process's half of a model, once both have met."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=MEET)
    model = mpt.checkpoint.load_for_engine(Path(folder), shard=Shard(rank, 2))
    kind = WarmedUp if warm_up else InPages
    return kind(rank, model, steps=Steps(n_rows=2, n_prompt=40, context=300), graphs=False, triton=triton)


class SecondRank:
    """The process; `close` ends it."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.second_rank"],
            env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    @contextlib.contextmanager
    def sharing(
        self, meeting: Path, folder: Path, *, triton: bool = False, warm_up: bool = False
    ) -> Iterator[ShardedBackend]:
        """The model of a folder, half of it in the other process, over pages and without a pool yet."""
        asked = (str(meeting), str(folder), triton, warm_up)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        backend = ShardedBackend(share(0, *asked), [])
        try:
            yield backend
        finally:
            dist.destroy_process_group()
            answer = self._process.stdout.readline()
        assert answer == "it has ended\n", answer

    def close(self) -> None:
        self._process.communicate(timeout=100)


def main() -> None:
    torch.set_num_threads(1)
    torch.cuda.mem_get_info = lambda: (FREE[1], 2 * FREE[1])  # type: ignore[assignment]
    for line in sys.stdin:
        follow(share(1, *json.loads(line)))
        dist.destroy_process_group()
        print("it has ended", flush=True)


if __name__ == "__main__":
    main()
