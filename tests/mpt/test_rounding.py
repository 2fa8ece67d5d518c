"""`--quantize int4`: blocks as the `gguf` package rounds them, made while a model is read, and computed with."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import mpt
from mpt.backends.choose import choose, open_backend
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.options import ModelOptions
from mpt.packed.layers import packed_bytes
from mpt.packed.rounding import four_bits, rounded
from mpt.transformers_model import MPTForCausalLM
from tests import packers


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(40, 96, generator=g) * torch.logspace(-6, 4, 40)[:, None]
    values[3] = 0
    values[5, 32:64] = torch.arange(32) - 16.0  # halves between two levels
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(rounded(values, kind).numpy(), expected)
    assert torch.equal(rounded(values.bfloat16(), kind), rounded(values.bfloat16().float(), kind))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64)
    return mpt.save(MPTForCausalLM(config).bfloat16(), tmp_path / "model")


def test_a_model_is_rounded_as_it_is_read(folder: Path) -> None:
    """Its logits are those of the values that the `gguf` package gives back, in float64."""
    options = ModelOptions(str(folder), quantize="int4")
    choice = choose("m", folder, options)
    assert choice.precision == "int4 weights, bfloat16"
    model = open_backend(choice, folder, options).model
    assert model is not None
    # 12 C^2 weights a layer in blocks of 18 bytes, the embedding, which is the head too, in blocks of 34.
    assert packed_bytes(model) == 2 * 12 * 64 * 64 // 32 * 18 + 96 * 64 // 32 * 34
    assert {name for name, p in model.named_parameters() if p.dim() > 1} == set()
    real = {}
    for name, values in mpt.load(folder, dtype=torch.float32).state_dict().items():
        kind = None if values.dim() == 1 else "Q8_0" if "wte" in name or "lm_head" in name else "Q4_0"
        real[name] = values.double()
        if kind is not None:
            of = gguf.GGMLQuantizationType[kind]
            found = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), of), of)
            real[name] = torch.from_numpy(found.astype(np.float64))
    ids = torch.randint(0, 96, (30,), generator=torch.Generator().manual_seed(1))
    expected = packers.forward(real, ids, 4)
    with torch.inference_mode():
        found = mpt.load(folder, dtype=torch.float32, pack=four_bits)(ids[None]).logits[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_rows_that_fill_no_blocks_are_refused_by_name(tmp_path: Path) -> None:
    config = MPTConfig(d_model=48, n_heads=4, n_layers=1, vocab_size=96, max_seq_len=64)
    folder = mpt.save(MPTForCausalLM(config).bfloat16(), tmp_path / "model")
    options = ModelOptions(str(folder), quantize="int4")
    said = r"has rows of 48, and `--quantize int4` takes multiples of 32"
    with pytest.raises(UserError, match=said):
        choose("m", folder, options)  # before any weight is read
    with pytest.raises(UserError, match=said):
        mpt.load(folder, pack=four_bits)


def test_other_precisions_and_places_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="`--quantize int4` is for models computed in bfloat16"):
        choose("m", folder, ModelOptions(str(folder), quantize="int4", dtype="float32"))
    with pytest.raises(UserError, match=r"shared by several processes.*`--quantize int4`"):
        choose("m", folder, ModelOptions(str(folder), quantize="int4", tensor_parallel=2))
