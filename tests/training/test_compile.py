"""What `--compile` compiles: each block in one piece, also where FSDP has split it, and what it refuses."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import mpt.checkpoint
from mpt import attention
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.transformers_model import MPTForCausalLM
from tests import packers
from training import batches, build, step
from training.distributed import World
from training.run import ActivationCheckpointing, Lora, Run

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def split(tmp_path: Path) -> Iterator[World]:
    """One rank that FSDP splits a model over, with all its hooks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dataclasses.replace(ALONE, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of `torch.compile` but the C++ compiler, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(run: Run, world: World, n_batches: int = 1) -> dict[str, Tensor]:
    """The losses and the gradients of so many steps' batches, all rows in one microbatch each."""
    data = batches.load_data(run, batches.load_tokenizer(run), run.data)
    model = build.model(run, world)
    found = {}
    for number in range(n_batches):
        batch = batches.Batches(run, data).get(number)
        found[f"loss {number}"] = torch.tensor(step.accumulate(model, batch, run, world, batch.ids.numel()))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def check(run: Run, world: World, n_graphs: int = 1, n_batches: int = 1) -> None:
    """That blocks are compiled without a break, so often for all of them, and compute what they do uncompiled."""
    expected = gradients(run, world, n_batches)
    assert not counters["stats"]
    found = gradients(dataclasses.replace(run, compile=True), world, n_batches)
    assert found.keys() == expected.keys() and len(found) > 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == n_graphs


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_split_blocks_are_compiled_whole(split: World, small_run: Run, how: ActivationCheckpointing) -> None:
    model = {**small_run.model, "n_layers": 3, "attn_config": {"alibi": True, "qk_ln": True}}
    run = dataclasses.replace(small_run, model=model, precision="bf16", activation_checkpointing=how)
    check(run, split)


@pytest.mark.parametrize("how", ["none", "full"])
def test_blocks_are_compiled_whole_for_other_documents_too(small_run: Run, how: ActivationCheckpointing) -> None:
    """In C the second graph, whose sizes are symbols, is for all; torch's kernel, called for each document, is compiled
    for each batch anew."""
    kernel, _ = attention.documents_kernel(ALONE.device, torch.float32, 16)
    n_graphs = 2 if kernel == "C" else 3
    check(dataclasses.replace(small_run, activation_checkpointing=how), ALONE, n_graphs=n_graphs, n_batches=3)


def test_a_block_and_what_is_left_are_the_parts_that_are_gathered(split: World, small_run: Run) -> None:
    """Hooks of a part run where it is called: within a block they would break its graph."""
    run = dataclasses.replace(small_run, precision="bf16")
    model = build.model(run, split)
    parts = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert parts == ["", "transformer.blocks.0", "transformer.blocks.1"]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.state_dict().keys() == build.model(run, ALONE).state_dict().keys()


@pytest.fixture
def base(tmp_path: Path, small_run: Run) -> Run:
    """A run of adapters over a checkpoint."""
    torch.manual_seed(0)
    config = MPTConfig(d_model=64, n_heads=2, n_layers=3, expansion_ratio=2, vocab_size=384, max_seq_len=512)
    source = mpt.checkpoint.save(MPTForCausalLM(config), tmp_path / "source")
    return dataclasses.replace(small_run, base=str(source), model={}, precision="bf16")


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize(
    "lora", [Lora(rank=4, dropout=0.3), Lora(rank=4, dropout=0.0, bits=4)], ids=["dropout", "four bits"]
)
def test_adapters_are_compiled_with_their_block(
    request: pytest.FixtureRequest, base: Run, lora: Lora, is_split: bool
) -> None:
    """The first block for itself: no gradient goes on from there."""
    world = request.getfixturevalue("split") if is_split else ALONE
    check(dataclasses.replace(base, lora=lora), world, n_graphs=2)


def test_dropout_is_compiled_with_its_block(small_run: Run) -> None:
    check(dataclasses.replace(small_run, model={**small_run.model, "emb_pdrop": 0.2, "resid_pdrop": 0.2}), ALONE)


def test_what_cannot_be_compiled_in_one_piece_is_refused_in_one_line(base: Run, small_run: Run, tmp_path: Path) -> None:
    def expect(words: str, make: Callable[[], Any]) -> None:
        with pytest.raises(UserError, match=words) as found:
            make()
        assert "\n" not in str(found.value) and "`--compile`" in str(found.value)

    expect("`--context-parallel`", lambda: dataclasses.replace(small_run, compile=True, context_parallel=2))
    expect("DoRA", lambda: dataclasses.replace(base, compile=True, lora=Lora(rank=4, dora=True)))
    with_dropout = {**small_run.model, "attn_config": {"alibi": True, "attn_pdrop": 0.1}}
    dropping = dataclasses.replace(small_run, compile=True, model=with_dropout)
    expect("`attn_pdrop`", lambda: build.model(dropping, ALONE))
    assert base.base is not None
    quantization = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}
    packers.write_packed(Path(base.base), tmp_path / "packed", quantization, packers.awq_weight)
    over_packed = dataclasses.replace(base, base=str(tmp_path / "packed"), lora=Lora(rank=4))
    build.model(over_packed, ALONE)
    expect("packed as", lambda: build.model(dataclasses.replace(over_packed, compile=True), ALONE))
