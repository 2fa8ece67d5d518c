"""Unpacked weights against the published packing, done the other way round code by code, and against bitsandbytes."""

import pytest
import torch

from mpt.packed import formulas
from tests import packers

IN, OUT = 128, 64


@pytest.mark.parametrize("group_size", [32, 64, IN])
def test_awq_gemm_gives_the_real_values(group_size: int) -> None:
    codes, zeros, scales = packers.random_codes(IN, OUT, 4, IN // group_size)
    parts = packers.awq_gemm(codes, zeros, scales)
    assert parts["qweight"].shape == (IN, OUT // 8) and parts["qzeros"].shape == (IN // group_size, OUT // 8)
    found = formulas.awq_gemm(parts["qweight"], parts["qzeros"], parts["scales"], group_size)
    real = packers.real_values(codes, zeros, scales, [i // group_size for i in range(IN)])
    assert found.dtype == torch.float16 and torch.equal(found, real.half())


@pytest.mark.parametrize(("group_size", "width"), [(32, 4), (64, 2), (IN, 1)])
def test_awq_gemv_gives_the_real_values_and_never_its_padding(group_size: int, width: int) -> None:
    codes, zeros, scales = packers.random_codes(IN, OUT, 4, IN // group_size)
    parts = packers.awq_gemv(codes, zeros, scales, width)
    assert parts["qweight"].shape == (OUT, IN // 8) and parts["qzeros"].shape == (OUT, width)
    found = formulas.awq_gemv(parts["qweight"], parts["qzeros"], parts["scales"], group_size)
    real = packers.real_values(codes, zeros, scales, [i // group_size for i in range(IN)])
    assert torch.equal(found, real.half())


@pytest.mark.parametrize("minus_one", [True, False], ids=["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_gives_the_real_values_in_act_order_and_without(bits: int, minus_one: bool) -> None:
    codes, zeros, scales = packers.random_codes(IN, OUT, bits, IN // 32)
    in_order = [i // 32 for i in range(IN)]
    shuffled = [in_order[i * 37 % IN] for i in range(IN)]
    for groups in (in_order, shuffled):
        parts = packers.gptq(codes, zeros, scales, groups, bits, minus_one)
        assert parts["qweight"].shape == (IN * bits // 32, OUT)
        found = formulas.gptq(parts["qweight"], parts["qzeros"], scales, torch.tensor(groups), bits, int(minus_one))
        assert torch.equal(found, packers.real_values(codes, zeros, scales, groups).half())


def test_a_symmetric_gptq_word_by_hand() -> None:
    """AutoGPTQ stores the zero 8 of symmetric 4 bits as 7: words of 0x77777777; the codes 0 to 7 are 0x76543210."""
    qweight = torch.full((1, 8), 0x76543210, dtype=torch.int32)
    qzeros = torch.full((1, 1), 0x77777777, dtype=torch.int32)
    found = formulas.gptq(qweight, qzeros, torch.full((1, 8), 0.5), torch.zeros(8, dtype=torch.int32), 4, 1)
    assert found.tolist() == [[-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]] * 8


def test_an_awq_word_by_hand() -> None:
    """0x76543210 has 0 in its lowest 4 bits: column 0; the next are columns 2, 4, 6, 1, 3, 5, 7."""
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    found = formulas.awq_gemm(word, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), 1)
    assert found.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_int8_equals_bitsandbytes() -> None:
    parts, real = packers.eight_bits(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(formulas.bitsandbytes_int8(parts["weight"], parts["SCB"]), real)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(270, 256), (133, 129)])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_equal_bitsandbytes(
    quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    """The second shape ends in the middle of a block and of a byte. In both, the scales' last block is short.

    Even rows are not shorter than blocks here: for such, bitsandbytes 0.50.2's code for AVX-512 takes scales of other
    blocks (its result is twice as far from the weight as this one and as its own code in torch).
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts, real = packers.four_bits(weight, quant_type, block_size, nested)
    absmax = parts["weight.absmax"]
    if nested:
        inner, inner_map = parts["weight.nested_absmax"], parts["weight.nested_quant_map"]
        absmax = formulas.nested_absmax(
            absmax, inner[torch.arange(len(absmax)) // 256], inner_map, packers.offset_of(parts)
        )
    n = weight.numel()
    found = formulas.bitsandbytes_4bit(parts["weight"], absmax, parts["weight.quant_map"], block_size, n)
    assert torch.equal(found.view(shape).to(dtype), real)
