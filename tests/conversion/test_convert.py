"""Conversions there and back: bit for bit, by the command line, and refused where a format cannot hold the model."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

import mpt.checkpoint
import mpt.manifest
from conversion import verify
from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt import cli
from mpt.backends.native import library
from mpt.errors import DamagedFile, MachineRefused, UnsupportedConfig, UserError
from tests.conversion.conftest import SHAPES, have_equal_weights, logits, make, random_ids, weights

FT = [shape for shape in SHAPES if shape not in ("storywriter", "1b", "grouped", "scaled")]
GGUF = [shape for shape in SHAPES if shape not in ("scaled", "1b")]


def path_of(folder: Path) -> Path:
    return folder / "model.gguf" if (folder / "model.gguf").is_file() else folder


def cases() -> list[Any]:
    there: list[tuple[str, list[str]]] = [
        ("hf", list(SHAPES)), ("onnx", list(SHAPES)), ("fastertransformer", FT), ("gguf", GGUF)
    ]  # fmt: skip
    return [pytest.param(to, shape, id=f"{to}-{shape}") for to, shapes in there for shape in shapes]


@pytest.mark.parametrize(("to", "shape"), cases())
def test_there_and_back_is_bit_for_bit_and_all_levels_pass(to: str, shape: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", shape)
    tp = 4 if to == "fastertransformer" else 1
    report = convert(source, tmp_path / "there", Options(to=to, tensor_parallel=tp))
    assert {check.level for check in report.checks} == {1, 2, 3, 4}
    assert all(check.ok for check in report.checks), report.render()
    convert(path_of(tmp_path / "there"), tmp_path / "back", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "back")
    ids = random_ids(1, 50)
    assert torch.equal(logits(tmp_path / "back", ids), logits(source, ids))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["hf", "fastertransformer", "gguf"])
def test_half_precision_is_kept(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", dtype)
    convert(source, tmp_path / "there", Options(to=to))
    found = open_source(path_of(tmp_path / "there"))
    assert found.dtype == dtype
    convert(path_of(tmp_path / "there"), tmp_path / "back", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "back")


@pytest.mark.parametrize(("to", "dtype"), [("onnx", "int8"), ("onnx", "int4"), ("gguf", "int8"), ("gguf", "int4")])
def test_quantised_copies_stay_near(to: str, dtype: Any, tmp_path: Path) -> None:
    allow = ("tokenizer",) if to == "gguf" else ()  # llama.cpp splits its text in another way
    with pytest.raises(UnsupportedConfig, match="tokenizer") if allow else contextlib.nullcontext():
        convert("mpt-tiny", tmp_path / "here", Options(to=to, dtype=dtype))
    report = convert("mpt-tiny", tmp_path / "there", Options(to=to, dtype=dtype, allow=allow))
    round_trip = next(check for check in report.checks if check.level == 2)
    assert round_trip.ok and "off by at most" in round_trip.detail
    numbers = [check for check in report.checks if check.level == 3]
    assert len(numbers) >= 2 and all(check.ok for check in numbers)
    convert(path_of(tmp_path / "there"), tmp_path / "back", Options(to="hf", dtype="float32"))
    before, after = weights(mpt.catalog.resolve("mpt-tiny")), weights(tmp_path / "back")
    name = "transformer.blocks.1.ffn.up_proj.weight"
    error = float((before[name].float() - after[name]).norm() / before[name].float().norm())
    # A block's largest of 32 normal values is about 2.1 deviations; a step of 2.1 / 127 or / 8 rounds off 0.29 of it.
    expected = {"int8": 2.1 / 127 * 0.29, "int4": 2.1 / 8 * 0.29}[dtype]
    assert error == pytest.approx(expected, rel=0.25)


def test_the_command_line_converts_inspects_and_verifies(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mpt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    out = tmp_path / "out"
    code, said, _ = run("convert", str(checkpoint), str(out), "--to", "gguf", "--dtype", "float16")
    assert code == 0 and said.splitlines()[-1] == str(out) and "26 of 26" not in said
    assert (out / verify.REPORT).is_file() and (out / "manifest.json").is_file()
    code, said, _ = run("inspect", str(out / "model.gguf"), "--json")
    facts = json.loads(said)
    n = sum(tensor.numel() for name, tensor in weights(checkpoint).items() if name != "lm_head.weight")
    assert (facts["kind"], facts["parameters"], facts["dtype"], facts["context"]) == ("gguf", n, "float16", 512)
    assert facts["licence"] == "Apache-2.0"
    facts = json.loads(run("inspect", str(out / "model.gguf"), "--run", "--device", "cpu", "--json")[1])
    assert facts["runs on"] == "cpu, float16"
    assert run("convert", str(checkpoint), str(tmp_path / "ft"), "--to", "fastertransformer")[0] == 0
    assert "convert it `--to hf` first" in run("inspect", str(tmp_path / "ft"), "--run")[2]
    facts = json.loads(run("inspect", str(checkpoint), "--run", "--dtype", "float32", "--device", "cpu", "--json")[1])
    assert facts["runs on"] == "cpu, float32"
    assert facts["runs"]["prompt"].startswith("C (" if library.why_none() is None else "torch (")
    assert "are for `--run`" in run("inspect", str(checkpoint), "--dtype", "float32")[2]
    assert run("verify", str(out))[0] == 0
    assert run("verify", str(out), "--against", str(checkpoint))[0] == 0
    code, _, error = run("convert", str(checkpoint), str(out), "--to", "hf")
    assert code == 2 and "is not an empty folder" in error and error.count("\n") == 1
    code, _, error = run("convert", str(tmp_path / "nowhere"), str(tmp_path / "x"), "--to", "hf")
    assert code == 2 and "does not exist" in error
    data = bytearray((out / "model.gguf").read_bytes())
    data[-1] ^= 1
    (out / "model.gguf").write_bytes(data)
    code, said, error = run("verify", str(out))
    assert code == 3 and "WRONG" in said and "does not match its sha256" in said


@pytest.mark.parametrize(
    ("to", "shape", "names"),
    [
        ("fastertransformer", "storywriter", ("clip_qkv", "alibi_bias_max")),
        ("fastertransformer", "1b", ("qk_ln",)),
        ("fastertransformer", "grouped", ("kv_n_heads",)),
        ("fastertransformer", "scaled", ("logit_scale", "softmax_scale")),
        ("gguf", "scaled", ("logit_scale", "softmax_scale")),
        ("gguf", "1b", ("qk_ln",)),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    to: str, shape: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    source = make(tmp_path / "source", shape)
    for n in range(len(names)):
        with pytest.raises(UnsupportedConfig, match=f"cannot express {names[n]}"):
            convert(source, tmp_path / "out", Options(to=to, allow=names[:n]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="gives up nothing"):
        convert(source, tmp_path / "out", Options(to=to, allow=("colour",)))


def test_a_setting_given_up_is_in_the_manifest(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "storywriter")
    allow = ("clip_qkv", "alibi_bias_max")
    convert(source, tmp_path / "out", Options(to="fastertransformer", allow=allow))
    manifest = mpt.manifest.read_manifest(tmp_path / "out")
    assert manifest is not None and [what.split()[0] for what in manifest["given_up"]] == list(allow)


def test_a_file_that_only_llama_cpp_cannot_run_comes_back_whole(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "1b")
    report = convert(source, tmp_path / "there", Options(to="gguf", allow=("qk_ln",)))
    assert all(check.ok for check in report.checks)
    convert(tmp_path / "there" / "model.gguf", tmp_path / "back", Options(to="hf"))
    assert have_equal_weights(source, tmp_path / "back")


def test_fastertransformers_folder_is_the_public_converters(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", Options(to="fastertransformer", tensor_parallel=2, verify=False))
    folder = tmp_path / "out" / "2-gpu"
    assert len(list(folder.glob("*.bin"))) == 3 + 2 * (6 + 6 * 2)
    # Keys, order and forms of llm-foundry's convert_and_save_ft_weights.
    assert (folder / "config.ini").read_text() == (
        "[gpt]\nmodel_name = source\nhead_num = 4\nsize_per_head = 16\ninter_size = 256\nmax_pos_seq_len = 512\n"
        "num_layer = 2\nvocab_size = 2048\nstart_id = 0\nend_id = 0\nweight_data_type = fp32\n"
        "tensor_para_size = 2\nlayernorm_eps = 1e-05\nhas_positional_encoding = False\n"
        "use_attention_linear_bias = True\n"
    )
    # The layout by its definition: W^T as (C, 3, C), the last axis split over the ranks.
    qkv = weights(checkpoint)["transformer.blocks.1.attn.Wqkv.weight"].numpy()
    second = np.fromfile(folder / "model.layers.1.attention.query_key_value.weight.1.bin", np.float32)
    assert np.array_equal(second.reshape(64, 3, 32), qkv.T.reshape(64, 3, 64)[:, :, 32:])
    down = weights(checkpoint)["transformer.blocks.0.ffn.down_proj.weight"].numpy()
    first = np.fromfile(folder / "model.layers.0.mlp.dense_4h_to_h.weight.0.bin", np.float32)
    assert np.array_equal(first.reshape(128, 64), down.T[:128])


def test_options_that_mean_nothing_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for options, said in (
        (Options(to="hf", dtype="int8"), "does not exist for hf"),
        (Options(to="onnx", dtype="bfloat16"), "does not exist for onnx"),
        (Options(to="hf", tensor_parallel=2), "goes with --to fastertransformer"),
        (Options(to="fastertransformer", tensor_parallel=3), "must divide n_heads 4"),
        (Options(to="gguf", triton="whole"), "`--triton` goes with"),
        (Options(to="hf", base="mpt-tiny"), "`--base` goes with adapters"),
    ):
        with pytest.raises(UserError, match=said):
            convert(checkpoint, tmp_path / "out", options)
        assert not list(tmp_path.glob("out*"))


def test_a_full_disk_is_seen_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(MachineRefused, match="are needed; free some space"):
        convert(checkpoint, tmp_path / "out", Options(to="hf"))
    assert not list(tmp_path.glob("out*"))


def test_values_over_float16_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    model = mpt.checkpoint.load(source)
    with torch.no_grad():
        model.transformer.blocks[1].ffn.up_proj.weight[3, 5] = 70_000
    mpt.checkpoint.save(model, tmp_path / "large", tokenizer=mpt.tokenizer.Tokenizer.from_folder(source))
    for to in ("hf", "onnx", "fastertransformer", "gguf"):
        with pytest.raises(DamagedFile, match=r"1 values of `transformer\.blocks\.1\.ffn\.up_proj\.weight`"):
            convert(tmp_path / "large", tmp_path / "out", Options(to=to, dtype="float16"))
        assert not list(tmp_path.glob("out*"))


def test_an_adapter_is_added_to_its_base(checkpoint: Path, tmp_path: Path) -> None:
    model = mpt.checkpoint.load(checkpoint)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["Wqkv", "down_proj"])
    config.base_model_name_or_path = str(checkpoint)
    torch.manual_seed(5)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    found = get_peft_model_state_dict(model)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in found.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(folder)
    convert(folder, tmp_path / "out", Options(to="hf"))
    ids = random_ids(1, 30)
    with torch.no_grad():
        expected = model.eval()(ids).logits
    torch.testing.assert_close(logits(tmp_path / "out", ids), expected, rtol=0, atol=1e-4)
    assert (expected - logits(checkpoint, ids)).abs().max() > 0.1
    untouched = load_file(tmp_path / "out" / "model.safetensors")["transformer.blocks.0.ffn.up_proj.weight"]
    assert torch.equal(untouched, weights(checkpoint)["transformer.blocks.0.ffn.up_proj.weight"])


def test_shards_have_an_index_and_load(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.model_folder.SHARD_BYTES", 300_000)
    convert(checkpoint, tmp_path / "out", Options(to="hf"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    assert all(
        path.stat().st_size < 310_000 or "00001" in path.name for path in (tmp_path / "out").glob("*.safetensors")
    )
    assert have_equal_weights(checkpoint, tmp_path / "out")
    from transformers import MptForCausalLM

    stock = MptForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(1, 30)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, logits(checkpoint, ids), rtol=0, atol=1e-4)


def test_the_card_says_what_stock_transformers_would_compute_wrongly(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "storywriter")
    convert(source, tmp_path / "out", Options(to="hf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "alibi_bias_max 16 (it uses 8)" in card
    import hashlib

    assert hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest() in card


def test_verification_finds_one_changed_weight(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", Options(to="onnx"))
    path = tmp_path / "out" / "model.safetensors"
    data = np.frombuffer(bytearray(path.read_bytes()), np.float32)
    data = data.copy()
    data[-1000] += 0.5
    path.write_bytes(data.tobytes())
    assert not verify.check(open_source(checkpoint), tmp_path / "out", "float32").is_good  # its sha256
    (tmp_path / "out" / "manifest.json").unlink()
    report = verify.check(open_source(checkpoint), tmp_path / "out", "float32")
    assert not report.is_good
    levels = {check.level for check in report.checks if check.ok is False}
    assert 2 in levels and 3 in levels


@pytest.mark.parametrize("name", ["mpt-tiny-chat", "mpt-tiny-instruct"])
def test_the_chat_template_renders_what_the_server_reads(name: str, tmp_path: Path) -> None:
    from mpt.prompts import Message, encode_chat

    convert(name, tmp_path / "out", Options(to="hf", verify=False))
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer = mpt.tokenizer.Tokenizer.from_folder(tmp_path / "out")
    entry = mpt.catalog.describe(name)
    turns = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi!"), ("user", "Who are you?")]
    for chosen in (turns, turns[1:], turns[1:2], [turns[0], turns[1]]):
        messages = [Message(role=role, content=content) for role, content in chosen]
        found = stock.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = encode_chat(tokenizer, entry.prompt_style, messages, system_default=entry.system_prompt)
        assert found == expected, (stock.decode(found), stock.decode(expected))


def test_the_published_chat_models_default_system_is_in_their_template() -> None:
    from jinja2 import Template

    from mpt.prompts import MPT_7B_CHAT_SYSTEM
    from mpt.style_template import jinja

    text = jinja("chatml", MPT_7B_CHAT_SYSTEM)
    assert text is not None
    rendered = Template(text).render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    system = f"<|im_start|>system\n{MPT_7B_CHAT_SYSTEM}<|im_end|>\n"
    assert rendered == f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_finds_its_tokens_under_their_names_after_a_conversion(tmp_path: Path) -> None:
    """transformers renders the same conversation from the copy as from the source, whose `bos_token` is its own."""
    source = make(tmp_path / "source", "mpt-7b")
    path = source / "tokenizer_config.json"
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    names = {"bos_token": "<|padding|>", "chat_template": template}
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    (source / "special_tokens_map.json").unlink()
    (source / "manifest.json").unlink(missing_ok=True)
    convert(source, tmp_path / "out", Options(to="hf"))
    said = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        for folder in (source, tmp_path / "out")
    ]
    assert said == ["<|padding|>hi<|endoftext|>"] * 2
