"""Guesses at a sequence's next tokens, which the model then checks all at once, in one step instead of several.

Lossless by construction: the engine draws each token from the model's own logits with the sequence's own random number,
exactly as it would without a guess, and goes on to the next position only where the draw is what was guessed
(for guesses of one token this accepts as often as any scheme can; Leviathan et al. 2023, with a one-point draft). So
guesses change how many steps an answer takes, never the answer.

Two who guess: `PromptLookup` copies what followed the same tokens earlier in prompt or answer (Saxena 2023),
`DraftModel` asks a smaller model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from serving.backend import Backend, Row, Work
from serving.sequence import Sequence

MAX_GUESS = 15  # tokens; with the one that is known they fill the 16 columns of a product, which cost what one costs
_GRAMS = (3, 2, 1)  # lengths of what is looked up, the surer first
_READ_AT_ONCE = 512  # prompt tokens the draft reads in a step of the engine

Rooms = Mapping[Sequence, int]  # how many tokens to guess at, at most
Guesses = dict[Sequence, list[int]]  # the tokens that may follow; sequences without an idea are left out


class Guesser(Protocol):
    def guess(self, rooms: Rooms) -> Guesses: ...


class Pace:
    """How many tokens to guess at: more while the guesses are right, none for longer and longer while they are wrong.

    A guess costs up to 8 % of a step (measured at 125M, one row). Guessing in vain soon happens once in 64 steps, and
    one lucky guess does not bring it all back.
    """

    def __init__(self) -> None:
        self._n, self._rest, self._pause = 4, 0, 1

    def allowed(self) -> int:
        """Tokens to guess at in this step."""
        if self._rest:
            self._rest -= 1
            return 0
        return self._n

    def note(self, n_guessed: int, n_right: int) -> None:
        if n_right:
            self._pause = max(1, self._pause // 4)
            self._n = min(2 * self._n, MAX_GUESS) if n_right == n_guessed else max(3, n_right + 1)
        else:
            self._n, self._rest, self._pause = max(2, self._n // 2), self._pause - 1, min(2 * self._pause, 64)


class Speculation:
    """What an engine asks for guesses: as many as each sequence's pace allows and are cheap, and how they did."""

    def __init__(self, guesser: Guesser, n_cheap: int = 32) -> None:
        """n_cheap: tokens in a step, guesses included, beyond which each more costs time."""
        self.n_guessed = self.n_right = 0
        self.guesser, self._n_cheap = guesser, n_cheap
        self._paces: WeakKeyDictionary[Sequence, Pace] = WeakKeyDictionary()

    def guess(self, sequences: list[Sequence]) -> Guesses:
        """Guesses for decoding sequences, within their memory and what they may still write."""
        rooms = {}
        for sequence in sequences:
            assert sequence.row is not None
            if sequence.request.adapter is not None:
                continue  # its steps run where one token and several are not rounded alike
            pace = self._paces.setdefault(sequence, Pace())
            room = min(pace.allowed(), sequence.n_left - 1, sequence.row.capacity - len(sequence.tokens))
            if room > 0:
                rooms[sequence] = room
        shared = _shared_out(rooms, self._n_cheap - len(sequences))
        return self.guesser.guess(shared) if shared else {}

    def note(self, sequence: Sequence, n_guessed: int, n_right: int) -> None:
        self.n_guessed += n_guessed
        self.n_right += n_right
        self._paces[sequence].note(n_guessed, n_right)


def _shared_out(rooms: Rooms, n_most: int) -> dict[Sequence, int]:
    """At most n_most tokens over sequences that could use `rooms`, one at a time to each."""
    given: dict[Sequence, int] = {}
    while n_most > 0 and (open_ := [one for one, room in rooms.items() if given.get(one, 0) < room]):
        for one in open_[:n_most]:
            given[one] = given.get(one, 0) + 1
        n_most -= len(open_[:n_most])
    return given


# -- copied from the sequence itself ---------------------------------------------------------------------------------


@dataclass
class _Grams:
    after: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram to the place behind it
    n_read: int = 1


class PromptLookup:
    """What followed the last three, two or one tokens when they last stood in this sequence."""

    def __init__(self) -> None:
        self._grams: WeakKeyDictionary[Sequence, _Grams] = WeakKeyDictionary()

    def guess(self, rooms: Rooms) -> Guesses:
        found = {one: self._guess(self._grams.setdefault(one, _Grams()), one.tokens, n) for one, n in rooms.items()}
        return {one: guess for one, guess in found.items() if guess}

    @staticmethod
    def _guess(grams: _Grams, tokens: list[int], n: int) -> list[int]:
        for end in range(grams.n_read, len(tokens)):  # those that end before the last token
            for length in _GRAMS:
                if end >= length:
                    grams.after[tuple(tokens[end - length : end])] = end
        grams.n_read = len(tokens)
        for length in _GRAMS:
            at = grams.after.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if at is not None:
                return tokens[at : at + n]
        return []


# -- written by a smaller model --------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """One sequence's cache in the draft model."""

    row: Row
    n_known: int = 0  # tokens the sequence had when last guessed for
    guessed: list[int] = field(default_factory=list)


class DraftModel:
    """A smaller model of the same vocabulary, which writes on greedily."""

    def __init__(self, backend: Backend, n_vocab: int) -> None:
        """n_vocab: the ids the model and its draft share, counted from 0."""
        self.backend, self._n_vocab = backend, n_vocab
        self._drafts: WeakKeyDictionary[Sequence, _Draft] = WeakKeyDictionary()

    def guess(self, rooms: Rooms) -> Guesses:
        unread: dict[Sequence, list[int]] = {}
        for one, n in rooms.items():
            n_needed = len(one.tokens) + n
            if self.backend.max_length is not None and n_needed > self.backend.max_length:
                continue
            draft = self._drafts.get(one)
            if draft is None:
                draft = self._drafts[one] = _Draft(self.backend.reserve(None, n_needed))
            draft.row = self.backend.reserve(draft.row, n_needed)
            came = one.tokens[draft.n_known :]
            n_right = 0
            while n_right < min(len(came), len(draft.guessed)) and came[n_right] == draft.guessed[n_right]:
                n_right += 1
            draft.row.length = min(draft.row.length, draft.n_known + n_right, len(one.tokens) - 1)
            draft.n_known, draft.guessed = len(one.tokens), []
            unread[one] = one.tokens[draft.row.length :]
        late = {one: tokens[:_READ_AT_ONCE] for one, tokens in unread.items() if len(tokens) > _READ_AT_ONCE}
        if late:
            self._read(late, 0)
        unread = {one: tokens for one, tokens in unread.items() if one not in late}
        while unread:
            for one, token in self._read(unread, 1).items():
                self._drafts[one].guessed.append(token)
            drafts = {one: self._drafts[one] for one in unread}
            unread = {one: draft.guessed[-1:] for one, draft in drafts.items() if len(draft.guessed) < rooms[one]}
        return {one: draft.guessed for one in rooms if (draft := self._drafts.get(one)) and draft.guessed}

    def _read(self, texts: Mapping[Sequence, list[int]], n_logits: int) -> dict[Sequence, int]:
        """Read these tokens of each sequence; the likeliest next one of each, if logits are wanted."""
        rows = [self._drafts[one].row for one in texts]
        work = [Work(row, tokens, n_logits) for row, tokens in zip(rows, texts.values(), strict=True)]
        logits = self.backend.forward(work)
        for item in work:
            item.row.length += len(item.tokens)
        best = logits[:, : self._n_vocab].argmax(-1).tolist()
        return dict(zip(texts, best, strict=True)) if n_logits else {}
