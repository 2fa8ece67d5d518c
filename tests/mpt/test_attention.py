"""Attention against its formula in float64, written out here head by head, and against the laws it must keep."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpt import attention
from tests import flash_2

# Outputs are averages of values of size 1, so float32's 6e-8 a term gives about 1e-6 in a sum of some dozen terms.
TIGHT = 3e-6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def press_slopes(n_heads: int, bias_max: float = 8.0) -> list[float]:
    """`get_slopes` of the ALiBi paper's code, with its fixed 8 made a parameter."""

    def of_power_of_2(n: int) -> list[float]:
        start = 2 ** (-bias_max / n)
        return [start * start**i for i in range(n)]

    if math.log2(n_heads).is_integer():
        return of_power_of_2(n_heads)
    closest = 2 ** math.floor(math.log2(n_heads))
    return of_power_of_2(closest) + press_slopes(2 * closest, bias_max)[0::2][: n_heads - closest]


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    slopes: list[float] | None = None,
    key_mask: Tensor | None = None,
    sequence_id: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale - slope (i - j)) v over the keys each query may see, in float64, (B, H, T, D).

    Zero where a query sees nothing.
    """
    q, k, v = q.double(), k.double(), v.double()
    B, H, T, _ = q.shape
    S = k.shape[2]
    i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)[None]
    rows = []
    for b in range(B):
        seen = i >= j
        if key_mask is not None:
            seen = seen & key_mask[b]
        if sequence_id is not None:
            seen = seen & (sequence_id[b][:, None] == sequence_id[b][None])
        heads = []
        for h in range(H):
            shared = h * k.shape[1] // H  # the key head that serves query head h
            scores = q[b, h] @ k[b, shared].T * scale
            if slopes is not None:
                scores = scores - slopes[h] * (i - j)
            top = torch.where(seen, scores.detach(), -1e300).amax(-1, keepdim=True)
            weights = torch.where(seen, scores - top, 0.0).exp() * seen
            heads.append(weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ v[b, shared])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def random_qkv(B: int, H: int, T: int, S: int, D: int = 16, n_kv: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(B + 10 * H + 100 * T + 1000 * S)
    q = torch.randn(B, H, T, D, generator=g)
    k, v = torch.randn(2, B, n_kv or H, S, D, generator=g)
    return q, k, v


def bias_for(n_heads: int, n_keys: int, bias_max: float = 8.0) -> Tensor:
    return attention.alibi_bias(attention.alibi_slopes(n_heads, bias_max), n_keys)


# -- ALiBi -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64])
def test_slopes_are_those_of_the_paper(n_heads: int, bias_max: int) -> None:
    expected = torch.tensor(press_slopes(n_heads, bias_max))
    torch.testing.assert_close(attention.alibi_slopes(n_heads, bias_max), expected, rtol=1e-6, atol=0)


def test_slopes_of_six_heads_by_hand() -> None:
    # Of 8 heads: 1/2 1/4 1/8 1/16 1/32 1/64 1/128 1/256; every second first, then the others, six of them.
    assert attention.alibi_slopes(6).tolist() == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


def test_bias_is_zero_at_the_last_key_and_falls_by_the_slope() -> None:
    bias = bias_for(4, 5)
    assert bias.shape == (1, 4, 1, 5)
    assert bias.dtype == torch.float32
    assert bias[0, 0, 0].tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0]  # the first of 4 slopes is 2^-2
    assert bias[0, 3, 0].tolist() == [-4 / 256, -3 / 256, -2 / 256, -1 / 256, 0.0]  # the last is 2^-8


def test_bias_for_fewer_keys_is_the_tail() -> None:
    assert torch.equal(bias_for(12, 9), bias_for(12, 100)[..., -9:])


# -- against the formula ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (33, 33), (1, 33), (7, 33), (32, 33)])
def test_equals_the_formula(device: torch.device, T: int, S: int, n_kv: int, alibi: bool) -> None:
    q, k, v = (x.to(device) for x in random_qkv(2, 4, T, S, n_kv=n_kv))
    bias = bias_for(4, 64).to(device) if alibi else None
    expected = formula(q, k, v, scale=0.3, slopes=press_slopes(4) if alibi else None)
    torch.testing.assert_close(attention.attend(q, k, v, scale=0.3, bias=bias).double(), expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize(("T", "S"), [(20, 20), (1, 20), (8, 20), (15, 20)])
@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(slice(0, 3), id="left"),
        pytest.param(slice(0, 14), id="left, all of a past and more"),
        pytest.param(slice(17, 20), id="right"),
        pytest.param(slice(4, 9), id="middle"),
    ],
)
def test_hidden_keys_do_not_count(device: torch.device, hidden: slice, T: int, S: int) -> None:
    q, k, v = (x.to(device) for x in random_qkv(3, 4, T, S))
    key_mask = torch.ones(3, S, dtype=torch.bool, device=device)
    key_mask[0, hidden] = False
    k[0, :, hidden], v[0, :, hidden] = 100.0, 100.0  # loud, should one of them count
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4), key_mask=key_mask)
    got = attention.attend(q, k, v, scale=0.25, bias=bias_for(4, S).to(device), key_mask=key_mask)
    assert got.isfinite().all()  # also where a query sees nothing: its keys must not poison the next layer
    means_something = (key_mask.cumsum(-1) > 0)[:, None, -T:, None].expand_as(got)
    torch.testing.assert_close(got[means_something].double(), expected[means_something], rtol=0, atol=TIGHT)


DOCUMENTS = torch.tensor(
    [
        [0] * 5 + [1] * 9 + [2] * 1 + [-1] * 5,
        [7] * 20,
        [3] * 10 + [4] * 10,
        [-1] * 2 + [0] * 4 + [-1] * 2 + [1] * 12,
    ]
)


def documents(sequence_id: Tensor) -> attention.Documents:
    slopes = attention.alibi_slopes(4).to(sequence_id.device)
    return attention.Documents(sequence_id, scale=0.25, slopes=slopes)


@pytest.mark.parametrize("n_kv", [4, 1])
def test_documents_do_not_see_each_other(device: torch.device, n_kv: int) -> None:
    q, k, v = (x.to(device) for x in random_qkv(4, 4, 20, 20, n_kv=n_kv))
    sequence_id = DOCUMENTS.to(device)
    got = documents(sequence_id).attend(q, k, v)
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4), sequence_id=sequence_id)
    real = (sequence_id >= 0)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real].double(), expected[real], rtol=0, atol=TIGHT)
    assert not got[~real].any()


@pytest.mark.parametrize("n_kv", [4, 2])
@pytest.mark.parametrize("case", ["plain", "past", "key mask", "past and key mask", "documents"])
def test_gradients_equal_the_formulas(device: torch.device, case: str, n_kv: int) -> None:
    T, S = (8, 20) if "past" in case else (20, 20)
    q, k, v = (x.to(device).requires_grad_() for x in random_qkv(4, 4, T, S, n_kv=n_kv))
    key_mask = sequence_id = None
    weight = torch.randn(4, 4, T, 16, generator=torch.Generator().manual_seed(1)).to(device)
    if "key mask" in case:
        key_mask = torch.ones(4, S, dtype=torch.bool, device=device)
        key_mask[0, :14] = key_mask[1, :3] = key_mask[2, 18:] = False
        weight = weight * (key_mask.cumsum(-1) > 0)[:, None, -T:, None]
    bias = bias_for(4, S).to(device)
    if case == "documents":
        sequence_id = DOCUMENTS.to(device)
        weight = weight * (sequence_id >= 0)[:, None, :, None]
        got = documents(sequence_id).attend(q, k, v)
    else:
        got = attention.attend(q, k, v, scale=0.25, bias=bias, key_mask=key_mask)
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4), key_mask=key_mask, sequence_id=sequence_id)
    ours = torch.autograd.grad((got * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TIGHT)  # sums of up to 80 such terms


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on CPU, where torch has the formula for it, and refuses gradients that it then computes rightly."""
    monkeypatch.setattr(attention, "takes_flex", lambda device: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("n_kv", [4, 2])
@pytest.mark.parametrize("case", ["whole", "past", "key mask", "past and key mask", "documents"])
def test_the_branch_for_cuda_computes_the_same_on_cpu(case: str, n_kv: int) -> None:
    T, S = (8, 20) if "past" in case else (20, 20)
    q, k, v = (x.requires_grad_() for x in random_qkv(4, 4, T, S, n_kv=n_kv))
    key_mask = sequence_id = None
    real = torch.ones(4, T, dtype=torch.bool)
    if "key mask" in case:
        key_mask = torch.ones(4, S, dtype=torch.bool)
        key_mask[0, :14] = key_mask[1, :3] = key_mask[2, 18:] = False
        real = (key_mask.cumsum(-1) > 0)[:, -T:]
    if case == "documents":
        sequence_id = DOCUMENTS
        real = sequence_id >= 0
        got = documents(sequence_id).attend(q, k, v)
    else:
        got = attention.attend(q, k, v, scale=0.25, bias=bias_for(4, 64), key_mask=key_mask)
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4), key_mask=key_mask, sequence_id=sequence_id)
    assert got.isfinite().all()
    at = real[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[at].double(), expected[at], rtol=0, atol=TIGHT)
    assert case != "documents" or not got[~at].any()
    ours, theirs = (torch.autograd.grad(out[at].sum(), (q, k, v)) for out in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TIGHT)


@pytest.mark.parametrize("alibi", [True, False])
@pytest.mark.parametrize("n_kv", [4, 2, 1])
def test_documents_through_flash_attn_2_equal_the_formula_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, n_kv: int, alibi: bool
) -> None:
    """What is handed to it and what comes back; a stand-in computes."""
    flash_2.install(monkeypatch)
    q, k, v = (x.requires_grad_() for x in random_qkv(4, 4, 20, 20, n_kv=n_kv))
    slopes = attention.alibi_slopes(4) if alibi else None
    made = attention.Documents(DOCUMENTS, scale=0.25, slopes=slopes, kernel="flash-attn 2")
    got = made.attend(q, k, v)
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4) if alibi else None, sequence_id=DOCUMENTS)
    real = (DOCUMENTS >= 0)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real].double(), expected[real], rtol=0, atol=TIGHT)
    assert not got[~real].any()
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((got * weight).sum(), (q, k, v))  # of padding too: its gradients must be zero
    theirs = torch.autograd.grad((expected * weight)[real].sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * TIGHT)


def test_flash_attn_2_is_told_the_ends_of_documents_and_of_short_pieces_of_padding() -> None:
    """By hand, of rows laid end to end: 5 + 9 + 1 tokens and 285 of padding, cut at 128 and 256; a whole row; padding
    before, between, and to the end."""
    rows = [packed_row(300, 5, 9, 1), packed_row(300, 300), packed_row(300, -2, 4, -2, 292)]
    ends = [0, 5, 14, 15, 128, 256, 300, 600, 602, 606, 608, 900]
    found = attention._ends(torch.tensor(rows))
    assert found.tolist() == ends and found.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_qk_ln_has_widened_goes_to_flash_attn_2_as_the_values_are(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Autocast leaves LayerNorm's output in float32; the stand-in refuses mixed dtypes, as flash-attn does."""
    flash_2.install(monkeypatch)
    q, k, v = random_qkv(4, 4, 20, 20)
    made = attention.Documents(DOCUMENTS, scale=0.25, slopes=attention.alibi_slopes(4), kernel="flash-attn 2")
    got = made.attend(q, k, v.to(dtype))
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4), sequence_id=DOCUMENTS)
    real = (DOCUMENTS >= 0)[:, None, :, None].expand_as(got)
    assert got.dtype == dtype
    torch.testing.assert_close(got[real].double(), expected[real], rtol=0, atol=TIGHT if dtype.itemsize == 4 else 0.05)


AMPERE, ADA, HOPPER, TURING = (8, 0), (8, 9), (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "d_head", "expected", "reason"),
    [
        (AMPERE, torch.bfloat16, 128, "flash-attn 2", None),
        (ADA, torch.float16, 64, "flash-attn 2", None),
        (AMPERE, torch.float32, 128, "FlexAttention", "attention is in float32 here"),
        (AMPERE, torch.bfloat16, 512, "FlexAttention", "heads of up to 256, and those of this model have 512"),
        (HOPPER, torch.bfloat16, 128, "FlexAttention", None),
        (TURING, torch.float16, 128, "FlexAttention", None),
    ],
)
def test_which_kernel_attends_within_documents_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: Any, dtype: torch.dtype, d_head: int, expected: str, reason: Any
) -> None:
    flash_2.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel, why_not = attention.documents_kernel(torch.device("cuda"), dtype, d_head)
    assert kernel == expected and (why_not is None if reason is None else reason in (why_not or ""))


def packed_row(T: int, *lengths: int) -> list[int]:
    """Documents of these lengths, a negative one padding, and padding up to T."""
    row = [number if n > 0 else -1 for number, n in enumerate(lengths) for _ in range(abs(n))]
    return row + [-1] * (T - len(row))


PACKED_ROWS = {
    # Borders on tiles, within them and around them; a document over many tiles; padding in front, between and behind.
    900: [packed_row(900, *n) for n in ([900], [128, 128, 256, 1, 387], [-130, 200, -300, 170], [500, 3, 5, 390])],
    512: [packed_row(512, *n) for n in ([512], [256, 256], [400], [1, 127, 129, 255])],
    100: [packed_row(100, *n) for n in ([100], [40, 50])],
}


@pytest.mark.parametrize("T", PACKED_ROWS)
def test_the_tiles_of_documents_are_those_of_the_whole_mask(T: int) -> None:
    """Torch makes the same tables from all T x T pairs."""
    ids = torch.tensor(PACKED_ROWS[T])

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[b, i] == ids[b, j]) & (ids[b, j] >= 0)

    expected = flex_attention.create_block_mask(visible, len(ids), None, T, T, device="cpu")
    found = attention.see(T, T, ids.device, first_key=attention._first_keys(ids)).mask
    assert found.seq_lengths == (T, T)
    assert_same_tables(found, expected)


@pytest.mark.parametrize(("T", "S"), [(300, 300), (512, 512), (1, 200), (100, 700), (256, 640)])
def test_the_tiles_behind_a_past_are_those_of_the_whole_mask(T: int, S: int) -> None:
    expected = flex_attention.create_block_mask(lambda b, h, i, j: i + S - T >= j, None, None, T, S, device="cpu")
    assert_same_tables(attention.see(T, S, torch.device("cpu")).mask, expected)


def assert_same_tables(found: flex_attention.BlockMask, expected: flex_attention.BlockMask) -> None:
    for side in ("kv", "q", "full_kv", "full_q"):
        counts, indices = (getattr(found, f"{side}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{side}_num_blocks")), side
        assert torch.equal(indices, getattr(expected, f"{side}_indices")), side


def test_hidden_keys_leave_no_tile_out() -> None:
    key_mask = torch.rand(3, 700, generator=torch.Generator().manual_seed(0)) < 0.5
    key_mask[0, :300] = key_mask[1, 256:512] = False
    key_mask[2] = True

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + 100 >= j) & key_mask[b, j]

    expected = flex_attention.create_block_mask(visible, 3, None, 600, 700, device="cpu")
    found = attention.see(600, 700, key_mask.device, key_mask).mask
    for side in ("full_kv", "full_q"):  # tiles in which nothing is hidden
        for what in ("num_blocks", "indices"):
            assert torch.equal(getattr(found, f"{side}_{what}"), getattr(expected, f"{side}_{what}"))
    assert bool((found.to_dense() >= expected.to_dense()).all())
    # A tile on the border may be there in which every key that is not hidden lies behind the query.
    assert int(found.to_dense().sum()) <= int(expected.to_dense().sum()) + 3 * 5


def test_a_mask_takes_16_bytes_a_tile_and_nothing_larger_is_made() -> None:
    T = 65_536
    sequence_id = torch.tensor([packed_row(T, 40_000, 20_000, 5_000)])
    largest: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = op(*args, **(kwargs or {}))
            largest.extend(x.numel() * x.element_size() for x in tree_leaves(made) if isinstance(x, Tensor))
            return made

    with Made():
        mask = attention.see(T, T, sequence_id.device, first_key=attention._first_keys(sequence_id)).mask
    tables = [getattr(mask, f"{side}_indices") for side in ("kv", "q", "full_kv", "full_q")]
    assert sum(x.numel() * x.element_size() for x in tables) == 16 * (T // 128) ** 2
    assert max(largest) == 8 * (T // 128) ** 2  # a table of int64, 2 MiB; all pairs as bool would be 4 GiB


def test_every_query_of_a_long_text_is_exact_not_only_the_last() -> None:
    q, k, v = random_qkv(1, 2, 4096, 4096)
    expected = formula(q, k, v, scale=0.25, slopes=press_slopes(2))
    found = attention.attend(q, k, v, scale=0.25, bias=bias_for(2, 4096))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-5)  # with one anchor: 1.6e-4


@pytest.mark.parametrize(("T", "S"), [(1500, 1500), (1100, 3000)])
def test_keys_out_of_reach_weigh_nothing(T: int, S: int) -> None:
    """Queries and keys such that the bound is met exactly: all alike but for their sign."""
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(16, generator=g)
    k = direction * torch.where(torch.rand(1, 8, S, 1, generator=g) < 0.5, -1, 1)
    q, v = -k[:, :, -T:], torch.randn(1, 8, S, 16, generator=g)  # a query's own key is the worst it sees
    slopes, scale = attention.alibi_slopes(8), 0.25
    bound = (direction @ direction * scale).expand(8)
    reach = attention.alibi_reach(slopes, bound)
    near = attention.attend(q, k, v, scale=scale, bias=bias_for(8, S), reach=reach)
    expected = formula(q, k, v, scale=scale, slopes=press_slopes(8))
    torch.testing.assert_close(near.double(), expected, rtol=0, atol=4e-5)
    # The law itself, in float64: what lies beyond the reach has less than 2^-24 of the weights.
    distance = torch.arange(S - 1, -1, -1, dtype=torch.float64)
    scores = (q[0, :, -1:].double() @ k[0].double().transpose(-1, -2))[:, 0] * scale - slopes.double()[
        :, None
    ] * distance
    dropped = (scores.softmax(-1) * (distance >= reach[:, None])).sum(-1)
    assert float(dropped.max()) < 2**-24
    assert int(reach[0]) < 100 < S < int(reach[-1])


def test_keys_out_of_reach_are_not_read() -> None:
    q, k, v = random_qkv(1, 8, 1100, 4000)
    reach = torch.tensor([50, 40, 60, 50, 5000, 50, 5000, 5000])
    k[:, :4, : 4000 - 1100 - 60] = v[:, :4, : 4000 - 1100 - 60] = torch.nan
    out = attention.attend(q, k, v, scale=0.25, bias=bias_for(8, 4000), reach=reach)
    assert bool(out.isfinite().all())


def test_float64_inputs_are_computed_in_float64() -> None:
    for T in (1, 9, 21):  # 4 heads: slopes are powers of two, so the float32 bias is exact
        q, k, v = (x.double() for x in random_qkv(2, 4, T, 21))
        expected = formula(q, k, v, scale=0.25, slopes=press_slopes(4))
        got = attention.attend(q, k, v, scale=0.25, bias=bias_for(4, 21))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


# -- at length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_max", [8, 16])
def test_float32_is_exact_to_1e_5_at_65536_keys(device: torch.device, bias_max: int) -> None:
    """The last 64 queries of a 32-head model's first, middle and last head, D 128; queries and keys ~ N(0, 1)."""
    heads = [0, 15, 31]
    q, k, v = (x.to(device) for x in random_qkv(1, len(heads), 64, 65_536, D=128))
    bias = bias_for(32, 65_536, bias_max)[:, heads].to(device)
    slopes = [press_slopes(32, bias_max)[h] for h in heads]
    expected = formula(q, k, v, scale=128**-0.5, slopes=slopes)
    got = attention.attend(q, k, v, scale=128**-0.5, bias=bias)
    assert (got.double() - expected).abs().amax() < 1e-5
    # Without the bias the answer is another one: the test does not pass for want of ALiBi.
    assert (formula(q, k, v, scale=128**-0.5) - expected).abs().amax() > 1e-2


@pytest.mark.parametrize("bias_max", [8, 16])
def test_bfloat16_keeps_the_bias_in_float32_at_65536_keys(device: torch.device, bias_max: int) -> None:
    heads = [0, 15, 31]
    q, k, v = (x.to(device, torch.bfloat16) for x in random_qkv(1, len(heads), 64, 65_536, D=128))
    bias = bias_for(32, 65_536, bias_max)[:, heads].to(device)
    expected = formula(q, k, v, scale=128**-0.5, slopes=[press_slopes(32, bias_max)[h] for h in heads])
    got = attention.attend(q, k, v, scale=128**-0.5, bias=bias)
    # bfloat16 keeps 8 bits: outputs of size 3 are off by up to 2^-8 * 3 = 0.012. A bfloat16 bias was off by 0.15.
    assert (got.double() - expected).abs().amax() < 0.02


@pytest.fixture
def peak_mib() -> Callable[[], float]:
    """Called, it gives the MiB by which this process's peak memory rose since the last call."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        pytest.skip("peak memory can be reset and read on Linux only")

    def read(field: str) -> float:
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) / 1024

    def rise() -> float:
        peak = read("VmHWM") - before[0]
        clear.write_text("5")  # sets the peak back to what is resident now
        before[0] = read("VmRSS")
        return peak

    before = [0.0]
    rise()
    return rise


@pytest.mark.parametrize("T", [8192, 4096])
def test_memory_grows_with_the_length_not_its_square(peak_mib: Callable[[], float], T: int) -> None:
    S, H = 8192, 4
    q, k, v = (x.requires_grad_(T == S) for x in random_qkv(1, H, T, S, D=8))
    bias = bias_for(H, S)
    key_mask = torch.ones(1, S, dtype=torch.bool)
    key_mask[:, :5] = False
    peak_mib()
    out = attention.attend(q, k, v, scale=0.3, bias=bias, key_mask=key_mask)
    if T == S:
        out.sum().backward()
    rise = peak_mib()
    assert rise < 64, f"{rise:.0f} MiB"  # the scores alone would be 4 * H * T * S bytes: 1,024 or 512 MiB
