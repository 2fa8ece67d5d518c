"""peft's LoRA adapters, added to the weights of their base as each of those is read."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from conversion.source import Source, open_source
from conversion.tensors import Lazy
from mpt.errors import DamagedFile, UnsupportedConfig

_PREFIX = "base_model.model."
_ONLY_AT = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}


def read(folder: Path, base: str | None = None) -> Source:
    """The base with the adapter's products added, W + alpha / r B A, in float32 before it is rounded to W's dtype.

    base: instead of the one its configuration names. Raises UnsupportedConfig for another kind than plain LoRA.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
        named = base or config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"`{folder / 'adapter_config.json'}` is no adapter's configuration ({error!r})") from error
    if kind != "LORA":
        raise UnsupportedConfig(f"`{folder}` is a {kind} adapter; supported: LORA")
    for key, value in _ONLY_AT.items():
        if config.get(key) not in (None, value):
            raise UnsupportedConfig(f"`{key}` of the adapter is {config[key]!r}; supported: {value!r}")
    if not named:
        raise UnsupportedConfig(f"`{folder}` does not name its base; give --base")
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise DamagedFile(f"`{folder}` has no adapter_model.safetensors; a pickled adapter is not opened")
    whole = open_source(named)
    with safe_open(weights, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        module, _, which = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if which not in ("lora_A", "lora_B") or f"{module}.weight" not in whole.tensors:
            raise DamagedFile(f"`{name}` in `{weights}` belongs to no matrix of `{named}`")
        pairs.setdefault(f"{module}.weight", {})[which] = tensor
    tensors = dict(whole.tensors)
    for name, pair in pairs.items():
        shape = tensors[name].shape
        if pair.keys() != {"lora_A", "lora_B"} or (pair["lora_B"].shape[0], pair["lora_A"].shape[1]) != shape:
            raise DamagedFile(f"`{name}` is {list(shape)}; the adapter's pair in `{weights}` does not fit it")
        tensors[name] = _added(tensors[name], pair["lora_A"], pair["lora_B"], scale)
    return Source(
        kind="adapter",
        path=folder,
        config=whole.config,
        tensors=tensors,
        tokenizer=whole.tokenizer,
        files=(folder / "adapter_config.json", weights, *whole.files),
        chat_template=whole.chat_template,
        generation=whole.generation,
        notes=(f"LoRA of rank {rank} added to `{Path(named).name}`",),
        folder=folder,
        manifests=(folder, *whole.manifests),
    )


def _added(base: Lazy, a: Tensor, b: Tensor, scale: float) -> Lazy:
    def read() -> Tensor:
        values = base.read()
        product = torch.mm(b.float(), a.float()).mul_(scale)
        return product.add_(values).to(values.dtype)

    return Lazy(base.dtype, base.shape, read, base.where)
