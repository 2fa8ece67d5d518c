"""The tokenizer inside a GGUF file, from its tokens, their types and its merges.

llama.cpp's converters write every row of the embedding as a token. A row that the tokenizer lacks is called `[PAD123]`
after its number, of type user-defined in 2023, unused today, and normal in the first weeks, when every token was. Those
are left out here, or a user's `[PAD123]` would become one token. Added tokens may have any id.

A SentencePiece vocabulary (`tokenizer.ggml.model` `llama` or `t5`), as of SEA-LION or Replit, has scores instead of
merges. Its normaliser is not in the file, unless as `precompiled_charsmap`; llama.cpp applies none then, nor does this.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from mpt.errors import DamagedFile
from mpt.sentencepiece_model import BPE, UNIGRAM, SentencePieceModel, tokenizer_of
from mpt.tokenizer import END_OF_TEXT, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token types
_SENTENCEPIECE = {"llama": BPE, "t5": UNIGRAM}  # llama.cpp's names
_GPT_2 = {None, "default", "gpt-2", "gpt2", "mpt", "olmo"}  # names of GPT-2's pattern, which NeoX's tokenizers use too
_BLOOM = {"bloom", "poro-chat", "gpt3-finnish"}
_BLOOMS_PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def read_tokenizer(keys: Mapping[str, Any], n_rows: int, path: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer, or None and the reason. n_rows: of the embedding. Raises DamagedFile where lists disagree."""
    tokens, types = _tokens(keys, n_rows, path)
    end = _end_of_text(keys, tokens)
    if "tokenizer.huggingface.json" in keys:
        return Tokenizer.from_json(keys["tokenizer.huggingface.json"], str(path), eos_token=end or END_OF_TEXT), None
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre")
    merges = keys.get("tokenizer.ggml.merges")
    advice = "give --tokenizer FOLDER for one"
    if not tokens:
        return None, f"it holds no tokenizer; {advice}"
    if model in _SENTENCEPIECE:
        return _sentencepiece(keys, tokens, types, end, path), None
    if model != "gpt2" or not isinstance(merges, list):
        return None, f"its tokenizer (`{model}`) is not read; {advice}"
    if pre not in _GPT_2 | _BLOOM:
        return None, f"its tokenizer splits text by llama.cpp's pattern `{pre}`, which is not known here; {advice}"
    if end is None:
        return None, f"its tokenizer does not say which token ends a text; {advice}"
    text = json.dumps(_tokenizer_json(tokens, types, merges, pre, end))
    eot = keys.get("tokenizer.ggml.eot_token_id")
    end_ids = [eot] if isinstance(eot, int) and 0 <= eot < len(tokens) else []
    return Tokenizer.from_json(text, str(path), eos_token=end, end_ids=end_ids), None


def _sentencepiece(
    keys: Mapping[str, Any], tokens: list[str], types: list[int], end: str | None, path: Path
) -> Tokenizer:
    scores = keys.get("tokenizer.ggml.scores")
    charsmap = keys.get("tokenizer.ggml.precompiled_charsmap", [])
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DamagedFile(f"`{path}` has {len(tokens)} tokens and not as many scores")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise DamagedFile(f"`{path}` has scores of tokens that are no numbers")
    if not isinstance(charsmap, list) or not all(isinstance(byte, int) for byte in charsmap):
        raise DamagedFile(f"`{path}` has a normaliser (precompiled_charsmap) that is no bytes")
    has_bytes = sum(kind == _BYTE for kind in types)
    model = SentencePieceModel(
        pieces=[
            # A row that the tokenizer lacks gets a text that no text spells.
            (f"\uffff\uffff{n}" if kind == _UNUSED and token == f"[PAD{n}]" else token, float(score), kind)
            for n, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True))
        ],
        model_type=_SENTENCEPIECE[keys["tokenizer.ggml.model"]],
        byte_fallback=has_bytes > 0,
        end=end or "",
        charsmap=bytes(byte & 255 for byte in charsmap),
        add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=bool(keys.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        escape_whitespaces=True,
    )
    return Tokenizer(tokenizer_of(model, path), eos_token=end or "")


def _tokens(keys: Mapping[str, Any], n_rows: int, path: Path) -> tuple[list[str], list[int]]:
    tokens = keys.get("tokenizer.ggml.tokens", [])
    types = keys.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise DamagedFile(f"`{path}` has a list of tokens that are no texts")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DamagedFile(f"`{path}` has {len(tokens)} tokens and not as many token types")
    if len(tokens) > n_rows:
        raise DamagedFile(f"`{path}` has {len(tokens)} tokens, and its embedding has {n_rows} rows")
    return tokens, types if set(types) != {_NORMAL} else _guessed_types(keys, tokens)


def _guessed_types(keys: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """Types for a file of the first weeks, where every token is normal.

    A token that the byte alphabet cannot spell, such as a run of spaces, was an added one. Control tokens are those
    that keys name, and those that look like `<|this|>`.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    named = {value for key, value in keys.items() if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")}

    def guess(token_id: int, token: str) -> int:
        if token_id in named or (token.startswith("<|") and token.endswith("|>")):
            return _CONTROL
        return _NORMAL if alphabet.issuperset(token) else _USER_DEFINED

    return [guess(token_id, token) for token_id, token in enumerate(tokens)]


def _end_of_text(keys: Mapping[str, Any], tokens: list[str]) -> str | None:
    for name in ("eos", "bos"):
        token_id = keys.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            return tokens[token_id]
    return END_OF_TEXT if END_OF_TEXT in tokens else None


def _tokenizer_json(tokens: list[str], types: list[int], merges: list[str], pre: str | None, end: str) -> Any:
    """As a tokenizer.json, where an added token keeps the id that it has in the vocabulary."""
    is_padding = [token == f"[PAD{token_id}]" and types[token_id] != _CONTROL for token_id, token in enumerate(tokens)]
    used = [n for n in range(len(tokens)) if types[n] != _UNUSED and not is_padding[n]]
    special = {n for n in used if types[n] in (_CONTROL, _UNKNOWN) or tokens[n] == end}
    added = [
        {"id": n, "content": tokens[n], "special": n in special, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for n in used
        if n in special or types[n] == _USER_DEFINED
    ]
    split: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pre in _BLOOM:
        pattern = {"type": "Split", "pattern": {"Regex": _BLOOMS_PATTERN}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [pattern, split | {"use_regex": False}]}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None if pre in _BLOOM else {"type": "NFC"},  # of NeoX's; llama.cpp applies none
        "pre_tokenizer": split,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {tokens[n]: n for n in used}, "merges": merges},
    }
