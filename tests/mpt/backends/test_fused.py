"""The blocks with fused sums and norms beside torch's own, under Triton's interpreter and on CUDA."""

import pytest
import torch
from torch import Tensor, nn

import mpt
from mpt.backends import fused
from mpt.transformers_model import MPTForCausalLM
from tests.kernels import needs_interpreter

everywhere = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="interpreted", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
DIGITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of numbers up to 4, rounded once


@everywhere
@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("C", [64, 240, 2048])
def test_a_sum_and_its_norm_equal_the_formula(device, dtype, bias, C) -> None:
    if (device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("the interpreter cuts numbers to bfloat16, where processors round")
    numbers = torch.Generator().manual_seed(C)
    x, y = (torch.randn(2, 3, C, generator=numbers).to(device, dtype) * 3 + 1 for _ in range(2))
    norm = nn.LayerNorm(C, eps=1e-5, bias=bias).to(device, dtype).requires_grad_(False)
    norm.weight += torch.randn(C, generator=numbers).to(device, dtype) * 0.1
    if bias:
        norm.bias += torch.randn(C, generator=numbers).to(device, dtype) * 0.1
    for added in (None, y, y.transpose(0, 1).contiguous().transpose(0, 1)):
        into = x.clone()
        found = fused.add_norm(into, added, norm)
        assert torch.equal(into, x if added is None else x + added)
        wide = into.double()
        wide = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        expected = wide * norm.weight.double() + (norm.bias.double() if bias else 0)
        assert found.dtype == dtype and (found.double() - expected).abs().max() < DIGITS[dtype] * 2


@everywhere
@pytest.mark.parametrize("settings", [{}, {"no_bias": False}, {"attn_config": {"alibi": False}}])
def test_fused_blocks_give_the_hidden_states_of_the_model(device, settings) -> None:
    torch.manual_seed(0)
    config = mpt.MPTConfig(d_model=64, n_heads=4, n_layers=3, vocab_size=100, max_seq_len=64, **settings)
    transformer = MPTForCausalLM(config).eval().requires_grad_(False).transformer.to(device)
    x, positions = torch.randn(1, 9, 64).to(device), torch.arange(9, device=device)[None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q + k) * v * (layer + 1)

    given = positions if config.has_wpe else None
    expected = transformer.run(x.clone(), attend, given)
    torch.testing.assert_close(fused.run(transformer, x, attend, given), expected, rtol=0, atol=3e-5)
