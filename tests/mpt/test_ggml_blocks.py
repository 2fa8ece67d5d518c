"""Blocks of GGML: equal bit for bit to the `gguf` package's values, for any bytes."""

import gguf
import numpy as np
import pytest
import torch

from mpt.gguf import ggml_blocks
from mpt.gguf.ggml_blocks import dequantise
from mpt.gguf.ggml_types import BLOCK_TYPES


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_bytes_are_what_the_gguf_package_makes_of_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_blocks, "_PART", 1024)  # so that the rows take several parts
    size = BLOCK_TYPES[kind].n_bytes
    data = np.random.default_rng(0).integers(0, 256, (3, 50, 4 * size), dtype=np.uint8)
    found = dequantise(kind, torch.from_numpy(data)).numpy()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert found.dtype == np.float32 and found.shape == expected.shape
    is_number = ~np.isnan(expected)  # random scales are NaN now and then, whose sign has no meaning
    assert is_number.mean() > 0.9 and np.array_equal(np.isnan(found), ~is_number)
    assert np.array_equal(found.view(np.int32)[is_number], expected.view(np.int32)[is_number])


def test_numbers_and_sizes_are_those_of_the_gguf_package() -> None:
    for kind, block in BLOCK_TYPES.items():
        number = gguf.GGMLQuantizationType[kind]
        assert (block.name, block.number) == (kind, number.value)
        assert (block.n_values, block.n_bytes) == gguf.GGML_QUANT_SIZES[number]
