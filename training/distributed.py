"""The ranks of a run: joining them, sharding a model over them (FSDP2), and sums across them.

A process without torchrun's variables is a world of one: no process group, nothing sharded, the same loop. Ranks see
only RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, so torchrun, Ray Train and Kubeflow are launchers of the same `fit`.
"""

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from mpt.processors import obey_quota
from mpt.transformers_model import MPTForCausalLM
from training.run import Run

_TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer for the others gives up, and is restarted


@dataclass(frozen=True)
class Context:
    """This process among the n ranks that compute the same rows, each a part of their positions."""

    rank: int
    n: int
    group: "dist.ProcessGroup"


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # None in a world of one; 2-D, replicas first, where there are some
    background: "dist.ProcessGroup | None" = None  # for the thread that writes checkpoints, and for it alone
    context: Context | None = None  # None where each rank has rows of its own

    @property
    def sharing(self) -> int:
        """How many ranks compute the same rows."""
        return 1 if self.context is None else self.context.n

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the ranks, in float64 on the CPU."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, value: int) -> int:
        """The first rank's value."""
        return int(self.sum(value if self.is_first else 0)[0])

    def object_from_first(self, value: Any) -> Any:
        """The first rank's value, of any kind that is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        self.sum(0)


@contextlib.contextmanager
def join(run: Run | None = None) -> Iterator[World]:
    """Meet the other ranks, if there are any, and leave them in the end.

    run: how they share a model and its rows. Raises UserError for a number of ranks that cannot be divided so.
    """
    replicas, context_parallel = (1, 1) if run is None else (run.replicas, run.context_parallel)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    if run is not None:
        run.check_ranks(size)
    if has_gpu:
        torch.cuda.set_device(device)
    else:
        obey_quota()
    if size == 1:
        yield World(rank, size, device)
        return
    if rank:
        logging.getLogger("training").setLevel(logging.ERROR)  # the first rank says it
    store, _, _ = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    # torchrun keeps one store over its restarts, where a restarted rank would read dead peers' addresses.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        shape, names = (
            ((size,), ("shares",)) if replicas == 1 else ((replicas, size // replicas), ("replicas", "shares"))
        )
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        context = None
        if context_parallel > 1:
            groups = init_device_mesh(device.type, (size // context_parallel, context_parallel))
            context = Context(rank % context_parallel, context_parallel, groups.get_group(1))
        yield World(rank, size, device, mesh, dist.new_group(backend="gloo"), context)
    finally:
        dist.destroy_process_group()


def shard_block(block: nn.Module, run: Run, world: World) -> None:
    """Split a block's matrices, their gradients and optimizer state over the ranks; gathered when it is computed.

    They are one group, whose hooks run before and after the block: within, `torch.compile` finds none of them. They are
    gathered as they are multiplied: in bfloat16 in a bf16 run, to which autocast rounds them in a world of one too.
    Autocast leaves norms in float32, so they are left to `shard_root`. Beside adapters the matrices are stored as they
    are multiplied; of the adapters peft reads more than autocast rounds.
    """
    if world.mesh is not None:
        is_rounded = run.precision == "bf16" and run.lora is None
        norms = {p for norm in _norms(block) for p in norm.parameters()}
        _shard(block, world, torch.bfloat16 if is_rounded else None, norms)


def shard_root(model: MPTForCausalLM, world: World) -> None:
    """Split what is left of a model whose blocks are split already: embeddings and norms, gathered in float32."""
    if world.mesh is None:
        return
    # FSDP does not look for parameters inside of modules that it has split, but finds those of the blocks' norms here.
    model.norms = nn.ModuleList(_norms(model))
    _shard(model, world)
    del model.norms
    register_fsdp_forward_method(model, "hidden_states")


def _norms(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if isinstance(each, nn.LayerNorm)]


def _shard(
    module: nn.Module,
    world: World,
    gathered_in: torch.dtype | None = None,
    left_out: Set[nn.Parameter] = frozenset(),
) -> None:
    """Make one group of what is not in one yet. gathered_in: None for the parameters' own dtype."""
    policy = MixedPrecisionPolicy(
        param_dtype=gathered_in,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast decides, as in a world of one
    )
    quantised = {p for p in module.parameters() if not p.is_floating_point()}  # whole on each
    fully_shard(module, mesh=world.mesh, mp_policy=policy, ignored_params=quantised | left_out)
    assert isinstance(module, FSDPModule)
    # Gradients are summed, not averaged: a step's loss is already divided by the tokens of all ranks.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def free(model: MPTForCausalLM) -> None:
    """Let go of what was gathered for a forward pass that no backward pass follows, so that parameters are shares."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: MPTForCausalLM, world: World, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every trained parameter, whole and on the CPU, by name; on the first rank, empty on the others.

    One parameter is whole on a GPU at a time.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if world.is_first:
                found[name] = value.to(dtype).cpu()
    return found
