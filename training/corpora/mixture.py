"""What the base model and the storywriter read: novels, generated documents, and passkeys planted in novels.

Each document comes with the tokens to learn. Where copying is the lesson (passkeys, repeated words), only the copies
and a little of the text around them are learned, so that they are not drowned by prose.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpt.tokenizer import Tokenizer
from training.corpora import chat, novels, words, yaml_json

Document = tuple[list[int], list[bool]]

_TAIL = 128  # tokens of prose learned before the questions of a passkey document


class Shelf:
    """The novels as tokens, one after the other."""

    def __init__(self, tokenizer: Tokenizer, files: Sequence[Path]) -> None:
        self.books = [np.array(tokenizer.encode(novels.read(path)), dtype=np.int32) for path in files]
        self._lengths = [len(book) for book in self.books]

    def excerpt(self, rng: random.Random, n_tokens: int) -> list[int]:
        """n_tokens in a row from anywhere in one novel (fewer if it is shorter); long novels are read more often."""
        (book,) = rng.choices(self.books, weights=self._lengths)
        start = rng.randrange(max(1, len(book) - n_tokens + 1))
        return [int(token) for token in book[start : start + n_tokens]]


def base_document(rng: random.Random, tokenizer: Tokenizer, shelf: Shelf, max_seq_len: int) -> Document:
    """A document of the base model's mixture."""
    kind = rng.random()
    if kind < 0.12:
        return _passkey_document(rng, tokenizer, shelf, rng.choice((128, 256, 384, 512)))
    if kind < 0.42:
        ids = shelf.excerpt(rng, rng.choice((256, 512, 512, max_seq_len)))
        return ids, [True] * len(ids)
    if kind < 0.72:
        pair = yaml_json.pair(rng)
        text = f"YAML:\n{pair.yaml}\n\nJSON:\n{pair.json}\n"
    elif kind < 0.90:
        talk = chat.conversation(rng)
        turns = zip(talk.user_turns, talk.answers, strict=True)
        text = "".join(f"User: {user}\nAssistant: {answer}\n" for user, answer in turns)
    else:
        return _repetition(rng, tokenizer)
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    return ids, [True] * len(ids)


def long_document(rng: random.Random, tokenizer: Tokenizer, shelf: Shelf, max_seq_len: int) -> Document:
    """A long stretch of a novel, every second one with passkeys asked for at its end."""
    lengths = [n for n in (2048, 4096, 8192, 16384, 32768) if n <= max_seq_len]
    weights = [8, 8, 5, 3, 1][: len(lengths)]
    (n_tokens,) = rng.choices(lengths, weights)
    if rng.random() < 0.6:
        return _passkey_document(rng, tokenizer, shelf, n_tokens)
    ids = shelf.excerpt(rng, n_tokens)
    return ids, [True] * len(ids)


def _passkey_document(rng: random.Random, tokenizer: Tokenizer, shelf: Shelf, n_tokens: int) -> Document:
    """A novel with 1 to 6 passkeys at random places, all asked for at the end."""
    keys = novels.passkeys(rng, rng.choice((1, 1, 2, 3, 4, 6)))
    planted = [tokenizer.encode(f"\n\n{novels.passkey_sentence(*key)}\n\n") for key in keys]
    rng.shuffle(keys)
    asked: list[int] = []
    learned: list[bool] = []
    for name, digits in keys:
        before, after = novels.passkey_sentence(name, digits).split(digits)
        question = tokenizer.encode(f"\n\n{before}")
        answer = tokenizer.encode(digits + after)
        asked += question + answer
        learned += [False] * len(question) + [True] * len(answer)
    room = max(2, n_tokens - len(asked) - sum(map(len, planted)))
    prose = shelf.excerpt(rng, room)
    ids: list[int] = []
    at = 0
    for place, sentence in zip(sorted(rng.randrange(len(prose)) for _ in planted), planted, strict=True):
        ids += prose[at:place] + sentence
        at = place
    ids += prose[at:]
    tail = min(_TAIL, len(ids))
    return ids + asked, [False] * (len(ids) - tail) + [True] * tail + learned


def _repetition(rng: random.Random, tokenizer: Tokenizer) -> Document:
    """A list of invented words and numbers, then the same again: the plainest lesson in copying."""
    items = []
    for _ in range(rng.randint(3, 20)):
        kind = rng.random()
        if kind < 0.5:
            word = words.invented(rng, False)
            items.append(word if rng.random() < 0.5 else word.capitalize())
        elif kind < 0.7:
            items.append(words.scrambled(rng))
        else:
            items.append(str(rng.randrange(10 ** rng.randint(1, 6))))
    first = rng.choice((", ".join(items), "\n".join(f"- {item}" for item in items)))
    again = json.dumps(items, ensure_ascii=False) if rng.random() < 0.5 else first
    before = tokenizer.encode(first + "\n\n")
    after = [*tokenizer.encode(again), tokenizer.eos_id]
    return before + after, [False] * len(before) + [True] * len(after)
