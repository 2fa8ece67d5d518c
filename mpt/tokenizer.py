"""Text to token ids and back: byte-level BPE (GPT-NeoX, Bloom, ours) and what SentencePiece made (Llama, T5, SEA-LION).

A thin layer over `tokenizers` that keeps two promises: text given to `encode` never becomes a control token, and a
stream of ids becomes text without ever showing half a character. How tokens stand for bytes is in `mpt/spelling.py`,
SentencePiece's own files in `mpt/sentencepiece_model.py`, how messages become prompts in `mpt/prompts.py`.
"""

import json
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from mpt import sentencepiece_model
from mpt.bounded import TOKENIZER_BYTES, check_size
from mpt.errors import CheckpointNotFound, DamagedFile, UnsupportedTokenizer, UserError
from mpt.files import read_optional_json
from mpt.spelling import TextStream, spelling_of

END_OF_TEXT = "<|endoftext|>"
CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"
FILES = ("tokenizer.json", *sentencepiece_model.FILES)  # that are read, the first that is there


class Tokenizer:
    """One checkpoint's tokenizer. Immutable after construction, so threads may share it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, eos_token: str = "", end_ids: Iterable[int] = ()) -> None:
        """Takes over `tokenizer`. end_ids: more ids that end a generation, beside end-of-text and `<|im_end|>`.

        eos_token: by default `<|endoftext|>`, else `</s>`. Raises UnsupportedTokenizer for a decoder that is not read,
        UserError if it lacks `eos_token`.
        """
        self.spelling = spelling_of(tokenizer.decoder)
        eos_token = eos_token or next((t for t in _ENDS if tokenizer.token_to_id(t) is not None), END_OF_TEXT)
        tokenizer.no_truncation()  # a saved training-time setting would cut prompts silently
        tokenizer.no_padding()
        # Where a finetune saved these as ordinary added tokens, user text could spell them.
        control = (END_OF_TEXT, CHATML_START, CHATML_END, eos_token)
        tokenizer.add_special_tokens([token for token in control if tokenizer.token_to_id(token) is not None])
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added_text: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._of_text = _text_only(tokenizer, not self.spelling.is_byte_level)
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

        Its tokenizer.json, or else tokenizer.model or spiece.model. Special tokens that only tokenizer_config.json or
        special_tokens_map.json name get the next free ids, as transformers gives them. Raises CheckpointNotFound
        without any of them, UnsupportedTokenizer for a kind that is not read.
        """
        folder = Path(folder)
        config = read_optional_json(folder / "tokenizer_config.json")
        special_map = read_optional_json(folder / "special_tokens_map.json")
        tokenizer, own_end = _read_folder(folder, config)
        declared: list[Any] = []
        for source in (config, special_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):  # transformers 4 and 5
                declared += source[key] if isinstance(source.get(key), list) else []
        tokenizer.add_special_tokens([_content(token) for token in declared])
        eos_token = _content(config.get("eos_token") or special_map.get("eos_token") or own_end)
        end = read_optional_json(folder / "generation_config.json").get("eos_token_id")
        end_ids = end if isinstance(end, list) else [] if end is None else [end]
        return cls(tokenizer, eos_token=eos_token, end_ids=end_ids)

    @classmethod
    def from_file(cls, tokenizer_json: str | Path) -> "Tokenizer":
        """The tokenizer in one `tokenizer.json`, without the files that usually lie beside it."""
        return cls(_read_tokenizer(Path(tokenizer_json)))

    @classmethod
    def from_json(cls, text: str, where: str, *, eos_token: str = "", end_ids: Iterable[int] = ()) -> "Tokenizer":
        """The tokenizer that `to_json` gave, or the text of any tokenizer.json. Raises DamagedFile naming `where`."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text), eos_token=eos_token, end_ids=end_ids)
        except UnsupportedTokenizer:
            raise
        except Exception as error:  # `tokenizers` raises Exception itself, nothing narrower
            raise DamagedFile(f"the tokenizer in `{where}` is not readable: {error}") from error

    def to_json(self) -> str:
        """All of it but which ids end a text, as the text of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str, allow_special: bool = False, *, is_continuation: bool = False) -> list[int]:
        """Ids of `text`; `<|im_end|>` and its like are plain characters unless `allow_special`.

        `allow_special` is for text we wrote ourselves, never for a user's. No control token is added at either end.
        is_continuation: the text goes on behind another, so no space is put before it, as SentencePiece does at the
        beginning of a text.
        """
        try:
            if is_continuation:
                tokenizer = self._continuation_of_special if allow_special else self._continuation
            else:
                tokenizer = self._tokenizer if allow_special else self._of_text
            # Of one, because `encode` holds the GIL: a text of 1 MB stalled every stream for 0.57 s, this way 0.04 s.
            ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
            return ids
        except TypeError:
            raise UserError(
                "the text holds half of a surrogate pair (U+D800 to U+DFFF), which is no character; remove it"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD, ids outside the vocabulary nothing."""
        if self.spelling.is_byte_level:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            return text
        stream = DetokenizeStream(self, skip_special_tokens)
        return "".join(stream.push(token_id) for token_id in ids) + stream.flush()

    def require_rows(self, n_rows: int, where: str | Path, is_given: bool = False) -> None:
        """Raises DamagedFile if a model whose embedding has n_rows rows lacks some for this tokenizer's ids.

        is_given: by the user, in place of the checkpoint's own; then it is UserError.
        """
        if self.vocab_size > n_rows:
            raise (UserError if is_given else DamagedFile)(
                f"the tokenizer of `{where}` has {self.vocab_size} ids and the embedding {n_rows} rows; give the "
                "tokenizer that the checkpoint was trained with"
            )

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each token and its id, without the control tokens that were added."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        return vocabulary

    def special_id(self, token: str) -> int | None:
        """The id of a control token, or None if this tokenizer has no such control token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id if token_id in self.special_ids else None

    @property
    def added_tokens(self) -> dict[str, int]:
        """The tokens beside the vocabulary and their ids; `special_ids` says which of them are control tokens."""
        return {text: token_id for token_id, text in self._added_text.items()}

    def with_control_tokens(self, texts: Iterable[str]) -> "Tokenizer":
        """This tokenizer, to which these added tokens are control tokens too: `encode` never makes them from text."""
        more = [text for text in texts if text in self.added_tokens and self.special_id(text) is None]
        if not more:
            return self
        described = json.loads(self.to_json())
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["content"] in more
        eos_token = self._added_text[self.eos_id]
        return Tokenizer.from_json(json.dumps(described), "tokenizer.json", eos_token=eos_token, end_ids=self.end_ids)

    def with_chatml(self) -> "Tokenizer":
        """This tokenizer with ChatML's control tokens at the next free ids, `<|im_start|>` first, as MPT-7B-Chat's has.

        Itself where it has both.
        """
        if None not in (self.special_id(CHATML_START), self.special_id(CHATML_END)):
            return self
        made = tokenizers.Tokenizer.from_str(self.to_json())
        made.add_special_tokens([CHATML_START, CHATML_END])
        return Tokenizer(made, eos_token=self._added_text[self.eos_id], end_ids=self.end_ids)

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
        for key, token in (("bos_token", "<s>"), ("unk_token", "<unk>")):
            if not self.spelling.is_byte_level and self.special_id(token) is not None:
                names[key] = token
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
    def _continuation(self) -> tokenizers.Tokenizer:
        return _copy(self._of_text, is_continuation=True)

    @cached_property
    def _continuation_of_special(self) -> tokenizers.Tokenizer:
        return _copy(self._tokenizer, is_continuation=True)

    def _compute_bytes(self, token_id: int) -> bytes:
        token = self._added_text.get(token_id) or self._tokenizer.id_to_token(token_id)
        if token is None:  # an unused row of the padded embedding
            return b""
        return self.spelling.bytes_of(token)


class DetokenizeStream:
    """Turns ids into text one at a time; what it has returned plus `flush()` is `decode` of them all.

    A push costs under a microsecond. `tokenizers.decoders.DecodeStream` will not do: it withholds everything after
    bytes that are not UTF-8 until a whole character follows, and decodes the withheld ids again at each step.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, is_continuation: bool = False
    ) -> None:
        """is_continuation: the ids go on behind others, so a space before the first of them belongs to the text."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text = TextStream(tokenizer.spelling, is_continuation)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token: whole characters, often none."""
        if token_id in self._skipped:
            return ""
        return self._text.push(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that was never completed."""
        return self._text.flush()


_ENDS = (END_OF_TEXT, "</s>")


def _content(token: Any) -> str:
    """The text of a special token as JSON files give it: a string, or an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer is read from; empty where none is there."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def _read_folder(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer of a folder, and the token that its own file says ends a text, or ""."""
    found = tokenizer_files(folder)
    if not found:
        name = config.get("tokenizer_class") if isinstance(config.get("auto_map"), dict) else None
        why = f"; its `{name}` is Python code of the checkpoint, which is not run" if name else ""
        raise CheckpointNotFound(
            f"`{folder / FILES[0]}` does not exist, nor {' or '.join(FILES[1:])}{why}; copy the tokenizer.json of this "
            "checkpoint's tokenizer there"
        )
    if found[0].name == FILES[0]:
        return _read_tokenizer(found[0]), ""
    loaded, end = sentencepiece_model.load(found[0])
    return _copy(loaded), end


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointNotFound(
            f"`{path}` does not exist; copy the tokenizer.json of this checkpoint's tokenizer there"
        )
    check_size(path, TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises Exception itself, nothing narrower
        raise DamagedFile(f"`{path}` is not a readable tokenizer.json: {error}") from error


def _copy(tokenizer: tokenizers.Tokenizer, *, is_continuation: bool = False) -> tokenizers.Tokenizer:
    """Another instance over the same vocabulary, whose settings are its own: threads share the first one.

    is_continuation: without what belongs to the beginning of a text only.
    """
    made = tokenizers.Tokenizer(tokenizer.model)
    made.normalizer, made.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    made.decoder = tokenizer.decoder
    if is_continuation:
        described = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
        for part in ("normalizer", "pre_tokenizer"):
            step = getattr(tokenizer, part)
            described[part] = None if step is None else _without_beginning(json.loads(step.__getstate__()))
        changed = tokenizers.Tokenizer.from_str(json.dumps(described))
        made.normalizer, made.pre_tokenizer = changed.normalizer, changed.pre_tokenizer
    for _, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        made.add_tokens([token])  # in the order of ids, so that each gets its own again
    made.encode_special_tokens = tokenizer.encode_special_tokens
    return made


def _without_beginning(step: dict[str, Any]) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer without its steps for the beginning of a text; None if nothing is left."""
    kind = step["type"]
    if kind == "Sequence":
        (key,) = step.keys() - {"type"}
        return {**step, key: [kept for inner in step[key] if (kept := _without_beginning(inner)) is not None]}
    if kind == "Prepend" or (kind == "Replace" and step["pattern"].get("Regex", "").startswith(r"\A")):
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return {**step, "strip_left": False} if kind == "Strip" else step


def _text_only(tokenizer: tokenizers.Tokenizer, may_join_anything: bool) -> tokenizers.Tokenizer:
    """The same tokenizer for text that may spell control tokens, which then are plain characters.

    `tokenizers` does not look for them with `encode_special_tokens`, but the model may still find one among its words:
    Unigram always, BPE where merges lead to it. There the control tokens get names that nobody can guess.
    """
    made = _copy(tokenizer)
    made.encode_special_tokens = True  # "special tokens are encoded as the characters they are"
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    is_unigram = isinstance(tokenizer.model, tokenizers.models.Unigram)
    if not is_unigram and not ((may_join_anything or tokenizer.model.ignore_merges) and _is_spelled(made, special)):
        return made
    described = json.loads(tokenizer.to_str())
    secret = secrets.token_hex(8)
    names = {content: f"\ufffe{secret}{content}" for content in special}
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = described["model"]
    if is_unigram:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        model["merges"] = [pair for pair in model["merges"] if special.isdisjoint((*pair, "".join(pair)))]
    described["post_processor"] = None  # which may name control tokens
    made = tokenizers.Tokenizer.from_str(json.dumps(described))
    made.encode_special_tokens = True
    return made


def _is_spelled(tokenizer: tokenizers.Tokenizer, special: Iterable[str]) -> bool:
    """Whether a BPE joins the characters of a control token to that token; what stands around them cannot help it."""
    bare = _copy(tokenizer, is_continuation=True)
    return any(bare.token_to_id(token) in bare.encode(token, add_special_tokens=False).ids for token in special)
