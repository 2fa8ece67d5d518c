"""Packs matrices as AutoAWQ and GPTQ publish it, code by code and bit by bit, and says what each code means.

Shares nothing with `mpt/formulas.py`. bitsandbytes packs by itself: it is installed. Also writes whole folders.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


def random_codes(n_inputs: int, n_outputs: int, bits: int, n_groups: int, seed: int = 0) -> tuple[Any, Any, Tensor]:
    """Codes (in, out), zeros (G, out) and float16 scales (G, out); every code and zero occurs."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (n_inputs, n_outputs))
    zeros = random.integers(0, 2**bits, (n_groups, n_outputs))
    scales = torch.from_numpy(random.uniform(0.01, 0.05, (n_groups, n_outputs))).half()
    return codes, zeros, scales


def real_values(codes: Any, zeros: Any, scales: Tensor, groups: list[int]) -> Tensor:
    """(code - zero) * scale, (out, in) float64, one value after the other."""
    n_inputs, n_outputs = codes.shape
    found = np.empty((n_outputs, n_inputs))
    for i in range(n_inputs):
        for o in range(n_outputs):
            found[o, i] = (int(codes[i, o]) - int(zeros[groups[i], o])) * float(scales[groups[i], o])
    return torch.from_numpy(found)


def words(stream: list[int], bits: int) -> list[int]:
    """Codes as one large number, lowest first, cut into signed words of 32 bits."""
    number = sum(code << bits * k for k, code in enumerate(stream))
    cut = [(number >> 32 * k) & 0xFFFFFFFF for k in range(len(stream) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in cut]


def pack_rows(matrix: Any, bits: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Each row (n,) as words (n * bits / 32,); order: of every eight columns, AWQ's."""
    rows = []
    for row in matrix.tolist():
        if order != tuple(range(8)):
            row = [row[start + k] for start in range(0, len(row), 8) for k in order]
        rows.append(words(row, bits))
    return torch.tensor(rows, dtype=torch.int32)


def awq_gemm(codes: Any, zeros: Any, scales: Tensor) -> Parts:
    return {"qweight": pack_rows(codes, 4, AWQ_ORDER), "qzeros": pack_rows(zeros, 4, AWQ_ORDER), "scales": scales}


def awq_gemv(codes: Any, zeros: Any, scales: Tensor, width: int) -> Parts:
    """width: words of a row of zeros, more than its groups fill; padded with rubbish."""
    padded = np.full((codes.shape[1], width * 8), 11)
    padded[:, : len(zeros)] = zeros.T
    wide = torch.full((codes.shape[1], width * 8), 3.0).half()
    wide[:, : len(zeros)] = scales.t()
    return {"qweight": pack_rows(codes.T, 4), "qzeros": pack_rows(padded, 4), "scales": wide}


def gptq(codes: Any, zeros: Any, scales: Tensor, groups: list[int] | None, bits: int, minus_one: bool) -> Parts:
    stored = (zeros - 1) % 2**bits if minus_one else zeros
    parts = {
        "qweight": pack_rows(codes.T, bits).t().contiguous(),
        "qzeros": pack_rows(stored, bits),
        "scales": scales,
    }
    return parts if groups is None else {**parts, "g_idx": torch.tensor(groups, dtype=torch.int32)}


def four_bits(weight: Tensor, quant_type: str, block_size: int, nested: bool) -> tuple[Parts, Tensor]:
    """What bitsandbytes stores of a weight, and what it makes of it again."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
    )
    parts = {"weight": packed, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
    return parts, bitsandbytes.functional.dequantize_4bit(packed, state)


def eight_bits(weight: Tensor) -> tuple[Parts, Tensor]:
    """Likewise, float32."""
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)


def write_packed(
    source: Path, folder: Path, quantization: dict[str, Any], pack: Callable[[Tensor, int], tuple[Parts, Tensor]]
) -> dict[str, Tensor]:
    """A folder like `source`, every matrix of its blocks packed; the real values of all its weights in float64.

    pack: a weight and its number to the parts that are stored, and their real values.
    """
    stored: Parts = {}
    real: dict[str, Tensor] = {}
    for number, (name, weight) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        if "blocks" in name and weight.dim() == 2:
            parts, real[name] = pack(weight.half(), number)
            stored |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            stored[name] = weight.half()
            real[name] = weight.half().double()
    folder.mkdir()
    save_file({name: value.clone() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": quantization, "torch_dtype": "float16"}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / file).is_file():
            (folder / file).write_bytes((source / file).read_bytes())
    return {name: values.double() for name, values in real.items()}


def awq_weight(weight: Tensor, number: int) -> tuple[Parts, Tensor]:
    """A weight rounded to 4 bits in groups of 32 inputs, as gemm packs it, and its real values."""
    codes, zeros, scales = rounded(weight, 4, [i // 32 for i in range(weight.shape[1])])
    return awq_gemm(codes, zeros, scales), real_values(codes, zeros, scales, [i // 32 for i in range(len(codes))])


def gptq_weight(weight: Tensor, number: int) -> tuple[Parts, Tensor]:
    """Likewise for GPTQ in act-order, zeros stored minus one: the groups' members are shuffled."""
    groups = np.random.default_rng(number).permutation([i // 32 for i in range(weight.shape[1])]).tolist()
    codes, zeros, scales = rounded(weight, 4, groups)
    return gptq(codes, zeros, scales, groups, 4, minus_one=True), real_values(codes, zeros, scales, groups)


def rounded(weight: Tensor, bits: int, groups: list[int]) -> tuple[Any, Any, Tensor]:
    """Codes (in, out), zeros (G, out) and scales (G, out) of a weight (out, in), between each group's extremes."""
    values = weight.float().numpy().T
    members = [np.array(groups) == group for group in range(max(groups) + 1)]
    low = np.stack([values[of].min(0) for of in members])
    high = np.stack([values[of].max(0) for of in members])
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 2**bits - 1).astype(int)
    codes = np.clip(np.round(values / scales[groups]) + zeros[groups], 0, 2**bits - 1).astype(int)
    return codes, zeros, torch.from_numpy(scales)


def forward(real: dict[str, Tensor], ids: Tensor, n_heads: int, act_scales: dict[int, Tensor] | None = None) -> Tensor:
    """Logits (T, V) of one row of MPT-7B's form in float64, by its formulas; act_scales: a layer's ScaledActivation."""
    x = real["transformer.wte.weight"][ids]  # (T, C)
    T, C = x.shape
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    future = torch.zeros(T, T, dtype=torch.float64).masked_fill(distance < 0, -torch.inf)
    slopes = [2.0 ** (-8 * (head + 1) / n_heads) for head in range(n_heads)]
    for layer in range(sum(name.endswith("Wqkv.weight") for name in real)):
        own = {
            name.removeprefix(f"transformer.blocks.{layer}."): value
            for name, value in real.items()
            if name.startswith(f"transformer.blocks.{layer}.")
        }
        q, k, v = (norm(x, own["norm_1.weight"]) @ own["attn.Wqkv.weight"].T).split(C, dim=1)
        heads = []
        for head, slope in enumerate(slopes):
            part = slice(head * C // n_heads, (head + 1) * C // n_heads)
            scores = q[:, part] @ k[:, part].T / (C // n_heads) ** 0.5 - slope * distance + future
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, 1) @ own["attn.out_proj.weight"].T
        up = norm(x, own["norm_2.weight"]) @ own["ffn.up_proj.weight"].T
        inner = up / 2 * (1 + torch.erf(up / 2**0.5))
        if act_scales:
            inner = inner / act_scales[layer].double()
        x = x + inner @ own["ffn.down_proj.weight"].T
    return norm(x, real["transformer.norm_f.weight"]) @ real["transformer.wte.weight"].T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def offset_of(parts: Parts) -> float:
    """The mean that double quantisation takes from the scales, as bitsandbytes' JSON says it."""
    state = next(value for name, value in parts.items() if "quant_state" in name)
    return float(json.loads(bytes(state.tolist()))["nested_offset"])
