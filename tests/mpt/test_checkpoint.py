"""Folders of every make load bit for bit; damaged or hostile ones are refused in words.

And nothing half-written ever has the name of a folder that is whole.
"""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, MptConfig, MptForCausalLM

import mpt
from mpt import checkpoint
from mpt.config import MPTConfig
from mpt.errors import CheckpointNotFound, DamagedFile, MachineRefused, UnsupportedConfig, UserError
from mpt.manifest import read_manifest
from mpt.tokenizer import Tokenizer
from mpt.transformers_model import MPTForCausalLM

Weights = dict[str, Tensor]
V = 97
IDS = torch.arange(40)[None] * 7 % V


def make_model(**changes: Any) -> MPTForCausalLM:
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": V, "max_seq_len": 64}
    return MPTForCausalLM(MPTConfig(**{**shape, **changes})).eval()


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def model() -> MPTForCausalLM:
    return make_model()


@pytest.fixture
def weights(model: MPTForCausalLM) -> Weights:
    return {name: tensor.clone() for name, tensor in weights_of(model).items()}


@pytest.fixture
def folder(model: MPTForCausalLM, tmp_path: Path) -> Path:
    """A folder with the model's config.json and no weights yet."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    model.config.save_pretrained(folder)
    return folder


def write_sharded_bin(folder: Path, weights: Weights) -> None:
    names = sorted(weights)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, chosen in halves.items():
        torch.save({name: weights[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in halves.items() for name in chosen}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# -- there and back --------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "storywriter": {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}},
    "qk_ln and biases": {"attn_config": {"qk_ln": True}, "no_bias": False},
    "grouped heads": {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}},
    "learned positions": {"attn_config": {"alibi": False}},
    "untied": {"tie_word_embeddings": False, "logit_scale": 0.5, "expansion_ratio": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_loads_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(**KINDS[kind]).to(dtype)
    loaded = mpt.load(mpt.save(model, tmp_path / "saved"))
    assert_same_weights(model, loaded)
    assert loaded.dtype == dtype and not loaded.training
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    # transformers' own reader makes the same of it.
    assert_same_weights(model, MPTForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype))


@pytest.mark.parametrize("max_shard_bytes", [100_000_000, 20_000])
def test_stock_transformers_loads_what_we_save(model: MPTForCausalLM, tmp_path: Path, max_shard_bytes: int) -> None:
    folder = mpt.save(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_bytes < 50_000)
    stock = MptForCausalLM.from_pretrained(folder).eval()
    assert_same_weights(stock, model)
    with torch.no_grad():  # float32 rounding through two layers, on logits of size 5
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_we_load_what_stock_transformers_saves(tmp_path: Path, max_shard_size: str) -> None:
    torch.manual_seed(1)
    config = MptConfig(d_model=96, n_heads=12, n_layers=2, vocab_size=V, max_seq_len=64, attn_config={"clip_qkv": 2.0})
    stock = MptForCausalLM(config).eval()
    stock.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    model = mpt.load(tmp_path)
    assert_same_weights(model, stock)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)


# The flat config of the 1B and StoryWriter's two numbers, in case the shared files are absent.
SMALL = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": V, "no_bias": True}
STORYWRITER = {"model_type": "mpt", "attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6}, **SMALL}
MOSAIC_GPT = {"model_type": "mosaic_gpt", "alibi": True, "attn_qk_ln": True, "mlp_ratio": 4, **SMALL}
SHARED = (
    "mpt-7b", "mpt-7b-instruct", "mpt-7b-chat", "mpt-7b-storywriter", "mpt-7b-8k-chat", "mpt-30b-chat",
    "mpt-30b-instruct", "mpt-1b-redpajama-200b",
)  # fmt: skip


def assert_round_trip(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    model = MPTForCausalLM(checkpoint.read_config(tmp_path)).to(torch.bfloat16).eval()
    again = mpt.load(mpt.save(model, tmp_path / "again"))
    assert again.config.to_dict() == {**model.config.to_dict(), "dtype": "bfloat16"}
    assert_same_weights(model, again)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("raw", [STORYWRITER, MOSAIC_GPT])
def test_released_shapes_round_trip(raw: dict[str, Any], tmp_path: Path) -> None:
    assert_round_trip(raw, tmp_path)


@pytest.mark.parametrize("name", SHARED)
def test_shared_configs_round_trip(name: str, data_file: Callable[[str], Path], tmp_path: Path) -> None:
    raw = json.loads(data_file(f"mpt_configs/{name}.config.json").read_text())
    assert_round_trip({**raw, **SMALL}, tmp_path)


# -- names and containers of other makes -----------------------------------------------------------------------------


def test_composers_prefix_is_understood(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    assert_same_weights(mpt.load(folder), model)


def test_the_names_of_mosaic_gpt_are_understood(tmp_path: Path) -> None:
    """As mpt-1b-redpajama-200b is stored: ln_ for norm_, mlp.mlp_up for ffn.up_proj; q_ln and k_ln keep theirs."""
    model = make_model(attn_config={"qk_ln": True})
    new_to_old = {"transformer.wte": "transformer.wte", "transformer.norm_f": "transformer.ln_f"}
    for layer in range(2):
        block = f"transformer.blocks.{layer}."
        for new, old in (
            ("norm_1", "ln_1"),
            ("norm_2", "ln_2"),
            ("attn.Wqkv", "attn.Wqkv"),
            ("attn.out_proj", "attn.out_proj"),
            ("attn.q_ln", "attn.q_ln"),
            ("attn.k_ln", "attn.k_ln"),
            ("ffn.up_proj", "mlp.mlp_up"),
            ("ffn.down_proj", "mlp.mlp_down"),
        ):
            new_to_old[block + new] = block + old
    renamed = {
        f"{new_to_old[name.removesuffix('.weight')]}.weight": tensor for name, tensor in weights_of(model).items()
    }
    assert len(renamed) == 2 * 8 + 2
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**MOSAIC_GPT, "torch_dtype": "float32"}))
    assert_same_weights(mpt.load(tmp_path), model)


def test_bin_files_load(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same_weights(mpt.load(folder), model)


def test_sharded_bin_files_load(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    write_sharded_bin(folder, weights)
    assert_same_weights(mpt.load(folder), model)


def test_tensors_that_share_a_storage_load(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    """Slices of one flat buffer, as FSDP leaves them, each at its own offset."""
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    start, sliced = 0, {}
    for name, tensor in weights.items():
        sliced[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    torch.save(sliced, folder / "pytorch_model.bin")
    assert_same_weights(mpt.load(folder), model)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_other_dtypes_are_converted(folder: Path, weights: Weights, stored: torch.dtype, suffix: str) -> None:
    cast = {name: tensor.to(stored) for name, tensor in weights.items()}
    if suffix == "bin":
        torch.save(cast, folder / "pytorch_model.bin")
    else:
        save_file(cast, folder / "model.safetensors")
    for name, tensor in weights_of(mpt.load(folder, dtype=torch.float32)).items():
        assert torch.equal(tensor, cast[name].float()), name
    (folder / "config.json").write_text(json.dumps({**SMALL, "model_type": "mpt"}))  # says nothing of a dtype
    assert mpt.load(folder).dtype == stored


def test_safetensors_go_before_bin(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_weights(mpt.load(folder), model)


# -- tied and untied heads -------------------------------------------------------------------------------------------


def test_a_tied_head_may_be_stored_too(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    head = weights["transformer.wte.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    assert_same_weights(mpt.load(folder), model)


@pytest.mark.parametrize("other", ["trained apart", "of another shape"])
def test_a_tied_head_that_differs_is_refused(folder: Path, weights: Weights, other: str) -> None:
    head = weights["transformer.wte.weight"].clone()
    head[-1, -1] += 0.001
    save_file(
        {**weights, "lm_head.weight": head if other == "trained apart" else head[:5]}, folder / "model.safetensors"
    )
    with pytest.raises(DamagedFile, match=r"lm_head.weight.*tie_word_embeddings"):
        mpt.load(folder)


def test_an_untied_head_is_its_own(folder: Path, weights: Weights) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    save_file({**weights, "lm_head.weight": torch.ones(V, 32)}, folder / "model.safetensors")
    loaded = mpt.load(folder)
    assert torch.equal(loaded.lm_head.weight, torch.ones(V, 32))
    assert torch.equal(loaded.transformer.wte.weight, weights["transformer.wte.weight"])


# -- damage ----------------------------------------------------------------------------------------------------------


def test_missing_weights_are_named(folder: Path, weights: Weights) -> None:
    del weights["transformer.blocks.1.attn.Wqkv.weight"], weights["transformer.norm_f.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"misses `transformer.blocks.1.attn.Wqkv.weight` \(and 1 more"):
        mpt.load(folder)


def test_unknown_weights_are_named(folder: Path, weights: Weights) -> None:
    save_file({**weights, "transformer.blocks.2.norm_1.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"holds `transformer.blocks.2.norm_1.weight`, unknown"):
        mpt.load(folder)


def test_wrong_shapes_are_named(folder: Path, weights: Weights) -> None:
    weights["transformer.blocks.0.ffn.up_proj.weight"] = torch.ones(64, 32)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"up_proj.weight.*\[64, 32\].*\[128, 32\]"):
        mpt.load(folder)


def test_a_tensor_stored_twice_is_refused(folder: Path, weights: Weights) -> None:
    save_file({**weights, "model.transformer.norm_f.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(DamagedFile, match=r"transformer.norm_f.weight` is stored twice"):
        mpt.load(folder)


def test_safetensors_cut_anywhere_are_refused(folder: Path, weights: Weights) -> None:
    file = folder / "model.safetensors"
    save_file(weights, file)
    whole = file.read_bytes()
    for size in [*range(0, 2000, 13), *range(2000, len(whole), 9973), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(DamagedFile, match=r"not a whole safetensors file.*copy it again"):
            checkpoint.stored_tensors(folder)


def test_garbled_safetensors_headers_raise_nothing_but_our_errors(folder: Path, weights: Weights) -> None:
    file = folder / "model.safetensors"
    save_file(weights, file)
    whole = bytearray(file.read_bytes())
    (n_header,) = struct.unpack("<Q", whole[:8])
    random = torch.Generator().manual_seed(0)
    refused = 0
    for at in range(0, 8 + n_header, 3):
        garbled = bytearray(whole)
        garbled[at] = int(torch.randint(256, (), generator=random))
        file.write_bytes(garbled)
        try:
            checkpoint.stored_tensors(folder)
        except (DamagedFile, UnsupportedConfig):
            refused += 1
    assert refused > n_header / 12  # most bytes are names, whose change shows only against the config


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [32], "data_offsets": [-128, 0]},
        {"dtype": "F32", "shape": [32], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [-32], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": "all", "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [32]},
        ["F32", [32], [0, 128]],
    ],
)
def test_lying_safetensors_headers_are_refused(folder: Path, entry: object) -> None:
    header = json.dumps({"transformer.norm_f.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    with pytest.raises(DamagedFile, match="not a whole safetensors file"):
        mpt.load(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_no_floats_are_refused(folder: Path, weights: Weights, suffix: str) -> None:
    """Somebody's quantised weights: their values mean nothing without their scales."""
    weights["transformer.norm_f.weight"] = torch.ones(32, dtype=torch.int8)
    if suffix == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedConfig, match=r"norm_f.weight.*(I8|int8).*supported"):
        mpt.load(folder)


def test_bin_files_cut_anywhere_are_refused(folder: Path, weights: Weights) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    whole = file.read_bytes()
    for size in [0, 1, 100, *range(1000, len(whole), 20011), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(
            DamagedFile, match=r"not a whole torch file.*copy it again|is damaged, or more than weights"
        ) as caught:
            checkpoint.stored_tensors(folder)
        assert "\n" not in str(caught.value)


class Malice:
    """What an attacker pickles: unpickling it runs a command."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.evidence}",)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_code_in_a_bin_file_is_refused_and_not_run(
    folder: Path, weights: Weights, container: str, tmp_path: Path
) -> None:
    evidence = tmp_path / "it ran".replace(" ", "_")
    contents = {**weights, "transformer.extra": Malice(evidence)}
    if container == "torch":
        torch.save(contents, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Malice(evidence)}, protocol=2))
    with pytest.raises(DamagedFile, match=r"(can run code|more than weights).*safetensors") as caught:
        mpt.load(folder)
    assert not evidence.exists()
    assert "weights_only" not in str(caught.value)  # torch's own text advises to run the code after all
    if container == "torch":
        assert "system" in str(caught.value)
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert evidence.exists(), "the file was harmless: this test proved nothing"


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([torch.ones(3)], "holds a list"),
        ({"state_dict": {"x": torch.ones(3)}}, "`state_dict`.*is a dict, not a tensor"),
        ({"transformer.wte.weight": torch.ones(32, V).T}, "transposed"),
    ],
)
def test_bin_files_of_something_else_are_refused(folder: Path, contents: object, words: str) -> None:
    torch.save(contents, folder / "pytorch_model.bin")
    with pytest.raises((DamagedFile, UnsupportedConfig), match=words):
        mpt.load(folder)


def test_bin_files_from_before_torch_1_6_are_named(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedConfig, match=r"before 1\.6"):
        mpt.load(folder)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_stays_in_its_folder(folder: Path, weights: Weights, target: str) -> None:
    save_file(weights, folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, target)}))
    with pytest.raises(DamagedFile, match="points outside its folder"):
        mpt.load(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, "not there .2 of 2 missing"),
        ({"metadata": {}}, "no `weight_map`"),
        ({"weight_map": ["model.safetensors"]}, "no `weight_map`"),
        (["model.safetensors"], "holds a list"),
    ],
)
def test_a_broken_index_is_refused(folder: Path, index: object, words: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match=words):
        mpt.load(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "manifest.json"])
@pytest.mark.parametrize("contents", ["", "{", "[1, 2]", "\x00\x01", "null"])
def test_garbled_json_is_a_damaged_file(folder: Path, weights: Weights, file: str, contents: str) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / file).write_text(contents)
    with pytest.raises(DamagedFile, match=re.escape(file)):
        mpt.load(folder)


def test_a_folder_without_a_checkpoint_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"model\.safetensors or pytorch_model\.bin"):
        mpt.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFound, match=r"config\.json"):
        mpt.load(folder)


# -- the manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: MPTForCausalLM, tmp_path: Path) -> Path:
    return mpt.save(model, tmp_path / "saved", manifest={"name": "mine", "scores": {"loss": 1.5}})


def test_the_manifest_covers_every_file(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None
    assert (manifest["name"], manifest["scores"]) == ("mine", {"loss": 1.5})
    assert manifest["files"].keys() == {p.name for p in saved.iterdir()} - {"manifest.json"}
    assert {len(digest) for digest in manifest["files"].values()} == {64}
    # The sha256 that coreutils gives.
    shasum = os.popen(f"sha256sum {saved / 'model.safetensors'}").read().split()
    assert not shasum or manifest["files"]["model.safetensors"] == shasum[0]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_flipped_bit_is_found(saved: Path, file: str) -> None:
    content = bytearray((saved / file).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(DamagedFile, match=f"{file}.*sha256.*copy the checkpoint again"):
        mpt.load(saved)
    if file == "model.safetensors":  # a flipped bit of a weight is a weight, to a reader without the manifest
        mpt.load(saved, verify=False)


def test_a_lost_file_is_found(saved: Path) -> None:
    (saved / "generation_config.json").unlink()
    with pytest.raises(DamagedFile, match=r"generation_config\.json.*not in"):
        mpt.load(saved)


def test_a_manifest_without_sums_is_damaged(saved: Path) -> None:
    (saved / "manifest.json").write_text('{"name": "mine", "files": ["model.safetensors"]}')
    with pytest.raises(DamagedFile, match=r"manifest\.json.*no `files`"):
        mpt.load(saved)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_target_that_holds_something_is_refused(model: MPTForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    for target in (tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(UserError, match="is not an empty folder"):
            mpt.save(model, target)
    assert [p.name for p in tmp_path.rglob("*")] == ["notes", "mine.txt"]


def test_saving_draws_no_progress_bar(model: MPTForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mpt.save(model, tmp_path / "new")
    assert capfd.readouterr() == ("", "")
    model.save_pretrained(tmp_path / "theirs")  # whoever calls transformers gets theirs
    assert "model shards" in capfd.readouterr().err


def test_an_empty_target_is_taken(model: MPTForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert_same_weights(mpt.load(mpt.save(model, tmp_path / "new")), model)


def test_nothing_half_written_is_under_the_final_name(
    model: MPTForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_manifest", full_disk)
        with pytest.raises(MachineRefused, match="No space"):
            mpt.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert_same_weights(mpt.load(mpt.save(model, tmp_path / "new")), model)  # what was left is no hindrance
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_the_tokenizer_and_its_end_ids_are_saved(model: MPTForCausalLM, small_bpe: Tokenizer, tmp_path: Path) -> None:
    folder = mpt.save(model, tmp_path / "chat", tokenizer=small_bpe)
    loaded = mpt.load(folder)
    assert loaded.generation_config.eos_token_id == list(small_bpe.end_ids)
    assert loaded.generation_config.use_cache
    text = "Write a naïve response. 🙂"
    assert Tokenizer.from_folder(folder).encode(text) == small_bpe.encode(text)


# -- generation settings and code that lies beside a checkpoint ------------------------------------------------------


def published_generation_config(eos: int | list[int]) -> str:
    return json.dumps(
        {"_from_model_config": True, "transformers_version": "4.28.1", "eos_token_id": eos, "use_cache": False}
    )


@pytest.mark.parametrize("eos", [0, [0, 50278]])
def test_published_end_ids_are_kept_and_the_cache_is_on(folder: Path, weights: Weights, eos: int | list[int]) -> None:
    save_file(weights, folder / "model.safetensors")
    (folder / "generation_config.json").write_text(published_generation_config(eos))
    loaded = mpt.load(folder)
    assert loaded.generation_config.eos_token_id == eos
    assert loaded.generation_config.use_cache is True  # published as false, which makes generation quadratic


def test_generation_ends_at_the_published_end_ids(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")
    loaded = mpt.load(folder)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert loaded.generation_config.eos_token_id == 0  # what the family means when a folder says nothing
    first, *_ = loaded.generate(IDS, **settings, eos_token_id=None)[0, 40:].tolist()
    (folder / "generation_config.json").write_text(published_generation_config([0, first]))
    assert mpt.load(folder).generate(IDS, **settings)[0, 40:].tolist() == [first]


def test_contradicting_generation_settings_do_not_stop_a_save(folder: Path, weights: Weights, tmp_path: Path) -> None:
    """As in many finetunes' folders: a temperature without do_sample, which transformers reads but will not write."""
    save_file(weights, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.6, "top_p": 0.9}')
    loaded = mpt.load(folder)
    assert loaded.generation_config.eos_token_id == 3
    again = mpt.save(loaded, tmp_path / "again")
    assert GenerationConfig.from_pretrained(again).eos_token_id == 3


def test_code_beside_a_checkpoint_is_never_run(folder: Path, model: MPTForCausalLM, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")
    evidence = folder.parent / "it_ran"
    for name in ("configuration_mpt.py", "modeling_mpt.py", "__init__.py", "tokenizer.py"):
        (folder / name).write_text(f"open({str(evidence)!r}, 'w')\nclass MPTConfig: pass\nclass MPTForCausalLM: pass\n")
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"] = {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    loaded = mpt.load(folder)
    assert_same_weights(loaded, model)
    assert not evidence.exists()
    again = mpt.save(loaded, folder.parent / "again")
    assert not list(again.glob("*.py"))
    assert "auto_map" not in json.loads((again / "config.json").read_text())


def test_loading_does_not_change_the_folder(saved: Path, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(saved, before)
    loaded = mpt.load(saved)
    with torch.no_grad():
        loaded.transformer.wte.weight.zero_()  # a memory-mapped weight would write through, or fault
    assert all((saved / p.name).read_bytes() == p.read_bytes() for p in before.iterdir())
    assert load_file(saved / "model.safetensors")["transformer.wte.weight"].any()


def test_saved_files_can_be_read_by_others(tmp_path: Path) -> None:
    """A server often runs as another user than the training did."""
    folder = mpt.save(MPTForCausalLM(MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32)), tmp_path / "saved")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.suffix == ".safetensors"} == {0o644}
