"""How much memory a model will take, and how much of what is free its KV cache gets: the one place that decides.

On a CPU the cache of a model grows into its budget, so what others may still grow by is free for nobody else. On a GPU
a budget is taken whole. Not here: which models are in memory (`serving/lifecycle.py`).
"""

import gc
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mpt.backends.backend import Backend
from mpt.backends.choose import Choice, choose
from mpt.catalog import resolve
from mpt.checkpoint import read_config, stored_tensors, weight_files
from mpt.errors import MachineRefused
from mpt.memory import available_bytes, give_back_freed
from mpt.options import ModelOptions
from mpt.packed.layers import packed_bytes

_KV_SHARE = 0.6  # of the memory that is free once the weights are in
_MARGIN = 1.1  # a load's peak over its weights: the largest tensor, what C keeps beside them
_LEAST_TOKENS = 2048  # of KV cache, without which it is not worth loading a model
_BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 4.5 / 8}


@dataclass(frozen=True)
class Room:
    """What loading a model takes. device: whose memory, `cpu` or `cuda`; None where another server has the model."""

    device: str | None
    n_bytes: int


def room_for(name: str, options: ModelOptions) -> Room:
    """What a model will take, from its files' headers. Raises MPTError for one that cannot be loaded as it is told."""
    if options.is_remote:
        choose(name, Path(), options)
        return Room(None, 0)
    folder = resolve(options.root)
    config, choice = read_config(folder), choose(name, folder, options)
    itemsize = 2 if choice.dtype is None else choice.dtype.itemsize
    kv_bytes = options.kv_bytes
    if kv_bytes is None:
        tokens = min(_LEAST_TOKENS, options.context_length or config.max_seq_len)
        kv_bytes = round(config.kv_bytes_per_token / 2 * itemsize * tokens / _KV_SHARE)
    return Room(choice.device, round(_MARGIN * _weight_bytes(folder, choice, options)) + kv_bytes)


def _weight_bytes(folder: Path, choice: Choice, options: ModelOptions) -> float:
    """Of one process."""
    if choice.backend == "onnx":
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if choice.stay_packed:
        files = [folder] if folder.is_file() else weight_files(folder)
        return sum(file.stat().st_size for file in files)
    assert choice.dtype is not None, choice
    bytes_each = _BYTES_PER_WEIGHT.get(options.quantize or "", choice.dtype.itemsize)
    n_weights = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    return n_weights * bytes_each / options.tensor_parallel


def free_bytes(device: str) -> int:
    """Memory that can still be had on `cpu` or `cuda`."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()


def kv_budget(
    backend: Backend, context: int, max_running: int, choice: Choice, n_sharing: int, promised_bytes: int
) -> tuple[int, str]:
    """Bytes of KV cache for a model whose weights are in, and why so many, in words.

    Room for every row at full context, or a share of the free memory if that is less. n_sharing: models that may be
    loaded from now on, this one included. promised_bytes: what loaded ones may still grow by. Raises MachineRefused.
    """
    free = free_bytes(choice.device) - promised_bytes
    if choice.stay_packed and backend.model is not None:
        free -= packed_bytes(backend.model)  # mapped: they count as free until they are read
    share = int(free * _KV_SHARE / n_sharing)
    wanted = backend.bytes_per_token * backend.capacity_for(context) * max_running
    if share < backend.bytes_per_token * backend.capacity_for(1):
        raise MachineRefused(
            f"{max(free, 0) / 1e9:.1f} GB of memory are free: too little for a KV cache; serve fewer models"
        )
    if wanted <= share:
        return wanted, f"{max_running} sequences of {context} tokens"
    among = f", shared by {n_sharing} models" if n_sharing > 1 else ""
    return share, f"{_KV_SHARE:.0%} of the {free / 1e9:.2f} GB that are free{among}"


def give_back_memory() -> None:
    """Return to system and GPU what a model has freed that nobody holds any more."""
    gc.collect()  # modules and threads refer to each other in circles
    give_back_freed()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
