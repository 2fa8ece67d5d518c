"""What runs here. The commit is what a wheel's build noted, or pip, or the checkout itself."""

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import mpt
from mpt import extras

_NOTED = Path(__file__).with_name("commit.txt")  # written by hatch_build.py into wheels
_CHECKOUT = Path(__file__).resolve().parents[1]


@cache
def commit() -> str:
    """The 40 hex digits of git, or `unknown`."""
    return _noted() or _of_checkout(_CHECKOUT) or _of_pip() or "unknown"


def versions() -> dict[str, str]:
    """What runs here, for /version."""
    return {
        "version": mpt.__version__,
        "commit": commit(),
        **{name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _noted() -> str | None:
    try:
        return _NOTED.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _of_checkout(folder: Path) -> str | None:
    """What is checked out in a folder. One inside somebody else's repository, as a virtual environment is, has none."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _of_pip() -> str | None:
    """What pip noted of an installation from a repository (PEP 610)."""
    noted: str | None = (extras.origin() or {}).get("vcs_info", {}).get("commit_id")
    return noted
