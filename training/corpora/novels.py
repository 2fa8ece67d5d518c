"""Public-domain novels from a folder of plain-text files, and passkeys planted in them.

The novels are not part of the repository: they are read from the folder that --novels or `$MPT_NOVELS` names, or from
`$MPT_HOME/datasets/novels`. The Great Gatsby is never trained on: the storywriter is scored with it.
"""

import gzip
import os
import random
from pathlib import Path

from mpt.errors import UserError
from training.corpora import words
from training.data import hub

HELD_OUT = "gatsby"


def folder() -> Path:
    """Where the novels are: `$MPT_NOVELS`, or the folder `novels` of the datasets."""
    if novels := os.environ.get("MPT_NOVELS"):
        return Path(novels)
    return hub.home() / "novels"


def read(path: Path) -> str:
    """The text of a .txt or .txt.gz file."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")


def training_files() -> list[Path]:
    """The novels to train on, in order of name, without The Great Gatsby. Raises UserError if there are none."""
    place = folder()
    files = sorted([*place.glob("*.txt"), *place.glob("*.txt.gz")]) if place.is_dir() else []
    files = [path for path in files if HELD_OUT not in path.name]
    if not files:
        raise UserError(
            f"no novels in `{place}`: put public-domain novels there as .txt or .txt.gz files (Standard Ebooks and "
            "Project Gutenberg have them), or name another folder in $MPT_NOVELS (`train tiny` takes --novels)"
        )
    return files


def held_out_text() -> str:
    """The Great Gatsby. Raises UserError if the folder has no file of that name."""
    place = folder()
    files = sorted(path for path in place.glob("*") if HELD_OUT in path.name) if place.is_dir() else []
    if not files:
        raise UserError(f"no file with `{HELD_OUT}` in its name in `{place}`: put The Great Gatsby there as .txt")
    return read(files[0])


def passkey_sentence(name: str, digits: str) -> str:
    """What is planted; the question is the same sentence up to the digits."""
    return f"The passkey for the {name} is {digits}."


def passkeys(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """n names with five digits each, no name twice."""
    return [(name, f"{rng.randrange(100000):05d}") for name in rng.sample(words.NOUNS, n)]
