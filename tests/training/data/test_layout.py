"""The files of a split are those that Hugging Face `datasets` takes, here, under $MPT_HOME and on the hub."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from training import datasets
from training.data import hub, layout

# What `get_data_patterns` and `DataFilesDict.from_patterns` of `datasets` 5.2.0 made of these names on 2026-11-27.
OF_DATASETS = {
    "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet README.md "
    "dataset_infos.json": {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "test": ["data/test-00000-of-00001.parquet"],
    },
    "train-a.jsonl train-b.jsonl test-a.jsonl dataset_infos.json": {
        "train": ["train-a.jsonl", "train-b.jsonl"],
        "test": ["test-a.jsonl"],
    },
    "train/a.jsonl train/b.jsonl validation/a.jsonl": {
        "train": ["train/a.jsonl", "train/b.jsonl"],
        "validation": ["validation/a.jsonl"],
    },
    "my.training.jsonl dev.jsonl evaluation.jsonl": {
        "train": ["my.training.jsonl"],
        "validation": ["dev.jsonl"],
        "test": ["evaluation.jsonl"],
    },
    "rows.jsonl more/rows.jsonl .hidden/rows.jsonl __pycache__/rows.jsonl": {
        "train": ["more/rows.jsonl", "rows.jsonl"]
    },
    "trainer.jsonl latest.jsonl": {"train": ["latest.jsonl", "trainer.jsonl"]},
    "data/train/test_set.jsonl data/test/train_set.jsonl": {
        "train": ["data/train/test_set.jsonl"],
        "test": ["data/test/train_set.jsonl"],
    },
    "data/train_sft-00000-of-00001.parquet data/test_sft-00000-of-00001.parquet": {
        "train_sft": ["data/train_sft-00000-of-00001.parquet"],
        "test_sft": ["data/test_sft-00000-of-00001.parquet"],
    },
    "en-train.jsonl en-test.jsonl en_train_2.jsonl": {
        "train": ["en-train.jsonl", "en_train_2.jsonl"],
        "test": ["en-test.jsonl"],
    },
}
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*
  - split: test
    path: [data/held.jsonl, more/*.jsonl]
- config_name: other
  data_dir: other
---
# A set
"""


def rows(folder: Path, **files: Sequence[str]) -> Path:
    """Files of rows, each a prompt; `__` in a name is a folder's end."""
    for name, prompts in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"prompt": prompt, "response": "x"}) + "\n" for prompt in prompts))
    return folder


def prompts_of(name: str, tokenizer: Tokenizer) -> list[str]:
    """What a run on this set would be asked, in any order."""
    data = datasets.load(name, tokenizer, "none", 100, 0)
    assert data.n_samples is not None
    return sorted(tokenizer.decode(data.sample(n).ids).removesuffix("x") for n in range(data.n_samples))


@pytest.mark.parametrize(("names", "splits"), OF_DATASETS.items())
def test_every_split_has_the_files_that_datasets_takes(names: str, splits: dict[str, list[str]]) -> None:
    for split, expected in splits.items():
        assert layout.choose(names.split(), "", "it", [split]).names == expected


def test_the_readme_says_which_files_are_which_split() -> None:
    """As `load_dataset_builder` of `datasets` 5.2.0 resolves this README, and refuses it without a default."""
    names = ["data/part-1.jsonl", "data/part-2.jsonl", "data/held.jsonl", "more/a.jsonl", "other/train.jsonl"]
    for parts, expected in (
        ([], ["data/part-1.jsonl", "data/part-2.jsonl"]),
        (["test"], ["data/held.jsonl", "more/a.jsonl"]),
        (["other"], ["other/train.jsonl"]),
        (["other", "train"], ["other/train.jsonl"]),
    ):
        assert layout.choose(names, CARD, "it", parts).names == expected
    several = CARD.replace("config_name: default", "config_name: first")
    with pytest.raises(UserError, match=r"configurations first, other.*`NAME:first`"):
        layout.choose(names, several, "it")
    assert layout.choose(names, several.replace("data_dir: other", "data_dir: other\n  default: true"), "it").names == [
        "other/train.jsonl"
    ]
    with pytest.raises(UserError, match="YAML"):
        layout.choose(names, "---\nconfigs: [\n---\n", "it")


def test_of_two_kinds_the_more_common_one_is_taken_and_the_other_is_said() -> None:
    taken = layout.choose(["a.parquet", "b.parquet", "a.jsonl", "state.json", "notes.md"], "", "it")
    assert taken.names == ["a.parquet", "b.parquet"]
    assert taken.left_out == {"a.jsonl": ".jsonl beside more .parquet"}
    assert layout.choose(["a.parquet", "a.jsonl"], "", "it").names == ["a.parquet"]
    beside = ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "config.json", "state.json"]
    assert layout.choose(["a.json", *beside], "", "it").names == ["a.json"]


def test_a_folder_here_gives_its_training_rows_and_says_what_it_leaves_out(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    caplog.set_level("INFO")
    for folder, name in ((tmp_path / "mine", str(tmp_path / "mine")), (tmp_path / "datasets/alpaca", "alpaca")):
        rows(folder, **{"train-1": ["a"], "train-2": ["b"], "test-1": ["t"]})
        (folder / "dataset_infos.json").write_text('{"default": {"features": {}}}')
        assert prompts_of(name, tokenizer) == ["a", "b"]
        assert prompts_of(f"{name}:test", tokenizer) == ["t"]
        assert f"`{folder}`: split `train` is train-1.jsonl, train-2.jsonl; left out: test-1.jsonl (split test)" in (
            caplog.text
        )
    with pytest.raises(UserError, match="no split `validation`; its splits are train, test"):
        datasets.load("alpaca:validation", tokenizer, "none", 100, 0)


def test_parquet_in_a_folder_of_data_is_found(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    data = tmp_path / "datasets" / "me--mine" / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.table({"prompt": [split], "response": ["x"]})
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    assert prompts_of("me/mine", tokenizer) == ["train"]


def test_what_save_to_disk_wrote_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its layout and its Arrow stream, as `datasets` 5.2.0 writes them."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        table = pyarrow.table({"prompt": [split], "response": ["x"]})
        with pyarrow.ipc.new_stream(tmp_path / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (tmp_path / split / "state.json").write_text('{"_data_files": []}')
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert prompts_of(str(tmp_path), tokenizer) == ["train"]


def test_of_a_set_of_the_hub_only_the_split_is_downloaded(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = rows(tmp_path / "repository", data__train=["a"], data__test=["t"])
    asked: list[list[str]] = []

    def download(repository: str, allow_patterns: list[str], local_files_only: bool, **_: Any) -> str:
        assert repository == "me/mine" and not local_files_only
        asked.append(allow_patterns)
        return str(stored)

    listed = [SimpleNamespace(rfilename=name) for name in ("README.md", "data/train.jsonl", "data/test.jsonl")]
    info = SimpleNamespace(siblings=listed)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert prompts_of("me/mine", tokenizer) == ["a"]
    assert asked == [["README.md"], ["data/train.jsonl"]]


def test_without_the_hub_the_cache_of_the_hub_is_read(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no network")

    cached = rows(tmp_path / "cached", train=["a"], test=["t"])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cached))
    assert prompts_of("me/mine", tokenizer) == ["a"]


def test_sets_with_rows_of_their_own_places_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPT_HOME", str(tmp_path))
    folder = rows(tmp_path / "datasets" / "hc3", all=["a"], finance=["b"])
    assert hub.locate("hc3") == [folder / "all.jsonl"]
