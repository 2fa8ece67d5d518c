"""One step of a run on however many ranks this process is one of: its loss and its gradients, whole."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from training import batches, build, distributed, step
from training.run import Run


def write(run: Run) -> Path:
    """Compute the first step's loss and gradients and write them, on the first rank, beside the run's folder."""
    path = Path(run.out).with_suffix(".safetensors")
    data = batches.load_data(run, batches.load_tokenizer(run), run.data)
    batch = batches.Batches(run, data).get(0)
    with distributed.join(run) as world:
        model = build.model(run, world)
        torch.manual_seed(3)
        loss = step.accumulate(model, batch, run, world, run.microbatch_tokens)
        held_out = step.mean_loss(model.eval(), batch, run, world, run.microbatch_tokens)
        found = {"loss": torch.tensor(loss), "held_out": torch.tensor(held_out)}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad
                found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if world.is_first:
            save_file(found, path)
        world.barrier()
    return path


def read(run: Run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.out).with_suffix(".safetensors"))
