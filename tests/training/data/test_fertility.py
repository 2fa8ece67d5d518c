"""Tokenizers on one's own text, counted by hand."""

from pathlib import Path

import pytest

from mpt.errors import UserError
from mpt.tokenizer import Tokenizer
from training import cli
from training.data import fertility


def test_bytes_and_tokens_are_counted(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("name: Ada\nZürich", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "age: 36"}\n{"text": "name: Ada"}\n{"text": "never read"}\n')
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    (found,) = fertility.compare(sources, {"own": tokenizer_folder}, limit=2)
    first, second = found.by_source.values()
    assert (first.n_bytes, first.n_words) == (17, 3)  # ü has two bytes
    assert (second.n_bytes, second.n_words) == (16, 4)
    expected = len(tokenizer.encode("age: 36")) + len(tokenizer.encode("name: Ada"))
    assert second.n_tokens == expected
    assert second.bytes_per_token == 16 / expected and second.fertility == expected / 4
    assert found.whole.n_words == 7
    assert found.whole.used == set(tokenizer.encode("name: Ada\nZürich")) | set(tokenizer.encode("age: 36"))
    # The next multiple of 128 is 384.
    assert found.spare == 384 - tokenizer.vocab_size > 0


def test_mpt_has_155_ids_to_spare(tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    """50,432 rows and 50,277 tokens, as the blog says; here by the config beside a tokenizer."""
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {tokenizer.vocab_size + 50_432 - 50_277}}}')
    (tmp_path / "a.txt").write_text("name: Ada")
    (found,) = fertility.compare([str(tmp_path / "a.txt")], {"mpt": tmp_path})
    assert found.spare == 155


def test_the_command_compares(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("One day the rain came, and it stayed.")
    names = ["--tokenizer", "mpt-tiny", "--tokenizer", str(tokenizer_folder)]
    cli.app(["data", "tokenizers", str(tmp_path / "a.txt"), *names], standalone_mode=False)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["tokenizer", "source"] and len(lines) == 2
    tiny, own = (float(line.split()[2]) for line in lines)
    assert tiny > own  # made on prose, with five times the tokens
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="no words"):
        cli.app(["data", "tokenizers", str(tmp_path / "empty.txt"), *names], standalone_mode=False)
