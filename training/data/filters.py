"""What keeps a document out of a pretraining set: the launch blog's rules for mC4 and S2ORC, and duplicates."""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from mpt.errors import UserError
from mpt.extras import install

Quality = Literal["none", "mc4", "s2orc"]
# Of a document (its text and its other fields), the reason it is dropped, or None.
Rule = Callable[[str, dict[str, Any]], str | None]


def mc4(text: str, _: dict[str, Any]) -> str | None:
    """mC4's rules. Source: the MPT-7B launch blog's appendix."""
    # Spaces are not characters here: they are the most common one of all prose, and none would be 92 % alphanumeric.
    visible = [c for c in text if not c.isspace()]
    if not visible:
        return "empty"
    if not Counter(visible).most_common(1)[0][0].isalpha():
        return "most common character is no letter"
    if sum(c.isalnum() for c in visible) < 0.92 * len(visible):
        return "under 92 % letters and digits"
    words = text.split()
    if not 200 <= len(words) <= 50_000:
        return "under 200 or over 50,000 words"
    share = Counter(words).most_common(1)[0][1] / len(words)
    if share > (0.075 if len(words) > 500 else 0.30):
        return "one word too common"
    return None


_PARAGRAPH_ENDS = re.compile(r"\n[^\S\n]*\n")  # a line with nothing to see
# Published after 1970 and before this day. Source: the launch blog's appendix.
_S2ORC_END = datetime.date(2022, 12, 1)
_DATES = ("date", "published", "publication_date", "publicationdate", "created", "year")  # as copies of S2ORC call it


def s2orc(text: str, fields: dict[str, Any]) -> str | None:
    """S2ORC's rules but for the language; the day is judged where the document has one. Source: as mc4.

    A document that names no more than the year 2022 stays: its month is not known.
    """
    day = _published(fields)
    if day is not None and not (day.year > 1970 and day < _S2ORC_END):
        return "from before 1971 or after November 2022"
    words = text.split()
    if len(words) < 500:
        return "under 500 words"
    if sum(bool(paragraph.strip()) for paragraph in _PARAGRAPH_ENDS.split(text)) < 5:
        return "under 5 paragraphs"
    word, n = Counter(words).most_common(1)[0]
    if not word.isalpha() or n / len(words) >= 0.075:
        return "one word too common"
    return None


def _published(fields: dict[str, Any]) -> datetime.date | None:
    """The day, or the first one of the month or the year that the document names."""
    for key in _DATES:
        value = fields.get(key)
        if isinstance(value, datetime.date):  # parquet has them; a datetime is one too
            return datetime.date(value.year, value.month, value.day)
        found = re.match(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", str(value)) if isinstance(value, int | str) else None
        if found is None:
            continue
        year, month, day = (int(part) if part else 1 for part in found.groups())
        try:
            return datetime.date(year, month, day)
        except ValueError:  # month 0 or 13: another field may be better
            continue
    return None


RULES: dict[Quality, Rule | None] = {"none": None, "mc4": mc4, "s2orc": s2orc}


class Fingerprint(NamedTuple):
    """What tells a document from others. sketch: datasketch's LeanMinHash, None where only equal texts count."""

    digest: bytes
    sketch: Any = None


def fingerprint(text: str, n_permutations: int = 0) -> Fingerprint:
    """Of the words of a text, case folded; with so many MinHash values over its runs of five words."""
    words = text.lower().split()
    digest = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if not n_permutations:
        return Fingerprint(digest)
    from datasketch import LeanMinHash, MinHash

    sketch = MinHash(num_perm=n_permutations)
    runs = {" ".join(words[n : n + 5]) for n in range(max(1, len(words) - 4))}
    sketch.update_batch([run.encode("utf-8", "surrogatepass") for run in runs])
    return Fingerprint(digest, LeanMinHash(sketch))


class Duplicates:
    """Remembers documents, and says of each whether it has been seen.

    similarity: 1 drops only equal texts (after folding case and spaces); below, also near ones by MinHash over runs of
    five words (Broder 1997), for which `datasketch` must be installed.
    """

    def __init__(self, similarity: float = 1.0, n_permutations: int = 128) -> None:
        if not 0 < similarity <= 1:
            raise UserError(f"`similarity` is {similarity}; it is a share, above 0 and at most 1")
        self._exact: set[bytes] = set()
        self._near = None
        self.n_permutations = n_permutations if similarity < 1 else 0
        if similarity < 1:
            try:
                from datasketch import MinHashLSH
            except ImportError as error:
                raise UserError(
                    f"near duplicates need datasketch; {install('data')}, or leave --near-duplicates out"
                ) from error
            self._near = MinHashLSH(threshold=similarity, num_perm=n_permutations)

    def seen(self, text: str) -> str | None:
        """The reason to drop this document, None for a new one, which is remembered."""
        return self.judge(fingerprint(text, self.n_permutations))

    def judge(self, document: Fingerprint) -> str | None:
        """As `seen`, of a document's fingerprint with `n_permutations`, which another process may have made."""
        if document.digest in self._exact:
            return "duplicate"
        self._exact.add(document.digest)
        if self._near is None:
            return None
        if self._near.query(document.sketch):
            return "near duplicate"
        self._near.insert(document.digest, document.sketch)
        return None
