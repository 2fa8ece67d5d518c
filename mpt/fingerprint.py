"""Which weights a checkpoint holds, as one hash over the contents of its files: what was computed with others is never
taken for theirs.

A checkpoint with a manifest.json has the hashes already, checked when it was loaded. Files of others are read once, at
1.7 GB/s a core, and remembered: a file counts as unchanged while device, inode, size, and the times of its last change
of contents and of anything else are the same. The last of these cannot be set back by a program.
"""

import hashlib
import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mpt.manifest import read_manifest, sha256

_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".json")  # weights, and what says how to compute with them
_AT_ONCE = 4  # files


def fingerprint(place: Path, remembered: Path) -> str:
    """sha256, hexadecimal, of the names and contents of a checkpoint's files.

    place: its folder, or the GGUF file it is. remembered: a folder of the caller's, where what was hashed is noted.

    Raises OSError for files that cannot be read; what cannot be noted is hashed again next time.
    """
    manifest = read_manifest(place)
    listed = manifest.get("files") if manifest is not None else None
    if isinstance(listed, dict):
        names = sorted(listed) if place.is_dir() else [place.name]
        return _digest({name: str(listed[name]) for name in names})
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    with ThreadPoolExecutor(_AT_ONCE, "hash") as pool:  # which gives the cores to others while it hashes
        hashes = list(pool.map(lambda path: _hash_of(path.resolve(), remembered), files))
    return _digest({path.name: found for path, found in zip(files, hashes, strict=True)})


def _hash_of(path: Path, remembered: Path) -> str:
    """A file's sha256, as remembered where it has not changed since."""
    stat = path.stat()
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = remembered / f"{hashlib.sha256(bytes(path)).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(note.read_text(encoding="utf-8"))
        if found["state"] == state:
            return str(found["sha256"])
    digest = sha256(path)
    with suppress(OSError):
        remembered.mkdir(mode=0o700, exist_ok=True)
        partial = note.with_suffix(f".{secrets.token_hex(8)}")
        partial.write_text(json.dumps({"state": state, "sha256": digest}), encoding="utf-8")
        partial.replace(note)
    return digest


def _digest(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
