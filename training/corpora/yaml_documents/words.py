"""Words, phrases and sentences that nobody can guess: of novels, of configuration files, invented, of other scripts."""

# ruff: noqa: E501, SIM905  (a hundred words in quotes of their own read worse)

import random
import re
import string
from collections.abc import Sequence

from training.corpora import words

_TECHNICAL = (
    "name version image ports volumes services environment command build context args restart networks driver host port "
    "user password database cache queue worker server client proxy token secret config settings options logging level "
    "format path file folder mount read write timeout interval retries replicas resources limits memory cpu labels tags "
    "metadata spec template containers selector status type kind id key value default enabled disabled required steps jobs "
    "runs uses with if on push branches main develop stage deploy test lint release cron schedule matrix include exclude "
    "needs script install dependencies packages license author email description title summary paths get post put delete "
    "parameters schema properties items string integer number boolean object array responses content example url base api "
    "ref source target output input size width height color colour price amount currency total count rate date time start "
    "end from to city country street zip phone first last age address people members owner team role group list rules "
    "filters mode theme language locale zone region bucket index alias domain ssl cert debug verbose max min weight order"
).split()
_FOREIGN = "äöüßéèêàâçñóíúáõãåøæœłśżźćńčšžřěůýőűğışİÄÖÜÉÑÅØČŠŽ"
_SCRIPTS = tuple(  # some letters of each at a time, so that a document does not hold a thousand kinds
    "".join(chr(code) for code in range(first, last + 1) if chr(code).isalpha())
    for first, last in (
        (0x0391, 0x03C9), (0x0430, 0x044F), (0x0410, 0x045F), (0x05D0, 0x05EA), (0x0621, 0x064A), (0x0905, 0x0939), (0x0E01, 0x0E2E),
        (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x00C0, 0x017F), (0x1EA0, 0x1EF9),
    )
)  # fmt: skip

_CAPITALISED = re.compile(r"[A-Z]")


class Shelf:
    """The words and the running text that documents are made of: those of some novels."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text.split() for text in texts]
        found = {word for text in texts for word in re.findall(r"[A-Za-zÀ-ž]+(?:['’-][a-z]+)?", text) if len(word) < 16}
        self.words = sorted(found)


class Words:
    """Draws words, phrases and values for one document; it returns to words it drew, as documents do."""

    def __init__(self, rng: random.Random, shelf: Shelf) -> None:
        self.rng = rng
        self._shelf = shelf
        self._drawn: list[str] = []
        self._returns = rng.choice((0.05, 0.2, 0.4))
        self._script = rng.choice(_SCRIPTS) if rng.random() < 0.07 else ""
        self._is_foreign = rng.random() < 0.12
        self._few: list[str] = []

    def keep_to_few(self) -> None:
        """Draw from a few short words from now on: nearly every line is then like others of its document."""
        self._few = [word for word in (self.word() for _ in range(self.rng.randint(5, 14))) if len(word) < 9]

    def word(self) -> str:
        """One word, without spaces."""
        rng = self.rng
        if self._few and rng.random() < 0.93:
            return rng.choice(self._few)
        if self._drawn and rng.random() < self._returns:
            word = rng.choice(self._drawn)
            return word if rng.random() < 0.85 else _altered(rng, word)
        kind = rng.random()
        if self._script and kind < 0.7:
            word = "".join(rng.choice(self._script) for _ in range(rng.randint(1, 6)))
        elif kind < 0.45:
            word = rng.choice(self._shelf.words)
            if _CAPITALISED.match(word) and rng.random() < 0.5:
                word = word.lower()
        elif kind < 0.68:
            word = rng.choice(_TECHNICAL)
        elif kind < 0.84:
            word = words.invented(rng, False)
        elif kind < 0.94:
            word = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 8)))
        else:
            letters = string.ascii_letters if rng.random() < 0.5 else string.ascii_lowercase + string.digits
            word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 10)))
        if self._is_foreign and rng.random() < 0.6:
            word = "".join(rng.choice(_FOREIGN) if rng.random() < 0.2 else letter for letter in word)
        word = word.replace("’", "'")
        self._drawn.append(word)
        return word

    def name(self) -> str:
        """A capitalised word."""
        word = self.word()
        return word[0].upper() + word[1:]

    def phrase(self, most: int = 5) -> str:
        """Some words, as a title or a name has them."""
        rng = self.rng
        parts = [self.word() for _ in range(rng.randint(1, most))]
        style = rng.random()
        if style < 0.3:
            parts = [part[0].upper() + part[1:] for part in parts]
        elif style < 0.5:
            parts[0] = parts[0][0].upper() + parts[0][1:]
        if len(parts) > 1 and rng.random() < 0.2:
            at = rng.randrange(1, len(parts))
            joint = rng.choice(
                (",", ",", " &", " -", " –", ":", ";", " and", " of the", " /", " +", "'s", ".", " #", " 2", " *", "!")
            )
            parts[at - 1] += joint
        text = " ".join(parts)
        ending = rng.random()
        if ending < 0.06:
            return text + rng.choice(".?!")
        if ending < 0.08:
            return f"{text} ({self.word()})"
        if ending < 0.1:
            return f'{text} "{self.word()}"'
        if ending < 0.14:
            return f"{text} {rng.randint(0, 999)}"
        return text

    def sentence(self, most: int = 24) -> str:
        """Running text of a novel, from any place in it."""
        rng = self.rng
        text = rng.choice(self._shelf.texts)
        at = rng.randrange(max(1, len(text) - most))
        found = " ".join(text[at : at + rng.randint(3, most)]).strip("-—–_* ")
        if rng.random() < 0.7:
            found = found.translate(str.maketrans("’‘“”", "''\"\""))
        if rng.random() < 0.5:
            found = found[:1].upper() + found[1:].rstrip(",;:") + rng.choice(("", ".", ".", "!", "?"))
        return found or "none"

    def identifier(self) -> str:
        """Words joined as names in programs are."""
        rng = self.rng
        joint = rng.choice("---__.")
        parts = [self.word().lower() for _ in range(rng.choice((1, 1, 2, 2, 3)))]
        if rng.random() < 0.15:
            parts.append(str(rng.randint(0, 99)))
        return joint.join(parts)


def _altered(rng: random.Random, word: str) -> str:
    """A word that is almost another one, so that copying has to look."""
    if len(word) < 3 or rng.random() < 0.4:
        return word + rng.choice(("s", "2", "ed", "er", "-1", "_old"))
    at = rng.randrange(len(word))
    return word[:at] + word[at + 1 :] if rng.random() < 0.5 else word[:at] + word[at] + word[at:]
