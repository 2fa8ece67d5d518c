"""Which command installs what an option needs: the one that works for the way this copy was installed.

Every hint of every package that names such a command comes from here. It names the packages of an extra, which are on
the index, and not `mpt-home[EXTRA]`: this project is on none, and where its wheel lay when it was installed, there may
be nothing now.
"""

import importlib.util
import json
import shlex
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mpt.errors import UserError

_NAME = "mpt-home"
_CHECKOUT = Path(__file__).resolve().parents[1]


def install(extra: str) -> str:
    """The command that brings an extra of pyproject.toml, `qlora` for example, in backticks."""
    return f"`{shlex.join([*_command(), *packages(extra)])}`"


def require(what: str, extra: str, *modules: str) -> None:
    """Raises UserError unless the modules are there, none of which is imported. what: needs them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{what} needs `{module}`; {install(extra)}")


def packages(extra: str) -> list[str]:
    """What an extra asks for on this machine, as requirements: `bitsandbytes>=0.48`."""
    found = []
    for text in _requirements(extra):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            requirement.marker = None
            found.append(str(requirement))
    return found


def origin() -> dict[str, Any] | None:
    """What pip noted of where this package came from (PEP 610); None for an index."""
    try:
        text = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found: dict[str, Any] | None = None if text is None else json.loads(text)
    return found


def _requirements(extra: str) -> list[str]:
    """Of a checkout as it is now; else as was noted when this copy was installed, with the extra in each marker."""
    try:
        project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == _NAME:  # beside a wheel another project may have left one
            return [str(each) for each in project["optional-dependencies"][extra]]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass
    return [each for each in distribution(_NAME).requires or [] if "extra ==" in each]


def _command() -> list[str]:
    """The words before the packages. Environments of `uv` and `pipx` have no pip, or one that is not theirs to use."""
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return ["pipx", "inject", environment.name]
    if (environment / "uv-receipt.toml").is_file() or not _has_pip():
        return ["uv", "pip", "install", "--python", sys.executable]
    first = shutil.which("pip")
    if first is not None and Path(first).parent == Path(sys.executable).parent:
        return ["pip", "install"]
    return [sys.executable, "-m", "pip", "install"]  # this environment is not the one that the shell is in


def _has_pip() -> bool:
    """Without looking for the module: setuptools takes who does for pip, and gives this process Python's distutils."""
    try:
        distribution("pip")
    except PackageNotFoundError:
        return False
    return True
