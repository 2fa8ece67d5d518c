"""Products with weights in int8 and 4 bits beside the values of the `gguf` package and the formula, in float64.

Under Triton's interpreter and on CUDA; the models also in plain torch. Compiled for a GPU without having one.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpt
from mpt.backends import quantized
from mpt.backends.backend import Backend, Work
from mpt.backends.paged_attention import has_triton
from mpt.backends.paged_backend import PagedBackend
from mpt.backends.quantization import quantize_model
from mpt.backends.torch_backend import TorchBackend
from mpt.errors import UserError
from mpt.packed.layers import packed_bytes
from mpt.packed.matrix import PackedMatrix
from mpt.packed.rounding import four_bits
from mpt.stored import StoredTensor
from mpt.transformers_model import MPTForCausalLM
from tests.kernels import compile_for, needs_interpreter

everywhere = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="interpreted", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
on_cpu = pytest.param(("cpu", False), id="torch")
interpreted = pytest.param(("cpu", True), id="interpreted", marks=needs_interpreter)
on_cuda = pytest.param(("cuda", True), id="cuda", marks=pytest.mark.gpu)
# Of sums of up to 544 products, which are up to 80 large: float32 rounds to 6e-8 of them a few times; float16 rounds
# weights, except for one row, and the result, to 5e-4 of them.
TOLERANCE = {torch.float32: 6e-5, torch.float16: 4e-2}


def packed(kind: str, values: Tensor, tmp_path: Path) -> PackedMatrix:
    """A matrix as it is packed while a checkpoint is read."""
    file = tmp_path / "weight"
    file.write_bytes(values.numpy().tobytes())
    stored = StoredTensor(file, 0, values.dtype, tuple(values.shape))
    name = "transformer.wte" if kind == "Q8_0" else "transformer.blocks.0.ffn.up_proj"
    matrix = (quantized.eight_bits(torch.float32) if kind == "int8" else quantized.four_bits)(name, stored)
    assert matrix is not None
    return matrix


def real_values(kind: str, values: Tensor) -> Tensor:
    """What the rounded weights stand for, float64, from ggml's own package, or for int8 from its definition."""
    if kind == "int8":
        largest = values.abs().amax(1, keepdim=True)
        scale = (largest / 127).bfloat16().float()
        scale = torch.where(scale * 127 < largest, (scale.view(torch.int32) + (1 << 16)).view(torch.float32), scale)
        return (values / scale).nan_to_num().round().double() * scale.double()  # a row of zeros
    of = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), of), of).astype(np.float64))


def weights(n_out: int, n_in: int) -> Tensor:
    numbers = torch.Generator().manual_seed(n_out + n_in)
    values = torch.randn(n_out, n_in, generator=numbers) * torch.logspace(-1, 0, n_out)[:, None]
    values[1] = 0
    return values


@everywhere
@pytest.mark.parametrize("kind", ["int8", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(("n_out", "n_in"), [(48, 128), (37, 96), (70, 544)])
@pytest.mark.parametrize(
    ("n_rows", "dtype"),
    [(1, "float32"), (3, "float32"), (16, "float16"), (40, "float32"), (1, "float16"), (80, "float16")],
)
def test_a_product_equals_that_of_the_real_values(device, kind, n_out, n_in, n_rows, dtype, tmp_path) -> None:
    """From one row to many, each in its kernel, in shapes that fill no block; 544 inputs are shared by splits."""
    dtype = getattr(torch, dtype)
    values = weights(n_out, n_in)
    x = torch.randn(n_rows, n_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(n_out).to(dtype) if n_out == 37 else None
    expected = x.double() @ real_values(kind, values).t() + (0 if bias is None else bias.double())
    given = None if bias is None else bias.to(device)
    found = quantized.multiply(x.to(device)[None], packed(kind, values, tmp_path).to(device), given)
    assert found.dtype == dtype and found.shape == (1, n_rows, n_out)
    torch.testing.assert_close(found[0].cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])


@everywhere
@pytest.mark.parametrize("n_rows", [1, 5])
def test_int8_rows_may_have_any_number_of_inputs(device, n_rows, tmp_path) -> None:
    values, x = weights(9, 77), torch.randn(n_rows, 77)
    matrix = packed("int8", values, tmp_path).to(device)
    expected = x.double() @ real_values("int8", values).t()
    torch.testing.assert_close(quantized.multiply(x.to(device), matrix).cpu().double(), expected, rtol=0, atol=1e-4)


@everywhere
def test_inputs_may_be_columns_of_a_wider_tensor(device, tmp_path) -> None:
    values, wide = weights(20, 64), torch.randn(6, 200)
    x = wide[:, 100:164]
    matrix = packed("Q4_0", values, tmp_path).to(device)
    expected = x.double() @ real_values("Q4_0", values).t()
    torch.testing.assert_close(quantized.multiply(x.to(device), matrix).cpu().double(), expected, rtol=0, atol=1e-4)
    turned = wide[:, 100:164].t().contiguous().t()
    torch.testing.assert_close(
        quantized.multiply(turned.to(device), matrix).cpu().double(), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["int8", "Q8_0", "Q4_0"])
def test_packed_values_are_those_of_the_same_option_on_cpu(kind, tmp_path) -> None:
    values = weights(37, 96)
    matrix = packed(kind, values, tmp_path)
    assert torch.equal(matrix.values().double(), real_values(kind, values))
    some = torch.tensor([3, 36, 3])
    assert torch.equal(matrix.pick(some).double(), real_values(kind, values)[some])
    bytes_of_32 = {"int8": 32, "Q8_0": 34, "Q4_0": 18}[kind]
    assert matrix.n_bytes == 37 * 3 * bytes_of_32 + (37 * 2 if kind == "int8" else 0)


@pytest.fixture(params=["tied", "untied_with_biases"])
def folder(request, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    more = {"tied": {}, "untied_with_biases": {"tie_word_embeddings": False, "no_bias": False}}[request.param]
    config = mpt.MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=512, **more)
    model = MPTForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    return mpt.save(model.bfloat16(), tmp_path / "model")


def answers(backend: Backend, prompts: list[list[int]], n: int) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens after each prompt, the rows in one step, and the logits (steps, rows, V) they were chosen by."""
    backend.allocate(8192 * backend.bytes_per_token)
    rows = [backend.reserve(None, len(prompt) + n) for prompt in prompts]
    read, logits, tokens = prompts, [], [[] for _ in prompts]
    for _ in range(n):
        logits.append(backend.forward([Work(row, new, 1) for row, new in zip(rows, read, strict=True)]).float().cpu())
        for row, new in zip(rows, read, strict=True):
            row.length += len(new)
        read = [[int(token)] for token in logits[-1].argmax(-1)]
        for said, new in zip(tokens, read, strict=True):
            said += new
    return tokens, torch.stack(logits)


PROMPTS = [[5, 17, 80, 3, 44] * 15, [9, 2, 61], [33] * 20]


@pytest.mark.parametrize("where", [on_cpu, interpreted, on_cuda])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_answers_as_the_same_option_does_on_cpu(folder, where, quantization) -> None:
    """Beside the CPU's own layers, which multiply the same numbers in another order."""
    expected_of = mpt.load(folder, dtype=torch.bfloat16, pack=four_bits if quantization == "int4" else None)
    if quantization == "int8":
        quantize_model(expected_of)
        for module in list(expected_of.modules()):  # its own kernel is for bfloat16: the real values are computed with
            for name, child in list(module.named_children()):
                if hasattr(child, "scale") and isinstance(child, nn.Linear):
                    wide = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                    wide.weight = nn.Parameter(child.weight.float() * child.scale.float()[:, None])
                    wide.bias = child.bias
                    setattr(module, name, wide)
    n = 3 if where == ("cpu", True) else 12  # a step takes the interpreter seconds
    expected, by = answers(TorchBackend(expected_of.float()), PROMPTS, n)
    assert len({tuple(said) for said in expected}) > 1, "all answers alike say nothing"
    model = quantized.load(folder, quantization, torch.float32, where[0])
    found, logits = answers(PagedBackend(model, triton=where[1]), PROMPTS, n)
    assert found == expected
    assert not (logits - by).abs().max() > 2e-3


def test_a_model_takes_the_memory_of_what_is_packed(folder) -> None:
    """12 C^2 weights a layer. int8: a byte each and a scale of two a row; the head, too. int4: 18 bytes for 32."""
    model = quantized.load(folder, "int8", torch.bfloat16, "cpu")
    rows = 2 * (3 * 64 + 64 + 4 * 64 + 64) + 96
    assert packed_bytes(model) == 2 * 12 * 64 * 64 + 96 * 64 + 2 * rows
    wide = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert wide == {"transformer.wte.weight"}
    model = quantized.load(folder, "int4", torch.bfloat16, "cpu")
    n_heads = 1 if model.config.tie_word_embeddings else 2
    assert packed_bytes(model) == 2 * 12 * 64 * 64 // 32 * 18 + n_heads * 96 * 64 // 32 * 34
    assert not [name for name, p in model.named_parameters() if p.dim() > 1]


def test_rows_that_do_not_fill_groups_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"rows of 77.*multiples of 32"):
        packed("Q4_0", weights(9, 77), tmp_path)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mpt.backends import quantized_kernels as kernels

def build(kernel, dtype, n_stages=3, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "codes":
            signature[name] = "*i32" if constants["BITS"] == 4 else "*i8"
        elif name == "scales":
            signature[name] = "*fp16" if constants["HAS_GROUPS"] else "*bf16"
        elif name in ("x", "bias", "out"):
            signature[name] = "*" + dtype
        else:
            signature[name] = "*fp32" if name == "part" else "i32"
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    whole = {n for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name in ("n_in", "x_row")}
    attributes = {(n,): [["tt.divisibility", 16]] for n in whole}  # as a launch finds it
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": 4, "num_stages": n_stages}
    return compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)

for dtype, bits, has_groups in [("bf16", 4, True), ("bf16", 8, True), ("fp16", 8, False)]:
    layout = {"BITS": bits, "HAS_GROUPS": has_groups}
    alone = build(kernels.one_row, dtype, **layout, HAS_BIAS=True, BLOCK_N=8, BLOCK_C=128)
    loads = [line for line in alone.asm["ptx"].splitlines() if "ld.global" in line]
    assert any(".v4.b32" in line for line in loads), loads  # 16 bytes of codes at once
    for block_m in (16, 64):
        several = build(
            kernels.few_rows, dtype, 4, **layout, HAS_BIAS=True, BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=128
        )
        assert several.metadata.shared < 99 * 1024, several.metadata.shared
        assert "mma" in several.asm["ptx"]
    build(kernels.unpack, dtype, **layout, BLOCK_K=1024)
build(kernels.add_up, "bf16", HAS_BIAS=True, BLOCK=1024)
print("compiled")
"""


@pytest.mark.skipif(not has_triton(), reason="needs `pip install triton`")
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu(capability) -> None:
    compile_for(capability, COMPILE)
