"""Writes what a run has learned as a folder that serves and converts: Hugging Face's layout, or peft's for LoRA."""

import json
from pathlib import Path
from typing import Any

import torch

import mpt.checkpoint
from mpt.catalog import describe
from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM
from training import adapters, build, checkpoint, distributed, optimizer
from training.batches import load_format, load_tokenizer
from training.distributed import World
from training.run import Run

_SAVED_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def latest(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """A run's newest checkpoint as a Hugging Face folder, or peft's for LoRA.

    dtype: None writes as the run does when it ends; float32 is what it trains. Raises UserError when there is none.
    """
    run = Run.read(folder / "run.json")
    path = checkpoint.latest(folder)
    if path is None:
        raise UserError(f"`{folder}` has no whole checkpoint yet; its first comes after {run.checkpoint_every} steps")
    world = World(0, 1, torch.device("cpu"))
    model = build.model(run, world)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    position = checkpoint.restore(path, model, optimizer.build(run, trained, optimizer.embeddings(model)))
    found = values(run, model, world, dtype)
    return write(run, model, found, load_tokenizer(run), out, step=position.step)


def values(run: Run, model: MPTForCausalLM, world: World, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """What was trained, whole and in the dtype it is written in, on the first rank; empty on the others."""
    own = torch.float32 if run.lora is not None else _SAVED_DTYPE[run.precision]
    return distributed.gather(model, world, dtype or own)


def write(
    run: Run, model: MPTForCausalLM, values: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, **entries: Any
) -> Path:
    """Write a Hugging Face folder, or peft's for a LoRA run, whose manifest holds the recipe; entries go there too.

    values: what `values` found.
    """
    manifest = {
        "name": run.name,
        "recipe": json.loads(run.to_json()),
        "prompt_style": run.prompt_style,
        "context_length": run.context_length or model.config.max_seq_len,
        "licence": run.licence if run.base is None else _licence(run),
        **entries,
    }
    template = adapters.chat_template(load_format(run, tokenizer))
    if run.lora is not None:
        return adapters.save(model, values, str(run.base), tokenizer, template, folder, manifest)
    with torch.device("meta"):
        whole = MPTForCausalLM(model.config)
    whole.load_state_dict(values, assign=True, strict=False)  # the tied head is not among them
    whole.tie_weights()
    return mpt.checkpoint.save(whole, folder, tokenizer=tokenizer, chat_template=template, manifest=manifest)


def _licence(run: Run) -> str:
    return run.licence if run.licence != "unknown" else describe(str(run.base)).licence
