"""LoRA through peft: small matrices are trained beside frozen weights, saved in peft's format, merged on demand."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mpt.checkpoint
from mpt.errors import UserError
from mpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpt.model import MPTForCausalLM
    from training.run import Lora


def add(model: "MPTForCausalLM", lora: "Lora") -> None:
    """Freeze the model and put adapters beside the named projections of every block, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}  # what a later save writes


def save(
    model: "MPTForCausalLM",
    values: dict[str, Tensor],
    base: str,
    tokenizer: Tokenizer,
    folder: Path,
    manifest: dict[str, Any],
) -> Path:
    """Write adapter_config.json, adapter_model.safetensors, the tokenizer and a manifest; the folder appears whole."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = get_peft_model_state_dict(model, state_dict=values)
    prefix = "base_model.model."  # what peft puts before a wrapped model's names
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in weights.items()}, partial / "adapter_model.safetensors"
    )
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(partial)
    tokenizer.save(partial)
    mpt.checkpoint.write_manifest(partial, {**manifest, "base": base})
    partial.rename(folder)
    return folder


def merge(folder: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The base with a LoRA run's adapter added to its weights, as a Hugging Face folder.

    Raises UserError when folder holds no adapter.
    """
    from peft import PeftModel

    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"`{folder}` has no adapter_config.json; give the `model` folder of a LoRA run")
    mpt.checkpoint.verify_manifest(folder)
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = mpt.checkpoint.load(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    entries = {k: v for k, v in (mpt.checkpoint.read_manifest(folder) or {}).items() if k != "files"}
    return mpt.checkpoint.save(merged.to(dtype), out, tokenizer=Tokenizer.from_folder(folder), manifest=entries)
