"""Hugging Face folders: what every other tool reads, and the form our own checkpoints have.

Written: sharded safetensors with an index, a config that stock transformers loads, the tokenizer, generation config and
chat template; the model card is `card.py`'s.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from conversion import model_folder, running, tensors
from conversion.options import Options
from conversion.running import Runner
from conversion.source import Source
from mpt.checkpoint import left_out, read_config, stored_tensors, without_progress_bar
from mpt.packed.folder import unpacking_in_words
from mpt.packed.packing import packing_in


def cannot_express(source: Source) -> dict[str, str]:
    """Nothing: our own loader reads these folders."""
    return {}


def read(path: Path, tokenizer: Path | None = None) -> Source:
    """Hub, in-tree, remote-code and `mosaic_gpt` names; safetensors or .bin, one file or many; packed or not."""
    config = read_config(path)
    weights = stored_tensors(path)
    found = {name: tensors.stored(tensor) for name, tensor in weights.items()}
    packing, parts = packing_in(path), left_out(path)
    unpacking = unpacking_in_words(weights, None if packing is None else packing.tool)
    notes = [f"opened as the language model inside; left out: {', '.join(parts)}"] if parts else []
    notes += [] if unpacking is None else [unpacking]
    return model_folder.opened(path, "huggingface", config, found, tokenizer, tuple(notes))


def write(source: Source, out: Path, dtype: str, options: Options, advance: Callable[[int], None]) -> dict[Path, str]:
    """Write everything but the card into `out`; the weights' sha256."""
    kind: torch.dtype = getattr(torch, dtype)
    written = {name: tensor.cast(kind, name) for name, tensor in source.tensors.items()}
    digests = model_folder.write_weights(written, out, advance)
    model_folder.write_beside(source, kind, out)
    return digests


def runners(source: Source, target: Source, folder: Path) -> list[Runner]:
    """Our model, and transformers' own where it computes this one rightly."""
    found = [running.read_back(target)]
    if not source.config.beyond_stock():
        longest = source.config.max_seq_len  # where its ALiBi ends
        found.append(Runner("transformers' own class", running.forward_of(_stock(folder)), longest))
    return found


def _stock(folder: Path) -> torch.nn.Module:
    from transformers import MptConfig, MptForCausalLM

    with without_progress_bar():
        model: torch.nn.Module = MptForCausalLM.from_pretrained(folder, config=MptConfig.from_pretrained(folder))
    return model.float().eval()
