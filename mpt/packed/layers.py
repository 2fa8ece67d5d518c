"""A model whose matrices stay packed: layers that unpack some rows at a time while they multiply.

Right on every machine, in the memory of the packed matrices and of one piece. Not here: what a matrix is packed as
(`matrix.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpt.errors import UserError
from mpt.model import MPTLanguageModel, product
from mpt.packed.matrix import PackedMatrix, PackedTensor, Weight


class PackedLinear(nn.Linear):
    """A projection whose weight (n_out, n_in) stays packed, in place of the one it is made of."""

    def __init__(self, linear: nn.Linear, matrix: PackedMatrix) -> None:
        nn.Module.__init__(self)  # nothing of nn.Linear's: its weight is a parameter, which packed integers cannot be
        self.matrix = matrix
        self.bias = linear.bias
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its shape without values, for peft, which asks every layer for it."""
        return torch.empty(self.matrix.shape, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _Product.apply(x, self.matrix)
        return out if self.bias is None else out + self.bias


class PackedEmbedding(nn.Embedding):
    """An embedding (vocabulary, C) that stays packed; rows are unpacked when they are looked up."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.matrix, self.dtype = matrix, dtype
        self.num_embeddings, self.embedding_dim = matrix.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.pick(ids.reshape(-1)).to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedEmbedding":
        """Of `.to(dtype)`: what it gives from now on; the matrix stays."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class _Product(torch.autograd.Function):
    """x W^T, whose gradient unpacks W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        out = x.new_empty(*x.shape[:-1], matrix.shape[0])
        for rows, values in matrix.pieces():
            out[..., rows] = product(x, values.to(x.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        found = gradient.new_zeros(*gradient.shape[:-1], ctx.matrix.shape[1], dtype=torch.float32)
        for rows, values in ctx.matrix.pieces():
            found += gradient[..., rows] @ values.to(gradient.dtype)
        return found.to(gradient.dtype), None


Pack = Callable[[str, Weight], PackedMatrix | None]  # of a module's name and its weight; None: it stays as it is


def as_it_lies(name: str, weight: Weight) -> PackedMatrix | None:
    """A weight that is packed, mapped from its file; None for another one."""
    return weight.open(mapped=True) if isinstance(weight, PackedTensor) and weight.packed_bytes else None


def put_into(
    model: MPTLanguageModel,
    weights: Mapping[str, Weight],
    device: torch.device | str,
    dtype: torch.dtype,
    pack: Pack = as_it_lies,
) -> None:
    """Give a model packed matrices, in place; the model may be on the meta device.

    weights: where each parameter is stored. dtype: of what an embedding gives. pack: makes a matrix of a module's name
    and its weight, or None where the module stays as it is.
    """
    for name, module in list(model.named_modules()):
        weight = weights.get(f"{name}.weight")
        if weight is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        is_embedding = isinstance(module, nn.Embedding)
        matrix = pack(name, weight)
        if matrix is None or (is_embedding and matrix.step != 1):  # of which single rows cannot be had
            continue
        matrix = matrix.to(device)
        parent, _, key = name.rpartition(".")
        made = PackedEmbedding(matrix, dtype) if is_embedding else PackedLinear(_linear(module), matrix)
        setattr(model.get_submodule(parent), key, made)
    wte = model.transformer.wte
    if model.config.tie_word_embeddings and isinstance(wte, PackedEmbedding):
        model.lm_head = PackedLinear(model.lm_head, wte.matrix)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear), module
    return module


def tie_weights(model: MPTLanguageModel) -> None:
    """As `model.tie_weights`, for a model whose embedding may be packed, and so be its head already."""
    if not isinstance(model.transformer.wte, PackedEmbedding):
        model.tie_weights()


def packed_bytes(model: nn.Module) -> int:
    """What the packed matrices of a model take, each once."""
    layers = (module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding))
    return sum({id(layer.matrix): layer.matrix.n_bytes for layer in layers}.values())


def packed_kinds(model: nn.Module) -> tuple[str, ...]:
    """What the projections of a model are packed as, each kind once."""
    kinds = [module.matrix.kind for module in model.modules() if isinstance(module, PackedLinear)]
    return tuple(dict.fromkeys(kinds))


def refuse_to_save(model: nn.Module) -> None:
    """Raises UserError for a model whose matrices are packed: it has no weights that other tools read."""
    if packed_bytes(model):
        raise UserError("the model's matrices are packed, so it cannot be saved; load it without `pack`")
