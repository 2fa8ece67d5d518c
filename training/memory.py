"""Fitting a step into memory: smaller microbatches when it runs out, and recomputed activations."""

import contextlib
import ctypes
import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mpt.errors import MachineRefused
from mpt.memory import Memory, memory
from mpt.transformers_model import MPTForCausalLM
from training.distributed import World
from training.logbook import Logbook
from training.run import ActivationCheckpointing, Run

Result = TypeVar("Result")

_PROCESS_BYTES = 300_000_000  # of a rank on CPU beside what it trains: Python, torch
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# What selective checkpointing keeps, since it is dear to compute again: matrix products and attention.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.mpt.documents.default,  # mpt/native_attention.py, which mpt.model imports
    torch.ops.higher_order.flex_attention,  # in a block that is compiled whole
    torch.ops.higher_order.inductor_compiled_code,  # in one that is not, see `_compiled_flex` in mpt/attention.py
}
_FLASH_2 = "_flash_attn_varlen_forward"  # flash-attn 2's, in a namespace that its versions call differently


class Microbatch:
    """How many positions go forward and backward at once: the run's, halved whenever memory ran out.

    The number is written to the run's folder, so that a resumed run begins with what fits.
    """

    def __init__(self, run: Run, world: World) -> None:
        self._path, self._world, self._least = Path(run.out) / "microbatch.json", world, run.row_tokens
        self.positions = run.microbatch_tokens
        if self._path.is_file():
            self.positions = min(self.positions, int(json.loads(self._path.read_text())["positions"]))

    def shrink_to_fit(self, step: Callable[[int], Result], logbook: Logbook) -> Result:
        """The result of step(positions), tried again with half of them while it runs out of memory.

        With several ranks the others wait for a rank that has failed, so it ends instead, and the launcher restarts all
        of them from the last checkpoint. Raises MachineRefused when one sequence does not fit.
        """
        while True:
            try:
                return step(self.positions)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            if self.positions <= self._least:
                raise MachineRefused(
                    f"one sequence of {self._least} tokens does not fit into memory ({reason}); lower --max-seq-len, "
                    "take --activation-checkpointing full, or more GPUs"
                )
            self.positions = max(self._least, self.positions // 2)
            self._path.write_text(json.dumps({"positions": self.positions}))
            logbook.write("memory", positions=self.positions, why=reason)
            if self._world.size > 1:
                raise MachineRefused(f"out of memory ({reason}); the next start tries {self.positions} tokens at once")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is asked for next, in this process, from now on.

    It would give most blocks back to the system and take them anew, page by page: 1.5 million page faults a step of
    MPT-125M, and 0.2 million with this. Larger blocks than 32 MB are still given back: else what training leaves lies
    beside what writing the checkpoint takes. With another C library than glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most there is
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error)


def checkpoint_activations(model: MPTForCausalLM, how: ActivationCheckpointing) -> None:
    """Keep less for the backward pass and compute the rest again.

    `full` keeps each block's input alone, `selective` also matrix products and attention.
    """
    if how == "none":
        return
    context: dict[str, Any] = {}
    if how == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.transformer.blocks:
        # Not by transformers' switch: in 5.20 it checkpoints the call, FSDP's hooks included, around what
        # `training/build.py` compiles, and under a selective checkpoint torch compiles nothing.
        block.forward = _checkpointed(block.forward, context)


def _checkpointed(forward: Callable[..., Tensor], context: dict[str, Any]) -> Callable[..., Tensor]:
    def forward_checkpointed(*args: Any) -> Tensor:
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, **context)
        return out

    return forward_checkpointed


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = op in _KEPT or op.name().rpartition("::")[2] == _FLASH_2
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def available(device: torch.device, n_ranks: int = 1, *, are_here: bool = False) -> Memory:
    """What a rank may take: its whole GPU, or its share of what is free on the machine or in the container.

    are_here: the ranks run already, and of several some may have taken their share before another asks, so that the
    share is of all there is.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Memory(total, total, "the GPU's")
    found = memory()
    if n_ranks == 1:
        return found
    share = (found.total if are_here else found.free) // n_ranks - _PROCESS_BYTES
    return Memory(max(0, share), found.total // n_ranks, f"a rank's share of {found.whose}")


def used_gb(device: torch.device) -> float:
    """The most memory this process has held so far: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
