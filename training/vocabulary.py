"""Trains the byte-level BPE of the mpt-tiny family, and finds other tokenizers by name.

It splits so that a word is the same tokens wherever it is copied to: a digit is a token, a space belongs to the next
word only between two lower-case words of prose, and `": "`, `, ` and their like are pieces of their own. Then a value
after `key: ` and the same value after a quote in JSON are the same tokens, and copying is one lookup per token.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from mpt.catalog import resolve
from mpt.tokenizer import CHATML_END, CHATML_START, END_OF_TEXT, FILES, Tokenizer

SPECIAL = (END_OF_TEXT, "<|padding|>", CHATML_START, CHATML_END)
_APOSTROPHE = r"(?<=\p{L})[’'](?:s|t|ll|d|re|ve|m)(?!\p{L})"
_REST = (r"\n+", r"[.!?;]+ ?", r" +", r"[^\s\p{L}\p{N}] ?", r"\s")
_PIECES = (
    _APOSTROPHE,
    r"(?<=\p{L}) \p{Ll}+",
    r"\p{L}+",
    r"\p{N}",
    r"[\]}\"]*[:,] [{\[\"]*",  # between the entries of JSON, and a comma of prose
    r"[\"{}\[\]]+",
    *_REST,
)
_PIECES_APART = (_APOSTROPHE, r"\p{L}+", r"\p{N}", r"\"?: |, |[\"{}\[\]]", *_REST)


def find(name: str) -> Path:
    """Where a tokenizer lies: a folder that holds one, with a checkpoint or without, or a name of the catalog.

    Raises CheckpointNotFound.
    """
    folder = Path(name).expanduser()
    return folder if any((folder / file).is_file() for file in FILES) else resolve(name)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly vocab_size tokens, the four special ones first; the same texts give the same one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(_PIECES)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def apart(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens for a model that copies between YAML and JSON: each bracket is one, and no space joins a word.

    How many brackets close is then decided one by one. A word that begins a line of a folded text is the same tokens
    as after a space.
    """
    state = json.loads(tokenizer.to_json())
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "|".join(_PIECES_APART)
    return Tokenizer.from_json(json.dumps(state), "the tokenizer of the instruct model")
