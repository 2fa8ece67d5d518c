"""What the engine's own Python costs in a step: a backend that takes no time, many streams that decode.

    python benchmarks/engine_cpu.py [--streams 64]

Prints the median microseconds of a step for each kind of sampling. On a CPU they are lost beside the model's own; on a
GPU they are what a step of 5 to 15 ms waits for. The vocabulary is small, so that what is measured is Python and the
calls of torch, not reading logits. Not here: how fast models are (`speed.py`, `gpu.py`).
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from mpt.backends import capabilities
from mpt.backends.backend import Row, Work
from mpt.engine.engine import Engine
from mpt.engine.request import Sampling
from mpt.tokenizer import Tokenizer

N_WARM, N_STEPS, PROMPT, VOCAB = 20, 300, 100, 260
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {"top_p": 0.95},
    "penalties": {"top_p": 0.95, "frequency_penalty": 0.2, "presence_penalty": 0.1, "repetition_penalty": 1.1},
    "a stop string": {"temperature": 0.0, "stop": ("\n\nQ:",)},
}


@dataclass(eq=False)
class _Row(Row):
    n: int

    @property
    def capacity(self) -> int:
        return self.n


class Nothing:
    """A backend whose logits are there already."""

    capabilities = capabilities.TORCH
    vocab_size, bytes_per_token, max_length, model = VOCAB, 1, None, None

    def __init__(self) -> None:
        self._logits = torch.randn(4096, VOCAB, generator=torch.Generator().manual_seed(0))

    def allocate(self, kv_bytes: int) -> None: ...

    def capacity_for(self, n_tokens: int) -> int:
        return -(-n_tokens // 256) * 256

    def reserve(self, row: Row | None, n_tokens: int) -> Row:
        if row is None:
            return _Row(self.capacity_for(n_tokens))
        assert isinstance(row, _Row)
        row.n = self.capacity_for(n_tokens)
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> Row:
        row = self.reserve(None, capacity)
        row.length = n_tokens
        return row

    def forward(self, work: Sequence[Work]) -> Tensor:
        return self._logits[: sum(item.n_logits for item in work)]

    def close(self) -> None: ...


def tokenizer() -> Tokenizer:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<|endoftext|>", *letters])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(raw)


async def seconds_of_steps(n_streams: int, **sampling: Any) -> list[float]:
    """The engine's loop, in this thread, without waiting for work."""
    limits = {"context_length": 4096, "kv_bytes": 1 << 20, "max_running": n_streams, "max_waiting": n_streams}
    engine = Engine(Nothing(), tokenizer(), **limits)
    wanted = Sampling(max_tokens=2 * (N_WARM + N_STEPS), ignore_eos=True, **sampling)
    for k in range(n_streams):
        engine.submit([1 + (k + j) % 250 for j in range(PROMPT)], wanted, request_id=str(k))
    taken = []
    for _ in range(N_WARM + N_STEPS):
        started = time.perf_counter()
        engine.turn()
        taken.append(time.perf_counter() - started)
        await asyncio.sleep(0)  # whoever asked takes what came
    return taken[N_WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    n_streams = parser.parse_args().streams
    torch.set_num_threads(1)
    for kind, sampling in KINDS.items():
        taken = asyncio.run(seconds_of_steps(n_streams, **sampling))
        print(f"{kind:14} {1e6 * statistics.median(taken):8.0f} us a step of {n_streams} streams", flush=True)


if __name__ == "__main__":
    main()
