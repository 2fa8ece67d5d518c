"""The math of a run against the published tables and the model itself."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from mpt import attention
from mpt.config import MPTConfig
from mpt.errors import UserError
from mpt.transformers_model import MPTForCausalLM
from training import memory, packing, plan, recipes
from training.data.rows import Sample
from training.plan import GPUS, Shape
from training.run import Lora

# llm-foundry `scripts/train/benchmarking/README.md`, one node of 8 A100-80 (H100-80 for the last three): MFU in per
# cent and tokens/s on each GPU. Its models have learned positions and no biases; the table is under 0.3 % of N.
PUBLISHED = [
    ("mpt_125m", 2048, "a100-80", 44.8, 142_830),
    ("mpt_350m", 2048, "a100-80", 51.6, 58_782),
    ("mpt_760m", 2048, "a100-80", 56.9, 32_434),
    ("mpt_1b", 2048, "a100-80", 59.9, 20_513),
    ("mpt_7b", 2048, "a100-80", 64.2, 4_641),
    ("mpt_7b", 8192, "a100-80", 54.5, 3_206),
    ("mpt_7b", 65536, "a100-80", 47.0, 1_013),
    ("mpt_13b", 2048, "a100-80", 59.6, 2_262),
    ("mpt_30b", 2048, "a100-80", 55.3, 916),
    ("mpt_1b", 2048, "h100", 41.8, 45_455),
    ("mpt_7b", 2048, "h100", 46.4, 10_643),
    ("mpt_7b", 65536, "h100", 28.6, 1_956),
]


def shape(recipe: str) -> Shape:
    return plan.shape_of_model(recipes.pretrain("d", "o", "t", 50_368, recipe).model)


@pytest.mark.parametrize(("recipe", "length", "gpu", "mfu", "speed"), PUBLISHED)
def test_published_speeds_give_the_published_mfu(recipe: str, length: int, gpu: str, mfu: float, speed: int) -> None:
    reached = speed * shape(recipe).flops_per_token(length) / (GPUS[gpu].peak_tflops * 1e12)
    assert reached == pytest.approx(mfu / 100, rel=0.02)


@pytest.mark.parametrize("qk_ln", [False, True])
@pytest.mark.parametrize("no_bias", [False, True])
@pytest.mark.parametrize("kv_n_heads", [4, 2])
@pytest.mark.parametrize("alibi", [False, True])
def test_parameters_are_the_models(qk_ln: bool, no_bias: bool, kv_n_heads: int, alibi: bool) -> None:
    attention = {"alibi": alibi, "qk_ln": qk_ln}
    if kv_n_heads != 4:
        attention |= {"attn_type": "grouped_query_attention", "kv_n_heads": kv_n_heads}  # type: ignore[dict-item]
    config = MPTConfig(
        d_model=64, n_heads=4, n_layers=3, vocab_size=256, max_seq_len=32, expansion_ratio=2, no_bias=no_bias,
        attn_config=attention,
    )  # fmt: skip
    with torch.device("meta"):
        model = MPTForCausalLM(config)
    assert Shape.of(config).n_parameters == sum(p.numel() for p in model.parameters())


def test_lion_with_checkpointing_needs_about_12_gb_a_billion_parameters() -> None:
    # llm-foundry's rule for all GPUs together: parameters, gradients and Lion's one moment, 4 bytes each.
    run = recipes.pretrain("d", "o", "t", 50_432, "mpt_7b", optimizer="lion")
    found = plan.memory(shape("mpt_7b"), run, 8)
    states = 8 * (found.parameters + found.gradients + found.optimizer)
    assert states / 1e9 == pytest.approx(12 * 6.65, rel=0.1)


def test_a_steps_flops_count_useful_tokens_and_their_own_attention() -> None:
    batch = packing.pack([Sample([1] * n, [True] * n) for n in (5, 3, 2)], 7)
    assert packing.squared_lengths(batch) == 25 + 9 + 4
    small = Shape(d_model=8, n_heads=2, n_layers=3, vocab_size=10)
    # 6 N a token; per layer 2 d T^2 forward for causal scores and values together, thrice that with the backward.
    assert plan.step_flops(small, 10, 38) == 6 * small.n_parameters * 10 + 3 * 3 * 2 * 8 * 38
    assert plan.peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert plan.peak_tflops("NVIDIA H200") == 989.5
    assert plan.peak_tflops("NVIDIA GeForce GTX 1080") is None
    assert plan.peak_tflops("NVIDIA RTX A1000 Laptop GPU") is None  # no A100, though its letters say so


def test_memory_shrinks_with_gpus_checkpointing_and_adapters() -> None:
    run = recipes.pretrain("d", "o", "t", 50_432, "mpt_7b", activation_checkpointing="none")
    shape7 = shape("mpt_7b")
    one, eight = plan.memory(shape7, run, 1), plan.memory(shape7, run, 8)
    assert one.optimizer == 8 * eight.optimizer and one.mask == eight.mask
    assert one.parameters == 4 * shape7.n_parameters
    full = recipes.change(run, activation_checkpointing="full")
    # By hand: 32 blocks' inputs of 4 x 4,096 bytes a token, and one block's own 36 x 4,096.
    for n_gpus in (1, 8):
        assert plan.memory(shape7, full, n_gpus).activations == 2048 * (32 * 4 * 4096 + 36 * 4096)
    # Two blocks of 12 x 4,096^2 and two norms in bfloat16; embedding and last norm in float32, and their gradients.
    gathered = 2 * 2 * (12 * 4096**2 + 2 * 4096) + 2 * 4 * (50_432 + 1) * 4096
    assert plan.memory(shape7, full, 8).weights_at_work == gathered
    # Two replicas of 8 GPUs are each split over 4; 4 ranks that share a sequence hold a fourth of it each.
    halves = recipes.change(full, replicas=2)
    assert plan.memory(shape7, halves, 8).optimizer == plan.memory(shape7, full, 4).optimizer
    shared = recipes.change(full, context_parallel=4)
    assert plan.memory(shape7, shared, 8).activations * 4 == plan.memory(shape7, full, 8).activations
    # Rows of 65,536 tokens have 512 x 512 tiles of 16 bytes, once for all blocks; all pairs were 43 GB.
    long = recipes.change(run, max_seq_len=65_536)
    assert plan.memory(shape7, long, 1, 2).mask == 2 * 512 * 512 * 16
    lora = recipes.finetune("mpt-7b", "d", "o", lora=Lora(rank=16, targets=("Wqkv",)))
    trained = 32 * 16 * (4096 + 3 * 4096)
    assert plan.memory(shape7, lora, 1).gradients == 4 * trained
    # By hand: 32 blocks of 12 x 4,096^2 and two norms with no biases, in 2 bytes or 4.127 bits; the rest in 4 bytes.
    blocks = 32 * (12 * 4096**2 + 2 * 4096)
    outside = 4 * (shape7.n_parameters - blocks + trained)
    assert plan.memory(shape7, lora, 8).parameters == (outside + 2 * blocks) / 8
    assert lora.lora is not None
    dora = recipes.change(lora, lora=dataclasses.replace(lora.lora, dora=True))
    assert plan.memory(shape7, dora, 1).gradients == 4 * (trained + 32 * 3 * 4096)  # a length for each row of Wqkv
    qlora = recipes.change(lora, lora=dataclasses.replace(lora.lora, bits=4))
    assert plan.memory(shape7, qlora, 8).parameters == pytest.approx(outside / 8 + 4.127 / 8 * blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_n_heads", [4, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_are_what_blocks_keep(
    precision: Any, checkpointing: Any, kv_n_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by torch's hooks, with FlexAttention, which on CPU refuses gradients that it computes rightly."""
    monkeypatch.setattr(attention, "takes_flex", lambda device: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    d, T = 256, 384
    config = MPTConfig(
        d_model=d, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=T, no_bias=True,
        attn_config={"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": kv_n_heads},
    )  # fmt: skip
    model = MPTForCausalLM(config).train()
    memory.checkpoint_activations(model, checkpointing)
    documents = attention.Documents(torch.zeros(1, T, dtype=torch.int64), scale=0.125)
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Tensor) and T in tensor.shape:  # others are weights, masks
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, T, d, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        for block in model.transformer.blocks:
            x = block(x, lambda _, q, k, v: documents.attend(q, k, v))
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    model_keys = {"d_model": d, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": T}
    run = recipes.change(
        recipes.pretrain("d", "o", "t", 64, "mpt_125m"),
        model=model_keys, max_seq_len=T, precision=precision, activation_checkpointing=checkpointing,
    )  # fmt: skip
    planned = plan.memory(Shape.of(config), run, 1)
    blocks = planned.activations
    if checkpointing == "full":  # and one block's own
        blocks -= plan.memory(Shape.of(config), recipes.change(run, activation_checkpointing="none"), 1).activations / 2
    assert counted == pytest.approx(blocks, rel=0.02)  # beside it: statistics of norms and softmax, a number a row


def test_what_fits_and_what_does_not() -> None:
    run = recipes.pretrain("d", "o", "t", 50_432, "mpt_7b")
    assert plan.fitting(shape("mpt_7b"), run, GPUS["a100-40"], 1) == 0
    assert plan.fitting(shape("mpt_7b"), run, GPUS["a100-40"], 8) >= 1
    assert plan.fitting(shape("mpt_125m"), run, GPUS["a10g"], 1) >= 1


def test_recipes_have_their_published_numbers() -> None:
    story = recipes.storywriter("mpt-7b", "novels", "out")
    assert (story.steps, story.global_batch, story.max_seq_len, story.optimizer) == (2500, 32, 65_536, "lion")
    assert story.model["attn_config"] == {"alibi_bias_max": 16, "clip_qkv": 6}
    released = recipes.mpt_7b_released("data", "out", "tok", 50_277)
    assert (released.global_batch, released.optimizer, released.model["vocab_size"]) == (1760, "lion", 50_432)
    assert released.steps == pytest.approx(277_000, rel=0.01)
    assert recipes.instruct_30b("mpt-30b", "d", "o").lr == 9.65e-6
    assert recipes.chat("mpt-7b", "d", "o").prompt_style == "chatml"
    assert recipes.mpt_1b_redpajama_200b("d", "o", "t", 50_277).model["attn_config"]["qk_ln"] is True
    with pytest.raises(UserError, match="mpt_760m"):
        recipes.pretrain("d", "o", "t", 1, "mpt_2b")
