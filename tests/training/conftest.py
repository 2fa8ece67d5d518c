"""A byte-level tokenizer made on the spot, and a run small enough for a test."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpt.tokenizer import Tokenizer
from training import vocabulary
from training.run import Run

DATA = Path(os.environ.get("MPT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SHAPE: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "expansion_ratio": 2,
    "vocab_size": 384,
    "max_seq_len": 64,
    "no_bias": True,
    "attn_config": {"alibi": True},
}


@pytest.fixture
def data_file() -> Callable[[str], Path]:
    """Finds a file of the shared data folder; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.is_file():
            pytest.skip(f"{path} is not in MPT_TEST_DATA ({DATA})")
        return path

    return find


@pytest.fixture(autouse=True)
def no_sets_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test trains on, it makes or names."""
    monkeypatch.setenv("MPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.train(["name: Ada\nage: 36\n", '{"name": "Ada", "age": 36}', "Below is an instruction"] * 3, 384).save(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture
def small_run(tmp_path: Path, tokenizer_folder: Path) -> Run:
    """Twelve steps of a two-layer model on generated YAML; about a second."""
    return Run(
        name="small",
        base=None,
        data="yaml_to_json",
        out=str(tmp_path / "run"),
        tokenizer=str(tokenizer_folder),
        model=SHAPE,
        max_seq_len=512,
        global_batch=4,
        steps=12,
        epochs=None,
        lr=3e-3,
        warmup_steps=2,
        precision="fp32",
        prompt_style="instruct",
        checkpoint_every=5,
    )
