"""Makes ggml's blocks in memory while a model is loaded, of weights in bfloat16 and of those that others packed.

For `--quantize int4` matrices become Q4_0, 32 weights with a scale in half precision, to the nearest of 16 levels;
embedding and head become Q8_0, since they also make the logits. Bit-equal to what the `gguf` package makes of the same
float32 values. Source: ggml, `quantize_row_q4_0_ref` and `quantize_row_q8_0_ref`.
"""

import torch
from torch import Tensor

from mpt.errors import UserError
from mpt.gguf.model import block_matrix
from mpt.packed.layers import as_it_lies
from mpt.packed.matrix import PackedMatrix, PackedTensor, Weight
from mpt.stored import StoredTensor

KINDS = ("Q4_0", "Q8_0")
_IN_EIGHT_BITS = ("transformer.wte", "lm_head")
_ROWS = 256  # that are rounded at a time


def four_bits(module: str, weight: Weight) -> PackedMatrix | None:
    """A projection's or the embedding's weight in blocks; None for what stays as it is, such as norms.

    Raises UserError for rows that do not fill blocks.
    """
    if len(weight.shape) != 2 or module.endswith("wpe"):
        return None
    n_out, n_in = weight.shape
    check_rows(module, n_in)
    kind = "Q8_0" if module in _IN_EIGHT_BITS else "Q4_0"
    values = weight.read()
    data = torch.empty(n_out, n_in // 32 * (34 if kind == "Q8_0" else 18), dtype=torch.uint8)
    for start in range(0, n_out, _ROWS):
        rows = slice(start, start + _ROWS)
        data[rows] = rounded(values[rows], kind)
    return _matrix(data, kind, weight)


def check_rows(module: str, n_in: int) -> None:
    """Raise UserError for a matrix whose rows do not fill blocks."""
    if n_in % 32:
        raise UserError(
            f"`{module}` has rows of {n_in}, and `--quantize int4` takes multiples of 32; take `--quantize int8`, or "
            "leave it out"
        )


def in_blocks(module: str, weight: Weight) -> PackedMatrix | None:
    """A packed weight as C multiplies with it: as it lies, or AWQ's and GPTQ's 4 bits as Q4_1.

    weight = scale code - scale zero; Q4_1 rounds the second product to half precision, an error like that of the tools'
    own real values, which they round to it.
    """
    if not isinstance(weight, PackedTensor) or weight.codes is None:
        return as_it_lies(module, weight)
    parts = weight.open(mapped=True).parts
    n_out, n_in = weight.shape
    data = torch.empty(n_out, n_in // 32 * 20, dtype=torch.uint8)
    for start in range(0, n_out, _ROWS):
        rows = slice(start, min(start + _ROWS, n_out))
        codes, zeros, scales = weight.codes(parts, rows)
        of_block = torch.arange(n_in // 32) * 32 // weight.group_size
        scale, zero = scales[of_block].t().float(), zeros[of_block].t()  # (rows, blocks)
        least = (-scale * zero).half()
        low, high = codes.t().reshape(len(scale), -1, 2, 16).unbind(2)
        halves = torch.stack([scale.half(), least], dim=-1).view(torch.uint8)  # (rows, blocks, 4)
        data[rows] = torch.cat([halves, low | high << 4], dim=-1).flatten(1)
    return _matrix(data, "Q4_1", weight)


def _matrix(data: Tensor, kind: str, weight: Weight) -> PackedMatrix:
    n_out, n_in = weight.shape
    described = block_matrix(StoredTensor(weight.file, 0, torch.uint8, tuple(data.shape)), kind, (n_out, n_in))
    return PackedMatrix(kind, (data,), (n_out, n_in), torch.float32, 1, described.formula)


def rounded(values: Tensor, kind: str) -> Tensor:
    """Rows (n, K) as bytes of blocks, (n, K / 32 times a block's bytes)."""
    blocks = values.float().reshape(-1, 32)
    if kind == "Q8_0":
        scale = blocks.abs().amax(1, keepdim=True) / 127
        codes = _to_nearest(blocks * _inverse(scale)).to(torch.int8).view(torch.uint8)
    else:
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # with its sign: it becomes the lowest level
        scale = largest / -8
        levels = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        codes = levels[:, :16] | levels[:, 16:] << 4
    halves = scale.half().view(torch.uint8)  # (n, 2)
    return torch.cat([halves, codes], dim=1).reshape(len(values), -1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _to_nearest(x: Tensor) -> Tensor:
    """Halves away from zero, as C's roundf."""
    return (x.abs() + 0.5).floor() * x.sign()
