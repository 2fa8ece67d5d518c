"""Paged attention against the formula in float64: plain torch, the kernels under Triton's interpreter, and on CUDA."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mpt import attention
from mpt.backends.paged_attention import PAGE, Chunk, Pages, gather, has_triton, paged_decode, store
from tests.kernels import needs_interpreter

# Outputs are averages of values of size 1; float32 adds up to 1,000 terms of 1e-7 at random. 16 bits round once more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}

interpreted = pytest.param(("cpu", True), id="interpreted", marks=needs_interpreter)
torch_on_cpu = pytest.param(("cpu", False), id="torch")
compiled = pytest.param(("cuda", True), id="compiled", marks=pytest.mark.gpu)
torch_on_cuda = pytest.param(("cuda", False), id="torch_on_cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("where", [torch_on_cpu, interpreted, compiled, torch_on_cuda])


class Filled:
    """Rows of random keys and values in pages that lie anywhere, among pages full of NaN.

    by_kernel: stored by the kernel too, which is slow if interpreted.
    """

    def __init__(
        self, where: tuple[str, bool], lengths: list[int], n_kv: int, D: int, dtype: torch.dtype = torch.float32,
        by_kernel: bool = False,
    ) -> None:  # fmt: skip
        device, self.triton = torch.device(where[0]), where[1]
        numbers = torch.Generator().manual_seed(sum(lengths) + D)
        n_each = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(n_each) + 2, generator=numbers).tolist()
        self.pages = Pages.empty(1, len(order), n_kv, D, dtype, device)
        self.pages.kv.fill_(torch.nan)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.table = torch.full((len(lengths), max(n_each) + 1), 1 << 30, dtype=torch.int32, device=device)
        self.keys, self.values = [], []  # (1, KV heads, S, D) float64 of each row
        for row, (n, n_pages) in enumerate(zip(lengths, n_each, strict=True)):
            mine, order = order[:n_pages], order[n_pages:]
            self.table[row, :n_pages] = torch.tensor(mine)
            k, v = torch.randn(2, n, n_kv, D, generator=numbers).to(device, dtype)
            j = torch.arange(n)
            slots = torch.tensor(mine)[j // PAGE] * PAGE + j % PAGE
            store(self.pages.kv[0], self.pages.key_norms[0], k, v, slots.to(device), triton=by_kernel)
            self.keys.append(k.double().transpose(0, 1)[None])
            self.values.append(v.double().transpose(0, 1)[None])
        self.numbers = numbers

    def queries(self, T: int, H: int, D: int) -> Tensor:
        return torch.randn(len(self.keys), T, H, D, generator=self.numbers).to(
            self.pages.kv.device, self.pages.kv.dtype
        )

    def decode(self, q: Tensor, slopes: Tensor | None, scale: float, **options: object) -> Tensor:
        slopes = None if slopes is None else slopes.to(q.device)
        kv, norms = self.pages.kv[0], self.pages.key_norms[0]
        return paged_decode(q, kv, norms, self.table, self.lengths, slopes, scale, triton=self.triton, **options)  # type: ignore[arg-type]

    def weights(self, q: Tensor, slopes: Tensor | None, scale: float, row: int) -> Tensor:
        """softmax(q k^T scale - slope (i - j)) of one row's queries, (H, T, S) float64; NaN where nothing is seen."""
        k = self.keys[row][0].repeat_interleave(q.shape[2] // self.keys[row].shape[1], 0)
        S, T = k.shape[1], q.shape[1]
        scores = q[row].double().transpose(0, 1) @ k.transpose(-1, -2) * scale
        distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
        if slopes is not None:
            scores = scores - slopes.double().to(q.device)[:, None, None] * distance
        return scores.masked_fill(distance < 0, -torch.inf).softmax(-1)

    def expected(self, q: Tensor, slopes: Tensor | None, scale: float, row: int) -> Tensor:
        """The formula, (T, H, D) float64."""
        v = self.values[row][0].repeat_interleave(q.shape[2] // self.values[row].shape[1], 0)
        return (self.weights(q, slopes, scale, row) @ v).transpose(0, 1)

    def check(self, q: Tensor, slopes: Tensor | None, scale: float, within: float = 0.0, **options: object) -> None:
        found = self.decode(q, slopes, scale, **options)
        assert found.dtype == q.dtype and found.isfinite().all()
        for row, length in enumerate(self.lengths.tolist()):
            expected, real = self.expected(q, slopes, scale, row), max(0, q.shape[1] - length)
            error = (found[row, real:].double() - expected[real:]).abs().max()
            assert error < (within or TOLERANCE[q.dtype]), (row, length, float(error))


@everywhere
@pytest.mark.parametrize(
    ("H", "n_kv", "D", "lengths"),
    [
        pytest.param(4, 4, 64, [1, 255, 256, 257], id="mha"),
        pytest.param(4, 2, 80, [1000, 3, 511, 640], id="gqa_80"),
        pytest.param(3, 1, 112, [700, 1, 300], id="mqa_112_odd_heads"),
        pytest.param(2, 2, 128, [1000, 17], id="mha_128"),
    ],
)
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no_alibi"])
def test_one_query_equals_the_formula(where, H, n_kv, D, lengths, alibi) -> None:
    filled = Filled(where, lengths, n_kv, D)
    filled.check(filled.queries(1, H, D), attention.alibi_slopes(H) if alibi else None, D**-0.5)


@everywhere
@pytest.mark.parametrize(("H", "n_kv", "T"), [(4, 4, 16), (4, 2, 5), (8, 1, 16)], ids=["mha", "gqa", "mqa_two_blocks"])
def test_several_queries_equal_the_formula(where, H, n_kv, T) -> None:
    """As speculation asks; rows shorter than T have padding before them, which no key of theirs must answer."""
    filled = Filled(where, [530, 256, 7, 1], n_kv, 64)
    filled.check(filled.queries(T, H, 64), attention.alibi_slopes(H), 0.125)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "T"), [(2, 1), (4, 1), (2, 3)])
def test_sixteen_bits_lose_only_their_own_digits(where, dtype, H, T) -> None:
    if where == ("cpu", True) and dtype == torch.bfloat16 and (H, T) != (2, 1):
        pytest.skip("the interpreter's tl.dot takes the bits of a bfloat16 for an integer")
    filled = Filled(where, [700, 20], 2, 80, dtype)
    filled.check(filled.queries(T, H, 80), attention.alibi_slopes(H), 80**-0.5)


@everywhere
@pytest.mark.parametrize("n_splits", [1, 3, 4])
def test_any_number_of_splits_gives_the_same(where, n_splits) -> None:
    filled = Filled(where, [1000, 200], 2, 64)  # 4 pages and 1: splits without a page are merged too
    filled.check(filled.queries(1, 2, 64), attention.alibi_slopes(2), 0.125, n_splits=n_splits)


@everywhere
def test_strided_queries_are_read_where_they_lie(where) -> None:
    filled = Filled(where, [300, 20], 2, 64)
    q = filled.queries(2, 4, 3 * 64)[..., 64:128].transpose(0, 1).contiguous().transpose(0, 1)
    assert not q.is_contiguous()
    filled.check(q, attention.alibi_slopes(4), 0.125)


def longest_away(where: tuple[str, bool], T: int) -> tuple[Filled, Tensor, Tensor, float]:
    """A row of 1,000 whose four heads reach back 1, 2, 3 and 4 pages and whose queries dislike their own keys."""
    filled = Filled(where, [1000], 4, 64)
    q, scale = filled.queries(T, 4, 64), 0.125
    own = filled.keys[0][0, :, -T:].transpose(0, 1).float()  # (T, H, D)
    q[0] = -own.to(q.device) * 0.5
    return filled, q, torch.tensor([0.4, 0.1, 0.05, 0.001]), scale


@everywhere
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, of the interpreter
@pytest.mark.parametrize("T", [1, 4])
def test_pages_out_of_reach_are_not_read(where, T) -> None:
    filled, q, slopes, scale = longest_away(where, T)
    expected = filled.expected(q, slopes, scale, 0)
    pages = filled.table[0, :4].tolist()
    for head, n_out in enumerate([2, 1, 0, 0]):
        for page in pages[:n_out]:
            filled.pages.kv[0, page, :, head] = torch.nan
    found = filled.decode(q, slopes, scale)
    assert (found[0].double() - expected).abs().max() < TOLERANCE[torch.float32]
    assert filled.decode(q, slopes, scale, drop=0.0)[0, :, :2].isnan().all()  # it was for the reach that they were not


@everywhere
@pytest.mark.parametrize("T", [1, 4])
def test_what_is_left_out_weighs_less_than_was_allowed(where, T) -> None:
    """Values are 1 in one page and 0 elsewhere, so that an output is the weight of that page, and 0 if it was not read.

    A large share may be dropped here, so that pages do go where they weigh something; the law holds for each share.
    """
    for drop in (2.0**-24, 0.5):
        filled, q, slopes, scale = longest_away(where, T)
        pages, v = filled.table[0, :4].tolist(), filled.pages.kv[0, :, 1]
        weights = filled.weights(q, slopes, scale, 0)
        left_out = torch.zeros(4, T, device=q.device, dtype=torch.float64)
        for at, page in enumerate(pages):
            v.zero_()
            v[page] = 1.0
            unread = filled.decode(q, slopes, scale, drop=drop)[0, :, :, 0].t() == 0  # (H, T)
            left_out += weights[..., at * PAGE : (at + 1) * PAGE].sum(-1) * unread
        assert left_out.max() < drop
        assert drop < 0.01 or left_out.max() > 0


@everywhere
@pytest.mark.parametrize("page", [0, 1])
def test_a_loud_key_far_away_is_heard(where, page) -> None:
    """Its page's own bound tells of it, though the rest of the row is out of reach and the query likes its own key."""
    filled = Filled(where, [1000], 1, 64)
    q, slope = filled.queries(1, 1, 64), 0.4
    direction = q[0, 0] / q.norm()
    q = direction[None, None] * 8  # a key of c in this direction scores c / 8 * 8 = c
    position = page * PAGE
    for at, score in ((999, 60.0), (position, 60.0 + slope * (999 - position) + 3)):
        slot = filled.table[0, at // PAGE].long()[None] * PAGE + at % PAGE
        k, v = (direction * score)[None], torch.full_like(direction, at / 999)[None]
        store(filled.pages.kv[0], filled.pages.key_norms[0], k, v, slot, triton=filled.triton)
        filled.keys[0][0, 0, at], filled.values[0][0, 0, at] = k[0, 0].double(), v[0, 0].double()
    assert filled.weights(q, torch.tensor([slope]), 0.125, 0)[0, 0, position] > 0.9
    filled.check(q, torch.tensor([slope]), 0.125, within=2e-4)  # scores of 463 have float32's digits of 463


@everywhere
def test_scores_far_from_zero_change_nothing(where) -> None:
    """All keys of the row are disliked, or liked, by a hundred and more."""
    filled = Filled(where, [300], 1, 64)
    for by in (-150.0, 150.0):
        q = filled.queries(1, 1, 64)
        filled.pages.kv[0, :, 0] += q[0, 0, 0] * (by * 8 / q.norm() ** 2)
        filled.keys[0] += q[0, 0].double() * (by * 8 / q.norm().double() ** 2)
        filled.pages.key_norms.fill_(1e3)
        filled.check(q, attention.alibi_slopes(1), 0.125, within=2e-4)


@everywhere
def test_what_is_stored_is_found_where_it_was_put_and_bounds_only_grow(where) -> None:
    filled = Filled(where, [300, 2], 2, 80, torch.bfloat16, by_kernel=where[1])
    for row, n_pages in enumerate((2, 1)):
        k, v = gather(filled.pages.kv[0], filled.table[row, :n_pages].long(), int(filled.lengths[row]))
        n = int(filled.lengths[row])
        assert not k[:, :, n:].any() and not v[:, :, n:].any()  # NaN there before
        assert torch.equal(k[:, :, :n].double(), filled.keys[row]) and torch.equal(
            v[:, :, :n].double(), filled.values[row]
        )
        for at in range(n_pages):
            largest = filled.keys[row][0, :, at * PAGE : (at + 1) * PAGE].norm(dim=-1).amax(-1)
            bound = filled.pages.key_norms[0, filled.table[row, at]].double()
            assert (bound >= largest).all() and (bound < largest * 1.001).all()
    untouched = sorted(set(range(5)) - set(filled.table[:, :2].flatten().tolist()))
    assert len(untouched) == 2 and filled.pages.kv[0, untouched].isnan().all()


@everywhere
def test_a_copied_page_and_a_cleared_one(where) -> None:
    filled = Filled(where, [300], 2, 64)
    first, second = filled.table[0, :2].tolist()
    free = next(page for page in range(4) if page not in (first, second))
    q, slopes = filled.queries(1, 2, 64), attention.alibi_slopes(2)
    before = filled.decode(q, slopes, 0.125)
    filled.pages.copy(second, free)
    filled.pages.kv[:, second] = torch.nan
    filled.table[0, 1] = free
    assert torch.equal(filled.decode(q, slopes, 0.125), before)
    filled.pages.clear([second])
    assert not filled.pages.key_norms[0, second].any() and filled.pages.key_norms[0, first].all()


@everywhere
def test_far_positions_keep_their_digits(where) -> None:
    """At position 65,000 the bias of the first keys is -46,000; float32 anchored at key 0 would lose 4e-3."""
    filled = Filled(where, [20_000 if where == ("cpu", True) else 65_000], 1, 64)  # interpreted: 12 ms a page
    for slope in (2.0**-0.5, 2.0**-15.5):
        filled.check(filled.queries(1, 1, 64), torch.tensor([slope]), 64**-0.5)


# -- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize(("T", "stored"), [(17, 17), (200, 300), (256, 256), (129, 700), (30, 1000)])
@pytest.mark.parametrize(("H", "n_kv", "D"), [(4, 4, 80), (4, 2, 64)])
def test_a_chunk_behind_a_past_equals_the_formula(device, alibi, T, stored, H, n_kv, D) -> None:
    filled = Filled((device, device == "cuda"), [stored], n_kv, D)
    slopes = attention.alibi_slopes(H).to(device) if alibi else None
    q = filled.queries(T, H, D)
    n_pages = -(-stored // PAGE)
    k, v = gather(filled.pages.kv[0], filled.table[0, :n_pages].long(), stored)
    chunk = Chunk(T, stored, slopes, D**-0.5, q.device)
    found = chunk.attend(q.transpose(1, 2), k, v)[0].transpose(0, 1)
    expected = filled.expected(q, slopes, D**-0.5, 0)
    assert (found.double() - expected).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("T", "stored"), [(17, 17), (200, 300), (256, 256), (129, 700), (128, 1024), (300, 4000)])
def test_a_chunks_mask_names_the_blocks_that_hold_a_key_it_sees(T, stored) -> None:
    """Uncompiled, flex_attention looks at every block; the compiled one at those named, and masks some of them."""
    mask = Chunk(T, stored, None, 1.0, torch.device("cpu")).mask
    rows, keys = mask.seq_lengths
    i, j = torch.arange(stored - T, stored - T + rows)[:, None], torch.arange(keys)
    blocks = (j <= i).view(rows // 128, 128, keys // 128, 128).transpose(1, 2).flatten(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(-1))
    for row, n in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        whole = mask.full_kv_indices[0, 0, row, :n]
        assert sorted(whole.tolist()) == blocks[row].all(-1).nonzero().flatten().tolist()
    assert rows < T + 128 and keys < stored + PAGE


# -- for a GPU that is not here --------------------------------------------------------------------------------------

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpt.backends import paged_kernels

POINTERS = {"slots": "*i64", "table": "*i32", "lengths": "*i32"}
FLOATS = {"scale", "log_drop"}
NUMBERS = {"q", "k", "v", "kv", "out"}

def build(kernel, dtype, n_warps, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name in NUMBERS:
            signature[name] = "*" + dtype
        elif name == "norms":
            signature[name] = "*i32" if kernel is paged_kernels.store else "*fp32"
        elif name in ("slopes", "part", "part_lse"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": n_warps})

for dtype, D, lines, group in [("bf16", 128, 1, 1), ("bf16", 112, 16, 1), ("fp16", 80, 64, 4)]:
    split = build(paged_kernels.decode_split, dtype, 4, G=group, D=D, BLOCK_M=lines, BLOCK_N=64, BLOCK_D=128, PAGE=256,
                  N_SPLITS=17, HAS_ALIBI=True)
    assert split.metadata.shared < 99 * 1024, split.metadata.shared
    build(paged_kernels.merge, dtype, 4, D=D, BLOCK_D=128, N_SPLITS=17, BLOCK_S=32)
    build(paged_kernels.store, dtype, 1, D=D, BLOCK_D=128, PAGE=256)
print("compiled")
"""


@pytest.mark.skipif(not has_triton(), reason="needs `pip install triton`")
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(capability) -> None:
    """Down to its machine code, by the assembler that Triton brings; the interpreter takes what compilers refuse."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "compiled", ran.stderr
