"""Reads JSON files that must hold an object; writes files and folders that have their name only once they are whole.

Not here: what a checkpoint's files say (`mpt/checkpoint.py`).
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


# A path that cannot be: no such folder, a file where a folder should be or a folder where a file should be, a name that
# is too long, links in a circle.
_MISPLACED = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


_OPEN_FILES = {Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")}


@contextmanager
def misplaced_paths() -> Iterator[None]:
    """Raises UserError for a path that a command was given and that cannot be read or made."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MISPLACED or error.filename is None:
            raise
        raise _misplaced(error.filename, error) from error


@contextmanager
def disk_refusals(place: Path | None = None) -> Iterator[None]:
    """Raises MachineRefused where the disk refuses what is done. place: named where the error names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise _refused(error.filename or place, str(error.strerror)) from error
    except Exception as error:
        if not _is_of_disk(error):
            raise
        raise _refused(place, str(error)) from error


def _refused(path: object, reason: str) -> MachineRefused:
    what = "what this command writes is refused" if path is None else f"cannot use `{path}`"
    return MachineRefused(f"{what} ({reason}); {_CURE}")


def _misplaced(path: object, error: OSError) -> UserError:
    return UserError(f"`{path}` cannot be used ({error.strerror}); check the path")


def _is_of_disk(error: BaseException) -> bool:
    """Whether it is an error of the disk that safetensors tells, which has a class of its own for all errors."""
    return type(error).__name__ == "SafetensorError" and "os error" in str(error)


_CURE = "free some space, or give this user the right to it, then run the same command"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which gets its name at the end; after an error all is as it was before.

    A link is followed, a file that was there keeps its mode, and what is no file but a pipe or a device is written as
    it comes.
    """
    if _is_stream(path):
        yield path
        return
    target = path.resolve()
    partial = target.with_name(target.name + ".partial")
    try:
        yield partial
        with suppress(FileNotFoundError):
            shutil.copymode(target, partial)
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and (error.filename is None or Path(os.fsdecode(error.filename)) == partial):
            error.filename = str(path)  # the name that was asked for; a write to a file that is open has none
        raise


def _is_stream(path: Path) -> bool:
    """Whether a name stands for something that is open elsewhere: a pipe, a device, `/dev/stdout`."""
    return (path.exists() and not path.is_file() and not path.is_dir()) or path.parent in _OPEN_FILES


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def require_writable(path: Path) -> None:
    """Find out before the work whether a file can be written there. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if _is_stream(path):  # opening a pipe waits for its reader
        return
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()


def check_target(folder: Path) -> None:
    """Raises UserError unless a folder can be made here: there is nothing, or an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` exists and is not an empty folder; choose another one or remove it")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which gets its name at the end; after an error nothing is left.

    Raises UserError if `folder` exists and is not empty or cannot be a folder, MachineRefused when the disk refuses it.
    """
    check_target(folder)
    final = folder.absolute()
    partial = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and _lies_in(error.filename, partial):
            if error.errno in _MISPLACED:
                raise _misplaced(folder, error) from error
            if error.errno is None or error.errno in _REFUSALS:
                raise _refused(folder, error.strerror or str(error)) from error
        if _is_of_disk(error):
            raise _refused(folder, str(error)) from error
        raise


def _lies_in(filename: Any, folder: Path) -> bool:
    """Whether an error's file is the folder or in it; an error without a name is of a write to a file that is open."""
    return filename is None or Path(os.fsdecode(filename)).absolute().is_relative_to(folder)
