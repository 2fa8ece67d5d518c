"""The model a run trains, on its device: the base's weights or new ones, adapters beside them, split over the ranks.

It is laid out without memory and filled block by block, each split before the next one is read, so a rank never holds
more than its share and one block.
"""

from collections.abc import Mapping

import torch
from torch import nn

import mpt.checkpoint
import mpt.manifest
from mpt import attention
from mpt.catalog import resolve
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.packed import layers as packed_layers
from mpt.packed.matrix import Weight
from mpt.transformers_model import MPTForCausalLM
from training import adapters, context, distributed, memory
from training.distributed import World
from training.run import Run


def model(run: Run, world: World) -> MPTForCausalLM:
    """Ready to train. What is drawn depends on the run's seed alone, so any number of ranks begins with one model.

    Raises what `mpt.checkpoint.load` does, and UserError for what a model's config does not go with.
    """
    with torch.device("meta"):
        built = MPTForCausalLM(_config(run))
    context.check(built.config, run.context_parallel)
    built.to(torch.float32)
    stored = None
    if run.base is not None:
        place = resolve(run.base)
        mpt.manifest.verify_manifest(place)
        stored = mpt.checkpoint.weights_of(built, place)
        # Frozen, so they may lie as they are; QLoRA packs them anew, and DoRA reads more of them than their products.
        if run.lora is not None and run.lora.bits != 4 and not run.lora.dora:
            packed_layers.put_into(built, stored, world.device, torch.float32)
        else:
            mpt.checkpoint.say_unpacked(place, stored)
    if run.lora is not None:
        adapters.add(built, run.lora, run.precision)
    torch.manual_seed(run.seed)
    for number, block in enumerate(built.transformer.blocks):
        _fill(built, f"transformer.blocks.{number}", stored, run, world.device)
        distributed.shard_block(block, run, world)
    _fill(built, "", stored, run, world.device)
    packed_layers.tie_weights(built)
    built.train()
    memory.checkpoint_activations(built, run.activation_checkpointing)
    distributed.shard_root(built, world)
    if run.compile:
        _compile(built, world.device)
    return built


def _compile(model: MPTForCausalLM, device: torch.device) -> None:
    """Compile what each block computes, without what FSDP does before and after it.

    Raises UserError for what torch cannot compile in one piece.
    """
    for kind in packed_layers.packed_kinds(model.transformer.blocks):
        raise UserError(f"`--compile` cannot compile matrices packed as {kind}; leave it out, or take another base")
    if model.config.attention["attn_pdrop"]:
        raise UserError("`--compile` cannot compile the dropout of `attn_pdrop`; leave it out, or set that to 0")
    is_cuda = device.type == "cuda"
    if is_cuda:
        attention.allow_variants()
    for block in model.transformer.blocks:
        # Where torch attends on CPU each batch has documents of other lengths: it compiles for 8, warns, and goes on
        # without. `fullgraph`, which makes an error of what cannot be compiled whole, would make one of that too.
        block.forward = torch.compile(block.forward, fullgraph=is_cuda)


def _config(run: Run) -> MPTConfig:
    """The run's shape, or the base's with the run's changes; its context is at least what the run trains.

    Raises UserError for sequences that a table of positions does not hold.
    """
    if run.base is None:
        config = MPTConfig(**run.model)
    else:
        values = mpt.checkpoint.read_config(resolve(run.base)).to_dict()
        attention = {**values["attn_config"], **run.model.get("attn_config", {})}
        config = MPTConfig.from_dict({**values, **run.model, "attn_config": attention})
    if config.has_wpe and run.max_seq_len > config.max_seq_len:
        raise UserError(
            f"`max_seq_len` of the run is {run.max_seq_len}, and the model has learned {config.max_seq_len} positions; "
            f"give --max-seq-len {config.max_seq_len}"
        )
    config.max_seq_len = max(config.max_seq_len, run.max_seq_len)  # who reads it later may rely on what was trained
    config.dtype = torch.float32
    return config


@torch.no_grad()
def _fill(
    model: MPTForCausalLM, part: str, stored: Mapping[str, Weight] | None, run: Run, device: torch.device
) -> None:
    """Give the parameters of a part that have no memory yet their memory, and what is in it."""
    for name, module in model.get_submodule(part).named_modules(prefix=part):
        empty = {key: p for key, p in module.named_parameters(recurse=False) if p.is_meta}
        if not empty or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        for key, parameter in empty.items():
            setattr(module, key, nn.Parameter(torch.empty(parameter.shape, device=device), parameter.requires_grad))
        if adapters.is_adapter(name):
            adapters.draw(name, module, model)
        elif stored is None:
            model._init_weights(module)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                stored[adapters.name_in_base(f"{name}.{key}")].read_into(parameter)
            if run.lora is not None:
                adapters.compress(name, module, run.lora, run.precision)
