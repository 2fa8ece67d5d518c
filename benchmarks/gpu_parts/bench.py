"""What every part of `benchmarks/gpu.py` is given: a device, sizes, the time that is left, and a file for its numbers.

A part runs in a process of its own, which may be killed. So each number is in the part's file as soon as it is known.
Also here: the models and tokenizers that several parts make, and the clocks that they read.
"""

import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt.backends.backend import Row, Work
from mpt.backends.paged_attention import PAGE, Pages, Part, Prompts
from mpt.backends.paged_backend import PagedBackend
from mpt.config import MPTConfig
from mpt.options import ModelOptions
from mpt.sampling import N_BEST
from mpt.transformers_model import MPTForCausalLM

# A calibrated model's mean entropy is its loss; LLaMA-7B's is about 1.8 nats a token after 10^12 tokens (Touvron et al.
# 2023, figure 1).
TRAINED_NATS = 1.8
_ENOUGH_S = 5.0  # a measurement is not begun with less time than this


@dataclass(frozen=True)
class Scale:
    """A model's shape, and how much of everything is measured with it."""

    model: dict[str, int]
    prefill: int  # tokens
    contexts: tuple[int, ...]  # at which one stream decodes
    book: int  # tokens of the long text
    chunks: tuple[int, ...]  # tokens of it that are read at once
    n_decoded: int
    streams: tuple[int, ...]  # requests at once
    stream_tokens: int  # read, and written, by each
    long_stream: int  # prompt of the stream that outgrows a block table's width while it writes
    squares: tuple[int, ...]  # sides of the products that measure the ceiling
    copied_bytes: int
    drawn: tuple[int, int]  # logits that are drawn from: rows, vocabulary
    products: tuple[int, ...]  # tokens that meet each matrix at once
    attended: tuple[tuple[int, int], ...]  # of prompts: new tokens, all tokens
    decoded: tuple[tuple[int, int], ...]  # of steps: rows, tokens of each
    masked: tuple[int, ...]  # tokens of a block mask
    trained: dict[str, dict[str, int]]  # models that are trained, by what the tables call them
    trained_tokens: int  # of a sequence
    trained_rows: int  # of a step
    microbatch: int  # tokens of a forward and backward
    row: int  # tokens of the long training row
    row_d_model: int
    compiles: bool  # `torch.compile` of blocks is tried too
    onnx: dict[str, int]


_GPU: dict[str, Any] = {
    "prefill": 2048, "contexts": (128, 2048, 8192), "book": 67_835, "chunks": (2048, 8192), "n_decoded": 64,
    "streams": (1, 16, 64), "stream_tokens": 128, "long_stream": 2000, "squares": (4096, 8192, 16384),
    "copied_bytes": 8 << 30, "drawn": (64, 50_432), "products": (1, 16, 64, 512, 2048),
    "attended": ((2048, 2048), (2048, 32_768), (2048, 67_584), (8192, 67_584)),
    "decoded": ((1, 256), (1, 2048), (1, 67_835), (16, 1024), (64, 256)), "masked": (2048, 16_384),
    "trained": {
        "four blocks of 7B": {"d_model": 4096, "n_heads": 32, "n_layers": 4, "vocab_size": 50_432},
        "1B": {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50_432},
    },
    "trained_tokens": 2048, "trained_rows": 8, "microbatch": 8192, "row": 65_536, "row_d_model": 4096, "compiles": True,
    "onnx": {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50_432},
}  # fmt: skip

SCALES = {
    "7b": Scale({"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50_432}, **_GPU),
    "1b": Scale({"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50_432}, **_GPU),
    "toy": Scale(
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512},
        prefill=300, contexts=(20, 300), book=700, chunks=(300, 512), n_decoded=4, streams=(1, 2, 5), stream_tokens=12,
        long_stream=40, squares=(128, 256), copied_bytes=1 << 22, drawn=(4, 512), products=(1, 4),
        attended=((128, 256),), decoded=((1, 256), (3, 300)), masked=(128,),
        trained={"two toy blocks": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512}},
        trained_tokens=64, trained_rows=4, microbatch=128, row=512, row_d_model=64, compiles=True,
        onnx={"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 512},
    ),
}  # fmt: skip


@dataclass
class Bench:
    """Where a part runs, how long it may, and what it has found."""

    scale: Scale
    device: torch.device
    file: Path | None = None  # gets everything below as JSON, whenever something is added
    deadline: float = float("inf")  # time.monotonic
    started: float = field(default_factory=time.time)  # when the part's process was started
    earlier: dict[str, Any] = field(default_factory=dict)  # what other parts found, by part
    found: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # of the part's table: what, measured, beside it
    failures: dict[str, str] = field(default_factory=dict)  # measurements that failed, and why
    left_out: dict[str, str] = field(default_factory=dict)  # measurements that were not begun, and why
    not_run: str = ""  # why the whole part is not

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, **numbers: Any) -> None:
        self.found |= numbers
        self._keep()

    def row(self, what: str, measured: str, beside: str = "") -> None:
        self.rows.append((what, measured, beside))
        print(f"          {what}: {measured}" + (f"; {beside}" if beside else ""), file=sys.stderr, flush=True)
        self._keep()

    def leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.row(name, "not measured", why)

    def refuse(self, what: str, why: str) -> None:
        """The part cannot be run here: it is told as not run, not as done."""
        self.not_run = why
        self.row(what, "not run", why)

    def measure(self, name: str, work: Callable[[], object]) -> None:
        """One measurement; one that fails, or has no time left, says so and leaves the others alone."""
        if self.left_s < _ENOUGH_S:
            self.leave_out(name, "no time was left")
            return
        try:
            work()
        except Exception as error:  # the next one may still work, and time on a GPU is dear
            traceback.print_exc()
            self.failures[name] = f"{type(error).__name__}: {str(error).strip()[:500]}"
            self.row(name, "failed", self.failures[name].splitlines()[0])
        finally:
            self.free()

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def _keep(self) -> None:
        if self.file is not None:
            partial = self.file.with_name(self.file.name + ".partial")
            kept = {name: getattr(self, name) for name in ("found", "rows", "failures", "left_out", "not_run")}
            partial.write_text(json.dumps(kept, indent=1))
            partial.replace(self.file)

    # -- clocks ------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], n: int = 5) -> float:
        """Median of n times, after two that are not counted, seen from outside."""
        times = []
        for _ in range(n + 2):
            self.sync()
            started = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def kernel_seconds(self, work: Callable[[], object], n: int = 20) -> float:
        """Median of n times on the GPU itself, without the time that a launch takes."""
        if not self.is_cuda:
            return self.seconds(work, 1)
        for _ in range(3):
            work()
        times = []
        for _ in range(n):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            torch.cuda.synchronize(self.device)
            times.append(before.elapsed_time(after) / 1e3)
        return statistics.median(times)

    def peak_gb(self) -> float:
        """The most memory held since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.is_cuda else 0.0

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    # -- models ------------------------------------------------------------------------------------------------------

    def model(self) -> MPTForCausalLM:
        return make_model(self.scale.model, self.device, self.dtype)

    def ceiling(self, name: str) -> float | None:
        """What the part `card` has measured: copy_gb_s, matmul_tflop_s."""
        found: float | None = self.earlier.get("card", {}).get("found", {}).get(name)
        return found

    def share(self, measured: float, ceiling: str, words: str) -> str:
        """In words, of a ceiling."""
        best = self.ceiling(ceiling)
        return "" if best is None else f"{measured / best:.0%} of {words}"


def make_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> MPTForCausalLM:
    """Random weights, the same for the same shape."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MPTForCausalLM(MPTConfig(**shape, max_seq_len=8192, attn_config={"alibi": True}))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def pool(backend: PagedBackend, n_tokens: int) -> PagedBackend:
    """A backend with memory for rows of so many tokens together."""
    backend.allocate((n_tokens + 2 * PAGE) * backend.bytes_per_token)
    return backend


def read(backend: PagedBackend, row: Row, tokens: list[int], chunk: int) -> None:
    """Prefill, as the engine does it for a prompt that is alone."""
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        backend.forward([Work(row, part, int(start + chunk >= len(tokens)))])
        row.length += len(part)


def prefill_chunk(is_cuda: bool) -> int:
    """Tokens of prompts in a step, as the product has it where nothing is asked for."""
    found = ModelOptions("mpt-7b").sized(is_paged=is_cuda).prefill_chunk
    assert found is not None
    return found


def prompt_attention(
    q: Tensor, pages: Pages, numbers: list[int], stored: int, slopes: Tensor | None, scale: float
) -> Callable[[], Tensor]:
    """The product's attention of a prompt's last T tokens, (T, H, D); what all layers share is made here, once.

    q: (T, H, D). pages: of one layer. numbers: the row's pages, which hold `stored` positions with these T.
    """
    prompts = Prompts([Part(0, len(q), stored, numbers)], slopes, scale, q.device)
    return lambda: prompts.attend(q.transpose(0, 1), pages.kv[0], pages.key_norms[0], pages.scales_of(0))


def random_text(n: int, n_vocab: int, seed: object = 0) -> list[int]:
    """n tokens, others for every seed."""
    return random.Random(f"{seed} {n}").choices(range(4, min(n_vocab, 50_000)), k=n)


def weight_bytes(model: MPTForCausalLM) -> int:
    """Read by a decoding step: all of them, the tied embedding as the head."""
    return sum(weight.nbytes for weight in model.parameters())


def reading_flop(model: MPTForCausalLM, n: int) -> float:
    """Of reading n tokens: products with the blocks' matrices, the head once, attention over the causal half."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".blocks." in name)
    config = model.config
    pairs = n * (n + 1) / 2
    return (
        2.0 * matrices * n + 2.0 * config.vocab_size * config.d_model + 4.0 * config.d_model * config.n_layers * pairs
    )


def transformers_model(model: MPTForCausalLM) -> Any:
    """transformers' in-tree class over the same tensors."""
    from transformers import MptConfig, MptForCausalLM

    config = model.config
    with torch.device("meta"):
        peer = MptForCausalLM(
            MptConfig(
                d_model=config.d_model, n_heads=config.n_heads, n_layers=config.n_layers, vocab_size=config.vocab_size,
                max_seq_len=config.max_seq_len,
            )
        )  # fmt: skip
    peer.load_state_dict(model.state_dict(), assign=True, strict=False)
    peer.tie_weights()
    assert not any(p.is_meta for p in peer.parameters()), "transformers' names have changed"
    return peer.eval()


def make_tokenizer(n_vocab: int) -> Any:
    """Of so many tokens: end of text, the bytes, and words that no text is cut into but a grammar may allow."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers

    from mpt.tokenizer import Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{n}" for n in range(n_vocab - 1 - len(letters))]
    raw = Raw(models.BPE(vocab={t: i for i, t in enumerate(["<|endoftext|>", *letters, *words])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    with tempfile.TemporaryDirectory() as folder:
        raw.save(f"{folder}/tokenizer.json")
        return Tokenizer.from_folder(Path(folder))


def zipf_logits(n: int, n_vocab: int, exponents: tuple[float, float]) -> Tensor:
    """Logits (n, V) float32 in which the k-th likeliest token of a row has a probability like k^-exponent.

    The rows' exponents lie evenly between two; which token is the k-th differs between rows. Rounded to bfloat16, as a
    model's are, so that many far down are equal.
    """
    numbers = torch.Generator().manual_seed(0)
    exponent = torch.linspace(*exponents, n)[:, None]
    ranks = torch.stack([torch.randperm(n_vocab, generator=numbers) for _ in range(n)]) + 1
    return (-exponent * ranks.log()).bfloat16().float()


def entropies(logits: Tensor) -> Tensor:
    """Of the distribution that each row of logits stands for, (B,) in nats."""
    logs = logits.double().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def short_of(logits: Tensor, top_p: float) -> float:
    """The share of rows whose N_BEST[0] likeliest tokens hold no more than top_p, so that a draw looks among more."""
    n = min(N_BEST[0], logits.shape[-1])
    mass = logits.double().softmax(-1).topk(n, dim=-1).values.sum(-1)
    return float((mass <= top_p).double().mean())


@torch.no_grad()
def sharpen(model: MPTForCausalLM, backend: PagedBackend, nats: float = TRAINED_NATS) -> Tensor:
    """Scale the last norm until what the model says next of random text has this mean entropy; the logits then, (N, V).

    Random weights give nearly flat logits, among which top-p keeps most of the vocabulary. The likeliest token stays.
    """
    n = min(256, backend.capacity_for(1))
    row = backend.reserve(None, n)
    logits = backend.forward([Work(row, random_text(n, backend.vocab_size, "sharpen"), n)]).float()
    low, high = 0.0, 100.0
    for _ in range(30):  # entropy falls as the factor grows
        factor = (low + high) / 2
        low, high = (factor, high) if float(entropies(logits * factor).mean()) > nats else (low, factor)
    for weight in model.transformer.norm_f.parameters():
        weight.mul_(factor)
    return logits * factor


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
