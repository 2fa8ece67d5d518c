"""Tokenizers for the tests: a small one trained on the spot, and the published ones where the data folder has them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mpt.tokenizer import Tokenizer

DATA = Path(os.environ.get("MPT_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))
DataFile = Callable[[str], Path]
SPECIAL = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "The quick brown fox jumps over the lazy dog. ### Instruction:\nWrite a response.\n\n### Response:\n",
    "system user assistant: hello there, how are you? 0123456789 name: Ada\nage: 36\n",
    "Zażółć gęślą jaźń, naïve café, 日本語のテキスト, 🙂🙃👩‍👩‍👧‍👦",
]


@pytest.fixture(scope="session")
def data_file() -> DataFile:
    """Finds a file of the shared data folder; skips the test where it is absent."""

    def find(path: str) -> Path:
        if not (DATA / path).is_file():
            pytest.skip(f"{path} is not in MPT_TEST_DATA ({DATA})")
        return DATA / path

    return find


def train_small_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE with the MPT special tokens, in the same make as NeoX's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def small_bpe() -> Tokenizer:
    return Tokenizer(train_small_bpe())


@pytest.fixture(scope="session")
def neox(data_file: DataFile) -> Tokenizer:
    return Tokenizer.from_file(data_file("tokenizer/gpt-neox-20b.compact.json"))


@pytest.fixture(scope="session")
def neox_chatml(data_file: DataFile) -> Tokenizer:
    return Tokenizer.from_file(data_file("tokenizer/gpt-neox-20b-chatml.compact.json"))


@pytest.fixture(scope="session", params=["small_bpe", "neox", "neox_chatml"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="session", params=["small_bpe", "neox_chatml"])
def chatml_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, small_bpe: Tokenizer) -> Path:
    """A folder of two seeded checkpoints, 2 layers and 64 wide: `base` (style none) and `chat` (ChatML)."""
    import torch

    from mpt.checkpoint import save
    from mpt.config import MPTConfig
    from mpt.transformers_model import MPTForCausalLM

    torch.manual_seed(0)
    shape = {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 256}
    model = MPTForCausalLM(MPTConfig(**shape, vocab_size=small_bpe.vocab_size))
    folder = tmp_path_factory.mktemp("models")
    for name, style in (("base", "none"), ("chat", "chatml")):
        manifest = {"name": f"test-{name}", "prompt_style": style, "context_length": 256, "licence": "Apache-2.0"}
        save(model, folder / name, tokenizer=small_bpe, manifest=manifest)
    return folder
