"""Tokenizers of every kind beside weights: those that are read are right in the copy, the others are taken along."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from typer.testing import CliRunner

from conversion.convert import convert
from conversion.open import open_source
from conversion.options import Options
from conversion.verify import _TEXTS
from mpt.cli import app
from mpt.engine.endpoint import open_endpoint
from mpt.errors import DamagedFile, MPTError, UnsupportedConfig, UserError
from mpt.options import ModelOptions
from mpt.tokenizer import Tokenizer
from tests.conversion.conftest import make, neox_like
from tests.conversion.test_composer import save, state_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
HF = Options(to="hf")


def without_tokenizer(folder: Path, **changes: object) -> Path:
    """A published folder as it was before any of our files."""
    made = make(folder, "mpt-7b", **changes)
    for name in (*TOKENIZER_FILES, "manifest.json"):
        (made / name).unlink(missing_ok=True)
    return made


def add_sentencepiece(folder: Path, kind: str = "bpe") -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in _TEXTS if text] * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        byte_fallback=kind == "bpe",
        normalization_rule_name="identity",
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def add_code(folder: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_own.py").write_text("raise SystemExit('it ran')")
    (folder / "vocab.json").write_text('{"own": 0}')


def add_word_pieces(folder: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.decoder = tokenizers.decoders.WordPiece()
    made.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"unk_token": "[UNK]"}')


def add_no_end(folder: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))


NOT_READ = {
    "none": (lambda folder: None, "does not exist, nor tokenizer.model or spiece.model"),
    "Python code": (add_code, "`OwnTokenizer` is Python code"),
    "WordPiece": (add_word_pieces, "decoder is `WordPiece`"),
    "SentencePiece's CHAR": (lambda folder: add_sentencepiece(folder, "char"), "of the kind CHAR"),
    "no token that ends a text": (add_no_end, "has no `<|endoftext|>`"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_a_tokenizer_that_is_not_read_does_not_block_the_weights(tmp_path: Path, name: str) -> None:
    add, why = NOT_READ[name]
    source = without_tokenizer(tmp_path / "source")
    before = {path.name for path in source.iterdir()}
    add(source)
    described = CliRunner().invoke(app, ["inspect", str(source)])
    assert described.exit_code == 0, described.output
    [line] = [line for line in described.output.splitlines() if line.startswith("tokenizer ")]
    assert why in line
    assert "--tokenizer FOLDER" in line
    report = convert(source, tmp_path / "out", HF)
    assert why in report.render()
    for path in source.iterdir():
        if path.name not in before:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert len(open_source(tmp_path / "out").tensors) == len(open_source(source).tensors)
    with pytest.raises(MPTError) as served:
        open_endpoint("it", ModelOptions(str(source), device="cpu"))
    assert why in str(served.value)
    assert "\n" not in str(served.value)


def test_a_composer_checkpoint_whose_tokenizer_is_not_read_is_converted(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    add_word_pieces(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    entry = {"file_extension": ".json", "content": content}
    checkpoint = save(tmp_path / "a.pt", state_of(source, tokenizer=entry))
    report = convert(checkpoint, tmp_path / "out", HF)
    assert "decoder is `WordPiece`" in report.render()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    convert(checkpoint, tmp_path / "with", Options(to="hf", tokenizer=source))
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_fastertransformer_folder_whose_tokenizer_is_not_read_is_converted(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mpt-7b")
    convert(source, tmp_path / "ft", Options(to="fastertransformer"))
    [file] = (tmp_path / "ft").rglob("tokenizer.json")
    add_word_pieces(file.parent)
    (tmp_path / "ft" / "manifest.json").unlink(missing_ok=True)
    assert "decoder is `WordPiece`" in convert(tmp_path / "ft", tmp_path / "out", HF).render()
    convert(tmp_path / "ft", tmp_path / "with", Options(to="hf", tokenizer=source))
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_gguf_file_is_refused_a_tokenizer_it_cannot_hold(tmp_path: Path) -> None:
    source = without_tokenizer(tmp_path / "source")
    add_sentencepiece(source)
    with pytest.raises(UnsupportedConfig, match="tokenizer"):
        convert(source, tmp_path / "out", Options(to="gguf"))


def test_a_tokenizer_that_is_given_takes_the_place_of_one_that_is_not_read(tmp_path: Path) -> None:
    source = without_tokenizer(tmp_path / "source")
    add_code(source)
    neox_like().save(tmp_path)
    convert(source, tmp_path / "out", Options(to="hf", tokenizer=tmp_path))
    assert Tokenizer.from_folder(tmp_path / "out").to_json() == neox_like().to_json()
    assert not (tmp_path / "out" / "tokenization_own.py").exists()


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_a_sentencepiece_file_is_right_in_the_copy_and_taken_along(tmp_path: Path, to: str) -> None:
    source = without_tokenizer(tmp_path / "source")
    theirs = add_sentencepiece(source)
    report = convert(source, tmp_path / "out", Options(to=to))
    assert "4 ok" in report.render()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    copy = Tokenizer.from_folder(tmp_path / "out")
    assert [copy.encode(text) for text in _TEXTS] == [theirs.encode(text) for text in _TEXTS]
    assert copy.eos_id == theirs.eos_id()


def test_more_ids_than_the_embedding_has_rows_is_one_line(tmp_path: Path) -> None:
    source = without_tokenizer(tmp_path / "source", vocab_size=300)
    add_sentencepiece(source)
    with pytest.raises(DamagedFile, match="ids and the embedding 300 rows"):
        convert(source, tmp_path / "out", HF)
    with pytest.raises(DamagedFile, match="ids and the embedding 300 rows"):
        open_endpoint("it", ModelOptions(str(source), device="cpu"))
    neox_like().save(tmp_path)
    with pytest.raises(UserError, match="ids and the embedding 300 rows"):
        convert(source, tmp_path / "out", Options(to="hf", tokenizer=tmp_path))
    assert not (tmp_path / "out").exists()
