"""GGUF files as llama.cpp's own tools make them: each opens by itself, with the values and tokens that it holds.

The files are written here with the `gguf` package by the rules of llama.cpp's converters, and quantised by llama.cpp's
quantiser (`make llama`) or the package's. Expected logits are a float64 forward of what the package dequantises.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from typer.testing import CliRunner

import mpt.checkpoint
from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt.cli import app
from mpt.engine.local import LocalModel
from mpt.errors import DamagedFile, MPTError, UserError
from mpt.options import ModelOptions
from mpt.prompts import Message
from mpt.tokenizer import Tokenizer
from tests.conversion import float64
from tests.conversion.conftest import make, neox_like, random_ids
from tests.conversion.test_llama_cpp import LLAMA, TEXTS, ask

WIDE = {"d_model": 256, "n_heads": 4, "vocab_size": 2176}  # K-quants need rows of 256; 2,048 tokens and padding
Era = Literal["first weeks", "2023", "today"]
KINDS = gguf.GGMLQuantizationType
needs_llama_cpp = pytest.mark.skipif(not (LLAMA / "node_modules/node-llama-cpp").is_dir(), reason="needs `make llama`")
# llama-quantize's file types.
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
}  # fmt: skip


def tokenizer_with_tokens_anywhere() -> Tokenizer:
    """Added tokens at 0 to 3 (control), 2,048 (a run of spaces), 2,049 and, after a gap, 2,100 (control)."""
    described = json.loads(neox_like().to_json())
    for token_id, token, special in ((2048, "    ", False), (2049, "<|new|>", True), (2100, "<|late|>", True)):
        described["model"]["vocab"][token] = token_id
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        described["added_tokens"].append({"id": token_id, "content": token, "special": special, **flags})
    return Tokenizer.from_json(json.dumps(described), "the test's own")


def write(
    path: Path, folder: Path, era: Era, kind: str = "F16", pre: str = "mpt", template: str = "", **keys: Any
) -> Path:
    """A file by the rules of a converter of llama.cpp: `convert-mpt-hf-to-gguf.py`, or `convert_hf_to_gguf.py`."""
    config = json.loads((folder / "config.json").read_text())
    attention = config["attn_config"]
    writer: Any = gguf.GGUFWriter(str(path), "mpt")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["d_model"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(4 * config["d_model"])
    writer.add_head_count(config["n_heads"])
    if attention.get("kv_n_heads"):
        writer.add_head_count_kv(attention["kv_n_heads"])
    writer.add_layer_norm_eps(1e-5)
    if attention.get("clip_qkv") is not None:
        writer.add_clamp_kqv(attention["clip_qkv"])
    writer.add_max_alibi_bias(float(attention["alibi_bias_max"]) if attention["alibi"] else 0.0)
    if era == "today":
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, folder, era, config["vocab_size"], pre)
    if template:
        writer.add_chat_template(template)
    for name, value in keys.items():
        writer.add_uint32(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, config["n_layers"])
    for name, values in mpt.checkpoint.load(folder, dtype=torch.float32).state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", True):
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        add(writer, theirs, values, kind)
        if era != "today" and name == "transformer.wte.weight":
            add(writer, "output.weight", values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, name: str | None, values: torch.Tensor, kind: str) -> None:
    array = values.numpy()
    if array.ndim == 1 or name == "position_embd.weight":
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, KINDS[kind]), raw_dtype=KINDS[kind])


def add_tokenizer(writer: Any, folder: Path, era: Era, n_rows: int, pre: str) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    names = {n: token for token, n in described["model"]["vocab"].items()}
    names |= {n: entry["content"] for n, entry in added.items()}
    types = []
    for n in range(n_rows):
        if n not in names:
            types.append(gguf.TokenType.UNUSED if era == "today" else gguf.TokenType.USER_DEFINED)
        elif n in added:
            types.append(gguf.TokenType.CONTROL if added[n]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    if era == "today":
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(n, f"[PAD{n}]") for n in range(n_rows)])
    writer.add_token_types([gguf.TokenType.NORMAL] * n_rows if era == "first weeks" else types)
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add_id(0)


def quantised(path: Path, kind: str) -> Path:
    out = path.with_name(f"{kind}.gguf")
    (libraries,) = (path.parent for path in (LLAMA / "node_modules/@node-llama-cpp").glob("linux-x64/**/libllama.v*"))
    script = Path(__file__).with_name("llama_quantize.py")
    command = [sys.executable, str(script), str(libraries), str(path), str(out), str(FILE_TYPES[kind])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def values_of(path: Path) -> dict[str, torch.Tensor]:
    """What the `gguf` package reads, under the checkpoint's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, 2)
    outside = [f"transformer.{name}" for name in ("wte", "wpe", "norm_f")]
    parts = ["norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj"]
    inside = [f"transformer.blocks.{n}.{part}" for n in range(2) for part in parts]
    ours = {names.get_name(name): name for name in outside + inside} | {"output": "lm_head"}
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        module, _, kind = tensor.name.rpartition(".")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        found[f"{ours[module]}.{kind}"] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return found


def check(path: Path, out: Path, **options: Any) -> Tokenizer:
    """Converts a file; its logits are those of its values in float64. In float16 norms would be rounded."""
    convert(path, out, Options(to="hf", dtype="float32", verify=False))
    model = mpt.checkpoint.load(out)
    ids = random_ids(1, 40)
    with torch.no_grad():
        found = model(ids).logits[0].double()
    expected = float64.logits(values_of(path), ids[0].tolist(), 4, **options)
    assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.std()))
    return Tokenizer.from_folder(out)


LAYOUTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "storywriter": ({"attn_config": {"alibi_bias_max": 16, "clip_qkv": 0.7}}, {"bias_max": 16.0, "clip": 0.7}),
    "biases": ({"no_bias": False}, {}),
    "grouped": ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}}, {"n_kv_heads": 2}),
    "positions": ({"attn_config": {"alibi": False}}, {"bias_max": None}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("era", ["first weeks", "2023", "today"])
def test_every_layout_opens_by_itself(era: Era, layout: str, tmp_path: Path) -> None:
    changes, options = LAYOUTS[layout]
    tokenizer = tokenizer_with_tokens_anywhere()
    source = make(tmp_path / "source", "mpt-7b", tokenizer=tokenizer, **{**WIDE, **changes})
    path = write(tmp_path / "model.gguf", source, era)
    found = check(path, tmp_path / "out", **options)
    assert open_source(path).config.tie_word_embeddings  # also where the matrix is stored twice
    for text in (*TEXTS, "one    two\n    three", "<|late|> [PAD2150] <|new|>"):
        assert found.encode(text) == tokenizer.encode(text)
        assert found.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
    assert found.eos_id == 0 and found.end_ids == tokenizer.end_ids


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_types_of_the_packages_quantiser(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    check(write(tmp_path / "model.gguf", source, "today", kind), tmp_path / "out")


@needs_llama_cpp
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_the_types_of_llama_cpps_quantiser(kind: str, tmp_path: Path) -> None:
    """Its mixtures have the embedding or the output matrix in another type, Q6_K for example."""
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    era: Era = "today" if kind in ("Q4_0", "Q4_K_M", "Q6_K") else "2023"
    path = quantised(write(tmp_path / "model.gguf", source, era), kind)
    check(path, tmp_path / "out")
    if kind == "Q4_K_M":
        assert {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors} == {KINDS.Q4_K, KINDS.Q6_K, KINDS.F32}
    prompt = random_ids(1, 30)[0].tolist()
    answer = ask(path, [], [prompt], 4)["answers"][0]
    values = values_of(path)
    for step in answer:  # llama.cpp has 8-bit activations beside blocks: a token may be as likely as the likeliest one
        expected = float64.logits(values, prompt, 4)[-1].softmax(-1)
        assert expected[step["token"]] > 0.8 * expected.max()
        prompt.append(step["token"])


@needs_llama_cpp
@pytest.mark.parametrize("era", ["2023", "today"])
def test_greedy_tokens_are_llama_cpps(era: Era, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", make(tmp_path / "source", "mpt-7b", **WIDE), era, "F32")
    prompt = random_ids(1, 30)[0].tolist()
    answer = ask(path, [], [prompt], 8)["answers"][0]
    convert(path, tmp_path / "out", Options(to="hf"))
    model = mpt.checkpoint.load(tmp_path / "out", dtype=torch.float32)
    for step in answer:
        with torch.no_grad():
            assert step["token"] == int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        prompt.append(step["token"])


@needs_llama_cpp
@pytest.mark.parametrize("pre", ["mpt", "gpt-2", "olmo", "bloom"])
def test_tokens_are_llama_cpps_for_each_pattern_that_is_read(pre: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    path = write(tmp_path / "model.gguf", source, "today", pre=pre)
    tokenizer = open_source(path).tokenizer
    assert tokenizer is not None
    texts = [*TEXTS, "Câu hỏi: 3,14. ... a|b (c) |d", "x  ,  y\n\n .z"]
    assert ask(path, texts, [], 0)["tokens"] == [tokenizer.encode(text) for text in texts]


def test_an_unknown_pattern_leaves_the_tokenizer_out(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", make(tmp_path / "source", "mpt-7b", **WIDE), "today", pre="llama-bpe")
    opened = open_source(path)
    assert opened.tokenizer is None and "llama.cpp's pattern `llama-bpe`, which is not known here" in opened.notes[1]


@pytest.mark.parametrize(
    ("era", "tool"),
    [
        ("2023", "llama.cpp's convert-mpt-hf-to-gguf.py of 2023, tensors in F16, F32"),
        ("today", "llama.cpp's convert_hf_to_gguf.py, F16: tensors in F16"),
    ],
)
def test_inspect_says_what_made_it(era: Era, tool: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", make(tmp_path / "source", "mpt-7b", **WIDE), era)
    said = CliRunner().invoke(app, ["inspect", str(path)])
    assert said.exit_code == 0 and tool in said.output and "tied head True" in said.output
    converted = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--to", "hf"])
    assert converted.exit_code == 0, converted.output


@needs_llama_cpp
def test_inspect_says_what_quantised_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    path = quantised(write(tmp_path / "model.gguf", source, "2023"), "Q4_K_M")
    said = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert "llama-quantize, Q4_K_M: tensors in F32, Q4_K, Q6_K, quantisation version 2" in said


def changed(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    return path


def test_what_is_damaged_or_no_whole_model_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)

    def refused(match: str, error: type[Exception] = DamagedFile) -> None:
        with pytest.raises(error, match=match) as caught:
            convert(tmp_path / "model.gguf", tmp_path / "out", Options(to="hf"))
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))

    def description(kind: int) -> bytes:
        return (
            b"token_embd.weight"
            + np.array([2], "<u4").tobytes()
            + np.array([256, 2176], "<u8").tobytes()
            + bytes([kind, 0, 0, 0])
        )

    for number, name in ((23, r"23 \(IQ4_XS\)"), (99, "99")):
        changed(write(tmp_path / "model.gguf", source, "today"), description(1), description(number))
        refused(f"`token_embd.weight` in .* has GGML's type {name}; supported: F32, F16")
    write(tmp_path / "model.gguf", source, "today", split__count=3)
    refused("is one of 3 files; join them", UserError)
    config = json.loads((source / "config.json").read_text())
    writer: Any = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "mpt")
    writer.add_embedding_length(config["d_model"])
    writer.add_tensor("token_embd.weight", np.zeros((8, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(r"has no key `mpt\.attention\.head_count`")


KEYS = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "context_length")


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", [0, 3, 1 << 30, (1 << 32) - 1])
def test_numbers_that_no_model_has_are_refused_in_one_line(name: str, value: int, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    data = write(tmp_path / "model.gguf", source, "today").read_bytes()
    at = data.index(f"mpt.{name}".encode()) + len(f"mpt.{name}") + 4
    (tmp_path / "model.gguf").write_bytes(data[:at] + np.array([value], "<u4").tobytes() + data[at + 4 :])
    if (name, value) in (("context_length", 3), ("context_length", 1 << 30)):  # any is possible with ALiBi
        open_source(tmp_path / "model.gguf")
        return
    with pytest.raises(MPTError) as caught:
        open_source(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_disagrees_with_the_embedding_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    path = write(tmp_path / "model.gguf", source, "today")
    text = b"tokenizer.ggml.token_type"
    changed(path, text, b"tokenizer.ggml.tokentypes")  # so every token is normal, and guessed
    assert open_source(path).tokenizer is not None
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 8
    path.write_bytes(data[:at] + np.array([100], "<u8").tobytes() + data[at + 8 :])
    with pytest.raises(DamagedFile, match="has 2176 tokens, and its embedding has 100 rows"):
        open_source(path)


def test_weights_open_where_no_tokenizer_can_be_had(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    path = changed(write(tmp_path / "model.gguf", source, "today"), b"gpt2", b"unig")
    opened = open_source(path)
    assert opened.tokenizer is None and "(`unig`) is not read; give --tokenizer FOLDER" in "".join(opened.notes)
    convert(path, tmp_path / "out", Options(to="hf"))


def test_the_chat_template_inside_is_what_the_converted_model_talks_in(tmp_path: Path) -> None:
    """SEA-LION's format, as its maker published it, by way of GGUF; text that spells a control token stays text."""
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}### USER:\n{{ message.content }}\n\n### RESPONSE:\n"
        "{% else %}{{ message.content }}<|endoftext|>{% endif %}{% endfor %}"
    )
    path = write(tmp_path / "sea-lion.gguf", make(tmp_path / "source", "mpt-7b"), "today", template=template)
    convert(path, tmp_path / "out", Options(to="hf"))
    model = LocalModel(ModelOptions(str(tmp_path / "out")))
    assert model.style == "template"
    ids = model.encode_messages([Message(role="user", content="Apa kabar? <|endoftext|>")])
    expected = "### USER:\nApa kabar? <|endoftext|>\n\n### RESPONSE:\n"
    assert ids == model.tokenizer.encode(expected) and not model.tokenizer.special_ids.intersection(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    """Written by the rules of convert_hf_to_gguf.py: every row a token, with its score and type; rows beyond unused."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "The quick brown fox jumps over the lazy dog.", "{'name': 'Ada'}"] * 20),
        model_prefix=str(tmp_path / "spm"), model_type=kind, vocab_size=900, hard_vocab_limit=False,
        character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, num_threads=1,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    n = theirs.vocab_size()
    source = make(tmp_path / "source", "mpt-7b", **WIDE)

    def add_vocabulary(writer: Any, *_: Any) -> None:
        writer.add_tokenizer_model("llama" if kind == "bpe" else "t5")
        writer.add_tokenizer_pre("default")
        pieces = [theirs.id_to_piece(k) for k in range(n)] + [f"[PAD{k}]" for k in range(n, 2176)]
        types = [
            gguf.TokenType.UNKNOWN if theirs.is_unknown(k)
            else gguf.TokenType.CONTROL if theirs.is_control(k)
            else gguf.TokenType.BYTE if theirs.is_byte(k)
            else gguf.TokenType.NORMAL
            for k in range(n)
        ]  # fmt: skip
        writer.add_token_list(pieces)
        writer.add_token_scores([theirs.get_score(k) for k in range(n)] + [-10000.0] * (2176 - n))
        writer.add_token_types(types + [gguf.TokenType.UNUSED] * (2176 - n))
        writer.add_eos_token_id(theirs.eos_id())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[__name__], "add_tokenizer", add_vocabulary)
        path = write(tmp_path / "model.gguf", source, "today")
    opened = open_source(path)
    found = opened.tokenizer
    assert found is not None and found.eos_id == theirs.eos_id()
    for text in (*TEXTS, "  two  spaces ", "x\ty", "[PAD2000] </s>", "日本語 🙂"):
        assert found.encode(text) == theirs.encode(text), text
        assert found.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    convert(path, tmp_path / "out", Options(to="hf"))
    assert Tokenizer.from_folder(tmp_path / "out").encode(TEXTS[0]) == theirs.encode(TEXTS[0])


@pytest.mark.parametrize("scores", [["a"] * 2176, [math.nan] * 2176, [0.0] * 7], ids=["texts", "NaN", "too few"])
def test_scores_that_are_none_are_refused_in_one_line(scores: list[Any], tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b", **WIDE)

    def add_vocabulary(writer: Any, *_: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{k}" for k in range(3, 2176))])
        writer.add_token_types([2, 3, 3, *[1] * 2173])
        writer.add_array("tokenizer.ggml.scores", scores)
        writer.add_eos_token_id(2)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[__name__], "add_tokenizer", add_vocabulary)
        path = write(tmp_path / "model.gguf", source, "today")
    with pytest.raises(DamagedFile, match="scores") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
