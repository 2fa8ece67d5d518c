"""Attention of training in C, in each variant that runs here: the formula in float64, and the laws it must keep."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mpt import attention, native_attention
from mpt.backends.native import library
from training import memory

VARIANTS = () if library.why_none() else library.features().variants
# Those of one processor differ in products that this code has not, so the fastest stands for them.
TESTED = [name for name in VARIANTS if name == VARIANTS[0] or not name.endswith("_vnni")]
pytestmark = pytest.mark.skipif(not VARIANTS, reason=str(library.why_none()))


@pytest.fixture(params=TESTED)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native_attention, "load", functools.partial(library.load, request.param))
    return str(request.param)


def row(T: int, *lengths: int) -> list[int]:
    """Documents of these lengths, a negative one padding, and padding up to T."""
    ids = [number if n > 0 else -1 for number, n in enumerate(lengths) for _ in range(abs(n))]
    return ids + [-1] * (T - len(ids))


# Borders of blocks of 32 queries and 64 keys, just inside and just outside; padding in front, between and behind.
LENGTHS = torch.tensor([row(530, 513), row(530, -9, 1, 2, 63, -3, 64, 65, 200), row(530, 33, 128, 31, 338)])


def random(ids: Tensor, H: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as a model's projection leaves them, (B, H, T, D), and the gradient of the output."""
    made = torch.randn(4, *ids.shape, H, D, generator=torch.Generator().manual_seed(D)).to(dtype).transpose(2, 3)
    q, k, v = (each.detach().requires_grad_() for each in made[:3])
    return q, k, v, made[3]


def attend(ids: Tensor, q: Tensor, k: Tensor, v: Tensor, alibi: bool = True) -> Tensor:
    slopes = attention.alibi_slopes(q.shape[1]) if alibi else None
    return attention.Documents(ids, scale=q.shape[-1] ** -0.5, slopes=slopes, kernel="C").attend(q, k, v)


def formula(ids: Tensor, q: Tensor, k: Tensor, v: Tensor, alibi: bool = True) -> Tensor:
    """Of documents alone, in float64, with ALiBi as distances; 0 in padding."""
    H, T, D = q.shape[1:]
    at = torch.arange(T)
    bias = -attention.alibi_slopes(H).double()[:, None, None] * (at[:, None] - at) if alibi else None
    allowed = attention.causal_mask(T, T) & (ids[:, None, :, None] == ids[:, None, None, :])
    out = attention.eager(q.double(), k.double(), v.double(), scale=D**-0.5, bias=bias, allowed=allowed)
    return out * (ids >= 0)[:, None, :, None]


def results(out: Tensor, gradient: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(("dtype", "alibi"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 128])
def test_outputs_and_gradients_equal_the_formula(D: int, dtype: torch.dtype, alibi: bool) -> None:
    q, k, v, gradient = random(LENGTHS, 2, D, dtype)
    found = results(attend(LENGTHS, q, k, v, alibi), gradient, q, k, v)
    expected = results(formula(LENGTHS, q, k, v, alibi), gradient, q, k, v)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # float32: its 6e-8, over sums of some hundred terms. bfloat16: a result is rounded by half of 2^-8, and the
        # output has been before gradients take its product with its own.
        most = 1e-5 if dtype == torch.float32 else 2**-7 * float(other.abs().max())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=most)
        assert not one.masked_select((LENGTHS < 0)[:, None, :, None]).any()


@pytest.mark.usefixtures("variant")
def test_float16_is_rounded_at_the_end_alone() -> None:
    q, k, v, gradient = random(LENGTHS, 2, 32, torch.float16)
    found = results(attend(LENGTHS, q, k, v), gradient, q, k, v)
    for one, other in zip(found, results(formula(LENGTHS, q, k, v), gradient, q, k, v), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=2**-11 * float(other.abs().max()))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_threads_company_or_chance(dtype: torch.dtype) -> None:
    q, k, v, gradient = random(LENGTHS, 4, 32, dtype)
    before, runs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 2, 3):
            torch.set_num_threads(n_threads)
            runs.append(results(attend(LENGTHS, q, k, v), gradient, q, k, v))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
    alone = [x[1:2].detach().requires_grad_() for x in (q, k, v)]
    row = results(attend(LENGTHS[1:2], *alone), gradient[1:2], *alone)
    assert all(torch.equal(one, other[1:2]) for one, other in zip(row, runs[0], strict=True))


@pytest.mark.usefixtures("variant")
def test_far_keys_are_left_out_only_where_they_weigh_nothing() -> None:
    """The steepest head sees 30 keys of usual size; key 3 is so loud that it outweighs 1,000 keys' distance."""
    ids = torch.zeros(1, 1200, dtype=torch.int64)
    q, k, v, gradient = random(ids, 8, 32)
    with torch.no_grad():
        q[..., 0] = 4.0
        k[:, :, 3, 0] = 4.0 * 200  # a score of 4 * 800 / 32^0.5 = 566, and slope 1/2 takes 1/2 for each position
    found = results(attend(ids, q, k, v), gradient, q, k, v)
    expected = results(formula(ids, q, k, v), gradient, q, k, v)
    for one, other in zip(found, expected, strict=True):
        # float32's rounding of scores of 566 is 3e-5 of each weight, and of the gradients by a key of 800.
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-4, atol=2e-4 * float(other.abs().max()))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("alibi", [True, False])
def test_the_end_of_a_long_document_is_exact(alibi: bool) -> None:
    T = 20_000
    ids = torch.zeros(1, T, dtype=torch.int64)
    q, k, v, _ = (x.detach() for x in random(ids, 1, 16))
    found = attend(ids, q, k, v, alibi)[:, :, -40:]
    distance = torch.arange(T - 40, T)[:, None] - torch.arange(T)
    bias = -attention.alibi_slopes(1).double() * distance if alibi else None
    last = q[:, :, -40:].double()
    expected = attention.eager(last, k.double(), v.double(), scale=0.25, bias=bias, allowed=distance >= 0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.usefixtures("variant")
def test_what_lies_in_padding_reaches_nothing() -> None:
    q, k, v, gradient = random(LENGTHS, 2, 32)
    expected = results(attend(LENGTHS, q, k, v), gradient, q, k, v)
    padding = (LENGTHS < 0)[:, None, :, None]
    loud = [x.detach().masked_fill(padding, torch.nan).requires_grad_() for x in (q, k, v)]
    found = results(attend(LENGTHS, *loud), gradient.masked_fill(padding, torch.nan), *loud)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("variant")
def test_damage_is_not_hidden() -> None:
    q, k, v, gradient = random(LENGTHS, 2, 32)
    with torch.no_grad():
        k[0, 1, 100] = torch.nan
    out, *gradients = results(attend(LENGTHS, q, k, v), gradient, q, k, v)
    assert out[0, 1, 100:513].isnan().all() and out[0, 1, :100].isfinite().all() and out[0, 0].isfinite().all()
    assert all(each.isnan().any() for each in gradients)


@pytest.mark.usefixtures("variant")
def test_memory_may_lie_in_any_order() -> None:
    """Slices of one projection, a head's numbers apart, a gradient that repeats one number."""
    made = torch.randn(3, 530, 3, 2, 32, generator=torch.Generator().manual_seed(1))
    sliced = [x.transpose(1, 2).detach().requires_grad_() for x in made.unbind(2)]
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in sliced]
    assert sliced[0].stride(-2) == 3 * 2 * 32 and turned[0].stride(-1) == 530
    one = torch.ones(()).expand(3, 2, 530, 32)
    whole = [x.detach().contiguous().requires_grad_() for x in sliced]
    expected = results(attend(LENGTHS, *whole), one.contiguous(), *whole)
    for inputs in (sliced, turned):
        found = results(attend(LENGTHS, *inputs), one, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_grouped_heads_share_their_keys() -> None:
    q, _, _, gradient = random(LENGTHS, 4, 16)
    _, k, v, _ = random(LENGTHS, 2, 16)
    found = results(attend(LENGTHS, q, k, v), gradient, q, k, v)
    repeated = formula(LENGTHS, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    for one, other in zip(found, results(repeated, gradient, q, k, v), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=1e-5)


def test_what_qk_ln_has_widened_is_rounded_as_the_values_are() -> None:
    q, k, v, gradient = random(LENGTHS, 2, 32, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in (q, k)]
    found = results(attend(LENGTHS, *wide, v), gradient, *wide, v)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    expected = results(attend(LENGTHS, q, k, v), gradient, q, k, v)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("alibi", [True, False])
def test_torchs_own_checks_of_operators_pass(alibi: bool) -> None:
    """What `torch.compile` relies on: shapes, strides, that nothing is changed, gradients through its graphs."""
    ids = torch.tensor([row(40, 33), row(40, 1, 20)])
    q, k, v, _ = random(ids, 2, 16)
    pieces = native_attention.pieces(*attention._documents(ids))
    slopes = attention.alibi_slopes(2) if alibi else None
    torch.library.opcheck(native_attention._attend, (q, k, v, pieces, slopes, 0.25))


@pytest.mark.parametrize(("how", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_its_result(how: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, gradient = random(LENGTHS, 2, 32)
    called, run = list[str](), native_attention._run
    monkeypatch.setattr(native_attention, "_run", lambda name, *rest: (called.append(name), run(name, *rest)))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(LENGTHS, q, k, v).sin()

    keep: dict[str, Any] = {}
    if how == "selective":
        keep["context_fn"] = functools.partial(create_selective_checkpoint_contexts, memory._policy)
    out = block(q, k, v) if how == "none" else checkpoint(block, q, k, v, use_reentrant=False, **keep)
    found = results(out, gradient, q, k, v)
    assert called.count("mpt_documents_forward") == times and called.count("mpt_documents_backward") == 1
    assert all(torch.equal(a, b) for a, b in zip(found, results(block(q, k, v), gradient, q, k, v), strict=True))


# -- where it is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "d_head", "reason"),
    [
        (torch.float64, 64, "C is for float32, float16 and bfloat16, and attention is in float64 here"),
        (torch.bfloat16, 24, "C is for heads of multiples of 16 up to 256, and those here have 24"),
        (torch.bfloat16, 512, "C is for heads of multiples of 16 up to 256, and those here have 512"),
    ],
)
def test_torch_attends_to_what_c_is_not_made_for(dtype: torch.dtype, d_head: int, reason: str) -> None:
    assert attention.documents_kernel(torch.device("cpu"), dtype, d_head) == ("torch", reason)


def test_torch_attends_where_no_c_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPT_NATIVE", "0")
    library.load.cache_clear()
    native_attention._why_no_library.cache_clear()
    try:
        assert attention.documents_kernel(torch.device("cpu"), torch.bfloat16, 64) == ("torch", "MPT_NATIVE=0")
    finally:
        native_attention._why_no_library.cache_clear()
        library.load.cache_clear()


def test_c_attends_on_a_cpu() -> None:
    assert attention.documents_kernel(torch.device("cpu"), torch.bfloat16, 64) == ("C", None)
    assert attention.documents_kernel(torch.device("meta"), torch.bfloat16, 64) == ("torch", None)
