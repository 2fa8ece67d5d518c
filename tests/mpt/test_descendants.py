"""Published descendants and copies of MPT open, and compute what their authors' formulas give.

Every config of the shared data is reduced in width, depth and vocabulary and keeps its number of heads, on which ALiBi
depends. The expected logits come from a float64 forward that is written out here and reads the raw config.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, MptConfig, MptForCausalLM, PreTrainedConfig

import mpt
from mpt.checkpoint import left_out, read_config
from mpt.errors import DamagedFile, UnsupportedConfig, UserError

Raw = dict[str, Any]
Weights = dict[str, Tensor]
D, LAYERS, VOCAB, CONTEXT = 4, 2, 97, 64
IDS = torch.arange(40)[None] * 7 % VOCAB
COPIES = (
    "csmpt7b", "krutrim-1-instruct", "llava-lightning-mpt-7b", "phogpt-4b-chat", "replit-code-v1-3b",
    "replit-code-v1-3b-first-release", "replit-code-v1_5-3b", "sea-lion-3b", "sea-lion-7b",
)  # fmt: skip


def reduced(raw: Raw) -> Raw:
    sizes = {"n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": CONTEXT, "torch_dtype": "float32"}
    return {**raw, **sizes, "d_model": D * raw["n_heads"]}


def settings(raw: Raw) -> Raw:
    """`attn_config`, also of a flat config of 2023-04."""
    flat = {"alibi": raw.get("alibi"), "alibi_bias_max": raw.get("alibi_bias_max"), "clip_qkv": None, "qk_ln": False}
    return raw.get("attn_config") or flat


def random_weights(raw: Raw) -> Weights:
    """Under today's names, norms and biases random too, so that a lost one shows."""
    generator = torch.Generator().manual_seed(0)
    C, attn = raw["d_model"], settings(raw)
    kv = D * (attn.get("kv_n_heads") or raw["n_heads"])
    shapes: dict[str, tuple[int, ...]] = {"wte": (VOCAB, C), "norm_f": (C,)}
    if not attn["alibi"]:
        shapes["wpe"] = (CONTEXT, C)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm_1": (C,), f"{block}.norm_2": (C,), f"{block}.attn.Wqkv": (C + 2 * kv, C)}
        shapes |= {f"{block}.attn.out_proj": (C, C), f"{block}.ffn.up_proj": (4 * C, C)}
        shapes |= {f"{block}.ffn.down_proj": (C, 4 * C)}
        if attn["qk_ln"]:
            shapes |= {f"{block}.attn.q_ln": (C,), f"{block}.attn.k_ln": (kv,)}
    weights = {}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 else shape[1] ** -0.5 * (1.5 if "attn" in name else 1)
        weights[f"transformer.{name}.weight"] = torch.randn(shape, generator=generator) * scale + (len(shape) == 1)
        if not raw["no_bias"] and name not in ("wte", "wpe"):
            weights[f"transformer.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.3
    return weights


def slopes(n_heads: int, bias_max: float) -> Tensor:
    """Press et al. 2021: of the next power of two every second one first, then the others."""
    power = 2 ** math.ceil(math.log2(n_heads))
    all_of_them = [2.0 ** (-bias_max * (h + 1) / power) for h in range(power)]
    order = all_of_them if power == n_heads else all_of_them[1::2] + all_of_them[::2]
    return torch.tensor(order[:n_heads], dtype=torch.float64)


def forward(raw: Raw, weights: Weights, ids: Tensor) -> Tensor:
    """Logits in float64, one position after the other's formula; nothing of mpt/ is used."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    H, C, attn = raw["n_heads"], raw["d_model"], settings(raw)
    kv_heads, T = attn.get("kv_n_heads") or H, ids.shape[1]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"transformer.{name}.weight"].T + w.get(f"transformer.{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"transformer.{name}.weight"] + w.get(f"transformer.{name}.bias", 0)

    x = w["transformer.wte.weight"][ids[0]]
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]  # key minus query
    bias = torch.zeros(H, T, T, dtype=torch.float64)
    if attn["alibi"]:
        bias += slopes(H, attn["alibi_bias_max"])[:, None, None] * distance
    else:
        x = x + w["transformer.wpe.weight"][:T]
    bias = bias.masked_fill(distance > 0, -math.inf)
    for i in range(LAYERS):
        qkv = linear(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.attn.Wqkv")
        if attn["clip_qkv"]:
            qkv = qkv.clamp(-attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = qkv.split([C, kv_heads * D, kv_heads * D], -1)
        if attn["qk_ln"]:
            q, k = norm(q, f"blocks.{i}.attn.q_ln"), norm(k, f"blocks.{i}.attn.k_ln")
        q = q.view(T, H, D).transpose(0, 1)
        k, v = (t.view(T, kv_heads, D).transpose(0, 1).repeat_interleave(H // kv_heads, 0) for t in (k, v))
        mixed = (q @ k.transpose(1, 2) / math.sqrt(D) + bias).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(T, C), f"blocks.{i}.attn.out_proj")
        up = linear(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.ffn.up_proj")
        x = x + linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), f"blocks.{i}.ffn.down_proj")
    logits = norm(x, "norm_f") @ w["transformer.wte.weight"].T
    return logits / math.sqrt(C) if raw["logit_scale"] == "inv_sqrt_d_model" else logits


def as_2023_04(name: str) -> str:
    """The name of a tensor in `mosaic_gpt` and in the first release of replit-code-v1-3b."""
    name = name.replace(".norm_", ".ln_")
    return name.replace(".ffn.up_proj", ".mlp.mlp_up").replace(".ffn.down_proj", ".mlp.mlp_down")


def write(folder: Path, raw: Raw, weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def assert_computes(folder: Path, raw: Raw, weights: Weights) -> None:
    """float32's rounding through two layers, on logits of a deviation of 1 to 20."""
    expected = forward(raw, weights, IDS)
    with torch.no_grad():
        got = mpt.load(folder)(IDS).logits[0]
    assert float((got - expected).abs().max()) < 1e-4 * max(1, float(expected.std()))


# -- the published configs ---------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of(data_file: Callable[[str], Path]) -> Callable[[str], Raw]:
    return lambda name: json.loads(data_file(f"copies/{name}.config.json").read_text())


@pytest.mark.parametrize("name", COPIES)
def test_a_published_copy_computes_its_formula(name: str, copy_of: Callable[[str], Raw], tmp_path: Path) -> None:
    raw = reduced(copy_of(name))
    weights = random_weights(raw)
    stored = weights
    if raw["model_type"] == "replit_lm":
        stored = {as_2023_04(key): tensor for key, tensor in weights.items()}
    if raw["model_type"] == "llava_mpt":
        stored = {
            **weights,
            "transformer.mm_projector.weight": torch.ones(8, 8),
            "transformer.vision_tower.vision_model.embeddings.position_ids": torch.arange(8),
        }
    assert_computes(write(tmp_path / "copy", raw, stored), raw, weights)


def test_a_copy_of_whole_size_has_its_published_sizes(copy_of: Callable[[str], Raw], tmp_path: Path) -> None:
    # Parameters by hand: wte V*C, per layer 4*C*C (grouped: (2 + 2*kv/H)*C*C) + 8*C*C + norms and biases.
    expected = {
        "krutrim-1-instruct": 70400 * 4608 + 32 * (4608**2 * (2 + 2 * 8 / 48) + 8 * 4608**2 + 2 * 4608) + 4608,
        "phogpt-4b-chat": 20480 * 3072 + 32 * (12 * 3072**2 + (3 + 1 + 4 + 1 + 4) * 3072) + 2 * 3072,
        "sea-lion-7b": (256000 + 2048) * 4096 + 32 * (12 * 4096**2 + (3 + 1 + 4 + 1 + 4 + 4) * 4096) + 2 * 4096,
    }
    for name, n_parameters in expected.items():
        (tmp_path / "config.json").write_text(json.dumps(copy_of(name)))
        with torch.device("meta"):
            model = mpt.MPTForCausalLM(read_config(tmp_path))
        assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters, name


# -- keys that are not MPT's -------------------------------------------------------------------------------------------

SMALL: Raw = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}


def read(folder: Path, **changes: Any) -> mpt.config.MPTConfig:
    (folder / "config.json").write_text(json.dumps({**SMALL, **changes}))
    return read_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_config_defaults", {"init_std": 0.02}),
        ("z_loss", 1e-4),
        ("seq_parallel_world_size", 1),
        ("rope_scaling", None),
        ("rope_theta", 10000.0),
        ("num_key_value_heads", 4),
        ("num_attention_heads", 4),
        ("intermediate_size", 128),
        ("hidden_act", "gelu"),
        ("quantization_config", None),
        ("sliding_window", None),
        ("use_sliding_window", False),
        ("loss_fn", "torch_crossentropy"),
        ("fc_type", {"name": "te"}),
        ("moe_loss_weight", 0.1),
        ("moe_num_experts", 1),
        ("use_pad_tok_in_ffn", True),
        ("unsloth_version", "2024.9"),
        ("pretraining_tp", 1),
        ("gradient_checkpointing", True),
        ("attention_dropout", 0.1),
        ("attn_pdrop", 0.1),
        ("_flash_attn_2_enabled", True),
        ("unk_token_id", 3),
        ("embedding_multiplier", 1.0),
    ],
)
def test_a_key_that_changes_no_answer_is_dropped_with_a_log_line(
    key: str, value: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mpt.architecture._say_once.cache_clear()
    config = read(tmp_path, **{key: value})
    assert key in config.dropped or key.startswith("_attn")
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"`{key}`" in line
    assert key not in config.to_dict() or key == "quantization_config"
    assert "dropped" not in config.to_dict()
    read(tmp_path, **{key: value})
    assert len(caplog.records) == 1, "a config that is read twice is spoken of once"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "linear"),
        ("use_rope", True, "True"),
        ("sliding_window", 4096, "4096"),
        ("num_key_value_heads", 2, "`2`.*`4`"),
        ("num_attention_heads", 8, "`8`.*`4`"),
        ("intermediate_size", 64, "`64`.*`128`"),
        ("hidden_act", "silu", "silu.*gelu"),
        ("layer_norm_eps", 1e-6, "1e-06.*1e-05"),
        ("is_causal", False, "`False`.*`True`"),
        ("alibi", False, "`False`.*`True`"),
        ("use_parallel_residual", True, "True"),
        ("activation_name", "silu", "silu"),
        ("num_local_experts", 8, "8"),
        ("attention_multiplier", 1.0, "1.0"),
        ("embedding_multiplier", 12.0, "12.0"),
        ("quantization_config", {"quant_method": "unheard of"}, "unheard of"),
        ("attention_bias", True, "`True`.*`False`"),
    ],
)
def test_a_key_that_may_change_the_answers_is_refused(key: str, value: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match=f"`{key}`.*{words}") as caught:
        read(tmp_path, **{key: value})
    assert "\n" not in str(caught.value)


def test_of_two_widths_the_one_of_the_tensors_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mpt.architecture._say_once.cache_clear()
    assert read(tmp_path, hidden_size=48).d_model == 32
    assert "`hidden_size` 48" in caplog.text and "d_model 32 is believed" in caplog.text
    renamed = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 99}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpt", **renamed}))
    config = read_config(tmp_path)
    assert (config.d_model, config.n_heads, config.n_layers, config.max_seq_len) == (48, 6, 3, 99)


# -- larger models -----------------------------------------------------------------------------------------------------


def test_of_an_extended_mind_the_plain_model_is_read(tmp_path: Path) -> None:
    """Without memories in its store, its attention is MPT's. Keys: normal-computing/extended-mind-transformers."""
    raw = {
        **SMALL, "model_type": "extended-mpt", "architectures": ["ExtendedMptForCausalLM"], "use_external_mind": True,
        "logit_scale": None, "no_bias": True, "max_seq_len_inference": 64,
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False, "topk": 10, "mask_by_sim": True,
            "memory_type": "manual", "memory_device": "cpu", "sim_threshold": 0.25, "model_type": "",
            "tokenizer_all_special_ids": [0, 50278], "use_external_mind_by_layer": [True, True],
        },
    }  # fmt: skip
    raw["d_model"] = D * raw["n_heads"]
    weights = random_weights(raw)
    assert_computes(write(tmp_path / "copy", raw, weights), raw, weights)
    assert "adds" in read_config(tmp_path / "copy").dropped["use_external_mind"]
    with pytest.raises(UnsupportedConfig, match="rope_scaling"):
        read(tmp_path, model_type="extended-mpt", rope_scaling={"type": "linear"})


@pytest.mark.parametrize("twice", [False, True])
def test_of_a_flamingo_the_language_model_is_read(twice: bool, tmp_path: Path) -> None:
    """OpenFlamingo wraps each block and hangs a cross-attention beside it; Otter's folders are of this make."""
    inner = {**SMALL, "d_model": D * 4, "logit_scale": None, "no_bias": True}
    inner["attn_config"] = {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False}
    raw = {"model_type": "otter", "architectures": ["OtterForConditionalGeneration"], "cross_attn_every_n_layers": 1,
           "text_config": inner, "vision_config": {"model_type": "clip_vision_model", "hidden_size": 8}}  # fmt: skip
    weights = random_weights(inner)
    stored: Weights = {"perceiver.latents": torch.ones(4, 8), "vision_encoder.position_ids": torch.arange(5)}
    for name, tensor in weights.items():
        block = name.removeprefix("transformer.blocks.")
        if block == name:
            stored[f"lang_encoder.{name}"] = tensor
        else:
            layer, rest = block.split(".", 1)
            stored[f"lang_encoder.transformer.blocks.{layer}.decoder_layer.{rest}"] = tensor
            stored[f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer.attn_gate"] = torch.ones(1)
            if twice:
                stored[f"lang_encoder.old_decoder_blocks.{block}"] = tensor.clone()
    folder = write(tmp_path / "copy", raw, stored)
    assert_computes(folder, inner, weights)
    parts = " ".join(left_out(folder))
    assert "`perceiver` (1 tensor)" in parts and "`gated_cross_attn_layer` (2 tensors)" in parts
    assert mpt.catalog.describe(folder).context_length == 64


def test_a_flat_config_with_an_encoders_keys_is_a_larger_models(tmp_path: Path) -> None:
    raw = {
        **SMALL,
        "d_model": D * 4,
        "logit_scale": None,
        "no_bias": True,
        "cross_attn_every_n_layers": 4,
        "vis_dim": 8,
    }
    raw["attn_config"] = {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False}
    weights = random_weights(raw)
    stored = {f"lang_encoder.{name}": tensor for name, tensor in weights.items()} | {"perceiver.norm": torch.ones(2)}
    assert_computes(write(tmp_path / "copy", raw, stored), raw, weights)


def test_a_config_without_a_type_is_known_by_its_class(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SMALL.items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "architectures": ["MPTForCausalLM"]}))
    assert read_config(tmp_path).d_model == 32
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "architectures": ["DbrxForCausalLM"]}))
    with pytest.raises(UnsupportedConfig, match="model_type `None`"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"), [("torch.float16", torch.float16), ("bfloat16", torch.bfloat16), ("auto", None), ("x", None)]
)
def test_a_dtype_is_read_or_left_to_the_tensors(said: str, expected: torch.dtype | None, tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype=said).dtype == read(tmp_path, dtype=said).dtype == expected


def test_what_transformers_writes_into_every_config_is_no_surprise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mpt.architecture._say_once.cache_clear()
    everything = {**PreTrainedConfig().to_dict(), **GenerationConfig().to_dict()}
    read(tmp_path, **{key: value for key, value in everything.items() if key != "model_type"})
    assert not caplog.records


def test_null_in_a_table_is_left_out(tmp_path: Path) -> None:
    attention = dict.fromkeys(("alibi_bias_max", "qk_ln", "clip_qkv", "attn_pdrop", "rope", "sliding_window_size"))
    config = read(tmp_path, attn_config={**attention, "alibi": True}, rope_scaling=None)
    assert config.attention == read(tmp_path, attn_config={"alibi": True}).attention
    assert read(tmp_path, attn_config={"clip_qkv": False}).attention["clip_qkv"] is None
    with pytest.raises(UnsupportedConfig, match=r"attn_config\.alibi`.*None"):
        read(tmp_path, attn_config={"alibi": None})


def test_trainers_prefixes_are_understood(tmp_path: Path) -> None:
    raw = {**SMALL, "d_model": D * 4, "logit_scale": None, "no_bias": True}
    raw["attn_config"] = {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "qk_ln": False}
    weights = random_weights(raw)
    for prefix in ("_orig_mod.", "module.", "model._fsdp_wrapped_module.", "base_model.model."):
        folder = write(tmp_path / "copy", raw, {prefix + name: tensor for name, tensor in weights.items()})
        assert_computes(folder, raw, weights)


def test_tensors_beside_an_mpt_alone_are_still_refused(tmp_path: Path) -> None:
    raw = {**SMALL, "d_model": D * 4, "no_bias": True}
    raw["attn_config"] = {"alibi": True, "qk_ln": False}
    folder = write(tmp_path / "copy", raw, {**random_weights(raw), "perceiver.latents": torch.ones(2)})
    with pytest.raises(DamagedFile, match=r"perceiver\.latents"):
        mpt.load(folder)


# -- biases that a re-save lost ----------------------------------------------------------------------------------------


def test_a_resave_without_its_biases_says_so_and_has_a_switch(copy_of: Callable[[str], Raw], tmp_path: Path) -> None:
    raw = {**reduced(copy_of("phogpt-resaved-by-transformers")), "d_model": D * 24}
    stock = MptForCausalLM(MptConfig.from_dict(raw))  # the class that dropped them
    stock.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(DamagedFile, match=r"none of its 13 biases.*`no_bias` to true in its config\.json") as caught:
        mpt.load(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    (tmp_path / "config.json").write_text(json.dumps({**raw, "no_bias": True}))
    with torch.no_grad():
        torch.testing.assert_close(mpt.load(tmp_path)(IDS).logits, stock.eval()(IDS).logits, rtol=0, atol=1e-4)


def test_biases_that_a_config_denies_are_named(copy_of: Callable[[str], Raw], tmp_path: Path) -> None:
    raw = reduced(copy_of("phogpt-4b-chat"))
    weights = random_weights(raw)
    folder = write(tmp_path / "copy", {**raw, "no_bias": True}, weights)
    with pytest.raises(DamagedFile, match=r"13 biases.*`no_bias` to false"):
        mpt.load(folder)
    one_lost = {name: t for name, t in weights.items() if name != "transformer.norm_f.bias"}
    with pytest.raises(DamagedFile, match=r"misses `transformer\.norm_f\.bias`"):
        mpt.load(write(tmp_path / "copy", raw, one_lost))


# -- what is no checkpoint of ours -------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_config", [True, False])
def test_a_ctranslate2_folder_is_refused_by_its_name(has_config: bool, tmp_path: Path) -> None:
    """The files that CTranslate2's converter writes; before its version 3.9 without config.json."""
    (tmp_path / "model.bin").write_bytes(bytes(8))
    (tmp_path / ("vocabulary.json" if has_config else "vocabulary.txt")).write_text('["a"]')
    if has_config:
        (tmp_path / "config.json").write_text('{"bos_token": "<|endoftext|>", "layer_norm_epsilon": null}')
    with pytest.raises(UserError, match=r"CTranslate2.*converted from"):
        mpt.load(tmp_path)
