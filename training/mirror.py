"""A second home for a run's checkpoints, at any URL.

A folder is complete there once its manifest is, which is written last; a machine that is gone is replaced by one that
starts with the same command and finds the newest checkpoint there.
"""

import shutil
from pathlib import Path

from mpt.manifest import MANIFEST, verify_manifest
from training.remote import Remote


class Mirror:
    """Copies whole checkpoint folders to a URL and back."""

    def __init__(self, url: str) -> None:
        """Raises UserError when the URL cannot be opened, MachineRefused when a folder here cannot be made."""
        self._remote = Remote(url)
        self._remote.make_folder()

    def put(self, folder: Path, keep: int | None = None) -> None:
        """Copy a folder, and drop the oldest steps beyond `keep`. Raises MachineRefused after several attempts."""
        for name in sorted((path.name for path in folder.iterdir()), key=lambda name: name == MANIFEST):  # it goes last
            self._remote.put(folder / name, f"{folder.name}/{name}")
        for old in self._steps()[: -keep if keep else 0]:
            self._remote.remove(old)

    def has(self, name: str) -> bool:
        """Whether a folder is complete there."""
        return bool(self._remote.find(f"{name}/{MANIFEST}"))

    def fetch_latest(self, out: Path) -> Path | None:
        """Bring the newest checkpoint here; None where there is none.

        Raises DamagedFile when it does not match its manifest.
        """
        found = self._steps()
        if not found:
            return None
        final = out / found[-1]
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in self._remote.find(f"{found[-1]}/*"):
            self._remote.get(str(path), partial / path.name)
        verify_manifest(partial)
        partial.rename(final)
        return final

    def _steps(self) -> list[str]:
        """The complete checkpoints, oldest first."""
        return [path.parent.name for path in self._remote.find(f"step-*/{MANIFEST}")]
