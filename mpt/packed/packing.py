"""What a folder says of how its weights are packed: `quantization_config` of config.json, or a file of the tool.

Known are AWQ (AutoAWQ), GPTQ (AutoGPTQ, GPTQModel, optimum) and bitsandbytes; other packings are refused by name.
Keys that say how the weights were found (damping, calibration) or which kernel is to run change no value and are left.

Not here: the formulas (`formulas.py`), the tensors (`folder.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpt.errors import DamagedFile, UnsupportedConfig
from mpt.files import read_json, read_optional_json

_AWQ_LAYOUTS = ("gemm", "gemv")
_GPTQ_LAYOUTS = ("gptq", "gptq_v2")
_GPTQ_BITS = (2, 3, 4, 8)
# Where the tools wrote it before it went into config.json.
_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ, AutoAWQ
_NEXT = "let the tool that made it save its weights in float16, and give that folder"


@dataclass(frozen=True)
class Packing:
    """group_size: inputs that share a scale, -1 for all of them; 0 for bitsandbytes, whose tensors say it."""

    method: Literal["awq", "gptq", "bitsandbytes"]
    layout: str  # gemm or gemv; gptq (zeros are stored minus one) or gptq_v2; bitsandbytes has one
    bits: int
    group_size: int
    tool: str  # that made it, as far as is known

    def groups_of(self, n_inputs: int) -> int:
        """How many groups a matrix of so many inputs has."""
        return 1 if self.group_size == -1 else -(-n_inputs // self.group_size)


def packing_in(folder: Path) -> Packing | None:
    """How a folder's weights are packed, None where nothing says so. Raises DamagedFile, UnsupportedConfig."""
    value = read_optional_json(folder / "config.json").get("quantization_config")
    if value is not None:
        return read_packing(value)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    return None if file is None else read_packing(read_json(file))


def read_packing(value: object) -> Packing:
    """What a `quantization_config` says. Raises DamagedFile, and UnsupportedConfig for a packing that is not known."""
    if not isinstance(value, Mapping):
        raise DamagedFile(f"config key `quantization_config` must be an object with keys, not `{value!r}`")
    method = value.get("quant_method") or _method_of(value)
    if method == "awq":
        return _awq(value)
    if method == "gptq":
        return _gptq(value)
    if method == "bitsandbytes":
        return _bitsandbytes(value)
    raise _refused(f"`{method}`")


def _method_of(value: Mapping[str, Any]) -> str:
    """By the keys, in files from before `quant_method`."""
    if "w_bit" in value:
        return "awq"
    if "load_in_8bit" in value or "load_in_4bit" in value:
        return "bitsandbytes"
    return "gptq" if "bits" in value else "without a name"


def _awq(value: Mapping[str, Any]) -> Packing:
    layout = str(value.get("version") or value.get("format") or "gemm").lower()
    if value.get("backend") == "llm-awq":
        layout = "llm-awq"
    if layout in ("gemv_fast", "marlin", "exllama", "ipex", "llm-awq"):
        raise _refused(f"AWQ `{layout}`")
    _expect("version", layout, _AWQ_LAYOUTS)
    _expect("bits", value.get("bits", value.get("w_bit", 4)), (4,))
    return Packing("awq", layout, 4, _group_size(value.get("group_size", value.get("q_group_size"))), "AutoAWQ")


def _gptq(value: Mapping[str, Any]) -> Packing:
    layout = str(value.get("checkpoint_format") or value.get("format") or "gptq").lower()
    if value.get("is_marlin_format"):
        layout = "marlin"
    if layout in ("marlin", "bitblas", "qqq", "gptq_p", "exllama"):
        raise _refused(f"GPTQ `{layout}`")
    _expect("checkpoint_format", layout, _GPTQ_LAYOUTS)
    if value.get("dynamic"):
        raise _refused("GPTQ with `dynamic`, settings that differ between layers,")
    if str(value.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise _refused(f"GPTQ with `pack_dtype` `{value['pack_dtype']}`")
    bits: Any = value.get("bits")
    _expect("bits", bits, _GPTQ_BITS)
    return Packing("gptq", layout, bits, _group_size(value.get("group_size")), _gptq_tool(value.get("meta")))


def _gptq_tool(meta: object) -> str:
    """GPTQModel signs what it writes, `quantizer: ["gptqmodel:1.0"]`; AutoGPTQ and optimum do not."""
    made_by = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if not made_by:
        return "AutoGPTQ's layout"
    return ", ".join(map(str, made_by)) if isinstance(made_by, list) else str(made_by)


def _bitsandbytes(value: Mapping[str, Any]) -> Packing:
    in_8_bits = bool(value.get("load_in_8bit") or value.get("_load_in_8bit"))
    in_4_bits = bool(value.get("load_in_4bit") or value.get("_load_in_4bit"))
    if in_8_bits == in_4_bits:
        raise DamagedFile(
            "config key `quantization_config` is `bitsandbytes` with neither or both of `load_in_8bit` and "
            "`load_in_4bit`; set the one its weights have"
        )
    return Packing("bitsandbytes", "bitsandbytes", 8 if in_8_bits else 4, 0, "bitsandbytes")


def _group_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value == 0 or value < -1:
        raise DamagedFile(
            f"config key `quantization_config.group_size` is `{value!r}`; it must be a number of inputs, or -1 for all"
        )
    return value


def _expect(key: str, value: object, supported: tuple[str, ...] | tuple[int, ...]) -> None:
    if isinstance(value, bool) or value not in supported:
        names = ", ".join(f"`{good}`" for good in supported)
        raise DamagedFile(f"config key `quantization_config.{key}` is `{value!r}`; supported: {names}; {_NEXT}")


def _refused(what: str) -> UnsupportedConfig:
    return UnsupportedConfig(
        f"config key `quantization_config`: weights packed as {what} are not unpacked here; supported: AWQ (gemm, "
        f"gemv), GPTQ (gptq, gptq_v2), bitsandbytes; {_NEXT}"
    )
