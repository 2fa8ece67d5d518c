"""What a user has got wrong is told before torch, transformers, Ray or Gradio are imported, which take seconds."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000}
HOSTILE = {"model_type": "mpt", "d_model": 1e12, "n_heads": 4, "n_layers": 2, "vocab_size": 1000}
WIDTH = {"model_type": "mpt", "ffn_config": {"ffn_hidden_size": "big"}}
HEADS = {"model_type": "mpt", "mlp_ratio": 4, "n_heads": "x"}
ROPE = {"model_type": "mpt", "attn_config": {"rope": True}}
NOT_MPT, NO_SIZE = "has model_type `llama`", "1000000000000"
NOT_JSON, NO_ROPE = "is not readable JSON", "attn_config.rope"
TAKEN = "Address already in use; choose another --port"
# The words after `mpt`, the exit code, and what the one line says. {port} is taken.
CASES = {
    "serve, port": ("serve --port {port}", 2, TAKEN),
    "serve --demo, port": ("serve --demo --port {port}", 2, TAKEN),
    "cluster, port": ("cluster --port {port}", 2, TAKEN),
    "demo, port": ("demo --port {port}", 2, TAKEN),
    "serve, Llama": ("serve --port 0 --model llama", 2, NOT_MPT),
    "serve, Llama as draft": ("serve --port 0 --model mpt-tiny --draft mpt-tiny=llama", 2, NOT_MPT),
    "generate, Llama": ("generate --model llama x", 2, NOT_MPT),
    "chat, Llama": ("chat --model llama", 2, NOT_MPT),
    "convert, Llama": ("convert llama out --to hf", 2, NOT_MPT),
    "inspect, Llama": ("inspect llama", 2, NOT_MPT),
    "finetune, Llama": ("train finetune --base llama --data x.jsonl", 2, NOT_MPT),
    "prefer, Llama": ("train prefer --base llama --data x.jsonl", 2, NOT_MPT),
    "evaluate, Llama": ("train evaluate llama", 2, NOT_MPT),
    "serve, sizes of no model": ("serve --port 0 --model hostile", 3, NO_SIZE),
    "generate, sizes of no model": ("generate --model hostile x", 3, NO_SIZE),
    "convert, sizes of no model": ("convert hostile out --to hf", 3, NO_SIZE),
    "inspect, sizes of no model": ("inspect hostile", 3, NO_SIZE),
    "finetune, sizes of no model": ("train finetune --base hostile --data x.jsonl", 3, NO_SIZE),
    "serve, half a config": ("serve --port 0 --model half", 3, NOT_JSON),
    "inspect, half a config": ("inspect half", 3, NOT_JSON),
    "serve, what MPT has not": ("serve --port 0 --model rope", 2, NO_ROPE),
    "serve, a width in words": ("serve --port 0 --model width", 2, "ffn_config.ffn_hidden_size"),
    "inspect, heads in words": ("inspect heads", 2, "`n_heads` must be a whole number"),
    "inspect, GGUF of another model": ("inspect llama.gguf", 2, "holds a `llama`"),
    "convert, target": ("convert mpt-tiny full --to hf", 2, "`full` exists and is not an empty folder"),
    "convert, dtype": ("convert mpt-tiny out --to hf --dtype int4", 2, "`--dtype int4` does not exist for hf"),
    "convert, option of others": ("convert mpt-tiny out --to hf --tensor-parallel 2", 2, "--to fastertransformer"),
    "verify, no manifest": ("verify full", 2, "has no manifest.json"),
    "finetune, folder": ("train finetune --base mpt-tiny --data x.jsonl --out full", 2, "`full` is not empty"),
    "finetune, no data": ("train finetune --base mpt-tiny --data nothing.jsonl", 2, "no dataset `nothing.jsonl`"),
    "pretrain, no tokenizer": ("train pretrain --data x.jsonl --tokenizer none/there/is", 2, "none/there/is"),
    "export, folder": ("train export full --out full", 2, "`full` exists"),
    "export, no run": ("train export full --out out", 2, "holds no run.json"),
    "data prepare, folder": ("train data prepare x.jsonl --tokenizer mpt-tiny --out full", 2, "`full` exists"),
}
RUN = """
import contextlib, io, json, sys
from mpt.cli import main

HEAVY = {"torch", "transformers", "ray", "gradio", "fastapi", "onnx"}
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["mpt", *words.split()]
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as error:
            code = error.code
    print(json.dumps([name, code, said.getvalue(), sorted(HEAVY & sys.modules.keys())]))
    for module in [*sys.modules]:  # what one case imports is not told of the next
        if module.partition(".")[0] in HEAVY:
            del sys.modules[module]
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, list[str]]]]:
    """Exit code, what was said, and what had been imported by then, of each case, all in one process."""
    folder = tmp_path_factory.mktemp("early")
    for name, config in (("llama", LLAMA), ("hostile", HOSTILE), ("rope", ROPE), ("width", WIDTH), ("heads", HEADS)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text('{"model_type": "mpt", "d_mod')
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (folder / "llama.gguf").write_bytes(gguf_of("llama"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked = json.dumps({name: words.format(port=port) for name, (words, _, _) in CASES.items()})
        command = [sys.executable, "-c", RUN, asked]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    yield {name: (code, said, heavy) for name, code, said, heavy in lines}
    assert not (folder / "out").exists()
    assert [path.name for path in (folder / "full").iterdir()] == ["notes.txt"]


def gguf_of(architecture: str) -> bytes:
    """A GGUF file without tensors, of version 3, whose one key is its architecture. Source: ggml's docs/gguf.md."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    return head + text("general.architecture") + (8).to_bytes(4, "little") + text(architecture)


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_in_one_line_before_anything_heavy(case: str, told: dict[str, tuple[int, str, list[str]]]) -> None:
    _, code, words = CASES[case]
    was, said, heavy = told[case]
    assert (was, said.count("\n")) == (code, 1), said
    assert words in said
    assert heavy == []


def test_a_clusters_routers_do_without_torch() -> None:
    """Every process of a cluster imports this module, and only replicas compute."""
    seen = "import sys, serving.cluster.deployment; print(*{'torch', 'transformers'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_server_does_without_transformers_models_and_torchs_compiler() -> None:
    """They take more time than torch; what a server imports, and the opening of a model in C or torch."""
    seen = """
import sys
import serving.server
from mpt.engine.endpoint import open_endpoint
from mpt.options import ModelOptions
open_endpoint("mpt-tiny", ModelOptions("mpt-tiny")).engine.close()
print(*{"transformers.modeling_utils", "torch._dynamo", "sympy", "scipy"} & sys.modules.keys())
"""
    ran = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
