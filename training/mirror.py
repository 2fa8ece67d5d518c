"""A second home for a run's checkpoints: any URL fsspec opens (s3://, gs://, abfs://, file://, memory://).

A folder is complete there once its manifest is, which is written last; a machine that is gone is replaced by one that
starts with the same command and finds the newest checkpoint there.
"""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import fsspec

from mpt.checkpoint import MANIFEST, verify_manifest
from mpt.errors import MachineRefused, UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_ATTEMPTS = 4
_FIRST_WAIT_S = 1.0  # doubled each time


class Mirror:
    """Copies whole checkpoint folders to a URL and back."""

    def __init__(self, url: str) -> None:
        """Raises UserError when the URL's scheme is unknown or its package is not installed."""
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"`{url}` cannot be opened: {error}") from error
        self._root = PurePosixPath(root)

    def put(self, folder: Path, keep: int | None = None) -> None:
        """Copy a folder, and drop the oldest steps beyond `keep`. Raises MachineRefused after several attempts."""
        target = self._root / folder.name
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == MANIFEST)  # the manifest last
        for name in names:
            self._retry(lambda name=name: self._files.put_file(str(folder / name), str(target / name)))  # type: ignore[misc]
        for old in self._steps()[: -keep if keep else 0]:
            self._retry(lambda old=old: self._files.rm(str(self._root / old), recursive=True))  # type: ignore[misc]

    def fetch_latest(self, out: Path) -> Path | None:
        """Bring the newest checkpoint here unless it is already; None where there is none.

        Raises DamagedFile when it does not match its manifest.
        """
        found = self._retry(self._steps)
        if not found:
            return None
        final = out / found[-1]
        if not final.is_dir():
            partial = final.with_name(final.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self._retry(lambda: self._files.get(str(self._root / found[-1]), str(partial), recursive=True))
            verify_manifest(partial)
            partial.rename(final)
        return final

    def _steps(self) -> list[str]:
        """The complete checkpoints, oldest first."""
        self._files.invalidate_cache()
        return sorted(
            PurePosixPath(path).parent.name for path in self._files.glob(str(self._root / "step-*" / MANIFEST))
        )

    def _retry(self, action: Callable[[], Result]) -> Result:
        for attempt in range(_ATTEMPTS):
            try:
                return action()
            except OSError as error:
                if attempt == _ATTEMPTS - 1:
                    raise MachineRefused(f"`{self._root}` cannot be reached: {error}") from error
                log.warning("`%s`: %s; trying again", self._root, error)
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise AssertionError
