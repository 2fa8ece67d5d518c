"""Paged attention against the formula in float64: plain torch, the kernels under Triton's interpreter, and on CUDA.

int8 pages against the formula over int8 numbers that numpy makes here.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt import attention
from mpt.backends import paged_attention
from mpt.backends.graphs import shapes
from mpt.backends.int8_cache import Int8Layer
from mpt.backends.paged_attention import (
    DROP,
    PAGE,
    Pages,
    Part,
    Prompts,
    gather,
    has_triton,
    paged_decode,
    store,
    together,
)  # fmt: skip
from tests.kernels import compile_for, needs_interpreter

# Outputs are averages of values of size 1; float32 adds up to 1,000 terms of 1e-7 at random. 16 bits round once more.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}

interpreted = pytest.param(("cpu", True), id="interpreted", marks=needs_interpreter)
torch_on_cpu = pytest.param(("cpu", False), id="torch")
compiled = pytest.param(("cuda", True), id="compiled", marks=pytest.mark.gpu)
torch_on_cuda = pytest.param(("cuda", False), id="torch_on_cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("where", [torch_on_cpu, interpreted, compiled, torch_on_cuda])


def eight_bits(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a cache in int8 stores of x (..., D): numbers, and a step of max|x| / 127 for each D of them, float32."""
    wide = x.float().cpu().numpy()
    steps = (np.maximum(np.abs(wide).max(-1), np.float32(1e-30)) / np.float32(127)).astype(np.float32)
    return np.rint(wide / steps[..., None]).astype(np.int8), steps


def rounded(x: Tensor) -> Tensor:
    """The values that a cache in int8 has for x, float64."""
    numbers, steps = eight_bits(x)
    return torch.from_numpy(numbers.astype(np.float64) * steps[..., None]).to(x.device)


class Filled:
    """Rows of random keys and values in pages that lie anywhere, among pages full of NaN.

    by_kernel: stored by the kernel too, which is slow if interpreted.
    """

    def __init__(
        self, where: tuple[str, bool], lengths: list[int], n_kv: int, D: int, dtype: torch.dtype = torch.float32,
        by_kernel: bool = False, int8: bool = False,
    ) -> None:  # fmt: skip
        device, self.triton, self.dtype = torch.device(where[0]), where[1], dtype
        numbers = torch.Generator().manual_seed(sum(lengths) + D)
        n_each = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(n_each) + 2, generator=numbers).tolist()
        self.pages = Pages.empty(1, len(order), n_kv, D, torch.int8 if int8 else dtype, device)
        (self.pages.kv if self.pages.scales is None else self.pages.scales).fill_(torch.nan)
        stored = rounded if int8 else Tensor.double
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.table = torch.full((len(lengths), max(n_each) + 1), 1 << 30, dtype=torch.int32, device=device)
        self.keys, self.values = [], []  # (1, KV heads, S, D) float64 of each row
        for row, (n, n_pages) in enumerate(zip(lengths, n_each, strict=True)):
            mine, order = order[:n_pages], order[n_pages:]
            self.table[row, :n_pages] = torch.tensor(mine)
            k, v = torch.randn(2, n, n_kv, D, generator=numbers).to(device, dtype)
            j = torch.arange(n)
            slots = torch.tensor(mine)[j // PAGE] * PAGE + j % PAGE
            kv, norms, scales = self.layer
            store(kv, norms, k, v, slots.to(device), scales=scales, triton=by_kernel)
            self.keys.append(stored(k).transpose(0, 1)[None])
            self.values.append(stored(v).transpose(0, 1)[None])
        self.numbers = numbers

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.pages.kv[0], self.pages.key_norms[0], self.pages.scales_of(0)

    def queries(self, T: int, H: int, D: int) -> Tensor:
        q = torch.randn(len(self.keys), T, H, D, generator=self.numbers)
        return q.to(self.pages.kv.device, self.dtype)

    def decode(self, q: Tensor, slopes: Tensor | None, scale: float, **options: object) -> Tensor:
        slopes = None if slopes is None else slopes.to(q.device)
        kv, norms, scales = self.layer
        told = {"scales": scales, "triton": self.triton, **options}
        return paged_decode(q, kv, norms, self.table, self.lengths, slopes, scale, **told)  # type: ignore[arg-type]

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
    if where == ("cpu", True) and dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot takes the bits of a bfloat16 for an integer")
    filled = Filled(where, [700, 20], 2, 80, dtype)
    filled.check(filled.queries(T, H, 80), attention.alibi_slopes(H), 80**-0.5)


@everywhere
@pytest.mark.parametrize("n_splits", [1, 3, 4])
def test_any_number_of_splits_gives_the_same(where, n_splits) -> None:
    filled = Filled(where, [1000, 200], 2, 64)  # 4 pages and 1: splits without a page are merged too
    filled.check(filled.queries(1, 2, 64), attention.alibi_slopes(2), 0.125, n_splits=n_splits)


@pytest.mark.parametrize("most_rows", [6, 64, 300, 1000])
@pytest.mark.parametrize("n_kv", [1, 8, 32])
def test_no_number_of_rows_has_a_number_of_splits_that_was_not_read_at_start(monkeypatch, n_kv, most_rows) -> None:
    """On a GPU of 132 processors: each number of splits is other code, and the decode kernel is not padded in rows."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))

    def splits(n_rows: int, width: int) -> int:
        return paged_attention._splits(n_rows * n_kv, width * 4, width >= 128, torch.device("cuda"))

    for width in (8, 32, 128):
        at_start = {splits(shape.n_rows, width) for shape in shapes(most_rows, width) if shape.width == width}
        assert {splits(n_rows, width) for n_rows in range(1, most_rows + 1)} <= at_start


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_split_writes_the_output_itself(where, dtype, monkeypatch) -> None:
    """Zeros for queries before a row's first position too, where memory had something else before."""
    filled = Filled(where, [700, 2], 2, 80, dtype)
    q, slopes = filled.queries(3, 4, 80), attention.alibi_slopes(4)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: torch.full(shape, 7.0, **kind))
    if where[1]:
        from mpt.backends import paged_kernels

        monkeypatch.setattr(paged_kernels, "merge", None)
    filled.check(q, slopes, 80**-0.5, n_splits=1)
    assert not filled.decode(q, slopes, 80**-0.5, n_splits=1)[1, 0].any()


@everywhere
def test_strided_queries_are_read_where_they_lie(where) -> None:
    filled = Filled(where, [300, 20], 2, 64)
    q = filled.queries(2, 4, 3 * 64)[..., 64:128].transpose(0, 1).contiguous().transpose(0, 1)
    assert not q.is_contiguous()
    filled.check(q, attention.alibi_slopes(4), 0.125)


def longest_away(where: tuple[str, bool], T: int, int8: bool = False) -> tuple[Filled, Tensor, Tensor, float]:
    """A row of 1,000 whose four heads reach back 1, 2, 3 and 4 pages and whose queries dislike their own keys."""
    filled = Filled(where, [1000], 4, 64, int8=int8)
    q, scale = filled.queries(T, 4, 64), 0.125
    own = filled.keys[0][0, :, -T:].transpose(0, 1).float()  # (T, H, D)
    q[0] = -own.to(q.device) * 0.5
    return filled, q, torch.tensor([0.4, 0.1, 0.05, 0.001]), scale


@everywhere
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, of the interpreter
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("T", [1, 4])
def test_pages_out_of_reach_are_not_read(where, T, int8) -> None:
    filled, q, slopes, scale = longest_away(where, T, int8)
    expected = filled.expected(q, slopes, scale, 0)
    pages = filled.table[0, :4].tolist()
    for head, n_out in enumerate([2, 1, 0, 0]):
        for page in pages[:n_out]:
            (filled.pages.kv if filled.pages.scales is None else filled.pages.scales)[0, page, :, head] = torch.nan
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
        n = int(filled.lengths[row])
        k, v = gather(filled.pages.kv[0], filled.table[row, :n_pages].long(), slice(n, None))
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


# -- int8 pages ------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_pages_hold_the_numbers_and_scales_of_the_formula(where, dtype) -> None:
    """To the bit, with zeros, tiny heads, and halves between two steps, which go to the even one."""
    device, n_kv, D = torch.device(where[0]), 2, 80
    k, v = torch.randn(2, 37, n_kv, D).to(device, dtype)
    k[3], k[4] = 0, k[4] * 1e-4
    k[5, 0] = torch.arange(D) * 0.5
    k[5, 0, -1] = 63.5  # a step is 0.5 then
    k[7, 0] = 95.0
    k[7, 0, -1] = 1270  # and 10 here: all the others become 100, which the bound must know
    v[6, 1] = torch.arange(D) + 0.5
    v[6, 1, -1] = 127  # and 1 here
    pages = Pages.empty(1, 4, n_kv, D, torch.int8, device)
    slots = torch.randperm(3 * PAGE, device=device)[:37]
    kv, norms, scales = pages.kv[0], pages.key_norms[0], pages.scales_of(0)
    assert scales is not None
    store(kv, norms, k, v, slots, scales=scales, triton=where[1])
    page, place = slots // PAGE, slots % PAGE
    for half, x in enumerate((k, v)):
        numbers, steps = eight_bits(x)
        assert np.array_equal(kv[page, half, :, place].cpu().numpy(), numbers)
        assert np.array_equal(scales[page, half, :, place].cpu().numpy(), steps)
    assert kv[page[6], 1, 1, place[6], :4].tolist() == [0, 2, 2, 4]
    sizes = rounded(k).bfloat16().double().norm(dim=-1)  # as prompts may read them
    for at in range(3):
        largest = sizes[page == at].amax(0)
        assert (norms[at] >= largest).all() and (norms[at] < largest * 1.01).all()
    assert not scales[3].any() and not norms[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_pages_hold_what_the_cache_on_cpu_holds(dtype) -> None:
    k, v = torch.randn(2, 30, 2, 64).to(dtype)
    layer, pages = Int8Layer.empty((2, 2, PAGE, 64)), Pages.empty(1, 1, 2, 64, torch.int8, torch.device("cpu"))
    layer.write(5, torch.stack([k, v]).transpose(1, 2))
    scales = pages.scales_of(0)
    assert scales is not None
    store(pages.kv[0], pages.key_norms[0], k, v, torch.arange(5, 35), scales=scales, triton=False)
    assert torch.equal(pages.kv[0, 0, :, :, 5:35], layer.numbers[:, :, 5:35])
    assert torch.equal(scales[0, :, :, 5:35], layer.scales[:, :, 5:35])


@everywhere
@pytest.mark.parametrize(
    ("H", "n_kv", "D", "T", "lengths"),
    [
        pytest.param(4, 4, 64, 1, [1, 255, 256, 257], id="mha"),
        pytest.param(4, 2, 80, 5, [1000, 3, 511], id="gqa_80"),
        pytest.param(8, 1, 112, 16, [700, 1], id="mqa_112_two_blocks"),
    ],
)
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "no_alibi"])
def test_int8_pages_are_read_as_the_formula_over_their_numbers(where, H, n_kv, D, T, lengths, alibi) -> None:
    filled = Filled(where, lengths, n_kv, D, int8=True)
    q, slopes = filled.queries(T, H, D), attention.alibi_slopes(H) if alibi else None
    for n_splits in (1, 4):
        filled.check(q, slopes, D**-0.5, n_splits=n_splits)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "T"), [(2, 1), (4, 3)])
def test_sixteen_bits_over_int8_pages_lose_only_their_own_digits(where, dtype, H, T) -> None:
    if where == ("cpu", True) and dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot takes the bits of a bfloat16 for an integer")
    filled = Filled(where, [700, 20], 2, 80, dtype, int8=True)
    filled.check(filled.queries(T, H, 80), attention.alibi_slopes(H), 80**-0.5)


@everywhere
def test_a_copied_int8_page_has_its_scales(where) -> None:
    filled = Filled(where, [300], 2, 64, int8=True)
    second = int(filled.table[0, 1])
    free = next(page for page in range(4) if page not in filled.table[0, :2].tolist())
    q, slopes = filled.queries(1, 2, 64), attention.alibi_slopes(2)
    before = filled.decode(q, slopes, 0.125)
    filled.pages.copy(second, free)
    filled.pages.kv[:, second] = 0
    filled.table[0, 1] = free
    assert torch.equal(filled.decode(q, slopes, 0.125), before)


@everywhere
def test_far_positions_keep_their_digits(where) -> None:
    """At position 65,000 the bias of the first keys is -46,000; float32 anchored at key 0 would lose 4e-3."""
    filled = Filled(where, [10_000 if where == ("cpu", True) else 65_000], 1, 64)  # interpreted: 12 ms a page
    for slope in (2.0**-0.5, 2.0**-15.5):
        filled.check(filled.queries(1, 1, 64), torch.tensor([slope]), 64**-0.5)


# -- prefill ---------------------------------------------------------------------------------------------------------


def as_the_kernel_reads(q, k, v, *, score_mod, block_mask, scale, enable_gqa, kernel_options) -> Tensor:
    """FlexAttention as its Triton kernel computes it with KERNEL_OPTIONS, which torch without a compiler does not show.

    After torch/_inductor/kernel/flex/templates: no look at bounds; of each list of blocks only the first, the others
    follow it; no care for a query that has seen nothing yet; the second pair of tables read by the first one's layout.
    """
    assert kernel_options == {"IS_DIVISIBLE": True, "BLOCKS_ARE_CONTIGUOUS": True, "ROWS_GUARANTEED_SAFE": True}
    assert (q.shape[2], k.shape[2]) == block_mask.seq_lengths and q.shape[2] % 128 == k.shape[2] % 128 == 0
    partly = block_mask.kv_num_blocks, block_mask.kv_indices
    whole = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    for one, other in zip(partly, whole, strict=True):
        assert one.dtype == other.dtype == torch.int32 and one.is_contiguous() and other.is_contiguous()
        assert one.shape == other.shape
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        keys, values = (x[0, head * k.shape[1] // q.shape[1]].double() for x in (k, v))
        for block in range(q.shape[2] // 128):
            i = torch.arange(128)[:, None] + block * 128
            best, total = torch.full((128,), -torch.inf).double(), torch.zeros(128).double()
            sums = torch.zeros(128, q.shape[3]).double()
            for (counts, lists), is_whole in ((partly, False), (whole, True)):
                place = 0, head % counts.shape[1], block
                for step in range(int(counts[place])):
                    j = torch.arange(128)[None] + (int(lists[place][0]) + step) * 128
                    scores = q[0, head, i[:, 0]].double() @ keys[j[0]].T * scale
                    scores = score_mod(scores, 0, head, i, j)
                    if not is_whole:
                        scores = scores.masked_fill(~block_mask.mask_mod(0, head, i, j), -torch.inf)
                    better = torch.maximum(best, scores.amax(1))
                    fade, weights = (best - better).exp(), (scores - better[:, None]).exp()
                    total = total * fade + weights.sum(1)
                    sums = sums * fade[:, None] + weights @ values[j[0]]
                    best = better
            out[0, head, i[:, 0]] = (sums / total[:, None]).to(q.dtype)
    return out


by_torch = pytest.param("torch", id="torch")
as_kernel = pytest.param("kernel", id="as_the_kernel_reads")
on_cuda = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)


class Asked:
    """Parts of prompts at the end of filled rows, among other tokens of a step."""

    def __init__(
        self, by: str, monkeypatch, n_tokens: list[int], stored: list[int], H: int, n_kv: int, D: int,
        int8: bool = False,
    ) -> None:  # fmt: skip
        device = "cuda" if by == "cuda" else "cpu"
        self.filled = Filled((device, device == "cuda"), stored, n_kv, D, int8=int8)
        starts = [3 + 5 * row + sum(n_tokens[:row]) for row in range(len(stored))]
        self.parts = [
            Part(start, n, S, self.filled.table[row, : -(-S // PAGE)].tolist())
            for row, (start, n, S) in enumerate(zip(starts, n_tokens, stored, strict=True))
        ]
        self.q = torch.randn(H, starts[-1] + n_tokens[-1] + 2, D, generator=self.filled.numbers).to(device)
        self.scale = D**-0.5
        if by == "kernel":
            monkeypatch.setattr(paged_attention, "flex", lambda q: as_the_kernel_reads)

    def of(self, row: int) -> Tensor:
        """Queries of a row as `Filled` takes them, (rows, T, H, D)."""
        part = self.parts[row]
        own = self.q[:, part.start : part.start + part.n_tokens].transpose(0, 1)
        return own.expand(len(self.parts), *own.shape)

    def answer(self, slopes: Tensor | None, drop: float = DROP) -> list[Tensor]:
        """(T, H, D) of each part."""
        slopes = None if slopes is None else slopes.to(self.q.device)
        prompts = Prompts(self.parts, slopes, self.scale, self.q.device, drop=drop)
        tokens = [torch.arange(part.start, part.start + part.n_tokens) for part in self.parts]
        assert torch.equal(prompts.tokens.cpu(), torch.cat(tokens))
        out = prompts.attend(self.q, *self.filled.layer)
        return list(out.split([part.n_tokens for part in self.parts]))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("by", [by_torch, as_kernel, on_cuda])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize(
    ("n_tokens", "stored"),
    [
        pytest.param([17], [17], id="one_block"),
        pytest.param([256], [256], id="whole_blocks"),
        pytest.param([173], [300], id="the_first_query_at_the_end_of_a_block"),
        pytest.param([20, 200, 129, 30], [20, 327, 700, 1000], id="four"),
    ],
)
@pytest.mark.parametrize(("H", "n_kv", "D"), [(4, 4, 80), (4, 2, 64)])
def test_parts_of_prompts_equal_the_formula(monkeypatch, by, alibi, n_tokens, stored, H, n_kv, D) -> None:
    asked = Asked(by, monkeypatch, n_tokens, stored, H, n_kv, D)
    slopes = attention.alibi_slopes(H) if alibi else None
    for row, found in enumerate(asked.answer(slopes)):
        expected = asked.filled.expected(asked.of(row), slopes, asked.scale, row)
        assert (found.double() - expected).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("by", [by_torch, as_kernel, on_cuda])
@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize(("n_tokens", "stored"), [([256], [256]), ([20, 200, 30], [20, 327, 1000])])
@pytest.mark.parametrize(("H", "n_kv", "D"), [(4, 4, 80), (4, 2, 64)])
def test_prompts_over_int8_pages_equal_the_formula_over_their_numbers(
    monkeypatch, by, alibi, n_tokens, stored, H, n_kv, D
) -> None:
    asked = Asked(by, monkeypatch, n_tokens, stored, H, n_kv, D, int8=True)
    slopes = attention.alibi_slopes(H) if alibi else None
    for row, found in enumerate(asked.answer(slopes)):
        expected = asked.filled.expected(asked.of(row), slopes, asked.scale, row)
        assert (found.double() - expected).abs().max() < TOLERANCE[torch.float32]


def test_prompts_read_int8_pages_as_torch_on_cpu_does() -> None:
    """bfloat16 copies of them, zero behind the row's end."""
    filled = Filled(("cpu", False), [300], 2, 64, torch.bfloat16, int8=True)
    kv, _, scales = filled.layer
    k, v = gather(kv, filled.table[0, :2].long(), slice(300, None), scales, torch.bfloat16)
    for found, expected in ((k, filled.keys[0]), (v, filled.values[0])):
        assert torch.equal(found[:, :, :300], expected.float().bfloat16()) and not found[:, :, 300:].any()


@pytest.mark.parametrize(
    ("n_tokens", "stored"), [([17], [17]), ([173], [300]), ([256], [256]), ([128, 300], [1024, 4000])]
)
def test_the_mask_names_the_blocks_that_hold_a_key_it_sees(n_tokens, stored) -> None:
    parts, i, j, at = [], [], [], 0
    for row, (n, S) in enumerate(zip(n_tokens, stored, strict=True)):
        n_pages = -(-S // PAGE)
        parts.append(Part(sum(n_tokens[:row]), n, S, list(range(n_pages))))
        own = torch.arange(S - n, S + -n % 128).clamp(max=S - 1)
        i.append(torch.stack([own, torch.full_like(own, row)]))
        j.append(torch.stack([torch.arange(n_pages * PAGE), torch.full((n_pages * PAGE,), row)]))
        at += n_pages
    (own, row), (key, of) = torch.cat(i, 1)[..., None], torch.cat(j, 1)
    seen = (key <= own) & (of == row)
    blocks = seen.view(len(own) // 128, 128, len(key) // 128, 128).transpose(1, 2).flatten(2)
    mask = Prompts(parts, None, 1.0, torch.device("cpu"))._mask
    rows, keys = mask.seq_lengths
    assert rows == max(256, len(own)) and keys == len(key)  # two blocks at least: sizes of 1 are compiled apart
    assert torch.equal(mask.to_dense()[0, 0, : len(blocks)].bool(), blocks.any(-1))
    for at, n in enumerate(mask.full_kv_num_blocks[0, 0, : len(blocks)].tolist()):
        whole = mask.full_kv_indices[0, 0, at, :n]
        assert blocks[at, whole].all() and n >= blocks[at].all(-1).sum() - 1


def far_reaching(monkeypatch, T: int) -> tuple[Asked, Tensor]:
    """A row of 1,000 whose four heads reach back 1, 2, 3 and 4 pages and whose queries dislike their own keys."""
    asked = Asked("kernel", monkeypatch, [T], [1000], 4, 4, 64)
    asked.q[:, 3 : 3 + T] = asked.filled.keys[0][0, :, -T:].float() * -0.5
    return asked, torch.tensor([0.4, 0.1, 0.05, 0.001])


def test_prompts_do_not_read_pages_out_of_reach(monkeypatch) -> None:
    asked, slopes = far_reaching(monkeypatch, 40)
    expected = asked.filled.expected(asked.of(0), slopes, asked.scale, 0)
    for head, n_out in enumerate([2, 1, 0, 0]):
        for page in asked.parts[0].pages[:n_out]:
            asked.filled.pages.kv[0, page, :, head] = torch.nan
    [found] = asked.answer(slopes)
    assert (found.double() - expected).abs().max() < TOLERANCE[torch.float32]
    assert asked.answer(slopes, drop=0.0)[0][:, :2].isnan().all()  # it was for the reach that they were not


@pytest.mark.parametrize("drop", [DROP, 0.5])
def test_what_prompts_leave_out_weighs_less_than_was_allowed(monkeypatch, drop) -> None:
    """As for decoding: the value of one page is 1, so that an output is that page's weight, and 0 if it is not read."""
    asked, slopes = far_reaching(monkeypatch, 300)
    v = asked.filled.pages.kv[0, :, 1]
    weights = asked.filled.weights(asked.of(0), slopes, asked.scale, 0)  # (H, T, S)
    left_out = torch.zeros(4, 300, dtype=torch.float64)
    for at, page in enumerate(asked.parts[0].pages):
        v.zero_()
        v[page] = 1.0
        unread = asked.answer(slopes, drop)[0][:, :, 0].t() == 0
        left_out += weights[..., at * PAGE : (at + 1) * PAGE].sum(-1) * unread
    assert left_out.max() < drop
    assert drop < 0.01 or left_out.max() > 0


def test_the_bound_of_prompts_holds_where_it_is_tight(monkeypatch) -> None:
    """All keys are alike but the queries' own, which have most of the weight: then a page weighs what its bound says.

    Page 2 then weighs 1 % for the first query and page 1 0.08 %, so with 0.1 % allowed only page 0 may go.
    """
    asked = Asked("kernel", monkeypatch, [17], [1000], 1, 1, 64)
    filled, slope, drop = asked.filled, torch.tensor([0.01]), 0.001
    direction = asked.q[0, 3] / asked.q[0, 3].norm()
    asked.q[0, 3:20] = direction * 8  # a key of c in this direction scores c / 8 * 8 = c
    scores = torch.ones(1000)
    scores[-17:] += 6.9
    filled.keys[0][0, 0] = direction.double() * scores[:, None]
    for at, page in enumerate(asked.parts[0].pages):
        own = scores[at * PAGE : (at + 1) * PAGE]
        filled.pages.kv[0, page, 0, 0, : len(own)] = direction * own[:, None]
        filled.pages.key_norms[0, page] = own.max() * 1.0001
    weights = filled.weights(asked.of(0), slope, asked.scale, 0)[0]  # (T, S)
    v, unread = filled.pages.kv[0, :, 1], torch.zeros(17, 4, dtype=torch.bool)
    for at, page in enumerate(asked.parts[0].pages):
        v.zero_()
        v[page] = 1.0
        unread[:, at] = asked.answer(slope, drop)[0][:, 0, 0] == 0
    shares = torch.stack([weights[:, at * PAGE : (at + 1) * PAGE].sum(-1) for at in range(4)], -1)
    assert unread.tolist() == [[True, False, False, False]] * 17
    assert (shares * unread).sum(-1).max() < drop < shares[0, 2]


def test_prompts_hear_a_loud_key_far_away(monkeypatch) -> None:
    asked = Asked("kernel", monkeypatch, [40], [1000], 1, 1, 64)
    filled, slope = asked.filled, torch.tensor([0.4])
    direction = asked.q[0, 3] / asked.q[0, 3].norm()
    asked.q[0, 3:43] = direction * 8  # a key of c in this direction scores c / 8 * 8 = c
    slot = filled.table[0, :1].long() * PAGE + 9
    k, v = (direction * (0.4 * 991 + 30))[None], torch.ones(1, 64)
    store(filled.pages.kv[0], filled.pages.key_norms[0], k[None], v[None], slot, triton=False)
    filled.keys[0][0, 0, 9], filled.values[0][0, 0, 9] = k[0].double(), v[0].double()
    assert filled.weights(asked.of(0), slope, 0.125, 0)[0, :, 9].min() > 0.9
    expected = filled.expected(asked.of(0), slope, 0.125, 0)
    assert (asked.answer(slope)[0].double() - expected).abs().max() < 2e-4


def test_parts_share_a_call_as_long_as_their_keys_fit(monkeypatch) -> None:
    monkeypatch.setattr(paged_attention, "MOST_KEYS", 4 * PAGE)
    parts = [Part(0, 20, n * PAGE, list(range(n))) for n in (1, 2, 1, 1, 9, 4, 1)]
    sizes = [[len(part.pages) for part in group] for group in together(parts)]
    assert sizes == [[1, 2, 1], [1], [9], [4], [1]]
    assert list(together([])) == []


def test_flex_attention_that_would_run_without_a_kernel_says_so(monkeypatch) -> None:
    """Torch computes on with all scores once it has compiled too often; that must not pass for the kernel."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", **options))
    paged_attention._compiled_flex.cache_clear()
    try:
        kernel = paged_attention._compiled_flex()
        assert torch._dynamo.config.recompile_limit >= 64
        with torch._dynamo.config.patch(recompile_limit=1):
            q = torch.randn(1, 2, 256, 16)
            kernel(q, q, q)
            q = torch.randn(1, 2, 256, 32)  # head sizes are compiled apart
            with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                kernel(q, q, q)
    finally:
        paged_attention._compiled_flex.cache_clear()


# -- for a GPU that is not here --------------------------------------------------------------------------------------

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpt.backends import paged_attention, paged_kernels

POINTERS = {"slots": "*i64", "table": "*i32", "lengths": "*i32"}
FLOATS = {"scale", "log_drop", "eps"}
ALWAYS_FLOAT = {"slopes", "scales"}
NUMBERS = {"q", "k", "v", "kv", "out", "x", "y", "weight", "bias"}

def build(kernel, dtype, n_warps, n_stages=3, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name == "kv" and constants["IS_INT8"]:
            signature[name] = "*i8"
        elif name in NUMBERS:
            signature[name] = "*" + dtype
        elif name == "norms":
            signature[name] = "*i32" if kernel is paged_kernels.store else "*fp32"
        elif name in ("part", "part_lse"):
            signature[name] = "*" + (dtype if constants["N_SPLITS"] == 1 else "fp32")
        elif name in ALWAYS_FLOAT:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # What a launch finds: memory that is aligned, and strides of whole heads.
    whole = {n for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name[:2] in ("q_", "kv")}
    attributes = {(n,): [["tt.divisibility", 16]] for n in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": n_warps, "num_stages": n_stages}
    return compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)

for dtype, D, lines, group in [("bf16", 128, 16, 1), ("bf16", 112, 16, 1), ("fp16", 80, 64, 4)]:
    stages = paged_attention._STAGES if lines == 16 else paged_attention._STAGES_OF_MANY_LINES
    for n_splits, int8 in ((1, False), (16, False), (1, True), (16, True)):
        split = build(paged_kernels.decode_split, dtype, 4, stages, G=group, D=D, BLOCK_M=lines, BLOCK_N=64,
                      BLOCK_D=128, BLOCK_P=64, PAGE=256, N_SPLITS=n_splits, HAS_ALIBI=True, IS_INT8=int8)
        assert split.metadata.shared < 99 * 1024, split.metadata.shared
        # Keys and values of the next blocks are on their way while one is computed: it waits for all but the last.
        waits = {int(line.split()[1].rstrip(";")) for line in split.asm["ptx"].splitlines() if "wait_group" in line}
        assert lines > 16 or max(waits) >= 2, waits
    build(paged_kernels.merge, dtype, 4, D=D, BLOCK_D=128, N_SPLITS=16, BLOCK_S=16)
    build(paged_kernels.add_norm, dtype, 8, C=4096 - D, BLOCK_C=4096, HAS_Y=True, HAS_BIAS=True)
    for int8 in (False, True):
        stored = build(paged_kernels.store, dtype, 1, D=D, BLOCK_D=128, PAGE=256, IS_INT8=int8, LEAST=1e-30, MORE=1.01)
        assert not int8 or "div.rn.f32" in stored.asm["ptx"]  # others may be off by a bit
print("compiled")
"""


@pytest.mark.skipif(not has_triton(), reason="needs `pip install triton`")
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(capability) -> None:
    compile_for(capability, COMPILE)
