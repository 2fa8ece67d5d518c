"""Where the adapters of an endpoint lie. Without torch: a cluster's routers ask too."""

import os
from collections.abc import Mapping
from pathlib import Path

from mpt.catalog import ADAPTER_CONFIG, is_adapter
from mpt.errors import CheckpointNotFound, MPTError
from mpt.options import MODEL_NAME

MAX_LOADED = 8  # adapters of rank 16 on all projections of a 7B take about 80 MB each in bfloat16


def available(given: Mapping[str, Path], folder: Path | None) -> dict[str, Path]:
    """Folders of adapters by name: those given, and those in a folder now."""
    found = {}
    if folder is not None:
        found = {path.name: path for path in sorted(folder.glob("*")) if is_adapter(path)}
    return {name: path for name, path in {**found, **given}.items() if MODEL_NAME.fullmatch(name)}


def find_inside(folder: Path, asked: str) -> Path:
    """The folder of an adapter that a client names, by a path from `folder` or an absolute one.

    Raises CheckpointNotFound for what is not there or not inside, links followed, without saying which; no message
    holds a path but the client's own.
    """
    absent = CheckpointNotFound(f"`{asked[:200]}` is no adapter inside the folder that adapters are loaded from")
    if "\0" in asked:
        raise absent
    root = folder.resolve()
    try:
        path = (root / asked).resolve(strict=True)
        files = [(path / name).resolve(strict=True) for name in (ADAPTER_CONFIG, "adapter_model.safetensors")]
    except (OSError, RuntimeError):  # absent, not to be read, or a loop of links
        raise absent from None
    if path == root or not all(each.is_relative_to(root) for each in (path, *files)):
        raise absent
    return path


def without_path(error: MPTError, path: Path, asked: str) -> str:
    """What an error says, the client's own words in place of this machine's path."""
    return str(error).replace(f"{path}{os.sep}", "").replace(str(path), asked[:200])
