"""Guesses at a sequence's next tokens, which the model then checks all at once, in one step instead of several.

Lossless by construction: the engine draws each token from the model's own logits with the sequence's own random number,
exactly as it would without a guess, and goes on to the next position only where the draw is what was guessed
(for guesses of one token this accepts as often as any scheme can; Leviathan et al. 2023, with a one-point draft). So
guesses change how many steps an answer takes, never the answer, if a step rounds several tokens as it rounds one
(`Capabilities.exact_guesses`). Elsewhere they are made when asked for, and the rounding of logits is what they change.

Two who guess: `PromptLookup` copies what followed the same tokens earlier in prompt or answer (Saxena 2023), with the
edits made before; `DraftModel` asks a smaller model. Where a grammar leaves no choice, nobody need be asked.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from mpt.backends.backend import CHEAP_TOKENS, FEW_TOKENS, Backend, Row, Work
from mpt.backends.device_errors import raise_if_lost
from mpt.engine.sequence import Sequence

log = logging.getLogger(__name__)

MAX_GUESS = FEW_TOKENS - 1  # beside the one that is known
_GRAMS = (3, 2, 1)  # lengths of what is looked up, the surer first
_MOST_REPLACED = 3  # tokens, by one: `"}, "` stands for a line's end and two spaces
READ_AT_ONCE = 512  # tokens of a text that a draft reads in a step of the engine

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

    def __init__(self, guesser: Guesser, n_cheap: int = CHEAP_TOKENS) -> None:
        """n_cheap: tokens in a step, guesses included, beyond which each more costs time."""
        self.n_guesses = self.n_guessed = self.n_right = 0
        self.guesser, self._n_cheap = guesser, n_cheap
        self._paces: WeakKeyDictionary[Sequence, Pace] = WeakKeyDictionary()

    def guess(self, sequences: list[Sequence]) -> Guesses:
        """Guesses for decoding sequences, within their memory and what they may still write."""
        rooms = {}
        for sequence in sequences:
            assert sequence.row is not None
            pace = self._paces.setdefault(sequence, Pace())
            room = min(pace.allowed(), sequence.n_left - 1, sequence.row.capacity - len(sequence.tokens))
            if room > 0:
                rooms[sequence] = room
        shared = _shared_out(rooms, self._n_cheap - len(sequences))
        forced = {sequence: tokens for sequence, n in shared.items() if (tokens := sequence.forced(n))}
        free = {sequence: n for sequence, n in shared.items() if sequence not in forced}
        return forced | self.guesser.guess(free) if free else forced

    def note(self, sequence: Sequence, n_guessed: int, n_right: int) -> None:
        self.n_guesses += 1
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


class PromptLookup:
    """What followed the last three, two or one tokens when they last stood in this sequence, and changes made there.

    YAML that becomes JSON, or code in which a name changes, is a copy with the same few edits made over and over.
    Guesses that make them too give 3.1 tokens a step there; the copy alone, which ends at each of them, gave 1.8.
    """

    def __init__(self) -> None:
        self._copies: WeakKeyDictionary[Sequence, _Copy] = WeakKeyDictionary()

    def guess(self, rooms: Rooms) -> Guesses:
        found = {
            one: self._copies.setdefault(one, _Copy(one.n_prompt)).guess(one.tokens, n) for one, n in rooms.items()
        }
        return {one: guess for one, guess in found.items() if guess}


class _Copy:
    """Where one answer is copied from, and its edits of the prompt: one token each, in place of up to three."""

    def __init__(self, n_prompt: int) -> None:
        self._n_prompt, self._n_read = n_prompt, 0
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram to the place behind it
        self._source: int | None = None  # the place that comes next
        self._edit: int | None = None  # the last token, where it is not what stood there
        self._edits: dict[tuple[int, ...], int] = {}  # tokens around a place to what was written there instead
        self._n_replaced: dict[int, int] = {}  # by each of these tokens

    def guess(self, tokens: list[int], n: int) -> list[int]:
        if not self._n_read:
            self._n_read = self._read_all(tokens[: self._n_prompt - 1])
        for at in range(self._n_read, len(tokens)):
            self._read(tokens, at)
        self._n_read = len(tokens)
        if self._source is None or (self._edit is not None and self._edit not in self._n_replaced):
            return []
        guess: list[int] = []
        place, edit = self._source, self._edit
        while len(guess) < n and (place := place + (0 if edit is None else self._n_replaced[edit])) < len(tokens):
            known = _around(tokens, place) if edit is None and place < self._n_prompt else ()
            edit = next((self._edits[around] for around in known if around in self._edits), None)
            guess.append(tokens[place] if edit is None else edit)
            place += edit is None
        while len(guess) < n and place - len(tokens) < len(guess):  # goes on with what it is about to write
            guess.append(guess[place - len(tokens)])
            place += 1
        return guess

    def _read_all(self, tokens: list[int]) -> int:
        """Read what is before all guesses, in no loop of Python's: 40 ms for a book of 64,000 tokens, half the time."""
        for length in _GRAMS:
            grams = zip(*(tokens[start:] for start in range(length)), strict=False)
            self._behind.update(zip(grams, range(length, len(tokens) + 1), strict=False))
        return len(tokens)

    def _read(self, tokens: list[int], at: int) -> None:
        if self._source is not None:
            self._follow(tokens, at, self._source)
        grams = [tuple(tokens[at + 1 - length : at + 1]) for length in _GRAMS if length <= at + 1]
        if self._source is None and at + 1 >= self._n_prompt:
            self._source = next((self._behind[gram] for gram in grams if gram in self._behind), None)
        for gram in grams:
            self._behind[gram] = at + 1

    def _follow(self, tokens: list[int], at: int, source: int) -> None:
        """Learn from the token at `at`, where that at `source` was next to be copied."""
        token, edit = tokens[at], self._edit
        self._source = self._edit = None
        if edit is not None:
            near = tokens[source : min(source + _MOST_REPLACED + 1, self._n_prompt)]
            if token in near:  # behind an edit the copy goes on
                self._n_replaced[edit] = near.index(token)
                self._edits |= dict.fromkeys(_around(tokens, source), edit)
                self._source = source + near.index(token) + 1
        elif token == tokens[source]:
            self._source = source + 1
            for around in _around(tokens, source):
                self._edits.pop(around, None)  # not made this time
        elif source < self._n_prompt:  # what is copied from the answer has been edited
            self._source, self._edit = source, token


def _around(tokens: list[int], place: int) -> tuple[tuple[int, ...], ...]:
    """A place's tokens, by which edits are known: with both neighbours, with the next, alone."""
    return tuple(tokens[place - 1 : place + 2]), tuple(tokens[place : place + 2]), (tokens[place],)


# -- written by a smaller model --------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """One sequence's cache in the draft model."""

    row: Row
    n_known: int = 0  # tokens the sequence had when last guessed for
    guessed: list[int] = field(default_factory=list)


class DraftModel:
    """A smaller model of the same vocabulary, which writes on greedily.

    Its rows have room for no more tokens than those they guess for. One that finds no memory for a row guesses nothing
    for it in that step.
    """

    def __init__(self, backend: Backend, n_vocab: int) -> None:
        """n_vocab: the ids the model and its draft share, counted from 0."""
        self.backend, self._n_vocab = backend, n_vocab
        self._drafts: WeakKeyDictionary[Sequence, _Draft] = WeakKeyDictionary()

    def guess(self, rooms: Rooms) -> Guesses:
        unread: dict[Sequence, list[int]] = {}
        for gone in [one for one in self._drafts if one.row is None]:  # it has ended, or waits again
            del self._drafts[gone]
        for one, n in rooms.items():
            n_needed = len(one.tokens) + n
            if self.backend.max_length is not None and n_needed > self.backend.max_length:
                continue
            draft = self._with_room(one, n_needed)
            if draft is None:
                continue
            came = one.tokens[draft.n_known :]
            n_right = 0
            while n_right < min(len(came), len(draft.guessed)) and came[n_right] == draft.guessed[n_right]:
                n_right += 1
            draft.row.length = min(draft.row.length, draft.n_known + n_right, len(one.tokens) - 1)
            draft.n_known, draft.guessed = len(one.tokens), []
            unread[one] = one.tokens[draft.row.length :]
        late = {one: tokens[:READ_AT_ONCE] for one, tokens in unread.items() if len(tokens) > READ_AT_ONCE}
        if late:
            self._read(late, 0)
        unread = {one: tokens for one, tokens in unread.items() if one not in late}
        asked = {one: self._drafts[one] for one in unread}
        while unread:
            for one, token in self._read(unread, 1).items():
                self._drafts[one].guessed.append(token)
            unread = {one: draft.guessed[-1:] for one, draft in asked.items() if len(draft.guessed) < rooms[one]}
        return {one: draft.guessed for one, draft in asked.items()}

    def _with_room(self, one: Sequence, n_tokens: int) -> _Draft | None:
        """The sequence's draft with a row for so many tokens; None, and none is kept, where there is no memory."""
        try:
            if one not in self._drafts:
                self._drafts[one] = _Draft(self.backend.reserve(None, n_tokens))
            self._drafts[one].row = self.backend.reserve(self._drafts[one].row, n_tokens)
        except RuntimeError as error:  # torch's out of memory, or a pool without a free page
            raise_if_lost(error)
            log.debug("the draft has no memory for %s and guesses nothing for it now: %s", one.request.id, error)
            self._drafts.pop(one, None)
            return None
        return self._drafts[one]

    def _read(self, texts: Mapping[Sequence, list[int]], n_logits: int) -> dict[Sequence, int]:
        """Read these tokens of each sequence; the likeliest next one of each, if logits are wanted."""
        rows = [self._drafts[one].row for one in texts]
        work = [Work(row, tokens, n_logits) for row, tokens in zip(rows, texts.values(), strict=True)]
        logits = self.backend.forward(work)
        for item in work:
            item.row.length += len(item.tokens)
        best = logits[:, : self._n_vocab].argmax(-1).tolist()
        return dict(zip(texts, best, strict=True)) if n_logits else {}
