"""Every published form of `quantization_config` is read; packings that are not unpacked are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt.errors import DamagedFile, UnsupportedConfig
from mpt.packed.packing import Packing, packing_in, read_packing

AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": True, "sym": True, "damp_percent": 0.1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (AWQ, Packing("awq", "gemm", 4, 128, "AutoAWQ")),
        ({"w_bit": 4, "q_group_size": 64, "version": "GEMV"}, Packing("awq", "gemv", 4, 64, "AutoAWQ")),
        ({**AWQ, "format": "gemm", "version": None, "backend": "auto"}, Packing("awq", "gemm", 4, 128, "AutoAWQ")),
        (GPTQ, Packing("gptq", "gptq", 4, 128, "AutoGPTQ's layout")),
        ({"bits": 3, "group_size": -1}, Packing("gptq", "gptq", 3, -1, "AutoGPTQ's layout")),
        (
            {**GPTQ, "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:1.4.0"]}},
            Packing("gptq", "gptq_v2", 4, 128, "gptqmodel:1.4.0"),
        ),
        (
            {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0},
            Packing("bitsandbytes", "bitsandbytes", 8, 0, "bitsandbytes"),
        ),
        (
            {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            Packing("bitsandbytes", "bitsandbytes", 4, 0, "bitsandbytes"),
        ),
    ],
)  # fmt: skip
def test_published_forms_are_read(value: dict[str, Any], expected: Packing) -> None:
    assert read_packing(value) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"quant_method": "hqq"}, "`hqq`"),
        ({"quant_method": "eetq"}, "`eetq`"),
        ({"quant_method": "aqlm"}, "`aqlm`"),
        ({"quant_method": "compressed-tensors"}, "`compressed-tensors`"),
        ({"quant_method": "fp8"}, "`fp8`"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ `marlin`"),
        ({**GPTQ, "is_marlin_format": True}, "GPTQ `marlin`"),
        ({**GPTQ, "dynamic": {"-:.*attn.*": {}}}, "`dynamic`"),
        ({**GPTQ, "pack_dtype": "int16"}, "`pack_dtype` `int16`"),
        ({**AWQ, "version": "exllama"}, "AWQ `exllama`"),
        ({**AWQ, "version": "gemv_fast"}, "AWQ `gemv_fast`"),
        ({}, "without a name"),
    ],
)
def test_other_packings_are_refused_by_name_with_the_next_step(value: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedConfig, match="are not unpacked here") as caught:
        read_packing(value)
    assert words in str(caught.value) and "save its weights in float16" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**AWQ, "bits": 3}, r"quantization_config.bits` is `3`; supported: `4`"),
        ({**AWQ, "version": "gemm2"}, r"quantization_config.version` is `'gemm2'`; supported: `gemm`, `gemv`"),
        ({**GPTQ, "bits": 5}, r"quantization_config.bits` is `5`; supported: `2`, `3`, `4`, `8`"),
        ({**GPTQ, "bits": True}, r"quantization_config.bits` is `True`"),
        ({**GPTQ, "bits": [4]}, r"quantization_config.bits` is `\[4\]`"),
        ({**GPTQ, "checkpoint_format": "v7"}, r"quantization_config.checkpoint_format` is `'v7'`"),
        ({**GPTQ, "group_size": 0}, r"quantization_config.group_size` is `0`"),
        ({**GPTQ, "group_size": "128"}, r"quantization_config.group_size` is `'128'`"),
        ({"bits": 4}, r"quantization_config.group_size` is `None`"),
        ({"quant_method": "bitsandbytes"}, "neither or both"),
        ("awq", "must be an object"),
    ],
)
def test_values_that_no_tool_writes_are_damage(value: object, words: str) -> None:
    with pytest.raises(DamagedFile, match=words):
        read_packing(value)


def test_the_tools_own_files_count_where_the_config_says_nothing(tmp_path: Path) -> None:
    assert packing_in(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt"}))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32, "desc_act": False}))
    found = packing_in(tmp_path)
    assert found is not None and (found.method, found.bits, found.group_size) == ("gptq", 8, 32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", "quantization_config": AWQ}))
    found = packing_in(tmp_path)
    assert found is not None and found.method == "awq"
