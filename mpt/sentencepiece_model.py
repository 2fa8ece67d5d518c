"""SentencePiece's model files (tokenizer.model, spiece.model) as a fast tokenizer of the same ids.

The kinds BPE and Unigram, with the file's own normaliser, byte fallback, control and user-defined symbols. The file is
one protobuf message (sentencepiece_model.proto); it is read here, because sentencepiece's own Python reader asks for a
newer protobuf than the packages beside it take. How ids become text is in `mpt/spelling.py`.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from mpt.bounded import TOKENIZER_BYTES, check_size
from mpt.errors import DamagedFile, UnsupportedTokenizer
from mpt.spelling import SPACE

FILES = ("tokenizer.model", "spiece.model")
MAX_BYTES = 64 << 20  # of a file; 256,000 pieces take 5 MB
_MAX_PIECES = 1 << 21
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
_NAMES = {3: "WORD", 4: "CHAR"}
_NEVER = -1e5  # a score that keeps a piece out of every text; real ones lie between -30 and 0


@dataclass(frozen=True)
class SentencePieceModel:
    """What a file says. Defaults are the proto's."""

    pieces: list[tuple[str, float, int]]  # text, score, type, in the order of ids
    model_type: int
    byte_fallback: bool
    end: str  # the piece that ends a text
    charsmap: bytes  # the compiled rules of its normaliser
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def load(path: Path) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a file, not to be changed, and the piece that ends a text, or "".

    Kept, since 256,000 pieces take 6 s, and a server asks several times. Raises DamagedFile, UnsupportedTokenizer.
    """
    stat = path.stat()
    return _load(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _load(path: Path, n_bytes: int, modified_ns: int) -> tuple[tokenizers.Tokenizer, str]:
    model = read(path)
    return tokenizer_of(model, path), model.end


def tokenizer_of(model: SentencePieceModel, path: Path) -> tokenizers.Tokenizer:
    """A fast tokenizer of the same ids. path: of the file that says it. Raises DamagedFile."""
    ids = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    if len(ids) != len(model.pieces):
        raise DamagedFile(f"`{path}` holds a piece twice; copy it again")
    if model.byte_fallback and not all(f"<0x{byte:02X}>" in ids for byte in range(256)):
        raise DamagedFile(f"`{path}` falls back to bytes and lacks some of the 256; copy it again")
    try:
        made = tokenizers.Tokenizer(_bpe(model, ids) if model.model_type == BPE else _unigram(model, path))
        made.normalizer = _normalizer(model)
    except Exception as error:  # `tokenizers` raises Exception itself, nothing narrower
        if isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f"`{path}` is not a readable SentencePiece model: {error}") from error
    made.decoder = _decoder(model)
    special = [text for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if model.model_type == BPE:
        made.add_tokens([AddedToken(text, normalized=True) for text in _user_defined(model)])
    return made


def read(path: Path) -> SentencePieceModel:
    """What a file says. Raises DamagedFile, and UnsupportedTokenizer for a kind of model that is not read."""
    if path.stat().st_size > MAX_BYTES:
        raise DamagedFile(f"`{path}` has {path.stat().st_size} bytes, over the limit of {MAX_BYTES}; copy it again")
    try:
        check_size(path, TOKENIZER_BYTES)
        return _parsed(path.read_bytes(), path)
    except (ValueError, IndexError, struct.error) as error:
        raise DamagedFile(f"`{path}` is not a readable SentencePiece model ({error}); copy it again") from error


def _parsed(data: bytes, path: Path) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    if not pieces or len(pieces) > _MAX_PIECES:
        raise ValueError(f"it holds {len(pieces)} pieces, the limit is 1 to {_MAX_PIECES}")
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        name = _NAMES.get(kind, kind)
        raise UnsupportedTokenizer(f"`{path}` is a SentencePiece model of the kind {name}; BPE and UNIGRAM are read")
    if trainer.get(24, 0):
        raise UnsupportedTokenizer(f"`{path}` writes spaces behind words (treat_whitespace_as_suffix); it is not read")
    end_id = _signed(trainer.get(42, 2))
    has_end = 0 <= end_id < len(pieces) and pieces[end_id][2] == _CONTROL
    return SentencePieceModel(
        pieces=pieces,
        model_type=kind,
        byte_fallback=bool(trainer.get(35, 0)),
        end=pieces[end_id][0] if has_end else "",
        charsmap=bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    found = dict(_fields(data))
    return found.get(1, b"").decode("utf-8"), struct.unpack("<f", found.get(2, bytes(4)))[0], found.get(3, _NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or bytes. Raises ValueError and IndexError."""
    if not isinstance(data, bytes):
        raise ValueError("a message is a number")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        n_bytes, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if at + n_bytes > len(data):
            raise ValueError(f"{n_bytes} bytes are said to follow at byte {at}, {len(data) - at} do")
        yield key >> 3, data[at : at + n_bytes]
        at += n_bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of over 64 bits at byte {at}")


def _signed(value: int) -> int:
    """An int32 as protobuf writes negative ones."""
    return value - (1 << 64) if value >> 63 else value


def _bpe(model: SentencePieceModel, ids: dict[str, int]) -> models.BPE:
    """SentencePiece joins the neighbours whose joint piece scores best, so each way to cut a piece is a merge."""
    made_of_text = {text for text, _, kind in model.pieces if kind == _NORMAL}
    by_score = sorted(made_of_text, key=lambda text: (-model.pieces[ids[text]][1], ids[text]))
    merges = [
        (text[:cut], text[cut:])
        for text in by_score
        for cut in range(1, len(text))
        if text[:cut] in made_of_text and text[cut:] in made_of_text
    ]
    unknown = next((text for text, _, kind in model.pieces if kind == _UNKNOWN), None)
    return models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def _unigram(model: SentencePieceModel, path: Path) -> models.Unigram:
    """Control symbols and bytes keep their places and never win; user-defined symbols score as SentencePiece has them.

    A character without a piece costs 10 more than the worst piece. As it has no piece, every way to cut the text pays
    that alike, so the low scores here change no choice. Only text that spells a byte's name with such a character
    becomes the byte, where SentencePiece keeps the characters.
    """
    unknown = next((number for number, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise DamagedFile(f"`{path}` has no unknown piece, which a Unigram model needs; copy it again")
    best = max((score for _, score, kind in model.pieces if kind == _NORMAL), default=0.0)

    def scored(text: str, score: float, kind: int) -> float:
        if kind == _USER_DEFINED:
            return len(text.encode()) * best - 0.1
        return score if kind == _NORMAL else _NEVER

    vocab = [(text, scored(text, score, kind)) for text, score, kind in model.pieces]
    return models.Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback)


def _user_defined(model: SentencePieceModel) -> list[str]:
    return [text for text, _, kind in model.pieces if kind == _USER_DEFINED]


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        rules = normalizers.Precompiled(model.charsmap)
        # `Precompiled` looks up "\r\n" as one character, finds "\r", and loses the other.
        steps += [normalizers.Replace("\r\n", rules.normalize_str("\r") + "\n"), rules]
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(_prefix(model))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _prefix(model: SentencePieceModel) -> normalizers.Normalizer:
    """A space before the text, unless it is empty or nothing but a user-defined symbol.

    `tokenizers` looks for those symbols in the normalised text, and normalises them for that as if each were a text.
    """
    if model.model_type == UNIGRAM or not _user_defined(model):
        return normalizers.Prepend(" ")
    symbols = "|".join(re.escape(symbol) for symbol in sorted(_user_defined(model), key=len, reverse=True))
    return normalizers.Replace(Regex(rf"\A(?!(?:{symbols})?\z)"), " ")


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    n_stripped = 1_000_000 if model.remove_extra_whitespaces else 1 if model.add_dummy_prefix else 0
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")] if model.escape_whitespaces else []
    steps += [decoders.ByteFallback()] if model.byte_fallback else []
    steps.append(decoders.Fuse())
    steps += [decoders.Strip(" ", n_stripped, 0)] if n_stripped else []
    return decoders.Sequence(steps)
