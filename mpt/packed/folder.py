"""Which tensors of a folder make up its packed matrices: AWQ's, GPTQ's and bitsandbytes' names and shapes.

Not here: which files a folder has (`mpt/checkpoint.py`), what it says of its packing (`packing.py`), the formulas
(`formulas.py`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpt.errors import DamagedFile, UnsupportedConfig
from mpt.packed import formulas
from mpt.packed.matrix import Formula, PackedTensor, Rows, Weight
from mpt.packed.packing import Packing
from mpt.stored import StoredTensor

_STATE_LIMIT = 65_536  # bytes of a bitsandbytes quant_state, which has about 200
_STATE = ".quant_state.bitsandbytes__"
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_map", ".nested_", _STATE)
_ACT_SCALES = ".ffn.act.scales"  # AutoAWQ's ScaledActivation: down_proj gets gelu(x) / scales


def unpacked(found: Mapping[str, StoredTensor], packing: Packing | None, no_bias: bool) -> dict[str, Weight]:
    """Stored tensors with every packed matrix as one `...weight`. Raises DamagedFile naming a tensor that does not fit.

    no_bias: of the config. Nothing large is read now: GPTQ's biases and order of inputs, and what bitsandbytes' 4-bit
    tensors say of themselves.
    """
    left = dict(found)
    if packing is None:
        return _as_they_are(left)
    if packing.method == "bitsandbytes":
        weights = _bitsandbytes(left)
    else:
        unpack = _awq if packing.method == "awq" else _gptq
        weights = {
            f"{base}.weight": unpack(base, left, packing)
            for base in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
        }
    if packing.method == "awq":
        _fold_act_scales(left, weights)
    if packing.method == "gptq" and no_bias:
        _drop_zero_biases(left, weights)
    for name, tensor in left.items():
        if any(part in name for part in _PARTS):
            raise DamagedFile(f"`{name}` in `{tensor.file.name}` belongs to no packed weight beside it; copy it again")
    twice = sorted(weights.keys() & left.keys())
    if twice:
        raise DamagedFile(f"`{twice[0]}` is stored packed and also as it is; keep one of them")
    return {**left, **weights}


def unpacking_in_words(weights: Mapping[str, Weight], tool: str | None) -> str | None:
    """One sentence on what is packed, by which tool, and its memory before and after; None where nothing is."""
    packed = [tensor for tensor in weights.values() if isinstance(tensor, PackedTensor) and tensor.packed_bytes]
    if not packed:
        return None
    kinds, by = "; ".join(sorted({tensor.packing for tensor in packed})), f" ({tool})" if tool else ""
    dtypes = [tensor.dtype for tensor in packed]
    dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    n_values = sum(torch.Size(tensor.shape).numel() for tensor in packed)
    return (
        f"{len(packed)} matrices are packed as {kinds}{by}; unpacked to {dtype} they take "
        f"{n_values * getattr(torch, dtype).itemsize / 1e9:.3f} GB instead of "
        f"{sum(tensor.packed_bytes for tensor in packed) / 1e9:.3f} GB"
    )


def _as_they_are(found: dict[str, StoredTensor]) -> dict[str, Weight]:
    for name, tensor in found.items():
        if name.endswith((".qweight", ".SCB")) or _STATE in name:
            raise UnsupportedConfig(
                f"`{name}` in `{tensor.file.name}` is packed, but nothing says how: config.json has no "
                "`quantization_config`, and there is no quantize_config.json; add the one its maker gives"
            )
    return {**found}


def _take(left: dict[str, StoredTensor], name: str, beside: str) -> StoredTensor:
    if name not in left:
        raise DamagedFile(f"`{name}` is missing, which `{beside}` needs; copy the checkpoint again")
    return left.pop(name)


def _check(name: str, tensor: StoredTensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """dtype: None for any floating one."""
    if tensor.shape != shape:
        raise DamagedFile(
            f"`{name}` in `{tensor.file.name}` is {list(tensor.shape)}, the tensors beside it and the config's bits "
            f"and group_size make it {list(shape)}"
        )
    if tensor.dtype != dtype and not (dtype is None and tensor.dtype.is_floating_point):
        expected = "of a floating type" if dtype is None else f"{dtype}"
        raise DamagedFile(f"`{name}` in `{tensor.file.name}` is {tensor.dtype}, it must be {expected}")


def _matrix_of_words(name: str, tensor: StoredTensor, layout: str) -> tuple[int, int]:
    if tensor.dtype != torch.int32 or len(tensor.shape) != 2 or not tensor.n_bytes:
        what = f"{list(tensor.shape)} of {tensor.dtype}"
        raise DamagedFile(f"`{name}` in `{tensor.file.name}` is {what}; {layout} has a matrix of int32")
    return tensor.shape[0], tensor.shape[1]


def _in_words(packing: Packing, act_order: bool = False) -> str:
    size = "rows of all inputs" if packing.group_size == -1 else f"groups of {packing.group_size} inputs"
    order = ", in act-order" if act_order else ""
    return f"{packing.method.upper()} {packing.layout}, {packing.bits} bits in {size}{order}"


def _awq(base: str, left: dict[str, StoredTensor], packing: Packing) -> PackedTensor:
    name = f"{base}.qweight"
    qweight = left.pop(name)
    qzeros, scales = _take(left, f"{base}.qzeros", name), _take(left, f"{base}.scales", name)
    rows, columns = _matrix_of_words(name, qweight, "AWQ")
    n_inputs, n_outputs = (rows, columns * 8) if packing.layout == "gemm" else (columns * 8, rows)
    group_size = n_inputs if packing.group_size == -1 else packing.group_size
    n_groups = packing.groups_of(n_inputs)
    if packing.layout == "gemm":
        _check(f"{base}.scales", scales, None, (n_groups, n_outputs))
        _check(f"{base}.qzeros", qzeros, torch.int32, (n_groups, columns))
        step, formula = 8, _rows_of_awq_gemm(group_size)
    else:
        multiple = {64: 2, 32: 4}.get(group_size, 1)  # of words a row of zeros is padded to, for its kernel
        width = -(-n_groups // (8 * multiple)) * multiple
        _check(f"{base}.scales", scales, None, (n_outputs, width * 8))
        _check(f"{base}.qzeros", qzeros, torch.int32, (n_outputs, width))
        step, formula = 1, _rows_of_awq_gemv(group_size)
    return PackedTensor(
        file=qweight.file,
        dtype=scales.dtype,
        shape=(n_outputs, n_inputs),
        packed_bytes=qweight.n_bytes + qzeros.n_bytes + scales.n_bytes,
        kind="AWQ 4-bit",
        packing=_in_words(packing),
        parts=(qweight, qzeros, scales),
        step=step,
        formula=formula,
        codes=None if group_size % 32 else _codes_of_awq_gemm if packing.layout == "gemm" else _codes_of_awq_gemv,
        group_size=group_size,
    )


def _codes_of_awq_gemm(parts: tuple[Tensor, ...], rows: Rows) -> formulas.Codes:
    words = _scaled(rows, 1, 8)
    return formulas.awq_gemm_codes(parts[0][:, words], parts[1][:, words], parts[2][:, rows])


def _codes_of_awq_gemv(parts: tuple[Tensor, ...], rows: Rows) -> formulas.Codes:
    return formulas.awq_gemv_codes(parts[0][rows], parts[1][rows], parts[2][rows])


def _rows_of_awq_gemm(group_size: int) -> Formula:
    def values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
        words = _scaled(rows, 1, 8)
        return formulas.awq_gemm(parts[0][:, words], parts[1][:, words], parts[2][:, rows], group_size)

    return values


def _rows_of_awq_gemv(group_size: int) -> Formula:
    return lambda parts, rows: formulas.awq_gemv(parts[0][rows], parts[1][rows], parts[2][rows], group_size)


def _scaled(rows: Rows, factor: int, divisor: int) -> slice:
    """Where rows lie that share words: `factor` words hold `divisor` rows."""
    assert isinstance(rows, slice), rows
    return slice(rows.start * factor // divisor, rows.stop * factor // divisor)


def _gptq(base: str, left: dict[str, StoredTensor], packing: Packing) -> PackedTensor:
    name, bits = f"{base}.qweight", packing.bits
    qweight = left.pop(name)
    qzeros, scales = _take(left, f"{base}.qzeros", name), _take(left, f"{base}.scales", name)
    g_idx = left.pop(f"{base}.g_idx", None)  # files from before act-order have none
    rows, n_outputs = _matrix_of_words(name, qweight, "GPTQ")
    if rows * 32 % bits or n_outputs * bits % 32:
        raise DamagedFile(f"`{name}` in `{qweight.file.name}` is {list(qweight.shape)}, no whole codes of {bits} bits")
    n_inputs = rows * 32 // bits
    n_groups = packing.groups_of(n_inputs)
    _check(f"{base}.scales", scales, None, (n_groups, n_outputs))
    _check(f"{base}.qzeros", qzeros, torch.int32, (n_groups, n_outputs * bits // 32))
    group_size = n_inputs if packing.group_size == -1 else packing.group_size
    in_order = torch.arange(n_inputs) // group_size
    if g_idx is not None:
        _check(f"{base}.g_idx", g_idx, torch.int64 if g_idx.dtype == torch.int64 else torch.int32, (n_inputs,))
    groups = in_order if g_idx is None else g_idx.read().long()
    is_moved = not torch.equal(groups, in_order)
    if int(groups.min()) < 0 or int(groups.max()) >= n_groups:
        raise DamagedFile(f"`{base}.g_idx` beside `{name}` names a group outside 0 to {n_groups - 1}")
    return PackedTensor(
        file=qweight.file,
        dtype=scales.dtype,
        shape=(n_outputs, n_inputs),
        packed_bytes=qweight.n_bytes + qzeros.n_bytes + scales.n_bytes + (g_idx.n_bytes if g_idx else 0),
        kind=f"GPTQ {bits}-bit",
        packing=_in_words(packing, act_order=is_moved),
        parts=(qweight, qzeros, scales, groups),
        step=32,  # so many zeros fill whole words in any number of bits
        formula=_rows_of_gptq(bits, int(packing.layout == "gptq")),
        codes=None if is_moved or bits > 4 or group_size % 32 else _codes_of_gptq(bits, int(packing.layout == "gptq")),
        group_size=group_size,
    )


def _codes_of_gptq(bits: int, zero_offset: int) -> Callable[[tuple[Tensor, ...], Rows], formulas.Codes]:
    def codes(parts: tuple[Tensor, ...], rows: Rows) -> formulas.Codes:
        words = _scaled(rows, bits, 32)
        return formulas.gptq_codes(parts[0][:, rows], parts[1][:, words], parts[2][:, rows], bits, zero_offset)

    return codes


def _rows_of_gptq(bits: int, zero_offset: int) -> Formula:
    def values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
        qweight, qzeros, scales, groups = parts
        words = _scaled(rows, bits, 32)
        return formulas.gptq(qweight[:, rows], qzeros[:, words], scales[:, rows], groups, bits, zero_offset)

    return values


def _drop_zero_biases(left: dict[str, StoredTensor], weights: Mapping[str, Weight]) -> None:
    """AutoGPTQ gives every matrix that it packs a bias, zeros for a model without biases."""
    for name in [name.removesuffix("weight") + "bias" for name in weights]:
        if name in left and not bool(left[name].read().any()):
            del left[name]


def _fold_act_scales(left: dict[str, StoredTensor], weights: dict[str, Weight]) -> None:
    """Divide the inputs of down_proj by AutoAWQ's activation scales, in float32: W (a / s) = (W / s) a."""
    for name in [name for name in left if name.endswith(_ACT_SCALES)]:
        scales = left.pop(name)
        target = name.removesuffix(_ACT_SCALES) + ".ffn.down_proj.weight"
        if target not in weights:
            weights[target] = _take(left, target, name)
        weight = weights[target]
        _check(name, scales, None, weight.shape[1:])
        weights[target] = _divided(weight, _divisors(name, scales))


def _divisors(name: str, scales: StoredTensor) -> Tensor:
    found = scales.read().float()
    if not bool((found.isfinite() & (found != 0)).all()):
        raise DamagedFile(f"`{name}` in `{scales.file.name}` holds 0, NaN or infinity; get another copy")
    return found


def _divided(weight: Weight, divisors: Tensor) -> PackedTensor:
    """A matrix whose columns are divided, in float32. One that is not packed stays so, with 0 packed bytes."""
    if isinstance(weight, StoredTensor):
        return PackedTensor(
            file=weight.file,
            dtype=torch.float32,
            shape=weight.shape,
            packed_bytes=0,
            kind="",
            packing="",
            parts=(weight, divisors),
            step=1,
            formula=lambda parts, rows: parts[0][rows].float() / parts[1],
        )
    formula = weight.formula
    return replace(
        weight,
        dtype=torch.float32,
        parts=(*weight.parts, divisors),
        formula=lambda parts, rows: formula(parts[:-1], rows).float().div_(parts[-1]),
        codes=None,
    )


def _bitsandbytes(left: dict[str, StoredTensor]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    kept = [tensor.dtype for tensor in left.values() if tensor.dtype in (torch.float16, torch.bfloat16)]
    dtype = max(set(kept), key=kept.count) if kept else torch.float32  # of what int8 was computed beside
    for name in [name for name in left if name.endswith(".weight") and not left[name].dtype.is_floating_point]:
        if left[name].dtype == torch.int8:
            weights[name] = _int8(name, left, dtype)
    for name in [name for name in left if _STATE in name]:
        weight = name.partition(_STATE)[0]
        weights[weight] = _four_bits(weight, name, left)
    for name, tensor in left.items():
        if name.endswith(".weight") and not tensor.dtype.is_floating_point:
            raise DamagedFile(f"`{name}{_STATE}nf4` is missing, which `{name}` needs; copy the checkpoint again")
    return weights


def _int8(name: str, left: dict[str, StoredTensor], dtype: torch.dtype) -> PackedTensor:
    codes = left.pop(name)
    base = name.removesuffix(".weight")
    scales = _take(left, f"{base}.SCB", name)
    layout = left.pop(f"{base}.weight_format", None)
    if layout is not None and layout.n_bytes < _STATE_LIMIT and bool(layout.read().any()):
        raise UnsupportedConfig(
            f"`{base}.weight_format` says that int8 lies in a GPU's tiles; save it with bitsandbytes 0.42 or later"
        )
    if len(codes.shape) != 2:
        raise DamagedFile(f"`{name}` in `{codes.file.name}` is {list(codes.shape)} of int8; it must be a matrix")
    _check(f"{base}.SCB", scales, None, codes.shape[:1])
    return PackedTensor(
        file=codes.file,
        dtype=dtype,
        shape=codes.shape,
        packed_bytes=codes.n_bytes + scales.n_bytes,
        kind="bitsandbytes int8",
        packing="bitsandbytes int8, 8 bits, a scale for each row",
        parts=(codes, scales),
        step=1,
        formula=lambda parts, rows: formulas.bitsandbytes_int8(parts[0][rows], parts[1][rows]).to(dtype),
    )


def _four_bits(name: str, state_name: str, left: dict[str, StoredTensor]) -> PackedTensor:
    state = _read_state(state_name, left.pop(state_name))
    packed = _take(left, name, state_name)
    absmax, quant_map = _take(left, f"{name}.absmax", name), _take(left, f"{name}.quant_map", name)
    shape, block_size = tuple(state["shape"]), state["blocksize"]
    n = math.prod(shape)
    if packed.n_bytes != -(-n // 2):
        raise DamagedFile(
            f"`{name}` in `{packed.file.name}` has {packed.n_bytes} bytes; its quant_state says {list(shape)}, which "
            f"takes {-(-n // 2)}"
        )
    n_blocks = -(-n // block_size)
    _check(f"{name}.quant_map", quant_map, torch.float32, (16,))
    nested = state.get("nested_blocksize")  # None without double quantisation
    _check(f"{name}.absmax", absmax, torch.float32 if nested is None else torch.uint8, (n_blocks,))
    parts: tuple[StoredTensor, ...] = (packed, absmax, quant_map)
    if nested is not None:
        inner = _take(left, f"{name}.nested_absmax", name)
        inner_map = _take(left, f"{name}.nested_quant_map", name)
        _check(f"{name}.nested_absmax", inner, torch.float32, (-(-n_blocks // nested),))
        _check(f"{name}.nested_quant_map", inner_map, torch.float32, (256,))
        parts = (*parts, inner, inner_map)
    double = "" if nested is None else ", scales quantised too"
    # Rows from which a block of values begins, and such a block's byte.
    step = math.lcm(block_size, 2) // math.gcd(shape[1], math.lcm(block_size, 2))
    return PackedTensor(
        file=packed.file,
        dtype=_FLOATS[state["dtype"]],
        shape=shape,
        packed_bytes=sum(part.n_bytes for part in parts),
        kind=f"bitsandbytes {state['quant_type']}",
        packing=f"bitsandbytes {state['quant_type']}, 4 bits in blocks of {block_size} values{double}",
        parts=parts,
        step=step,
        formula=_rows_of_four_bits(state, shape[1]),
    )


def _rows_of_four_bits(state: Mapping[str, Any], n_columns: int) -> Formula:
    block_size, nested = state["blocksize"], state.get("nested_blocksize")

    def values(parts: tuple[Tensor, ...], rows: Rows) -> Tensor:
        assert isinstance(rows, slice), rows
        first, last = rows.start * n_columns, rows.stop * n_columns
        packed, absmax, quant_map = parts[:3]
        blocks = slice(first // block_size, -(-last // block_size))
        scales = absmax[blocks]
        if nested is not None:
            inner, inner_map = parts[3:]
            of_blocks = torch.arange(blocks.start, blocks.stop, device=absmax.device) // nested
            scales = formulas.nested_absmax(scales, inner[of_blocks], inner_map, state["nested_offset"])
        codes = packed.view(-1)[first // 2 : -(-last // 2)]
        found = formulas.bitsandbytes_4bit(codes, scales, quant_map, block_size, last - first)
        return found.view(-1, n_columns).to(_FLOATS[state["dtype"]])

    return values


def _read_state(name: str, tensor: StoredTensor) -> dict[str, Any]:
    """The JSON object that bitsandbytes keeps in a tensor of bytes. Raises DamagedFile unless it is whole."""
    where = f"`{name}` in `{tensor.file.name}`"
    if tensor.dtype != torch.uint8 or tensor.n_bytes > _STATE_LIMIT:
        raise DamagedFile(f"{where} is no quant_state: {tensor.n_bytes} bytes of {tensor.dtype}; copy it again")
    try:
        state = json.loads(bytes(tensor.read().tolist()))
        numbers = [state["blocksize"], *state["shape"], state.get("nested_blocksize", 1)]
        is_whole = (
            all(type(number) is int and number > 0 for number in numbers)
            and len(state["shape"]) == 2
            and state["dtype"] in _FLOATS
            and state["quant_type"] in ("nf4", "fp4")
            and math.isfinite(state["nested_offset"] if "nested_blocksize" in state else 0)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{where} is no readable quant_state ({error!r}); copy it again") from error
    if not is_whole:
        raise DamagedFile(f"{where} says nothing usable: {str(state)[:200]}; copy it again")
    return dict(state)
