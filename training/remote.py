"""Files at any URL fsspec opens (s3://, gs://, abfs://, file://, memory://), tried again when the store fails."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mpt.errors import MachineRefused, UserError
from mpt.extras import install

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_ATTEMPTS = 4
_FIRST_WAIT_S = 1.0  # doubled each time
_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


def partial_name(path: Path) -> Path:
    """Where a file is made before it appears under its name, this process's and thread's own."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")


class Remote:
    """A folder at a URL."""

    def __init__(self, url: str) -> None:
        """Raises UserError when the URL's scheme is unknown or its package is not installed."""
        try:
            self.files, root = fsspec.core.url_to_fs(url)
            if isinstance(self.files, LocalFileSystem):  # elsewhere a folder is no more than the names in it
                self.files = LocalFileSystem(auto_mkdir=True)
        except (ImportError, ValueError) as error:
            hint = f"; {install('s3')}" if isinstance(error, ImportError) and url.startswith("s3:") else ""
            raise UserError(f"`{url}` cannot be opened: {error}{hint}") from error
        self.url, self.root = url, PurePosixPath(root)

    def make_folder(self) -> None:
        """Make the folder where one is needed before its files: on this machine. Raises MachineRefused."""
        if isinstance(self.files, LocalFileSystem):
            try:
                self.files.makedirs(str(self.root), exist_ok=True)
            except OSError as error:
                raise MachineRefused(f"cannot make `{self.url}` ({error.strerror}); choose another place") from error

    def get(self, name: str, to: Path, check: Callable[[Path], None] = lambda _: None) -> None:
        """Copy a file here; it appears whole and checked, also when several processes fetch it into one folder.

        Raises UserError when it is not there, and what `check` raises of the copy.
        """
        partial = partial_name(to)
        try:
            self.retry(lambda: self.files.get_file(str(self.root / name), str(partial)))
            check(partial)
            partial.replace(to)
        except FileNotFoundError as error:
            raise UserError(f"`{self.url}` has no `{name}`; check the address") from error
        finally:
            partial.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Copy a file there. Raises MachineRefused, naming where it should have gone."""
        try:
            self.retry(lambda: self.files.put_file(str(path), str(self.root / name)), f"write `{name}` to")
        except FileNotFoundError as error:
            raise MachineRefused(f"cannot write `{name}` to `{self.url}`: {error.strerror or error}") from error

    def remove(self, name: str) -> None:
        """Remove a file or a folder."""
        self.retry(lambda: self.files.rm(str(self.root / name), recursive=True))

    def find(self, pattern: str) -> list[PurePosixPath]:
        """What matches below the folder, relative to it."""
        self.files.invalidate_cache()
        found = self.retry(lambda: self.files.glob(str(self.root / pattern)))
        return sorted(PurePosixPath(path).relative_to(self.root) for path in found)

    def retry(self, action: Callable[[], Result], what: str = "reach") -> Result:
        """The result of an action, tried several times; one that trying cannot mend is told at once.

        what: the action in words, before the address. Raises MachineRefused, FileNotFoundError.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt == _ATTEMPTS - 1 or error.errno in _LASTING:
                    said = str(error.strerror or error)
                    place = f" at `{error.filename}`" if error.filename else ""
                    raise MachineRefused(f"cannot {what} `{self.url}`{place}: {said}") from error
                log.warning("`%s`: %s; trying again", self.url, error)
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise AssertionError
