"""Reads JSON files that must hold an object; writes files and folders that have their name only once they are whole.

Not here: what a checkpoint's files say (`mpt/checkpoint.py`).
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpt.bounded import parse_json, read_text
from mpt.errors import DamagedFile, MachineRefused, UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises DamagedFile, also where there is no file, and for one beyond `bounded`'s bounds."""
    try:
        value = parse_json(read_text(path))
    except (ValueError, OSError) as error:
        raise DamagedFile(f"`{path}` is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"`{path}` holds a {type(value).__name__}, not an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one where there is no file. Raises DamagedFile."""
    return read_json(path) if path.is_file() else {}


# The machine says no: no space, over the quota or the largest file, read-only, no permission, a broken disk.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


# A path that cannot be: no such folder, a file where a folder should be or a folder where a file should be.
_MISPLACED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


@contextmanager
def misplaced_paths() -> Iterator[None]:
    """Raises UserError for a path that a command was given and that cannot be read or made."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MISPLACED or error.filename is None:
            raise
        raise UserError(f"`{error.filename}` cannot be used ({error.strerror}); check the path") from error


@contextmanager
def disk_refusals(place: Path) -> Iterator[None]:
    """Raises MachineRefused where the disk refuses what is done. place: named where the error names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise MachineRefused(f"cannot use `{error.filename or place}` ({error.strerror}); {_CURE}") from error
    except Exception as error:
        if not _is_of_disk(error):
            raise
        raise MachineRefused(f"cannot use `{place}` ({error}); {_CURE}") from error


def _is_of_disk(error: BaseException) -> bool:
    """Whether it is an error of the disk that safetensors tells, which has a class of its own for all errors."""
    return type(error).__name__ == "SafetensorError" and "os error" in str(error)


_CURE = "free some space, or give this user the right to it, then run the same command"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_target(folder: Path) -> None:
    """Raises UserError unless a folder can be made here: there is nothing, or an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` exists and is not an empty folder; choose another one or remove it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which gets its name at the end; after an error nothing is left.

    Raises UserError if `folder` exists and is not empty, MachineRefused when it cannot be written.
    """
    check_target(folder)
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_of_disk(error):
            raise MachineRefused(f"cannot write `{folder}` ({error}); free some space") from error
        raise
