"""Our GGUF files in real llama.cpp: the same token ids, greedy tokens and probabilities as our own model.

Needs `make llama`, which puts llama.cpp's prebuilt node package into `.llama/`; skipped without it.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import mpt.checkpoint
from conversion.convert import convert
from conversion.options import Options
from mpt.tokenizer import Tokenizer
from tests.conversion.conftest import SHAPES, make, random_ids
from tests.mpt.conftest import DATA

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / ".llama"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\ttabs\tand\n\n\nlines   \n",
    "it's we'll I'D don't 12345 3.14159 x=1;",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich",
    "Съешь ещё этих мягких французских булок, いろはにほへと مرحبا",
    "🙂👩‍👩‍👧 \u00e9 ~~~ <html> __init__(self):\n        return",
    "<|im_start|>user\nhello<|im_end|> <|endoftext|>",
]

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (LLAMA / "node_modules/node-llama-cpp").is_dir(), reason="needs `make llama`"
)


def ask(model: Path, texts: list[str], prompts: list[list[int]], n: int) -> Any:
    script = LLAMA / "oracle.mjs"
    shutil.copy(Path(__file__).with_name("llama_oracle.mjs"), script)
    question = json.dumps({"model": str(model), "texts": texts, "prompts": prompts, "n": n})
    done = subprocess.run(["node", str(script)], input=question, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ("scaled", "1b")])
def test_llama_cpp_answers_as_our_model(shape: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", shape)
    convert(source, tmp_path / "out", Options(to="gguf"))
    prompts = [random_ids(1, n)[0].tolist() for n in (1, 60)]
    found = ask(tmp_path / "out" / "model.gguf", [], prompts, 12)
    model = mpt.checkpoint.load(source, dtype=torch.float32)
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        ids = list(prompt)
        for step in answer:
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert step["token"] == int(expected.argmax())
            for token, probability in step["likeliest"]:
                # llama.cpp's GELU is the tanh form in a table of float16: 1.1e-4 was the most seen.
                assert probability == pytest.approx(float(expected[token]), abs=3e-4)
            ids.append(step["token"])


def test_llama_cpp_applies_clip_and_bias_max(tmp_path: Path) -> None:
    """Each changes the answer by far more than the tolerance above."""
    ids = random_ids(1, 60)
    answers = []
    for n, attention in enumerate(({}, {"clip_qkv": 0.7}, {"alibi_bias_max": 16})):
        model = mpt.checkpoint.load(make(tmp_path / str(n), "mpt-7b", attn_config=attention))
        with torch.no_grad():
            answers.append(model(ids).logits[0, -1].softmax(-1))
    assert (answers[0] - answers[1]).abs().max() > 1e-3
    assert (answers[0] - answers[2]).abs().max() > 1e-3


def test_llama_cpp_still_aborts_on_qk_ln(tmp_path: Path) -> None:
    """The reason of the refusal in `cannot_express`. When this fails, llama.cpp takes such a file, and so can we."""
    convert(make(tmp_path / "source", "1b"), tmp_path / "out", Options(to="gguf", allow=("qk_ln",)))
    with pytest.raises(AssertionError, match=r"GGML_ASSERT\(ggml_is_contiguous"):
        ask(tmp_path / "out" / "model.gguf", [], [[5, 6, 7]], 1)


@pytest.mark.parametrize("name", ["small", "gpt-neox-20b", "gpt-neox-20b-chatml"])
def test_llama_cpp_tokenizes_as_the_original(name: str, tmp_path: Path) -> None:
    if name == "small":
        source = make(tmp_path / "source", "mpt-7b")
    else:
        path = DATA / f"tokenizer/{name}.compact.json"
        if not path.is_file():
            pytest.skip(f"{path.name} is not in MPT_TEST_DATA ({DATA})")
        source = make(tmp_path / "source", "mpt-7b", vocab_size=50432)
        Tokenizer.from_file(path).save(source)
        (source / "manifest.json").unlink()
    tokenizer = Tokenizer.from_folder(source)
    convert(source, tmp_path / "out", Options(to="gguf"))
    found = ask(tmp_path / "out" / "model.gguf", TEXTS, [], 0)["tokens"]
    assert found == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_llama_cpp_loads_every_precision(dtype: Any, tmp_path: Path) -> None:
    convert("mpt-tiny", tmp_path / "out", Options(to="gguf", dtype=dtype, allow=("tokenizer",)))
    convert(tmp_path / "out" / "model.gguf", tmp_path / "back", Options(to="hf", dtype="float32"))
    model = mpt.checkpoint.load(tmp_path / "back")
    prompt = Tokenizer.from_folder(tmp_path / "back").encode("Once there was a king who had three daughters, and")
    found = ask(tmp_path / "out" / "model.gguf", [], [prompt], 1)["answers"][0][0]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    # It quantises activations to 8 bits beside quantised matrices.
    limit = {"float16": 2e-3, "bfloat16": 5e-3, "int8": 2e-2, "int4": 5e-2}[dtype]
    for token, probability in found["likeliest"][:5]:
        assert probability == pytest.approx(float(expected[token]), abs=limit)
