"""Text to token ids and back, for the published GPT-NeoX tokenizers and for byte-level BPEs trained here.

A thin layer over `tokenizers` that keeps two promises: text given to `encode` never becomes a control token, and a
stream of ids becomes text without ever showing half a character. How messages become prompts is in `mpt/prompts.py`.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from mpt.errors import CheckpointNotFound, DamagedFile, UnsupportedConfig, UserError
from mpt.files import read_optional_json

END_OF_TEXT = "<|endoftext|>"
CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"


class Tokenizer:
    """One checkpoint's tokenizer. Immutable after construction, so threads may share it."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, eos_token: str = END_OF_TEXT, end_ids: Iterable[int] = ()
    ) -> None:
        """Takes over `tokenizer`. end_ids: more ids that end a generation, beside end-of-text and `<|im_end|>`.

        Raises UnsupportedConfig unless it is byte-level (NeoX, GPT-2, ours), UserError if it lacks `eos_token`.
        """
        if type(tokenizer.decoder).__name__ != "ByteLevel":
            raise UnsupportedConfig(
                f"the tokenizer's decoder is `{type(tokenizer.decoder).__name__}`; "
                "MPT's tokenizers are byte-level BPE (decoder `ByteLevel`)"
            )
        tokenizer.no_truncation()  # a saved training-time setting would cut prompts silently
        tokenizer.no_padding()
        # Where a finetune saved these as ordinary added tokens, user text could spell them.
        control = (END_OF_TEXT, CHATML_START, CHATML_END, eos_token)
        tokenizer.add_special_tokens([token for token in control if tokenizer.token_to_id(token) is not None])
        tokenizer.encode_special_tokens = True  # "special tokens are encoded as the characters they are"
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added_text: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = tokenizer.get_vocab_size()
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"the tokenizer has no `{eos_token}`, which ends a text; add it as a special token")
        self.eos_id: int = eos_id
        known_ends = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, CHATML_END))
        ends = [eos_id, *(i for i in known_ends if i is not None), *end_ids]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))  # eos first, each once

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder, with the end ids its generation_config.json names.

        Special tokens that only tokenizer_config.json or special_tokens_map.json name get the next free ids, as
        transformers gives them. Raises CheckpointNotFound without a tokenizer.json.
        """
        folder = Path(folder)
        config = read_optional_json(folder / "tokenizer_config.json")
        special_map = read_optional_json(folder / "special_tokens_map.json")
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        declared: list[Any] = []
        for source in (config, special_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):  # transformers 4 and 5
                declared += source[key] if isinstance(source.get(key), list) else []
        tokenizer.add_special_tokens([_content(token) for token in declared])
        eos_token = _content(config.get("eos_token") or special_map.get("eos_token") or END_OF_TEXT)
        end = read_optional_json(folder / "generation_config.json").get("eos_token_id")
        end_ids = end if isinstance(end, list) else [] if end is None else [end]
        return cls(tokenizer, eos_token=eos_token, end_ids=end_ids)

    @classmethod
    def from_file(cls, tokenizer_json: str | Path) -> "Tokenizer":
        """The tokenizer in one `tokenizer.json`, without the files that usually lie beside it."""
        return cls(_read_tokenizer(Path(tokenizer_json)))

    @classmethod
    def from_json(
        cls, text: str, where: str, *, eos_token: str = END_OF_TEXT, end_ids: Iterable[int] = ()
    ) -> "Tokenizer":
        """The tokenizer that `to_json` gave, or the text of any tokenizer.json. Raises DamagedFile naming `where`."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text), eos_token=eos_token, end_ids=end_ids)
        except Exception as error:  # `tokenizers` raises Exception itself, nothing narrower
            raise DamagedFile(f"the tokenizer in `{where}` is not readable: {error}") from error

    def to_json(self) -> str:
        """All of it but which ids end a text, as the text of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; `<|im_end|>` and its like are plain characters unless `allow_special`.

        `allow_special` is for text we wrote ourselves, never for a user's. Nothing is added at either end.
        """
        try:
            tokenizer = self._tokenizer_of_special if allow_special else self._tokenizer
            # Of one, because `encode` holds the GIL: a text of 1 MB stalled every stream for 0.57 s, this way 0.04 s.
            ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
            return ids
        except TypeError:
            raise UserError(
                "the text holds half of a surrogate pair (U+D800 to U+DFFF), which is no character; remove it"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD, ids outside the vocabulary nothing."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each token and its id, without the control tokens that were added."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        return vocabulary

    def special_id(self, token: str) -> int | None:
        """The id of a control token, or None if this tokenizer has no such control token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id if token_id in self.special_ids else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, possibly part of a character; empty outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """One token for display: its text, or `bytes:\\xf0\\x9f` when it is only part of a character.

        That form is OpenAI's in `logprobs.tokens`.
        """
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @cached_property
    def longest_token_bytes(self) -> int:
        """The most bytes one token stands for: a text of n bytes has at least n divided by this many tokens."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        folder = Path(folder)
        eos_token = self._tokenizer.id_to_token(self.eos_id)
        names = {"bos_token": eos_token, "eos_token": eos_token, "unk_token": eos_token}  # as in the hub's MPT folders
        extra = [self._added_text[i] for i in sorted(self.special_ids - {self.eos_id})]
        special_map = {**names, "additional_special_tokens": extra} if extra else names
        config = {
            **special_map,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,  # True would turn " ." into "." when transformers decodes
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        self._tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    @cached_property
    def _tokenizer_of_special(self) -> tokenizers.Tokenizer:
        """A second instance, since switching the first one over would race with other threads."""
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._added_text.get(token_id) or self._tokenizer.id_to_token(token_id)
        if token is None:  # an unused row of the padded embedding
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token is stored as plain text
            return token.encode("utf-8")


class DetokenizeStream:
    """Turns ids into text one at a time; what it has returned plus `flush()` is `decode` of them all.

    A push costs under a microsecond. `tokenizers.decoders.DecodeStream` will not do: it withholds everything after
    bytes that are not UTF-8 until a whole character follows, and decodes the withheld ids again at each step.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: whole characters, often none."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (256 entries).

    Printable latin-1 stands for itself, the other bytes in order for U+0100 and up. Source: GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _content(token: Any) -> str:
    """The text of a special token as JSON files give it: a string, or an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointNotFound(
            f"`{path}` does not exist; copy the tokenizer.json of this checkpoint's tokenizer there"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises Exception itself, nothing narrower
        raise DamagedFile(f"`{path}` is not a readable tokenizer.json: {error}") from error
