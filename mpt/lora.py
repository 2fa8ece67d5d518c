"""LoRA adapters as peft saves them: read, checked, and multiplied beside a model's projections.

y = W x + alpha / r B A x (Hu et al. 2021). Not here: training them (`training/adapters.py`), adding them into the
weights of their base (`conversion/formats/adapter.py`).
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpt.catalog import ADAPTER_CONFIG, has_model
from mpt.config import MPTConfig
from mpt.errors import CheckpointNotFound, DamagedFile, UnsupportedConfig, UserError
from mpt.files import read_json
from mpt.manifest import read_manifest

_MOST_RANK = 1 << 16  # as wide as no model's matrices are
_PREFIX = "base_model.model."
_ONLY_AT = {"bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}


@dataclass(frozen=True)
class LoraFolder:
    """A folder of peft's LoRA, its configuration checked, its matrices not read yet."""

    path: Path
    rank: int
    scale: float  # of B A
    base: str | None  # the checkpoint it was trained on, as its configuration names it

    @property
    def weights(self) -> Path:
        return self.path / "adapter_model.safetensors"

    def pairs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each matrix, by the matrix's name; shapes: the base's, (out, in) each.

        Raises DamagedFile for pairs that are incomplete, and for those that fit no matrix of the base.
        """
        try:
            with safe_open(self.weights, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError) as error:
            raise DamagedFile(f"`{self.weights}` cannot be read: {error}") from error
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in found.items():
            module, _, which = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
            if which not in ("lora_A", "lora_B") or f"{module}.weight" not in shapes:
                raise DamagedFile(f"`{name}` in `{self.weights}` belongs to no matrix of the base")
            halves.setdefault(f"{module}.weight", {})[which] = tensor
        for name, pair in halves.items():
            shape = n_out, n_in = tuple(shapes[name])
            wanted = {"lora_A": (self.rank, n_in), "lora_B": (n_out, self.rank)}
            if {which: tuple(tensor.shape) for which, tensor in pair.items()} != wanted:
                raise DamagedFile(
                    f"`{name}` of the base is {list(shape)}; the adapter's pair in `{self.weights}`, to be of rank "
                    f"{self.rank}, does not fit it"
                )
        return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}


def open_lora(folder: Path) -> LoraFolder:
    """A folder of plain LoRA. Raises CheckpointNotFound, DamagedFile, and UnsupportedConfig for another kind."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointNotFound(f"`{folder}` has no adapter_config.json; give a folder that peft saved")
    merging = f"merge it into its base, and use that: train export {folder} --merge --out FOLDER"
    rank, scale, base = settings(read_json(file), folder, merging)
    if not (folder / "adapter_model.safetensors").is_file() and has_model(folder):
        raise UserError(f"`{folder}` holds a whole model, with its adapters merged; use it as a model")
    if not (folder / "adapter_model.safetensors").is_file():
        raise DamagedFile(f"`{folder}` has no adapter_model.safetensors; a pickled adapter is not opened")
    return LoraFolder(folder, rank, scale, base)


def settings(config: Mapping[str, Any], where: Path, merging: str) -> tuple[int, float, str | None]:
    """Rank, scale and base of plain LoRA by peft's configuration. merging: what to do with an adapter of another kind.

    Raises DamagedFile, UnsupportedConfig.
    """
    try:
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
        base = config.get("base_model_name_or_path")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFile(f"`{where}` holds no adapter's configuration ({error!r})") from error
    if kind != "LORA":
        raise UnsupportedConfig(f"`{where}` is a {kind} adapter; supported: LORA")
    if config.get("use_dora"):  # its factors multiply the base's products too, which a pair beside them cannot
        raise UnsupportedConfig(f"`use_dora` of the adapter in `{where}` is true; {merging}")
    for key, value in _ONLY_AT.items():
        if config.get(key) not in (None, value):
            raise UnsupportedConfig(f"`{key}` of the adapter is {config[key]!r}; supported: {value!r}")
    if not 1 <= rank <= _MOST_RANK:
        raise DamagedFile(f"`{where}` gives rank {rank}; a rank is 1 to {_MOST_RANK}")
    return rank, alpha / rank**0.5 if config.get("use_rslora") else alpha / rank, base


def trained_context(folder: Path, base: MPTConfig) -> int:
    """The context of a base with the adapters of a folder in it: with ALiBi what these were trained at, if longer."""
    stated = (read_manifest(folder) or {}).get("context_length")
    return base.max_seq_len if base.has_wpe or not isinstance(stated, int) else max(base.max_seq_len, stated)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory: for each projection of the model, A (r, in) and B (out, r) with its scale in it."""

    name: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    serial: int = field(default_factory=itertools.count().__next__)  # what was cached of another one is not reused

    @property
    def n_bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    @cached_property
    def digest(self) -> str:
        """sha256 of its matrices, which are all that it adds to a model: what was cached of the same one elsewhere, or
        before a restart, may be reused."""
        found = hashlib.sha256()
        for name, pair in sorted(self.pairs.items()):
            for matrix in pair:
                found.update(f"{name} {matrix.dtype} {tuple(matrix.shape)} ".encode())
                found.update(matrix.contiguous().cpu().view(torch.uint8).numpy().data)
        return found.hexdigest()


def adaptable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The projections an adapter may stand beside, by name: those of the blocks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer.blocks."):
            yield name, module


def load_adapter(name: str, folder: Path, model: torch.nn.Module) -> Adapter:
    """An adapter for this model, in its dtype and on its device. Raises like `open_lora` and `LoraFolder.pairs`."""
    lora = open_lora(folder)
    shapes = {f"{name}.weight": (module.out_features, module.in_features) for name, module in adaptable(model)}
    like = next(weight for weight in model.parameters() if weight.is_floating_point())  # projections may be int8
    pairs = {}
    for matrix, (a, b) in lora.pairs(shapes).items():
        scaled = b.float() * lora.scale
        pairs[matrix.removesuffix(".weight")] = (a.to(like), scaled.to(like))
    return Adapter(name, pairs)
