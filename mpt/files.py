"""Reads JSON files that must hold an object, and writes folders that have their name only once they are whole.

Not here: what a checkpoint's files say (`mpt/checkpoint.py`).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpt.errors import DamagedFile, MachineRefused, UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises DamagedFile, also where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedFile(f"`{path}` is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"`{path}` holds a {type(value).__name__}, not an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file. Raises DamagedFile."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which gets its name at the end; after an error nothing is left.

    Raises UserError if `folder` exists and is not empty, MachineRefused when it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` exists and is not an empty folder; choose another one or remove it")
    final = folder.absolute()
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineRefused(f"cannot write `{folder}` ({error}); free some space") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
