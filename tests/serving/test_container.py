"""Every command in a real container of the kernel's: it lives under load, or says with figures what does not fit."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests import sparse
from tests.containers import container
from tests.serving.servers import start

N_PARAMETERS = 50_432 * 1024 + 1024 + 16 * (12 * 1024 * 1024 + 2 * 1024)  # of `sparse.make`, by hand: 0.25 billion


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse.make(tmp_path_factory.mktemp("large") / "model")


def test_a_server_lives_under_more_than_its_container_holds() -> None:
    """480 MB, of which Python and torch take 300: prompts of more tokens than its KV cache holds, all at once.

    By the machine's memory alone the cache would be 1.1 GB: 32 sequences of 8,192 tokens, each of 4 kB.
    """
    options = ("--model", "s=mpt-tiny-storywriter", "--context-length", "s=8192", "--port", "0")
    with container(memory=480_002_048) as limited:
        server = start("serve", *options, within=limited.command())
        try:
            said = next(line for line in server.lines if "KV cache" in line)
            assert "free of the container's 0.48 GB)" in said
            body = {"model": "s", "max_tokens": 8, "temperature": 0}
            with ThreadPoolExecutor(32) as pool, httpx.Client(base_url=server.url, timeout=100) as client:

                def ask(n: int) -> int:
                    asked = body | {"prompt": f"{n} " + "the whale rose and the sea was dark " * 160}
                    return client.post("/v1/completions", json=asked).status_code

                assert set(pool.map(ask, range(32))) == {200}
            assert server.process.poll() is None and limited.kills() == 0
        finally:
            assert server.stop() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(
            ("mpt", "serve", "--port", "0", "--model", "mpt-tiny", "--kv-gb", "8"),
            r"`mpt-tiny` needs 8\.0\d GB, 0\.0\d to load and 8\.00 for KV cache, .* free of the container's 0\.80 "
            r"GB; lower `--kv-gb`, 8\.00 GB in all, to at most 0\.[345]\d",
            id="a cache that was asked for",
        ),
        pytest.param(
            ("mpt", "serve", "--port", "0", "--model", "mpt-tiny", "--model", "l={large}"),
            r"`mpt-tiny` and `l` need 1\.[56]\d GB, 1\.1\d to load and 0\.4\d for KV cache",
            id="two models",
        ),
        pytest.param(
            ("train", "finetune", "--base", "{large}", "--data", "{rows}", "--out", "{out}", "--steps", "1"),
            r"needs about [\d.]+ GB on each of 1 devices, more than the 0\.\d\d GB that are free of the container's",
            id="finetune",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_figures_before_weights_are_read(
    large: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 8)
    words = tuple(word.format(large=large, rows=rows, out=tmp_path / "out") for word in words)
    program = {"mpt": "mpt", "train": "training.cli"}[words[0]]
    with container(memory=800_002_048) as limited:
        command = limited.command(sys.executable, "-m", program, *words[1:])
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert limited.kills() == 0
    assert done.returncode in (2, 5), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(said, last), last
