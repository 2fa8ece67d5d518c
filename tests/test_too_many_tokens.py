"""A tokenizer with more ids than the embedding has rows is refused in the same words wherever a checkpoint is used."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversion.open import open_source
from mpt.checkpoint import save
from mpt.config import MPTConfig
from mpt.engine.endpoint import open_endpoint
from mpt.engine.local import LocalModel
from mpt.errors import MPTError
from mpt.options import ModelOptions
from mpt.transformers_model import MPTForCausalLM
from training import batches, recipes
from training.data import semdedup
from training.evaluation import models, tiny_tasks

TINY = Path(__file__).parents[1] / "mpt" / "tiny" / "mpt-tiny"
_CPU = torch.device("cpu")
_FINETUNE = recipes.finetune("", "my.jsonl", "out")
_PRETRAIN = recipes.pretrain("my.txt", "out", str(TINY), 300)

CONSUMERS: dict[str, Callable[[Path], object]] = {
    "mpt serve": lambda folder: open_endpoint("small", ModelOptions(str(folder))),
    "mpt generate, mpt chat": lambda folder: LocalModel(ModelOptions(str(folder))),
    "mpt convert, mpt inspect": open_source,
    "mpt convert --tokenizer": lambda folder: open_source(folder, tokenizer=TINY),
    "train finetune": lambda folder: batches.load_tokenizer(replace(_FINETUNE, base=str(folder))),
    "train pretrain --config": lambda folder: batches.load_tokenizer(_PRETRAIN),
    "train evaluate": lambda folder: tiny_tasks.evaluate(str(folder), ["novel"]),
    "train evaluate --tasks": lambda folder: models.Local.load(str(folder), _CPU),
    "train data semdedup": lambda folder: semdedup.embed([], str(folder), _CPU),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an embedding of 384 rows, and the tokenizer of mpt-tiny, which has 2,048 ids."""
    out = tmp_path_factory.mktemp("too-many") / "small"
    model = MPTForCausalLM(MPTConfig(d_model=64, n_heads=2, n_layers=1, vocab_size=384, max_seq_len=64))
    save(model, out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((TINY / file).read_bytes())
    (out / "manifest.json").unlink()
    return out


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_more_ids_than_rows_are_refused_in_the_same_words(consumer: str, folder: Path) -> None:
    where = TINY if consumer in ("mpt convert --tokenizer", "train pretrain --config") else folder
    said = f"the tokenizer of `{where}` has 2048 ids and the embedding 384 rows; give the tokenizer that the checkpoint"
    with pytest.raises(MPTError) as caught:
        CONSUMERS[consumer](folder)
    assert str(caught.value).startswith(said)
    assert caught.value.exit_code == (2 if where == TINY else 3)
