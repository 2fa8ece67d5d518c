"""Every config.json the family was published with is read as its authors meant it; what cannot be honoured is refused.

The published values are written out here from the hub's pages and from load logs of the real files, so that this runs
without the shared data; where that is present, its files are read too.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MptConfig, MptForCausalLM, PreTrainedConfig

from mpt.architecture import Architecture, read_architecture
from mpt.checkpoint import read_config
from mpt.config import MPTConfig
from mpt.errors import UnsupportedConfig
from mpt.transformers_model import MPTForCausalLM

Raw = dict[str, Any]

# mpt-7b-instruct's file, key by key; the other published files of model_type `mpt` differ from it as below.
MPT_7B: Raw = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None, "emb_init_uniform_lim": None, "fan_mode": "fan_in", "init_div_is_residual": True,
        "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02, "name": "kaiming_normal_", "verbose": 0,
    },
    "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt",
    "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "transformers_version": "4.28.1",
    "use_cache": False, "verbose": 0, "vocab_size": 50432,
}  # fmt: skip
MPT_1B: Raw = {  # the flat schema of 2023-04
    "_name_or_path": "somebody/somewhere", "alibi": True, "alibi_bias_max": 8, "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None, "attn_impl": "torch", "attn_pdrop": 0, "attn_qk_ln": True, "attn_uses_sequence_id": False,
    "auto_map": {"AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig"}, "d_model": 2048, "emb_init_std": None,
    "emb_init_uniform_lim": None, "emb_pdrop": 0, "embedding_fraction": 1.0, "fan_mode": "fan_in",
    "init_device": "cpu", "init_div_is_residual": True, "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02,
    "logit_scale": None, "low_precision_layernorm": True, "max_seq_len": 2048, "mlp_ratio": 4,
    "model_type": "mosaic_gpt", "n_heads": 16, "n_layers": 24, "no_bias": True, "param_init_fn": "kaiming_normal_",
    "prefix_lm": False, "resid_pdrop": 0, "softmax_scale": None, "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "float32", "transformers_version": "4.27.4", "use_cache": False, "verbose": 0, "vocab_size": 50432,
}  # fmt: skip


def changed(raw: Raw, **changes: Any) -> Raw:
    """A copy with other values; `attn_config` and `init_config` are merged, not replaced."""
    out = copy.deepcopy(raw)
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if merge else value
    return out


PUBLISHED: dict[str, Raw] = {
    "mpt-7b": MPT_7B,
    "mpt-7b-storywriter": changed(MPT_7B, max_seq_len=65536, attn_config={"alibi_bias_max": 16, "clip_qkv": 6}),
    "mpt-7b-8k-chat": changed(MPT_7B, max_seq_len=8192, init_config={"init_std": None}),
    "mpt-30b": changed(MPT_7B, d_model=7168, n_heads=64, n_layers=48, max_seq_len=8192),
    "mpt-30b-chat, first revision": changed(
        MPT_7B, d_model=7168, n_heads=64, n_layers=48, attn_config={"clip_qkv": 6, "attn_uses_sequence_id": True}
    ),
    "mpt-1b-redpajama-200b": MPT_1B,
}
# d_model, heads, layers, max_seq_len, alibi_bias_max, clip_qkv, qk_ln; parameters and KiB of KV cache a token. Sources:
# load logs of the real files and the published tables; the 1B counts 1,311,311,872 with its 50,368 used rows of wte.
FACTS: dict[str, tuple[Any, ...]] = {
    "mpt-7b": (4096, 32, 32, 2048, 8, None, False, 6_649_286_656, 512),
    "mpt-7b-storywriter": (4096, 32, 32, 65536, 16, 6.0, False, 6_649_286_656, 512),
    "mpt-7b-8k-chat": (4096, 32, 32, 8192, 8, None, False, 6_649_286_656, 512),
    "mpt-30b": (7168, 64, 48, 8192, 8, None, False, 29_957_200_896, 1344),
    "mpt-30b-chat, first revision": (7168, 64, 48, 2048, 8, 6.0, False, 29_957_200_896, 1344),
    "mpt-1b-redpajama-200b": (2048, 16, 24, 2048, 8, None, True, 1_311_311_872 + 64 * 2048, 192),
}
# Of the files in the shared data, those not named above.
SAME_AS = {
    "mpt-7b-instruct": "mpt-7b",
    "mpt-7b-chat": "mpt-7b",
    "mpt-30b-chat": "mpt-30b",
    "mpt-30b-instruct": "mpt-30b",
}
SHARED = ("mpt-7b", "mpt-7b-storywriter", "mpt-7b-8k-chat", "mpt-1b-redpajama-200b", *SAME_AS)


def read(raw: Raw, folder: Path) -> MPTConfig:
    """The config as it is read from a checkpoint's folder."""
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


def small(raw: Raw) -> Raw:
    """The same settings at two layers, the fewest heads that keep to a power of two, and 97 tokens."""
    return {**raw, "d_model": 8 * 4, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "torch_dtype": "float32"}


def facts_of(config: MPTConfig) -> tuple[Any, ...]:
    attention = config.attention
    shape = (config.d_model, config.n_heads, config.n_layers, config.max_seq_len)
    return (*shape, attention["alibi_bias_max"], attention["clip_qkv"], attention["qk_ln"])


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_read_as_published(name: str, tmp_path: Path) -> None:
    config = read(PUBLISHED[name], tmp_path)
    *facts, n_parameters, kv_kib = FACTS[name]
    assert list(facts_of(config)) == facts
    assert (config.vocab_size, config.d_ffn, config.no_bias) == (50432, 4 * config.d_model, True)
    assert config.tie_word_embeddings and config.attention["alibi"] and not config.has_wpe
    assert config.dtype == (torch.float32 if "1b" in name else torch.bfloat16)
    assert config.kv_bytes_per_token == kv_kib * 1024
    with torch.device("meta"):
        model = MPTForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    if "7b" in name:
        assert len(list(model.parameters())) == 194


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_transformers_a_config_says_the_same(name: str, tmp_path: Path) -> None:
    config = read(PUBLISHED[name], tmp_path)
    light = read_architecture(tmp_path)
    assert {field.name: getattr(light, field.name) for field in fields(Architecture)} == {
        field.name: getattr(config, field.name) for field in fields(Architecture)
    }
    assert light.dropped == config.dropped


def test_what_transformers_writes_into_every_config_is_read_without_it(tmp_path: Path) -> None:
    """`save_pretrained` writes the fields of its base class, and older versions those of its GenerationConfig."""
    written = MPTConfig().to_dict() | vars(GenerationConfig(max_new_tokens=9, min_p=0.1, stop_strings=["."]))
    assert {field.name for field in fields(PreTrainedConfig)} <= written.keys()
    (tmp_path / "config.json").write_text(json.dumps(written, default=str))
    assert read_architecture(tmp_path).dropped == {}


@pytest.mark.parametrize("name", SHARED)
def test_shared_configs_read_as_published(name: str, data_file: Callable[[str], Path], tmp_path: Path) -> None:
    raw = json.loads(data_file(f"mpt_configs/{name}.config.json").read_text())
    facts = facts_of(read(raw, tmp_path))
    assert list(facts) == list(FACTS[SAME_AS.get(name, name)])[:7]
    assert MPTForCausalLM(read(small(raw), tmp_path)).eval()(torch.arange(20)[None]).logits.isfinite().all()


def test_storywriters_slopes_reach_the_model(tmp_path: Path) -> None:
    """Stock transformers loses alibi_bias_max 16 and computes the slopes of 8."""
    model = MPTForCausalLM(read(small(PUBLISHED["mpt-7b-storywriter"]), tmp_path))
    bias = model.transformer.alibi_bias(2)
    assert bias is not None
    assert bias[0, :, 0, 0].tolist() == [-(2.0**-4), -(2.0**-8), -(2.0**-12), -(2.0**-16)]


def test_the_1b_has_its_qk_layernorms(tmp_path: Path) -> None:
    config = read(MPT_1B, tmp_path)
    assert config.model_type == "mpt"
    assert config.norm_type == "low_precision_layernorm"
    assert config.init_config is not None and config.init_config["name"] == "kaiming_normal_"
    with torch.device("meta"):
        names = MPTForCausalLM(config).state_dict()
    assert names["transformer.blocks.23.attn.q_ln.weight"].shape == (2048,)


# llm-foundry v0.21's whole config with everything that came after MPT switched off, as its exports write it.
LATEST = changed(
    MPT_7B,
    attn_config={
        "attn_pdrop": 0.0, "attn_impl": "flash", "qk_gn": False, "fused_qkv": True, "rope": False, "rope_theta": 10000,
        "rope_impl": "dail", "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
        "rope_hf_config": {"type": "no_scaling", "factor": 1.0}, "nope": False, "attn_logit_softcapping": None,
        "sliding_window_size": -1, "attn_temperature_tuning": None, "kv_dim": None,
    },
    ffn_config={"ffn_type": "mptmlp", "fc_type": {"name": "torch"}, "ffn_act_fn": None, "ffn_hidden_size": None},
    norm_eps=1e-5, resid_pdrop=0.0, emb_pdrop=0.0, fc_type={"name": "torch"}, use_pad_tok_in_ffn=True,
    final_logit_softcapping=None, block_overrides=None, tie_word_embeddings=True, loss_fn="torch_crossentropy",
    attention_bias=None, head_dim=None,
)  # fmt: skip


def test_the_latest_llm_foundry_reads_like_the_first(tmp_path: Path) -> None:
    first, latest = read(MPT_7B, tmp_path).to_dict(), read(LATEST, tmp_path).to_dict()
    assert first == latest


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"ffn_config": {"ffn_hidden_size": 6144}}, "d_ffn", 6144),
        ({"expansion_ratio": 2.5}, "d_ffn", 10240),
        ({"expansion_ratio": 4.0}, "d_ffn", 16384),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "n_kv_heads", 1),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8}}, "n_kv_heads", 8),
        ({"attn_config": {"kv_n_heads": 32}}, "n_kv_heads", 32),
        ({"attn_config": {"clip_qkv": 0}}, "attention.clip_qkv", None),
        ({"attn_config": {"softmax_scale": 0.1}}, "softmax_scale", 0.1),
        ({}, "softmax_scale", 128**-0.5),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_factor", 1 / 64),
        ({"logit_scale": 0.5}, "logit_factor", 0.5),
        ({}, "logit_factor", None),
        ({"attn_config": {"alibi": False}}, "has_wpe", True),
        ({"attn_config": {"alibi": False}, "learned_pos_emb": False}, "has_wpe", False),
        ({"norm_eps": 1e-6}, "norm_eps", 1e-6),
        ({"layer_norm_epsilon": 1e-6}, "norm_eps", 1e-6),
        ({"norm_type": "layernorm"}, "norm_type", "layernorm"),
        ({"head_dim": 128}, "d_head", 128),
        ({"attn_config": {"attn_impl": "triton"}}, "n_kv_heads", 32),
    ],
)
def test_settings_are_used(changes: Raw, key: str, expected: object, tmp_path: Path) -> None:
    config = read(changed(MPT_7B, **changes), tmp_path)
    got = config.attention["clip_qkv"] if key == "attention.clip_qkv" else getattr(config, key)
    assert got == (pytest.approx(expected) if isinstance(expected, float) else expected)


# -- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # What later architectures under the same name compute, and MPT as released does not.
        ({"attn_config": {"rope": True, "alibi": False}}, "attn_config.rope`.*`True`"),
        ({"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm`.*`True`"),
        ({"attn_config": {"qk_gn": True}}, "attn_config.qk_gn`.*`True`"),
        ({"attn_config": {"fused_qkv": False}}, "attn_config.fused_qkv`.*`False`"),
        ({"attn_config": {"sliding_window_size": 4096}}, "attn_config.sliding_window_size`.*`4096`"),
        ({"attn_config": {"attn_logit_softcapping": 50.0}}, "attn_config.attn_logit_softcapping`.*`50.0`"),
        ({"attn_config": {"nope": True}}, "attn_config.nope`"),
        ({"attn_config": {"reuse_kv_layer_idx": 3}}, "attn_config.reuse_kv_layer_idx`.*`3`"),
        ({"attn_config": {"attn_type": "linear_attention"}}, "attn_config.attn_type`.*`'linear_attention'`.*multihead"),
        ({"attn_config": {"attn_impl": "ring"}}, "attn_config.attn_impl`.*`'ring'`"),
        ({"attn_config": {"window": 5}}, "attn_config.window`.*`5`"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, "ffn_config.ffn_type`.*`'mb_moe'`"),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type`.*`'mptglu'`"),
        ({"ffn_config": {"moe_num_experts": 8}}, "ffn_config.moe_num_experts`.*`8`"),
        ({"ffn_config": {"ffn_act_fn": {"name": "silu"}}}, "ffn_config.ffn_act_fn`.*silu"),
        ({"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}}, "ffn_config.ffn_act_fn`.*tanh"),
        ({"norm_type": "rmsnorm"}, "`norm_type`.*`'rmsnorm'`.*layernorm"),
        ({"block_overrides": {"order": []}}, "`block_overrides`"),
        ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping`.*`30.0`"),
        ({"attention_bias": True}, "`attention_bias`.*`True`"),
        ({"quantization_config": {"bits": 4, "quant_method": "hqq"}}, "`quantization_config`.*hqq.*supported: AWQ"),
        ({"head_dim": 64}, "`head_dim`.*`64`.*`128`"),
        ({"logit_scale": "sqrt"}, "`logit_scale`.*`'sqrt'`.*inv_sqrt_d_model"),
        ({"my_new_idea": 3}, "`my_new_idea`.*`3`"),
        # Numbers that do not fit together.
        ({"n_heads": 24}, "d_model 4096.*n_heads 24"),
        ({"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 7}}, "n_heads 32.*kv_n_heads 7"),
        ({"attn_config": {"kv_n_heads": 8}}, "attn_config.kv_n_heads`.*`8`"),
        ({"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": 8}}, "attn_config.kv_n_heads`.*`8`"),
        ({"expansion_ratio": 1.0001}, "4096.*1.0001"),
        # Values of the wrong kind.
        ({"n_layers": 0}, "`n_layers`.*`0`"),
        ({"d_model": "4096"}, "`d_model`.*`'4096'`"),
        ({"max_seq_len": 2048.5}, "`max_seq_len`.*`2048.5`"),
        ({"vocab_size": True}, "`vocab_size`.*`True`"),
        ({"no_bias": "false"}, "`no_bias`.*`'false'`"),
        ({"expansion_ratio": None}, "`expansion_ratio`.*`None`"),
        ({"norm_eps": "small"}, "`norm_eps`.*`'small'`"),
        ({"resid_pdrop": 1.5}, "`resid_pdrop`.*at most 1.*`1.5`"),
        ({"embedding_fraction": 0}, "`embedding_fraction`.*above 0.*`0`"),
        ({"attn_config": {"clip_qkv": -6}}, "attn_config.clip_qkv`.*`-6`"),
        ({"attn_config": {"clip_qkv": "six"}}, "attn_config.clip_qkv`.*`'six'`"),
        ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max`.*above 0.*`0`"),
        ({"attn_config": {"qk_ln": "yes"}}, "attn_config.qk_ln`.*`'yes'`"),
        ({"attn_config": {"attn_pdrop": float("nan")}}, "attn_config.attn_pdrop`.*`nan`"),
        ({"attn_config": ["alibi"]}, "`attn_config`.*object"),
        ({"ffn_config": "mptmlp"}, "`ffn_config`.*object"),
        ({"model_type": "llama"}, "model_type `llama`"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: Raw, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedConfig, match=words) as caught:
        read(changed(MPT_7B, **changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_mosaic_gpt_slopes_of_odd_head_counts_are_refused(tmp_path: Path) -> None:
    # In 2023-04 they were 2^(-8 i / H) for every H, not the paper's: a model of 12 heads would be read wrongly.
    with pytest.raises(UnsupportedConfig, match="n_heads 12"):
        read(changed(MPT_1B, d_model=1536, n_heads=12), tmp_path)


# -- transformers' in-tree class -------------------------------------------------------------------------------------

STOCK_KEYS = (
    "d_model",
    "n_heads",
    "n_layers",
    "expansion_ratio",
    "max_seq_len",
    "vocab_size",
    "no_bias",
    "logit_scale",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_stock_reads(name: str, tmp_path: Path) -> None:
    """Its reader is strict: 6 for clip_qkv, 0.0 for attn_pdrop, 1 for embedding_fraction are errors to it."""
    careless = {"emb_pdrop": 0, "embedding_fraction": 1, "expansion_ratio": 4.0}
    old = {"attn_pdrop": 0.0} if name.endswith("200b") else {"attn_config": {"attn_pdrop": 0.0}}
    raw = changed(PUBLISHED[name], **careless, **old)
    if "mlp_ratio" in raw:
        del raw["expansion_ratio"]
    ours = read(raw, tmp_path)
    ours.save_pretrained(tmp_path)
    stock = MptConfig.from_pretrained(tmp_path)
    assert [getattr(stock, key) for key in STOCK_KEYS] == [getattr(ours, key) for key in STOCK_KEYS]
    for key in ("clip_qkv", "alibi_bias_max", "qk_ln", "softmax_scale", "attn_type", "attn_pdrop"):
        assert getattr(stock.attn_config, key) == ours.attention[key]
    written = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in written  # nobody is sent to run code
    assert written["architectures"] == ["MPTForCausalLM"]


def test_norm_eps_is_written_under_stocks_name_too(tmp_path: Path) -> None:
    read(changed(MPT_7B, norm_eps=1e-6), tmp_path).save_pretrained(tmp_path)
    assert MptConfig.from_pretrained(tmp_path).layer_norm_epsilon == 1e-6


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "1b" not in name])
def test_what_stock_saves_again_we_read(name: str, tmp_path: Path) -> None:
    """A model saved by the in-tree class, whose attn_config gains a dozen keys of a config of its own."""
    raw = changed(small(PUBLISHED[name]), embedding_fraction=1.0)
    clip = raw["attn_config"]["clip_qkv"]
    raw["attn_config"]["clip_qkv"] = None if clip is None else float(clip)  # else it refuses to load
    stock = MptForCausalLM(MptConfig.from_dict(raw))
    stock.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert len(saved["attn_config"]) > 10, "transformers has stopped adding keys; this test proves little now"
    assert facts_of(read_config(tmp_path)) == facts_of(read(raw, tmp_path))


def test_stocks_own_config_object_becomes_ours() -> None:
    stock = MptConfig(d_model=64, n_heads=4, n_layers=2, attn_config={"clip_qkv": 6.0, "alibi_bias_max": 16})
    ours = MPTConfig.from_dict(stock.to_dict())
    assert facts_of(ours) == (64, 4, 2, 2048, 16, 6.0, False)
    assert MPTConfig(d_model=64, n_heads=4, attn_config=stock.attn_config).attention["clip_qkv"] == 6


# Every setting away from its default, so that a lost one shows.
EVERYTHING: Raw = {
    "d_model": 96, "n_heads": 6, "n_layers": 3, "expansion_ratio": 1.5, "max_seq_len": 77, "vocab_size": 111,
    "resid_pdrop": 0.1, "emb_pdrop": 0.2, "embedding_fraction": 0.3, "learned_pos_emb": False, "logit_scale": 0.4,
    "no_bias": False, "norm_type": "layernorm", "norm_eps": 1e-3, "use_cache": False, "tie_word_embeddings": False,
    "init_config": {"init_std": 0.02}, "eos_token_id": [0, 3],
    "attn_config": {
        "attn_type": "grouped_query_attention", "kv_n_heads": 3, "attn_pdrop": 0.5, "clip_qkv": 6, "qk_ln": True,
        "softmax_scale": 0.6, "alibi": False, "alibi_bias_max": 16, "attn_uses_sequence_id": True,
    },
}  # fmt: skip


def test_a_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = MPTConfig(**copy.deepcopy(EVERYTHING))
    config.save_pretrained(tmp_path)
    again = read_config(tmp_path)
    assert again.to_dict() == config.to_dict()
    for key, value in EVERYTHING.items():
        got = getattr(again, key)
        if isinstance(value, dict):
            assert {k: got[k] for k in value} == value, key
        else:
            assert got == value, key


def test_configs_do_not_share_their_tables() -> None:
    one, other = MPTConfig(), MPTConfig()
    one.attention["alibi_bias_max"] = 16
    assert other.attention["alibi_bias_max"] == MPTConfig().attention["alibi_bias_max"] == 8


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max 16"),
        ({"attn_config": {"alibi": False}}, "no ALiBi"),
        ({"attn_config": {"qk_ln": True}}, "qk_ln"),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "multiquery_attention"),
        ({"expansion_ratio": 2}, "expansion_ratio 2"),
        ({"logit_scale": 0.5}, "logit_scale 0.5"),
        ({"no_bias": False}, "biases"),
    ],
)
def test_what_stock_would_compute_differently_is_named(changes: Raw, phrase: str, tmp_path: Path) -> None:
    (found,) = read(changed(MPT_7B, **changes), tmp_path).beyond_stock()
    assert phrase in found


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-30b", "mpt-30b-chat, first revision"])
def test_where_stock_is_right_nothing_is_named(name: str, tmp_path: Path) -> None:
    assert read(PUBLISHED[name], tmp_path).beyond_stock() == []
