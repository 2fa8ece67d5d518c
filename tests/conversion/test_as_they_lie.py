"""GGUF files and packed folders are served, asked, evaluated and finetuned as they lie, without a conversion.

GGUF files are written by the rules of llama.cpp's converters, folders by AutoAWQ's and GPTQ's published packing and by
bitsandbytes. Expected logits are a float64 forward of the values that the tools themselves give back.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import mpt.checkpoint
from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from mpt.backends.backend import Work
from mpt.backends.choose import choose, open_backend
from mpt.backends.native import library
from mpt.catalog import describe, resolve, stated_style
from mpt.checkpoint import packed_sizes
from mpt.cli import app
from mpt.engine.endpoint import open_endpoint
from mpt.engine.local import LocalModel
from mpt.errors import CheckpointNotFound, DamagedFile, MPTError
from mpt.gguf.ggml_types import BLOCK_TYPES
from mpt.options import ModelOptions
from mpt.packed.layers import as_it_lies, packed_bytes
from mpt.tokenizer import Tokenizer
from serving.app import make_app
from serving.endpoints import Serving
from serving.options import ServeOptions
from tests import packers
from tests.conversion import float64
from tests.conversion.conftest import make, neox_like, random_ids
from tests.conversion.test_gguf_by_llama_cpp import WIDE, changed, needs_llama_cpp, quantised, values_of, write
from tests.conversion.test_llama_cpp import ask
from tests.conversion.test_packed_folders import ACT_SCALES
from tests.conversion.test_packed_folders import write as write_folder
from training.cli import main as train_main
from training.evaluation.models import Local
from training.evaluation.tasks import Query

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
needs_compiler = pytest.mark.skipif(library.why_none() is not None, reason=str(library.why_none()))
GGUFS = {"2023 Q4_0": ("2023", "Q4_0"), "2023 Q5_1": ("2023", "Q5_1"), "today Q8_0": ("today", "Q8_0")}
FOLDERS = ("awq", "gptq", "int8", "nf4")
KINDS = {
    "2023 Q4_0": "Q4_0", "2023 Q5_1": "Q5_1", "today Q8_0": "Q8_0", "awq": "AWQ 4-bit", "gptq": "GPTQ 4-bit",
    "int8": "bitsandbytes int8", "nf4": "bitsandbytes nf4",
}  # fmt: skip
# Bytes of 32 values: of a block; a half each and a zero point of half a byte and a scale; a byte each.
BYTES = {"2023 Q4_0": 18, "2023 Q5_1": 24, "today Q8_0": 34, "awq": 18.5, "gptq": 18.5, "int8": 32, "nf4": 16}


# Where a block's float16 numbers lie.
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)
}  # fmt: skip
KINDS_OF_GGML = gguf.GGMLQuantizationType


def random_blocks(path: Path, source: Path, kind: str) -> Path:
    """A file of any block type: K-quants in whole, which the package cannot write, of random blocks of small values."""
    write(path, source, "today", "F16")
    reader = gguf.GGUFReader(path)
    block = BLOCK_TYPES[kind]
    random = np.random.default_rng(3)
    writer: Any = gguf.GGUFWriter(str(path.with_name("random.gguf")), "mpt")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value, of = field.contents(), field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=of)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if len(shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        data = random.integers(0, 256, (*shape[:-1], shape[-1] // block.n_values, block.n_bytes), dtype=np.uint8)
        for at in HALVES.get(kind, (0,)):  # scales of 0.01, or so small for those with scales inside
            size = 0.0002 if block.n_values == 256 else 0.01 / (16 if kind in ("Q8_0", "IQ4_NL") else 1)
            data[..., at : at + 2] = np.frombuffer(np.float16(size).tobytes(), np.uint8)
        row = data[0].size
        writer.add_tensor(tensor.name, data.reshape(*shape[:-1], row), raw_dtype=KINDS_OF_GGML[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("random.gguf").rename(path)


def made(kind: str, folder: Path) -> tuple[Path, Tensor, list[int]]:
    """A checkpoint of a kind, the float64 logits of some ids, and the ids."""
    ids = random_ids(1, 40)[0].tolist()
    if kind in GGUFS:
        era, block_type = GGUFS[kind]
        source = make(folder / "source", "mpt-7b", **WIDE)
        path = write(folder / "model.gguf", source, era, block_type)  # type: ignore[arg-type]
        return path, float64.logits(values_of(path), ids, 4), ids
    real = {name: value.half().double() for name, value in write_folder(folder / "packed", kind).items()}
    expected = packers.forward(real, torch.tensor(ids), 4, ACT_SCALES if kind == "awq" else None)
    return folder / "packed", expected, ids


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_real_values_and_nothing_is_unpacked(kind: str, tmp_path: Path) -> None:
    place, expected, ids = made(kind, tmp_path)
    options = ModelOptions(str(place), dtype="float32")
    choice = choose("mine", resolve(place), options)
    assert choice.precision == f"{KINDS[kind]} weights, float32"
    backend = open_backend(choice, place, options)
    found = backend.forward([Work(backend.reserve(None, 64), ids, len(ids))]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
    model = backend.model
    assert model is not None
    assert not [name for name, p in model.named_parameters() if ".blocks." in name and p.dim() == 2]
    config = model.config
    in_blocks = 12 * config.d_model**2 * config.n_layers / 32 * BYTES[kind]
    embedding = config.vocab_size * config.d_model / 32 * BYTES[kind] if kind in GGUFS else 0
    # More than that: the order of GPTQ's inputs, and a table of 256 scales in each matrix of nf4, which is small here.
    assert 1 <= packed_bytes(model) / (in_blocks + embedding) < 1.25


@needs_compiler
@pytest.mark.parametrize("n_tokens", [1, 7, 40], ids=["one token", "few tokens", "prompt"])
@pytest.mark.parametrize("kind", ["F16", *BLOCK_TYPES])
def test_c_computes_with_blocks_as_they_lie(kind: str, n_tokens: int, tmp_path: Path) -> None:
    """In bfloat16, at any number of tokens; what is far off has a wrong code or scale, or one in a wrong place."""
    source = make(tmp_path / "source", "mpt-7b", **WIDE)
    path = (
        random_blocks(tmp_path / "model.gguf", source, kind)
        if kind != "F16"
        else write(tmp_path / "model.gguf", source, "2023", kind)
    )
    options = ModelOptions(str(path), dtype="bfloat16")
    choice = choose("mine", path, options)
    assert all(step.runs.startswith("C") for step in choice.steps), choice
    backend = open_backend(choice, path, options)
    ids = random_ids(1, 40)[0].tolist()
    row, found = backend.reserve(None, 64), []
    for start in range(0, 40, n_tokens):
        tokens = ids[start : start + n_tokens]
        found.append(backend.forward([Work(row, tokens, len(tokens))]).double())
        row.length += len(tokens)
    expected = float64.logits(values_of(path), ids, 4)
    error = (torch.cat(found) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    # Keys are rounded to bfloat16, and the inputs of blocks to 8 bits for each 32, which random offsets amplify.
    assert error < 0.08, error


def gptq_in_order(bits: int) -> Any:
    """Packs a weight in groups of 64 inputs, in order."""

    def pack(weight: Tensor, number: int) -> tuple[packers.Parts, Tensor]:
        groups = [i // 64 for i in range(weight.shape[1])]
        codes, zeros, scales = packers.rounded(weight, bits, groups)
        parts = packers.gptq(codes, zeros, scales, None, bits, minus_one=True)
        return parts, packers.real_values(codes, zeros, scales, groups)

    return pack


@needs_compiler
@pytest.mark.parametrize("bits", ["AWQ", 2, 3, 4])
def test_c_computes_with_four_bits_of_awq_and_gptq(bits: Any, tmp_path: Path) -> None:
    """They are packed anew while they are read, into blocks whose values are the same but for half precision."""
    source = make(tmp_path / "source", "mpt-7b")
    if bits == "AWQ":
        quantization, pack = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm"}, packers.awq_weight
    else:
        quantization = {"bits": bits, "group_size": 64, "quant_method": "gptq", "desc_act": False, "sym": False}
        pack = gptq_in_order(bits)
    real = packers.write_packed(source, tmp_path / "packed", quantization, pack)
    options = ModelOptions(str(tmp_path / "packed"))
    choice = choose("mine", tmp_path / "packed", options)
    assert choice.precision == f"{'AWQ 4' if bits == 'AWQ' else f'GPTQ {bits}'}-bit weights, bfloat16"
    assert all(step.runs.startswith("C") for step in choice.steps), choice
    backend = open_backend(choice, tmp_path / "packed", options)
    ids = random_ids(1, 40)[0].tolist()
    expected = packers.forward(real, torch.tensor(ids), 4)
    for at_once in (8, 40):
        row, found = backend.reserve(None, 64), []
        for start in range(0, 40, at_once):
            found.append(backend.forward([Work(row, ids[start : start + at_once], at_once)]).double())
            row.length += at_once
        error = (torch.cat(found) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.05, error
    assert backend.model is not None
    matrix = backend.model.transformer.blocks[0].ffn.up_proj.matrix
    assert matrix.kind == "Q4_1"
    layers = (name for name, layer in backend.model.named_modules() if hasattr(layer, "matrix"))
    n_values = sum(real[f"{name}.weight"].numel() for name in layers)
    assert packed_sizes(tmp_path / "packed", to_run=True) == {"Q4_1": n_values // 32 * 20}  # 32 values are 20 bytes
    values = matrix.values().double()
    off = (values - real["transformer.blocks.0.ffn.up_proj.weight"]).abs().max()
    assert off < 2**-10 * real["transformer.blocks.0.ffn.up_proj.weight"].abs().max()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K_S", "Q6_K"])
def test_greedy_tokens_of_k_quants_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits, so a token that it takes may be nearly as likely as ours."""
    path = quantised(write(tmp_path / "model.gguf", make(tmp_path / "source", "mpt-7b", **WIDE), "2023"), kind)
    prompt = random_ids(1, 30)[0].tolist()
    theirs = [step["token"] for step in ask(path, [], [prompt], 6)["answers"][0]]
    options = ModelOptions(str(path), dtype="float32")
    backend = open_backend(choose("mine", path, options), path, options)
    logits = backend.forward([Work(backend.reserve(None, 64), [*prompt, *theirs[:-1]], len(theirs))])
    for step, token in zip(logits.softmax(-1), theirs, strict=True):
        assert step[token] > 0.8 * step.max()


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of today's converter with a ChatML template, in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    return write(folder / "mine.gguf", make(folder / "source", "mpt-7b", **WIDE), "today", "Q8_0", template=CHATML)


async def test_a_file_is_served_over_http_in_its_own_chat_format(chat_file: Path) -> None:
    """The default precision, its answers token by token those of the file converted first; its card says what runs."""
    convert(chat_file, chat_file.parent / "converted", Options(to="hf", dtype="float32"))
    models = {
        "file": ModelOptions(str(chat_file), dtype="float32", kv_gb=0.1),
        "folder": ModelOptions(str(chat_file.parent / "converted"), dtype="float32", kv_gb=0.1),
    }
    endpoints = {name: open_endpoint(name, options) for name, options in models.items()}
    serving = Serving(ServeOptions(models=models), endpoints=endpoints)
    transport = httpx.ASGITransport(make_app(serving))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi <|im_end|>"}], "max_tokens": 8}
    body |= {"temperature": 0, "logprobs": True}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
            answers = [
                (await client.post("/v1/chat/completions", json={**body, "model": name})).json() for name in models
            ]
    finally:
        for endpoint in endpoints.values():
            endpoint.engine.close()
    assert cards["file"]["prompt_style"] == "template" and cards["file"]["root"] == "file"
    runs = cards["file"]["runs"]
    assert runs["precision"] == "Q8_0 weights, float32" and "the rest of this one is float32" in str(runs["steps"])
    tokens = [[t["token"] for t in answer["choices"][0]["logprobs"]["content"]] for answer in answers]
    assert len(tokens[0]) == 8 and tokens[0] == tokens[1]
    assert answers[0]["usage"] == answers[1]["usage"]


def test_what_is_computed_in_bfloat16_is_said_and_other_precisions_are_honoured(chat_file: Path) -> None:
    def precision(**options: Any) -> str:
        return choose("mine", chat_file, ModelOptions(str(chat_file), **options)).precision

    assert precision() == "Q8_0 weights, bfloat16"
    assert precision(dtype="float16") == "Q8_0 weights, float16"
    assert precision(quantize="int8") == "int8 weights, bfloat16"  # made of the real values
    options = ModelOptions(str(chat_file), quantize="int8")
    model = open_backend(choose("mine", chat_file, options), chat_file, options).model
    assert model is not None and not packed_bytes(model)


def test_the_commands_work_on_a_file(chat_file: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    whole = run("generate", "Hello", "--model", str(chat_file), "--max-tokens", "6")
    with LocalModel(ModelOptions(str(chat_file))) as model:
        ids = model.encode_prompt("Hello")
        assert ids == model.tokenizer.encode(
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", allow_special=True
        )
        assert whole.strip() == "".join(delta.text for delta in model.stream(ids, 6)).strip()
    said = run("inspect", str(chat_file), "--run")
    assert f"next serve: mpt serve --model {chat_file}" in said
    assert f"next finetune: train finetune --base {chat_file} --data FILE.jsonl --lora 16" in said
    assert "runs on cpu, Q8_0 weights, bfloat16" in said and "convert_hf_to_gguf.py, Q8_0" in said
    # 2 layers of 12 C^2 and 2,176 rows, 34 bytes for 32 values; 5 norms of float32. KV: 2 layers of 2 C, 2 bytes.
    n_bytes = (2 * 12 * 256**2 + 2176 * 256) / 32 * 34 + 5 * 256 * 4
    assert f"memory to serve {n_bytes / 1e9:.3g} GB of weights in Q8_0, {2 * 2 * 256 * 2 * 1000 / 1e9:.3g} GB" in said


def test_what_is_known_of_a_copy_by_its_name(chat_file: Path, tmp_path: Path) -> None:
    """A file of 2023 says neither its licence nor its format; a name that ends in how it is packed tells the rest."""
    plain = write(tmp_path / "plain.gguf", make(tmp_path / "source", "mpt-7b", **WIDE), "2023", "Q4_0")
    for name in ("mpt-7b-chat.Q4_0.gguf", "mpt-7b-chat-q4_k_m.gguf", "mpt-7b-chat.ggml-f16.gguf", "mpt-7b-chat.gguf"):
        path = shutil.copyfile(plain, tmp_path / name)
        entry = describe(path)
        if name == "mpt-7b-chat.ggml-f16.gguf":  # no ending that is known
            assert entry.licence == "unknown"
            continue
        assert (entry.name, entry.prompt_style, entry.licence) == ("mpt-7b-chat", "chatml", "CC-BY-NC-SA-4.0"), name
        assert entry.context_length == 512  # the file's own
    assert describe(plain).name == "plain" and stated_style(plain) is not None  # neox_like has ChatML's tokens
    for name in ("mpt-7b-instruct-GPTQ-4bit-128g", "mpt-7b-instruct-AWQ"):
        (tmp_path / name).mkdir()
        shutil.copyfile(tmp_path / "source" / "config.json", tmp_path / name / "config.json")
        assert describe(tmp_path / name).prompt_style == "instruct"
    assert describe(chat_file).prompt_style == "template"


def test_a_converted_file_is_known_by_the_manifest_beside_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    convert(source, tmp_path / "out", Options(to="gguf", dtype="int8", verify=False))
    path = tmp_path / "out" / "model.gguf"
    assert describe(path).licence == "Apache-2.0"
    model = mpt.checkpoint.load(path, pack=as_it_lies)
    assert packed_bytes(model)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(MPTError, match="does not match its sha256"):
        mpt.checkpoint.load(path, pack=as_it_lies)


def test_what_cannot_be_served_is_refused_in_one_line(chat_file: Path, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(MPTError, match=match) as caught:
            open_endpoint("mine", ModelOptions(str(path), kv_gb=0.01))
        assert "\n" not in str(caught.value)

    path = tmp_path / "copy.gguf"
    path.write_bytes(chat_file.read_bytes()[:-4096])
    refused(path, r"copy.gguf` ends early: it has \d+ bytes, .*; copy it again")
    for data in (b"", b"GG", b"PK\x03\x04"):
        path.write_bytes(data)
        refused(path, "does not begin as a GGUF file does; copy it again")
        if data[:2] != b"PK":  # that is read as the torch file it says it is
            with pytest.raises(DamagedFile, match="does not begin as a GGUF file does"):
                open_source(path)
    changed(shutil.copyfile(chat_file, path), b"mpt.context_length\x04\0\0\0", b"mpt.context_length\x06\0\0\0")
    refused(path, "mpt.context_length|max_seq_len|length")  # a fraction
    changed(shutil.copyfile(chat_file, path), b"general.architecture\x08\0\0\0\x03\0\0\0\0\0\0\0mpt",
            b"general.architecture\x08\0\0\0\x03\0\0\0\0\0\0\0bpt")  # fmt: skip
    refused(path, "holds a `bpt`; this reads MPT")
    changed(shutil.copyfile(chat_file, path), b"gpt2", b"unig")
    refused(path, r"gives no tokenizer: its tokenizer \(`unig`\) is not read")
    refused(chat_file.parent, r"has no config.json; give one of its GGUF files, such as `.*mine.gguf`")
    (tmp_path / "model.bin").write_bytes(b"lmgg" + bytes(100))
    refused(tmp_path / "model.bin", "is a file and no GGUF; .*mpt convert")
    with pytest.raises(CheckpointNotFound, match="is a file and no GGUF"):
        resolve(tmp_path / "model.bin")


async def test_an_adapter_is_added_to_a_file(chat_file: Path, tmp_path: Path) -> None:
    """W x + B A x, the sums by hand in float64."""
    torch.manual_seed(1)
    names = [f"transformer.blocks.{n}.ffn.up_proj" for n in range(2)]
    pairs = {name: (torch.randn(4, 256) / 16, torch.randn(1024, 4) / 16) for name in names}
    (tmp_path / "adapter").mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(chat_file)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    values = values_of(chat_file)
    for name, (a, b) in pairs.items():
        values[f"{name}.weight"] = values[f"{name}.weight"].double() + 2 * b.double() @ a.double()
    ids = random_ids(1, 30)[0].tolist()
    expected = float64.logits(values, ids, 4)
    options = ModelOptions(str(chat_file), dtype="float32", kv_gb=0.1, named_adapters={"mine": tmp_path / "adapter"})
    endpoint = open_endpoint("file", options)
    try:
        assert endpoint.adapters is not None
        backend = open_backend(choose("file", chat_file, options), chat_file, options)
        adapter = await endpoint.adapters.get("mine")
        found = backend.forward([Work(backend.reserve(None, 64), ids, len(ids), adapter)]).double()
    finally:
        endpoint.engine.close()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
    # The same, converted: the adapter is added to the file's values.
    convert(tmp_path / "adapter", tmp_path / "merged", Options(to="hf", dtype="float32"))
    with torch.no_grad():
        merged = mpt.checkpoint.load(tmp_path / "merged")(torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_the_tokenizer_of_a_file_is_the_originals(chat_file: Path) -> None:
    with LocalModel(ModelOptions(str(chat_file))) as model:
        text = "Wörter, 日本語 <|endoftext|>"
        assert model.tokenizer.encode(text) == neox_like().encode(text)
        assert isinstance(model.tokenizer, Tokenizer)


def test_a_file_is_finetuned_and_the_result_merged(
    chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the commands; what is merged is the file's values and B A."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Name a fruit.", "response": "Apple"}) + "\n")
    out, merged = tmp_path / "run", tmp_path / "merged"
    finetune = ["finetune", "--base", str(chat_file), "--data", str(rows), "--lora", "4", "--steps", "3"]
    for command in ([*finetune, "--out", str(out)], ["export", str(out / "model"), "--merge", "--out", str(merged)]):
        monkeypatch.setattr("sys.argv", ["train", *command])
        with pytest.raises(SystemExit) as caught:
            train_main()
        assert not caught.value.code, capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["prompt_style"] == "template"
    adapter = load_file(out / "model" / "adapter_model.safetensors")
    name = "transformer.blocks.1.ffn.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
    scale = json.loads((out / "model" / "adapter_config.json").read_text())["lora_alpha"] / 4
    expected = values_of(chat_file)[f"{name}.weight"].double() + scale * b @ a
    found = mpt.checkpoint.load(merged, dtype=torch.float32).state_dict()[f"{name}.weight"].double()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-4)  # it is saved in bfloat16
    assert b.abs().max() > 0


def test_a_file_is_evaluated(chat_file: Path) -> None:
    ids = random_ids(1, 24)[0].tolist()
    (scores,) = Local.load(str(chat_file), torch.device("cpu")).score(
        [Query(sequences=(ids,), starts=(20,))], lambda _: None
    )
    likely = float64.logits(values_of(chat_file), ids, 4).log_softmax(-1)
    expected = sum(float(likely[n - 1, ids[n]]) for n in range(20, 24))
    assert scores[0].logprob == pytest.approx(expected, abs=1e-3)
