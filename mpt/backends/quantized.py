"""`--quantize` on a GPU: weights in int8 or 4 bits, multiplied by our Triton kernels as they lie in memory.

The numbers are those of the same option on CPU. int8: rows with one scale each (`quantization.py`). int4: ggml's Q4_0,
groups of 32 weights with a scale in half precision, and its Q8_0 for embedding and head (`mpt/packed/rounding.py`).
Only their order differs: what a thread reads at once lies together. Activations keep the model's dtype.

One row of inputs is read beside the packed weights in float32, a few rows on tensor cores. For many the weights are
unpacked, one matrix at a time, and torch multiplies: a prompt computes more than it reads. Not here: the kernels
(`quantized_kernels.py`), products in plain torch, which `PackedLinear` has.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mpt import checkpoint
from mpt.backends.quantization import quantize
from mpt.command_line import Quantization
from mpt.model import MPTLanguageModel
from mpt.packed import rounding
from mpt.packed.layers import Pack, PackedLinear
from mpt.packed.matrix import PackedMatrix, Rows, Weight

_INT4, _INT8, _INT8_ROWS = "int4 groups", "int8 groups", "int8 rows"
_KINDS = (_INT4, _INT8, _INT8_ROWS)
_GROUP = 32  # weights with a scale of their own
FEW_ROWS = 64  # that are multiplied without unpacking the weights
_LEAST_ROWS = 16  # that a tensor core takes
_BLOCK_N, _BLOCK_K = 32, 128  # outputs and inputs that a program takes at once for a few rows
_PROGRAMS, _MOST_SPLITS = 512, 8  # four programs for each multiprocessor of a large GPU
_MAGIC = 0x4B000000  # 2^23 as float32; an argument, since one instruction takes one constant: it masks and adds at once


class QuantizedLinear(PackedLinear):
    """A projection whose packed weight (n_out, n_in) our kernels multiply with, for inference on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.matrix, self.bias)


def load(folder: Path, quantization: Quantization, dtype: torch.dtype, device: str) -> MPTLanguageModel:
    """A checkpoint with its weights rounded while they are read, so that the device never holds them wide.

    Raises what `mpt.checkpoint.load` raises, and UserError for rows that do not fill groups.
    """
    if quantization == "int4":
        return checkpoint.load_for_engine(folder, dtype=dtype, device=device, pack=four_bits)
    model = checkpoint.load_for_engine(folder, dtype=dtype, device=device, pack=eight_bits(dtype))
    if not isinstance(model.lm_head, PackedLinear):  # tied to the embedding, whose rows stay as they are
        matrix = _int8_rows(model.lm_head.weight.detach().cpu()).to(device)
        model.lm_head = PackedLinear(model.lm_head, matrix)
    return model


def four_bits(module: str, weight: Weight) -> PackedMatrix | None:
    """As `rounding.four_bits`, in our order."""
    matrix = rounding.four_bits(module, weight)
    if matrix is None:
        return None
    blocks = matrix.parts[0].view(matrix.shape[0], -1, 18 if matrix.kind == "Q4_0" else 34)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]  # (n_out, groups)
    if matrix.kind == "Q8_0":
        codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
        return replace(matrix, kind=_INT8, parts=(codes, scales), formula=_eight_bit_values)
    of_weight = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)  # (n_out, groups, 32)
    low, high = of_weight.unflatten(-1, (4, 2, 4)).unbind(-2)  # of each byte; (n_out, groups, byte, word)
    words = (low | high << 4).transpose(-1, -2).contiguous().flatten(1).view(torch.int32)
    return replace(matrix, kind=_INT4, parts=(words, scales), formula=_four_bit_values)


def eight_bits(dtype: torch.dtype) -> Pack:
    """Makes int8 rows of a projection's or an untied head's weight, which a model would hold in dtype."""

    def pack(module: str, weight: Weight) -> PackedMatrix | None:
        if len(weight.shape) != 2 or module.endswith(("wte", "wpe")):
            return None
        return _int8_rows(weight.read().to(dtype))

    return pack


def _int8_rows(weight: Tensor) -> PackedMatrix:
    codes, scale = quantize(weight)
    return PackedMatrix(_INT8_ROWS, (codes, scale), (len(codes), codes.shape[1]), torch.float32, 1, _eight_bit_values)


def _eight_bit_values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
    codes, scales = parts[0][rows].float(), parts[1][rows].float()
    if scales.dim() == 1:
        return codes * scales[:, None]
    return (codes.unflatten(1, (-1, _GROUP)) * scales[..., None]).flatten(1)


def _four_bit_values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
    words, scales = parts[0][rows], parts[1][rows].float()
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    levels = (words.unflatten(1, (-1, 1, 4)) >> shifts[:, None] & 15) - 8  # (rows, groups, 8, 4)
    return (levels.flatten(2) * scales[..., None]).flatten(1)


def use_kernels(model: MPTLanguageModel) -> None:
    """Let our kernels multiply with the packed weights of a model, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) and module.matrix.kind in _KINDS:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, QuantizedLinear(module, module.matrix))


def compile_kernels(model: MPTLanguageModel) -> None:
    """Run every kernel that a model's products can need once, so that none has to wait for a compiler later."""
    dtype = model.transformer.norm_f.weight.dtype
    unlike: dict[object, QuantizedLinear] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            whole = [n % 16 == 0 for n in module.matrix.shape]  # which Triton compiles other code for
            unlike[module.matrix.kind, module.bias is None, _splits(module.matrix) == 1, *whole] = module
    for layer in unlike.values():
        for n in (1, _LEAST_ROWS, 2 * _LEAST_ROWS, FEW_ROWS, FEW_ROWS + 1):
            layer(torch.zeros(n, layer.in_features, dtype=dtype, device=layer.matrix.parts[0].device))


def multiply(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by our kernels, (..., n_in) to (..., n_out) in x's dtype. matrix: of `load`, on x's device."""
    from mpt.backends import quantized_kernels

    (n_out, n_in), (codes, scales) = matrix.shape, matrix.parts
    rows = x.reshape(-1, n_in)
    if len(rows) > FEW_ROWS:
        return F.linear(x, unpacked(matrix, x.dtype), bias)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
    given = rows, codes, scales, scales if bias is None else bias, out
    bits, has_groups = _layout(matrix)
    if len(rows) == 1:
        quantized_kernels.one_row[(-(-n_out // 8),)](
            *given, n_out, n_in, _MAGIC, BITS=bits, HAS_GROUPS=has_groups, HAS_BIAS=bias is not None,
            BLOCK_N=8, BLOCK_C=128, num_warps=4,
        )  # fmt: skip
        return out
    n_splits = _splits(matrix)
    sums = out if n_splits == 1 else torch.empty(n_splits, *out.shape, dtype=torch.float32, device=out.device)
    quantized_kernels.few_rows[(-(-n_out // _BLOCK_N), n_splits)](
        *given[:-1], sums, len(rows), n_out, n_in, rows.stride(0),
        BITS=bits, HAS_GROUPS=has_groups, HAS_BIAS=bias is not None and n_splits == 1,
        BLOCK_M=max(_LEAST_ROWS, 1 << (len(rows) - 1).bit_length()), BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=4,
        num_stages=4,
    )  # fmt: skip
    if n_splits > 1:
        quantized_kernels.add_up[(-(-out.numel() // 1024),)](
            sums, given[3], out, n_splits, out.numel(), n_out, HAS_BIAS=bias is not None, BLOCK=1024, num_warps=4
        )
    return out


def _splits(matrix: PackedMatrix) -> int:
    """Programs that share the inputs of an output, so that a narrow matrix has enough of them for a large GPU."""
    n_out, n_in = matrix.shape
    n = 1
    while n < _MOST_SPLITS and n * -(-n_out // _BLOCK_N) < _PROGRAMS and 4 * n * _BLOCK_K <= n_in:
        n *= 2
    return n


def unpacked(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The real values (n_out, n_in) by our kernel, computed in float32 and rounded once."""
    from mpt.backends import quantized_kernels

    (n_out, n_in), (codes, scales) = matrix.shape, matrix.parts
    out = torch.empty(n_out, n_in, dtype=dtype, device=codes.device)
    bits, has_groups = _layout(matrix)
    quantized_kernels.unpack[(n_out, -(-n_in // 1024))](
        codes, scales, out, n_in, BITS=bits, HAS_GROUPS=has_groups, BLOCK_K=1024, num_warps=4
    )
    return out


def _layout(matrix: PackedMatrix) -> tuple[int, bool]:
    """Bits of a weight, and whether groups have scales of their own."""
    return 4 if matrix.kind == _INT4 else 8, matrix.kind != _INT8_ROWS
