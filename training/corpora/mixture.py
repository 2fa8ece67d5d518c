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


def copying_document(rng: random.Random, tokenizer: Tokenizer, shelf: Shelf) -> Document:
    """A short document, mostly one whose second half repeats the first: where copying is learned.

    Copying appears within 100 steps of these; in 300 steps of the base's longer documents it had not (measured).
    """
    kind = rng.random()
    if kind < 0.4:
        return _repetition(rng, tokenizer, rng.randint(2, 8))
    if kind < 0.8:
        limit = 60 if rng.random() < 0.7 else 140
        return _yaml_and_json(yaml_json.pair(rng, max_characters=limit), tokenizer, learns_yaml=False)
    if kind < 0.9:
        return _dialogue(chat.conversation(rng, n_turns=2), tokenizer)
    ids = shelf.excerpt(rng, 64)
    return ids, [True] * len(ids)


def base_document(rng: random.Random, tokenizer: Tokenizer, shelf: Shelf, max_seq_len: int) -> Document:
    """A document of the base model's mixture."""
    kind = rng.random()
    if kind < 0.12:
        return _passkey_document(rng, tokenizer, shelf, rng.choice((128, 256, 384, 512)))
    if kind < 0.42:
        ids = shelf.excerpt(rng, rng.choice((256, 512, 512, max_seq_len)))
        return ids, [True] * len(ids)
    if kind < 0.72:
        return _yaml_and_json(yaml_json.pair(rng), tokenizer, learns_yaml=rng.random() < 0.3)
    if kind < 0.88:
        return _dialogue(chat.conversation(rng), tokenizer)
    return _repetition(rng, tokenizer, rng.randint(3, 20))


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


def _yaml_and_json(pair: yaml_json.Pair, tokenizer: Tokenizer, learns_yaml: bool) -> Document:
    before = tokenizer.encode(f"YAML:\n{pair.yaml}\n\nJSON:\n")
    after = [*tokenizer.encode(pair.json), tokenizer.eos_id]
    return before + after, [learns_yaml] * len(before) + [True] * len(after)


def _dialogue(talk: chat.Conversation, tokenizer: Tokenizer) -> Document:
    """A conversation as plain text, of which the assistant's part is learned."""
    ids: list[int] = []
    learned: list[bool] = []
    for user, answer in zip(talk.user_turns, talk.answers, strict=True):
        asked, said = tokenizer.encode(f"User: {user}\nAssistant: "), tokenizer.encode(f"{answer}\n")
        ids += asked + said
        learned += [False] * len(asked) + [True] * len(said)
    return [*ids, tokenizer.eos_id], [*learned, True]


def _repetition(rng: random.Random, tokenizer: Tokenizer, n_items: int) -> Document:
    """A list of invented words and numbers, then the same again: the plainest lesson in copying."""
    items = []
    for _ in range(n_items):
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
