"""Which language a document is in: a natural one identified from its text, a programming one by what its row says.

The launch blog took English by cld3, which is no longer maintained; py3langid (the extra `data`) knows 140
languages, needs no network, and is what is asked here. A row's own `language` field is not believed.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

from mpt.errors import UserError
from mpt.extras import install

ANY = "any"
_LOOKED_AT = 1000  # characters: cld3 looked at as many bytes, and py3langid takes a millisecond or two for them
# The Stack's languages in MPT's data. Source: the launch blog's appendix; the names are The Stack's own.
THE_STACK = (
    "C", "C#", "C++", "Common Lisp", "F#", "Fortran", "Go", "Haskell", "Java", "OCaml", "Perl", "Python", "Ruby",
    "Rust", "Scala", "Scheme", "Shell", "TeX",
)  # fmt: skip
# Where rows of The Stack and its descendants name their language.
_CODE_FIELDS = ("lang", "programming_language", "language")
_ALIASES = {"csharp": "c#", "fsharp": "f#", "cpp": "c++", "bash": "shell", "lisp": "commonlisp"}


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(f"identifying languages needs py3langid; {install('data')}, or take --language any") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def identify(text: str) -> str:
    """The ISO 639-1 code of a text's language. Raises UserError without py3langid."""
    found: str = _identifier().classify(text[:_LOOKED_AT])[0]
    return found


def check(code: str) -> None:
    """Raises UserError for a language that is not known."""
    known = sorted(_identifier().labels)
    if code not in known:
        raise UserError(f"`--language` is `{code}`; known: {ANY}, {', '.join(known)}")


def code_languages(names: str) -> frozenset[str]:
    """Names of programming languages, as `code_language` gives them; `mpt` stands for The Stack's 18 in MPT's data."""
    asked = THE_STACK if names == "mpt" else [name for name in names.split(",") if name.strip()]
    if not asked:
        raise UserError("`--code` is empty; give `mpt`, or names like Python,C++")
    return frozenset(_plain(name) for name in asked)


def code_language(row: dict[str, Any]) -> str | None:
    """What a row says of its programming language; None where it says nothing."""
    fields: Iterable[Any] = (row.get(field) for field in _CODE_FIELDS)
    name = next((field for field in fields if isinstance(field, str) and field.strip()), None)
    return None if name is None else _plain(name)


def _plain(name: str) -> str:
    """Without case, spaces and hyphens: C-Sharp, csharp and C# are one."""
    squeezed = "".join(c for c in name.casefold() if c not in " -_")
    return _ALIASES.get(squeezed, squeezed)
