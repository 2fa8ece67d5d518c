"""How to install what an option needs: the command that works for the way this copy was installed."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import unquote, urlparse

_NAME = "mpt-home"  # on no index: a bare name would install a stranger's package, or nothing


def install(extra: str) -> str:
    """The command that brings an extra of pyproject.toml, `qlora` for example, in backticks."""
    found = origin()
    if found is None:
        return f"`pip install {shlex.quote(f'{_NAME}[{extra}]')}`"
    url = found["url"]
    path = unquote(urlparse(url).path)
    if "dir_info" in found:
        flag = "-e " if found["dir_info"].get("editable") else ""
        return f"`pip install {flag}{shlex.quote(f'{path}[{extra}]')}`"
    return f"`pip install {shlex.quote(f'{_NAME}[{extra}] @ {url}')}`"


def origin() -> dict[str, Any] | None:
    """What pip noted of where this package came from (PEP 610); None for an index."""
    try:
        text = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found: dict[str, Any] | None = None if text is None else json.loads(text)
    return found
