"""What is kept for the backward pass and what is computed again, with the attention of CUDA; and what is freed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mpt import attention
from mpt.config import MPTConfig
from mpt.transformers_model import MPTForCausalLM
from tests import flash_2
from training import memory


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention on CPU, which refuses gradients that it computes rightly; nothing is compiled before or after."""
    monkeypatch.setattr(attention, "takes_flex", lambda device: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def twelve_layers() -> MPTForCausalLM:
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_heads": 2, "n_layers": 12, "vocab_size": 64, "max_seq_len": 64, "expansion_ratio": 2}
    return MPTForCausalLM(MPTConfig(**shape)).train()


def gradients(model: MPTForCausalLM, rows: int, T: int) -> list[Tensor]:
    """Of rows of two documents and some padding."""
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(64, (rows, T), generator=generator)
    sequence_id = torch.zeros(rows, T, dtype=torch.int64)
    sequence_id[:, T // 3 :] = 1
    sequence_id[0, -7:] = -1
    states = model.hidden_states(ids, sequence_id)
    loss = (states * torch.randn(states.shape, generator=generator))[sequence_id >= 0].sum()
    return list(torch.autograd.grad(loss, list(model.transformer.parameters())))


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_blocks_are_compiled_whole_once_for_all_layers(how: Any, request: pytest.FixtureRequest) -> None:
    """`fullgraph` refuses a break in the graph; the backward pass computes attention again with `full` alone."""
    model = twelve_layers()
    expected = gradients(model, 2, 200)  # by the kernels of the CPU
    request.getfixturevalue("as_on_cuda")
    memory.checkpoint_activations(model, how)
    found: dict[str, list[str]] = {"forward": [], "backward": []}

    def note(where: str) -> Callable[[GraphModule, Any], GraphModule]:
        def compiler(graph: GraphModule, _: Any) -> GraphModule:
            found[where] += [str(node.target) for node in graph.graph.nodes if "flex" in str(node.target)]
            return graph

        return compiler

    backend = aot_autograd(fw_compiler=note("forward"), bw_compiler=note("backward"))
    for block in model.transformer.blocks:
        block.compile(backend=backend, fullgraph=True)
    for one, other in zip(gradients(model, 2, 200), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert counters["stats"]["unique_graphs"] == 1
    again = ["flex_attention"] if how == "full" else []
    assert found == {"forward": ["flex_attention"], "backward": [*again, "flex_attention_backward"]}
    gradients(model, 2, 300)
    for rows, T in ((2, 310), (3, 400)):  # other lengths, other numbers of rows: at most one more compilation each
        gradients(model, rows, T)
    assert counters["stats"]["unique_graphs"] <= 3


@torch.library.custom_op("mpt_tests::stand_in", mutates_args=())
def stand_in(x: Tensor) -> Tensor:
    """For FlexAttention, whose gradients torch does not compile for CPU."""
    computed.append(1)
    return x * 2


computed: list[int] = []
stand_in.register_fake(torch.empty_like)
stand_in.register_autograd(lambda _, gradient: gradient * 2)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize(("how", "times"), [("selective", 1), ("full", 2)])
def test_attention_compiled_for_itself_is_kept_in_blocks_that_are_not(
    how: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention._compiled_flex.cache_clear()
    monkeypatch.setattr(flex_attention, "flex_attention", lambda x: stand_in(x))
    kernel = attention._compiled_flex()
    attention._compiled_flex.cache_clear()
    computed.clear()
    x, weight = torch.ones(4, 4, requires_grad=True), torch.full((4, 4), 0.1, requires_grad=True)
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, memory._policy)} if how == "selective" else {}
    out: Any = checkpoint(lambda x: kernel((x @ weight).sin()).cos(), x, use_reentrant=False, **keep)
    out.sum().backward()
    assert len(computed) == times
    # d/dx cos(2 sin(x w)) by hand: every entry of x w is 0.4, and four of them depend on one of x.
    y = torch.tensor(0.4)
    slope = -(2 * y.sin()).sin() * 2 * y.cos() * 0.1 * 4
    torch.testing.assert_close(x.grad, slope.expand(4, 4))


@pytest.mark.parametrize(("precision", "kernel"), [("bf16", "flash-attn 2"), ("fp32", "FlexAttention")])
def test_on_ampere_all_layers_of_a_bf16_step_share_flash_attn_2s_documents(
    precision: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast decides, as in a step; a stand-in computes. Its gradients are those of the kernels of the CPU."""
    model, ends = twelve_layers(), list[Tensor]()
    monkeypatch.setattr(attention, "takes_flex", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        ends.append(args[3])
        return flash_2.flash_attn_varlen_func(*args, **kwargs)

    flash_2.install(monkeypatch, noted)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert model.transformer.documents_kernel()[0] == kernel
        if kernel == "FlexAttention":
            return
        found = gradients(model, 2, 60)
        assert len(ends) == 12 and all(each is ends[0] for each in ends)
        monkeypatch.setattr(attention, "takes_flex", lambda device: False)
        expected = gradients(model, 2, 60)
    for one, other in zip(found, expected, strict=True):  # bfloat16's 2^-8, over twelve layers
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(other.abs().max()))


@torch.library.custom_op("mpt_tests_flash::_flash_attn_varlen_forward", mutates_args=())
def flash_stand_in(x: Tensor) -> Tensor:
    computed.append(1)
    return x * 2


flash_stand_in.register_autograd(lambda _, gradient: gradient * 2)


@pytest.mark.parametrize(("how", "times"), [("selective", 1), ("full", 2)])
def test_flash_attn_2s_result_is_kept_by_selective_checkpointing(how: str, times: int) -> None:
    """By the name of its operator, which it registers in torch; the namespace differs between its versions."""
    computed.clear()
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, memory._policy)} if how == "selective" else {}
    x = torch.ones(4, requires_grad=True)
    out: Any = checkpoint(lambda x: flash_stand_in(x).cos(), x, use_reentrant=False, **keep)
    out.sum().backward()
    assert len(computed) == times
    torch.testing.assert_close(x.grad, -2 * torch.tensor(2.0).sin().expand(4))


def test_what_is_freed_is_used_again_without_new_pages() -> None:
    code = """
import resource, torch
from training import memory

memory.keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 24, dtype=torch.uint8) for _ in range(4)]  # 16,384 pages
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
