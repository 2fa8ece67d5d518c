"""The model against transformers' in-tree MPT where that is right, and against a plain float64 formula where it is not.

The formula below is written from llm-foundry's description and uses nothing of `mpt`. The model runs in float64 too
where that tells a wrong formula from rounding.
"""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, MptConfig, MptForCausalLM, StaticCache

from mpt import attention
from mpt.config import MPTConfig
from mpt.errors import UnsupportedConfig
from mpt.model import Linear
from mpt.transformers_model import MPTForCausalLM

V = 97
# Two float64 computations of logits of size 10 in another order. ALiBi's bias is float32 by design: exact for 4 and 8
# heads, else off by 6e-8 of itself, among scores of up to 40 (2e-6 at most when measured).
EXACT, EXACT_TO_FLOAT32_BIAS = 1e-10, 1e-5
# float32's 6e-8 on scores of up to 40 and logits of up to 20, through 2 layers. The issue's own bound.
FLOAT32 = 1e-4


def config_of(n_heads: int = 4, **changes: Any) -> MPTConfig:
    """Two layers, 8 wide a head; `attn_config` among the changes as a whole."""
    shape = {"d_model": 8 * n_heads, "n_heads": n_heads, "n_layers": 2, "vocab_size": V, "max_seq_len": 128}
    return MPTConfig(**{**shape, **changes})


def model_of(config: MPTConfig, seed: int = 0) -> MPTForCausalLM:
    """A model in which every parameter matters: norms are not 1, biases not 0, some of q, k and v exceed 6."""
    torch.manual_seed(seed)
    model = MPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "_ln" in name or name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
            elif "Wqkv" in name:
                parameter *= 2.5
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def press_slopes(n_heads: int, bias_max: float) -> list[float]:
    """`get_slopes` of the ALiBi paper's code, with its fixed 8 made a parameter."""
    if n_heads & (n_heads - 1) == 0:
        return [2 ** (-bias_max * (i + 1) / n_heads) for i in range(n_heads)]
    closest = 2 ** math.floor(math.log2(n_heads))
    return press_slopes(closest, bias_max) + press_slopes(2 * closest, bias_max)[0::2][: n_heads - closest]


def formula(raw: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (T, V) of one sequence in float64, from a config's keys and a checkpoint's tensors."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    attn = raw["attn_config"]
    C, H, T = raw["d_model"], raw["n_heads"], len(ids)
    D = C // H
    n_kv = {"multihead_attention": H, "multiquery_attention": 1}.get(attn["attn_type"]) or attn["kv_n_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + raw["norm_eps"]).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(()))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    x = w["transformer.wte.weight"][ids]
    if not attn["alibi"]:
        x = x + w["transformer.wpe.weight"][:T]
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]  # i - j
    for layer in range(raw["n_layers"]):
        block = f"transformer.blocks.{layer}"
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.Wqkv")
        if attn["clip_qkv"]:
            qkv = qkv.clip(-attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = qkv[:, :C], qkv[:, C : C + n_kv * D], qkv[:, C + n_kv * D :]
        if attn["qk_ln"]:
            q, k = norm(q, f"{block}.attn.q_ln"), norm(k, f"{block}.attn.k_ln")
        q = q.view(T, H, D).transpose(0, 1)  # (H, T, D)
        served = torch.arange(H) // (H // n_kv)  # the key head of each query head
        k, v = (t.view(T, n_kv, D).transpose(0, 1)[served] for t in (k, v))
        scores = q @ k.transpose(1, 2) * (attn["softmax_scale"] or 1 / math.sqrt(D))
        if attn["alibi"]:
            slopes = torch.tensor(press_slopes(H, attn["alibi_bias_max"]), dtype=torch.float64)
            scores = scores - slopes[:, None, None] * distance
        weight = torch.where(distance >= 0, scores - scores.detach().amax(-1, keepdim=True), -torch.inf).exp()
        heads = weight / weight.sum(-1, keepdim=True) @ v
        x = x + linear(heads.transpose(0, 1).reshape(T, C), f"{block}.attn.out_proj")
        up = linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
        gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        x = x + linear(gelu, f"{block}.ffn.down_proj")
    head = w["transformer.wte.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    scale = raw["logit_scale"]
    return norm(x, "transformer.norm_f") @ head.T * (C**-0.5 if scale == "inv_sqrt_d_model" else scale or 1.0)


def formula_of(model: MPTForCausalLM, ids: Tensor, **changes: Any) -> Tensor:
    """The formula with a model's weights and its config as it would be written, but for `changes`."""
    raw = model.config.to_dict()
    raw["attn_config"] = {**raw["attn_config"], **changes.pop("attn_config", {})}
    return formula({**raw, **changes}, dict(model.state_dict(keep_vars=True)), ids)


GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
# What is switched on, and what switches it off again in the formula (where the weights allow it).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "alibi_bias_max 16": ({"attn_config": {"alibi_bias_max": 16}}, {"attn_config": {"alibi_bias_max": 8}}),
    "clip_qkv 6": ({"attn_config": {"clip_qkv": 6}}, {"attn_config": {"clip_qkv": None}}),
    "storywriter": ({"attn_config": {"clip_qkv": 6, "alibi_bias_max": 16}}, {"attn_config": {"clip_qkv": None}}),
    "qk_ln": ({"attn_config": {"qk_ln": True}}, {"attn_config": {"qk_ln": False}}),
    "clip, then qk_ln": ({"attn_config": {"qk_ln": True, "clip_qkv": 2.5}}, {"attn_config": {"clip_qkv": None}}),
    "grouped-query heads": ({"attn_config": GROUPED}, None),
    "grouped-query heads and qk_ln": ({"attn_config": {**GROUPED, "qk_ln": True}}, {"attn_config": {"qk_ln": False}}),
    "multi-query heads": ({"attn_config": {"attn_type": "multiquery_attention"}}, None),
    "biases": ({"no_bias": False}, None),
    "12 heads": ({"n_heads": 12}, None),
    "24 heads": ({"n_heads": 24}, None),
    "40 heads": ({"n_heads": 40}, None),
    "12 heads, bias_max 16": ({"n_heads": 12, "attn_config": {"alibi_bias_max": 16}}, None),
    "logit_scale": ({"logit_scale": 0.3}, {"logit_scale": None}),
    "logit_scale inv_sqrt_d_model": ({"logit_scale": "inv_sqrt_d_model"}, {"logit_scale": None}),
    "softmax_scale": ({"attn_config": {"softmax_scale": 0.1}}, {"attn_config": {"softmax_scale": None}}),
    "untied head": ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    "learned positions": ({"attn_config": {"alibi": False}}, {"attn_config": {"alibi": True}}),
    "expansion_ratio 3": ({"expansion_ratio": 3}, None),
    "expansion_ratio 1.5": ({"expansion_ratio": 1.5}, None),
    "norm_eps": ({"norm_eps": 0.1}, {"norm_eps": 1e-5}),
    "all together": (
        {
            "n_heads": 8, "no_bias": False, "expansion_ratio": 3, "tie_word_embeddings": False, "logit_scale": 0.5,
            "attn_config": {**GROUPED, "clip_qkv": 4, "qk_ln": True, "alibi_bias_max": 16, "softmax_scale": 0.2},
        },
        None,
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def variant(request: pytest.FixtureRequest) -> MPTForCausalLM:
    return model_of(config_of(**CASES[request.param][0]))


def tolerance(model: MPTForCausalLM) -> float:
    n_heads = model.config.n_heads
    return EXACT if n_heads & (n_heads - 1) == 0 else EXACT_TO_FLOAT32_BIAS


# -- against the formula ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_the_formula(variant: MPTForCausalLM) -> None:
    ids = random_ids(29)
    expected = formula_of(variant, ids)
    torch.testing.assert_close(variant(ids[None]).logits[0].double(), expected, rtol=0, atol=FLOAT32)
    wide = variant.double()
    torch.testing.assert_close(wide(ids[None]).logits[0], expected, rtol=0, atol=tolerance(wide))


@pytest.mark.parametrize("name", [name for name, (_, off) in CASES.items() if off is not None])
def test_the_formula_tells_each_setting_from_its_absence(name: str) -> None:
    on, off = CASES[name]
    assert off is not None
    if name == "learned positions":
        on = {**on, "attn_config": {"alibi": False}}
    model, ids = model_of(config_of(**on)), random_ids(29)
    assert (formula_of(model, ids) - formula_of(model, ids, **off)).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("n_pad", [5, 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(variant: MPTForCausalLM, side: str, n_pad: int) -> None:
    model, T = variant.double(), 29
    rows = random_ids(2, T)
    real = T - n_pad
    short = rows[0, :real].clone()
    at = slice(n_pad, T) if side == "left" else slice(0, real)
    rows[0] = 0
    rows[0, at] = short
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0] = 0
    mask[0, at] = 1
    logits = model(rows, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, at], formula_of(model, short), rtol=0, atol=tolerance(model))
    torch.testing.assert_close(logits[1], formula_of(model, rows[1]), rtol=0, atol=tolerance(model))


@torch.no_grad()
def test_reading_in_pieces_is_one_forward(variant: MPTForCausalLM) -> None:
    """Prefill, chunked prefill and decode through the cache, the first row left-padded by 10."""
    model, rows, n_pad = variant.double(), random_ids(2, 29), 10
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[0, :n_pad] = 0
    cache, got, start = DynamicCache(), [], 0
    for end in (8, 13, 14, 15, 16, 28, 29):
        got.append(model(rows[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    logits = torch.cat(got, 1)
    torch.testing.assert_close(logits[0, n_pad:], formula_of(model, rows[0, n_pad:]), rtol=0, atol=tolerance(model))
    torch.testing.assert_close(logits[1], formula_of(model, rows[1]), rtol=0, atol=tolerance(model))


PACKED = torch.tensor([[0] * 5 + [1] * 9 + [2] + [-1] * 5, [4] * 20, [-1] * 2 + [0] * 8 + [1] * 10])


def test_packed_documents_are_each_document_alone(variant: MPTForCausalLM) -> None:
    """Forward and backward: no document, and no padding, leaves a trace in another's logits or gradients."""
    model, rows = variant.double(), random_ids(3, 20)
    logits = model(rows, sequence_id=PACKED).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = expected_loss = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        for document in range(PACKED[row].max() + 1):
            at = PACKED[row] == document
            if not at.any():
                continue
            alone = formula_of(model, rows[row, at])
            torch.testing.assert_close(logits[row, at], alone, rtol=0, atol=tolerance(model))
            loss = loss + (logits[row, at] * weight[row, at]).sum()
            expected_loss = expected_loss + (alone * weight[row, at]).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(expected_loss, parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        # Gradients add up 60 positions' terms, each up to 100.
        assert torch.allclose(one, other, rtol=1e-6, atol=1000 * tolerance(model)), name


@torch.no_grad()
def test_positions_beyond_max_seq_len(variant: MPTForCausalLM) -> None:
    config = copy.deepcopy(variant.config)
    config.max_seq_len = 16
    model = MPTForCausalLM(config).eval().double()
    ids = random_ids(50)
    if config.has_wpe:
        with pytest.raises(ValueError, match="position 49 is beyond the 16 learned ones"):
            model(ids[None])
        return
    model.load_state_dict(variant.double().state_dict())
    expected = formula_of(model, ids)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=0, atol=tolerance(model))
    cache = DynamicCache()
    model(ids[None, :15], past_key_values=cache)
    for t in range(15, 20):  # over the border, a token at a time
        logits = model(ids[None, t : t + 1], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(logits, expected[t], rtol=0, atol=tolerance(model))


@torch.no_grad()
def test_learned_positions_of_packed_documents_start_anew() -> None:
    model = model_of(config_of(attn_config={"alibi": False})).double()
    rows, sequence_id = random_ids(1, 12), torch.tensor([[0] * 5 + [1] * 7])
    expected = formula_of(model, rows[0, 5:])
    torch.testing.assert_close(model(rows, sequence_id=sequence_id).logits[0, 5:], expected, rtol=0, atol=EXACT)


@torch.no_grad()
def test_bfloat16_is_near_the_formula() -> None:
    model = model_of(config_of(n_heads=8, attn_config={"alibi_bias_max": 16, "clip_qkv": 6})).bfloat16()
    ids = random_ids(60)
    expected = formula_of(model, ids)
    cache = DynamicCache()
    logits = torch.cat(
        [model(ids[None, a:b], past_key_values=cache).logits[0] for a, b in ((0, 40), (40, 59), (59, 60))]
    )
    error = (logits.double() - expected).abs()
    # bfloat16 rounds to 2^-9 = 0.2 %; about 8 roundings a layer of states of size 1 to 5 make 1 to 2 % of a logit.
    assert error.mean() < 0.03 * expected.std()
    assert error.max() < 0.3 * expected.std()


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(variant: MPTForCausalLM) -> None:
    ids = random_ids(1, 29)
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % V
    before, after = variant.double()(ids).logits[0], variant.double()(changed).logits[0]
    torch.testing.assert_close(before[:20], after[:20], rtol=0, atol=1e-12)
    assert (before[20:] - after[20:]).abs().max() > 0.1


# -- against transformers' in-tree MPT, where it is right ------------------------------------------------------------


def stock_of(model: MPTForCausalLM) -> MptForCausalLM:
    config = model.config
    stock = MptForCausalLM(
        MptConfig(
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            attn_config={"clip_qkv": config.attention["clip_qkv"]},
        )
    )
    stock.load_state_dict(model.state_dict())
    return stock.eval()


@torch.no_grad()
@pytest.mark.parametrize("n_heads", [4, 12, 16, 24, 40])
@pytest.mark.parametrize("clip_qkv", [None, 6.0])
def test_logits_equal_transformers(n_heads: int, clip_qkv: float | None) -> None:
    model = model_of(config_of(n_heads, attn_config={"clip_qkv": clip_qkv}))
    rows = random_ids(2, 33)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :9] = 0
    expected = stock_of(model)(rows, attention_mask=mask).logits
    real = mask.bool()

    logits = model(rows, attention_mask=mask).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=FLOAT32)

    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=40)):
        got, start = [], 0
        for end in (7, 12, 30, 31, 32, 33):  # prefill in chunks, the first nothing but padding to row 0; then decode
            got.append(model(rows[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
            start = end
        torch.testing.assert_close(torch.cat(got, 1)[real], expected[real], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("n_heads", [4, 12])
def test_loss_and_gradients_equal_transformers(n_heads: int) -> None:
    model = model_of(config_of(n_heads)).train()
    stock = stock_of(model).train()
    rows = random_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    labels = rows.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # would be predicted from padding
    labels[1, 3:7] = -100
    loss = model(rows, attention_mask=mask, labels=labels).loss
    expected = stock(rows, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5), name


# -- what the interface promises -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> MPTForCausalLM:
    return model_of(config_of())


@torch.no_grad()
def test_logits_are_kept_of_the_positions_asked_for(model: MPTForCausalLM) -> None:
    ids = random_ids(2, 9)
    whole = model(ids).logits
    # Not to the bit: over fewer rows, BLAS may add the terms of a logit in another order (it does on AMD EPYC).
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])
    hidden = model.transformer(ids).last_hidden_state
    assert hidden.shape == (2, 9, 32)
    torch.testing.assert_close(model.unembed(hidden), whole)
    embedded = model(inputs_embeds=model.transformer.wte(ids)).logits
    torch.testing.assert_close(embedded, whole)


def test_a_cache_is_made_for_inference_only(model: MPTForCausalLM) -> None:
    ids = random_ids(1, 5)
    assert model(ids).past_key_values.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "inputs_embeds": torch.zeros(1, 3, 32)}, "one of the two"),
        (
            {
                "input_ids": torch.zeros(1, 3, dtype=torch.long),
                "sequence_id": torch.zeros(1, 3, dtype=torch.long),
                "attention_mask": torch.ones(1, 3),
            },
            "sequence_id goes without",
        ),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}, r"\(B, S\)"),
    ],
)
def test_contradicting_inputs_are_refused(model: MPTForCausalLM, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
def test_all_layers_share_one_mask_on_cuda(
    variant: MPTForCausalLM, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, real = random_ids(3, 20), PACKED >= 0
    extra = {"plain": {}, "padded": {"attention_mask": real.long()}, "packed": {"sequence_id": PACKED}}[inputs]
    made: list[attention.Sight] = []
    see = attention.see

    def counted(*args: Any, **kwargs: Any) -> attention.Sight:
        made.append(see(*args, **kwargs))
        return made[-1]

    with torch.no_grad():
        expected = variant(rows, **extra).logits
        monkeypatch.setattr(attention, "takes_flex", lambda device: True)
        monkeypatch.setattr(attention, "see", counted)
        got = variant(rows, **extra).logits
    assert len(made) == 1 < variant.config.n_layers
    at = real if inputs != "plain" else torch.ones_like(real)
    torch.testing.assert_close(got[at], expected[at], rtol=0, atol=FLOAT32)


# -- training --------------------------------------------------------------------------------------------------------


def gradients(model: MPTForCausalLM, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(packed: bool) -> None:
    model = model_of(config_of()).train()
    rows = random_ids(3, 20)
    inputs = {"input_ids": rows, "labels": rows, **({"sequence_id": PACKED} if packed else {})}
    plain = gradients(model, **inputs)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name before transformers 5.23
        model.gradient_checkpointing_enable()
    assert model.transformer.blocks[0].gradient_checkpointing
    again = gradients(model, **inputs)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_new_weights_follow_mpt() -> None:
    """kaiming_normal_, fan_in, relu: std sqrt(2 / fan_in); projections into the residual stream / sqrt(2 L)."""
    torch.manual_seed(0)
    model = MPTForCausalLM(MPTConfig(d_model=256, n_heads=4, n_layers=2, vocab_size=1000, no_bias=False))
    weights, block = model.state_dict(), "transformer.blocks.1."
    for name, std in (
        ("transformer.wte", math.sqrt(2 / 256)),
        (block + "attn.Wqkv", math.sqrt(2 / 256)),
        (block + "attn.out_proj", math.sqrt(2 / 256) / 2),
        (block + "ffn.up_proj", math.sqrt(2 / 256)),
        (block + "ffn.down_proj", math.sqrt(2 / 1024) / 2),
    ):
        weight = weights[name + ".weight"]
        # The standard error of a std over n numbers is std / sqrt(2 n): below 0.3 % here.
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * std
    assert torch.equal(weights[block + "norm_1.weight"], torch.ones(256))
    assert not any(weight.any() for name, weight in weights.items() if name.endswith("bias"))


@pytest.mark.parametrize("init", [{"name": "baseline_"}, {"fan_mode": "fan_out"}])
def test_other_initializations_are_refused(init: dict[str, str]) -> None:
    with pytest.raises(UnsupportedConfig, match="kaiming_normal_"):
        MPTForCausalLM(config_of(init_config=init))


def test_residual_dropout_of_everything_leaves_the_embedding() -> None:
    model = model_of(config_of(resid_pdrop=1.0)).train().double()
    ids = random_ids(1, 7)
    wte, norm = model.transformer.wte.weight, model.transformer.norm_f.weight
    x = wte[ids]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm
    torch.testing.assert_close(model(ids).logits, x @ wte.T, rtol=0, atol=EXACT)


def test_embedding_dropout_of_everything_leaves_nothing() -> None:
    model = model_of(config_of(emb_pdrop=1.0)).train()
    assert not model(random_ids(1, 7)).logits.any()


@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
def test_attention_dropout_of_nothing_is_no_dropout(inputs: str) -> None:
    """Attention with dropout takes the eager formula: at a probability of 1e-12 it drops nothing."""
    settings = {**GROUPED, "clip_qkv": 6, "alibi_bias_max": 16}
    with_dropout = model_of(config_of(attn_config={**settings, "attn_pdrop": 1e-12})).double().train()
    without = model_of(config_of(attn_config=settings)).double().train()
    rows = random_ids(3, 20)
    mask = (PACKED >= 0).long()
    extra = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"sequence_id": PACKED}}[inputs]
    real = mask.bool() if inputs != "plain" else torch.ones_like(mask).bool()
    got, expected = with_dropout(rows, **extra).logits, without(rows, **extra).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=EXACT)


def test_attention_dropout_drops_in_training_only() -> None:
    model = model_of(config_of(attn_config={"attn_pdrop": 0.5}))
    rows = random_ids(1, 20)
    assert torch.equal(model(rows).logits, model(rows).logits)
    model.train()
    assert not torch.equal(model(rows).logits, model(rows).logits)


def test_embedding_fraction_shrinks_the_embeddings_gradient_only() -> None:
    whole = model_of(config_of(tie_word_embeddings=False)).train()
    tenth = model_of(config_of(tie_word_embeddings=False, embedding_fraction=0.1)).train()
    rows = random_ids(2, 11)
    torch.testing.assert_close(tenth(rows).logits, whole(rows).logits, rtol=0, atol=1e-5)
    one, other = (gradients(m, input_ids=rows, labels=rows) for m in (whole, tenth))
    embedding = "transformer.wte.weight"
    torch.testing.assert_close(other.pop(embedding), 0.1 * one.pop(embedding), rtol=1e-4, atol=1e-6)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_few_bfloat16_rows_are_multiplied_as_exactly_as_many(n_rows: int, bias: bool) -> None:
    torch.manual_seed(n_rows)
    linear = Linear(96, 40, bias=bias).bfloat16()
    x = torch.randn(n_rows, 96).bfloat16().view(1, n_rows, 96)
    with torch.no_grad():
        got = linear(x)
    expected = torch.einsum("oi,bti->bto", linear.weight.double(), x.double())
    if linear.bias is not None:
        expected = expected + linear.bias.double()
    assert got.shape == (1, n_rows, 40)
    # One rounding to bfloat16's 8 bits; sums of 96 products in float32 add 1e-6.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own call
def test_lora_trains_and_merges_back() -> None:
    base = model_of(config_of())
    untouched = copy.deepcopy(base.state_dict())
    rows = random_ids(2, 16)
    before = base(rows).logits.detach()
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in tuned.named_parameters() if "lora_" in name}
    assert adapted == {"Wqkv"}
    trained = [p for p in tuned.parameters() if p.requires_grad]
    # Per layer: A (4, C) and B (3 C, 4).
    assert sum(p.numel() for p in trained) == 2 * (4 * 32 + 96 * 4)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    tuned.train()
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=rows, labels=rows).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    tuned.eval()
    with torch.no_grad():
        expected = tuned(input_ids=rows).logits
    merged = tuned.merge_and_unload()
    assert type(merged) is MPTForCausalLM
    assert merged.state_dict().keys() == untouched.keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(rows).logits, expected, rtol=0, atol=FLOAT32)
    assert (expected - before).abs().max() > 0.1
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, untouched[name]) == ("Wqkv" not in name), name
