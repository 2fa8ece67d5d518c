"""A model over the tokens of a step laid end to end, in torch: what the backends for CPU and for CUDA share.

Not here: attention and the cache, which are the backend's own.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from mpt.backends.backend import Work
from mpt.lora import Adapter, adaptable
from mpt.model import Attend, MPTLanguageModel
from mpt.transfer import to_device


class PackedModel:
    """A model over the tokens of a step laid end to end, each with its adapter beside it; the cache is its caller's."""

    def __init__(self, model: MPTLanguageModel, run: Callable[..., Tensor] | None = None) -> None:
        """run: what runs the blocks, `model.transformer.run` if None."""
        self.model = model
        self._run_blocks = run or model.transformer.run
        self._adapted: list[tuple[Adapter, Tensor | None]] = []  # and the tokens of the step it is for, None for all
        self._has_hooks = False  # until the first adapter: a hook costs each projection 10 us a step

    def run(self, work: Sequence[Work], attend: Attend, n_extra: int = 0) -> Tensor:
        """The logits asked for, as `Backend.forward` gives them; sums of hidden states to who wants them.

        attend: over (1, H, N + n_extra, D), the last n_extra of which mean nothing.
        """
        transformer = self.model.transformer
        device = transformer.norm_f.weight.device
        tokens = [token for item in work for token in item.tokens]
        ids = to_device(torch.tensor(tokens + [0] * n_extra), device)[None]  # (1, N)
        positions = None
        if transformer.wpe is not None:
            places = [at for item in work for at in range(item.row.length, item.row.length + len(item.tokens))]
            positions = to_device(torch.tensor(places + [0] * n_extra), device)[None]
        self._adapted = _by_adapter(work, device)
        if self._adapted and not self._has_hooks:
            self._has_hooks = True
            for name, module in adaptable(self.model):
                module.register_forward_hook(self._beside(name))
        try:
            hidden = self._run_blocks(transformer.wte(ids), attend, positions)[0]  # (N, C)
        finally:
            self._adapted = []
        ends = list(itertools.accumulate(len(item.tokens) for item in work))
        wanted = [hidden[end - item.n_logits : end] for item, end in zip(work, ends, strict=True)]
        # Rows in one piece: they may come transposed (mpt.model.Linear), and sampling reads each row many times.
        logits = self.model.unembed(torch.cat(wanted)).to(torch.float32, memory_format=torch.contiguous_format)
        for item, end in zip(work, ends, strict=True):
            if item.hidden is not None:
                item.hidden.append(hidden[end - len(item.tokens) : end].sum(0, dtype=torch.float32))
        return logits

    def _beside(self, name: str) -> Callable[[Module, tuple[Tensor], Tensor], None]:
        """Adds to a projection's output what the step's adapters make of its input."""

        def add(_: Module, inputs: tuple[Tensor], output: Tensor) -> None:
            for adapter, tokens in self._adapted:
                pair = adapter.pairs.get(name)
                if pair is None:
                    continue
                a, b = pair
                if tokens is None:
                    output += inputs[0] @ a.t() @ b.t()
                else:
                    output[:, tokens] += inputs[0][:, tokens] @ a.t() @ b.t()

        return add


def _by_adapter(work: Sequence[Work], device: torch.device) -> list[tuple[Adapter, Tensor | None]]:
    """Each adapter of a step with the places of its tokens in it; None where they are all of them."""
    owners = [item.adapter for item in work for _ in item.tokens]
    found = []
    for adapter in dict.fromkeys(owners):
        if adapter is not None:
            places = [at for at, owner in enumerate(owners) if owner is adapter]
            whole = len(places) == len(owners)
            found.append((adapter, None if whole else to_device(torch.tensor(places), device)))
    return found
