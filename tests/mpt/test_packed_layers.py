"""Layers whose weights stay packed compute, and hand gradients on, as layers with the real values do.

Real values come from the `gguf` package for GGML's blocks, and from `tests/packers.py` for the others.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import mpt
from mpt.checkpoint import safetensors_entries
from mpt.config import MPTConfig
from mpt.errors import DamagedFile, UserError
from mpt.gguf.ggml_types import BLOCK_TYPES
from mpt.gguf.model import block_matrix
from mpt.packed import matrix as packed_matrix
from mpt.packed.folder import unpacked
from mpt.packed.layers import PackedEmbedding, PackedLinear, as_it_lies, packed_bytes
from mpt.packed.matrix import PackedMatrix, PackedTensor
from mpt.packed.packing import Packing
from mpt.stored import StoredTensor
from mpt.transformers_model import MPTForCausalLM
from tests import packers

N_OUT, N_IN = 96, 512
NAME = "transformer.blocks.0.ffn.up_proj.weight"


def of_gguf(kind: str, folder: Path) -> tuple[PackedTensor, Tensor]:
    """Random blocks, those with a scale that is NaN or infinite in float16 left out."""
    block = BLOCK_TYPES[kind]
    data = np.random.default_rng(1).integers(0, 256, (N_OUT, N_IN // block.n_values, block.n_bytes), dtype=np.uint8)
    scales_at = {"Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)}
    for at in scales_at.get(kind, (1, 3) if kind in ("Q4_1", "Q5_1") else (1,)):
        data[:, :, at] &= 0x2F  # a small exponent, a positive sign
    (folder / "blocks").write_bytes(b"x" * 32 + data.tobytes())
    stored = StoredTensor(folder / "blocks", 32, torch.uint8, (N_OUT, data[0].size))
    real = gguf.quants.dequantize(data.reshape(N_OUT, -1), gguf.GGMLQuantizationType[kind])
    return block_matrix(stored, kind, (N_OUT, N_IN)), torch.from_numpy(real.astype(np.float64))


def of_folder(parts: packers.Parts, real: Tensor, packing: Packing, folder: Path) -> tuple[PackedTensor, Tensor]:
    base = NAME.removesuffix("weight")
    save_file({f"{base}{name}": part.contiguous().clone() for name, part in parts.items()}, folder / "parts")
    found = unpacked(dict(safetensors_entries(folder / "parts")), packing, True)[NAME]
    assert isinstance(found, PackedTensor)
    return found, real.double()


def of_gptq(bits: int) -> Callable[[Path], tuple[PackedTensor, Tensor]]:
    def made(folder: Path) -> tuple[PackedTensor, Tensor]:
        groups = np.random.default_rng(2).permutation([i // 128 for i in range(N_IN)]).tolist()
        codes, zeros, scales = packers.random_codes(N_IN, N_OUT, bits, 4)
        parts = packers.gptq(codes, zeros, scales, groups, bits, minus_one=False)
        real = packers.real_values(codes, zeros, scales, groups).half()  # as it rounds them
        return of_folder(parts, real, Packing("gptq", "gptq_v2", bits, 128, ""), folder)

    return made


def of_awq(layout: str) -> Callable[[Path], tuple[PackedTensor, Tensor]]:
    def made(folder: Path) -> tuple[PackedTensor, Tensor]:
        codes, zeros, scales = packers.random_codes(N_IN, N_OUT, 4, N_IN // 64)
        is_gemm = layout == "gemm"
        parts = packers.awq_gemm(codes, zeros, scales) if is_gemm else packers.awq_gemv(codes, zeros, scales, 2)
        real = packers.real_values(codes, zeros, scales, [i // 64 for i in range(N_IN)]).half()
        return of_folder(parts, real, Packing("awq", layout, 4, 64, ""), folder)

    return made


def of_four_bits(folder: Path, shape: tuple[int, int] = (N_OUT, N_IN)) -> tuple[PackedTensor, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    parts, real = packers.four_bits(weight, "nf4", 64, nested=True)
    return of_folder(parts, real, Packing("bitsandbytes", "bitsandbytes", 4, 0, ""), folder)


def of_eight_bits(folder: Path) -> tuple[PackedTensor, Tensor]:
    parts, real = packers.eight_bits(torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(0)))
    return of_folder(parts, real, Packing("bitsandbytes", "bitsandbytes", 8, 0, ""), folder)


MAKERS: dict[str, Callable[[Path], tuple[PackedTensor, Tensor]]] = {
    **{kind: lambda folder, kind=kind: of_gguf(kind, folder) for kind in BLOCK_TYPES},  # type: ignore[misc]
    **{f"gptq {bits}": of_gptq(bits) for bits in (2, 3, 4, 8)},
    **{f"awq {layout}": of_awq(layout) for layout in ("gemm", "gemv")},
    "nf4": of_four_bits,
    "int8": of_eight_bits,
}


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("kind", MAKERS)
def test_products_and_gradients_are_those_of_the_real_values(
    kind: str, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows come in several pieces, the last one short."""
    monkeypatch.setattr(packed_matrix, "_PIECE", 40 * N_IN)
    tensor, real = MAKERS[kind](tmp_path)
    matrix = tensor.open(mapped=mapped)
    assert torch.equal(matrix.values().double(), real) and torch.equal(tensor.read().double(), real)
    assert matrix.n_bytes < real.numel() * 1.2 and len(list(matrix.pieces())) > 1
    plain = nn.Linear(N_IN, N_OUT)
    layer = PackedLinear(plain, matrix)
    assert layer.bias is plain.bias and tuple(layer.weight.shape) == (N_OUT, N_IN)
    for n_rows in (1, 3, 50):
        x = torch.randn(2, n_rows, N_IN, dtype=torch.float64, requires_grad=True)
        expected = F.linear(x, real, plain.bias.double())
        direction = torch.randn(expected.shape, dtype=torch.float64)
        (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
        narrow = x.detach().float().requires_grad_()
        found = layer(narrow)
        (gradient,) = torch.autograd.grad((found * direction.float()).sum(), narrow)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_pieces_begin_where_a_block_of_values_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 129 values, blocks of 64: every 64 rows a block begins with a row."""
    monkeypatch.setattr(packed_matrix, "_PIECE", 1)
    tensor, real = of_four_bits(tmp_path, (133, 129))
    matrix = tensor.open(mapped=True)
    assert [rows.start for rows, _ in matrix.pieces()] == [0, 64, 128]
    assert torch.equal(matrix.values().double(), real)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_an_embedding_unpacks_the_rows_it_is_asked_for(kind: str, tmp_path: Path) -> None:
    tensor, real = MAKERS[kind](tmp_path)
    layer = PackedEmbedding(tensor.open(mapped=True), torch.float32)
    ids = torch.tensor([[5, 0, 95], [5, 17, 1]])
    assert torch.equal(layer(ids).double(), real[ids])
    found = nn.Sequential(layer).to(torch.bfloat16)(ids)
    assert torch.equal(found, real[ids].to(torch.bfloat16))


def test_a_bfloat16_layer_takes_the_real_values_rounded(tmp_path: Path) -> None:
    tensor, real = MAKERS["Q8_0"](tmp_path)
    layer = PackedLinear(nn.Linear(N_IN, N_OUT, bias=False), tensor.open(mapped=True))
    x = torch.randn(3, N_IN, dtype=torch.bfloat16)
    expected = x.double() @ real.bfloat16().double().T
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()) / 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()).bfloat16(), found)


def test_a_file_that_ends_early_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    tensor, _ = MAKERS["Q4_0"](tmp_path)
    (tmp_path / "blocks").write_bytes((tmp_path / "blocks").read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="`blocks` ends early"):
        tensor.open(mapped=True)


def test_what_no_mapping_can_hold_is_read(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"x" + np.arange(6, dtype="<i4").tobytes())
    stored = StoredTensor(tmp_path / "odd", 1, torch.int32, (2, 3))
    assert stored.map() is None
    matrix = PackedTensor(
        tmp_path / "odd", torch.float32, (2, 3), 24, "", "", (stored,), 1, lambda parts, rows: parts[0][rows].float()
    ).open(mapped=True)
    assert isinstance(matrix, PackedMatrix) and matrix.values().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_model_keeps_its_packed_matrices_and_cannot_be_saved(tmp_path: Path) -> None:
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=64)
    source = mpt.save(MPTForCausalLM(config), tmp_path / "model")
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    packers.write_packed(source, tmp_path / "packed", quantization, packers.awq_weight)
    model = mpt.load(tmp_path / "packed", pack=as_it_lies)
    assert not [name for name, p in model.named_parameters() if ".blocks." in name and p.dim() == 2]
    # Each of 12 C^2 weights a layer: half a byte; each group of 32: half a byte of zero and two of scale.
    assert packed_bytes(model) == 2 * 12 * 64 * 64 * (32 // 2 + 2.5) / 32
    with pytest.raises(UserError, match="packed, so it cannot be saved"):
        mpt.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_mapped_once_and_as_long_as_one_of_its_tensors_is_there(tmp_path: Path) -> None:
    """/proc tells; an unloaded model must let go of its files."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(64)))
    halves = [StoredTensor(path, offset, torch.uint8, (32,)).map() for offset in (0, 32)]
    maps = Path("/proc/self/maps")
    assert maps.read_text().count(str(path)) == 1
    last = halves.pop()
    halves.clear()
    assert last is not None and last.tolist() == list(range(32, 64)) and str(path) in maps.read_text()
    del last
    assert str(path) not in maps.read_text()
