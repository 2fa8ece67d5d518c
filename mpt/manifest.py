"""manifest.json: what a checkpoint says of itself, and the sha256 of every file beside it.

Its presence means that the folder is whole: it is written last. Foreign checkpoints have none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt.errors import DamagedFile
from mpt.files import read_json

MANIFEST = "manifest.json"


def read_manifest(place: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where there is none (most foreign ones).

    place: a folder, or a file, whose manifest lies beside it and names it.
    """
    folder = place if place.is_dir() else place.parent
    if not (folder / MANIFEST).is_file():
        return None
    found = read_json(folder / MANIFEST)
    files = found.get("files")
    return found if folder == place or (isinstance(files, dict) and place.name in files) else None


def verify_manifest(place: Path) -> None:
    """Check every file of a folder, or the one file, against its manifest.json, if there is one.

    Raises DamagedFile naming the first that differs.
    """
    manifest = read_manifest(place)
    if manifest is None:
        return
    folder = place if place.is_dir() else place.parent
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DamagedFile(f"`{folder / MANIFEST}` has no `files` with their sha256; copy the checkpoint again")
    for name, expected in files.items() if folder == place else [(place.name, files[place.name])]:
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"`{name}` is in manifest.json but not in `{folder}`; copy the checkpoint again")
        if sha256(path) != expected:
            raise DamagedFile(f"`{path}` does not match its sha256 in manifest.json; copy the checkpoint again")


def write_manifest(folder: Path, entries: Mapping[str, Any], known: Mapping[Path, str] | None = None) -> None:
    """Write manifest.json over every file of the folder; last, so that its presence means the folder is whole.

    known: sha256 of files that were hashed while they were written.
    """
    known = known or {}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    files = {path.relative_to(folder).as_posix(): known.get(path) or sha256(path) for path in paths}
    text = json.dumps({**entries, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
