"""The backend for CUDA: rows of pages out of one pool, decoded by our Triton kernel inside CUDA graphs.

A row is a list of page numbers, the same in every layer. A copy of a prefix shares its full pages and copies the
last one; a page that several rows hold is copied before one of them writes into it. Everything but the graphs runs on
CPU too, where the tests are.

A step in which every row reads one token takes a fixed shape, padded to a number of rows and a width of the block table
that graphs are kept for; so does, where somebody guesses, a step of few tokens of each row. `forward` decides. All
other steps go through one packed pass like `TorchBackend`'s: rows with a few tokens through the decode kernel together,
longer ones together through what `prompt_kernel` chose.

The model may be a share of one (`mpt/sharding.py`): pages then hold the heads of this process, and its projections sum
over the processes. Which sums a step takes, and of what shape, follows from the rows and their tokens alone.

Accounting: the engine counts each row's pages as its own, so pages that rows share are counted more than once, and the
pool always has what the engine believes is free. Kept prefixes are given up somewhat sooner than they would have to be.

Not here: the kernels (`mpt/backends/paged_attention.py`), who runs when (`engine.py`).
"""

import functools
import gc
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt import attention
from mpt.backends import capabilities, compilations, fused, quantized
from mpt.backends.backend import CHEAP_TOKENS, FEW_TOKENS, Row, Work
from mpt.backends.flash import FLASH_4_OPTIONS, FlashPrompts, PromptKernel, prompt_kernel
from mpt.backends.graphs import GUESSES_START_S, Graphs, Shape, guessed_shapes, rows_for, shapes, tokens_for, width_for
from mpt.backends.packed import PackedModel
from mpt.backends.paged_attention import (
    DROP,
    KERNEL_OPTIONS,
    PAGE,
    Pages,
    Part,
    Prompts,
    gather,
    paged_decode,
    store,
    together,
    uses_triton,
)  # fmt: skip
from mpt.errors import MachineRefused
from mpt.model import Attend, MPTAttention, MPTLanguageModel
from mpt.transfer import to_device

_capturing = threading.Lock()  # models that share a process capture one after another


@dataclass(eq=False)
class PagedRow(Row):
    """A row whose cache lies in `pages` of the pool."""

    pages: list[int] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return len(self.pages) * PAGE


@dataclass(frozen=True)
class Steps:
    """The largest steps that an engine will ask for, which are what is compiled and captured at start."""

    n_rows: int = 64
    n_prompt: int = 2048  # tokens of prompts
    context: int | None = None  # tokens of a row; None: what the model was trained for
    guesses: bool = False  # whether rows that decode read guesses too


class PagedBackend:
    """An MPTLanguageModel over paged rows. `allocate` its pool before the first row."""

    capabilities = capabilities.PAGED

    def __init__(
        self,
        model: MPTLanguageModel,
        *,
        steps: Steps | None = None,
        graphs: bool | None = None,
        triton: bool | None = None,
        drop: float = DROP,
        int8_cache: bool = False,
    ) -> None:
        """graphs: whether steps of few tokens are captured; None: on CUDA. triton, drop: as for `paged_decode`.
        int8_cache: keys and values in int8."""
        config = model.config
        self._steps = steps or Steps()
        self._context = self._steps.context or config.max_seq_len
        self.model = model
        self.vocab_size: int = config.vocab_size
        self.max_length: int | None = config.max_seq_len if config.has_wpe else None
        weight = model.transformer.norm_f.weight  # the embedding may be packed
        self._device, self._dtype = weight.device, weight.dtype
        spec, attn = model.transformer.attention, model.transformer.blocks[0].attn
        assert isinstance(attn, MPTAttention)
        self._n_heads, self._n_kv = attn.n_heads, attn.n_kv_heads  # of this process, where the model is shared out
        self._n_layers, self._d_head = config.n_layers, spec.d_head
        self._stored_dtype = torch.int8 if int8_cache else self._dtype  # of keys and values
        self.bytes_per_token = self._n_layers * Pages.position_bytes(self._n_kv, self._d_head, self._stored_dtype)
        self._scale, self._slopes = spec.scale, model.transformer.alibi_slopes()
        self._triton, self._drop = uses_triton(weight) if triton is None else triton, drop
        self._run: Callable[..., Tensor] = model.transformer.run
        if self._triton:
            self._run = functools.partial(fused.run, model.transformer)
            quantized.use_kernels(model)
        self._packed = PackedModel(model, self._run)
        self._prompts_by: PromptKernel | None = None  # on CPU FlexAttention would hold all scores
        if self._device.type == "cuda":
            self._prompts_by = prompt_kernel(self._dtype, self._d_head, int8_cache=int8_cache)[0]
        self._has_graphs = self._device.type == "cuda" if graphs is None else graphs
        self._graphs: Graphs[_Graph] = Graphs(self._record, [])
        self._guess_graphs: Graphs[_Graph] = Graphs(self._record_guesses, [])
        self._graph_pool: Any = None
        if self._device.type == "cuda":
            compilations.watch()
        self._free: list[int] = []
        self._users: list[int] = []  # of each page
        self._returned: deque[list[int]] = deque()  # page lists of rows that are gone, from any thread

    def allocate(self, kv_bytes: int) -> None:
        self.make_pool(kv_bytes)
        if self.needs_warm_up:
            self.warm_up()

    def make_pool(self, kv_bytes: int) -> None:
        """As many pages as fit, and page 0, which no row has. Raises MachineRefused."""
        n_pages = kv_bytes // (self.bytes_per_token * PAGE) + 1
        try:
            self._pages = Pages.empty(
                self._n_layers, n_pages, self._n_kv, self._d_head, self._stored_dtype, self._device
            )
        except RuntimeError as error:  # torch's out of memory, on CPU and CUDA
            raise MachineRefused(
                f"no {kv_bytes / 1e9:.1f} GB in one piece for the KV cache; lower `--kv-gb` ({error})"
            ) from error
        self._free, self._users = list(range(n_pages - 1, 0, -1)), [0] * n_pages
        self._graphs = Graphs(self._record, self._shapes())
        guessed = guessed_shapes(self._steps.n_rows, self._most_pages) if self._steps.guesses else []
        self._guess_graphs = Graphs(self._record_guesses, guessed)

    @property
    def needs_warm_up(self) -> bool:
        """Whether something is compiled or captured for the steps."""
        return self._device.type == "cuda" or self._has_graphs

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture all that steps of the sizes expected can need, so that none of them has to wait for it.

        `compilations.py` counts what was missed.
        """
        if self._triton:
            quantized.compile_kernels(self.model)
        n_most = min(self._context, len(self._free) * PAGE, self.max_length or self._context)
        for parts in _prompts(self._steps.n_prompt, n_most):
            if sum(_n_pages(stored + n) for stored, n in parts) <= self.n_free_pages:
                work = []
                for stored, n in parts:
                    work.append(Work(self.reserve(None, stored + n), [0] * n, 1))
                    work[-1].row.length = stored
                self.forward(work)
                del work
        for shape in self._shapes():
            for T in (1, FEW_TOKENS):
                self._read_a_few(shape, T)
            if not self._has_graphs:
                self._one_token_each(_blank(shape, self._device))
        if self._has_graphs:
            self._graphs.capture_all()
            self._guess_graphs.capture_all(GUESSES_START_S)

    def _shapes(self) -> list[Shape]:
        return shapes(self._steps.n_rows, self._most_pages)

    @property
    def _most_pages(self) -> int:
        """Of a row, before the first one is there."""
        return min(_n_pages(self._context), len(self._free))

    def _read_a_few(self, shape: Shape, T: int) -> None:
        """One layer's attention of T tokens of each row, all of page 0, the first row as long as the shape allows."""
        rows = [PagedRow(length=0, pages=[0]) for _ in range(shape.n_rows)]
        rows[0] = PagedRow(length=shape.width * PAGE - T, pages=[0] * shape.width)
        size = (shape.n_rows * T, self._n_heads, self._d_head)
        queries = torch.zeros(size, dtype=self._dtype, device=self._device)
        self._few([(row, T, at * T) for at, row in enumerate(rows)])(0, queries, torch.empty_like(queries))

    @property
    def n_free_pages(self) -> int:
        self._take_back()
        return len(self._free)

    def capacity_for(self, n_tokens: int) -> int:
        return _n_pages(n_tokens) * PAGE

    def reserve(self, row: Row | None, n_tokens: int) -> PagedRow:
        if row is None:
            row = PagedRow()
            weakref.finalize(row, self._returned.append, row.pages).atexit = False
        assert isinstance(row, PagedRow)
        row.pages += self._take(_n_pages(n_tokens) - len(row.pages))
        return row

    def copy(self, source: Row, n_tokens: int, capacity: int) -> PagedRow:
        assert isinstance(source, PagedRow) and n_tokens <= source.capacity
        row = self.reserve(None, 0)
        n_full = n_tokens // PAGE
        for page in source.pages[:n_full]:
            self._users[page] += 1
            row.pages.append(page)
        self.reserve(row, max(capacity, n_tokens))
        if n_tokens % PAGE:
            self._pages.copy(source.pages[n_full], row.pages[n_full])
        row.length = n_tokens
        return row

    def block_bytes(self, n_tokens: int) -> int:
        return n_tokens * self.bytes_per_token + self._n_layers * self._n_kv * 4  # and the bound of its keys, float32

    def take_out(self, row: Row, start: int, n_tokens: int) -> np.ndarray:
        norms, stored = self._part(row, start, n_tokens)
        parts = [part.contiguous().view(torch.uint8).flatten() for part in (norms, *stored)]
        return torch.cat(parts).cpu().numpy()

    def put_in(self, row: Row, start: int, n_tokens: int, block: np.ndarray) -> None:
        norms, stored = self._part(row, start, n_tokens)
        sizes = [part.numel() * part.itemsize for part in (norms, *stored)]
        bound, *found = to_device(block, self._device).split(sizes)
        torch.maximum(norms, bound.view(norms.dtype).view(norms.shape), out=norms)
        for part, bits in zip(stored, found, strict=True):
            part.copy_(bits.view(part.dtype).view(part.shape))

    def _part(self, row: Row, start: int, n_tokens: int) -> tuple[Tensor, list[Tensor]]:
        """The bound of one page, (L, KV heads), and where some of its tokens lie: (L, 2, KV heads, n_tokens, D), and
        their scales, (L, 2, KV heads, n_tokens), where it is int8."""
        assert isinstance(row, PagedRow)
        at, page = start % PAGE, row.pages[start // PAGE]
        assert at + n_tokens <= PAGE, (start, n_tokens)
        # Scales come first: behind int8 numbers they could begin where no float32 may.
        kinds = [kind for kind in (self._pages.scales, self._pages.kv) if kind is not None]
        return self._pages.key_norms[:, page], [kind[:, page, :, :, at : at + n_tokens] for kind in kinds]

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> Tensor:
        rows = self.make_own(work)
        if all(map(_is_one_token, work)):
            logits = self._decode(rows, [item.tokens[0] for item in work])
            wanted = [at for at, item in enumerate(work) if item.n_logits]
            return logits if len(wanted) == len(work) else logits[wanted]
        if self._has_graphs and self._steps.guesses and _are_few_tokens(work):
            replayed = self._replay_guesses(rows, work)
            if replayed is not None:
                return replayed
        return self._packed.run(work, self._attend(rows, [len(item.tokens) for item in work]))

    def make_own(self, work: Sequence[Work]) -> list[PagedRow]:
        """The rows of a step, each with the pages it writes into to itself. Raises RuntimeError without a free page.

        `forward` begins with it, and nothing that it does later needs a page.
        """
        rows = [_own_row(item) for item in work]
        for row, item in zip(rows, work, strict=True):
            self._make_own(row, len(item.tokens))
        return rows

    def close(self) -> None:
        self._graphs.clear()
        self._guess_graphs.clear()

    # -- pages -------------------------------------------------------------------------------------------------------

    def _take(self, n: int) -> list[int]:
        """n pages nobody holds, cleared."""
        if n <= 0:
            return []
        self._take_back()
        if len(self._free) < n:
            gc.collect()  # rows of failed requests lie in cycles of request and sequence
            self._take_back()
        if len(self._free) < n:
            raise RuntimeError(f"{n} pages are asked for and {len(self._free)} of {len(self._users)} are free")
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._users[page] = 1
        self._pages.clear(taken)
        return taken

    def _take_back(self) -> None:
        while self._returned:
            for page in self._returned.popleft():
                self._give_up(page)

    def _give_up(self, page: int) -> None:
        self._users[page] -= 1
        assert self._users[page] >= 0, page
        if self._users[page] == 0:
            self._free.append(page)

    def _make_own(self, row: PagedRow, n_tokens: int) -> None:
        """Copy those of the pages that the row's next tokens fall into which other rows hold too."""
        for at in range(row.length // PAGE, _n_pages(row.length + n_tokens)):
            shared = row.pages[at]
            if self._users[shared] > 1:
                self._take_back()  # perhaps the others are gone
            if self._users[shared] > 1:
                [own] = self._take(1)
                self._pages.copy(shared, own)
                row.pages[at] = own
                self._give_up(shared)

    # -- a token of each row -----------------------------------------------------------------------------------------

    def _decode(self, rows: Sequence[PagedRow], tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) of one token of each row, through a graph where there are graphs."""
        shape = Shape(rows_for(len(rows)), width_for(max(_n_pages(row.length + 1) for row in rows)))
        found = self._graphs.find(shape) if self._has_graphs else None
        step = self._one_token_each if found is None else found[1].replay
        n_rows, width = shape if found is None else found[0]
        numbers = np.zeros((n_rows, 2 + width), dtype=np.int32)
        numbers[:, 1] = 1  # rows beyond ours read token 0 and write into page 0
        for line, row, token in zip(numbers, rows, tokens, strict=False):
            used = row.pages[: _n_pages(row.length + 1)]
            line[0], line[1], line[2 : 2 + len(used)] = token, row.length + 1, used
        return step(to_device(numbers, self._device))[: len(rows)]

    def _record(self, shape: Shape) -> "_Graph":
        """A step of this shape as a graph. Raises RuntimeError where it cannot be captured, or not now."""
        return self._capture(self._one_token_each, _blank(shape, self._device))

    def _capture(self, step: Callable[[Tensor], Tensor], numbers: Tensor) -> "_Graph":
        with _capturing:
            if self._graph_pool is None and self._device.type == "cuda":
                self._graph_pool = torch.cuda.graph_pool_handle()
            try:
                return _Graph(step, numbers, self._graph_pool)
            except RuntimeError:
                self._graph_pool = None  # what was captured halfway may hold memory of it
                raise

    def _one_token_each(self, numbers: Tensor) -> Tensor:
        """Logits (B, V) float32. numbers: (B, 2 + P) int32: a token, the positions stored with it, the row's pages."""
        tokens, lengths, table = numbers[:, 0].long(), numbers[:, 1].contiguous(), numbers[:, 2:]
        position = lengths.long() - 1
        slots = table.gather(1, (position // PAGE)[:, None])[:, 0].long() * PAGE + position % PAGE
        transformer = self.model.transformer

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (1, H, B, D): the rows lie end to end
            kv, norms = self._pages.kv[layer], self._pages.key_norms[layer]
            scales = self._pages.scales_of(layer)
            store(kv, norms, k[0].transpose(0, 1), v[0].transpose(0, 1), slots, scales=scales, triton=self._triton)
            queries = q[0].transpose(0, 1)[:, None]  # (B, 1, H, D)
            out = paged_decode(
                queries, kv, norms, table, lengths, self._slopes, self._scale,
                scales=scales, drop=self._drop, triton=self._triton,
            )  # fmt: skip
            return out.permute(1, 2, 0, 3)

        positions = None if transformer.wpe is None else position[None]
        hidden = self._run(transformer.wte(tokens)[None], attend, positions)[0]
        return self.model.unembed(hidden).to(torch.float32, memory_format=torch.contiguous_format)

    # -- few tokens of each row, guesses among them ------------------------------------------------------------------

    def _replay_guesses(self, rows: Sequence[PagedRow], work: Sequence[Work]) -> Tensor | None:
        """The logits asked for, through a graph; None where there is none for such a step."""
        longest = max(_n_pages(row.length + len(item.tokens)) for row, item in zip(rows, work, strict=True))
        found = self._guess_graphs.find(Shape(rows_for(len(rows)), width_for(longest)))
        if found is None:
            return None
        logits = found[1].replay(self._tensor(_guess_numbers(found[0], rows, work)))
        ends = itertools.accumulate(len(item.tokens) for item in work)
        wanted = [at for end, item in zip(ends, work, strict=True) for at in range(end - item.n_logits, end)]
        return logits[: len(wanted)] if wanted == list(range(len(wanted))) else logits[wanted]

    def _record_guesses(self, shape: Shape) -> "_Graph":
        """As `_record`, for few tokens of each row."""
        numbers = self._tensor(_guess_numbers(shape, [], []))
        return self._capture(functools.partial(self._few_tokens_each, shape), numbers)

    def _few_tokens_each(self, shape: Shape, numbers: Tensor) -> Tensor:
        """Logits (N, V) float32 of `tokens_for` tokens. numbers: as `_guess_numbers` has them."""
        n_each = 4 * tokens_for(shape.n_rows)
        tokens, position, slots, real = numbers[:n_each].view(4, -1).long()  # (N,) each
        by_row = numbers[n_each:].view(shape.n_rows, -1)
        lengths, places = by_row[:, 0].contiguous(), by_row[:, 1 : 1 + FEW_TOKENS].long()
        table = by_row[:, 1 + FEW_TOKENS :]
        transformer = self.model.transformer

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (1, H, N, D)
            kv, norms = self._pages.kv[layer], self._pages.key_norms[layer]
            scales = self._pages.scales_of(layer)
            store(kv, norms, k[0].transpose(0, 1), v[0].transpose(0, 1), slots, scales=scales, triton=self._triton)
            queries = q[0].transpose(0, 1)[places]  # (B, T, H, D)
            out = paged_decode(
                queries, kv, norms, table, lengths, self._slopes, self._scale,
                scales=scales, drop=self._drop, triton=self._triton,
            )  # fmt: skip
            return out.flatten(0, 1)[real].transpose(0, 1)[None]

        positions = None if transformer.wpe is None else position[None]
        hidden = self._run(transformer.wte(tokens)[None], attend, positions)[0]
        return self.model.unembed(hidden).to(torch.float32, memory_format=torch.contiguous_format)

    # -- any other step ----------------------------------------------------------------------------------------------

    def _attend(self, rows: Sequence[PagedRow], n_tokens: Sequence[int]) -> Attend:
        """Attention of a step in which rows read these numbers of tokens, laid end to end."""
        starts = np.cumsum([0, *n_tokens[:-1]])
        slots = self._tensor(np.concatenate([_slots(row, n) for row, n in zip(rows, n_tokens, strict=True)]))
        shares = list(zip(rows, n_tokens, starts.tolist(), strict=True))
        few = [share for share in shares if share[1] <= FEW_TOKENS]
        short = self._few(few) if few else None
        longer = self._prompts([
            Part(start, n, row.length + n, row.pages[: _n_pages(row.length + n)])
            for row, n, start in shares if n > FEW_TOKENS
        ])  # fmt: skip

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (1, H, N, D)
            kv, norms = self._pages.kv[layer], self._pages.key_norms[layer]
            scales = self._pages.scales_of(layer)
            store(kv, norms, k[0].transpose(0, 1), v[0].transpose(0, 1), slots, scales=scales, triton=self._triton)
            queries = q[0].transpose(0, 1)  # (N, H, D)
            out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
            if short is not None:
                short(layer, queries, out)
            for prompts in longer:
                out[prompts.tokens] = prompts.attend(q[0], kv, norms, scales)
            return out.transpose(0, 1)[None]

        return attend

    def _few(self, shares: Sequence[tuple[PagedRow, int, int]]) -> Callable[[int, Tensor, Tensor], None]:
        """The decode kernel over rows with a few tokens each: (row, tokens, where they begin in the step).

        Padded to two numbers of tokens and to the widths of `graphs.py`: for each Triton compiles other code.
        """
        T = 1 if all(n == 1 for _, n, _ in shares) else FEW_TOKENS
        width = width_for(max(_n_pages(row.length + n) for row, n, _ in shares))
        table, places, real = _queries(shares, T, Shape(len(shares), width))
        at, real_at = self._tensor(places), self._tensor(real)
        numbers, to = self._tensor(table), self._tensor(places.flatten()[real])
        lengths, pages = numbers[:, 0].contiguous(), numbers[:, 1:]

        def attend(layer: int, queries: Tensor, out: Tensor) -> None:
            kv, norms = self._pages.kv[layer], self._pages.key_norms[layer]
            answers = paged_decode(  # (B, T, H, D)
                queries[at], kv, norms, pages, lengths, self._slopes, self._scale,
                scales=self._pages.scales_of(layer), drop=self._drop, triton=self._triton,
            )  # fmt: skip
            out[to] = answers.flatten(0, 1)[real_at]

        return attend

    def _prompts(self, parts: Sequence[Part]) -> "Sequence[Prompts | FlashPrompts | _PromptOnCpu]":
        """Attention of a step's longer parts, as few calls as their memory allows."""
        if not parts:
            return []
        if self._prompts_by is None:
            return [_PromptOnCpu(part, self.model, self._scale) for part in parts]
        if self._prompts_by == "flash-attn 2":
            return [FlashPrompts(parts, self._slopes, self._scale, self._device)]
        options = KERNEL_OPTIONS if self._prompts_by == "FlexAttention" else FLASH_4_OPTIONS
        return [
            Prompts(group, self._slopes, self._scale, self._device, drop=self._drop, options=options)
            for group in together(parts)
        ]

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return to_device(numbers, self._device)


class _Graph:
    """A step of fixed shape, recorded once, replayed on other numbers."""

    def __init__(self, step: Callable[[Tensor], Tensor], numbers: Tensor, pool: Any) -> None:
        """numbers: to record with, of the step's shape, on its device. pool: memory for what is computed on the way,
        shared by the graphs of one backend, which run in turn."""
        self._numbers, device = numbers, numbers.device
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            step(self._numbers)  # compiles what is not compiled yet, which cannot be captured
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread is watched while capturing: another may be loading an adapter to the GPU.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = step(self._numbers)

    def replay(self, numbers: Tensor) -> Tensor:
        self._numbers.copy_(numbers)
        self._graph.replay()
        return self._logits.clone()  # the next replay writes over its own


class _PromptOnCpu:
    """`Prompts` of one part, by the attention that CPUs have."""

    def __init__(self, part: Part, model: MPTLanguageModel, scale: float) -> None:
        self._stored, self._scale, self._pages = part.stored, scale, torch.tensor(part.pages)
        self._bias = model.transformer.alibi_bias(part.stored)
        self.tokens = slice(part.start, part.start + part.n_tokens)

    def attend(self, q: Tensor, kv: Tensor, key_norms: Tensor, scales: Tensor | None) -> Tensor:
        unused = slice(self._stored, None)
        k, v = (x[:, :, : self._stored] for x in gather(kv, self._pages, unused, scales, q.dtype))
        out = attention.attend(q[None, :, self.tokens], k, v, scale=self._scale, bias=self._bias)
        return out[0].transpose(0, 1)


def _blank(shape: Shape, device: torch.device) -> Tensor:
    """What a step of this shape is told, each row reading token 0 and writing into page 0."""
    numbers = torch.zeros(shape.n_rows, 2 + shape.width, dtype=torch.int32, device=device)
    numbers[:, 1] = 1
    return numbers


def _queries(
    shares: Sequence[tuple[PagedRow, int, int]], T: int, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which T queries the decode kernel gets of each row: (row, tokens, where they begin in the step).

    Of each of B rows the positions stored with its tokens and its pages, (B, 1 + P); where its queries are in the step,
    the last at the end, (B, T); and of each token of the step its place among all queries. Rows beyond ours read the
    first position of page 0.
    """
    table = np.zeros((shape.n_rows, 1 + shape.width), dtype=np.int32)
    table[:, 0] = 1
    places = np.zeros((shape.n_rows, T), dtype=np.int64)
    for line, (row, n, start) in enumerate(shares):
        used = row.pages[: _n_pages(row.length + n)]
        table[line, 0], table[line, 1 : 1 + len(used)] = row.length + n, used
        places[line] = np.arange(start + n - T, start + n).clip(min=start)  # the first again, where there is none
    real = [line * T + np.arange(T - n, T) for line, (_, n, _) in enumerate(shares)]
    return table, places, np.concatenate([np.zeros(0, dtype=np.int64), *real])


def _guess_numbers(shape: Shape, rows: Sequence[PagedRow], work: Sequence[Work]) -> np.ndarray:
    """What a step of this shape is told, int32 in one piece: of each of N tokens its id, position, slot and place among
    the queries; then of each row the positions stored with its tokens, where its queries are, and its pages.

    Tokens beyond ours are 0 and are written into page 0.
    """
    n_tokens = [len(item.tokens) for item in work]
    starts = itertools.accumulate(n_tokens[:-1], initial=0)
    shares = list(zip(rows, n_tokens, starts, strict=False))
    table, places, real = _queries(shares, FEW_TOKENS, shape)
    each = np.zeros((4, tokens_for(shape.n_rows)), dtype=np.int32)
    each[0, : len(real)] = [token for item in work for token in item.tokens]
    for row, n, start in shares:
        each[1, start : start + n] = np.arange(row.length, row.length + n)
        each[2, start : start + n] = _slots(row, n)
    each[3, : len(real)] = real
    by_row = np.concatenate([table[:, :1], places, table[:, 1:]], axis=1)
    return np.concatenate([each.ravel(), by_row.ravel().astype(np.int32)])


def _prompts(n_chunk: int, n_most: int) -> list[list[tuple[int, int]]]:
    """Steps of prompts, (stored, new) tokens of each: one row's and several rows', parts of a block and whole ones, and
    the chunks of a long prompt, its first and a later one. The first is unlike in every size: torch.compile takes sizes
    that happen to be equal for the same one, and other sizes would then be compiled anew. A fresh prompt of whole pages
    is one whose queries are as many as its keys and all of them real.

    n_chunk: tokens of a step. n_most: of a row.
    """
    alone = [(300, 200), (0, 20), (0, 128), (0, 200), (100, 412)]
    alone += [(0, min(n, n_chunk)) for n in (512, 2048, n_chunk // 4, n_chunk)] + [(n_chunk, n_chunk)]
    fitting = [(min(stored, n_most // 2), n) for stored, n in alone]
    fitting = [(stored, min(n, n_most - stored)) for stored, n in fitting]
    return [[part] for part in dict.fromkeys(fitting) if part[1]] + [[fitting[1], fitting[3]]]


def _n_pages(n_tokens: int) -> int:
    return math.ceil(n_tokens / PAGE)


def _slots(row: PagedRow, n: int) -> np.ndarray:
    """Where the row's next n positions lie, (n,) int64: page * PAGE + place in it."""
    position = np.arange(row.length, row.length + n)
    return np.array(row.pages, dtype=np.int64)[position // PAGE] * PAGE + position % PAGE


def _own_row(item: Work) -> PagedRow:
    assert isinstance(item.row, PagedRow)
    return item.row


def _is_one_token(item: Work) -> bool:
    return len(item.tokens) == 1 and item.adapter is None and item.hidden is None


def _are_few_tokens(work: Sequence[Work]) -> bool:
    """Whether a graph has room for a step: of each row and in all."""
    alike = all(len(item.tokens) <= FEW_TOKENS and item.adapter is None and item.hidden is None for item in work)
    return alike and sum(len(item.tokens) for item in work) <= CHEAP_TOKENS
