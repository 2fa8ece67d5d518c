"""How much memory a model will take, and how much of what is free its KV cache gets: the one place that decides.

On a CPU the cache of a model grows into its budget, so what others may still grow by is free for nobody else. On a GPU
a budget is taken whole. Not here: which models are in memory (`serving/lifecycle.py`).
"""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpt.backends.backend import Backend
from mpt.backends.choose import Choice, choose
from mpt.backends.sharded_backend import ShardedBackend
from mpt.catalog import resolve
from mpt.checkpoint import read_config, stored_tensors, weight_files
from mpt.errors import DamagedFile, MachineRefused
from mpt.memory import Memory, give_back_freed, memory
from mpt.options import ModelOptions
from mpt.packed.layers import packed_bytes

_KV_SHARE = 0.6  # of the memory that is free once the weights are in
_WORK_BYTES = 128_000_000  # for requests and steps, of what is free: of a tiny model 32 long prompts took 70 MB
_MARGIN = 1.1  # a load's peak over its weights: the largest tensor, what C keeps beside them
_LEAST_TOKENS = 2048  # of KV cache, without which it is not worth loading a model
_PROCESS_BYTES = 300_000_000  # of one that computes a share of a model, beside its weights and cache
_BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 4.5 / 8}


@dataclass(frozen=True)
class Room:
    """What loading a model takes. device: whose memory, `cpu` or `cuda`; None where another server has the model.

    weight_bytes: with what loading takes beside them, of all processes that share the device's memory, a draft's too.
    kv_bytes: the cache that was asked for, or the least with which the model is worth loading.
    """

    device: str | None
    weight_bytes: int
    kv_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def of_replicas(self, n: int) -> "Room":
        """Of n processes that have the whole model each."""
        return Room(self.device, n * (self.weight_bytes + _PROCESS_BYTES), n * self.kv_bytes)


def room_for(name: str, options: ModelOptions) -> Room:
    """What a model will take, from its files' headers. Raises MPTError for one that cannot be loaded as it is told."""
    if options.is_remote:
        choose(name, Path(), options)
        return Room(None, 0, 0)
    folder = resolve(options.root)
    config, choice = read_config(folder), choose(name, folder, options)
    if choice.backend != "onnx" and config.n_layers > len(stored_tensors(folder)):  # else the cache is what looks large
        raise DamagedFile(f"`{folder}` misses most of its tensors: its config says n_layers {config.n_layers}")
    n_here = n_processes(choice, options)
    itemsize = 2 if choice.dtype is None else choice.dtype.itemsize
    kv_bytes = options.kv_bytes
    if kv_bytes is None:
        tokens = min(_LEAST_TOKENS, options.context_length or config.max_seq_len)
        halves = config.kv_bytes_per_token  # of numbers of two bytes
        if choice.is_paged and options.draft is not None:  # whose cache is taken at once too
            halves += read_config(resolve(options.draft)).kv_bytes_per_token
        kv_bytes = round(halves / 2 * itemsize * tokens / _KV_SHARE / options.tensor_parallel)
    weights = _MARGIN * _weight_bytes(folder, choice, options) * n_here + _PROCESS_BYTES * (n_here - 1)
    if options.draft is not None:
        weights += _MARGIN * (itemsize if choice.is_paged else 2) * _n_weights(resolve(options.draft))
    return Room(choice.device, round(weights), kv_bytes * n_here)


def n_processes(choice: Choice, options: ModelOptions) -> int:
    """Processes that hold a share of a model in the same memory: on CUDA each has a GPU of its own."""
    return options.tensor_parallel if choice.backend == "sharded" and choice.device == "cpu" else 1


def _weight_bytes(folder: Path, choice: Choice, options: ModelOptions) -> float:
    """Of one process."""
    if choice.backend == "onnx":
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if choice.stay_packed:
        files = [folder] if folder.is_file() else weight_files(folder)
        return sum(file.stat().st_size for file in files)
    assert choice.dtype is not None, choice
    bytes_each = _BYTES_PER_WEIGHT.get(options.quantize or "", choice.dtype.itemsize)
    n_bytes = _n_weights(folder) * bytes_each / options.tensor_parallel
    if options.quantize == "int8":  # the embedding stays as it is, and a head that is tied to it is int8 beside it
        config = read_config(folder)
        n_bytes += config.vocab_size * config.d_model * choice.dtype.itemsize
    return n_bytes


def _n_weights(folder: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())


def free_memory(device: str) -> Memory:
    """Memory that can still be had on `cpu` or `cuda`."""
    return Memory(*torch.cuda.mem_get_info(), "the GPU's") if device == "cuda" else memory()


def require(rooms: Mapping[str, Room], options: Mapping[str, ModelOptions], promised_bytes: int = 0) -> None:
    """Raises MachineRefused where models, by name, do not fit at once into the memory that is free, with the figures.

    promised_bytes: what loaded ones may still grow by.
    """
    for device in sorted({room.device for room in rooms.values() if room.device is not None}):
        here = {name: room for name, room in rooms.items() if room.device == device}
        free, needed = free_memory(device), sum(room.n_bytes for room in here.values())
        if needed <= free.free - promised_bytes:
            continue
        told = sum(room.kv_bytes for name, room in here.items() if options[name].kv_gb is not None)
        left = free.free - promised_bytes - (needed - told)
        names = " and ".join(f"`{name}`" for name in here) if len(here) < 4 else f"{len(here)} models"
        promised = f", {promised_bytes / 1e9:.2f} GB of them promised to loaded models" if promised_bytes else ""
        advice = "serve fewer models, a smaller one, or a quantised one (`--quantize`), or raise the limit"
        if told and left > 0:
            advice = f"lower `--kv-gb`, {told / 1e9:.2f} GB in all, to at most {left / 1e9:.2f}, or leave it out"
        raise MachineRefused(
            f"{names} need{'s' * (len(here) == 1)} {needed / 1e9:.2f} GB, "
            f"{sum(room.weight_bytes for room in here.values()) / 1e9:.2f} to load and "
            f"{sum(room.kv_bytes for room in here.values()) / 1e9:.2f} for KV cache, which is more than the "
            f"{free}{promised}; {advice}"
        )


def kv_budget(
    backend: Backend,
    context: int,
    max_running: int,
    choice: Choice,
    n_sharing: int,
    promised_bytes: int,
    draft: Backend | None = None,
) -> tuple[int, str]:
    """Bytes of KV cache for a process of a model whose weights are in, and why so many, in words.

    Room for every row at full context, or a share of the free memory if that is less: 60 %, and in a small container
    what leaves enough for the work itself. n_sharing: processes that take
    their cache from now on of the same memory, this one included. promised_bytes: what loaded ones may still grow by,
    and others will take for their weights. draft: whose cache comes out of the budget too, as `divided` has it. Raises
    MachineRefused.
    """
    memory = free_memory(choice.device)
    if choice.is_paged and isinstance(backend, ShardedBackend):
        memory = replace(memory, free=backend.least_free_bytes())  # each GPU gets as many pages as the others
    free = memory.free - promised_bytes
    if choice.stay_packed and backend.model is not None:
        free -= packed_bytes(backend.model)  # mapped: they count as free until they are read
    shared = max(0.0, min(free * _KV_SHARE, free - _WORK_BYTES))
    share = int(shared / n_sharing)
    bytes_per_token = backend.bytes_per_token + (0 if draft is None else draft.bytes_per_token)
    wanted = bytes_per_token * backend.capacity_for(context) * max_running
    if share < bytes_per_token * backend.capacity_for(1):
        raise MachineRefused(
            f"{max(free, 0) / 1e9:.2f} GB are free of {memory.whose} {memory.total / 1e9:.2f} GB, too little for a KV "
            "cache; serve fewer models"
        )
    if wanted <= share:
        return wanted, f"{max_running} sequences of {context} tokens"
    among = f", shared by {n_sharing}" if n_sharing > 1 else ""
    left = replace(memory, free=max(0, free))
    return share, f"{shared / left.free:.0%} of the {left}{among}"


def divided(kv_bytes: int, backend: Backend, draft: Backend | None) -> tuple[int, int]:
    """A budget as what the cache of a model gets and what that of its draft on the same GPU does: as many tokens."""
    if draft is None:
        return kv_bytes, 0
    n_tokens = kv_bytes // (backend.bytes_per_token + draft.bytes_per_token)
    return n_tokens * backend.bytes_per_token, n_tokens * draft.bytes_per_token


def give_back_memory() -> None:
    """Return to system and GPU what a model has freed that nobody holds any more."""
    gc.collect()  # modules and threads refer to each other in circles
    give_back_freed()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
