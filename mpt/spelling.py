"""How the text of one token stands for bytes, as the decoder of a tokenizer.json says, and how bytes become text.

Two spellings: byte-level (GPT-2, NeoX, Bloom), where each character is a byte, and SentencePiece's (Llama and most
others), where `▁` is a space and `<0xE2>` may be a byte. Not here: how text becomes tokens (`mpt/tokenizer.py`).
"""

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

from mpt.errors import UnsupportedTokenizer

SPACE = "▁"  # U+2581, SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """How tokens are spelled. space: the character that stands for a space, if one does."""

    is_byte_level: bool = False
    space: str = ""
    has_byte_tokens: bool = False
    n_stripped: int = 0  # spaces at the beginning of a text that the tokenizer wrote there itself

    def bytes_of(self, token: str) -> bytes:
        """The bytes that the text of a token stands for."""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token is stored as plain text
                return token.encode("utf-8")
        if self.has_byte_tokens and (found := _BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return (token.replace(self.space, " ") if self.space else token).encode("utf-8")


def spelling_of(decoder: Any) -> Spelling:
    """The spelling of a tokenizer with this decoder of `tokenizers`. Raises UnsupportedTokenizer."""
    if decoder is None:
        raise UnsupportedTokenizer("the tokenizer has no decoder, so how its tokens become text is unknown")
    described = json.loads(decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    space, has_byte_tokens, n_stripped, is_byte_level = "", False, 0, False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            is_byte_level = True
        elif kind == "ByteFallback":
            has_byte_tokens = True
        elif kind == "Metaspace":
            space = step["replacement"]
            n_stripped = 0 if step.get("prepend_scheme", "always") == "never" else 1
        elif kind == "Replace" and step["content"] == " " and len(step["pattern"].get("String", "")) == 1:
            space = step["pattern"]["String"]
        elif kind == "Strip" and step["content"] == " " and not step["stop"]:
            n_stripped = step["start"]
        elif kind != "Fuse":
            raise _unknown(kind)
    if is_byte_level and (space or has_byte_tokens or n_stripped):
        raise _unknown("Sequence")
    if not is_byte_level and not space and not has_byte_tokens and described["type"] != "Sequence":
        raise _unknown(described["type"])
    return Spelling(is_byte_level, space, has_byte_tokens, n_stripped)


def _unknown(kind: str) -> UnsupportedTokenizer:
    return UnsupportedTokenizer(
        f"the tokenizer's decoder is `{kind}`; byte-level ones (`ByteLevel`) and SentencePiece's (`Metaspace`, or a "
        "`Sequence` of `Replace`, `ByteFallback`, `Fuse` and `Strip`) are read"
    )


class TextStream:
    """Bytes to text, a piece at a time: whole characters, and U+FFFD for bytes that form none."""

    def __init__(self, spelling: Spelling, is_continuation: bool = False) -> None:
        # `tokenizers` writes one U+FFFD for each maximal part of a character, SentencePiece one for each byte.
        errors = "replace" if spelling.is_byte_level else _EACH_BYTE
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
        self._to_strip = 0 if is_continuation else spelling.n_stripped

    def push(self, piece: bytes) -> str:
        """The text that is certain now."""
        return self._stripped(self._decoder.decode(piece))

    def flush(self) -> str:
        """What is left at the end."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if not self._to_strip or not text:
            return text
        n = min(len(text) - len(text.lstrip(" ")), self._to_strip)
        self._to_strip = 0 if n < len(text) else self._to_strip - n
        return text[n:]


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), error
    return "\ufffd" * (error.end - error.start), error.end


_EACH_BYTE = "mpt-replace-each-byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_characters() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (256 entries).

    Printable latin-1 stands for itself, the other bytes in order for U+0100 and up. Source: GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
